"""What profiling adds to every operator.

In: the unpruned build, profiled, and measured as a whole without being profiled. Out: the time
that reading the clock around an operator takes, to be taken off every timing.

Where operators are short, as in small models, their profiled times add up to more than the model
takes. That surplus is the same for every operator and does not shrink with widths: taken for time
in proportion to the rest, it makes narrow plans look far slower than they are. It is at most what
the shortest operator takes; a surplus beyond that is another speed of the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from prune2deploy.timing import OperatorTiming
from prune2deploy.units import NS_PER_MS

Profile = Sequence[OperatorTiming]


def overhead_ns(profile: Profile, measured_ms: float | None) -> float:
    """Nanoseconds by which the profile has each operator too long; 0 where that is not known."""
    if not profile or measured_ms is None:
        return 0.0
    times = [timing.ns for timing in profile]
    surplus = (sum(times) - measured_ms * NS_PER_MS) / len(times)
    return min(max(surplus, 0.0), *times)


def without(profile: Profile, overhead: float) -> tuple[OperatorTiming, ...]:
    """The same timings less what profiling added to each."""
    return tuple(replace(timing, ns=max(timing.ns - overhead, 0.0)) for timing in profile)
