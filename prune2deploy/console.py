"""Progress on a terminal: stage, build number and remaining time, on standard error.

In: :class:`~prune2deploy.progress.Step` values. Out: one line that is redrawn; nothing at all
where standard error is no terminal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prune2deploy.progress import Progress, Step, silent


@contextmanager
def drawing(*, quiet: bool) -> Iterator[Progress]:
    """Give a callable that draws each step until the block is left."""
    if quiet:
        yield silent
        return
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


def describe(step: Step) -> str:
    """One line about a step.

    >>> describe(Step("measuring", 2, 9, "resnet18"))
    'build 2 of at most 9: measuring resnet18'
    """
    where = f"build {step.number} of at most {step.total}" if step.number else "baseline"
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
