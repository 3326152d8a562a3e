"""The algebra of layouts: how one dimension of one tensor is made of axes.

A layout is an expression over leaves. A *leaf* of size n stands for n channels that nothing has
split yet. ``prod(a, b)`` is the row-major product of two layouts (heads and head width, channels
and pixels after a flatten). ``cat(s, t)`` is a concatenation of segments.

Nodes are terms of a unification problem: ``unify`` says that two dimensions hold the same
channels, ``regroup`` and ``cut`` refine a leaf into a product or a concatenation, ``settle_ties``
says that two dimensions must keep equally many channels. What cannot be reconciled freezes the
leaves involved and remembers why, so that a model that is not understood loses prunability and
nothing else. Pure arithmetic: no tensors here.

The coupling that these terms express is that of DepGraph (Fang et al., CVPR 2023), one level
deeper: on the factors and segments of dimensions instead of on layers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

LEAF, PROD, CAT = "leaf", "prod", "cat"

VARYING = "values decide its size"
"""Reason of dimensions whose size is known at run time only; it prevails over any other."""

_moments = itertools.count()


class Node:
    """A term: a leaf, or a product or concatenation of terms; ``link`` redirects to its equal."""

    __slots__ = ("frozen", "kind", "link", "parts", "since", "size", "tied")

    def __init__(self, size: int, kind: str = LEAF, parts: tuple[Node, ...] = ()) -> None:
        self.size = size
        self.kind = kind
        self.parts = parts
        self.link: Node | None = None
        self.frozen: str | None = None
        self.since = 0  # when it was frozen: of two reasons the earlier one stays
        self.tied: Node = self  # parent in the forest of count ties; only leaves use it

    def __repr__(self) -> str:
        node = find(self)
        if node.kind == LEAF:
            return f"{node.size}{'*' if node.frozen else ''}"
        return f"{node.kind}({', '.join(map(repr, node.parts))})"


Layout = tuple[Node, ...]


def leaf(size: int, frozen: str | None = None) -> Node:
    """A new leaf, frozen from the start when a reason is given."""
    node = Node(size)
    if frozen is not None:
        node.frozen, node.since = frozen, next(_moments)
    return node


def _part(node: Node, size: int) -> Node:
    """A new leaf for a part of a leaf, frozen if that is."""
    part = Node(size)
    part.frozen, part.since = node.frozen, node.since
    return part


def find(node: Node) -> Node:
    """The term that ``node`` stands for now."""
    while node.link is not None:
        if node.link.link is not None:
            node.link = node.link.link
        node = node.link
    return node


def prod(parts: Iterable[Node]) -> Node:
    """Row-major product; factors of size one vanish."""
    flat = [factor for part in parts for factor in factors(part)]
    if len(flat) == 1:
        return flat[0]
    if not flat:
        return leaf(1)
    return Node(math.prod(f.size for f in flat), PROD, tuple(flat))


def cat(parts: Iterable[Node]) -> Node:
    """Concatenation; nested ones are flattened and empty segments vanish."""
    flat = [segment for part in parts for segment in _segments(part) if segment.size]
    if len(flat) == 1:
        return flat[0]
    return Node(sum(s.size for s in flat), CAT, tuple(flat))


def factors(node: Node) -> list[Node]:
    """The factors of a product, outermost first, none of them a product or of size one."""
    node = find(node)
    if node.size == 1:
        return []
    if node.kind != PROD:
        return [node]
    return [factor for part in node.parts for factor in factors(part)]


def _segments(node: Node) -> list[Node]:
    node = find(node)
    if node.kind != CAT:
        return [node]
    return [segment for part in node.parts for segment in _segments(part)]


def leaves(node: Node) -> list[Node]:
    """Every leaf below ``node``, in order, repeated where it occurs repeatedly."""
    stack, found = [node], []
    while stack:
        top = find(stack.pop())
        if top.kind == LEAF:
            found.append(top)
        else:
            stack.extend(reversed(top.parts))
    return found


def freeze(nodes: Iterable[Node], reason: str) -> None:
    """Mark every leaf below ``nodes`` as not prunable; the first reason is kept."""
    for node in nodes:
        for below in leaves(node):
            if below.frozen is None:
                below.frozen, below.since = reason, next(_moments)


def unify(a: Node, b: Node) -> None:
    """State that two dimensions of equal size hold the same channels."""
    a, b = find(a), find(b)
    if a is b or (a.size == 1 and b.size == 1):
        return
    if a.size != b.size:
        _conflict(a, b)
    elif a.kind == LEAF:
        _bind(a, b)
    elif b.kind == LEAF:
        _bind(b, a)
    elif a.kind == PROD and b.kind == PROD and _unify_products(a, b):
        _redirect(a, b)
    elif _unify_segments(a, b):
        # the product form keeps more structure: prefer it as the representative
        _redirect(a, b) if find(b).kind == PROD else _redirect(b, a)
    else:
        _conflict(a, b)


def regroup(
    nodes: Sequence[Node], sizes: Sequence[int], reason: str = "a view cuts across its channels"
) -> Layout | None:
    """Read ``nodes`` (row-major) as dimensions of the given ``sizes``, as a view does.

    Leaves and concatenations are factorised where a boundary falls inside them. Returns ``None``,
    with everything frozen for the ``reason``, where the boundaries cannot be met.
    """
    groups = _regroup(nodes, sizes)
    if groups is None:
        freeze(nodes, reason)
    return groups


def _regroup(nodes: Sequence[Node], sizes: Sequence[int]) -> Layout | None:
    queue = [factor for node in nodes for factor in factors(node)]
    groups: list[Node] = []
    for size in sizes:
        group = _take(queue, size)
        if group is None:
            return None
        groups.append(prod(group))
    return tuple(groups)


def _take(queue: list[Node], size: int) -> list[Node] | None:
    """Take factors that multiply to ``size`` off the front, splitting the last if need be."""
    group: list[Node] = []
    rest = size
    while rest > 1:
        if not queue:
            return None
        head = queue.pop(0)
        if rest % head.size == 0:
            rest //= head.size
            group.append(head)
            continue
        pair = _factorise(head, rest) if head.size % rest == 0 else None
        if pair is None:
            return None
        group.append(pair[0])
        queue[:0] = factors(pair[1])
        rest = 1
    return group


def cut(
    node: Node, offsets: Sequence[int], reason: str = "a slice cuts across its channels"
) -> list[Node] | None:
    """Cut a dimension at the given offsets into consecutive segments.

    A leaf becomes a concatenation of leaves; a product is cut through its outer factor. Returns
    ``None``, with everything frozen for the ``reason``, where a cut falls inside an inner factor.
    """
    pieces = _cut(find(node), sorted(set(offsets) - {0, node.size}))
    if pieces is None:
        freeze([node], reason)
    return pieces


def settle_ties(pairs: Sequence[tuple[Node, Node]]) -> None:
    """State for each pair of dimensions that both must keep equally many channels.

    The structures are made alike first, in as many passes as that takes, and only then are the
    leaves tied one to one; a frozen leaf freezes those that are tied to it.
    """
    while any([_align(a, b) for a, b in pairs]):  # noqa: C419  each pair is to be refined
        pass
    tied: list[Node] = []
    for a, b in pairs:
        for x, y in zip(leaves(a), leaves(b), strict=False):
            tied += [x, y]
            if tie_root(x) is not tie_root(y):
                tie_root(x).tied = tie_root(y)
    reasons = {tie_root(x): x.frozen for x in tied if x.frozen is not None}
    for x in tied:
        if tie_root(x) in reasons:
            freeze([x], f"tied to a dimension that is frozen ({reasons[tie_root(x)]})")


def _align(a: Node, b: Node) -> bool:
    """Give two terms of equal size the same make-up; True if one of them was refined."""
    a, b = find(a), find(b)
    if a is b or a.size == 1 or a.kind == b.kind == LEAF:
        return False
    if LEAF in (a.kind, b.kind):
        bare, model = (a, b) if a.kind == LEAF else (b, a)
        _bind(bare, _copy(model))
        return True
    if a.kind == b.kind and [p.size for p in a.parts] == [p.size for p in b.parts]:
        return any([_align(p, q) for p, q in zip(a.parts, b.parts, strict=True)])  # noqa: C419
    freeze([a, b], "two dimensions of different make-up must keep equally many channels")
    return False


def tie_root(node: Node) -> Node:
    """The representative of all leaves that must keep as many channels as ``node``."""
    while find(node.tied) is not find(node):
        node = find(node.tied)
    return find(node)


def _copy(node: Node) -> Node:
    node = find(node)
    if node.kind == LEAF:
        return leaf(node.size)
    return Node(node.size, node.kind, tuple(_copy(part) for part in node.parts))


def _bind(bare: Node, term: Node) -> None:
    """Let the leaf ``bare`` stand for ``term`` from now on."""
    below = leaves(term)
    if term.kind != LEAF and any(node is bare for node in below):
        _conflict(bare, term)
        return
    for node in below if bare.frozen is not None else ():
        if node.frozen is None or _prevails(bare, node):
            node.frozen, node.since = bare.frozen, bare.since
    bare.link = term


def _prevails(a: Node, b: Node) -> bool:
    """Whether the reason of one frozen leaf is to be kept rather than that of another."""
    return (a.frozen != VARYING, a.since) < (b.frozen != VARYING, b.since)


def _redirect(a: Node, b: Node) -> None:
    a, b = find(a), find(b)
    if a is not b:
        a.link = b


def _conflict(a: Node, b: Node) -> None:
    freeze([a, b], "coupled dimensions are made up in ways that do not fit together")


def _unify_products(a: Node, b: Node) -> bool:
    left, right = factors(a), factors(b)
    while left and right:
        x, y = left.pop(0), right.pop(0)
        if x.size == y.size:
            unify(x, y)
        elif x.size % y.size == 0 and (pair := _factorise(x, y.size)):
            unify(pair[0], y)
            left[:0] = factors(pair[1])
        elif y.size % x.size == 0 and (pair := _factorise(y, x.size)):
            unify(x, pair[0])
            right[:0] = factors(pair[1])
        else:
            return False
    return True


def _unify_segments(a: Node, b: Node) -> bool:
    offsets = sorted({*_offsets(a), *_offsets(b)})
    if not offsets:
        return False
    left, right = _cut(a, offsets), _cut(find(b), offsets)
    if left is None or right is None:
        return False
    for x, y in zip(left, right, strict=True):
        unify(x, y)
    return True


def _offsets(node: Node) -> list[int]:
    """Where the segments of a concatenation begin, also one that is an outer factor."""
    node = find(node)
    if node.kind == PROD:
        outer, *rest = factors(node)
        inner = math.prod(f.size for f in rest)
        return [offset * inner for offset in _offsets(outer)] if outer.kind == CAT else []
    found, at = [], 0
    for segment in _segments(node)[:-1]:
        at += segment.size
        found.append(at)
    return found


def _cut(node: Node, offsets: Sequence[int]) -> list[Node] | None:
    if not offsets:
        return [node]
    if node.kind == LEAF:
        bounds = [0, *offsets, node.size]
        pieces = [_part(node, hi - lo) for lo, hi in itertools.pairwise(bounds)]
        _bind(node, Node(node.size, CAT, tuple(pieces)))
        return pieces
    if node.kind == PROD:
        outer, *rest = factors(node)
        inner = math.prod(f.size for f in rest)
        if any(offset % inner for offset in offsets):
            return None
        pieces_or_none = _cut(outer, [offset // inner for offset in offsets])
        return pieces_or_none and [prod([piece, *rest]) for piece in pieces_or_none]
    return _cut_segments(node, offsets)


def _cut_segments(node: Node, offsets: Sequence[int]) -> list[Node] | None:
    pieces: list[list[Node]] = [[]]
    start = 0
    for segment in _segments(node):
        end = start + segment.size
        inside = [o - start for o in offsets if start < o < end]
        parts = _cut(find(segment), inside)
        if parts is None:
            return None
        for number, part in enumerate(parts):
            if number or start in offsets:
                pieces.append([])
            pieces[-1].append(part)
        start = end
    return [cat(piece) for piece in pieces]


def _factorise(node: Node, outer: int) -> tuple[Node, Node] | None:
    """Split a leaf or concatenation into an outer factor of the given size and an inner one."""
    node = find(node)
    inner = node.size // outer
    if node.kind == PROD:
        groups = _regroup([node], (outer, inner))
        return (groups[0], groups[1]) if groups else None
    if node.kind == LEAF:
        pair = _part(node, outer), _part(node, inner)
        _bind(node, Node(node.size, PROD, pair))
        return pair
    segments = _segments(node)
    if any(segment.size % inner for segment in segments):
        return None
    outers: list[Node] = []
    common: Node | None = None
    for segment in segments:
        groups = _regroup([segment], (segment.size // inner, inner))
        if groups is None:
            return None
        outers.append(groups[0])
        if common is None:
            common = groups[1]
        else:
            unify(common, groups[1])
    assert common is not None
    split = cat(outers)
    node.link = Node(node.size, PROD, (split, common))
    return split, find(common)
