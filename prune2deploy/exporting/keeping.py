"""Which nodes of an ONNX file stay in the higher precision, so that it still gives its outputs.

In: how to write the file with some nodes kept, and a :class:`Judge`. Out: :class:`Found`, the
attempt with the fewest nodes kept that passed, else the closest one.

Where few nodes do the harm, comparing activations of both files names suspects and trying them
one by one tells which to keep. Where the harm is in many of a kind (softmax and normalisation of
a transformer) no single one helps: then only contractions, which do the work, are lowered, and of
the other kinds those that can be afforded, kind by kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

from prune2deploy.atomic import scratch
from prune2deploy.exporting import parity
from prune2deploy.exporting.activations import error_jumps, load_named
from prune2deploy.exporting.parity import Array, Parity

ROUNDS = 5
SHORTLIST = 6  # suspects per round that are each tried in high precision
STUBBORN = 0.9  # of the error: where the best single node leaves more, kinds are tried

Evaluate = Callable[[Path], float]
"""Accuracy of an ONNX file, larger is better."""
Convert = Callable[[Path, Collection[str]], None]
"""Writes a file in the lower precision where the named nodes stay in the higher one."""


@dataclass(frozen=True)
class AccuracyLimit:
    """What decides in place of the outputs' difference.

    Attributes:
        evaluate: Accuracy of a file.
        max_drop: Largest accuracy to lose, in the unit of ``evaluate``.
    """

    evaluate: Evaluate
    max_drop: float = 0.01


@dataclass(frozen=True)
class Verdict:
    """What a judge says of a file.

    Attributes:
        parity: Its outputs against those of the file it was made of.
        drop: Accuracy lost, where that decides.
        passed: Whether the limit was kept.
        error: What the limit is on.
    """

    parity: Parity
    drop: float | None
    passed: bool
    error: float


class Judge:
    """Compares a candidate with the file it was made of."""

    def __init__(
        self,
        path: Path,
        samples: Sequence[Mapping[str, Array]],
        precision: str,
        limits: tuple[float | None, AccuracyLimit | None],
    ) -> None:
        self.path, self.samples = path, samples
        self._runner = parity.onnx_runner(path)
        self._precision = precision
        self._max_error, self._accuracy = limits
        self._reference = self._accuracy.evaluate(path) if self._accuracy else 0.0

    def compare(self, candidate: Path) -> Parity:
        """Outputs of both, without accuracy."""
        return parity.compare(
            self._runner,
            parity.onnx_runner(candidate),
            self.samples,
            precision=self._precision,
            tolerance=self._max_error,
        )

    def __call__(self, candidate: Path) -> Verdict:
        """Judge by accuracy, where that is to decide, else by the outputs' difference."""
        compared = self.compare(candidate)
        if self._accuracy is None:
            return Verdict(compared, None, compared.passed, compared.error)
        drop = self._reference - self._accuracy.evaluate(candidate)
        return Verdict(compared, drop, drop <= self._accuracy.max_drop, drop)


@dataclass(frozen=True)
class Found:
    """An attempt: the file, the nodes kept, and what the judge says."""

    path: Path
    kept: tuple[str, ...]
    verdict: Verdict

    @property
    def rank(self) -> tuple[bool, float]:
        """Less is better: passed with few nodes kept, then failed with a small error."""
        passed = self.verdict.passed
        return not passed, len(self.kept) if passed else self.verdict.error


def search(
    out: Path,
    convert: Convert,
    judge: Judge,
    candidates: Sequence[str] | None = None,
    kinds: Sequence[Sequence[str]] = (),
) -> Found:
    """Write the file to ``out`` with as few nodes kept as it takes to pass.

    Args:
        out: Where the best attempt goes.
        convert: Writes an attempt.
        judge: Tells whether it passes.
        candidates: Nodes that may be kept; ``None`` for all.
        kinds: Nodes by kind, of the kinds that may be kept as a whole.
    """
    with scratch(out.parent) as folder:
        best = _Attempts(folder, convert, judge).run(candidates, kinds)
        best.path.replace(out)
    return Found(out, best.kept, best.verdict)


def counterparts(names: Collection[str], path: Path, other: Path) -> tuple[str, ...]:
    """Names in ``other`` of the nodes that correspond to those of ``path`` called ``names``.

    The same model is exported with other names where its code was replaced by its graph, so nodes
    correspond by their places in the sequences of operator types, aligned as lines of a text are.
    """
    here, there = load_named(path).graph.node, load_named(other).graph.node
    kinds = [n.op_type for n in here], [n.op_type for n in there]
    blocks = SequenceMatcher(None, *kinds, autojunk=False).get_matching_blocks()
    pairs = [(here[a + i].name, there[b + i].name) for a, b, many in blocks for i in range(many)]
    wanted = set(names)
    return tuple(its for own, its in pairs if own in wanted)


class _Attempts:
    """The attempts of one search. Files are large: there are that of the best and the last one."""

    def __init__(self, folder: Path, convert: Convert, judge: Judge) -> None:
        self._folder, self._convert, self._judge = folder, convert, judge
        self._best: Found | None = None
        self._written = 0

    def run(self, candidates: Sequence[str] | None, kinds: Sequence[Sequence[str]]) -> Found:
        """Keep ever more of the worst nodes, twice as many in each round, until one passes.

        Kinds have their turn, once, when no node helps any more. Returns the best attempt.
        """
        last = self._attempt([])
        for number in range(ROUNDS - 1):
            if last.verdict.passed:
                break
            errors = self._errors(last, candidates, number)
            helped = min(errors.values(), default=math.inf) < STUBBORN * last.verdict.parity.error
            if kinds and not helped:
                last, kinds = self._by_kind(kinds), ()
            elif errors:
                worst = sorted(errors, key=errors.__getitem__)[: 2**number]
                last = self._attempt([*last.kept, *worst])
        if kinds and not last.verdict.passed:
            self._by_kind(kinds)
        assert self._best is not None
        return self._best

    def _attempt(self, kept: Sequence[str]) -> Found:
        path = self._write(kept)
        made = Found(path, tuple(kept), self._judge(path))
        if self._best is None or made.rank < self._best.rank:
            self._best = made
        return made

    def _write(self, kept: Sequence[str]) -> Path:
        """Write a file in which the named nodes are kept, once there is none but the best."""
        for file in self._folder.iterdir():
            if self._best is None or file != self._best.path:
                file.unlink()
        self._written += 1
        path = self._folder / f"{self._written}.onnx"
        self._convert(path, kept)
        return path

    def _errors(
        self, last: Found, candidates: Sequence[str] | None, number: int
    ) -> dict[str, float]:
        """Error where one more node is kept, for those where the activations part most."""
        jumps = error_jumps(self._judge.path, last.path, self._judge.samples)
        may = set(jumps if candidates is None else candidates) - set(last.kept)
        suspects = [name for name in jumps if name in may][: max(SHORTLIST, 2**number)]
        errors: dict[str, float] = {}
        for name in suspects:
            errors[name] = self._judge.compare(self._write([*last.kept, name])).error
        return errors

    def _by_kind(self, kinds: Sequence[Sequence[str]]) -> Found:
        """Keep all kinds, and then lower again those that can be afforded, large ones first."""
        kept = sorted(kinds, key=len, reverse=True)
        last = self._attempt([name for kind in kept for name in kind])
        for kind in list(kept) if last.verdict.passed else ():
            rest = [other for other in kept if other is not kind]
            found = self._attempt([name for other in rest for name in other])
            if found.verdict.passed:
                kept, last = rest, found
        return last
