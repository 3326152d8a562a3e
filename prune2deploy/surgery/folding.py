"""Values of a captured graph that depend on no input and no stored tensor become constants.

In: the ``fx.Graph`` of a captured module. Out: the same graph in which everything that can be
computed beforehand (masks, tables of positions) is read from buffers. Code often builds such
tables by writing into slices of a new tensor, which exporters that follow values and not memory
get wrong; here those writes run once, on real tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

PREFIX = "_constant_"


def fold(graph: fx.Graph, root: nn.Module, device: torch.device) -> None:
    """Replace what can be computed beforehand by buffers of ``root``; ``graph`` is changed."""
    if device.type == "meta":
        return
    known = _evaluate(graph, root, device)
    fixed = {node for node in known if isinstance(known[node], torch.Tensor)}
    written = _written(graph, known)
    edge = [
        node
        for node in fixed
        if node.op != "get_attr"
        and any(user not in known for user in node.users)
        and not _memory(known[node]) & written
    ]
    for node in sorted(edge):
        name = f"{PREFIX}{node.name}"
        root.register_buffer(name, known[node].detach().clone())
        with graph.inserting_before(node):
            constant = graph.get_attr(name)
        for user in [user for user in node.users if user not in known]:
            user.replace_input_with(node, constant)
    _drop(graph, known, written)


def _evaluate(graph: fx.Graph, root: nn.Module, device: torch.device) -> dict[fx.Node, Any]:
    """The value of every node that needs no input, in order, so that writes happen in order.

    Memory that an operator on unknown values writes to is unknown from there on.
    """
    known: dict[fx.Node, Any] = {}
    unknown: set[int] = set()
    with torch.no_grad():
        for node in graph.nodes:
            if node.op == "get_attr" and str(node.target).startswith(PREFIX):
                known[node] = getattr(root, str(node.target)).clone()
            elif _is_device(node):
                known[node] = device
            elif _computable(node, known) and not _reads(node, known, unknown):
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = _run(node, args, kwargs)
            elif _mutates(node):
                unknown |= _memory(known.get(node.args[0]))
    return known


def _reads(node: fx.Node, known: dict[fx.Node, Any], memory: set[int]) -> bool:
    return any(_memory(known[source]) & memory for source in node.all_input_nodes)


def _memory(value: Any) -> set[int]:
    """Address of what a tensor lies in; empty for anything else."""
    if not isinstance(value, torch.Tensor):
        return set()
    return {value.untyped_storage().data_ptr()}


def _is_device(node: fx.Node) -> bool:
    return node.target is getattr and node.args[1:] == ("device",)


def _computable(node: fx.Node, known: dict[fx.Node, Any]) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return not random and all(source in known for source in node.all_input_nodes)


def _run(node: fx.Node, args: Any, kwargs: Any) -> Any:
    if isinstance(node.target, str):
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    return node.target(*args, **kwargs)


def _written(graph: fx.Graph, known: dict[fx.Node, Any]) -> set[int]:
    """Memory of known values that an operator on unknown ones writes to at run time."""
    writes = [node for node in graph.nodes if node not in known and _mutates(node)]
    return {
        address
        for node in writes
        if isinstance(node.args[0], fx.Node)
        for address in _memory(known.get(node.args[0]))
    }


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(node.args) and schema is not None and schema.is_mutable


def _drop(graph: fx.Graph, known: dict[fx.Node, Any], written: set[int]) -> None:
    """Erase what nothing reads any more; writes into memory that stays are kept."""
    for node in reversed(list(graph.nodes)):
        if node not in known or node.users:
            continue
        if not (_memory(known[node]) & written and _mutates(node)):
            graph.erase_node(node)
