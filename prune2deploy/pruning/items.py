"""The items of a group: one per layer and side, with positions and where they come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from torch import nn

from prune2deploy.errors import PruneError
from prune2deploy.graph.axes import Member
from prune2deploy.pruning import function
from prune2deploy.pruning.decode import Channels, Cover, merged, to_positions
from prune2deploy.pruning.group import Dependency, Group, Item, Node, PruningFn
from prune2deploy.pruning.layers import BasePruningFunc
from prune2deploy.pruning.live import Live
from prune2deploy.pruning.table import customized_pruner, pruner_of


@dataclass(frozen=True, eq=False)
class Root:
    """Where a group begins: a layer, the side of it, and the axes there."""

    node: Node
    handler: PruningFn
    is_out: bool
    cover: Cover


class _Draft:
    """Positions of one layer and side, collected axis by axis."""

    def __init__(self, node: Node, handler: PruningFn) -> None:
        self.node = node
        self.handler = handler
        self.tensors: list[tuple[str, int]] = []
        self.idxs: list[int] = []
        self.root_idxs: list[int] = []

    def add(self, tensor: str, dim: int, idxs: Channels, root_idxs: Channels) -> None:
        if (tensor, dim) not in self.tensors:
            self.tensors.append((tensor, dim))
        if self.tensors[0] != (tensor, dim):
            return
        if not self.idxs:
            self.idxs, self.root_idxs = idxs.tolist(), root_idxs.tolist()
        else:
            known = set(self.idxs)
            for idx, root in zip(idxs.tolist(), root_idxs.tolist(), strict=True):
                if idx not in known:
                    self.idxs.append(idx)
                    self.root_idxs.append(root)

    def item(self, root: Root) -> Item:
        dep = Dependency(root.handler, self.handler, root.node, self.node)
        return Item.make(dep, self.idxs, self.root_idxs, tuple(self.tensors))


class Builder:
    """Makes nodes and items for the model as it is now."""

    def __init__(self, live: Live, customized: Mapping[Any, BasePruningFunc]) -> None:
        self.live = live
        self.customized = customized
        self._owners: dict[str, nn.Module] = {}

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Module by path, shared ones under each of their paths."""
        return dict(self.live.model.named_modules(remove_duplicate=False))

    @cached_property
    def at(self) -> dict[tuple[str, int], list[tuple[str, Channels]]]:
        """The axes of every stored dimension."""
        found: dict[tuple[str, int], list[tuple[str, Channels]]] = {}
        for axis in self.live.graph.axes:
            for member in axis.members:
                place = (member.tensor, member.dim)
                found.setdefault(place, []).append((axis.name, member.channel))
        return {place: merged(cover) for place, cover in found.items()}

    def owner(self, tensor: str) -> nn.Module:
        """The layer of a stored tensor: the outermost with a pruner of its own, or its owner."""
        if tensor not in self._owners:
            self._owners[tensor] = self._find_owner(tensor)
        return self._owners[tensor]

    def _find_owner(self, tensor: str) -> nn.Module:
        path = tensor.rpartition(".")[0]
        parts = path.split(".") if path else []
        for depth in range(len(parts) + 1):
            module = self.modules[".".join(parts[:depth])]
            if customized_pruner(module, self.customized) is not None:
                return module
        return self.modules[path.partition(".parametrizations")[0]]

    @cached_property
    def _paths(self) -> dict[int, str]:
        return {id(module): path for path, module in reversed(self.modules.items())}

    def path(self, module: nn.Module) -> str:
        """The path of a module.

        Raises:
            PruneError: it is no part of the model.
        """
        path = self._paths.get(id(module))
        if path is None:
            raise PruneError(
                f"{type(module).__name__} is no part of the traced model; pass one of its modules"
            )
        return path

    def node(self, module: Any) -> Node:
        """The node of a module or parameter."""
        if not isinstance(module, nn.Parameter):
            return Node(module, self.path(module))
        for name, parameter in self.live.model.named_parameters(remove_duplicate=False):
            if parameter is module:
                return Node(module, name, -1)
        raise PruneError(f"a parameter of shape {tuple(module.shape)} is no part of the model")

    def find(self, path: str) -> Any:
        """The module or parameter at a path."""
        if path in self.modules:
            return self.modules[path]
        return self.live.model.get_parameter(path)

    def items(self, root: Root, removal: Mapping[str, Channels]) -> list[Item]:
        """Every layer that loses channels, the root first."""
        cover = [(name, channel) for name, channel in root.cover if name in removal]
        places = [to_positions(removal[name], channel) for name, channel in cover]
        listed = np.concatenate(places) if places else np.zeros(0, dtype=np.int64)
        first = _Draft(root.node, root.handler)
        first.idxs = list(dict.fromkeys(listed.tolist()))
        order = {place: n for n, place in enumerate(first.idxs)}
        first.root_idxs = list(range(len(first.idxs)))
        drafts: dict[Any, _Draft] = {(id(root.node.module), root.is_out): first}
        guide = {name: (channel, order) for name, channel in cover}
        for name, gone in removal.items():
            channel, ranks = guide.get(name) or (None, {})
            lookup = _Lookup(gone, channel, ranks, len(first.idxs))
            for member in self.live.graph[name].members:
                self._draft(drafts, member, gone, lookup, root)
        return [draft.item(root) for draft in drafts.values()]

    def _draft(
        self, drafts: dict[Any, _Draft], member: Member, gone: Channels, lookup: _Lookup, root: Root
    ) -> None:
        idxs = to_positions(gone, member.channel)
        if not len(idxs):
            return
        node, handler, out = self._target(member)
        draft = drafts.get((id(node.module), out))
        if draft is None:
            draft = drafts[id(node.module), out] = _Draft(node, handler)
        if node.module is root.node.module and out == root.is_out:
            draft.tensors.append((member.tensor, member.dim))
            return
        draft.add(member.tensor, member.dim, idxs, lookup(member.channel[idxs]))

    def _target(self, member: Member) -> tuple[Node, PruningFn, bool]:
        out = member.role != "in"
        owner = self.owner(member.tensor)
        pruner = pruner_of(owner, self.customized)
        leaf = member.tensor.rpartition(".")[2]
        if pruner is not None:
            handler = pruner.prune_out_channels if out else pruner.prune_in_channels
            return Node(owner, self.path(owner)), handler, out
        table: Any = owner._parameters if leaf in owner._parameters else owner._buffers
        tensor = table[leaf]
        return Node(tensor, member.tensor, member.dim), function.prune_parameter_out_channels, out

    def customized_calls(self, group: Group) -> dict[str, Callable[[], Any]]:
        """Calls of the user's own pruning functions, by path of the layer."""
        calls: dict[str, Callable[[], Any]] = {}
        for dep, _ in group:
            module = dep.target.module
            pruner = customized_pruner(module, self.customized)
            if pruner is not None and isinstance(module, nn.Module):
                calls[dep.target.path] = self._call(pruner, dep, group)
        return calls

    def _call(self, pruner: BasePruningFunc, dep: Dependency, group: Group) -> Callable[[], Any]:
        module, path = dep.target.module, dep.target.path
        for out, prune in ((True, pruner.prune_out_channels), (False, pruner.prune_in_channels)):
            idxs = self._through(path, group.origin.removal, out=out)
            if idxs:
                return partial(prune, module, idxs)
        raise PruneError(
            f"{path}: the channels that its own pruner has to remove are in neither its input "
            "nor its output"
        )

    def _through(self, path: str, removal: Mapping[str, Channels], *, out: bool) -> list[int]:
        """Positions of a module's output or input that go."""
        recording = self.live.graph.recording
        gone: set[int] = set()
        for call in recording.calls:
            numbers: Sequence[int] = call.outputs if out else call.inputs
            if call.name == path and numbers:
                for node in recording.values[numbers[0]].dims:
                    for name, channel in self.live.positions(node):
                        if name in removal:
                            gone.update(to_positions(removal[name], channel).tolist())
        return sorted(gone)


class _Lookup:
    """Channel of an axis → where the root lists it."""

    def __init__(
        self, gone: Channels, channel: Channels | None, order: Mapping[int, int], count: int
    ) -> None:
        self._places: dict[int, list[int]] = {}
        self._single: Channels | None = None
        if channel is None:  # an axis that the root lacks: paired by order
            owners, numbers = gone, np.minimum(np.arange(len(gone)), max(count - 1, 0))
        else:
            places = to_positions(gone, channel)
            owners = channel[places]
            numbers = np.array([order[place] for place in places.tolist()], dtype=np.int64)
        if len(np.unique(owners)) == len(owners):
            self._single = np.zeros(int(gone.max(initial=-1)) + 1, dtype=np.int64)
            self._single[owners] = numbers
            return
        for owner, number in zip(owners.tolist(), numbers.tolist(), strict=True):
            self._places.setdefault(owner, []).append(number)

    def __call__(self, channels: Channels) -> Channels:
        """The root's listing for each channel; repeated ones go through theirs in turn."""
        if self._single is not None:
            return self._single[channels]
        seen: dict[int, int] = {}
        found = []
        for channel in channels.tolist():
            places = self._places[channel]
            number = seen.get(channel, 0)
            seen[channel] = number + 1
            found.append(places[number % len(places)])
        return np.asarray(found, dtype=np.int64)
