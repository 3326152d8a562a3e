"""Parts of a model that the example did not reach, where its values decided so.

In: a recording whose axes are not named yet, and its unused tensors. Out: nothing; widths that
such a part may meet are frozen, so that the pruned model runs on inputs that do reach it. What it
would meet is not known: a width is one that its weights have. Single vectors (a token that stands
for what is masked in training) are taken for no part: code that checks its input for numbers that
are none, as much does, would else hold whole models back.
"""

from __future__ import annotations

import math

from prune2deploy.graph import layout as algebra
from prune2deploy.graph.following import decided_by_numbers
from prune2deploy.graph.recording import Recording


def keep_for_branches(recording: Recording, unused: set[int]) -> None:
    """Freeze widths of what is computed that are widths of parameters out of reach."""
    stored = ((name, recording.stored[name]) for name in recording.parameters)
    missed = {n: number for n, number in stored if number in unused and _matrix(recording, number)}
    if not missed or not decided_by_numbers(recording):
        return
    recording.missed = tuple(sorted(missed))
    widths = {node.size for number in missed.values() for node in recording.values[number].dims}
    for dims in (dims for operation in recording.operations for dims in operation.layouts):
        sizes = [node.size for node in dims]
        for place, node in enumerate(dims):
            if (sizes[place] in widths or math.prod(sizes[place:]) in widths) and node.size > 1:
                algebra.freeze(
                    (node,), f"may meet {recording.missed[0]}, which this input leaves out"
                )


def _matrix(recording: Recording, number: int) -> bool:
    return sum(node.size > 1 for node in recording.values[number].dims) > 1
