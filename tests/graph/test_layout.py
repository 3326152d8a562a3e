"""The algebra of layouts: what unifies, what refines, what freezes."""

import pytest

from prune2deploy.graph.build import positions
from prune2deploy.graph.layout import (
    VARYING,
    cat,
    cut,
    find,
    freeze,
    leaf,
    leaves,
    prod,
    regroup,
    settle_ties,
    tie_root,
    unify,
)


def sizes(node):
    return [n.size for n in leaves(node)]


def frozen(node):
    return [n.frozen is not None for n in leaves(node)]


def test_two_leaves_become_one():
    a, b = leaf(8), leaf(8)
    unify(a, b)
    assert find(a) is find(b)


def test_freezing_one_freezes_its_equal_whichever_came_first():
    a, b, c = leaf(8), leaf(8), leaf(8)
    freeze([a], "model output")
    unify(a, b)
    unify(c, b)
    assert find(c).frozen == "model output"


@pytest.mark.parametrize("turned", [False, True])
def test_of_two_reasons_the_earlier_one_is_kept(turned):
    a, b = leaf(8), leaf(8)
    freeze([a], "read through a kernel")
    freeze([b], "model output")
    unify(*((b, a) if turned else (a, b)))
    assert find(a).frozen == find(b).frozen == "read through a kernel"


@pytest.mark.parametrize("turned", [False, True])
def test_that_values_decide_a_size_is_never_forgotten(turned):
    a, b = leaf(8, "model input"), leaf(8, VARYING)
    unify(*((b, a) if turned else (a, b)))
    assert find(a).frozen == find(b).frozen == VARYING


def test_parts_of_a_leaf_are_frozen_since_the_leaf_is():
    a, b = leaf(8, "model input"), leaf(8, "model output")
    regroup([a], (2, 4))
    unify(b, a)
    assert {n.frozen for n in leaves(b)} == {"model input"}


def test_a_leaf_takes_the_structure_of_a_product():
    heads, width, whole = leaf(3), leaf(4), leaf(12)
    unify(whole, prod([heads, width]))
    assert leaves(whole) == [heads, width]


def test_a_view_factorises_a_leaf_and_the_inverse_view_restores_it():
    whole = leaf(12)
    heads, width = regroup([whole], (3, 4))
    assert sizes(whole) == [3, 4]
    (back,) = regroup([heads, width], (12,))
    assert leaves(back) == leaves(whole)


def test_products_find_their_common_factorisation():
    a, b = prod([leaf(6), leaf(4)]), prod([leaf(3), leaf(8)])
    unify(a, b)
    assert sizes(a) == [3, 2, 4]
    assert leaves(a) == leaves(b)


def test_products_without_common_factorisation_freeze_both():
    a, b = prod([leaf(4), leaf(3)]), prod([leaf(3), leaf(4)])
    unify(a, b)
    assert all(frozen(a))
    assert all(frozen(b))


def test_concatenations_align_their_boundaries():
    a, b = cat([leaf(4), leaf(8)]), cat([leaf(6), leaf(6)])
    unify(a, b)
    assert sizes(a) == sizes(b) == [4, 2, 6]
    assert leaves(a) == leaves(b)


def test_a_concatenation_cuts_the_outer_factor_of_a_product():
    inner = leaf(4)
    a, b = prod([leaf(5), inner]), cat([leaf(8), leaf(12)])
    unify(a, b)
    assert not any(frozen(a))
    assert sizes(a) == sizes(b) == [2, 3, 4]  # prod(cat(2, 3), 4)
    assert leaves(a)[-1] is find(inner)
    assert [sizes(piece) for piece in cut(b, [8])] == [[2, 4], [3, 4]]


def test_a_boundary_inside_the_inner_factor_freezes():
    a, b = prod([leaf(5), leaf(4)]), cat([leaf(6), leaf(14)])
    unify(a, b)
    assert all(frozen(a))
    assert all(frozen(b))


def test_cutting_twice_gives_the_same_segments():
    whole = leaf(12)
    first = cut(whole, [4, 8])
    assert [find(s) for s in cut(whole, [4, 8])] == [find(s) for s in first]


def test_a_view_of_equal_segments_shares_their_inner_factor():
    a, b = leaf(6), leaf(6)
    outer, inner = regroup([cat([a, b])], (2, 6))
    assert outer.size == 2
    assert find(a) is find(b) is find(inner)


def test_a_view_that_cuts_across_freezes_and_says_so():
    a = prod([leaf(5), leaf(3)])
    assert regroup([a], (3, 5)) is None
    assert {n.frozen for n in leaves(a)} == {"a view cuts across its channels"}
    b = cat([prod([leaf(5), leaf(3)]), leaf(6)])
    assert regroup([b], (7, 3), "groups cut across its channels") is not None
    assert regroup([b], (3, 7), "groups cut across its channels") is None
    assert {n.frozen for n in leaves(b)} == {"groups cut across its channels"}


def test_a_term_is_never_part_of_itself():
    a = leaf(6)
    b = cat([a, leaf(6)])
    whole = leaf(12)
    unify(whole, b)
    unify(whole, prod([leaf(2), a]))  # forces both halves to be the same leaf, not a cycle
    assert sizes(whole)


def test_ties_copy_structure_and_tie_leaf_by_leaf():
    structured, bare = prod([leaf(3), leaf(4)]), leaf(12)
    settle_ties([(bare, structured)])
    pairs = list(zip(leaves(bare), leaves(structured), strict=True))
    assert [x.size for x, _ in pairs] == [3, 4]
    assert all(x is not y and tie_root(x) is tie_root(y) for x, y in pairs)


def test_a_frozen_end_of_a_tie_freezes_the_other():
    a, b, c = leaf(6), leaf(6, "model input"), leaf(6)
    settle_ties([(a, c), (c, b)])
    assert "model input" in find(a).frozen


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        (lambda a, b: prod([a, b]), ([0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2])),
        (lambda a, b: prod([b, a]), ([0, 1, 0, 1, 0, 1], [0, 0, 1, 1, 2, 2])),
        (lambda a, b: cat([a, b]), ([0, 1, -1, -1, -1], [-1, -1, 0, 1, 2])),
    ],
)
def test_positions_belong_to_channels_row_major(node, expected):
    a, b = leaf(2), leaf(3)
    found = {id(n): list(channel) for n, channel in positions(node(a, b))}
    assert (found[id(a)], found[id(b)]) == expected
