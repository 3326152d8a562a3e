"""Open the engines of one comparison in this process and sample them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from prune2deploy.backends.base import Backend, Engine, Session
from prune2deploy.backends.feeds import random_feeds
from prune2deploy.measure import host
from prune2deploy.measure.clock import RealClock, SimulatedClock
from prune2deploy.measure.goal import Goal
from prune2deploy.measure.sample import Sampler, silent
from prune2deploy.measure.samples import Samples
from prune2deploy.target import Target


def interleaved(
    backend: Backend,
    engines: tuple[Engine, Engine],
    target: Target,
    *,
    goal: Goal | None,
    heartbeat: Callable[[], None] = silent,
) -> Samples:
    """Open candidate and reference (twice, if the policy wants a control) and sample them."""

    def opener(engine: Engine) -> Session:
        own = replace(target, precision=engine.precision or target.precision)
        with ExitStack() as unfinished:
            session = unfinished.enter_context(backend.open(engine, own))
            session.prepare(random_feeds(session.inputs, seed=0))
            unfinished.pop_all()
        return session

    chosen = [*engines, engines[1]] if target.measure.control else list(engines)
    clock = SimulatedClock() if backend.simulated else RealClock()
    openers = [partial(opener, engine) for engine in chosen]
    sampler = Sampler(openers, target, clock, simulated=backend.simulated, heartbeat=heartbeat)
    taken = sampler.collect(goal)
    facts = {} if backend.simulated else host.fingerprint()
    facts.update(versions=backend.versions(), threads=target.threads, target=target.sha256)
    return replace(taken, notes={**taken.notes, "fingerprint": facts})
