"""Layouts: which axes of a tensor each dim stands for, through views, cuts, slices and back.

What a layout says is checked with numbers: a tensor of distinct numbers is viewed by torch, and each axis is where
the layout has it. Symbolic sizes are checked to be compared without a guard.
"""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from normfx.layout import Axes, Placed, arranged, is_one, plain

EXAMPLES = settings(
    max_examples=200,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def symbolic(*hints: int) -> tuple[ShapeEnv, list[torch.SymInt]]:
    """Sizes that are unknown when compiling."""
    env = ShapeEnv()
    sizes = []
    for i, hint in enumerate(hints):
        source = ConstantSource(f"size{i}")
        symbol = env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
        sizes.append(env.create_symintnode(symbol, hint=hint, source=source))
    return env, sizes


def over(*axes: int) -> frozenset[int]:
    return frozenset(axes)


# -- axes of a tensor ----------------------------------------------------------------------------


def test_each_dim_is_an_axis_but_those_of_size_one():
    axes = Axes((2, 1, 3))
    assert axes.whole == ((0,), (), (1,))
    assert axes.all() == {0, 1}
    assert axes.size((0, 1)) == 6
    assert axes.size(()) == 1


def test_a_tensor_without_dims_has_no_axes():
    axes = Axes(())
    assert axes.whole == ()
    assert axes.all() == frozenset()
    assert axes.view((), (1, 1)) == ((), ())


def test_a_symbolic_size_is_never_one_and_is_not_guarded():
    env, (n, m) = symbolic(4, 6)
    assert not is_one(n)
    axes = Axes((n, 1, m))
    assert axes.whole == ((0,), (), (1,))
    assert axes.size((0, 1)) == plain(n * m)
    assert axes.size((0,)) == plain(n)
    assert axes.size((0,)) != plain(m)
    assert not env.guards


def test_a_size_that_is_known_after_all_is_a_number():
    _, (n,) = symbolic(4)
    assert plain(n - n + 3) == 3
    assert isinstance(plain(n - n + 3), int)
    assert plain(5) == 5
    assert plain(n * 2) == plain(2 * n)


# -- views ---------------------------------------------------------------------------------------


def test_a_view_groups_axes():
    axes = Axes((2, 3, 4))
    assert axes.view(axes.whole, (6, 4)) == ((0, 1), (2,))
    assert axes.view(axes.whole, (2, 12)) == ((0,), (1, 2))
    assert axes.view(axes.whole, (24,)) == ((0, 1, 2),)
    assert axes.view(axes.whole, (2, 1, 3, 1, 4)) == ((0,), (), (1,), (), (2,))


@pytest.mark.parametrize("shape", [(3, 2, 4), (4, 6), (8, 3), (2, 4, 3), (12, 2), (2, 3, 2, 2)])
def test_a_view_that_would_cut_an_axis_has_no_layout(shape):
    axes = Axes((2, 3, 4))
    assert axes.view(axes.whole, shape) is None
    assert axes.whole == ((0,), (1,), (2,)), "asking changes nothing"


def test_equal_sizes_do_not_hide_a_permutation():
    axes = Axes((4, 4))
    transposed = arranged((1, 0), axes.whole)
    assert transposed == ((1,), (0,))
    assert axes.view(transposed, (16,)) == ((1, 0),)
    assert axes.view(((1, 0),), (4, 4)) == transposed


@pytest.mark.parametrize("shape", [(5,), (2,), (2, 3, 4, 2), (2, 3)])
def test_a_view_with_other_elements_has_no_layout(shape):
    axes = Axes((2, 3, 4))
    assert axes.view(axes.whole, shape) is None


def test_a_view_without_elements_has_no_layout():
    axes = Axes((0, 3))
    assert axes.view(axes.whole, (3, 0)) is None
    assert axes.view(axes.whole, (0,)) is None
    assert axes.view(axes.whole, (3, 0), split=True) is None


def test_a_split_cuts_an_axis_for_good():
    axes = Axes((2, 6))
    cut = axes.view(axes.whole, (2, 3, 2), split=True)
    assert cut == ((0,), (2,), (3,))
    assert axes.whole == ((0,), (2, 3))
    assert axes.size((2,)) == 3
    assert axes.size((3,)) == 2
    assert axes.all() == {0, 2, 3}
    assert axes.view(axes.whole, (2, 3, 2)) == cut
    assert cut is not None
    assert axes.view(cut, (2, 6)) == axes.whole
    assert axes.view(cut, (6, 2)) == ((0, 2), (3,))


def test_an_axis_is_cut_twice():
    axes = Axes((12,))
    first = axes.view(axes.whole, (4, 3), split=True)
    assert first is not None
    second = axes.view(first, (2, 2, 3), split=True)
    assert second is not None
    assert [axes.size(dim) for dim in second] == [2, 2, 3]
    assert axes.whole == (sum(second, ()),)
    three = Axes((12,))
    at_once = three.view(three.whole, (2, 2, 3), split=True)
    assert at_once is not None
    assert [three.size(dim) for dim in at_once] == [2, 2, 3]
    assert three.whole == (sum(at_once, ()),)


def test_a_cut_in_the_middle_of_a_group():
    axes = Axes((2, 6))
    got = axes.view(axes.whole, (4, 3), split=True)
    assert got is not None
    assert [axes.size(dim) for dim in got] == [4, 3]
    assert len(got[0]) == 2
    assert axes.view(got, (2, 6)) == axes.whole


def test_sizes_that_have_no_common_factor_cannot_be_cut():
    axes = Axes((6, 2))
    assert axes.view(axes.whole, (4, 3), split=True) is None


@pytest.mark.parametrize("known", [2, 3])
def test_symbolic_sizes_are_grouped_and_cut_only_where_that_holds_for_all(known):
    env, (n, m) = symbolic(12, 10)
    axes = Axes((n, known, m))
    assert axes.view(axes.whole, (n * known, m)) == ((0, 1), (2,))
    assert axes.view(axes.whole, (n, known * m)) == ((0,), (1, 2))
    assert axes.view(axes.whole, (n * m * known,)) == ((0, 1, 2),)
    assert axes.view(axes.whole, (n, m, known)) is None
    assert axes.view(axes.whole, (m, known, n)) is None
    # 12 and 10 happen to be divisible.
    assert axes.view(axes.whole, (2, n // 2, known, m), split=True) is None
    assert axes.view(axes.whole, (n, known, m // 2, 2), split=True) is None
    assert not env.guards


def test_a_multiple_of_a_symbol_is_cut_where_the_multiple_is():
    env, (n,) = symbolic(5)
    axes = Axes((n * 6, 4))
    got = axes.view(axes.whole, (n, 6, 4), split=True)
    assert got is not None
    assert axes.size(got[1]) == 6
    assert axes.size(got[0]) == plain(n)
    assert axes.view(got, (n * 6, 4)) == axes.whole
    assert axes.view(got, (n, 24)) == (got[0], got[1] + got[2])
    assert not env.guards


@st.composite
def shapes(draw):
    """A shape, and another one of as many elements."""
    factors = draw(st.lists(st.sampled_from([2, 3, 5]), min_size=1, max_size=5))

    def grouped():
        sizes, size = [], 1
        for factor in factors:
            size *= factor
            if draw(st.booleans()):
                sizes.append(size)
                size = 1
                sizes += [1] * draw(st.integers(0, 1))
        return tuple([*sizes, size])

    return grouped(), grouped()


def laid_out(axes: Axes, layout, source: torch.Tensor) -> torch.Tensor:
    """The tensor whose dims are what a layout says, from the tensor itself."""
    order = [axis for dim in axes.whole for axis in dim]
    apart = source.reshape([axes.size((a,)) for a in order])
    wanted = [axis for dim in layout for axis in dim]
    return apart.permute([order.index(a) for a in wanted]).reshape(
        [axes.size(dim) for dim in layout]
    )


@EXAMPLES
@given(shapes())
def test_a_view_and_back_is_the_identity_and_every_axis_is_where_it_is_said(drawn):
    before, after = drawn
    axes = Axes(before)
    got = axes.view(axes.whole, after, split=True)
    assert got is not None, "each factor is nested in both"
    numbers = torch.arange(math.prod(before)).reshape(before)
    assert torch.equal(laid_out(axes, got, numbers), numbers.view(after))
    assert axes.view(got, before) == axes.whole
    assert axes.view(axes.whole, after) == got
    assert [axes.size(dim) for dim in axes.whole] == list(before)


@EXAMPLES
@given(shapes(), st.randoms(use_true_random=False))
def test_a_view_after_a_permutation_has_its_axes_where_torch_has_them(drawn, random):
    before, after = drawn
    axes = Axes(before)
    order = list(range(len(before)))
    random.shuffle(order)
    numbers = torch.arange(math.prod(before)).reshape(before)
    permuted = numbers.permute(order)
    got = axes.view(arranged(order, axes.whole), after)
    if got is not None:
        assert torch.equal(laid_out(axes, got, numbers), permuted.reshape(after))
    got = axes.view(arranged(order, axes.whole), after, split=True)
    if got is not None:
        assert torch.equal(laid_out(axes, got, numbers), permuted.reshape(after))


# -- slices --------------------------------------------------------------------------------------


def test_a_slice_has_an_axis_of_its_own_and_only_one():
    axes = Axes((2, 6))
    part = axes.slice(1, 0, 4)
    assert part not in axes.all()
    assert axes.size((part,)) == 4
    assert axes.slice(1, 0, 4) == part
    assert len({part, axes.slice(1, 2, 4), axes.slice(1, 0, 3), axes.slice(0, 0, 4)}) == 4


def test_a_slice_of_symbolic_size_is_one_axis_too():
    env, (n,) = symbolic(8)
    axes = Axes((2, n))
    assert axes.slice(1, 0, n - 1) == axes.slice(1, 0, n - 1)
    assert axes.slice(1, 0, n - 1) != axes.slice(1, 0, n - 2)
    assert not env.guards


# -- where axes are ------------------------------------------------------------------------------


def test_whole_dims_are_placed_as_they_are():
    axes = Axes((2, 3, 1, 4))
    assert axes.placed(axes.whole, over(0, 2)) == Placed((0, 3))
    assert axes.placed(axes.whole, over(1)) == Placed((1,))
    assert axes.placed(axes.whole, over()) == Placed(())
    assert axes.placed(arranged((3, 2, 1, 0), axes.whole), over(0, 1)) == Placed((2, 3))
    assert axes.placed(((0, 1), (2,)), over(0, 1)) == Placed((0,))


def test_axes_that_are_not_there_have_no_place():
    axes = Axes((2, 3, 4))
    assert axes.placed(((0,), (), (2,)), over(1)) is None
    assert axes.placed(((0,), (), (2,)), over(0, 1)) is None


@pytest.mark.parametrize("inner", [True, False], ids=["inner", "outer"])
def test_a_part_of_a_dim_is_placed_by_groups(inner):
    axes = Axes((2, 6, 5))
    cut = axes.view(axes.whole, (2, 3, 2, 5), split=True)
    assert cut is not None
    (outer_axis,), (inner_axis,), (last,) = cut[1], cut[2], cut[3]
    wanted = over(inner_axis if inner else outer_axis, last)
    placed = axes.placed(axes.whole, wanted)
    assert placed is not None
    assert placed == Placed((2 if inner else 1, 3), groups=3, group_dim=1)
    # and that is what it says: dims of the tensor with that dim viewed in groups
    assert axes.placed(cut, wanted) == Placed(placed.dims)


def test_two_cuts_have_no_place():
    axes = Axes((4, 6))
    cut = axes.view(axes.whole, (2, 2, 3, 2), split=True)
    assert cut is not None
    assert axes.placed(axes.whole, over(*cut[1], *cut[3])) is None
    assert axes.placed(axes.whole, over(*cut[1])) == Placed((1,), 2, 0)
    assert axes.placed(axes.whole, over(*cut[1], *cut[2], *cut[3])) == Placed((1, 2), 2, 0)


def test_the_middle_of_a_dim_has_no_place():
    axes = Axes((12,))
    cut = axes.view(axes.whole, (2, 2, 3), split=True)
    assert cut is not None
    assert axes.placed(axes.whole, over(*cut[1])) is None
    assert axes.placed(axes.whole, over(*cut[0], *cut[2])) is None
    assert axes.placed(axes.whole, over(*cut[1], *cut[2])) == Placed((1,), 2, 0)
    assert axes.placed(axes.whole, over(*cut[0], *cut[1])) == Placed((0,), 4, 0)


def test_groups_of_which_there_is_an_unknown_number_have_no_place():
    _, (n,) = symbolic(5)
    axes = Axes((n * 6, 4))
    cut = axes.view(axes.whole, (n, 6, 4), split=True)
    assert cut is not None
    assert axes.placed(axes.whole, over(*cut[1])) is None
    assert axes.placed(cut, over(*cut[1])) == Placed((1,))


def test_a_prefix_of_the_last_dim_is_placed():
    axes = Axes((2, 6))
    part = axes.slice(1, 0, 4)
    assert axes.placed(axes.whole, over(part)) == Placed((1,), prefix=4)
    assert axes.placed(axes.whole, over(0, part)) == Placed((0, 1), prefix=4)


def test_what_is_no_prefix_of_one_dim_has_no_place():
    _, (n,) = symbolic(8)
    axes = Axes((4, 6, n))
    assert axes.placed(axes.whole, over(axes.slice(1, 1, 4))) is None
    assert axes.placed(axes.whole, over(axes.slice(1, 0, 4), axes.slice(0, 0, 2))) is None
    assert axes.placed(axes.whole, over(axes.slice(2, 0, n - 1))) is None
    assert axes.placed(((0, 1), (2,)), over(0, axes.slice(1, 0, 4))) is None


def test_a_prefix_counts_along_the_last_of_the_dims_or_has_no_place():
    """`prefix` is of the last of the dims: a prefix of another one cannot be said."""
    axes = Axes((2, 3, 4))
    assert axes.placed(axes.whole, over(axes.slice(1, 0, 2), 2)) is None
    swapped = arranged((0, 2, 1), axes.whole)
    assert axes.placed(swapped, over(axes.slice(1, 0, 2), 2)) == Placed((1, 2), prefix=2)


def statistic(source: torch.Tensor, placed: Placed) -> torch.Tensor:
    """The sums over placed axes, as the canonical operation takes them."""
    if placed.groups:
        source = source.unflatten(placed.group_dim, (placed.groups, -1))
    part = source.narrow(placed.dims[-1], 0, placed.prefix) if placed.prefix else source
    return part.sum(placed.dims, keepdim=True)


ORDERS = [(0, 1, 2), (1, 0, 2), (0, 2, 1), (2, 1, 0), (2, 0, 1)]


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "prefix"])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_every_place_sums_what_it_says(cut, order):
    """Over all sets of axes of a tensor with one dim of two axes, and with a prefix of its last dim."""
    numbers = torch.arange(2 * 6 * 3).reshape(2, 6, 3).double() ** 2
    axes = Axes((2, 6, 3))
    axes.view(axes.whole, (2, 2, 3, 3), split=True)
    (first,), (outer, inner), (last,) = axes.whole
    if cut:
        last = axes.slice(last, 0, 2)
    apart = numbers.reshape(2, 2, 3, 3)[..., : 2 if cut else None]
    checked = 0
    for chosen in product((False, True), repeat=4):
        wanted = [
            axis for axis, take in zip((first, outer, inner, last), chosen, strict=True) if take
        ]
        placed = axes.placed(arranged(order, axes.whole), over(*wanted))
        if not wanted or placed is None or (cut and not chosen[3]):
            continue
        sums = apart.sum([d for d, take in enumerate(chosen) if take])
        got = statistic(numbers.permute(order), placed)
        assert torch.equal(got.flatten().sort().values, sums.flatten().sort().values), wanted
        checked += 1
    assert checked >= (1 if cut else 15)
