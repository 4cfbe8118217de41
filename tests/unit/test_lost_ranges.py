"""What of which disk is lost, given what of the domain a leg lacks."""

from hypothesis import given
from hypothesis import strategies as st

from proxy.extentmap import Range
from proxy.manager.maps import lost_ranges
from proxy.model import LostRange
from proxy.store import DiskRecord

UNIT = 64 * 1024


def test_ranges_of_a_disk_in_pieces_are_where_its_bytes_are() -> None:
    disks = [
        DiskRecord(1, "one", 2 * UNIT, (Range(3 * UNIT, UNIT), Range(0, UNIT)), ready=True),
        DiskRecord(2, "two", UNIT - 512, (Range(UNIT, UNIT),), ready=True),
        DiskRecord(3, "half-made", UNIT, (Range(2 * UNIT, UNIT),), ready=False),
    ]
    assert lost_ranges(disks, [(UNIT // 2, 3 * UNIT)]) == [
        LostRange("one", 0, UNIT // 2),
        LostRange("one", UNIT + UNIT // 2, UNIT // 2),
        LostRange("two", 0, UNIT - 512),
    ]


@given(st.lists(st.integers(0, 31), unique=True), st.sets(st.integers(0, 31)))
def test_every_byte_of_a_disk_is_lost_if_and_only_if_it_is_lacking(
    places: list[int], lacking: set[int]
) -> None:
    ranges = tuple(Range(place * UNIT, UNIT) for place in places)
    disk = DiskRecord(1, "disk1", len(places) * UNIT, ranges, ready=True)
    lost = lost_ranges([disk], [(place * UNIT, UNIT) for place in sorted(lacking)])
    found = {one.offset // UNIT for one in lost}
    assert found == {index for index, place in enumerate(places) if place in lacking}
    assert all(one.length == UNIT for one in lost)
