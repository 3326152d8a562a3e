"""ONNX file → smaller ONNX file with the same outputs.

onnxsim folds constants and drops what changes nothing. Its result is used only if it is valid,
no larger, keeps every custom operator, and gives the same outputs; else the file is taken over
as it was and the report says why. Simplification never stops a run.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from prune2deploy.atomic import replacing, scratch
from prune2deploy.errors import ExportError, ParityError
from prune2deploy.exporting import parity
from prune2deploy.exporting.companions import companions
from prune2deploy.exporting.export import first_line
from prune2deploy.exporting.parity import Array, Parity

STANDARD_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml"})


@dataclass(frozen=True)
class SimplifyReport:
    """What simplification did.

    Attributes:
        path: The file to go on with.
        applied: Whether it is the simplified one.
        note: Why it was not applied, or what could not be checked; empty if all is well.
        parity: Outputs of the two compared; ``None`` if nothing was applied, or if ONNX Runtime
            lacks a custom operator of the model.
    """

    path: Path
    applied: bool
    note: str
    parity: Parity | None = None


class _Rejected(Exception):  # noqa: N818 - not an error: the file is kept as it was
    """The simplified file must not be used; the text says why."""


def simplify(
    path: Path, out: Path, *, samples: Sequence[Mapping[str, Array]] | None = None
) -> SimplifyReport:
    """Simplify ``path`` into ``out``.

    Args:
        path: A valid ONNX file.
        out: Where the result goes; may be ``path``.
        samples: Inputs to compare outputs on; one random input unless told.

    Raises:
        ExportError: ``path`` is missing or not valid ONNX.
    """
    before = _load(path)
    with scratch(out.parent) as folder:
        candidate = folder / out.name
        try:
            note, compared = _simplify_checked(before, path, candidate, samples)
        except _Rejected as reason:
            return _keep(path, out, str(reason))
        candidate.replace(out)
    return SimplifyReport(path=out, applied=True, note=note, parity=compared)


def count_nodes(graph: Any) -> int:
    """Operators of an ONNX graph, those in branches and loops included."""
    return sum(1 + sum(count_nodes(g) for g in _subgraphs(node)) for node in graph.node)


def _operators(graph: Any) -> int:
    """Nodes that compute something: a Constant is only a way to store a number."""
    return count_nodes(graph) - sum(1 for node in graph.node if node.op_type == "Constant")


def custom_operators(graph: Any) -> Counter[str]:
    """How often each operator outside the ONNX standard occurs, as ``domain::type``."""
    found: Counter[str] = Counter()
    for node in graph.node:
        if node.domain not in STANDARD_DOMAINS:
            found[f"{node.domain}::{node.op_type}"] += 1
        for inner in _subgraphs(node):
            found += custom_operators(inner)
    return found


def _subgraphs(node: Any) -> list[Any]:
    return [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]


def _load(path: Path) -> Any:
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(str(path))
    except FileNotFoundError as error:
        raise ExportError(f"{path} does not exist") from error
    except Exception as error:
        raise ExportError(f"{path} is not a valid ONNX file: {first_line(error)}") from error
    return model


def _simplify_checked(
    before: Any,
    path: Path,
    candidate: Path,
    samples: Sequence[Mapping[str, Array]] | None,
) -> tuple[str, Parity | None]:
    """Write the simplified file; return a note and the comparison, or raise ``_Rejected``."""
    if companions(path):
        raise _Rejected("its weights lie in files of their own; it is left as it was")
    custom = custom_operators(before.graph)
    after = _run_onnxsim(before)
    if custom_operators(after.graph) != custom:
        raise _Rejected(f"onnxsim changed custom operators ({', '.join(custom)})")
    try:
        onnx.checker.check_model(after)
    except onnx.checker.ValidationError as error:
        raise _Rejected(f"onnxsim gave an invalid file: {first_line(error)}") from error
    same = _operators(after.graph) == _operators(before.graph)
    _save_no_larger(after, candidate, path.stat().st_size, same_operators=same)
    try:
        reference = parity.onnx_runner(path)
    except ExportError:
        if not custom:
            raise
        return f"outputs not compared: ONNX Runtime lacks {', '.join(custom)}", None
    return "", _same_outputs(reference, candidate, samples or parity.random_samples(path))


def _save_no_larger(model: Any, candidate: Path, limit: int, *, same_operators: bool) -> None:
    """Save, without the inferred shapes of inner tensors where those make the file larger."""
    if model.ByteSize() > limit:
        del model.graph.value_info[:]
    size = model.ByteSize()
    if size > limit and same_operators and size < 1.01 * limit:  # it only chose longer names
        raise _Rejected("there was nothing to simplify")
    if size > limit:
        raise _Rejected(f"onnxsim made the file larger ({limit} to {size} bytes)")
    onnx.save_model(model, str(candidate))


def _run_onnxsim(model: Any) -> Any:
    import onnxsim

    try:
        after, _ = onnxsim.simplify(model)
    except Exception as error:
        raise _Rejected(f"onnxsim failed: {type(error).__name__}: {str(error)[:200]}") from error
    facts = [entry for entry in after.metadata_props if not entry.key.startswith("onnxsim.")]
    del after.metadata_props[:]  # its log of removed nodes outweighs a small model
    after.metadata_props.extend(facts)
    return after


def _same_outputs(
    reference: parity.Runner, candidate: Path, samples: Sequence[Mapping[str, Array]]
) -> Parity:
    try:
        compared = parity.compare(reference, parity.onnx_runner(candidate), samples)
    except (ExportError, ParityError) as error:
        raise _Rejected(f"the simplified file cannot be compared: {error}") from error
    if not compared.passed:
        raise _Rejected(
            f"onnxsim changed output {compared.worst_output!r} by {compared.max_rel:.3g} of its "
            f"scale ({compared.tolerance:.3g} is allowed)"
        )
    return compared


def _keep(path: Path, out: Path, note: str) -> SimplifyReport:
    """Take the file over as it was."""
    if path.resolve() != out.resolve():
        for name in companions(path):
            with replacing(out.parent / name) as temporary:
                shutil.copyfile(path.parent / name, temporary)
        with replacing(out) as temporary:
            shutil.copyfile(path, temporary)
    return SimplifyReport(out, False, note)
