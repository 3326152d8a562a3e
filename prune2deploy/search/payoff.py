"""Measures before the search, on the unpruned model, whether the lower precision is faster here.

In: a workshop whose target has a precision below fp32. Out: the workshop to continue with, and
:class:`Payoff`. CPUs without units for it compute fp16 or int8 *slower* than fp32. A precision
that came with the target profile is then given up for fp32; one that the user named is kept, and
the report tells what it costs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from prune2deploy import measure
from prune2deploy.measure import Comparison
from prune2deploy.search import candidate
from prune2deploy.search.candidate import Workshop


@dataclass(frozen=True)
class Payoff:
    """The unpruned model in two precisions, measured interleaved.

    Attributes:
        precision: The lower one.
        ratio: Its latency over that of fp32.
        ratio_ci95: 95 % interval of ``ratio``.
        p50_ms: Its measured median.
        fp32_p50_ms: The median in fp32.
        chosen: The precision that the run went on with.
        asked: Whether the user named the lower one.
    """

    precision: str
    ratio: float
    ratio_ci95: tuple[float, float]
    p50_ms: float
    fp32_p50_ms: float
    chosen: str
    asked: bool

    @property
    def slower(self) -> bool:
        """Whether the lower precision is slower, beyond doubt."""
        return self.ratio_ci95[0] > 1

    def text(self) -> str:
        """One line for the report."""
        low, high = self.ratio_ci95
        told = (
            f"{self.precision} takes {self.ratio:.3f} (95 % {low:.3f}-{high:.3f}) of fp32's "
            f"measured time on the unpruned model ({self.p50_ms:.4g} ms against "
            f"{self.fp32_p50_ms:.4g} ms)"
        )
        if not self.slower:
            return told
        if self.chosen == "fp32":
            return (
                f"{told}: it is SLOWER on this device, so the run went on in fp32; "
                f"add --precision {self.precision} to use it nevertheless"
            )
        return f"{told}: it is SLOWER on this device; run with --precision fp32 to be faster"


def settle(shop: Workshop, *, asked: bool) -> tuple[Workshop, Payoff | None]:
    """Measure whether the precision of ``shop`` pays, and give it up where it does not.

    Args:
        shop: With the precision that was asked for.
        asked: Whether the user named it, so that it stays in any case.

    Returns:
        The workshop to go on with; ``None`` where the precision is fp32 anyway.

    Raises:
        ParityError: The model in that precision gives other outputs.
        BackendError: A build failed.
        MeasureError: The measurement failed.
    """
    wanted = shop.target.precision
    if wanted == "fp32":
        return shop, None
    plain = replace(shop, target=replace(shop.target, precision="fp32"))
    reference, lowered = candidate.baseline(plain), candidate.baseline(shop)

    def work() -> Comparison:
        shop.say(f"measuring fp32 beside {wanted}", 0)
        return measure.compare(
            shop.engine(lowered),
            shop.engine(reference),
            shop.target,
            raw_path=shop.run / f"raw/{wanted}.npz",
        )

    seen = shop.run.journal.once(f"00-baseline/{wanted}", Comparison, work)
    found = Payoff(
        precision=wanted,
        ratio=seen.ratio,
        ratio_ci95=seen.ratio_ci95,
        p50_ms=seen.candidate.p50_ms,
        fp32_p50_ms=seen.reference.p50_ms,
        chosen=wanted,
        asked=asked,
    )
    if found.slower and not asked:
        return plain, replace(found, chosen="fp32")
    return shop, found
