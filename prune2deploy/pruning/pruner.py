"""Pruners under the names that users of Torch-Pruning know: rank, choose, prune in place."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from prune2deploy.errors import ConfigError
from prune2deploy.graph.axes import Axis
from prune2deploy.pruning.decode import Channels, run_length
from prune2deploy.pruning.dependency import ROOTS, DependencyGraph, History
from prune2deploy.pruning.given import members_of
from prune2deploy.pruning.group import Group, PruningFn
from prune2deploy.pruning.items import Root
from prune2deploy.pruning.options import Configured, Options
from prune2deploy.pruning.ranking import Record, alone, lowest, together

Scores = np.ndarray[Any, np.dtype[np.float64]]
ImportanceFn = Callable[[Group], "torch.Tensor | None"]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A group that may lose channels in this step.

    Attributes:
        root: Where it begins.
        names: Its axes; several where they must keep equally many channels.
        scores: Per axis, one score per choice.
        fold: Channels that go with one choice, one of each of so many groups.
        record: What the ranking needs.
        scope: Candidates of one scope are ranked together.
    """

    root: Root
    names: tuple[str, ...]
    scores: tuple[Scores, ...]
    fold: int
    record: Record
    scope: str

    def removal(self, keep: int) -> dict[str, Channels]:
        """Channels to remove so that ``keep`` choices stay."""
        gone = {}
        for name, scores in zip(self.names, self.scores, strict=True):
            chosen = lowest(scores, len(scores) - keep)
            gone[name] = np.concatenate([chosen + g * len(scores) for g in range(self.fold)])
        return gone


class BasePruner(Configured):
    """Prunes a model in place, to a ratio, in one or more steps.

    Args:
        model: The model; each ``step`` changes it.
        example_inputs: One tensor, a tuple of arguments, or a dict of keywords.
        importance: A function of a group; one score per position of ``group[0].idxs``.
        given: Those of ``Options`` in order.
        options: Those of ``Options`` by name.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        importance: ImportanceFn,
        *given: Any,
        **options: Any,
    ) -> None:
        self.model = model
        self.importance = importance
        self.options = Options(*given, **options).checked()
        self.DG = DependencyGraph().build_dependency(
            model,
            example_inputs,
            forward_fn=self.options.forward_fn,
            output_transform=self.options.output_transform,
            customized_pruners=self.options.customized_pruners,
        )
        self.current_step = 0
        self.per_step_pruning_ratio = self._schedule(self.options.pruning_ratio)
        self.per_step_head_pruning_ratio = self._schedule(self.options.head_pruning_ratio)
        self._ignored = members_of(self.ignored_layers, model)
        self._initial = {axis.name: axis.size for axis in self.DG.live.graph.axes}
        self._scopes = self._user_scopes()
        self.init_num_heads = dict(self.options.num_heads)
        layers = [one for one in model.modules() if self.DG.get_pruner_of_module(one) is not None]
        self.layer_init_out_ch = {layer: self.DG.get_out_channels(layer) for layer in layers}
        self.layer_init_in_ch = {layer: self.DG.get_in_channels(layer) for layer in layers}

    def _schedule(self, ratio: float) -> list[float]:
        steps = self.options.iterative_steps
        return list(self.options.iterative_pruning_ratio_scheduler(ratio, steps))

    def _user_scopes(self) -> dict[int, tuple[str, list[float]]]:
        """Per module or parameter with a ratio of its own: its scope and ratio per step."""
        found: dict[int, tuple[str, list[float]]] = {}
        for number, (key, ratio) in enumerate((self.options.pruning_ratio_dict or {}).items()):
            layers = key if isinstance(key, tuple) else (key,)
            for identity in members_of(layers):
                found[identity] = (f"given {number}", self._schedule(ratio))
        return found

    @property
    def ignored_layers(self) -> list[Any]:
        """Modules, layer types and parameters that keep what they have."""
        return list(self.options.ignored_layers or ())

    @property
    def ignored_params(self) -> list[nn.Parameter]:
        """The parameters among them."""
        return [one for one in self.ignored_layers if isinstance(one, nn.Parameter)]

    @property
    def root_module_types(self) -> tuple[type[Any], ...]:
        """Layers that a group may begin with."""
        return tuple(self.options.root_module_types or (*ROOTS, nn.LSTM))

    @property
    def num_heads(self) -> dict[Any, int]:
        """Heads that each layer of the option has now."""
        return {layer: self._heads(layer, given) for layer, given in self.options.num_heads.items()}

    def _heads(self, layer: Any, given: int) -> int:
        """Heads left of those given: axes of the layer that count heads may have shrunk."""
        owner = self.DG._builder().owner
        for axis in self.DG.live.graph.axes:
            makers = [m for m in axis.members if m.role == "out" and owner(m.tensor) is layer]
            if any(run_length(member.channel) > 1 for member in makers):
                given = given * axis.size // self._initial.get(axis.name, axis.size)
        return given

    @property
    def current_ratio(self) -> float:
        """The ratio that the steps so far aimed at."""
        return self.per_step_pruning_ratio[min(self.current_step, self.options.iterative_steps)]

    def reset(self) -> None:
        """Begin counting steps again."""
        self.current_step = 0

    def step(self, interactive: bool = False) -> Iterator[Group] | None:
        """Prune one step further.

        Args:
            interactive: Hand the groups out one by one instead of pruning them; call
                ``group.prune()`` on those that shall go.

        Raises:
            PruneError: the pruned model no longer runs; it is put back as it was.
        """
        self.current_step += 1
        groups = self._prune()
        if interactive:
            return groups
        self.DG.prune_together(list(groups))
        return None

    def _prune(self) -> Iterator[Group]:
        if self.current_step > self.options.iterative_steps:
            warnings.warn(
                f"step {self.current_step} of {self.options.iterative_steps}: nothing left to "
                "prune; call reset() or make a new pruner with another ratio",
                UserWarning,
                stacklevel=3,
            )
            return
        self.DG.live.follow()
        with self.DG.deferred():
            scopes: dict[str, list[Candidate]] = {}
            with torch.no_grad():
                for candidate in self._candidates():
                    scopes.setdefault(candidate.scope, []).append(candidate)
            for members in scopes.values():
                records = [candidate.record for candidate in members]
                counts = together(records) if len(records) > 1 else [alone(records[0])]
                for candidate, keep in zip(members, counts, strict=True):
                    if keep < len(candidate.record.scores):
                        yield self.DG._group(candidate.root, candidate.removal(keep))

    def _candidates(self) -> Iterator[Candidate]:
        for unit in self.DG.units():
            root = self.DG._first_root(unit, self.root_module_types)
            if root is None:
                continue
            group = self.DG._group(root, self.DG.everything(unit))
            if self.DG.touches(group, self._ignored):
                continue
            candidate = self._candidate(unit, root, group)
            if candidate is not None:
                yield candidate

    def _candidate(self, unit: tuple[Axis, ...], root: Root, group: Group) -> Candidate | None:
        ratio, scope = self._target(unit, group)
        if ratio is None:
            return None
        fold = self._fold(unit, group)
        scores = []
        for axis in unit:
            found = self._scores(axis, group if len(unit) == 1 else None)
            if found is None:
                return None
            scores.append(found.reshape(fold, -1).mean(0))
        initial = self._initial.get(unit[0].name, unit[0].size)
        mean = np.mean([np.sort(one) for one in scores], axis=0)
        record = Record(
            mean, initial // fold, ratio, self._step(unit[0], root, fold),
            self.options.max_pruning_ratio,
        )  # fmt: skip
        names = tuple(axis.name for axis in unit)
        return Candidate(root, names, tuple(scores), fold, record, scope)

    def _scores(self, axis: Axis, group: Group | None) -> Scores | None:
        """Scores of an axis's channels, from those of the root's positions."""
        if group is None:
            own = self.DG._first_root((axis,), self.root_module_types)
            own = own or self.DG._first_root((axis,), (nn.Module,))
            if own is None:  # bare parameters alone hold it
                return np.zeros(axis.size)
            group = self.DG._group(own, self.DG.everything((axis,)))
        values = self._estimated(group)
        if values is None:
            return None
        owners = group.origin.root_channel[group[0].idxs]
        counts = np.bincount(owners, minlength=axis.size)
        return np.bincount(owners, weights=values, minlength=axis.size) / np.maximum(counts, 1)

    def _estimated(self, group: Group) -> Scores | None:
        """One score per position of the root, as the importance gives them.

        Raises:
            ConfigError: it gives another number of scores.
        """
        found = self.estimate_importance(group)
        if found is None:
            return None
        expected = (len(group[0].idxs),)
        if tuple(found.shape) != expected:
            raise ConfigError(
                f"importance: found scores of shape {tuple(found.shape)} for the group of "
                f"{group[0].dep.target.path!r}, expected {expected}: one per position of "
                "group[0].idxs (with group_reduction=None there is a row per layer, which no "
                "pruner can rank; choose how they are combined)"
            )
        return found.detach().double().cpu().numpy()

    def _target(self, unit: tuple[Axis, ...], group: Group) -> tuple[float | None, str]:
        """The ratio of a group and the scope that it is ranked in."""
        step = self.current_step
        deps = [dep for dep, _ in group if not self.DG._only_in(dep.handler)]
        outs = [dep.target.module for dep in deps]
        if any(map(self._is_outer, unit)):
            if not self.options.prune_num_heads:
                return None, ""
            return self._head_ratio(outs), "heads" if self.options.global_pruning else unit[0].name
        if not self.options.prune_head_dims and (
            any(m in self.options.num_heads for m in outs) or any(map(self._is_head_width, unit))
        ):
            return None, ""
        for dep in deps:
            for identity in self.DG.identities(dep) & self._scopes.keys():
                scope, ratios = self._scopes[identity]
                return ratios[step], scope if self.options.global_pruning else unit[0].name
        ratio = self.per_step_pruning_ratio[step]
        if self.options.isomorphic:
            return ratio, _build(group)
        return ratio, "all" if self.options.global_pruning else unit[0].name

    def _head_ratio(self, modules: Sequence[Any]) -> float:
        for key, ratio in (self.options.head_pruning_ratio_dict or {}).items():
            inside = members_of((key,))
            if any(id(module) in inside for module in modules):
                return self._schedule(ratio)[self.current_step]
        return self.per_step_head_pruning_ratio[self.current_step]

    def _is_outer(self, axis: Axis) -> bool:
        """Whether an axis counts heads or groups, each of which has prunable channels inside."""
        graph = self.DG.live.graph
        makers = [m for m in axis.members if m.role == "out"]
        if not makers or any(run_length(member.channel) == 1 for member in makers):
            return False
        if self._is_head_width(axis):
            return False
        at = self.DG._builder().at
        maker = makers[0]
        for name, channel in at[maker.tensor, maker.dim]:
            shared = ((channel >= 0) & (maker.channel >= 0)).any()
            if name != axis.name and shared and graph[name].frozen is None:
                return True
        given = self.options.num_heads
        return any(self.DG._builder().owner(member.tensor) in given for member in makers)

    def _is_head_width(self, axis: Axis) -> bool:
        """Whether products of activations are taken over an axis that there are several of."""
        graph = self.DG.live.graph
        products = (layer for layer in graph.layers if layer.weight is None)
        if not any(axis.name in (p.in_width.axes | p.out_width.axes) for p in products):
            return False
        makers = [m.channel for m in axis.members if m.role == "out"]
        return any(run_length(channel) * axis.size < len(channel) for channel in makers)

    def _fold(self, unit: tuple[Axis, ...], group: Group) -> int:
        """Groups that the user says must lose equally many, where the graph has none itself."""
        options = self.options
        wanted = [1]
        for dep, _ in group:
            inside = self.DG._only_in(dep.handler)
            given = options.in_channel_groups if inside else options.out_channel_groups
            wanted.append(given.get(dep.target.module, 1))
        fold = max(wanted)
        alone_there = all(len(m.channel) == axis.size for axis in unit for m in axis.members)
        fits = all(axis.size % fold == 0 for axis in unit)
        return fold if fits and alone_there else 1

    def _step(self, axis: Axis, root: Root, fold: int) -> int:
        """Choices in which the root's width moves by a multiple of ``round_to``."""
        if not self.options.round_to:
            return 1
        channel = dict(root.cover).get(axis.name)
        width = fold if channel is None else fold * int((channel == 0).sum())
        return self.options.round_to // math.gcd(self.options.round_to, width)

    def estimate_importance(self, group: Group) -> torch.Tensor | None:
        """Scores of a group's root positions; ``None`` leaves the group alone."""
        return self.importance(group)

    def manual_prune_width(
        self,
        layer: Any,
        pruning_fn: PruningFn,
        pruning_ratios_or_idxs: float | Sequence[int],
    ) -> None:
        """Prune one layer by a ratio to remove, or by positions.

        Args:
            layer: A layer of the model.
            pruning_fn: Which side of it.
            pruning_ratios_or_idxs: The fraction of its channels to remove, lowest scores first;
                or the positions to remove.
        """
        given = pruning_ratios_or_idxs
        if isinstance(given, float):
            root = self.DG._root(layer, pruning_fn)
            size = len(root.cover[0][1])
            group = self.DG.get_pruning_group(layer, pruning_fn, range(size))
            scores = self._estimated(group)
            values = np.zeros(size) if scores is None else scores
            places = np.asarray(group[0].idxs)
            given = places[lowest(values, int(size * given + 1e-6))].tolist()
        self.DG.get_pruning_group(layer, pruning_fn, given).prune()

    def get_target_pruning_ratio(self, module: Any, step: int = -1) -> float:
        """The ratio that a module's outputs shall have lost after a step (the present one)."""
        _, ratios = self._scopes.get(id(module), ("", self.per_step_pruning_ratio))
        return min(ratios[self.current_step if step < 0 else step], self.options.max_pruning_ratio)

    def get_target_head_pruning_ratio(self, module: Any) -> float:
        """The fraction of a module's heads that shall be gone after the present step."""
        return min(self._head_ratio([module]), 1.0)

    def pruning_history(self) -> History:
        """What was pruned so far, for ``load_pruning_history``."""
        return self.DG.pruning_history()

    def load_pruning_history(self, pruning_history: History) -> None:
        """Prune a fresh model as another one was pruned."""
        self.DG.load_pruning_history(pruning_history)

    def update_regularizer(self) -> None:
        """Nothing here; pruners that train sparsely look at the model again."""

    def regularize(self, model: nn.Module, loss: Any = None) -> None:
        """Nothing here; pruners that train sparsely add to the gradients."""


def _build(group: Group) -> str:
    """Layer types and sides of a group: equal for groups of the same build."""
    parts = [f"{type(dep.target.module).__name__}.{dep.handler.__name__}" for dep, _ in group]
    return " ".join(sorted(parts))


MetaPruner = BasePruner
MagnitudePruner = BasePruner
