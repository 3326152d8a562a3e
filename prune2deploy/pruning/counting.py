"""Counting: multiply-accumulates and parameters of a model as it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from prune2deploy.graph.calling import tensors_in
from prune2deploy.graph.record import record
from prune2deploy.graph.trace import unwrap


def count_ops_and_params(
    model: nn.Module, example_inputs: Any, layer_wise: bool = False
) -> tuple[Any, ...]:
    """Multiply-accumulates per sample of one forward pass, and parameters.

    Convolutions, linear layers, matrix products and attention count, whether they are modules or
    functions; operators that do one operation per element do not.

    Args:
        model: Any module; left as it was.
        example_inputs: One tensor, a tuple of arguments, or a dict of keywords.
        layer_wise: Return two dicts by module as well: MACs, and parameters of its own.

    Returns:
        ``(macs, params)``; with ``layer_wise`` two dicts by module follow: MACs and parameters.

    Raises:
        TraceError: the forward pass fails.
    """
    module = unwrap(model)
    recording = record(module, example_inputs)
    batch = _batch(example_inputs)
    names = dict(module.named_modules())
    by_module: dict[nn.Module, float] = dict.fromkeys(module.modules(), 0)
    total: float = 0
    for contraction in recording.contractions:
        each = math.prod(node.size for node in contraction.macs) / batch
        total += each
        owner = names.get(contraction.name)
        if owner is not None:
            by_module[owner] += each
    own = {m: sum(p.numel() for p in m.parameters(recurse=False)) for m in module.modules()}
    if not layer_wise:
        return _whole(total), count_params(module)
    macs = {part: _whole(count) for part, count in by_module.items()}
    return _whole(total), count_params(module), macs, own


def _whole(count: float) -> float:
    return int(count) if float(count).is_integer() else count


def _batch(example: Any) -> int:
    first = next(tensors_in(example if isinstance(example, list | tuple | Mapping) else [example]))
    return int(first.shape[0]) if first.dim() > 1 else 1


def count_params(module: nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def flatten_as_list(obj: Any) -> list[Any]:
    """Everything in nested lists, tuples and mappings, in order."""
    return list(_flat(obj))


def _flat(obj: Any) -> Iterator[Any]:
    if isinstance(obj, Mapping):
        obj = list(obj.values())
    if isinstance(obj, list | tuple):
        for item in obj:
            yield from _flat(item)
    else:
        yield obj
