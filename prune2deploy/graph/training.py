"""Branches that run only in training: auxiliary heads and the like.

The recorded pass runs in evaluation mode. Where it leaves parameters unused, the model is run once
more in training mode, and what that pass couples is added to the same terms, so that a pruned
model still trains. The model's buffers and PyTorch's random state are put back. A model that
cannot run this way (it wants labels, say) is left as the first pass showed it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from prune2deploy.graph import layout as algebra
from prune2deploy.graph.calling import as_inputs, run, tensors_in, twice, untouched
from prune2deploy.graph.recording import Recording
from prune2deploy.graph.rules import Value
from prune2deploy.graph.shapes import on_shapes, outlined
from prune2deploy.modes import set_training


class Recorder(Protocol):
    """What this needs of the recorder.

    Attributes:
        used: Numbers of the values that some operator took.
    """

    recording: Recording
    used: set[int]

    def enter_inputs(self, inputs: Any) -> None:
        """Give every input tensor frozen dimensions."""

    def value(self, tensor: torch.Tensor) -> Value:
        """The recorded value of a tensor."""

    def watching(self) -> AbstractContextManager[None]:
        """Record what runs inside."""


def couple_training_branches(model: nn.Module, recorder: Recorder) -> None:
    """Run ``model`` in training mode if evaluation left parameters unused; couple what it shows."""
    recording = recorder.recording
    unused = set(recording.stored.values()) - recorder.used
    if not any(recording.stored[name] in unused for name in recording.parameters):
        return
    mark, inputs = recording.mark(), recording.inputs
    result = _trained(model, recorder, wanted=True) if recording.on_shapes else None
    if result is None:
        result = _trained(model, recorder, wanted=False)
    if result is None:
        _freeze_halfway(recording, unused)
    for tensor in tensors_in(result):
        algebra.freeze(recorder.value(tensor).dims, "model output in training")
    recording.rewind(mark, inputs)


def _trained(model: nn.Module, recorder: Recorder, *, wanted: bool) -> Any:
    """The result of a pass in training mode, on shapes if wanted; ``None`` where it fails."""
    example = twice(recorder.recording.example)
    example = outlined(example) if wanted else example
    with untouched(model), torch.random.fork_rng():
        set_training(model, True)
        recorder.enter_inputs(as_inputs(example))
        try:
            with on_shapes(model, wanted), recorder.watching():
                return run(model, example, recorder.recording.forward_fn)
        except Exception:  # noqa: BLE001  the user's training code may ask for anything
            return None


def _freeze_halfway(recording: Recording, unused: set[int]) -> None:
    """A pass that fails may have seen one side of a layer only: widths of its own stay.

    Those that it shares with what evaluation uses are coupled, and may go.
    """
    terms = {number: recording.values[number].dims for number in recording.stored.values()}
    shared = {
        id(leaf)
        for number, dims in terms.items() if number not in unused
        for node in dims for leaf in algebra.leaves(node)
    }  # fmt: skip
    for number in unused:
        own = [leaf for node in terms[number] for leaf in algebra.leaves(node)]
        alone = [leaf for leaf in own if id(leaf) not in shared]
        algebra.freeze(alone, "its branch cannot run in training on these inputs")
