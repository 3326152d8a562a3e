"""Reconstruction: the remaining weights are fitted to make up for the pruned ones, no training.

In: a pruned module, the original, and calibration samples without labels. Out: the module's
weights changed in place so that each layer gives again, from what is left of its inputs, what it
gave in the original. Each layer is a linear regression on what the *pruned* model hands it, one
layer after the other, so that later layers make up for what earlier ones could not (He et al.,
Channel Pruning for Accelerating Very Deep Neural Networks, arXiv 1707.06168, section 3.2).

Two forward passes do it: the original's, in which outputs at some positions are noted, and the
pruned model's, in which every layer is corrected on the way, before it hands anything on.
BatchNorm keeps the original's statistics: they are those of the very outputs that layers are fitted
to. A correction has to hold on samples that it was not fitted to, else the layer stays as it is; so
do transposed convolutions, weights that are used more than once, and weights that are computed from
others. And the whole has to bring the outputs nearer to the original's than BatchNorm re-estimation
does, on samples that had no part in anything.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from prune2deploy.calibration import Batch, first
from prune2deploy.graph.axes import Graph
from prune2deploy.graph.calling import (
    device_of,
    quiet,
    run,
    state_tensors,
    stored_tensors,
    tensors_in,
)
from prune2deploy.graph.recording import Recording
from prune2deploy.plan.plan import Plan
from prune2deploy.recover.batchnorm import reestimate_batchnorm, storage
from prune2deploy.recover.contractions import Contraction, contraction, last_weights, positions_of
from prune2deploy.recover.distance import apart, outputs
from prune2deploy.recover.least_squares import correction
from prune2deploy.recover.rescaling import adjustable, restore_lengths
from prune2deploy.surgery.compensation import Factors, compensation
from prune2deploy.surgery.lengths import Kept
from prune2deploy.surgery.slicing import kept_positions

SAMPLES = 512  # at most
LEAST = 16  # and at least
MEMORY = 2 << 30  # bytes, about, that activations and noted outputs may each take
LIVE = 4  # activations of the largest size that are alive at once, about
ROWS = (4096, 32768)  # noted per layer: 16 per input, within these
WIDEST = 8192  # inputs beyond which a layer is left alone: its normal equations would be too large
JUDGING = 8  # one sample in so many is held out of fitting, and judges the result
CHUNK = 32  # samples, when statistics are taken
SAME = 1e-10  # of the outputs' energy: what is missing less than this needs no correction


@dataclass(frozen=True)
class Reconstructed:
    """What :func:`reconstruct` did.

    Attributes:
        layers: Layers whose weights were changed.
        of: Layers that gave other outputs than in the original.
        samples: Samples that they were fitted to.
        note: Why nothing was done, or empty.
    """

    layers: int
    of: int
    samples: int
    note: str = ""


@dataclass(frozen=True, eq=False)
class _Noted:
    """Outputs of one layer of the original, of the channels that are kept.

    Attributes:
        positions: int64 (p,), noted positions of each sample.
        outputs: float32 (samples, p, channels).
        count: Number of positions that each sample has in all.
    """

    positions: Tensor
    outputs: Tensor
    count: int


def reconstruct(
    module: nn.Module,
    original: nn.Module,
    graph: Graph,
    plan: Plan,
    batches: Iterable[Batch],
    *,
    trained: bool = False,
) -> Reconstructed:
    """Fit the weights of a pruned module to what the original computes, in place.

    Everything runs in evaluation mode. Deterministic. Weights before a BatchNorm are as long
    afterwards as they were, so that training takes steps of the usual size.

    Args:
        module: The pruned module, in either form; its mode is as before afterwards.
        original: The module that it was pruned from.
        graph: Its graph.
        plan: What was pruned.
        batches: (inputs, labels or ``None``); labels are not used.
        trained: Whether training follows, and not of a few steps only. The last layers, such as a
            classifier, are then fitted less closely, so that their weights stay short, unless a
            BatchNorm follows: it is a worse model now and a better one afterwards.

    Returns:
        How many layers were changed; ``note`` says why nothing was done, e.g. where there are too
        few samples, the model takes no batch of that size, or outputs come no nearer to the
        original's on samples that had no part in it: the module is then as it was.
    """
    recording: Recording = graph.recording
    inputs = _together(batches, _affordable(recording), module)
    many = len(inputs[0]) if inputs else 0
    if many < LEAST:
        return Reconstructed(0, 0, many, f"{many} samples are too few, expected {LEAST}")
    judging = many // JUDGING
    fitting = tuple(tensor[judging:] for tensor in inputs)
    unseen = tuple(tensor[:judging] for tensor in inputs)
    before = _state(module)
    try:
        short = last_weights(recording) - adjustable(recording) if trained else frozenset()
        done = _fit(module, original, graph, plan, fitting, short)
        errors = _errors(module, original, before, fitting, unseen)
    except _Refused as error:
        _put_back(module, before)
        return Reconstructed(0, 0, 0, f"the model does not take {many} samples at once: {error}")
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # not in its __all__
        _put_back(module, before)
        return Reconstructed(0, 0, 0, f"the least squares of a layer have no solution: {error}")
    except (MemoryError, torch.OutOfMemoryError) as error:
        _put_back(module, before)
        return Reconstructed(0, 0, 0, f"the memory does not suffice: {error}")
    if errors[0] < errors[1]:
        restore_lengths(module, recording, before)
        return done
    _put_back(module, before)
    note = (
        f"on {judging} other samples the outputs differed from the unpruned model's by "
        f"{errors[0]:.3g} of their energy with it, by {errors[1]:.3g} without"
    )
    return Reconstructed(0, done.of, done.samples, note)


def _fit(
    module: nn.Module,
    original: nn.Module,
    graph: Graph,
    plan: Plan,
    inputs: tuple[Tensor, ...],
    short: frozenset[str],
) -> Reconstructed:
    """The two passes; weights that are named in ``short`` have to stay so."""
    samples, forward = len(inputs[0]), graph.recording.forward_fn
    sizes = graph.sizes(plan.counts)
    width = sum(layer.out_width(sizes) for layer in graph.without(plan.removed).layers)
    rows = min(ROWS[1], MEMORY // (4 * max(width, 1)))
    kept = kept_positions(graph, plan)
    factors = compensation(graph, dict(stored_tensors(original)), kept, plan)
    listening = _Listening(original, kept, factors, samples, rows)
    with quiet(original), listening, _refusing(listening):
        run(original, inputs, forward)
    correcting = _Correcting(module, listening.once(), samples, short)
    with quiet(module), correcting, _refusing(correcting):
        run(module, inputs, forward)
    return Reconstructed(correcting.changed, correcting.met, samples)


def _errors(
    module: nn.Module,
    original: nn.Module,
    before: Mapping[str, Tensor],
    seen: tuple[Tensor, ...],
    unseen: tuple[Tensor, ...],
) -> tuple[float, float]:
    """How far outputs are from the original's: as fitted, and with BatchNorm re-estimated instead.

    The module is as fitted afterwards.
    """
    with _refusing():
        wanted, found = outputs(original, unseen), outputs(module, unseen)
    fitted, with_it = _state(module), apart(found, wanted)
    _put_back(module, before)
    chunks = zip(*(tensor.split(CHUNK) for tensor in seen), strict=True)
    reestimate_batchnorm(module, [(chunk, None) for chunk in chunks if len(chunk[0]) > 1])
    without = apart(outputs(module, unseen), wanted)
    _put_back(module, fitted)
    return with_it, without


class _Refused(Exception):  # noqa: N818 - not an error: other ways to get accuracy back are left
    """A model does not take its inputs; the text is what it says."""


@contextmanager
def _refusing(watch: _Watch | None = None) -> Iterator[None]:
    """Stand around a forward pass: the user's code may refuse such a batch in any way.

    What ``watch`` raises in it is an error of its own.
    """
    try:
        yield
    except Exception as error:
        if watch is not None and watch.failed is error:
            raise
        raise _Refused(str(error)) from error


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state_tensors(module).items()}


def _put_back(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    module.load_state_dict(state, strict=False)  # what is no tensor was never touched


def restore(
    module: nn.Module,
    original: nn.Module,
    graph: Graph,
    plan: Plan,
    batches: Iterable[Batch],
    *,
    trained: bool = False,
) -> str:
    """Reconstruct a pruned module in place; where that is not possible, re-estimate BatchNorm.

    Args:
        module: The pruned module.
        original: The module that it was pruned from.
        graph: Its graph.
        plan: What was pruned.
        batches: May be gone through more than once.
        trained: Whether training follows; see :func:`reconstruct`.

    Returns:
        What was done, in words.
    """
    done = reconstruct(module, original, graph, plan, batches, trained=trained)
    if not done.note:
        return (
            f"weights of {done.layers} layers were fitted to what the unpruned model computes on "
            f"{done.samples} samples"
        )
    seen = reestimate_batchnorm(module, batches)
    instead = seen.note or f"statistics of {seen.layers} BatchNorm layers were re-estimated"
    return f"no weights were fitted to what the unpruned model computes: {done.note}; {instead}"


def _affordable(recording: Recording) -> int:
    """How many samples may be run at once."""
    made = [recording.values[n] for one in recording.operations for n in one.outputs]
    sizes = [math.prod(node.size for node in value.dims) for value in made if not value.weight]
    batch = next((len(t) for t in tensors_in(recording.example) if t.ndim), 1)
    largest = max(sizes, default=1) / max(batch, 1)
    return int(min(SAMPLES, max(LEAST, MEMORY / (4 * LIVE * largest))))


def _together(batches: Iterable[Batch], most: int, module: nn.Module) -> tuple[Tensor, ...]:
    """The first samples of all batches as one."""
    device = device_of(module)
    columns = zip(*(inputs for inputs, _ in first(batches, most)), strict=True)
    return tuple(torch.cat([one.to(device) for one in column]) for column in columns)


class _Watch(TorchDispatchMode):
    """Sees every linear operator whose weight is a stored tensor of its own."""

    def __init__(self, module: nn.Module, samples: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self.samples = samples
        self.failed: Exception | None = None  # raised here, not by the model
        self.reads: Counter[str] = Counter()
        stored = [(storage(tensor), name) for name, tensor in stored_tensors(module)]
        shared = Counter(place for place, _ in stored)
        self._names = {place: name for place, name in stored if shared[place] == 1}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        try:
            again = self._look(func, args, made)
        except Exception as error:
            self.failed = error
            raise
        return func(*args, **(kwargs or {})) if again else made

    def _look(self, func: Any, args: Any, made: Any) -> bool:
        if not func.is_view:
            self.reads.update(name for t in tensors_in(args) if (name := self.name(t)))
        call = contraction(func, args)
        name = None if call is None else self.name(call.weight)
        return call is not None and name is not None and self.see(name, call, made)

    def name(self, tensor: Tensor | None) -> str | None:
        """Of the stored tensor that a tensor is, or is a view of."""
        return None if tensor is None else self._names.get(storage(tensor))

    def see(self, name: str, call: Contraction, made: Tensor) -> bool:
        """Hear of a linear operator; whether it has to be computed again."""
        raise NotImplementedError


class _Listening(_Watch):
    """Notes what the layers of the original give, as the pruned ones are to give it."""

    def __init__(
        self, module: nn.Module, kept: Kept, factors: Factors, samples: int, rows: int
    ) -> None:
        super().__init__(module, samples)
        self._stored = dict(stored_tensors(module))
        self._kept, self._factors, self._rows = kept, factors, rows
        self._noted: dict[str, _Noted] = {}
        self._random = torch.Generator().manual_seed(0)

    def once(self) -> dict[str, _Noted]:
        """What was noted of stored tensors that are read once."""
        return {name: noted for name, noted in self._noted.items() if self.reads[name] == 1}

    def see(self, name: str, call: Contraction, made: Tensor) -> bool:
        """Note the outputs of kept channels at some positions."""
        dim = call.output_dim(self._stored[name])
        count = positions_of(call, made, self.samples)
        if dim is None or not count:
            return False
        wanted = max(ROWS[0], 16 * call.weight.numel() // made.shape[call.channel_dim])
        some = min(count, math.ceil(min(wanted, self._rows) / self.samples))
        positions = torch.randperm(count, generator=self._random)[:some].to(made.device)
        given = call.rows_out(made, self.samples, positions)
        if name in self._factors:  # the pruned layer gives so many times as much
            factor = self._factors[name].movedim(dim, 0).flatten(1)[:, 0]
            given = given * factor.to(given)
        kept = self._kept[name][dim]
        if kept is not None:
            given = given[..., torch.as_tensor(kept, device=made.device)]
        self._noted[name] = _Noted(positions, given.float(), count)
        return False


class _Correcting(_Watch):
    """Corrects the layers of the pruned module on the way."""

    def __init__(
        self,
        module: nn.Module,
        noted: Mapping[str, _Noted],
        samples: int,
        short: frozenset[str],
    ) -> None:
        super().__init__(module, samples)
        self._noted, self._short = noted, short
        self.met = self.changed = 0

    def see(self, name: str, call: Contraction, made: Tensor) -> bool:
        """Correct the layer, if it gives other outputs than in the original."""
        noted = self._noted.get(name)
        if noted is None or positions_of(call, made, self.samples) != noted.count:
            return False
        missing = noted.outputs - call.rows_out(made, self.samples, noted.positions)
        if missing.square().sum() <= SAME * noted.outputs.square().sum():
            return False
        self.met += 1
        if self.name(call.bias) is None:
            call = replace(call, bias=None)
        inputs = call.rows_in(self.samples, noted.positions).float()
        if inputs.shape[-1] > WIDEST:
            return False
        if call.bias is not None:
            inputs = functional.pad(inputs, (0, 1), value=1.0)
        fitted = (torch.arange(self.samples, device=made.device) % 2 == 0)[:, None]
        change = correction(
            inputs.flatten(0, 1),
            missing.flatten(0, 1).unflatten(1, (inputs.shape[2], -1)),
            fitted.expand(-1, len(noted.positions)).flatten(),
            constants=int(call.bias is not None),
            short=call.matrices() if name in self._short else None,
        )
        if change is None:
            return False
        call.add(change)
        self.changed += 1
        return True
