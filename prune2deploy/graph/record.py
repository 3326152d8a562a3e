"""Record one forward pass: operators, values, module calls, and a layout per dimension.

In: a module, its example inputs. Out: a ``Recording``, which ``axes`` turns into the frozen graph
and ``capture`` into a module of its own. Every ATen operator is seen as it runs, so
everything that runs in Python can be recorded, whatever its control flow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from prune2deploy.errors import TraceError
from prune2deploy.graph import layout as algebra
from prune2deploy.graph import (  # noqa: F401  fill the table
    rules_layers,
    rules_pick,
    rules_products,
    rules_shape,
    rules_space,
)
from prune2deploy.graph.branches import keep_for_branches
from prune2deploy.graph.calling import (
    PLAIN,
    Forward,
    Inputs,
    as_inputs,
    carried,
    is_record,
    nested,
    run,
    same_items,
    stored_tensors,
    tensors_in,
    untouched,
)
from prune2deploy.graph.layout import Layout, leaf
from prune2deploy.graph.recording import (
    INPUT,
    Contraction,
    ModuleCall,
    Operation,
    Recording,
    Ref,
    Struct,
)
from prune2deploy.graph.rules import Call, Value, apply_rule, follow
from prune2deploy.graph.shapes import on_shapes, outlined
from prune2deploy.graph.training import couple_training_branches
from prune2deploy.graph.visible import Watch, stands_in
from prune2deploy.graph.whole import WholeCall, rule_of


class Recorder(Watch):
    """The dispatch mode that fills a ``Recording``."""

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        forward_fn: Forward | None = None,
        *,
        on_shapes: bool = False,
    ) -> None:
        super().__init__()
        self.recording = Recording(example=example, forward_fn=forward_fn, on_shapes=on_shapes)
        self._numbers: dict[int, int] = {}
        self.used: set[int] = set()
        self._carried: dict[int, str] = {}
        self._alive: list[torch.Tensor] = []  # keeps ids unique while recording
        self._names = {id(m): name for name, m in model.named_modules()}
        self._scopes: list[tuple[str, int, Any]] = [("", 0, ())]  # path, first operator, given
        self._if_read: list[tuple[torch.Tensor, Layout, str]] = []
        self._whole = 0  # depth at which a module runs that a rule describes as a whole
        self._store(model)

    def ran(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Record an operator."""
        if self._whole:
            return
        refs = tuple(self.refer(arg) for arg in args)
        named = {key: self.refer(arg) for key, arg in kwargs.items()}
        outputs = [result] if isinstance(result, torch.Tensor) else list(tensors_in(result))
        call = Call(func, args, kwargs, outputs, self)
        self._note(call, refs, named, apply_rule(call))

    def _store(self, model: nn.Module) -> None:
        for name, tensor in stored_tensors(model):
            number = self._numbers.get(id(tensor))
            if number is None:
                dims = tuple(leaf(n) for n in tensor.shape)
                origin = tuple((name, d) for d in range(tensor.dim()))
                number = self._add(tensor, Value(dims, origin, weight=name))
            self.recording.stored[name] = number
        self.recording.parameters = frozenset(
            name for name, _ in model.named_parameters(remove_duplicate=False)
        )

    def enter_inputs(self, inputs: Inputs) -> None:
        """Give every input tensor frozen dimensions; know those that objects bring along."""
        self._carried.update({id(tensor): holder for tensor, holder in carried(inputs)})
        numbers = []
        for tensor in tensors_in(inputs):
            dims = tuple(leaf(n, INPUT) for n in tensor.shape)
            numbers.append(self._add(tensor, Value(dims)))
        self.recording.inputs = tuple(numbers)

    def freeze_outputs(self, result: Any) -> None:
        """Freeze what the model returns."""
        for tensor in tensors_in(result):
            algebra.freeze(self.value(tensor).dims, "model output")

    def note_attributes(self, model: nn.Module) -> None:
        """Note which values and whole numbers modules hold in attributes when the pass is over."""
        for path, module in model.named_modules():
            held_here = vars(module).items()
            self.recording.numbers[path] = {name: held for name, held in held_here if _whole(held)}
            for name, held in held_here:
                if isinstance(held, torch.Tensor) and id(held) in self._numbers:
                    place = f"{path}.{name}" if path else name
                    self.recording.attributes[place] = self._numbers[id(held)]

    def leave_outputs(self, result: Any) -> None:
        """Freeze what its use or the lack of it says, and settle what must stay equally wide."""
        self.recording.outputs = self.refer(result)
        for tensor, dims, reason in self._if_read:
            if self.number(tensor) in self.used:
                algebra.freeze(dims, reason)
        unused = set(self.recording.stored.values()) - self.used
        for number in unused:
            algebra.freeze(self.recording.values[number].dims, "not used in the forward pass")
        keep_for_branches(self.recording, unused)
        algebra.settle_ties(self.recording.ties)

    def number(self, tensor: torch.Tensor) -> int:
        """The value number of a tensor; one never seen before is a constant of the code."""
        number = self._numbers.get(id(tensor))
        if number is None:
            dims = tuple(leaf(n, "a tensor that is not registered") for n in tensor.shape)
            number = self._add(tensor, Value(dims, constant=tensor))
            if id(tensor) in self._carried:
                self.recording.carried[number] = self._carried[id(tensor)]
        return number

    def refer(self, tree: Any) -> Any:
        """Replace the tensors of nested arguments by references."""
        if type(tree) in PLAIN:
            return tree
        if isinstance(tree, torch.Tensor):
            number = self.number(tree)
            self.used.add(number)
            return Ref(number)
        if isinstance(tree, torch.Size):
            return tree
        items = {key: self.refer(item) for key, item in nested(tree)}
        if _special(tree):
            return Struct(items, kind=type(tree))
        if isinstance(tree, list | tuple):
            return list(items.values()) if isinstance(tree, list) else tuple(items.values())
        return items if isinstance(tree, Mapping) else tree

    def _add(self, tensor: torch.Tensor, value: Value) -> int:
        self._alive.append(tensor)
        self._numbers[id(tensor)] = len(self.recording.values)
        value.dtype = tensor.dtype
        self.recording.values.append(value)
        return len(self.recording.values) - 1

    def _note(
        self, call: Call, refs: tuple[Any, ...], named: dict[str, Any], found: list[Value]
    ) -> None:
        """Note an operation with the values that its rule has found."""
        numbers = []
        for tensor, value in zip(call.outputs, found, strict=True):
            number = self._numbers.get(id(tensor))
            if number is None:
                number = self._add(tensor, value)
            else:
                known = self.recording.values[number]
                known.dims, known.residual = value.dims, value.residual - {number}
            numbers.append(number)
        layouts, scope = tuple(value.dims for value in found), self._scopes[-1][0]
        self.recording.operations.append(
            Operation(
                call.func, call.name, refs, named, tuple(numbers), layouts, scope, call.symbols
            )
        )

    def value(self, tensor: torch.Tensor) -> Value:
        """The recorded value of a tensor."""
        return self.recording.values[self.number(tensor)]

    def contraction(self, kind: str, weight: Value | None, widths: tuple[Layout, ...]) -> None:
        """Note a contraction: in-width, out-width and the factors of its MAC count."""
        scope = self._scopes[-1][0]
        stored = weight.weight if weight is not None else None
        name = scope or f"{kind}_{len(self.recording.contractions)}"
        if stored is not None:
            name = stored.rpartition(".")[0] or stored
        self.recording.contractions.append(Contraction(name, kind, stored, *widths))

    def freeze_if_read(self, tensor: torch.Tensor, dims: Layout, reason: str) -> None:
        """Freeze dimensions at the end of the pass if something has read the tensor by then."""
        self._if_read.append((tensor, dims, reason))

    def before(self, module: nn.Module, args: Any) -> None:
        """Hook: a module starts."""
        name = self._names.get(id(module), self._scopes[-1][0])
        self._scopes.append((name, len(self.recording.operations), args))
        if not self._whole and id(module) in self._names and rule_of(module) is not None:
            self._whole = len(self._scopes)

    def after(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        """Hook: a module has given its result."""
        if self._whole == len(self._scopes):
            self._whole = 0
            self._record_whole(module, args, kwargs, result)
        name, first, taken = self._scopes[-1]
        if self._whole or id(module) not in self._names:
            return
        taking, giving = list(tensors_in((args, kwargs))), list(tensors_in(result))
        if any(map(stands_in, (*taking, *giving))):
            return  # operators work on other tensors
        given, made = tuple(map(self.number, taking)), tuple(map(self.number, giving))
        leads = isinstance(result, torch.Tensor) and isinstance((*args, None)[0], torch.Tensor)
        plain = isinstance(result, torch.Tensor) and len(args) == 1 and not kwargs
        hooked = bool(module._forward_hooks) or not same_items(args, taken)
        hooked = hooked or self._lent(name, module)
        last = len(self.recording.operations)
        call = ModuleCall(name, module, given, made, first, last, plain, leads, hooked)
        self.recording.calls.append(call)

    def leave(self, module: nn.Module, args: Any, result: Any) -> None:
        """Hook: a module ends, by an exception too, which the model may catch."""
        if self._whole == len(self._scopes):
            self._whole = 0
        self._scopes.pop()

    def _lent(self, path: str, module: nn.Module) -> bool:
        """Whether a module without parts holds other tensors than its own while it runs."""
        prefix = f"{path}." if path else ""
        return not module._modules and any(
            self.recording.stored.get(prefix + name) != self._numbers.get(id(tensor))
            for name, tensor in stored_tensors(module)
        )

    def _record_whole(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        """Note a module call as one operation, by the rule of its class."""
        found = rule_of(module)
        assert found is not None
        refs = tuple(self.refer(arg) for arg in args)
        named = {key: self.refer(arg) for key, arg in kwargs.items()}
        call = WholeCall(self._scopes[-1][0], module, (args, kwargs), result, self)
        values = follow(found, call)
        call.settle(value.dims for value in values)
        self.used.update(self.number(tensor) for _, tensor in stored_tensors(module))
        self._note(call, refs, named, values)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch operators and modules."""
        self._scopes, self._whole = self._scopes[:1], 0
        register = nn.modules.module
        handles = (
            register.register_module_forward_pre_hook(self.before),
            register.register_module_forward_hook(self.after, with_kwargs=True),
            register.register_module_forward_hook(self.leave, always_call=True),
        )
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()


def _special(tree: Any) -> bool:
    """Whether nested values have a class of their own, by which code finds what is inside."""
    if isinstance(tree, tuple):
        return hasattr(tree, "_fields") or hasattr(tree, "n_fields")  # torch's have the latter
    return is_record(tree) or (isinstance(tree, Mapping) and type(tree) is not dict)


def _whole(held: Any) -> bool:
    """Whether it is a whole number, or a list or tuple of such."""
    if type(held) in (list, tuple):
        return bool(held) and all(type(item) is int for item in held)
    return type(held) is int


def record(model: nn.Module, example: Any, forward_fn: Forward | None = None) -> Recording:
    """Run ``model`` once on ``example`` and record what it does.

    The pass runs on shapes where these alone decide what the code does, else on values.

    Raises:
        TraceError: the forward pass fails, or returns no tensor.
    """
    recorder, result = _on_shapes(model, example, forward_fn) or _on_values(
        model, example, forward_fn
    )
    if next(tensors_in(result), None) is None:
        raise TraceError(
            f"{type(model).__name__} returned {type(result).__name__}, which holds no tensor; "
            "expected a tensor, or a tuple, list or dict of tensors"
        )
    recorder.freeze_outputs(result)
    couple_training_branches(model, recorder)
    recorder.leave_outputs(result)
    return recorder.recording


Watched = tuple[Recorder, Any]


def _on_shapes(model: nn.Module, example: Any, forward_fn: Forward | None) -> Watched | None:
    recorder = Recorder(model, example, forward_fn, on_shapes=True)
    try:
        return recorder, _watch(model, recorder)
    except Exception:  # noqa: BLE001  whatever stops it: the pass on values says it as it is
        return None


def _on_values(model: nn.Module, example: Any, forward_fn: Forward | None) -> Watched:
    recorder = Recorder(model, example, forward_fn)
    try:
        return recorder, _watch(model, recorder)
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(
            f"the forward pass of {type(model).__name__} failed on {_described(example)}: "
            f"{type(error).__name__}: {error}. Check that the example inputs fit the model "
            "(a factory for the command line returns them with it: module, example_inputs)"
        ) from error


def _described(example: Any) -> str:
    """Example inputs in words, for a message: what may be wrong with them."""
    given = as_inputs(example)
    shapes = [tuple(tensor.shape) for tensor in tensors_in(given)]
    if isinstance(given, dict):
        return (
            f"inputs of shapes {shapes}, given as the keywords {', '.join(map(str, given))} (a "
            "model that takes a dict as its argument takes a tuple of that dict)"
        )
    if not shapes:
        return f"inputs that hold no tensor ({', '.join(type(one).__name__ for one in given)})"
    return f"inputs of shapes {shapes}"


def _watch(model: nn.Module, recorder: Recorder) -> Any:
    """The result of one forward pass under the recorder."""
    recording = recorder.recording
    shapes = recording.on_shapes
    example = outlined(recording.example) if shapes else recording.example
    recorder.enter_inputs(as_inputs(example))
    with untouched(model, shapes=shapes), on_shapes(model, shapes), recorder.watching():
        result = run(model, example, recording.forward_fn)
        recorder.note_attributes(model)
    return result
