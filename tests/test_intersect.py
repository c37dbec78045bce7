"""Intersections of fragments, and the chunks that a checkpoint cuts them into."""

from __future__ import annotations

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gwt_dist import Fragment, LayoutError
from gwt_dist.checkpoint import files
from gwt_dist.layout import Overlap


@st.composite
def fragments(draw: st.DrawFn, shape: tuple[int, ...]) -> Fragment:
    """Any interval of a tensor, or the same interval of several of its rows, at some offset of a buffer."""
    rows, columns = shape[0], prod(shape[1:])
    if draw(st.booleans()):
        first, last = sorted(draw(st.tuples(st.integers(0, rows), st.integers(0, rows))))
        low, high = sorted(draw(st.tuples(st.integers(0, columns), st.integers(0, columns))))
        if first < last and low < high:
            start = first * columns + low
            return Fragment("t", shape, start, start + high - low, draw(st.integers(0, 5)), last - first)
    start, stop = sorted(draw(st.tuples(*[st.integers(0, prod(shape))] * 2)))
    return Fragment("t", shape, start, stop, draw(st.integers(0, 5)))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Fragment, Fragment]:
    shape = draw(st.sampled_from([(5, 7), (1, 9), (6, 1), (3, 2, 4), (4, 5)]))
    return draw(fragments(shape)), draw(fragments(shape))


def elements(fragment: Fragment) -> dict[int, int]:
    """Element of the tensor -> its place in the buffer."""
    held = [element for low, high in fragment.intervals for element in range(low, high)]
    return {element: fragment.offset + i for i, element in enumerate(held)}


@given(pairs())
def test_an_intersection_is_what_both_hold(pair: tuple[Fragment, Fragment]) -> None:
    a, b = pair
    mine, others = elements(a), elements(b)
    found = []
    for o in a.intersect(b):
        assert o.rows > 0 and o.columns > 0
        for row in range(o.rows):
            for i in range(o.columns):
                found.append((o.source + row * o.source_stride + i, o.destination + row * o.destination_stride + i))
    assert sorted(found) == sorted((mine[e], others[e]) for e in mine.keys() & others.keys())
    assert len(a.intersect(b)) <= 3


def test_fragments_of_other_shapes_have_no_intersection() -> None:
    with pytest.raises(LayoutError, match="have the shapes"):
        Fragment("t", (2, 3), 0, 6).intersect(Fragment("t", (3, 2), 0, 6))


@given(pairs(), st.integers(1, 40))
def test_pieces_make_up_a_fragment(pair: tuple[Fragment, Fragment], most: int) -> None:
    whole = pair[0]
    before, files.CHUNK_BYTES = files.CHUNK_BYTES, 4 * most
    try:
        chunks = list(files.split(whole, 4))
    finally:
        files.CHUNK_BYTES = before
    found = [element for chunk in chunks for element in elements(chunk)]
    assert found == list(elements(whole))
    assert all(chunk.numel <= max(most, whole.stop - whole.start if whole.rows > 1 else 0) for chunk in chunks)


def test_overlaps_are_plain_numbers() -> None:
    assert Fragment("t", (4, 6), 2, 20).intersect(Fragment("t", (4, 6), 1, 4, 0, 4)) == (
        Overlap(1, 2, 0, 6, 1, 3),
        Overlap(2, 3, 5, 6, 3, 3),
        Overlap(1, 1, 17, 6, 9, 3),
    )
