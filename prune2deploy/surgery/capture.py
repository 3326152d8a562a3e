"""A pruned module as a graph of operators, for code that holds widths as constants.

In: a copy of the model whose stored tensors and standard modules are already pruned, the graph,
the plan. Out: a ``torch.fx.GraphModule`` with the same parameter names in which every width that
the code computed or spelt out (views, expands, splits, slices, groups) is computed from the
layouts. Calls of plain ``torch.nn`` modules stay calls of those modules, so that dropout and
batch normalisation keep following ``train()`` and ``eval()``; so do modules that do nothing in
evaluation (stochastic depth), and dropout that is called as a function. The rest are the recorded
ATen operators, which have gradients and export like any other. The batch dimension stays dynamic.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import fx, nn

from prune2deploy.errors import PruneError
from prune2deploy.graph.axes import Graph
from prune2deploy.graph.calling import (
    device_of,
    is_record,
    nested,
    stored_tensors,
    tensors_in,
)
from prune2deploy.graph.layout import CAT, LEAF, VARYING, Layout, Node, find, leaves
from prune2deploy.graph.recording import ModuleCall, Operation, Recording, Ref, Struct, refs_in
from prune2deploy.graph.whole import WholeModule
from prune2deploy.plan.plan import Plan
from prune2deploy.surgery.answers import check_answers
from prune2deploy.surgery.doubling import with_batch
from prune2deploy.surgery.folding import PREFIX, fold
from prune2deploy.surgery.scales import renumbered, spelt
from prune2deploy.surgery.spellings import FIRST_ONLY, POOLS, SPELLINGS, Argument, as_recorded
from prune2deploy.surgery.widths import Widths
from prune2deploy.surgery.writes import make_functional


def capture(
    pruned: nn.Module, source: nn.Module, graph: Graph, plan: Plan, *, free_batch: bool = True
) -> fx.GraphModule:
    """Write the recorded operators as a module around the stored tensors of ``pruned``.

    Args:
        pruned: A copy of ``source`` whose tensors and ``torch.nn`` attributes are pruned.
        source: The original module.
        graph: Its graph.
        plan: Kept channels.
        free_batch: Record the original again with a batch of two where the trace had one, so
            that the batch dimension can be told from others of size one and stays free.

    Raises:
        PruneError: the model has a part whose name a captured module cannot give it, or its
            code reads values that depend on the input.
    """
    _check_inputs(graph.recording)
    check_answers(source, graph.recording, plan.removed)
    scales = spelt(graph.recording, Widths(graph, plan), plan.removed)
    if free_batch:
        wider = with_batch(source, graph)
        moved = renumbered(scales, graph.recording, wider.recording)
        if moved is not None:
            graph, scales = wider, moved
    writer = _Writer(pruned, graph.recording, Widths(graph, plan), scales)
    return writer.write(source, plan.removed)


class _Writer:
    """Turns a recording into an ``fx.Graph``, value by value."""

    def __init__(
        self,
        pruned: nn.Module,
        recording: Recording,
        widths: Widths,
        scales: Mapping[int, float],
    ) -> None:
        self.pruned = pruned
        self.recording = recording
        self.widths = widths
        self.scales = scales
        self.graph = fx.Graph()
        self.nodes: dict[int, Argument] = {}
        self.names = {number: name for name, number in reversed(recording.stored.items())}
        self.varying: dict[int, tuple[int, int]] = {}
        self.unspelt: set[int] = set()
        self.reads = recording.reads()

    def write(self, source: nn.Module, removed: Sequence[str] = ()) -> fx.GraphModule:
        """Placeholders, operators in order, output; removed blocks hand their input on."""
        self._placeholders(source)
        operations = self.recording.operations
        blocks = self.recording.spans(removed)
        calls = _plain_calls(self.recording, removed)
        at = 0
        while at <= len(operations):
            if at in blocks:
                block = blocks.pop(at)
                self.nodes[block.outputs[0]] = self.value(block.inputs[0])
                at = block.last
                continue
            if calls.get(at):
                call = calls[at].pop(0)
                self._call_module(call)
                at = call.last
                continue
            if at < len(operations):
                self._operator(operations[at])
                self._note_varying(operations[at])
            at += 1
        self.graph.output(self.argument(_writable(self.recording.outputs)))
        device = device_of(self.pruned)
        fold(self.graph, self.pruned, device)
        make_functional(self.graph)
        self.graph.lint()
        _check_names(self.pruned)
        module = fx.GraphModule(self.pruned, self.graph, type(source).__name__)
        _keep_unused(module, self.pruned, self.recording.stored)
        module.train(source.training)
        return module

    def _placeholders(self, source: nn.Module) -> None:
        example = self.recording.example
        if isinstance(example, Mapping):
            named = dict(example)
        else:
            given = tuple(example) if isinstance(example, list | tuple) else (example,)
            named = dict(zip(_parameter_names(source, len(given)), given, strict=True))
        for name, entry in named.items():
            self._enter(entry, self.graph.placeholder(name))

    def _enter(self, entry: Any, node: fx.Node) -> None:
        """Find the tensors of one argument, in the order in which they were recorded."""
        if isinstance(entry, torch.Tensor):
            number = self.recording.inputs[len(self.nodes)]
            self.nodes[number] = node
            dims = self.recording.values[number].dims
            if dims and dims[0].size > 1:
                self.varying.setdefault(id(find(dims[0])), (number, 0))
            return
        part = getattr if is_record(entry) else _item
        for key, item in nested(entry):
            if next(tensors_in(item), None) is not None:
                self._enter(item, self.graph.call_function(part, (node, key)))

    def _call_module(self, call: ModuleCall) -> None:
        given = self.value(call.inputs[0])
        if call.first == call.last and not _standard(call.module):
            part = self.graph.get_attr(call.name)
            node = self.graph.call_function(_while_training, (part, given))
        else:
            node = self.graph.call_module(call.name, (given,))
        self.nodes[call.outputs[0]] = node

    def _operator(self, operation: Operation) -> None:
        if not operation.outputs:
            return  # a question about values, answered when it was recorded, or values that left
        if isinstance(operation.func, WholeModule):
            self._whole(operation, operation.func)
            return
        read = {ref.number for ref in refs_in((operation.args, operation.kwargs))}
        if read & self.unspelt and not operation.func._schema.is_mutable:
            self.unspelt.update(operation.outputs)  # fails below where anything else reads them
            return
        name = operation.name
        spelling = SPELLINGS.get(name, as_recorded)
        node = spelling(self, operation)
        first = name in FIRST_ONLY and not (name in POOLS and self.reads[operation.outputs[1]])
        if first or (len(operation.outputs) == 1 and not _returns_list(operation)):
            self.nodes[operation.outputs[0]] = node
            self.unspelt.update(operation.outputs[1:])
            return
        for place, number in enumerate(operation.outputs):
            self.nodes[number] = self.graph.call_function(_item, (node, place))

    def _whole(self, operation: Operation, module: WholeModule) -> None:
        """A module that is an operator by itself stays a call of that module."""
        args, kwargs = self.argument(operation.args), self.argument(operation.kwargs)
        node = self.graph.call_module(module.path, args, kwargs)
        for place, number in enumerate(operation.outputs):
            part = node if module.single else self.graph.call_function(_item, (node, place))
            self.nodes[number] = part

    def _note_varying(self, operation: Operation) -> None:
        """Sizes that values decide are read where they first occur."""
        for number in operation.outputs:
            for place, node in enumerate(self.recording.values[number].dims):
                if find(node).frozen == VARYING:
                    self.varying.setdefault(id(find(node)), (number, place))

    def value(self, number: int) -> Argument:
        """The node of a recorded value; stored tensors and constants are fetched when needed."""
        if number not in self.nodes:
            name = self.names.get(number)
            if name is None:
                name = f"{PREFIX}{number}"
                constant = self.recording.values[number].constant
                if constant is None:
                    raise PruneError(UNSPELT)
                self.pruned.register_buffer(name, constant.detach().clone())
            self.nodes[number] = self.graph.get_attr(name)
        return self.nodes[number]

    def argument(self, tree: Any) -> Argument:
        """Arguments with references replaced by nodes."""
        if isinstance(tree, Ref):
            return self.value(tree.number)
        if isinstance(tree, list | tuple) and not isinstance(tree, torch.Size):
            items = [self.argument(item) for item in tree]
            return items if isinstance(tree, list) else tuple(items)
        if isinstance(tree, Mapping):
            named = {key: self.argument(item) for key, item in tree.items()}
            return self._struct(tree.kind, named) if isinstance(tree, Struct) else named
        return tree

    def _struct(self, kind: type, held: dict[Any, Argument]) -> fx.Node:
        """A result of a class of its own; what its constructor does not take is set afterwards."""
        if issubclass(kind, tuple):
            parts = tuple(held.values())
            named = hasattr(kind, "_fields")
            return self.graph.call_function(kind, parts if named else (parts,))
        later = {f.name for f in fields(kind) if not f.init} if is_dataclass(kind) else set()
        made = {name: item for name, item in held.items() if name not in later}
        node = self.graph.call_function(kind, (), made)
        for name in (name for name in held if name in later):
            node = self.graph.call_function(_with_field, (node, name, held[name]))
        return node

    def size(self, node: Node) -> Argument:
        """A width: a number, or computed from sizes that are known at run time only."""
        node = find(node)
        if not any(id(below) in self.varying for below in leaves(node)):
            return self.widths(node)
        if node.kind == LEAF:
            number, dim = self.varying[id(node)]
            return self.graph.call_function(torch.ops.aten.sym_size.int, (self.value(number), dim))
        sizes = [self.size(part) for part in node.parts]
        total = sizes[0]
        for size in sizes[1:]:
            total = self.graph.call_function(_add if node.kind == CAT else _multiply, (total, size))
        return total

    def sizes(self, dims: Layout) -> list[Argument]:
        """Sizes of a layout."""
        return [self.size(node) for node in dims]

    def device(self) -> Argument:
        """Where the first input lies, for tensors that the code makes."""
        return self.graph.call_function(getattr, (self.value(self.recording.inputs[0]), "device"))

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Append a function call; references in the arguments are replaced."""
        return self.graph.call_function(
            function, tuple(self.argument(a) for a in args), self.argument(kwargs)
        )


def _check_inputs(recording: Recording) -> None:
    for number, holder in recording.carried.items():
        shape = tuple(recording.values[number].constant.shape)  # type: ignore[union-attr]
        raise PruneError(
            f"the model takes a tensor of shape {shape} from inside an input of class {holder}, "
            "and holds widths as constants, so that recorded operators would have to stand for "
            "its code; they would repeat the tensor of the example. Make the class a dataclass or "
            "a named tuple, or take a dict"
        )


def _check_names(module: nn.Module) -> None:
    taken = set(dir(fx.GraphModule)) - set(dir(nn.Module))
    names = {name.partition(".")[0] for name in (*module._modules, *module._parameters)}
    if names & taken:
        raise PruneError(
            f"{type(module).__name__} has a part called {min(names & taken)!r}, a name that "
            "modules of torch.fx keep for themselves; rename it, or wrap the model"
        )


def _keep_unused(module: fx.GraphModule, pruned: nn.Module, names: Iterable[str]) -> None:
    """Give the state the keys that it had: unused tensors too, constants of the code not."""
    wanted, kept = set(names), dict(stored_tensors(module))
    for name, _ in list(module.named_buffers(remove_duplicate=False)):
        path, _, leaf = name.rpartition(".")
        if name not in wanted or leaf in pruned.get_submodule(path)._non_persistent_buffers_set:
            module.get_submodule(path)._non_persistent_buffers_set.add(leaf)
    for name, tensor in stored_tensors(pruned):
        if name in kept or name not in wanted:
            continue
        path, _, leaf = name.rpartition(".")
        if not _has_submodule(module, path):
            module.add_submodule(path, nn.Module())
        owner = module.get_submodule(path)
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        else:
            persistent = leaf not in pruned.get_submodule(path)._non_persistent_buffers_set
            owner.register_buffer(leaf, tensor, persistent=persistent)


def _has_submodule(module: nn.Module, path: str) -> bool:
    inner: nn.Module | None = module
    for part in path.split(".") if path else ():
        inner = inner._modules.get(part) if inner is not None else None
    return inner is not None


def _add(a: int, b: int) -> int:
    return a + b


def _multiply(a: int, b: int) -> int:
    return a * b


def _item(values: Any, place: Any) -> Any:
    return values[place]


def _with_field(record: Any, name: str, value: Any) -> Any:
    object.__setattr__(record, name, value)
    return record


def _while_training(module: nn.Module, x: torch.Tensor) -> Any:
    return module(x) if module.training else x


def _writable(tree: Any) -> Any:
    """A model's result without objects that source text cannot hold (caches of past keys)."""
    if isinstance(tree, Struct):
        return Struct(((key, _writable(item)) for key, item in tree.items()), kind=tree.kind)
    if isinstance(tree, Mapping):
        return {key: _writable(item) for key, item in tree.items()}
    if isinstance(tree, list | tuple):
        items = [_writable(item) for item in tree]
        return items if isinstance(tree, list) else tuple(items)
    return tree if isinstance(tree, WRITABLE) else None


WRITABLE = (Ref, bool, int, float, complex, str, type(None), torch.dtype, torch.device)
"""What a captured module's source can spell in its result."""


def _returns_list(operation: Operation) -> bool:
    returns = operation.func._schema.returns
    return len(returns) != 1 or "List" in str(returns[0].type) or "[]" in str(returns[0].type)


def _parameter_names(source: nn.Module, count: int) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    known = [
        p.name for p in inspect.signature(source.forward).parameters.values() if p.kind in kinds
    ]
    return known[:count] if len(known) >= count else [f"input_{i}" for i in range(count)]


def _plain_calls(recording: Recording, removed: Sequence[str]) -> dict[int, list[ModuleCall]]:
    """Calls that stay calls, by first operator: of childless modules, one tensor in and one out.

    These are the modules of ``torch.nn``, and those that do nothing in evaluation. Hooks that
    change tensors on the way are no part of the call, so that operators stand for both; so they do
    where what is made inside is read outside, as by gradients that the model computes.
    """
    found: dict[int, list[ModuleCall]] = {}
    reads = recording.reads()
    inside = tuple(f"{name}." for name in removed)
    for call in recording.closed():
        if call.name.startswith(inside) or call.module._modules or call.hooked:
            continue
        single = call.plain and len(call.inputs) == 1 and len(call.outputs) == 1
        kept = _standard(call.module) and not isinstance(call.module, SHAPED)
        if single and (kept or _idle(call, reads)):
            found.setdefault(call.first, []).append(call)
    return found


def _standard(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.modules")


def _idle(call: ModuleCall, reads: Counter[int]) -> bool:
    """Whether a module without state hands its input on to a single reader."""
    silent = call.first == call.last and call.inputs == call.outputs
    stored = next(stored_tensors(call.module), None)
    return silent and stored is None and reads[call.inputs[0]] == 1


UNSPELT = (
    "the model reads more of a normalisation, an attention or a pooling than torch's functions "
    "give, so that recorded operators cannot stand for it; compute it by operators of its own"
)
SHAPED = (nn.Unflatten, nn.ChannelShuffle, nn.Fold, nn.Upsample)
"""Modules whose settings are sizes of their input: their operators are written out instead."""
