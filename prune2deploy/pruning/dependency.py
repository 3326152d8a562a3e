"""The dependency graph under the names that users of Torch-Pruning know, over axes.

``DependencyGraph().build_dependency(model, example_inputs)`` traces once; groups are views of its
axes, and pruning one changes the caller's model in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from prune2deploy.errors import PruneError
from prune2deploy.graph.axes import Axis, Graph
from prune2deploy.pruning import function
from prune2deploy.pruning.decode import Channels, Cover, to_channels
from prune2deploy.pruning.given import forward_of, members_of, owner_of
from prune2deploy.pruning.group import Dependency, Group, Origin, PruningFn
from prune2deploy.pruning.items import Builder, Root
from prune2deploy.pruning.layers import BasePruningFunc
from prune2deploy.pruning.live import Live
from prune2deploy.pruning.table import channel_dim, place, pruner_of

ROOTS: tuple[type[Any], ...] = (nn.modules.conv._ConvNd, nn.Linear)
EXPLICIT = frozenset({"model output"})
"""Reasons of freezing that a caller may overrule by naming the layer and the channels."""

History = list[Any]


@dataclass(frozen=True)
class Settings:
    """What ``build_dependency`` may be told besides how to run the model.

    Attributes:
        customized_pruners: Layer type or instance to the functions that prune it.
        ignored_layers: Layers, or types of layers, whose output channels stay.
        ignored_params: Parameters that stay as they are.
        verbose: Not needed.
    """

    customized_pruners: Mapping[Any, BasePruningFunc] | None = None
    ignored_layers: Sequence[nn.Module] | None = None
    ignored_params: Sequence[nn.Parameter] | None = None
    verbose: bool = True


class DependencyGraph:
    """Which layers of a model lose channels together."""

    live: Live

    def __init__(self) -> None:
        self.customized: dict[Any, BasePruningFunc] = {}
        self._history: History = []
        self._ignored: list[Any] = []
        self._open = 0
        self._kept: tuple[Graph, Builder] | None = None

    def build_dependency(
        self,
        model: nn.Module,
        example_inputs: Any,
        forward_fn: Callable[..., Any] | None = None,
        output_transform: Callable[..., Any] | None = None,
        unwrapped_parameters: Any = None,
        **settings: Any,
    ) -> DependencyGraph:
        """Trace a model.

        Args:
            model: Any module; it is pruned in place later.
            example_inputs: One tensor, a tuple of arguments, or a dict of keywords.
            forward_fn: ``forward_fn(model, example_inputs)`` where calling the model takes more.
            output_transform: Finds the tensors in outputs that are neither tensors nor lists,
                tuples or mappings of them.
            unwrapped_parameters: Not needed: bare parameters are found with their dimensions.
            settings: Those of ``Settings``, by name.

        Returns:
            This graph.

        Raises:
            TraceError: the forward pass fails or has nothing to prune.
        """
        given = Settings(**settings)
        for layer, pruner in (given.customized_pruners or {}).items():
            self.register_customized_layer(layer, pruner)
        self._ignored = [*(given.ignored_layers or ()), *(given.ignored_params or ())]
        self.live = Live(model, example_inputs, forward_of(forward_fn, output_transform))
        return self

    @property
    def model(self) -> nn.Module:
        """The model that is pruned."""
        return self.live.model

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Its modules by path, shared ones under each of their paths."""
        return self._builder().modules

    def size(self, axis: str) -> int:
        """Channels that an axis has now."""
        return self.live.graph[axis].size

    def register_customized_layer(
        self, layer_type_or_instance: Any, layer_pruner: BasePruningFunc
    ) -> None:
        """Let ``layer_pruner`` prune all layers of a type, or one layer."""
        self.customized[layer_type_or_instance] = layer_pruner
        self._kept = None

    def get_pruner_of_module(self, module: Any) -> BasePruningFunc | None:
        """The functions that prune a layer."""
        return pruner_of(module, self.customized)

    def is_out_channel_pruning_fn(self, fn: PruningFn) -> bool:
        """Whether a function removes output channels."""
        return fn == owner_of(fn).prune_out_channels

    def is_in_channel_pruning_fn(self, fn: PruningFn) -> bool:
        """Whether a function removes input channels."""
        return fn == owner_of(fn).prune_in_channels

    def get_out_channels(self, module: Any) -> int | None:
        """Output channels of a layer; ``None`` where it has none of its own."""
        pruner = self.get_pruner_of_module(module)
        return None if pruner is None else pruner.get_out_channels(module)

    def get_in_channels(self, module: Any) -> int | None:
        """Input channels of a layer; ``None`` where it has none of its own."""
        pruner = self.get_pruner_of_module(module)
        return None if pruner is None else pruner.get_in_channels(module)

    def get_pruning_group(
        self, module: Any, pruning_fn: PruningFn, idxs: int | Iterable[int] | torch.Tensor
    ) -> Group:
        """The group of layers that must lose channels when ``module`` does.

        Args:
            module: A layer or bare parameter of the model.
            pruning_fn: Which side of it, such as ``prune_conv_out_channels``.
            idxs: Positions to remove there.

        Raises:
            PruneError: the forward pass does not use the layer, an index is out of range, or the
                channels have to stay; says why.
        """
        if not self._open:
            self.live.follow()
        root = self._root(module, pruning_fn)
        wanted = [idxs] if isinstance(idxs, int) else [int(i) for i in idxs]
        graph = self.live.graph
        reasons = {
            name: None if graph[name].frozen in EXPLICIT else graph[name].frozen
            for name, _ in root.cover
        }
        return self._group(root, self._with_ties(to_channels(wanted, root.cover, reasons)))

    def check_pruning_group(self, group: Group) -> bool:
        """Whether every layer of the group keeps at least one channel."""
        graph = self.live.graph
        return all(len(gone) < graph[name].size for name, gone in group.origin.removal.items())

    def get_all_groups(
        self,
        ignored_layers: Sequence[Any] = (),
        root_module_types: Sequence[type[Any]] = ROOTS,
    ) -> Iterator[Group]:
        """Every prunable group with all its channels, one after the other.

        Groups may be pruned while iterating; that the model still runs is verified at the end.

        Args:
            ignored_layers: Modules (with all inside), layer types and parameters whose groups are
                left out.
            root_module_types: Only groups that one of these layers begins.
        """
        if not self._open:
            self.live.follow()
        ignored = members_of([*ignored_layers, *self._ignored], self.model)
        with self.deferred():
            for unit in self.units():
                root = self._first_root(unit, tuple(root_module_types))
                if root is None:
                    continue
                group = self._group(root, self.everything(unit))
                if not self.touches(group, ignored):
                    yield group

    def touches(self, group: Group, layers: set[int]) -> bool:
        """Whether a group takes output channels from one of some layers (given by identity)."""
        return any(
            self.identities(dep) & layers and not self._only_in(dep.handler) for dep, _ in group
        )

    def identities(self, dep: Dependency) -> set[int]:
        """Of a target, and of the module that holds it where it is a bare parameter."""
        holder = self._builder().modules.get(dep.target.path.rpartition(".")[0])
        bare = isinstance(dep.target.module, torch.Tensor)
        return {id(dep.target.module), id(holder)} if bare else {id(dep.target.module)}

    def _only_in(self, fn: PruningFn) -> bool:
        return self.is_in_channel_pruning_fn(fn) and not self.is_out_channel_pruning_fn(fn)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Verify once, when the outermost block ends, that the pruned model runs."""
        self._open += 1
        self.live.defer(True)
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self.live.defer(False)
                self.live.settle()

    def units(self) -> list[tuple[Axis, ...]]:
        """Prunable axes, those that must keep equal counts together."""
        found: dict[object, list[Axis]] = {}
        for axis in self.live.graph.prunable:
            key: object = axis.name if axis.tie is None else axis.tie
            found.setdefault(key, []).append(axis)
        return [tuple(axes) for axes in found.values()]

    def everything(self, unit: Sequence[Axis]) -> dict[str, Channels]:
        """All channels of some axes."""
        return {a.name: np.arange(self.live.graph[a.name].size) for a in unit}

    def _with_ties(self, removal: dict[str, Channels]) -> dict[str, Channels]:
        """The same channel numbers go in axes that must keep equally many."""
        for tie in self.live.graph.ties:
            given = [removal[name] for name in tie if name in removal]
            if given:
                joint = np.unique(np.concatenate(given))
                removal.update(dict.fromkeys(tie, joint))
        return removal

    def _builder(self) -> Builder:
        """Makes nodes and items; kept until the graph changes."""
        if self._kept is None or self._kept[0] is not self.live.graph:
            self._kept = self.live.graph, Builder(self.live, self.customized)
        return self._kept[1]

    def _root(self, module: Any, pruning_fn: PruningFn) -> Root:
        out = self.is_out_channel_pruning_fn(pruning_fn)
        node = self._builder().node(module)
        handler = self._handler(module, pruning_fn, out=out)
        cover = self._cover(module, node.path, out=out)
        if not cover:
            raise PruneError(
                f"{node.path} has no {'output' if out else 'input'} channels that the forward pass "
                "uses, so nothing is coupled to them; example inputs that reach the layer show it"
            )
        return Root(node, handler, out, cover)

    def _handler(self, module: Any, pruning_fn: PruningFn, *, out: bool) -> PruningFn:
        pruner = self.get_pruner_of_module(module)
        if pruner is None or module in self.customized:
            return pruning_fn
        return pruner.prune_out_channels if out else pruner.prune_in_channels

    def _cover(self, module: Any, path: str, *, out: bool) -> Cover:
        """The axes of a layer's output or input channels."""
        members = self._builder().at
        if isinstance(module, nn.Parameter):
            dims = [members[path, dim] for dim in range(module.dim()) if (path, dim) in members]
            graph = self.live.graph
            free = [c for c in dims if any(graph[name].frozen is None for name, _ in c)]
            return (free or dims or [[]])[-1]
        spot = place(module, out=out)
        if spot is not None:
            tensor = f"{path}.{spot[0]}" if path else spot[0]
            rank = len(self.live.graph.tensors.get(tensor, ()))
            found = members.get((tensor, spot[1] % max(rank, 1)), [])
            if found:
                return found
        return self._from_call(module, path, out=out)

    def _from_call(self, module: Any, path: str, *, out: bool) -> Cover:
        recording = self.live.graph.recording
        for call in recording.calls:
            numbers = call.outputs if out else call.inputs
            if call.name == path and numbers:
                dims = recording.values[numbers[0]].dims
                if dims:
                    return self.live.positions(dims[channel_dim(module, len(dims))])
        return []

    def _first_root(self, unit: Sequence[Axis], types: tuple[type[Any], ...]) -> Root | None:
        """The first layer of the wanted types that makes the channels."""
        builder = self._builder()
        for role in ("out", "param"):
            for axis in unit:
                for member in axis.members:
                    owner = builder.owner(member.tensor)
                    if member.role != role or not isinstance(owner, types):
                        continue
                    node = builder.node(owner)
                    pruner = self.get_pruner_of_module(owner)
                    if pruner is not None:
                        cover = builder.at[member.tensor, member.dim]
                        return Root(node, pruner.prune_out_channels, True, cover)
        return None

    def _group(self, root: Root, removal: dict[str, Channels]) -> Group:
        graph = self.live.graph
        axes = [name for name, _ in root.cover if name in removal]
        channel = dict(root.cover)
        origin = Origin(
            removal,
            {name: graph[name].size for name in removal},
            axes[0] if axes else None,
            channel[axes[0]] if axes else np.zeros(0, dtype=np.int64),
            root.is_out,
        )
        return Group(self, origin, self._builder().items(root, removal))

    def regrouped(self, group: Group, idxs: Sequence[int]) -> Group:
        """A group of the same root for other positions of it."""
        group.check_fresh()
        dep = group[0].dep
        origin = group.origin
        root = self._root(dep.target.module, dep.handler)
        if origin.root_axis is None or any(not 0 <= i < len(origin.root_channel) for i in idxs):
            return self.get_pruning_group(dep.target.module, dep.handler, idxs)
        channels = origin.root_channel[list(idxs)]
        if (channels < 0).any():
            return self.get_pruning_group(dep.target.module, dep.handler, idxs)
        return self._group(root, self._with_ties({origin.root_axis: np.unique(channels)}))

    def remove(self, group: Group) -> None:
        """Take the group's channels from the model."""
        self.live.remove(group.origin.removal, self._builder().customized_calls(group))

    def prune_together(self, groups: Sequence[Group]) -> None:
        """Prune groups that were made of the same state of the model, in one go.

        Raises:
            PruneError: as ``Group.prune``.
        """
        if self.customized or len({n for g in groups for n in g.axes}) < sum(
            len(group.axes) for group in groups
        ):
            with self.deferred():
                for group in groups:
                    group.prune()
            return
        joint: dict[str, Channels] = {}
        for group in groups:
            group.check_fresh()
            joint.update(group.origin.removal)
        if joint:
            self.live.remove(joint)
        for group in groups:
            self.note(group)

    def note(self, group: Group) -> None:
        """Remember a step; by channels per axis where positions alone do not say which."""
        dep, idxs = group[0]
        origin = group.origin
        entry = [dep.target.path, origin.is_out, idxs]
        plain = len(origin.removal) == 1 and len(np.unique(origin.root_channel)) == len(
            origin.root_channel
        )
        exact = {name: gone.tolist() for name, gone in origin.removal.items()}
        self._history.append(
            entry if plain and (origin.root_channel >= 0).all() else [*entry, exact]
        )

    def pruning_history(self) -> History:
        """What was pruned so far: ``[path, whether outputs, positions]`` each.

        A fourth entry names the channels per axis where positions alone do not say them.
        """
        return self._history

    def load_pruning_history(self, pruning_history: History) -> None:
        """Prune a fresh model as another one was pruned."""
        with self.deferred():
            for path, is_out, idxs, *exact in pruning_history:
                module = self._builder().find(path)
                pruner = self.get_pruner_of_module(module) or function.PARAMETER
                handler = pruner.prune_out_channels if is_out else pruner.prune_in_channels
                root = self._root(module, handler)
                if exact:
                    gone = {name: np.asarray(c, dtype=np.int64) for name, c in exact[0].items()}
                    self._group(root, gone).prune()
                else:
                    self.get_pruning_group(module, handler, idxs).prune()
