"""Writes to part of a tensor become new tensors in a captured graph.

In: the ``fx.Graph`` of a captured module. Out: the same graph in which ``x[2:4].zero_()`` is a
concatenation of what is kept and what is written, wherever ``x`` is a tensor that the graph itself
made. The ONNX exporter follows values and not memory, and loses such writes where it does not
recognise them. A write whose memory cannot be followed stays as it is.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
PARTS = (aten.slice.Tensor, aten.select.int)


def make_functional(graph: fx.Graph) -> None:
    """Replace partial writes by concatenations; ``graph`` is changed."""
    for node in list(graph.nodes):
        if not _writes(node) or not isinstance(node.args[0], fx.Node):
            continue
        chain = _chain(node.args[0])
        value = _functional(node) if len(chain) > 1 and _is_own(chain, node) else None
        if value is None:
            continue
        with graph.inserting_before(node):
            _replace(graph, node, chain, value)


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    name = "" if schema is None else schema.name
    return node.op == "call_function" and name.startswith("aten::") and name.endswith("_")


def _chain(view: fx.Node) -> list[fx.Node]:
    """The tensor written to, what it is a part of, and so on up to a tensor that is no part."""
    chain = [view]
    while chain[-1].target in PARTS and isinstance(chain[-1].args[0], fx.Node):
        chain.append(chain[-1].args[0])
    return chain


def _views(root: fx.Node, end: fx.Node) -> list[fx.Node]:
    """The parts of a tensor, and parts of these, that were made before ``end``, in order."""
    found, left = set[fx.Node](), [root]
    while left:
        users = {user for user in left.pop().users if user.target in PARTS and user < end} - found
        found |= users
        left += users
    return sorted(found)


def _is_own(chain: list[fx.Node], write: fx.Node) -> bool:
    """Whether memory is followed: made by the graph, and seen later through its parts only."""
    whole = all(node.args[4:] in ((), (1,)) for node in chain[:-1])  # no steps
    if not whole or not _is_made(chain[-1]):
        return False
    left, parts = [chain[-1]], set(_views(chain[-1], write))
    while left:
        node = left.pop()
        for user in node.users:
            if user < write and (user in parts or _aliases(user)):
                if user not in parts and any(write < later for later in user.users):
                    return False
                if user.op != "call_module":  # which may hand on its input, but no view of it
                    left.append(user)
    return True


def _is_made(root: fx.Node) -> bool:
    """Whether an operator made the memory of a node, and nothing else reads it."""
    while root.op == "call_function":
        if not _aliases(root):
            return True
        source = root.args[0] if root.args else None
        if root.target is not torch.reshape or not isinstance(source, fx.Node):
            return False
        if len(source.users) > 1:
            return False
        root = source
    return False


def _aliases(node: fx.Node) -> bool:
    """Whether a node may return memory of its arguments."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return True
    return any(returned.alias_info is not None for returned in schema.returns)


def _functional(write: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    """The operator that makes what is written, with its arguments."""
    name = write.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]  # an overload
    if name == "zero_":
        return aten.zeros_like.default, write.args[:1]
    if name == "fill_" and not isinstance(write.args[1], fx.Node):
        return aten.full_like.default, write.args[:2]
    if name == "copy_":
        return _cast_to, write.args[:2]
    packet = getattr(aten, name.removesuffix("_"), None)
    overload = write.target._overloadname  # type: ignore[union-attr]  # an overload
    if packet is None or overload not in packet.overloads() or name in NOT_BY_VALUE:
        return None
    return getattr(packet, overload), write.args


NOT_BY_VALUE = frozenset(
    ("squeeze_", "unsqueeze_", "transpose_", "t_", "as_strided_", "resize_", "set_", "detach_")
)
"""Operators that change how memory is read, not what it holds."""


def _cast_to(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """The source in the shape and type of the target."""
    return source.to(target.dtype).expand(target.shape)


def _replace(
    graph: fx.Graph, write: fx.Node, chain: list[fx.Node], value: tuple[Any, tuple[Any, ...]]
) -> None:
    """Make the new part, then every tensor that it is part of, for all that comes later.

    Parts that were read before the write are read again from the new tensor.
    """
    new = graph.call_function(*value, dict(write.kwargs) if value[1] == write.args else {})
    for part, whole in itertools.pairwise(chain):
        new = graph.call_function(
            aten.cat.default, (list(_pieces(graph, part, whole, new)), _dim(part))
        )
    again = {chain[-1]: new}
    for view in _views(chain[-1], write):
        source, *rest = view.args
        assert isinstance(source, fx.Node)
        again[view] = graph.call_function(view.target, (again[source], *rest), view.kwargs)  # type: ignore[arg-type]  # one of PARTS
    last = next(reversed(again.values()))
    write.replace_all_uses_with(again[chain[0]])
    graph.erase_node(write)
    for old, fresh in again.items():
        for user in [user for user in old.users if last < user]:
            user.replace_input_with(old, fresh)
    for fresh in reversed(list(again.values())):
        if not fresh.users:
            graph.erase_node(fresh)


def _pieces(graph: fx.Graph, part: fx.Node, whole: fx.Node, new: fx.Node) -> Iterator[fx.Node]:
    """What comes before the part, the part, what comes after it."""
    if part.target is aten.select.int:
        place: Any = part.args[2]
        start, end = place, None if place == -1 else place + 1
        new = graph.call_function(aten.unsqueeze.default, (new, _dim(part)))
    else:
        start, end = (*part.args[2:4], None, None)[:2]
    if start not in (None, 0):
        yield graph.call_function(aten.slice.Tensor, (whole, _dim(part), 0, start))
    yield new
    if end is not None and not (isinstance(end, int) and end >= sys.maxsize):
        yield graph.call_function(aten.slice.Tensor, (whole, _dim(part), end, sys.maxsize))


def _dim(part: fx.Node) -> Any:
    return part.args[1] if len(part.args) > 1 else 0
