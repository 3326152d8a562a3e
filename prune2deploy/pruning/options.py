"""The settings of a pruner, under the names that users of Torch-Pruning know."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import nn

from prune2deploy.errors import ConfigError
from prune2deploy.pruning.layers import BasePruningFunc

Ratios = Mapping[Any, float]
Scheduler = Callable[[float, int], Sequence[float]]


def linear_scheduler(pruning_ratio: float, steps: int) -> list[float]:
    """Ratios after 0, 1, … ``steps`` equal steps."""
    return [pruning_ratio * step / steps for step in range(steps + 1)]


@dataclass(frozen=True)
class Options:
    """How a pruner chooses channels.

    Attributes:
        global_pruning: Rank all groups together instead of each by itself.
        pruning_ratio: Fraction of channels to remove, of those there were at first.
        pruning_ratio_dict: Ratios of modules (with all inside) or tuples of modules; with
            ``global_pruning`` the modules of a tuple are ranked together.
        max_pruning_ratio: No group loses a larger fraction than this.
        iterative_steps: Steps in which the ratio is reached.
        iterative_pruning_ratio_scheduler: ``(ratio, steps) -> ratio after 0, 1, … steps``.
        ignored_layers: Modules (with all inside) and layer types whose outputs stay, and
            parameters that stay.
        round_to: Widths become multiples of this, rounded to the nearest; a layer narrower than
            it stays whole.
        isomorphic: Rank groups of the same build together (Fang et al., ECCV 2024).
        in_channel_groups: Layers whose inputs form so many groups that lose equally many.
        out_channel_groups: The same for outputs.
        num_heads: Attention heads per layer; not needed, since heads are found.
        prune_num_heads: Whether whole heads (and whole groups of convolutions) may go.
        prune_head_dims: Whether the width of heads may shrink.
        head_pruning_ratio: Fraction of heads to remove.
        head_pruning_ratio_dict: The same per module.
        customized_pruners: Layer type or instance to the functions that prune it.
        unwrapped_parameters: Not needed: bare parameters are found with their dimensions.
        root_module_types: Only groups that begin with one of these; ``None`` for convolutions
            and linear layers.
        forward_fn: ``forward_fn(model, example_inputs)`` where calling the model takes more.
        output_transform: Finds the tensors in outputs of unusual type.
        channel_groups: Former name of ``out_channel_groups``.
        ch_sparsity: Former name of ``pruning_ratio``.
        ch_sparsity_dict: Former name of ``pruning_ratio_dict``.
    """

    global_pruning: bool = False
    pruning_ratio: float = 0.5
    pruning_ratio_dict: Ratios | None = None
    max_pruning_ratio: float = 1.0
    iterative_steps: int = 1
    iterative_pruning_ratio_scheduler: Scheduler = linear_scheduler
    ignored_layers: Sequence[Any] | None = None
    round_to: int | None = None
    isomorphic: bool = False
    in_channel_groups: Mapping[Any, int] = field(default_factory=dict)
    out_channel_groups: Mapping[Any, int] = field(default_factory=dict)
    num_heads: Mapping[Any, int] = field(default_factory=dict)
    prune_num_heads: bool = False
    prune_head_dims: bool = True
    head_pruning_ratio: float = 0.0
    head_pruning_ratio_dict: Ratios | None = None
    customized_pruners: Mapping[Any, BasePruningFunc] | None = None
    unwrapped_parameters: Any = None
    root_module_types: Sequence[type[Any]] | None = None
    forward_fn: Callable[..., Any] | None = None
    output_transform: Callable[..., Any] | None = None
    channel_groups: Mapping[Any, int] | None = None
    ch_sparsity: float | None = None
    ch_sparsity_dict: Ratios | None = None

    def checked(self) -> Options:
        """These options with former names resolved.

        Raises:
            ConfigError: a ratio lies outside 0..1, or a count below one.
        """
        options = self
        for old, new in (
            ("ch_sparsity", "pruning_ratio"),
            ("ch_sparsity_dict", "pruning_ratio_dict"),
            ("channel_groups", "out_channel_groups"),
        ):
            if getattr(self, old) is not None:
                warnings.warn(f"{old} is now called {new}", DeprecationWarning, stacklevel=4)
                options = replace(options, **{new: getattr(self, old), old: None})
        single = ("pruning_ratio", "max_pruning_ratio", "head_pruning_ratio")
        ratios = [(name, getattr(options, name)) for name in single]
        for name in ("pruning_ratio_dict", "head_pruning_ratio_dict"):
            given = getattr(options, name) or {}
            ratios += [(f"{name} of {_name(key)}", ratio) for key, ratio in given.items()]
        for name, ratio in ratios:
            if not 0.0 <= ratio <= 1.0:
                raise ConfigError(
                    f"{name} is {ratio}; expected a fraction to remove, between 0 and 1"
                )
        if options.iterative_steps < 1 or (options.round_to or 1) < 1:
            raise ConfigError("iterative_steps and round_to must be 1 or more")
        return options


CHANGEABLE = frozenset(
    ("global_pruning", "max_pruning_ratio", "round_to", "isomorphic", "in_channel_groups",
     "out_channel_groups", "prune_num_heads", "prune_head_dims")
)  # fmt: skip
"""Options that are read anew in every step."""


class Configured:
    """Something whose options are attributes of its own too; ``CHANGEABLE`` ones may be set."""

    options: Options

    def __getattr__(self, name: str) -> Any:
        if name in NAMES and "options" in vars(self):
            return getattr(self.options, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in CHANGEABLE:
            object.__setattr__(self, "options", replace(self.options, **{name: value}).checked())
        elif name in NAMES and not hasattr(type(self), name):
            raise AttributeError(
                f"{name} is read when a pruner is made: make another one for other values; only "
                f"{', '.join(sorted(CHANGEABLE))} may be set later"
            )
        else:
            object.__setattr__(self, name, value)


NAMES = frozenset(entry.name for entry in fields(Options))


def _name(key: Any) -> str:
    return type(key).__name__ if isinstance(key, nn.Module) else "modules"
