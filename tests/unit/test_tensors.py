"""Boxes of a tensor against NumPy's own slicing."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ckptfuse.formats.tensors import Box, is_partition, shared_runs

shapes = st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple)


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offsets = tuple(draw(st.integers(0, n - 1)) for n in shape)
    lengths = tuple(draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True))
    return Box(offsets, lengths)


def part(values: np.ndarray, box: Box) -> np.ndarray:
    ends = zip(box.offsets, box.shape, strict=True)
    return values[tuple(slice(start, start + length) for start, length in ends)].ravel()


@given(st.data())
def test_runs_are_what_two_boxes_share(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    here, there = data.draw(boxes(shape)), data.draw(boxes(shape))
    values = np.arange(math.prod(shape)).reshape(shape)
    mine, other = part(values, here), part(values, there)
    first = data.draw(st.integers(0, len(mine) - 1))
    count = data.draw(st.integers(1, len(mine) - first))
    runs = shared_runs(here, there, first, count)
    found = np.full(len(mine), -1)
    for a, b, length in zip(runs.here, runs.there, runs.lengths, strict=True):
        found[a : a + length] = other[b : b + length]
    wanted = np.where(np.isin(mine, other), mine, -1)
    wanted[:first] = wanted[first + count :] = -1
    assert found.tolist() == wanted.tolist()
    assert runs.elements == np.count_nonzero(wanted >= 0)


def test_whole_rows_make_one_run() -> None:
    runs = shared_runs(Box((0, 0), (8, 5)), Box((2, 0), (4, 5)), 0, 40)
    assert (runs.here.tolist(), runs.there.tolist(), runs.lengths.tolist()) == ([10], [0], [20])


@st.composite
def cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape and the boxes that repeated cuts in two make of it: seldom a grid."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    pieces = [Box((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 5))):
        box = pieces.pop(draw(st.integers(0, len(pieces) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, box.shape[axis]))
        for offset, length in ((0, at), (at, box.shape[axis] - at)):
            offsets, lengths = list(box.offsets), list(box.shape)
            offsets[axis], lengths[axis] = offsets[axis] + offset, length
            pieces.append(Box(tuple(offsets), tuple(lengths)))
    return shape, pieces


@given(cuts(), st.data())
def test_only_boxes_that_hold_every_element_once_are_a_partition(
    cut: tuple[tuple[int, ...], list[Box]], data: st.DataObject
) -> None:
    shape, pieces = cut
    assert is_partition(pieces, shape)
    number = data.draw(st.integers(0, len(pieces) - 1))
    moved = data.draw(boxes(shape))
    changed = [*pieces[:number], moved, *pieces[number + 1 :]]
    covered = np.zeros(shape, int)
    for box in changed:
        ends = zip(box.offsets, box.shape, strict=True)
        covered[tuple(slice(start, start + length) for start, length in ends)] += 1
    assert is_partition(changed, shape) == bool((covered == 1).all())


def test_a_box_beyond_the_shape_or_of_other_rank_is_no_partition() -> None:
    assert not is_partition([Box((0,), (3,))], (2,))
    assert not is_partition([Box((0, 0), (2, 1))], (2,))
    assert is_partition([Box((), ())], ())
    assert is_partition([Box((0, 0), (0, 3))], (0, 3))
