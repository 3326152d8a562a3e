"""A plan: which channels every axis keeps, and which blocks go whole."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from prune2deploy.errors import PlanError
from prune2deploy.graph.axes import Graph

SCHEMA = 1  # 1: kept channel numbers per axis name; removed block names, optional


@dataclass(frozen=True)
class Plan:
    """Kept channels of every axis that loses some; an axis that is absent keeps all.

    Attributes:
        kept: Axis name to its sorted kept channel numbers.
        removed: Names of removable blocks (``Graph.blocks``) that are taken out.
    """

    kept: Mapping[str, tuple[int, ...]]
    removed: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Number of kept channels per axis name."""
        return {name: len(channels) for name, channels in self.kept.items()}

    def wider(self, other: Plan) -> bool:
        """Whether this plan keeps all that ``other`` keeps, by number, and more."""
        mine, theirs = self.counts, other.counts
        blocks, others = set(self.removed), set(other.removed)
        as_wide = all(count >= theirs.get(axis, math.inf) for axis, count in mine.items())
        return blocks <= others and as_wide and (mine != theirs or blocks != others)

    def check(self, graph: Graph) -> None:
        """Raise PlanError, naming the axis, unless the plan fits ``graph``."""
        axes = {axis.name: axis for axis in graph.axes}
        for name, channels in self.kept.items():
            if name not in axes:
                raise PlanError(f"the plan keeps channels of {name!r}, an axis the model lacks")
            axis = axes[name]
            if axis.frozen is not None and len(channels) != axis.size:
                raise PlanError(f"axis {name!r} cannot be pruned: {axis.frozen}")
            if not channels:
                raise PlanError(f"the plan removes all {axis.size} channels of axis {name!r}")
            if list(channels) != sorted(set(channels)) or not (
                channels[0] >= 0 and channels[-1] < axis.size
            ):
                raise PlanError(
                    f"kept channels of {name!r} must be distinct, sorted and in "
                    f"0..{axis.size - 1}, found {channels[:8]}..."
                )
        blocks = {block.name for block in graph.blocks}
        unknown = [name for name in self.removed if name not in blocks]
        if unknown:
            raise PlanError(
                f"{unknown[0]!r} is not a removable block; these are: {sorted(blocks) or 'none'}"
            )
        sizes = graph.sizes(self.counts)
        for tie in graph.ties:
            if len({sizes[name] for name in tie}) > 1:
                raise PlanError(
                    "these axes must keep equally many channels: "
                    + ", ".join(f"{name} keeps {sizes[name]}" for name in tie)
                )

    def to_json(self) -> str:
        """Write the plan as JSON text."""
        kept = {name: list(channels) for name, channels in self.kept.items()}
        return json.dumps({"schema": SCHEMA, "kept": kept, "removed": list(self.removed)})

    @staticmethod
    def from_json(text: str | bytes) -> Plan:
        """Read what ``to_json`` wrote; raises PlanError on anything else."""
        try:
            data = json.loads(text)
            if data["schema"] != SCHEMA:
                raise PlanError(f"plan schema {data['schema']!r} found, {SCHEMA} expected")
            kept = {str(k): tuple(int(i) for i in v) for k, v in data["kept"].items()}
            removed = tuple(str(name) for name in data.get("removed", ()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"not a plan: {error!r}; expected what plan.json holds") from error
        return Plan(kept, removed)
