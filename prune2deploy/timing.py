"""What a profile says of one operator of an engine; shared by runtimes and the latency model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class OperatorTiming:
    """Time of one (fused) operator of a built engine.

    Attributes:
        name: The runtime's name for it, stable between builds of the same architecture.
        kind: Operator type as the runtime calls it (``Conv``, ``Gemm``, ``FusedConv`` ...).
        input_shapes: Logical shapes of its inputs, weights included where the runtime tells.
        output_shapes: Logical shapes of its outputs.
        ns: The *minimum* over the profiled runs, in nanoseconds: contention only ever adds.
    """

    name: str
    kind: str
    input_shapes: tuple[Shape, ...]
    output_shapes: tuple[Shape, ...]
    ns: float

    @staticmethod
    def from_dict(plain: Mapping[str, Any]) -> OperatorTiming:
        """The one that ``dataclasses.asdict`` made plain, and JSON may have held."""
        read, made = (tuple(map(tuple, plain[key])) for key in ("input_shapes", "output_shapes"))
        return OperatorTiming(plain["name"], plain["kind"], read, made, plain["ns"])

    @property
    def ranks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """How many dimensions each input and each output has."""
        return tuple(map(len, self.input_shapes)), tuple(map(len, self.output_shapes))
