"""BatchNorm re-estimation: the statistics of a pruned model from a few batches, no training.

In: a pruned module and calibration batches. Out: the module's running means and variances
replaced by the average over those batches, in place. Pruning changes what every layer sees; its
normalisation must follow. Source: Li et al., EagleEye, arXiv 2007.02491, section 3.2.

What counts is the operator that normalises, not a layer's class: programs of ``torch.export`` have
no layers, and code may call it as a function.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from prune2deploy.calibration import Batch, read
from prune2deploy.graph.calling import device_of
from prune2deploy.modes import evaluating

_ATEN = torch.ops.aten
_MEAN, _VARIANCE = 3, 4  # where the running statistics are among the arguments
_NORMS = {  # operator → where it is told to use the batch's own statistics, if it can be
    _ATEN.native_batch_norm.default: 5,
    _ATEN.cudnn_batch_norm.default: 5,
    _ATEN.miopen_batch_norm.default: 5,
    _ATEN._native_batch_norm_legit_no_training.default: None,
}


@dataclass(frozen=True)
class Reestimated:
    """What :func:`reestimate_batchnorm` did.

    Attributes:
        layers: BatchNorms whose statistics were replaced.
        samples: Samples seen.
        note: Why nothing was done, or empty.
    """

    layers: int
    samples: int
    note: str = ""


def reestimate_batchnorm(module: nn.Module, batches: Iterable[Batch] | None) -> Reestimated:
    """Replace the running statistics by the average over ``batches``, in place.

    Every batch counts by its size and contributes its own variance, so batches should not be
    small; where a BatchNorm sees a single value per channel, it has no variance to learn from it.
    All runs in eval mode, so that dropout does not disturb, and each BatchNorm hands on what the
    batch's own statistics give. The mode of every submodule is as before afterwards. Deterministic.

    Args:
        module: Its stored statistics are changed; a program, a graph, or plain layers.
        batches: (inputs, labels or ``None``); inputs go to the module's own device. ``None`` or
            no batch leaves the module as it is, and so does a forward pass that fails.

    Returns:
        How many BatchNorms and samples; ``note`` says why nothing was done.
    """
    averaging = _Averaging(module)
    try:
        with evaluating(module):
            samples = 0 if batches is None else _feed(module, batches, averaging)
    except BaseException:
        averaging.undo()
        raise
    if samples == 0:
        return Reestimated(0, 0, "no data: BatchNorm statistics are left as they were")
    if not averaging.seen:
        note = "no BatchNorm with running statistics met more than one value per channel"
        return Reestimated(0, 0, note)
    return Reestimated(len(averaging.seen), samples)


class _Averaging(TorchDispatchMode):
    """Weighs each batch that a BatchNorm sees by the values that it has per channel.

    Attributes:
        met: Whether any BatchNorm with stored statistics ran.
        seen: Values per channel so far, by where the running mean is stored.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self._stored = {storage(buffer) for buffer in module.buffers()}
        self._before: list[tuple[Tensor, Tensor]] = []
        self.met = False
        self.seen: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _NORMS or not self._is_stored(args[_MEAN], args[_VARIANCE]):
            return func(*args, **(kwargs or {}))
        given, flag = args[0], _NORMS[func]
        own = flag is not None and args[flag]
        self.met = True
        values = given.numel() // given.shape[1]
        if own or values < 2:
            return func(*args, **(kwargs or {}))
        others = [dim for dim in range(given.ndim) if dim != 1]
        variance, mean = torch.var_mean(given.to(args[_MEAN].dtype), others)
        self._count(args[_MEAN : _VARIANCE + 1], (mean, variance), values)
        biased = variance * ((values - 1) / values)
        return func(*args[:_MEAN], mean, biased, *args[_VARIANCE + 1 :], **(kwargs or {}))

    def _is_stored(self, *statistics: Tensor | None) -> bool:
        return all(one is not None and storage(one) in self._stored for one in statistics)

    def _count(
        self, running: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor], values: int
    ) -> None:
        """Make the running statistics the average of all that was found."""
        place = storage(running[0])
        if place not in self.seen:
            self._before += [(one, one.clone()) for one in running]
        self.seen[place] += values
        for mean, one in zip(running, found, strict=True):
            first = self.seen[place] == values  # what was there before does not count, even if nan
            mean.copy_(one if first else mean.lerp(one, values / self.seen[place]))

    def undo(self) -> None:
        """Put back what the statistics were."""
        with torch.no_grad():
            for running, old in self._before:
                running.copy_(old)


def _feed(module: nn.Module, batches: Iterable[Batch], averaging: _Averaging) -> int:
    """Run all batches, or one if there is no BatchNorm; return the number of samples."""
    device = device_of(module)
    samples = 0
    # in inference mode torch shows operators before it takes them apart
    with torch.inference_mode(False), torch.no_grad(), averaging:
        for inputs, _ in read(batches):
            module(*(one.to(device) for one in inputs))
            samples += len(inputs[0])
            if not averaging.met:
                break
    return samples


def storage(tensor: Tensor) -> int:
    """Address of the memory of a tensor, which its views have in common with it."""
    return tensor.untyped_storage().data_ptr()
