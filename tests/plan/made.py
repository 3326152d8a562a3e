"""Small graphs made by hand, and engines whose operators take a known time."""

import itertools
import math

import numpy as np

from prune2deploy.graph.axes import Axis, Block, Graph, Layer, Member, Polynomial
from prune2deploy.plan.choices import Problem, Removal, choices, importance_curves
from prune2deploy.plan.latency_model import Anchor, Build, LatencyModel, OperatorModel, fit
from prune2deploy.plan.probes import probes
from prune2deploy.plan.work import NO_WORK, Work
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


def problem_of(graph, seed, share):
    """Widths for a share of the latency of the whole, with random scores and a learnt model."""
    model = fit(graph, builds(graph, [{}, *probes(graph, 4, multiple=16)]), multiple=16)
    rng = np.random.default_rng(seed)
    scores = {axis.name: rng.random(axis.size) for axis in graph.prunable}
    offered = choices(graph, importance_curves(graph, scores), multiple=16)
    return Problem(graph, model, offered, share * model.predict({}))


def residual(stream, inners, tied=()):
    """Image → stem → blocks (convolutions, then an addition to their input) → classes.

    Block ``b0`` has the axes ``b0.0``, ``b0.1``, ... of the sizes ``inners[0]``; the stream is
    ``stem``. The last block begins with a convolution from stream to stream, which has no axis
    of the block. Axes of ``tied`` keep equally many channels.
    """
    layers = [layer("stem", const(3), width("stem"), 64)]
    sizes = {"stem": stream}
    for number, inner in enumerate(inners):
        names = [f"b{number}.{i}" for i in range(len(inner))]
        sizes |= dict(zip(names, inner, strict=True))
        mixed = ["stem"] if number == len(inners) - 1 else []
        for i, (one, other) in enumerate(itertools.pairwise([*mixed, "stem", *names, "stem"])):
            layers.append(layer(f"b{number}.conv{i}", width(one), width(other), 64))
    layers.append(layer("head", width("stem"), const(10), 1))
    plain = graph_of(sizes, layers, ties=dict.fromkeys(tied, 1))
    axes = tuple(
        Axis(a.name, a.size, tuple(_members(a, layers)), a.frozen, a.tie) for a in plain.axes
    )
    blocks = tuple(Block(f"b{number}", ()) for number in range(len(inners)))
    shape = (plain.tensors, plain.parameters, plain.widths, plain.unknown)
    return Graph(axes, plain.layers, *shape, blocks)


def _members(axis, layers):
    for one in layers:
        for dim, made in enumerate((one.out_width, one.in_width)):
            if axis.name in made.axes:
                yield Member(one.weight, dim, "out" if dim == 0 else "in", np.arange(axis.size))


def residual_model(graph, rng, *, calls=500.0):
    """One operator per layer, an addition behind every block, and two that no width changes.

    The first constant operator is the last but one; the last goes with ``b0``.
    """
    sizes = {axis.name: axis.size for axis in graph.axes}
    operators = []
    for one, behind in itertools.pairwise([*graph.layers, None]):
        work = Work(one.macs, one.in_width * const(64), one.out_width * const(64))
        cost = (0.01 * rng.uniform(0.5, 2), 0.2, 0.2 * rng.uniform(0.5, 2), calls)
        amounts = [[f(sizes) * share for f in (work.macs, work.read, work.written)]
                   for share in (0.3, 1)]  # fmt: skip
        cells = np.log(amounts), rng.normal(0, 0.1, 2)
        operators.append(OperatorModel(one.name, "Conv", "conv", work, cost, True, *cells))
        block = one.name.split(".")[0]
        if block in {b.name for b in graph.blocks} and not behind.name.startswith(f"{block}."):
            made = one.out_width * const(64)
            work, cost = Work(const(0), made + made, made), (0.0, 0.3, 0.3, calls)
            operators.append(OperatorModel(f"{block}.add", "Add", "add", work, cost))
    steady = (0.0, 0.0, 0.0, 8000.0)
    operators += [OperatorModel(name, "Resize", "resize", NO_WORK, steady)
                  for name in ("resize", "b0.resize")]  # fmt: skip
    return LatencyModel(sizes, 16, tuple(operators), (Anchor(0.5, 0.02, 0.01),), "profiles")


def removals(graph, model, losses):
    """Every block with the axes and operators that bear its name."""
    return tuple(
        Removal(
            block.name,
            losses[number],
            frozenset(a.name for a in graph.axes if a.name.startswith(f"{block.name}.")),
            frozenset(
                i for i, o in enumerate(model.operators) if o.name.startswith(f"{block.name}.")
            ),
        )
        for number, block in enumerate(graph.blocks)
    )
