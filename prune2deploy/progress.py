"""How long work reports its progress; the command line draws it, other callers may ignore it.

In: nothing. Out: :class:`Step`, and the type of the callable that takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """Where long work stands.

    Attributes:
        stage: What is being done (``"building"``, ``"measuring"`` ...).
        number: Which build or ratio, 0 for the baseline; or which part of the stage.
        total: How many there are at most.
        detail: More about it, or empty.
        remaining_s: Estimated seconds to the end, ``None`` while there is nothing to go by.
        unit: What ``number`` counts.
    """

    stage: str
    number: int
    total: int
    detail: str = ""
    remaining_s: float | None = None
    unit: str = "build"


Progress = Callable[[Step], None]
NOTICE = "notice"
"""Stage of a step that says something the user must know, in ``detail``."""


def tell(progress: Progress, notices: Iterable[str]) -> None:
    """Report notices: what the user must know before the work goes on."""
    for notice in notices:
        progress(Step(NOTICE, 0, 0, notice))


def silent(step: Step) -> None:
    """Report nothing."""
