"""A model that is pruned in place, with a graph that is kept up to date without tracing again.

``prune2deploy.prune`` works on copies; here the caller's own module loses its channels. After each
removal the graph is shrunk, not traced again: members keep the positions that stay, renumbered.
Where the model's Python code holds widths as constants and no longer runs, its ``forward`` is
replaced by the recorded operators (``rewrite``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from prune2deploy.errors import PruneError, TraceError
from prune2deploy.graph.axes import Axis, Graph, Member
from prune2deploy.graph.build import positions
from prune2deploy.graph.calling import Forward, stored_tensors
from prune2deploy.graph.layout import Node
from prune2deploy.graph.trace import trace, unwrap
from prune2deploy.plan.plan import Plan
from prune2deploy.pruning.decode import Channels, merged
from prune2deploy.pruning.rewrite import is_rewritten, rewrite
from prune2deploy.surgery.attributes import runs_with_its_code, update_attributes
from prune2deploy.surgery.checking import check_outputs
from prune2deploy.surgery.compensation import compensation
from prune2deploy.surgery.doubling import with_batch
from prune2deploy.surgery.lengths import Kept
from prune2deploy.surgery.scales import kept_alike, spelt
from prune2deploy.surgery.slicing import (
    kept_positions,
    picked,
    slice_tensors,
)
from prune2deploy.surgery.widths import Widths

Call = Callable[[], Any]
Removal = Mapping[str, Channels]
"""Axis name → sorted channels to remove, numbered as they are now."""


@dataclass(frozen=True)
class _Backup:
    """Tables of every module as they were: references, nothing is copied."""

    tables: tuple[tuple[nn.Module, dict[str, Any], dict[str, Any], dict[str, Any]], ...]
    forward: Any

    @staticmethod
    def of(model: nn.Module) -> _Backup:
        return _Backup(
            tuple((m, dict(m._parameters), dict(m._buffers), _plain(m)) for m in model.modules()),
            model.__dict__.get("forward"),
        )

    def restore(self) -> None:
        for module, parameters, buffers, attributes in self.tables:
            module._parameters = parameters
            module._buffers = buffers
            module.__dict__.update(attributes)
        model = self.tables[0][0]
        model.__dict__.pop("forward", None)
        if self.forward is not None:
            model.__dict__["forward"] = self.forward


def _plain(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in module.__dict__.items() if isinstance(v, int | tuple | list)}


class Live:
    """A model, its graph now, and what has been removed since it was traced.

    Attributes:
        model: The caller's module.
        graph: Axes and members as they are now; the recording is that of the trace.
        alive: Per axis, the channel numbers of the trace that are still there.
    """

    def __init__(self, model: nn.Module, example: Any, forward_fn: Forward | None) -> None:
        self.model = unwrap(model)
        self.example = example
        self.forward_fn = forward_fn
        self._backup: _Backup | None = None
        self._before: Graph | None = None
        self._deferred = False
        self.trace()

    def trace(self) -> None:
        """Trace the model as it is now."""
        self._wide = False
        self.graph = trace(self.model, self.example, forward_fn=self.forward_fn)
        self.alive = {axis.name: np.arange(axis.size) for axis in self.graph.axes}
        self._traced = self.graph

    def follow(self) -> None:
        """Trace again if somebody else changed the model's shapes since."""
        planned = self.graph.shapes({})
        found = dict(stored_tensors(self.model))
        if any(name not in found or found[name].shape != s for name, s in planned.items()):
            self.trace()

    def positions(self, node: Node) -> list[tuple[str, Channels]]:
        """What ``positions`` says of a recorded dimension, in present positions and channels."""
        names = self.graph.recording.axis_names
        found = [(names.get(id(below)), channel) for below, channel in positions(node)]
        named = [(name, channel) for name, channel in found if name is not None]
        if not named:
            return []
        stay = np.ones(len(named[0][1]), dtype=bool)
        present = []
        for name, channel in named:
            number = _renumber(self.alive[name], len(channel))
            now = np.where(channel >= 0, number[channel], -1)
            stay &= (channel < 0) | (now >= 0)
            present.append((name, now))
        return merged([(name, now[stay]) for name, now in present])

    def remove(self, removal: Removal, customized: Mapping[str, Call] | None = None) -> None:
        """Remove channels from the model, in place, and shrink the graph.

        Args:
            removal: Channels per axis.
            customized: By path of a layer, what prunes it instead of slicing its tensors.

        Raises:
            PruneError: an axis would lose all its channels, or the model no longer runs.
        """
        self._check(removal)
        if self._backup is None:
            self._backup, self._before = _Backup.of(self.model), self.graph
            self._alive_before = dict(self.alive)
        plan, before = self._plan(removal), self.alive
        left = {name: before[name][list(channels)] for name, channels in plan.kept.items()}
        self.alive = before | left
        planned, factors = kept_positions(self.graph, plan), self._factors(before)
        kept = self._customized(planned, customized or {})
        for name in factors:
            if kept[name] is not planned[name]:  # the tensor has been sliced already
                factors[name] = picked(factors[name], planned[name])
        slice_tensors(self.model, kept, factors)
        update_attributes(self.model, self.graph.recording, Widths(self.graph, plan))
        self.graph = shrink(self.graph, plan)
        if not self._deferred:
            self.settle()

    def _factors(self, before: Mapping[str, Channels]) -> dict[str, torch.Tensor]:
        """What stored tensors are multiplied by, as they are before they are sliced."""
        held, stays = (_left_of(self._traced, alive) for alive in (before, self.alive))
        places = kept_positions(self._traced, held)
        stored = _Spread(self.model, self._traced, places)
        kept = kept_positions(self._traced, stays)
        found = compensation(self._traced, stored, kept, stays, held)
        return {name: picked(factor, places[name]) for name, factor in found.items()}

    def _customized(self, kept: Kept, calls: Mapping[str, Call]) -> Kept:
        """Run the user's functions; what they have sliced is not sliced again."""
        for call in calls.values():
            call()
        left = dict(kept)
        for name, dims in kept.items():
            if not any(name.startswith(f"{path}.") or not path for path in calls):
                continue
            old = [d(self.graph.sizes({})) for d in self.graph.tensors[name]]
            new = [n if p is None else len(p) for n, p in zip(old, dims, strict=True)]
            found = list(_stored(self.model, name).shape)
            if found == new:
                left[name] = [None] * len(dims)
            elif found != old:
                raise PruneError(
                    f"the customised pruner left {name} with shape {found}; expected {new}"
                )
        return left

    def defer(self, deferred: bool) -> None:
        """While deferred, removals are not verified one by one; ``settle`` verifies them all."""
        self._deferred = deferred

    def _check(self, removal: Removal) -> None:
        for name, channels in removal.items():
            if len(channels) >= self.graph[name].size:
                raise PruneError(
                    f"all {self.graph[name].size} channels of {name!r} would be removed; leave at "
                    "least one (check_pruning_group tells beforehand)"
                )

    def _plan(self, removal: Removal) -> Plan:
        return Plan(
            {
                name: tuple(
                    int(c) for c in np.setdiff1d(np.arange(self.graph[name].size), channels)
                )
                for name, channels in removal.items()
                if len(channels)
            }
        )

    def settle(self) -> None:
        """Verify that the model still runs; replace its forward where its code cannot.

        Raises:
            PruneError: it does not run either way; the model is put back as it was before the
                removals that were not verified yet.
        """
        backup, before, traced = self._backup, self._before, self._traced
        if backup is None or before is None:
            return
        self._backup = self._before = None
        if self._runs():
            return
        try:
            self._rewrite(backup, before)
        except (PruneError, TraceError) as error:
            backup.restore()
            self.graph, self.alive, self._traced = before, self._alive_before, traced
            raise PruneError(
                f"{type(self.model).__name__} cannot be pruned in place: {error} The model was "
                "put back as it was; prune2deploy.prune gives a pruned copy where that is "
                "possible"
            ) from error

    def _widths(self) -> Widths:
        return Widths(self.graph, Plan({}))

    def _runs(self) -> bool:
        recording = self.graph.recording
        if is_rewritten(self.model) or spelt(recording, self._widths()):
            return False
        return runs_with_its_code(self.model, recording, self._widths(), recording.example)

    def _rewrite(self, backup: _Backup, before: Graph) -> None:
        if self.forward_fn is not None:
            raise PruneError(
                "its code holds widths as constants and forward_fn calls it indirectly"
            )
        if not self._wide:
            now = _Backup.of(self.model)
            backup.restore()
            wide = with_batch(self.model, before)
            now.restore()
            alike = kept_alike(before.recording, wide.recording, self._widths())
            if wide is not before and alike:
                self.graph = replace(self.graph, recording=wide.recording, _by_name={})
                self.alive = {
                    name: np.flatnonzero(np.isin(self._alive_before[name], channels))
                    for name, channels in self.alive.items()
                }
                self._traced = wide
            self._wide = True
        if not is_rewritten(self.model):
            warnings.warn(
                f"the code of {type(self.model).__name__} holds widths as constants, or scales by "
                "them: its forward was replaced by the operators that were recorded, in the "
                "pruned widths. "
                "prune2deploy.prune gives the same as a module of its own",
                UserWarning,
                stacklevel=4,
            )
        rewrite(self.model, self.graph)
        check_outputs(
            self.model, self.graph.recording, self._widths(), self.graph.recording.example
        )


class _Spread(Mapping[str, torch.Tensor]):
    """Stored tensors in the shapes of the trace, zero where nothing is left."""

    def __init__(self, model: nn.Module, traced: Graph, places: Kept) -> None:
        self._model, self._places = model, places
        self._shapes = traced.shapes({})

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = _stored(self._model, name).detach()
        for dim, held in enumerate(self._places[name]):
            if held is not None:
                size = self._shapes[name][dim]
                wide = tensor.new_zeros(*tensor.shape[:dim], size, *tensor.shape[dim + 1 :])
                index = torch.as_tensor(held, device=tensor.device)
                tensor = wide.index_copy_(dim, index, tensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _left_of(traced: Graph, alive: Mapping[str, Channels]) -> Plan:
    return Plan(
        {
            name: tuple(map(int, channels))
            for name, channels in alive.items()
            if len(channels) < traced[name].size
        }
    )


def _stored(model: nn.Module, name: str) -> Any:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    return owner._parameters[leaf] if leaf in owner._parameters else owner._buffers[leaf]


def _renumber(alive: Channels, upto: int) -> Channels:
    """Channel of the trace → channel now, -1 where it is gone."""
    number = np.full(max(upto, int(alive.max(initial=-1)) + 1), -1)
    number[alive] = np.arange(len(alive))
    return number


def shrink(graph: Graph, plan: Plan) -> Graph:
    """The graph of the model that ``plan`` leaves: fewer positions, channels renumbered."""
    kept = kept_positions(graph, plan)
    number = {
        name: np.append(_renumber(np.asarray(channels), graph[name].size), -1)
        for name, channels in plan.kept.items()
    }

    def member(axis: Axis, old: Member) -> Member:
        channel = old.channel
        if axis.name in number:
            channel = number[axis.name][channel]
        places = kept[old.tensor][old.dim]
        return old if places is None else replace(old, channel=channel[places])

    axes = tuple(
        replace(
            axis,
            size=len(plan.kept.get(axis.name, ())) or axis.size,
            members=tuple(member(axis, old) for old in axis.members),
        )
        for axis in graph.axes
    )
    return replace(graph, axes=axes, _by_name={})
