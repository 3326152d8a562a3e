"""Corrections of linear layers by ridge regression, validated on samples not fitted to.

In: what goes into a linear operator, and what is missing from what comes out. Out: what to add to
its weights, or nothing where no correction holds on samples that it was not fitted to. Pure
arithmetic.

Least squares makes long weights, parts of which cancel each other. That is exact where nothing
changes any more. In training it is a burden: what the layers before it learn comes out magnified,
and long weights turn slowly. Where the caller says that weights must stay short, the ridge is made
strong enough for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # tried, relative to the mean square of the inputs
LONGEST = 1.1  # of the length that weights had, where they are to stay short
_STRONGER = 10**0.5  # factor from one ridge to the next that is tried to keep them so
_ROWS = 4096  # multiplied at once in single precision; the sums of those are double


def correction(
    inputs: Tensor,
    missing: Tensor,
    fitted: Tensor,
    constants: int = 0,
    short: Tensor | None = None,
) -> Tensor | None:
    """What to add to weights so that least is missing.

    Corrections with several ridges are fitted to one part of the rows and judged on the other. The
    ridge that gains most there is taken, and a correction with it fitted to all rows.

    Args:
        inputs: float32 (rows, groups, d).
        missing: float32 (rows, groups, o), to be added to the outputs.
        fitted: bool (rows,), the part to fit to; the others judge.
        constants: How many of the inputs, the last ones, stand for a bias: no ridge holds it back.
        short: (groups, d - constants, o), the weights that the correction is added to, where they
            may become at most ``LONGEST`` times as long; what is all zero is not held to it.

    Returns:
        float64 (groups, d, o) to add to weights that inputs are multiplied by from the left;
        ``None`` where leaving them alone is best on the rows that judge.
    """
    gram, cross = _moments(inputs[fitted], missing[fitted])
    other_gram, other_cross = _moments(inputs[~fitted], missing[~fitted])

    def gain(ridge: float) -> float:
        found = _solve(gram, cross, ridge, constants)
        return float((found * (2 * other_cross - other_gram @ found)).sum())

    gains = {ridge: gain(ridge) for ridge in RIDGES}
    ridge = max(RIDGES, key=lambda one: gains[one])
    if gains[ridge] <= 0:
        return None
    gram, cross = gram + other_gram, cross + other_cross
    found = _solve(gram, cross, ridge, constants)
    while short is not None and _too_long(short, found):
        ridge *= _STRONGER
        found = _solve(gram, cross, ridge, constants)
    return found


def _too_long(weights: Tensor, change: Tensor) -> bool:
    length = float(weights.norm())
    return 0 < LONGEST * length < float((weights + change[:, : weights.shape[1]]).norm())


def _moments(inputs: Tensor, missing: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of products of inputs with inputs, (groups, d, d), and with what is missing."""
    groups, width, made = inputs.shape[1], inputs.shape[2], missing.shape[2]
    gram = torch.zeros(groups, width, width, dtype=torch.float64, device=inputs.device)
    cross = torch.zeros(groups, width, made, dtype=torch.float64, device=inputs.device)
    for start in range(0, len(inputs), _ROWS):
        some = inputs[start : start + _ROWS].transpose(0, 1)
        turned = some.transpose(1, 2)
        gram += turned @ some
        cross += turned @ missing[start : start + _ROWS].transpose(0, 1)
    return gram, cross


def _solve(gram: Tensor, cross: Tensor, ridge: float, constants: int) -> Tensor:
    """Solve with ``ridge`` times the mean of each group's diagonal added to that diagonal."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    held = diagonal[:, : diagonal.shape[1] - constants]
    extra = torch.full_like(diagonal, 1e-12)
    extra[:, : held.shape[1]] = (ridge * held.mean(1, keepdim=True)).clamp_min(1e-12)
    factor = torch.linalg.cholesky(gram + torch.diag_embed(extra))
    return torch.cholesky_solve(cross, factor)
