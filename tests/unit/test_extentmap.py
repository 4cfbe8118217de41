"""The extent map against naive models that keep one entry for every byte."""

from array import array
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.extentmap import EXTENTS_MAX, Extent, ExtentMap, Range, Run, group_map
from proxy.model import Layout, LayoutKind
from proxy.sizes import SIZE_MAX

DEVICES = 3
SLOTS = 12
SLOT = 24

quick = settings(deadline=None, max_examples=150)

#: Where a byte lies: (device, device offset). A naive map is one Place for every mapped byte.
Place = tuple[int, int]

Layouts = st.one_of(
    st.just(Layout(LayoutKind.LINEAR)),
    st.sampled_from([1, 2, 3, 8]).map(lambda chunk: Layout(LayoutKind.STRIPED, chunk)),
)


@st.composite
def runs_for(draw: st.DrawFn, layout: Layout, device_count: int) -> list[Run]:
    """Disjoint runs that suit ``layout``, on devices of ``SLOTS`` slots of ``SLOT`` bytes."""
    slots = st.permutations(range(SLOTS))
    if layout.kind is LayoutKind.LINEAR:
        places = draw(
            st.permutations([(device, slot) for device in range(device_count) for slot in range(SLOTS)])
        )
        count = draw(st.integers(1, 10))
        return [
            Run(device, slot * SLOT + skip, draw(st.integers(1, SLOT - skip)))
            for device, slot in places[:count]
            for skip in [draw(st.sampled_from([0, 0, 1, 5]))]
        ]
    lanes = [draw(slots) for _ in range(device_count)]
    return [
        Run(device, lanes[device][number] * SLOT, length)
        for number in range(draw(st.integers(1, 5)))
        for length in [layout.chunk * draw(st.integers(1, SLOT // layout.chunk))]
        for device in range(device_count)
    ]


@st.composite
def laid_out(draw: st.DrawFn, device_count: int = DEVICES) -> tuple[Layout, list[Run]]:
    layout = draw(Layouts)
    return layout, draw(runs_for(layout, device_count))


@st.composite
def disjoint_ranges(draw: st.DrawFn, size: int) -> list[Range]:
    """Disjoint ranges of ``[0, size)``, in any order."""
    cuts = sorted(draw(st.sets(st.integers(0, size), min_size=2, max_size=12)))
    ranges = [Range(begin, end - begin) for begin, end in pairwise(cuts)]
    return draw(st.permutations(ranges))[: draw(st.integers(1, len(ranges)))]


def naive_places(layout: Layout, device_count: int, runs: list[Run]) -> list[Place]:
    """The definition of the layouts, one byte at a time."""
    lanes = [[(run.device, run.device_offset + byte) for byte in range(run.length)] for run in runs]
    if layout.kind is LayoutKind.LINEAR:
        return [place for lane in lanes for place in lane]
    places = []
    for number in range(0, len(runs), device_count):
        for byte in range(device_count * runs[number].length):
            chunk, inside = divmod(byte, layout.chunk)
            stripe, device = divmod(chunk, device_count)
            places.append(lanes[number + device][stripe * layout.chunk + inside])
    return places


def places_of(extents: ExtentMap | list[Extent]) -> list[Place]:
    return [
        (extent.device, extent.device_offset + byte) for extent in extents for byte in range(extent.length)
    ]


@quick
@given(laid_out())
def test_group_map_any_runs_maps_every_byte_as_naive_model(case: tuple[Layout, list[Run]]) -> None:
    layout, runs = case
    places = naive_places(layout, DEVICES, runs)
    extent_map = group_map(layout, DEVICES, runs)
    assert extent_map.size == len(places) == sum(run.length for run in runs)
    assert places_of(extent_map) == places
    assert len(set(places)) == len(places)


@quick
@given(laid_out())
def test_map_any_runs_is_contiguous_and_merged(case: tuple[Layout, list[Run]]) -> None:
    layout, runs = case
    extents = list(group_map(layout, DEVICES, runs))
    assert extents[0].offset == 0
    for before, after in pairwise(extents):
        assert before.offset + before.length == after.offset
        assert (before.device, before.device_offset + before.length) != (after.device, after.device_offset)


@quick
@given(laid_out(), st.data())
def test_lookup_and_pieces_any_map_equal_naive_model(
    case: tuple[Layout, list[Run]], data: st.DataObject
) -> None:
    layout, runs = case
    extent_map = group_map(layout, DEVICES, runs)
    places = naive_places(layout, DEVICES, runs)
    for offset, place in enumerate(places):
        extent = extent_map.lookup(offset)
        assert (extent.device, extent.device_offset + offset - extent.offset) == place
    offset = data.draw(st.integers(0, extent_map.size))
    length = data.draw(st.integers(0, extent_map.size - offset))
    pieces = list(extent_map.pieces(offset, length))
    assert places_of(pieces) == places[offset : offset + length]
    assert not pieces or pieces[0].offset == offset
    assert all(before.offset + before.length == after.offset for before, after in pairwise(pieces))


@quick
@given(laid_out(), st.data())
def test_compose_any_ranges_equals_naive_composition(
    case: tuple[Layout, list[Run]], data: st.DataObject
) -> None:
    layout, runs = case
    domain_map = group_map(layout, DEVICES, runs)
    places = naive_places(layout, DEVICES, runs)
    ranges = data.draw(disjoint_ranges(domain_map.size))
    expected = [place for offset, length in ranges for place in places[offset : offset + length]]
    assert places_of(domain_map.compose(ranges)) == expected


@quick
@given(laid_out(device_count=3), laid_out(device_count=2), st.data())
def test_rebuild_for_another_geometry_preserves_logical_image(
    old: tuple[Layout, list[Run]], new: tuple[Layout, list[Run]], data: st.DataObject
) -> None:
    old_map, new_map = group_map(old[0], 3, old[1]), group_map(new[0], 2, new[1])
    size = min(old_map.size, new_map.size)
    image = data.draw(st.binary(min_size=size, max_size=size))
    old_devices = [bytearray(SLOTS * SLOT) for _ in range(3)]
    new_devices = [bytearray(SLOTS * SLOT) for _ in range(2)]
    write(old_map, old_devices, 0, image)
    step = data.draw(st.integers(1, 40))
    for offset in range(0, size, step):
        length = min(step, size - offset)
        write(new_map, new_devices, offset, read(old_map, old_devices, offset, length))
    assert read(new_map, new_devices, 0, size) == image


def write(extent_map: ExtentMap, devices: list[bytearray], offset: int, data: bytes) -> None:
    for piece in extent_map.pieces(offset, len(data)):
        end = piece.device_offset + piece.length
        devices[piece.device][piece.device_offset : end] = data[piece.offset - offset :][: piece.length]


def read(extent_map: ExtentMap, devices: list[bytearray], offset: int, length: int) -> bytes:
    return b"".join(
        bytes(devices[piece.device][piece.device_offset : piece.device_offset + piece.length])
        for piece in extent_map.pieces(offset, length)
    )


@quick
@given(laid_out(), st.data())
def test_bytes_any_map_round_trip_and_damage_is_refused(
    case: tuple[Layout, list[Run]], data: st.DataObject
) -> None:
    layout, runs = case
    message = (extent_map := group_map(layout, DEVICES, runs)).to_bytes()
    assert ExtentMap.from_bytes(message) == extent_map
    length = data.draw(st.integers(0, len(message) - 1))
    with pytest.raises(ValueError, match="extent map message"):
        ExtentMap.from_bytes(message[:length])
    with pytest.raises(ValueError, match="extent map message"):
        ExtentMap.from_bytes(message + b"\0")


def test_to_bytes_known_map_is_the_documented_format() -> None:
    message = ExtentMap.linear([Run(1, 512, 16), Run(0, 256, 32)]).to_bytes()
    u64s = (2, 0, 16, 48, 512, 256)
    assert message == b"".join(n.to_bytes(8, "little") for n in u64s) + b"\1\0\0\0" + b"\0\0\0\0"


def test_from_bytes_huge_count_is_refused() -> None:
    with pytest.raises(ValueError, match="extent map message"):
        ExtentMap.from_bytes(b"\xff" * 64)


def test_from_bytes_of_no_map_is_refused() -> None:
    message = bytearray(ExtentMap.linear([Run(0, 0, 16)]).to_bytes())
    message[8] = 1
    with pytest.raises(ValueError, match="begins at 1"):
        ExtentMap.from_bytes(bytes(message))


def test_linear_three_devices_is_three_extents() -> None:
    extent_map = ExtentMap.linear([Run(0, 64, 100), Run(1, 64, 100), Run(2, 64, 50)])
    expected = [Extent(0, 100, 0, 64), Extent(100, 100, 1, 64), Extent(200, 50, 2, 64)]
    assert list(extent_map) == expected
    assert [extent_map[index] for index in range(3)] == expected
    assert extent_map[-1] == expected[-1]
    with pytest.raises(IndexError):
        extent_map[3]
    assert (len(extent_map), extent_map.size) == (3, 250)


def test_striped_two_sets_interleave_by_chunk_in_turn() -> None:
    runs = [Run(0, 0, 8), Run(1, 100, 8), Run(0, 50, 4), Run(1, 50, 4)]
    assert list(ExtentMap.striped(runs, 2, 4)) == [
        Extent(0, 4, 0, 0),
        Extent(4, 4, 1, 100),
        Extent(8, 4, 0, 4),
        Extent(12, 4, 1, 104),
        Extent(16, 4, 0, 50),
        Extent(20, 4, 1, 50),
    ]


def test_striped_one_device_merges_to_its_runs() -> None:
    assert list(ExtentMap.striped([Run(0, 8, 64), Run(0, 80, 8)], 1, 4)) == [
        Extent(0, 64, 0, 8),
        Extent(64, 8, 0, 80),
    ]


def test_equality_same_bytes_cut_differently_is_equal() -> None:
    assert ExtentMap.linear([Run(0, 0, 8), Run(0, 8, 8)]) == ExtentMap.linear([Run(0, 0, 16)])
    assert ExtentMap.linear([Run(0, 0, 16)]) != ExtentMap.linear([Run(1, 0, 16)])


def test_columns_are_what_the_engine_reads() -> None:
    extent_map = ExtentMap.linear([Run(0, 64, 100), Run(2, 32, 50)])
    views = [memoryview(c) for c in (extent_map.offsets, extent_map.devices, extent_map.device_offsets)]
    assert [(view.format, view.itemsize, view.tolist()) for view in views] == [
        ("Q", 8, [0, 100, 150]),
        ("I", 4, [0, 2]),
        ("Q", 8, [64, 32]),
    ]


def test_compose_nothing_is_an_empty_map() -> None:
    empty = ExtentMap.linear([Run(0, 0, 16)]).compose([])
    assert (empty.size, list(empty), list(empty.pieces(0, 0))) == (0, [], [])
    assert ExtentMap.from_bytes(empty.to_bytes()) == empty


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([Range(0, 0)], "no bytes"),
        ([Range(-1, 4)], "out of range"),
        ([Range(0, 17)], "past the end"),
        ([Range(16, 1)], "past the end"),
        ([Range((1 << 64) - 1, 4)], "past the end"),
        ([Range(8, 8), Range(0, 9)], "overlap"),
    ],
)
def test_compose_broken_ranges_are_refused(ranges: list[Range], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExtentMap.linear([Run(0, 0, 16)]).compose(ranges)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([Run(0, 0, 0)], "no bytes"),
        ([Run(0, 8, -8)], "out of range"),
        ([Run(-1, 0, 8)], "out of range"),
        ([Run(0, -8, 8)], "out of range"),
        ([Run(0, 1 << 64, 8)], "out of range"),
        ([Run(0, (1 << 64) - 8, 16)], "largest offset"),
        ([Run(0, SIZE_MAX - 7, 8)], "largest offset"),
        ([Run(0, 0, SIZE_MAX), Run(1, 0, SIZE_MAX)], "largest offset"),
        ([Run(0, 0, 9), Run(1, 0, 8), Run(0, 8, 8)], "overlap"),
        ([Run(0, 0, 100), Run(0, 20, 4), Run(0, 200, 4)], "overlap"),
        ([Run(0, 0, 4), Run(0, 0, 4)], "overlap"),
        ([Run(3, 0, 8)], "device past the 3"),
    ],
)
def test_group_map_broken_linear_runs_are_refused(runs: list[Run], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_map(Layout(LayoutKind.LINEAR), DEVICES, runs)


def test_linear_run_to_the_largest_offset_is_mapped() -> None:
    assert ExtentMap.linear([Run(0, 0, SIZE_MAX)]).lookup(SIZE_MAX - 1).length == SIZE_MAX


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([Run(0, 0, 8)], "stripe sets of 2"),
        ([Run(0, 0, 8), Run(1, 0, 4)], "differ in length"),
        ([Run(0, 0, 6), Run(1, 0, 6)], "whole number"),
        ([Run(1, 0, 8), Run(0, 0, 8)], "in order"),
        ([Run(0, 0, 8), Run(0, 8, 8)], "in order"),
        ([Run(0, (1 << 64) - 4, 8), Run(1, 0, 8)], "largest offset"),
        ([Run(0, 0, 8), Run(1, 0, 8), Run(0, 4, 8), Run(1, 8, 8)], "overlap"),
        ([Run(0, 0, 4 * EXTENTS_MAX), Run(1, 0, 4 * EXTENTS_MAX)], "more extents"),
    ],
)
def test_group_map_broken_stripe_sets_are_refused(runs: list[Run], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_map(Layout(LayoutKind.STRIPED, 4), 2, runs)


@pytest.mark.parametrize(
    ("offsets", "devices", "device_offsets", "message"),
    [
        (array("Q"), array("I"), array("Q"), "columns are for"),
        (array("Q", [0, 8]), array("I", [0, 0]), array("Q", [0]), "columns are for"),
        (array("Q", [0, 8]), array("I", [0]), array("Q"), "columns are for"),
        (array("L", [0, 8]), array("I", [0]), array("Q", [0]), "types"),
        (array("Q", [4, 8]), array("I", [0]), array("Q", [0]), "begins at 4"),
        (array("Q", [0, 8, 8]), array("I", [0, 1]), array("Q", [0, 0]), "without bytes"),
        (array("Q", [0, 8, 4]), array("I", [0, 1]), array("Q", [0, 0]), "out of range"),
        (array("Q", [0, 8]), array("I", [0]), array("Q", [SIZE_MAX]), "largest offset"),
    ],
)
def test_map_broken_columns_are_refused(
    offsets: "array[int]", devices: "array[int]", device_offsets: "array[int]", message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ExtentMap(offsets, devices, device_offsets)


@pytest.mark.parametrize("offset", [-1, 16, 1 << 64])
def test_lookup_outside_is_refused(offset: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        ExtentMap.linear([Run(0, 0, 16)]).lookup(offset)


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, 17), (16, 1), (8, -1), (17, 0)])
def test_pieces_outside_are_refused_at_the_call(offset: int, length: int) -> None:
    with pytest.raises(ValueError, match="are not all in"):
        ExtentMap.linear([Run(0, 0, 16)]).pieces(offset, length)
