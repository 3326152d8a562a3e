"""Progress on standard error: stage, build number and remaining time.

In: :class:`~prune2deploy.progress.Step` values. Out: on a terminal one line that is redrawn; in a
log a line for each build.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prune2deploy.progress import Progress, Step


@contextmanager
def drawing() -> Iterator[Progress]:
    """Give a callable that draws each step until the block is left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None, left="")

        def draw(step: Step) -> None:
            bar.update(
                task,
                description=describe(step),
                completed=step.number,
                total=max(step.total, 1),
                left=remaining(step.remaining_s),
            )

        yield draw


def logging(write: Callable[[str], None]) -> Progress:
    """Return a callable that writes one line for each build, when its first stage begins."""
    told: tuple[str, int] | None = None

    def hear(step: Step) -> None:
        nonlocal told
        now = (step.unit, step.number if step.unit == "build" else 0)
        if now != told:
            told = now
            left = remaining(step.remaining_s)
            write(describe(step) + (f", {left}" if left else ""))

    return hear


def describe(step: Step) -> str:
    """One line about a step.

    >>> describe(Step("measuring", 2, 9, "resnet18"))
    'build 2 of at most 9: measuring resnet18'
    """
    where = "baseline"
    if step.number or step.unit != "build":
        where = f"{step.unit} {step.number} of at most {step.total}"
    return f"{where}: {step.stage} {step.detail}".rstrip()


def remaining(seconds: float | None) -> str:
    """Remaining time in words.

    >>> remaining(125), remaining(None)
    ('about 2 min left', '')
    """
    if seconds is None:
        return ""
    if seconds < 90:
        return f"about {seconds:.0f} s left"
    return f"about {seconds / 60:.0f} min left"
