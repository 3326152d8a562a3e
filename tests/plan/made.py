"""Small graphs made by hand, and engines whose operators take a known time."""

import itertools
import math

import numpy as np

from prune2deploy.graph.axes import Axis, Graph, Layer, Polynomial
from prune2deploy.plan.latency_model import Build
from prune2deploy.timing import OperatorTiming


def width(*names):
    """The sum of some axes."""
    return Polynomial(tuple((1, (name,)) for name in names))


def const(value):
    return Polynomial.constant(value)


def layer(name, into, made, positions, kernel=9):
    macs = into * made * const(positions * kernel)
    return Layer(name, "convolution", f"{name}.weight", into, made, macs)


def graph_of(sizes, layers, frozen=(), ties=None, widths=()):
    axes = tuple(
        Axis(n, s, (), "an output" if n in frozen else None, (ties or {}).get(n))
        for n, s in sizes.items()
    )
    tensors = {y.weight: (y.out_width, y.in_width) for y in layers}
    seen = (*(Polynomial(((1, (n,)),)) for n in sizes), *widths)
    return Graph(axes, tuple(layers), tensors, frozenset(tensors), seen, {})


def chain(sizes, classes=10, positions=64):
    """Convolutions one behind the other: image → a0 → a1 → ... → classes."""
    names = [f"a{i}" for i in range(len(sizes))]
    ends = [const(3), *(width(n) for n in names), const(classes)]
    layers = [
        layer(f"conv{i}", one, other, positions)
        for i, (one, other) in enumerate(itertools.pairwise(ends))
    ]
    return graph_of(dict(zip(names, sizes, strict=True)), layers)


def block(value, step):
    return -(-value // step) * step


def engine(graph, counts, *, step=16, noise=0.0, rng=None, fixed=2000.0):
    """Profile of an engine: per layer a convolution and an addition, and one constant operator.

    A convolution takes 0.01 ns per multiply-accumulate and 0.2 ns per element, channels counted in
    whole blocks, plus ``fixed``.
    """
    sizes = graph.sizes(counts)
    found = []
    for number, one in enumerate(graph.layers):
        into, made = one.in_width(sizes), one.out_width(sizes)
        side = math.isqrt(int(one.macs(sizes) / (into * made * 9)))
        macs = block(into, step) * block(made, step) * 9 * side**2 if into > 3 else 0
        macs = macs or into * block(made, step) * 9 * side**2
        ns = fixed + 0.01 * macs + 0.2 * block(made, step) * side**2
        shapes = ((1, into, side, side), (made, into, 3, 3), (made,))
        made_shape = (1, made, side, side)
        found.append((f"op{number}", "Conv", shapes, (made_shape,), ns))
        ns = fixed / 2 + 0.5 * made * side**2
        found.append((f"add{number}", "Add", (made_shape, made_shape), (made_shape,), ns))
    found.append(("resize", "Resize", ((1, 3, 8, 8),), ((1, 3, 16, 16),), 5000.0))
    factors = np.exp(noise * (rng or np.random.default_rng(0)).standard_normal(len(found)))
    return tuple(
        OperatorTiming(n, k, i, o, ns * f)
        for (n, k, i, o, ns), f in zip(found, factors, strict=True)
    )


def total_ms(profile):
    return sum(operator.ns for operator in profile) / 1e6


def builds(graph, plans, offset_ms=0.3, **options):
    """Profiled builds; the first is measured too."""
    found = []
    for number, counts in enumerate(plans):
        profile = engine(graph, counts, **options)
        measured = total_ms(profile) + offset_ms if number == 0 else None
        found.append(Build(counts, profile, measured))
    return found
