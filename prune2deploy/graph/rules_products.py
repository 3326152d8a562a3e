"""Rules for products of matrices and vectors, which layers are made of."""

from __future__ import annotations

from collections.abc import Sequence

from prune2deploy.graph.layout import Layout, leaf, unify
from prune2deploy.graph.rules import Call, broadcast, rule


def _matmul(call: Call, a: str, b: str, bias: str | None = None) -> Layout:
    """``a`` (…, m, k) times ``b`` (…, k, n), batch dimensions unified."""
    left, right = call.dims(a), call.dims(b)
    unify(left[-1], right[-2])
    for x, y in zip(left[:-2], right[:-2], strict=True):
        unify(x, y)
    result = (*left[:-1], right[-1])
    if bias is not None:
        broadcast([result, call.dims(bias)])
    weight = call.value(b) if call.value(b).weight else None
    call.role(b, -2, "in")
    call.role(b, -1, "out")
    call.role(a, -1, "in")
    kind = "linear" if weight else "matmul"
    macs = (*left, right[-1])
    call.notebook.contraction(kind, weight, ((left[-1],), (right[-1],), macs))
    return result


@rule("aten::mm")
def mm(call: Call) -> Layout:
    """Matrix product."""
    return _matmul(call, "self", "mat2")


@rule("aten::bmm")
def bmm(call: Call) -> Layout:
    """Batched matrix product."""
    return _matmul(call, "self", "mat2")


@rule("aten::addmm", "aten::addmm_", "aten::_sparse_addmm")
def addmm(call: Call) -> Layout:
    """Matrix product plus bias."""
    return _matmul(call, "mat1", "mat2", "self")


@rule("aten::baddbmm", "aten::baddbmm_")
def baddbmm(call: Call) -> Layout:
    """Batched matrix product plus bias."""
    return _matmul(call, "batch1", "batch2", "self")


@rule("aten::addbmm", "aten::addbmm_")
def addbmm(call: Call) -> Layout:
    """Sum of a batch of matrix products, plus bias."""
    result = _matmul(call, "batch1", "batch2")[1:]
    broadcast([result, call.dims("self")])
    return result


@rule("aten::addr", "aten::addr_")
def addr(call: Call) -> Layout:
    """Outer product of two vectors, plus bias."""
    result = (*call.dims("vec1"), *call.dims("vec2"))
    broadcast([result, call.dims("self")])
    return result


@rule("aten::_trilinear")
def trilinear(call: Call) -> Layout:
    """Product of three tensors of one rank, summed over some dimensions (``nn.Bilinear``).

    Each tensor is given dimensions of size one at the places that it says before.
    """
    names = ("i1", "i2", "i3")
    whole = broadcast([_expanded(call.dims(n), call[f"expand{n[1]}"]) for n in names])
    gone = {place % len(whole) for place in call["sumdim"]}
    result = tuple(node for place, node in enumerate(whole) if place not in gone)
    places = [place for place in range(len(whole)) if place not in call["expand2"]]
    for dim, place in enumerate(places):
        call.role("i2", dim, "in" if place in gone else "out")
    weight = call.value("i2") if call.value("i2").weight else None
    summed = tuple(whole[place] for place in sorted(gone))
    made = tuple(whole[place] for place in places if place not in gone)
    kind = "linear" if weight else "matmul"
    call.notebook.contraction(kind, weight, (summed, made, whole))
    return result


def _expanded(dims: Layout, places: Sequence[int]) -> Layout:
    """A layout with dimensions of size one put in, so that they end up at the given places."""
    expanded = list(dims)
    for place in sorted(places):
        expanded.insert(place, leaf(1))
    return tuple(expanded)


@rule("aten::linear")
def linear(call: Call) -> Layout:
    """``x @ weight.T + bias`` where it is not decomposed."""
    x, weight, bias = call.dims("input"), call.dims("weight"), call.dims("bias")
    unify(x[-1], weight[1])
    if bias:
        unify(bias[0], weight[0])
    call.role("weight", 0, "out")
    call.role("weight", 1, "in")
    widths = ((x[-1],), (weight[0],), (*x, weight[0]))
    call.notebook.contraction("linear", call.value("weight"), widths)
    return (*x[:-1], weight[0])


@rule("aten::mv", "aten::addmv")
def mv(call: Call) -> Layout:
    """Matrix times vector, plus bias."""
    matrix = call.dims("self") if call.name == "aten::mv" else call.dims("mat")
    unify(matrix[1], call.dims("vec")[0])
    if call.name == "aten::addmv":
        broadcast([matrix[:1], call.dims("self")])
    return (matrix[0],)


@rule("aten::_cdist_forward", "aten::_euclidean_dist")
def distances(call: Call) -> Layout:
    """Distances between the rows of x1 (…, P, M) and of x2 (…, R, M) → (…, P, R)."""
    a, b = call.dims("x1"), call.dims("x2")
    unify(a[-1], b[-1])
    batch = broadcast([a[:-2], b[:-2]]) if len(a) > 2 or len(b) > 2 else ()
    return (*batch, a[-2], b[-2])


@rule("aten::dot", "aten::vdot")
def dot(call: Call) -> Layout:
    """Inner product of two vectors."""
    unify(call.dims("self")[0], call.dims("tensor" if call.name == "aten::dot" else "other")[0])
    return ()
