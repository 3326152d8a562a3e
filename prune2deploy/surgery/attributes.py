"""Attributes of modules that are widths, and follow these.

What the attributes of ``torch.nn``'s layers mean is known. Code of the model's own that spells
widths out mostly reads them from an attribute too (``self.num_heads``). Which attribute is which
width is not known there: a whole number that a module holds, and that is the size of a dimension
which its code views, expands or splits, or a number of groups, is taken for one. Whether that is
right is for ``checking`` to say, operator by operator; where it is wrong everything is set back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from prune2deploy.graph.layout import Layout, find, leaves
from prune2deploy.graph.recording import INPUT, Recording, refs_in
from prune2deploy.graph.whole import WholeModule
from prune2deploy.surgery.checking import Expected
from prune2deploy.surgery.widths import Widths

FROM_WEIGHT: tuple[tuple[tuple[type[nn.Module], ...], dict[str, int]], ...] = (
    ((nn.Linear,), {"out_features": 0, "in_features": 1}),
    ((nn.Bilinear,), {"out_features": 0, "in1_features": 1, "in2_features": 2}),
    ((nn.Embedding, nn.EmbeddingBag), {"embedding_dim": 1}),
    ((nn.PReLU,), {"num_parameters": 0}),
    ((nn.GroupNorm,), {"num_channels": 0}),
    ((nn.modules.batchnorm._NormBase,), {"num_features": 0}),
)
"""Attributes of ``torch.nn`` modules that repeat a dimension of their weight."""

CONVOLUTIONS = nn.modules.conv._ConvNd
TRANSPOSED = nn.modules.conv._ConvTransposeNd
STANDARD: tuple[type[nn.Module], ...] = (
    *(kind for kinds, _ in FROM_WEIGHT for kind in kinds),
    nn.RNNBase, nn.RNNCellBase, CONVOLUTIONS, nn.ChannelShuffle, nn.LayerNorm, nn.RMSNorm,
)  # fmt: skip
"""Modules whose attributes are known."""


def update_attributes(module: nn.Module, recording: Recording, widths: Widths) -> None:
    """Let the width attributes of standard modules say what their tensors now are."""
    symbols = {op.scope: op.symbols for op in recording.operations if op.symbols}
    _narrow_leftovers(module, recording, widths)
    _follow_rules(module, recording, widths)
    for name, part in module.named_modules():
        for types, attributes in FROM_WEIGHT:
            if isinstance(part, types):
                _follow_weight(part, attributes)
        if isinstance(part, nn.RNNBase):
            _follow_recurrent(part)
        elif isinstance(part, nn.RNNCellBase):
            part.input_size, part.hidden_size = part.weight_ih.shape[1], part.weight_hh.shape[1]
        if isinstance(part, CONVOLUTIONS):
            _follow_convolution(part, widths.of(symbols.get(name, {}).get("groups", ())))
        elif isinstance(part, nn.GroupNorm) and name in symbols:
            part.num_groups = widths.of(symbols[name].get("group", ())) or part.num_groups
        elif isinstance(part, nn.ChannelShuffle) and name in symbols:
            part.groups = widths.of(symbols[name].get("groups", ())) or part.groups
        elif isinstance(part, nn.LayerNorm | nn.RMSNorm):
            shape = symbols.get(name, {}).get("normalized_shape")
            if part.elementwise_affine:
                part.normalized_shape = tuple(part.weight.shape)
            elif shape:
                part.normalized_shape = tuple(widths.of((node,)) or 1 for node in shape)


def _narrow_leftovers(module: nn.Module, recording: Recording, widths: Widths) -> None:
    """Give the planned widths to tensors that an earlier pass has left in attributes.

    Such are activations that a model keeps, and weights that a hook computes before each call.
    The next pass computes them again, so that only their shapes matter.
    """
    for place, number in recording.attributes.items():
        path, _, name = place.rpartition(".")
        part, dims = module.get_submodule(path), recording.values[number].dims
        held = vars(part).get(name)
        if not isinstance(held, torch.Tensor) or held.dim() != len(dims):
            continue
        planned = [widths(node) if widths(node) != find(node).size else None for node in dims]
        if any(width is not None for width in planned):
            setattr(part, name, held.detach()[tuple(map(slice, planned))].clone())


def _follow_rules(module: nn.Module, recording: Recording, widths: Widths) -> None:
    """Attributes that the user's rules say to be widths."""
    for operation in recording.operations:
        if isinstance(operation.func, WholeModule):
            part = module.get_submodule(operation.func.path)
            for attribute, terms in operation.symbols.items():
                setattr(part, attribute, widths.of(terms))


def _follow_weight(part: Any, attributes: dict[str, int]) -> None:
    stored = part.running_mean if isinstance(part, nn.modules.batchnorm._NormBase) else part.weight
    stored = part.weight if stored is None else stored
    if stored is None:
        return
    for attribute, dim in attributes.items():
        if getattr(part, attribute) != stored.shape[dim]:
            setattr(part, attribute, stored.shape[dim])


def _follow_recurrent(part: nn.RNNBase) -> None:
    """Sizes, and the list of weights that the module hands to its kernel."""
    part._flat_weights = [getattr(part, name) for name in part._flat_weights_names]
    part.input_size = part._parameters["weight_ih_l0"].shape[1]  # type: ignore[union-attr]
    part.hidden_size = part._parameters["weight_hh_l0"].shape[1]  # type: ignore[union-attr]
    if part.proj_size:  # what comes back is the projection of the hidden units
        projection = part.get_parameter("weight_hr_l0")
        part.proj_size, part.hidden_size = projection.shape


def _follow_convolution(part: nn.modules.conv._ConvNd, groups: int | None) -> None:
    if groups is not None:
        part.groups = groups
    rows, columns = part.weight.shape[:2]
    if isinstance(part, TRANSPOSED):
        part.in_channels, part.out_channels = rows, columns * part.groups
    else:
        part.in_channels, part.out_channels = columns * part.groups, rows


_CUTTING = frozenset(f"aten::{name}" for name in ("slice", "split", "split_with_sizes", "chunk"))
"""Operators that are told sizes of parts, which code may compute from the size of the whole."""

_SPELLING = _CUTTING | frozenset(
    f"aten::{name}"
    for name in ("view", "_unsafe_view", "reshape", "expand", "repeat", "repeat_interleave")
)
"""Operators that are told sizes of what they return by numbers."""


def runs_with_its_code(
    module: nn.Module,
    recording: Recording,
    widths: Widths,
    example: Any,
    removed: Sequence[str] = (),
) -> bool:
    """Whether the module runs as planned, if need be with other numbers in its attributes.

    On values, numbers that the code computes with are not compared: attributes stay then.
    """
    expected = Expected(recording, widths, removed)
    if expected.met_by(module, example):
        return True
    spelt = _spelt_sizes(recording, widths) if recording.on_shapes else {}
    changes = [{path: choice(sizes) for path, sizes in spelt.items()} for choice in _CHOICES]
    for place, change in enumerate(changes):
        if change in changes[:place]:
            continue
        numbers = _following(module, recording, change)
        before = [table[name] for table, name, _ in numbers]
        for table, name, number in numbers:
            table[name] = number
        if numbers and expected.met_by(module, example):
            return True
        for (table, name, _), number in zip(numbers, before, strict=True):
            table[name] = number
    return False


def _following(
    module: nn.Module, recording: Recording, changes: _Changes
) -> list[tuple[dict[str, Any], str, Any]]:
    """Attributes that are taken for widths which have changed: where, name, what they are now."""
    found, owners = [], dict(module.named_modules(remove_duplicate=False))
    for path, sizes in changes.items():
        if path not in owners or isinstance(owners[path], STANDARD):
            continue
        table = owners[path].__dict__
        for name, old in recording.numbers[path].items():
            new = _replaced(old, sizes)
            if new not in (old, table.get(name, new)):
                found.append((table, name, new))
    return found


_Changes = dict[str, dict[int, int]]
"""By module, the sizes that its code spells out and that have changed, as they now are."""


_Spelt = dict[str, dict[int, list[int]]]
"""By module, the sizes that its code spells out, and what each is to be, place by place."""


def _spelt_sizes(recording: Recording, widths: Widths) -> _Spelt:
    """Find the sizes that are spelt out; those of the model's inputs are not.

    That of a whole that is cut counts where no part has the same.
    """
    found: _Spelt = {}
    wholes: _Spelt = {}
    for operation in recording.operations:
        spelt = [*operation.symbols.values()]
        if operation.name in _SPELLING:
            spelt += operation.layouts
        _enter(found.setdefault(operation.scope, {}), spelt, widths)
        if operation.name in _CUTTING:
            cut = [recording.values[ref.number].dims for ref in refs_in(operation.args)]
            _enter(wholes.setdefault(operation.scope, {}), cut, widths)
    return {path: wholes.get(path, {}) | sizes for path, sizes in found.items()}


def _enter(sizes: dict[int, list[int]], spelt: Iterable[Layout], widths: Widths) -> None:
    for node in chain(*spelt):
        if all(below.frozen != INPUT for below in leaves(node)):
            sizes.setdefault(find(node).size, []).append(widths(node))


def _changed(sizes: Mapping[int, Sequence[int]]) -> dict[int, int]:
    """The sizes that changed in one way only, wherever they changed."""
    return _alike({old: [new for new in news if new != old] for old, news in sizes.items()})


def _alike(sizes: Mapping[int, Sequence[int]]) -> dict[int, int]:
    """The sizes that are to be the same everywhere."""
    return {old: news[0] for old, news in sizes.items() if len(set(news)) == 1}


def _last(sizes: Mapping[int, Sequence[int]]) -> dict[int, int]:
    """What each size is to be where it is spelt out last: mostly of what a module returns."""
    return {old: news[-1] for old, news in sizes.items()}


_CHOICES = (_changed, _alike, _last)
"""What to make of sizes that are not to be the same everywhere; the first that is right holds."""


def _replaced(value: Any, sizes: Mapping[int, int]) -> Any:
    """A number, or a list or tuple of such, with widths as they now are."""
    if isinstance(value, int):
        return sizes.get(value, value)
    return type(value)(sizes.get(item, item) for item in value)
