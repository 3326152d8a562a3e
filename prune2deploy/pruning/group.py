"""Groups: layers that lose channels together, as users of dependency graphs know them.

A group is a view of one axis (or of several that must keep equally many channels): one item per
layer, ``(dependency, positions)``, the first of which is the root that the caller asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import nn

from prune2deploy.errors import PruneError
from prune2deploy.pruning.decode import Channels

PruningFn = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Node:
    """A layer or bare parameter in the graph.

    Attributes:
        module: The module, or the parameter.
        path: Its path in the model.
        pruning_dim: The dimension that a parameter loses positions in; 0 or 1 for layers.
    """

    module: Any
    path: str
    pruning_dim: int = 1

    @property
    def name(self) -> str:
        """Path and layer, as the model prints it."""
        if isinstance(self.module, nn.Parameter):
            return f"{self.path} (Parameter{tuple(self.module.shape)})"
        return f"{self.path} ({self.module})"


@dataclass(frozen=True, eq=False)
class Dependency:
    """Pruning ``source`` with ``trigger`` makes ``handler`` prune ``target``."""

    trigger: PruningFn
    handler: PruningFn
    source: Node
    target: Node

    @property
    def layer(self) -> Any:
        """The module that is pruned."""
        return self.target.module

    @property
    def pruning_fn(self) -> PruningFn:
        """The function that prunes it."""
        return self.handler

    def is_triggered_by(self, pruning_fn: PruningFn) -> bool:
        """Whether this function sets the dependency off."""
        return bool(pruning_fn == self.trigger)

    def __str__(self) -> str:
        return (
            f"{_verb(self.trigger)} on {self.source.name} => "
            f"{_verb(self.handler)} on {self.target.name}"
        )


def _verb(function: PruningFn) -> str:
    return str(getattr(function, "__name__", function))


class _Pair(NamedTuple):
    dep: Dependency
    idxs: list[int]


class Item(_Pair):
    """``(dep, idxs)`` of a group.

    Attributes:
        root_idxs: Per position, which of the root's listed positions it goes with.
        tensors: Names and dimensions of the stored tensors of the layer that are cut.
    """

    root_idxs: list[int]
    tensors: tuple[tuple[str, int], ...]

    @staticmethod
    def make(
        dep: Dependency, idxs: list[int], root_idxs: list[int], tensors: tuple[tuple[str, int], ...]
    ) -> Item:
        """An item with its attributes."""
        item = Item(dep, idxs)
        item.root_idxs, item.tensors = root_idxs, tensors
        return item


@dataclass(frozen=True)
class Origin:
    """Where a group was made, to tell whether it still holds.

    Attributes:
        removal: Channels to remove per axis.
        sizes: Size of each axis then.
        root_axis: The axis that positions of the root are read as, if it is one axis.
        root_channel: Per position of the whole root dimension, its channel of that axis or -1.
        is_out: Whether the root loses output channels.
    """

    removal: Mapping[str, Channels]
    sizes: Mapping[str, int]
    root_axis: str | None
    root_channel: Channels = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    is_out: bool = True


class Maker(Protocol):
    """What a group asks of the dependency graph that made it."""

    @property
    def model(self) -> nn.Module:
        """The model that is pruned."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Its modules by path."""

    def size(self, axis: str) -> int:
        """Channels that an axis has now."""

    def regrouped(self, group: Group, idxs: Sequence[int]) -> Group:
        """A group of the same root for other positions of it."""

    def remove(self, group: Group) -> None:
        """Take the group's channels from the model."""

    def note(self, group: Group) -> None:
        """Remember that it was pruned."""


class Group:
    """Layers that lose channels together.

    Iterate over it for ``(dep, idxs)``; ``group[0]`` is the root. ``prune()`` removes the
    channels from the model in place.
    """

    def __init__(self, graph: Maker, origin: Origin, items: Sequence[Item]) -> None:
        self._DG = graph
        self.origin = origin
        self._items = list(items)

    @property
    def items(self) -> list[Item]:
        """All items, the root first."""
        return self._items

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes that lose channels."""
        return tuple(self.origin.removal)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, place: int) -> Item:
        return self._items[place]

    def __call__(self) -> None:
        """The same as ``prune()``."""
        self.prune()

    def exec(self) -> None:
        """The same as ``prune()``."""
        self.prune()

    def has_dep(self, dep: Dependency) -> bool:
        """Whether an item prunes the same target with the same function."""
        return any(
            item.dep.target.module is dep.target.module and item.dep.handler == dep.handler
            for item in self
        )

    def prune(self, idxs: Sequence[int] | None = None, record_history: bool = True) -> None:
        """Remove the group's channels, or those at other positions of the root.

        Args:
            idxs: Positions of the root's whole dimension instead of the group's own. Where that
                dimension is a product (heads by head width), a position stands for its channel
                of the axis that this group is about.
            record_history: Whether ``pruning_history`` shall hold it.

        Raises:
            PruneError: the channels have been pruned since the group was made, an index is out of
                range, or nothing would be left.
        """
        chosen = self if idxs is None else self._DG.regrouped(self, idxs)
        self.check_fresh()
        self._DG.remove(chosen)
        if record_history:
            self._DG.note(chosen)

    def check_fresh(self) -> None:
        """Whether its positions still hold.

        Raises:
            PruneError: channels of its axes have gone since it was made.
        """
        for name, size in self.origin.sizes.items():
            now = self._DG.size(name)
            if now != size:
                raise PruneError(
                    f"axis {name!r} has {now} channels, {size} when this group was made: get the "
                    "group again after pruning"
                )

    def __str__(self) -> str:
        return self._text(lambda item: f", len(idxs)={len(item.idxs)}")

    def details(self) -> str:
        """All items with their positions, as text."""
        return self._text(lambda item: f", idxs ({len(item.idxs)}) ={item.idxs}")

    def _text(self, ending: Callable[[Item], str]) -> str:
        rule = "-" * 32
        lines = [
            f"[{n}] {item.dep}{ending(item)}{'  (Pruning Root)' if n == 0 else ''}"
            for n, item in enumerate(self)
        ]
        return "\n".join(["", rule, "Pruning Group".center(32), rule, *lines, rule, ""])
