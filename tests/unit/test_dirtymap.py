"""The dirty bitmap's file: what is written is read, what is not ours is refused, and nothing lacking is forgotten."""

from dataclasses import replace
from itertools import pairwise
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.dirtymap import (
    INTENT,
    PLANES,
    SECTOR,
    DirtyMap,
    DirtyMapError,
    LegContent,
    full_plane,
    marked_ranges,
    plane_size,
    region_shift,
    renewed,
)

DOMAIN = UUID("12345678-1234-5678-1234-567812345678")
ALPHA, BETA, GAMMA = (UUID(int=number) for number in (1, 2, 3))
SIZE = 5 << 30


def map_of(size: int = SIZE, **planes: int) -> DirtyMap:
    """A map of two legs; planes by name, as numbers whose bits they are."""
    length = plane_size(size, region_shift(size))
    names = ("intent", "alpha", "beta", "third", "fourth")
    return DirtyMap(
        DOMAIN,
        size,
        region_shift(size),
        3,
        (ALPHA, BETA, None, None),
        tuple(planes.get(name, 0).to_bytes(length, "little") for name in names),
    )


def bits(plane: bytes) -> int:
    return int.from_bytes(plane, "little")


@settings(deadline=None)
@given(size=st.integers(1, 1 << 44), marks=st.integers(0, 1 << 64))
def test_map_encoded_and_decoded_is_the_same(size: int, marks: int) -> None:
    length = plane_size(size, region_shift(size))
    mask = (1 << 8 * length) - 1
    original = map_of(size, intent=marks & mask, beta=(marks >> 3) & mask)
    assert DirtyMap.decode(original.encode(), domain=DOMAIN, size=size) == original


@settings(deadline=None)
@given(size=st.integers(1, 1 << 50))
def test_map_of_any_size_is_small_and_covers_the_domain(size: int) -> None:
    shift = region_shift(size)
    assert -(-size >> shift) <= 8 * plane_size(size, shift) <= 8 << 20
    assert bits(full_plane(size, shift)).bit_count() == -(-size >> shift)


@settings(deadline=None)
@given(place=st.integers(0), bit=st.integers(0, 7))
def test_map_with_any_bit_flipped_is_refused(place: int, bit: int) -> None:
    data = bytearray(map_of(intent=5).encode())
    data[place % len(data)] ^= 1 << bit
    with pytest.raises(DirtyMapError):
        DirtyMap.decode(bytes(data), domain=DOMAIN, size=SIZE)


@settings(deadline=None)
@given(length=st.integers(0))
def test_map_cut_short_is_refused(length: int) -> None:
    data = map_of().encode()
    with pytest.raises(DirtyMapError):
        DirtyMap.decode(data[: length % len(data)], domain=DOMAIN, size=SIZE)


def test_map_of_another_domain_or_size_or_with_a_sector_of_another_is_refused() -> None:
    data = map_of(intent=1).encode()
    with pytest.raises(DirtyMapError, match="it is of domain 12345678"):
        DirtyMap.decode(data, domain=ALPHA, size=SIZE)
    with pytest.raises(DirtyMapError, match="it is of domain"):
        DirtyMap.decode(data, domain=DOMAIN, size=SIZE + 4096)
    swapped = data[:SECTOR] + data[2 * SECTOR : 3 * SECTOR] + data[SECTOR : 2 * SECTOR] + data[3 * SECTOR :]
    with pytest.raises(DirtyMapError, match="another one's"):
        DirtyMap.decode(swapped, domain=DOMAIN, size=SIZE)
    foreign = replace(map_of(intent=1), domain=UUID(int=DOMAIN.int ^ 1 << 100)).encode()
    with pytest.raises(DirtyMapError, match="another one's"):
        DirtyMap.decode(data[:SECTOR] + foreign[SECTOR:], domain=DOMAIN, size=SIZE)


def test_session_after_a_crash_gives_the_intent_to_every_leg() -> None:
    legs = [LegContent(ALPHA, True), LegContent(BETA, False)]
    after = renewed(map_of(intent=0b100, beta=0b1), DOMAIN, SIZE, 4, legs, clean=False)
    assert bits(after.plane(ALPHA) or b"") == 0b100
    assert bits(after.plane(BETA) or b"") == 0b101
    assert bits(after.planes[INTENT]) == 0
    assert after.session == 4


def test_session_after_a_clean_end_keeps_only_what_legs_that_were_away_lack() -> None:
    legs = [LegContent(ALPHA, True), LegContent(BETA, False)]
    after = renewed(map_of(intent=0b100, alpha=0b10, beta=0b1), DOMAIN, SIZE, 4, legs, clean=True)
    assert bits(after.plane(ALPHA) or b"") == 0
    assert bits(after.plane(BETA) or b"") == 0b101


def test_session_without_a_map_to_rely_on_takes_legs_to_lack_everything() -> None:
    legs = [LegContent(ALPHA, True), LegContent(BETA, False)]
    full = full_plane(SIZE, region_shift(SIZE))
    after = renewed(None, DOMAIN, SIZE, 1, legs, clean=False)
    assert (after.plane(ALPHA), after.plane(BETA)) == (full, full)
    after = renewed(None, DOMAIN, SIZE, 1, legs, clean=True)
    assert bits(after.plane(ALPHA) or b"\1") == 0
    assert after.plane(BETA) == full


def test_session_takes_a_leg_that_the_map_does_not_know_to_lack_everything() -> None:
    legs = [LegContent(GAMMA, False), LegContent(BETA, False)]
    after = renewed(map_of(beta=0b1), DOMAIN, SIZE, 4, legs, clean=True)
    assert after.plane(GAMMA) == full_plane(SIZE, region_shift(SIZE))
    assert bits(after.plane(BETA) or b"") == 0b1
    assert after.plane(ALPHA) is None
    assert len(after.planes) == PLANES


@settings(deadline=None)
@given(st.sets(st.integers(0, 79)), st.integers(1, 1 << 20))
def test_marked_ranges_are_all_that_is_marked_and_no_more(marked: set[int], tail: int) -> None:
    shift = 20
    size = (79 << shift) + tail
    plane = sum(1 << region for region in marked).to_bytes(plane_size(size, shift), "little")
    ranges = marked_ranges(plane, shift, size)
    assert {
        one >> shift for offset, length in ranges for one in range(offset, offset + length, 1 << shift)
    } == marked
    assert all(offset + length <= size for offset, length in ranges)
    assert all(sum(one) < other[0] for one, other in pairwise(ranges)), "they are not joined"
