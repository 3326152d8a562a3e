"""How much each axis matters, measured: the loss when it alone is cut.

In: a graph, a function that gives the loss of a plan's counts (prune, re-estimate BatchNorm, run a
few hundred samples), and the widths to try. Out: for every axis the loss rise at those widths,
made monotone, as a curve over kept channels that the allocator can maximise.

Measured rises decide widths better than weight norms or gradients do (EagleEye, arXiv
2007.02491, on re-estimating BatchNorm; SPDY, arXiv 2201.13096, on costs per layer and option);
norms then choose the channels. Nothing here builds an engine, so one set serves every budget.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prune2deploy.errors import PlanError
from prune2deploy.graph.axes import Counts, Graph
from prune2deploy.plan.choices import Choice

Floats = npt.NDArray[np.float64]
Loss = Callable[[Counts], float]
Tell = Callable[[int, int], None]
"""Hears of progress: evaluations done, evaluations in all."""

_FRACTIONS = (0.75, 0.5, 0.25)  # of the full width: where losses are measured


@dataclass(frozen=True)
class Sensitivity:
    """Measured losses of one choice.

    Attributes:
        axes: The axes cut together.
        size: Their full width.
        widths: The widths tried, ascending, the full width last.
        rise: Loss above that of the unpruned model, one per width; 0 at the full width.
    """

    axes: tuple[str, ...]
    size: int
    widths: tuple[int, ...]
    rise: tuple[float, ...]

    def curve(self) -> Floats:
        """Minus the loss rise by kept channels, float array (size + 1,).

        Monotone (the envelope from the full width down) and linear between the widths tried;
        below the narrowest it goes on as steeply as it does above it.
        """
        widths, rise = np.array(self.widths), envelope(np.array(self.rise))
        at = np.arange(self.size + 1)
        found = np.interp(at, widths, rise)
        if len(widths) > 1 and widths[0] > 0:
            slope = (rise[0] - rise[1]) / (widths[1] - widths[0])
            below = at < widths[0]
            found[below] = rise[0] + slope * (widths[0] - at[below])
        return np.asarray(-found, dtype=np.float64)


def envelope(rise: Floats) -> Floats:
    """The least non-increasing curve above the measured rises, never negative.

    Args:
        rise: float array, loss rises by ascending width.
    """
    return np.maximum.accumulate(np.maximum(rise, 0.0)[::-1])[::-1]


def measure(
    choices: Sequence[Choice],
    loss: Loss,
    *,
    known: Mapping[str, Sensitivity] | None = None,
    tell: Tell | None = None,
    keep: Callable[[Sensitivity], None] | None = None,
) -> dict[str, Sensitivity]:
    """Cut one choice at a time and note the loss.

    Args:
        choices: The decisions, with the widths allowed.
        loss: Loss of the model with the given counts; axes that are absent keep all channels.
        known: Results of an earlier call by first axis; these are not measured again.
        tell: Hears of progress.
        keep: Is given each result as soon as it is there.

    Returns:
        First axis of every choice to its sensitivity.

    Raises:
        PlanError: The loss of the unpruned model is not finite.
    """
    found = dict(known or {})
    todo = [(choice, _widths(choice)) for choice in choices if choice.axes[0] not in found]
    if not todo:
        return found
    evaluations = itertools.count(1)
    total = 1 + sum(len(widths) for _, widths in todo)

    def evaluated(counts: Counts) -> float:
        value = loss(counts)
        if tell is not None:
            tell(next(evaluations), total)
        return value

    base = evaluated({})
    if not np.isfinite(base):
        raise PlanError(f"the unpruned model has loss {base} on the data; check data and weights")
    for choice, widths in todo:
        rises = [evaluated(dict.fromkeys(choice.axes, width)) - base for width in widths]
        one = Sensitivity(choice.axes, choice.size, (*widths, choice.size), (*_finite(rises), 0.0))
        found[choice.axes[0]] = one
        if keep is not None:
            keep(one)
    return found


def _finite(rises: Sequence[float]) -> list[float]:
    """Losses that are no number count as ten times the worst of the others, and as 10 at least."""
    worst = max((rise for rise in rises if np.isfinite(rise)), default=1.0)
    return [rise if np.isfinite(rise) else 10.0 * max(worst, 1.0) for rise in rises]


def curves(graph: Graph, measured: Mapping[str, Sensitivity]) -> dict[str, Floats]:
    """Worth by kept channels of every prunable axis, for ``choices.choices``.

    The rise of a tie is carried by its first axis; axes that were not measured are worth the
    same at every width.
    """
    found = {axis.name: np.zeros(axis.size + 1) for axis in graph.prunable}
    found.update({name: one.curve() for name, one in measured.items()})
    return found


def _widths(choice: Choice) -> tuple[int, ...]:
    """The options nearest to ``_FRACTIONS``, ascending, without the full width."""
    options = choice.options[:-1]
    near = {int(options[np.argmin(np.abs(options - f * choice.size))]) for f in _FRACTIONS}
    return tuple(sorted(near))
