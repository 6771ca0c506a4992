"""The planner of ranged reads."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagecache.blockimage.locations import Location
from imagecache.cache.plan import plan_gets

pytestmark = pytest.mark.quick

PACKS = [bytes([n]) * 32 for n in range(3)]


def place(pack: int, offset: int, length: int) -> Location:
    return Location(PACKS[pack], offset, length, 0, 0)


def test_neighbours_share_a_get() -> None:
    places = [place(0, 100, 50), place(0, 150, 50), place(1, 200, 10), place(0, 210, 5)]
    gets = plan_gets(places, max_bytes=1000, max_gap=0)
    assert [(g.pack[0], g.offset, g.length, g.members) for g in gets] == [
        (0, 100, 100, (0, 1)),
        (1, 200, 10, (2,)),
        (0, 210, 5, (3,)),
    ]
    joined = plan_gets(places, max_bytes=1000, max_gap=10)
    assert [g.members for g in joined] == [(0, 1, 3), (2,)]


def test_a_get_has_a_bound_but_a_large_chunk_comes_alone() -> None:
    places = [place(0, n * 100, 100) for n in range(5)] + [place(0, 500, 5000)]
    gets = plan_gets(places, max_bytes=200, max_gap=0)
    assert [g.members for g in gets] == [(0, 1), (2, 3), (4,), (5,)]


def test_gets_come_in_the_order_of_wishing() -> None:
    places = [place(2, 0, 10), place(0, 900, 10), place(1, 5, 10)]
    assert [g.pack for g in plan_gets(places, max_bytes=99, max_gap=0)] == [
        PACKS[2],
        PACKS[0],
        PACKS[1],
    ]


@given(
    st.lists(
        st.builds(place, st.integers(0, 2), st.integers(0, 500), st.integers(1, 60)), max_size=30
    ),
    st.integers(1, 300),
    st.integers(0, 40),
)
def test_every_chunk_lies_in_exactly_one_get(places, max_bytes, max_gap) -> None:
    gets = plan_gets(places, max_bytes=max_bytes, max_gap=max_gap)
    assert sorted(n for get in gets for n in get.members) == list(range(len(places)))
    for get in gets:
        for number in get.members:
            wanted = places[number]
            assert wanted.pack == get.pack
            assert get.offset <= wanted.offset
            assert wanted.offset + wanted.stored_length <= get.offset + get.length
        # Chunks that overlap (one chunk wished for twice) are the only reason to be over the cap.
        assert get.length <= max_bytes or len(get.members) == 1 or get.length <= 60 + max_bytes
