"""Torch module → ONNX file.

In: a module, example inputs, a path. Out: one valid ONNX file under that path, or ExportError.
The TorchScript exporter is the default: it takes a fifth of the time of the ``torch.export``
based one, and after simplification both give the same operators and the same latency.
"""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import onnx
import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from prune2deploy.atomic import replacing
from prune2deploy.errors import ExportError
from prune2deploy.exporting import declared, fixed
from prune2deploy.modes import evaluating

DEFAULT_OPSET = 20
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_LOG_SWITCH = "_jit_set_onnx_log_enabled"  # of ``torch._C``
SINGLE_FILE_BYTES = 1_900_000_000  # protobuf refuses messages of 2 GiB; weights then go beside it

_EXPORTER_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    ("You are using the legacy TorchScript-based ONNX export", DeprecationWarning),
    ("The feature will be removed", DeprecationWarning),  # said by the exporter of itself
    ("Constant folding", UserWarning),  # what could not be folded is left to the simplifier
    ("Provided key .* for dynamic axes", UserWarning),
    ("# 'dynamic_axes' is not recommended", UserWarning),
    ("Exporting a model while it is in training mode", UserWarning),
    ("ONNX export mode is set to TrainingMode", UserWarning),
    ("ONNX export of", UserWarning),
    ("The shape inference of", UserWarning),
    ("Setting ONNX exporter to use operator set version", UserWarning),
    (".*isinstance\\(treespec, LeafSpec\\).*", FutureWarning),  # torch.export of its own types
)


class ExportOptions(TypedDict, total=False):
    """Keyword options of ``to_onnx``.

    Attributes:
        dynamo: Use the ``torch.export`` based exporter (needs onnxscript) in place of TorchScript.
        opset: Operator set version, 20 unless told.
        input_names: One name per input tensor; ``input`` or ``input_0 …`` unless told.
        output_names: One name per output tensor; made from the structure unless told.
        dynamic_batch: Leave dimension 0 of every input and output free.
        tell: Hears what a reader of the file should know; a warning is given unless told.
    """

    dynamo: bool
    opset: int
    input_names: Sequence[str]
    output_names: Sequence[str]
    dynamic_batch: bool
    tell: Callable[[str], None]


def to_onnx(
    module: nn.Module,
    example_inputs: tuple[Tensor, ...],
    path: Path,
    **options: Unpack[ExportOptions],
) -> Path:
    """Export ``module`` in eval mode to ``path`` and check the result.

    Every input is one of the file's too, read or not: who calls the model gives them all.
    Outputs may be a tensor, or dictionaries, tuples and lists of tensors in any nesting: they
    are flattened in order, ``None`` is skipped. The module is left as it was.

    Args:
        module: Any module that ``torch.onnx.export`` can take.
        example_inputs: Tensors that ``module(*example_inputs)`` accepts.
        path: Where the file goes; written to a temporary name first.
        options: See ``ExportOptions``.

    Returns:
        ``path``.

    Raises:
        ExportError: The forward fails, an operator has no ONNX form, the file is not valid, or
            the batch was asked to be free and is not.
    """
    names = _input_names(example_inputs, options.get("input_names"))
    free_batch = options.get("dynamic_batch", False)
    if free_batch and options.get("dynamo", False):
        example_inputs = tuple(_at_least_two(tensor) for tensor in example_inputs)
    with _unfused(), evaluating(module), replacing(path) as file:
        outputs = _output_names(module, example_inputs, options.get("output_names"))
        _require_distinct([*names, *outputs])
        with _plain_call(module), fixed.told_by_tracer() as told:
            _run_exporter(module, example_inputs, file, (names, outputs), options)
        note = fixed.note(module, example_inputs, told)
        _gather_weights(file)
        declared.declare(file, dict(zip(names, example_inputs, strict=True)), free_batch=free_batch)
        _check_file(file)
        if free_batch:
            _check_free_batch(file, example_inputs, names)
    if note:
        options.get("tell", warnings.warn)(note)
    return path


def _input_names(inputs: tuple[Tensor, ...], given: Sequence[str] | None) -> list[str]:
    if not inputs:
        raise ExportError("no example inputs: give the tensors that the model is called with")
    names = list(given or input_names(len(inputs)))
    if len(names) != len(inputs):
        raise ExportError(
            f"{len(names)} input names for {len(inputs)} input tensors: give one each"
        )
    return names


def _require_distinct(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise ExportError(
            f"found the name {twice[0]!r} more than once among inputs and outputs "
            f"({', '.join(names)}), expected one of its own for each"
        )


def input_names(count: int, module: nn.Module | None = None) -> tuple[str, ...]:
    """Names of ``count`` inputs when the caller gives none.

    Several have the names of the parameters of ``module.forward``, unless stored tensors have
    them too.

    >>> input_names(1), input_names(2)
    (('input',), ('input_0', 'input_1'))
    """
    if count == 1:
        return ("input",)
    if module is not None:
        given = list(inspect.signature(module.forward).parameters.values())[:count]
        names = tuple(one.name for one in given if one.kind in _POSITIONAL)
        if len(names) == count and not set(names) & module.state_dict().keys():
            return names
    return tuple(f"input_{i}" for i in range(count))


def flatten(value: object, prefix: str = "output") -> dict[str, Tensor]:
    """Name every tensor of a model's output, in order.

    A lone tensor is ``output``; an entry of a dictionary adds ``_key``, of a sequence ``_i``. Where
    two would have the same name, the later one ends in ``_2``, ``_3`` ...

    Raises:
        ExportError: The value holds something that is neither a tensor nor a container.
    """
    if isinstance(value, Tensor):
        return {prefix: value}
    if value is None:
        return {}
    if isinstance(value, Mapping):
        children: list[tuple[str, object]] = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, (tuple, list)):
        children = [(str(i), v) for i, v in enumerate(value)]
    elif isinstance(value, (bool, int, float, str)):
        return {}  # a setting that rides along (a loss weight, a name), not a result
    else:
        raise ExportError(
            f"the model returns a {type(value).__name__} at {prefix!r}: expected tensors, "
            "dictionaries, tuples or lists of them. Wrap the model in a module that returns those"
        )
    found: dict[str, Tensor] = {}
    for key, child in children:
        for name, tensor in flatten(child, f"{prefix}_{key}").items():
            choices = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(2)))
            found[next(choice for choice in choices if choice not in found)] = tensor
    return found


@contextmanager
def _plain_call(module: nn.Module) -> Iterator[None]:
    """Have ``module`` take, hold and return tensors alone while the block runs.

    Exporters make inputs of the forward's default arguments (``is_causal=False``), so those are
    hidden, and stumble over other things in its state (``get_extra_state``). No wrapper module, so
    that the names in the file are those of the module's parameters.
    """
    hook = module.register_state_dict_post_hook(_drop_others)
    own = vars(module).get("forward")
    forward = module.forward

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(flatten(forward(*inputs)).values())

    vars(module)["forward"] = call
    try:
        yield
    finally:
        hook.remove()
        if own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own


def _drop_others(module: nn.Module, state: dict[str, Any], prefix: str, facts: Any) -> None:
    """Take out of a state dict what is no tensor."""
    for name in [name for name, value in state.items() if not isinstance(value, Tensor)]:
        del state[name]


def _output_names(
    module: nn.Module, inputs: tuple[Tensor, ...], given: Sequence[str] | None
) -> list[str]:
    """Run once; one name per output tensor."""
    with torch.no_grad():
        found = list(flatten(_forward(module, inputs)))
    if not found:
        raise ExportError("the model returns no tensor: there is nothing to export")
    if given and len(given) != len(found):
        raise ExportError(
            f"{len(given)} output names for {len(found)} output tensors ({', '.join(found)})"
        )
    return list(given) if given else found


def _forward(module: nn.Module, inputs: tuple[Tensor, ...]) -> object:
    try:
        return module(*inputs)
    except Exception as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in inputs)
        raise ExportError(
            f"the forward pass fails on inputs of shape {shapes}: {first_line(error)}"
        ) from error


def _run_exporter(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    file: Path,
    names: tuple[list[str], list[str]],
    options: ExportOptions,
) -> None:
    dynamo = options.get("dynamo", False)
    arguments: dict[str, Any] = {
        "input_names": names[0],
        "output_names": names[1],
        "opset_version": options.get("opset", DEFAULT_OPSET),
        "verbose": False,
        "dynamo": dynamo,
    }
    weights = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    if dynamo:
        arguments["external_data"] = weights > SINGLE_FILE_BYTES
    if options.get("dynamic_batch", False) and dynamo:
        batch = torch.export.Dim("batch")
        arguments["dynamic_shapes"] = (tuple({0: batch} for _ in inputs),)
    elif options.get("dynamic_batch", False):
        arguments["dynamic_axes"] = {name: {0: "batch"} for name in (*names[0], *names[1])}
    with _quiet(), _unlogged(), torch.no_grad():
        _call_exporter(lambda: torch.onnx.export(module, inputs, str(file), **arguments))


def _call_exporter(export: Callable[[], object]) -> None:
    try:
        export()
    except ImportError as error:
        raise ExportError(
            f"the dynamo exporter needs a package that is missing ({error}): "
            'pip install "prune2deploy[dynamo]", or leave dynamo off'
        ) from error
    except OSError:
        raise  # a full disk or a folder that cannot be written says so itself
    except Exception as error:
        told = first_line(error).partition("Please feel free")[0].strip().rstrip(".")
        raise ExportError(
            f"torch.onnx.export cannot write this model: {told}. Replace what is named in the "
            "model's code, or leave that part out of the model and run it beside the engine"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the exporters say of themselves; everything else still warns."""
    with warnings.catch_warnings():
        for message, category in _EXPORTER_WARNINGS:
            warnings.filterwarnings("ignore", message=message, category=category)
        for module in (r"torch\.", r"onnxscript\.", r"onnx_ir\.", r"copyreg"):
            for category in (DeprecationWarning, FutureWarning, UserWarning):
                warnings.filterwarnings("ignore", category=category, module=module)
        yield


@contextmanager
def _unlogged() -> Iterator[None]:
    """Keep the graph of a model that cannot be exported off standard output.

    TorchScript's exporter switches its log on whether or not it is asked to (``verbose``).
    """
    switch = vars(torch._C).get(_LOG_SWITCH)
    if switch is not None:
        setattr(torch._C, _LOG_SWITCH, lambda enabled: None)
    try:
        yield
    finally:
        if switch is not None:
            setattr(torch._C, _LOG_SWITCH, switch)


@contextmanager
def _unfused() -> Iterator[None]:
    """Leave out the fused attention operator of eval mode, which has no ONNX form."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _gather_weights(file: Path) -> None:
    """Put weights that the exporter wrote into many files into one beside the ONNX file."""
    if len(list(file.parent.iterdir())) == 1:
        return
    model = onnx.load(str(file))
    for other in file.parent.iterdir():
        other.unlink()
    location = f"{file.name}.data"
    onnx.save_model(model, str(file), save_as_external_data=True, location=location)


def _check_file(file: Path) -> None:
    try:
        onnx.checker.check_model(str(file))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the exported file is not valid ONNX: {first_line(error)}") from error


def _at_least_two(tensor: Tensor) -> Tensor:
    """Repeat a batch of one: ``torch.export`` takes a dimension of size 1 for a constant."""
    if tensor.ndim and tensor.shape[0] == 1:
        return tensor.repeat(2, *([1] * (tensor.ndim - 1)))
    return tensor


def _check_free_batch(file: Path, inputs: tuple[Tensor, ...], names: Sequence[str]) -> None:
    graph = onnx.load(str(file), load_external_data=False).graph
    for given in graph.input:
        dims = given.type.tensor_type.shape.dim
        if not dims or not dims[0].dim_param:
            raise ExportError(
                f"a free batch was asked for, but input {given.name!r} of the exported graph has "
                f"the fixed shape {[d.dim_param or d.dim_value for d in dims]}: the forward pass "
                "uses the batch size as a constant. Export with a fixed batch"
            )
    _check_other_batch(file, inputs, names)


def _check_other_batch(file: Path, inputs: tuple[Tensor, ...], names: Sequence[str]) -> None:
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    session = ort.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
    feeds = {n: torch.cat([t, t[:1]]).cpu().numpy() for n, t in zip(names, inputs, strict=True)}
    try:
        session.run(None, feeds)
    except Exception as error:
        batch = inputs[0].shape[0]
        raise ExportError(
            f"a free batch was asked for, but the graph fails with {batch + 1} samples after an "
            f"example of {batch}: {first_line(error)}. A reshape in the forward pass has the "
            "batch size written into it; export with a fixed batch"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
