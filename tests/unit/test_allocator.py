"""The allocator: nothing overlaps, nothing is wasted, refusals say the arithmetic."""

from itertools import pairwise
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.allocator import (
    allot,
    allot_ranges,
    free_ranges,
    free_runs,
    free_size,
    grow_ranges,
    round_up,
    shrink_ranges,
)
from proxy.errors import RefusedError
from proxy.extentmap import EXTENTS_MAX, Extent, ExtentMap, Range, Run, group_map
from proxy.model import ALLOCATION_UNIT as UNIT
from proxy.model import Device, DeviceId, Group, GroupId, Layout, LayoutKind

LINEAR = Layout(LayoutKind.LINEAR)
STRIPED = Layout(LayoutKind.STRIPED, UNIT)

quick = settings(deadline=None, max_examples=150)


def group_of(layout: Layout, *sizes: int, data_offset: int = UNIT) -> Group:
    """A group whose devices have ``sizes`` bytes after the label."""
    devices = tuple(
        Device(DeviceId(position), UUID(int=position), position, data_offset + size, data_offset, "memory:")
        for position, size in enumerate(sizes)
    )
    return Group(GroupId(1), UUID(int=99), "alpha", layout, devices)


@st.composite
def groups(draw: st.DrawFn) -> Group:
    chunk = draw(st.sampled_from([UNIT // 4, UNIT, 2 * UNIT, 3 * UNIT // 2]))
    layout = draw(st.sampled_from([LINEAR, Layout(LayoutKind.STRIPED, chunk)]))
    sizes = draw(st.lists(st.integers(0, 40 * UNIT), min_size=1, max_size=4))
    return group_of(layout, *sizes, data_offset=draw(st.sampled_from([4096, UNIT, 3 * UNIT + 512])))


def assert_disjoint_and_inside(group: Group, runs: list[Run]) -> None:
    units: set[tuple[int, int]] = set()
    for run in runs:
        device = group.devices[run.device]
        assert run.length > 0
        assert run.device_offset % UNIT == run.length % UNIT == 0
        assert device.data_offset <= run.device_offset
        assert run.device_offset + run.length <= device.size
        run_units = {
            (run.device, unit) for unit in range(run.device_offset, run.device_offset + run.length, UNIT)
        }
        assert not units & run_units
        units |= run_units


@quick
@given(groups(), st.lists(st.tuples(st.booleans(), st.integers(1, 40 * UNIT)), max_size=25))
def test_allot_any_sequence_of_domains_never_overlaps(group: Group, steps: list[tuple[bool, int]]) -> None:
    domains: list[tuple[Run, ...]] = []
    for removes, number in steps:
        taken = [run for runs in domains for run in runs]
        if removes and domains:
            domains.pop(number % len(domains))
        elif number <= free_size(group, taken):
            runs = allot(group, reversed(taken), number)
            assert runs == allot(group, taken, number)
            domains.append(runs)
            assert group_map(group.layout, len(group.devices), runs).size >= number
        else:
            with pytest.raises(RefusedError):
                allot(group, taken, number)
        assert_disjoint_and_inside(group, [run for runs in domains for run in runs])


@quick
@given(groups())
def test_allot_all_that_is_free_leaves_nothing(group: Group) -> None:
    size = free_size(group, ())
    if size:
        runs = allot(group, (), size)
        assert sum(run.length for run in runs) == size
        assert free_size(group, runs) == 0
    with pytest.raises(RefusedError):
        allot(group, (), size + 1)


@quick
@given(groups(), st.lists(st.integers(1, 20 * UNIT), max_size=8), st.data())
def test_free_runs_any_taken_complement_it(group: Group, sizes: list[int], data: st.DataObject) -> None:
    taken: list[Run] = []
    for size in sizes:
        if size <= free_size(group, taken):
            taken += allot(group, taken, size)
    taken = data.draw(st.permutations(taken))[: data.draw(st.integers(0, len(taken)))]
    for device in group.devices:
        here = [run for run in taken if run.device == device.position]
        free = free_runs(device, here)
        assert_disjoint_and_inside(group, [*here, *free])
        usable = max(0, device.size // UNIT * UNIT - round_up(device.data_offset))
        assert sum(run.length for run in [*here, *free]) == usable
        assert all(a.device_offset + a.length < b.device_offset for a, b in pairwise(free))


@quick
@given(
    st.integers(20 * UNIT, 40 * UNIT),
    st.lists(
        st.tuples(st.sampled_from(["create", "grow", "remove"]), st.integers(1, 10 * UNIT)), max_size=25
    ),
)
def test_ranges_any_sequence_of_disks_never_overlaps_nor_moves(
    domain_size: int, steps: list[tuple[str, int]]
) -> None:
    domain_map = ExtentMap.linear([Run(0, 0, round_up(domain_size) + UNIT)])
    disks: list[tuple[Range, ...]] = []
    for action, number in steps:
        index = number % len(disks) if disks else None
        others = [piece for at, disk in enumerate(disks) if at != index for piece in disk]
        if action == "remove" and index is not None:
            del disks[index]
        elif action == "grow" and index is not None:
            held = disks[index]
            space = sum(piece.length for piece in held)
            room = space + sum(piece.length for piece in free_ranges(domain_size, [*others, *held]))
            if number <= room:
                disks[index] = grow_ranges(domain_size, others, held, number)
                assert sum(piece.length for piece in disks[index]) == max(space, round_up(number))
                before, after = domain_map.compose(held), domain_map.compose(disks[index])
                assert after.compose([Range(0, space)]) == before
            else:
                with pytest.raises(RefusedError):
                    grow_ranges(domain_size, others, held, number)
        elif action == "create":
            taken = [piece for disk in disks for piece in disk]
            if number <= sum(piece.length for piece in free_ranges(domain_size, taken)):
                disks.append(allot_ranges(domain_size, taken, number))
                assert sum(piece.length for piece in disks[-1]) == round_up(number)
            else:
                with pytest.raises(RefusedError):
                    allot_ranges(domain_size, taken, number)
        pieces = [piece for disk in disks for piece in disk]
        offsets = [unit for offset, length in pieces for unit in range(offset, offset + length, UNIT)]
        assert len(offsets) == len(set(offsets))
        assert all(offset >= 0 and offset + length <= domain_size for offset, length in pieces)


def test_allot_linear_fills_devices_in_order() -> None:
    group = group_of(LINEAR, 50 * UNIT, 50 * UNIT, 50 * UNIT)
    runs = allot(group, (), 120 * UNIT)
    assert runs == (Run(0, UNIT, 50 * UNIT), Run(1, UNIT, 50 * UNIT), Run(2, UNIT, 20 * UNIT))
    assert len(group_map(LINEAR, 3, runs)) == 3


def test_allot_linear_prefers_the_first_run_that_holds_all() -> None:
    group = group_of(LINEAR, 50 * UNIT, 50 * UNIT)
    assert allot(group, [Run(0, UNIT, 40 * UNIT)], 20 * UNIT) == (Run(1, UNIT, 20 * UNIT),)
    assert allot(group, [Run(0, UNIT, 40 * UNIT)], 10 * UNIT) == (Run(0, 41 * UNIT, 10 * UNIT),)


def test_allot_linear_fragmented_uses_fewest_runs() -> None:
    group = group_of(LINEAR, 40 * UNIT)
    taken = [Run(0, offset * UNIT, UNIT) for offset in (3, 5, 16)]
    assert allot(group, taken, 30 * UNIT) == (Run(0, 6 * UNIT, 10 * UNIT), Run(0, 17 * UNIT, 20 * UNIT))


def test_allot_odd_size_is_rounded_up_to_the_unit() -> None:
    assert allot(group_of(LINEAR, 4 * UNIT), (), UNIT + 1) == (Run(0, UNIT, 2 * UNIT),)


def test_allot_striped_takes_equally_of_every_device() -> None:
    group = group_of(STRIPED, 50 * UNIT, 30 * UNIT)
    assert allot(group, (), 40 * UNIT) == (Run(0, UNIT, 20 * UNIT), Run(1, UNIT, 20 * UNIT))
    assert free_size(group, ()) == 60 * UNIT


def test_allot_striped_fragmented_cuts_stripe_sets_at_every_boundary() -> None:
    group = group_of(STRIPED, 10 * UNIT, 10 * UNIT)
    taken = [Run(0, 5 * UNIT, UNIT), Run(1, 8 * UNIT, UNIT)]
    assert allot(group, taken, 18 * UNIT) == (
        *(Run(0, UNIT, 4 * UNIT), Run(1, UNIT, 4 * UNIT)),
        *(Run(0, 6 * UNIT, 3 * UNIT), Run(1, 5 * UNIT, 3 * UNIT)),
        *(Run(0, 9 * UNIT, 2 * UNIT), Run(1, 9 * UNIT, 2 * UNIT)),
    )


def test_allot_striped_hole_smaller_than_a_chunk_is_not_used() -> None:
    group = group_of(Layout(LayoutKind.STRIPED, 4 * UNIT), 8 * UNIT, 8 * UNIT)
    taken = [Run(0, 4 * UNIT, UNIT)]
    assert allot(group, taken, 1) == (Run(0, 5 * UNIT, 4 * UNIT), Run(1, UNIT, 4 * UNIT))
    assert free_size(group, taken) == 8 * UNIT


def test_allot_too_large_linear_is_refused_with_the_arithmetic() -> None:
    group = group_of(LINEAR, 50 << 20, 49 << 20)
    with pytest.raises(RefusedError) as refusal:
        allot(group, [Run(0, UNIT, 10 << 20)], 150 << 20)
    assert str(refusal.value) == (
        "group alpha (linear) has 89M free for a domain that needs 150M, 61M short "
        "(free: device 0 40M, device 1 49M); ask for less, remove a domain or use a larger group"
    )


def test_allot_too_large_striped_names_what_equal_parts_allow() -> None:
    with pytest.raises(RefusedError) as refusal:
        allot(group_of(STRIPED, 50 << 20, 30 << 20), (), 70 << 20)
    assert str(refusal.value) == (
        "group alpha (striped:64K) has 60M free in equal parts of its devices for a domain that needs 70M, "
        "10M short (free: device 0 50M, device 1 30M); ask for less, remove a domain or use a larger group"
    )


def test_allot_striped_with_too_many_chunks_is_refused() -> None:
    group = group_of(STRIPED, EXTENTS_MAX * UNIT, EXTENTS_MAX * UNIT)
    assert len(allot(group, (), EXTENTS_MAX * UNIT)) == 2
    with pytest.raises(RefusedError, match="larger chunk"):
        allot(group, (), EXTENTS_MAX * UNIT + 1)


def test_allot_device_smaller_than_its_label_has_nothing() -> None:
    device = group_of(LINEAR, 0).devices[0]
    assert free_runs(device, ()) == ()


@pytest.mark.parametrize(
    ("taken", "message"),
    [
        ([Run(0, UNIT, 2 * UNIT), Run(0, 2 * UNIT, UNIT)], "overlap"),
        ([Run(0, 0, UNIT)], "outside"),
        ([Run(0, 4 * UNIT, 2 * UNIT)], "outside"),
        ([Run(0, UNIT, 100)], "whole allocation units"),
        ([Run(0, UNIT + 1, UNIT)], "whole allocation units"),
        ([Run(0, UNIT, 0)], "whole allocation units"),
        ([Run(1, UNIT, UNIT)], "lacks"),
    ],
)
def test_allot_impossible_taken_runs_are_an_error(taken: list[Run], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allot(group_of(LINEAR, 4 * UNIT), taken, UNIT)


def test_free_runs_run_of_another_device_is_an_error() -> None:
    with pytest.raises(ValueError, match="another device"):
        free_runs(group_of(LINEAR, 4 * UNIT).devices[0], [Run(1, UNIT, UNIT)])


@pytest.mark.parametrize("size", [0, -1])
def test_allot_nothing_is_an_error(size: int) -> None:
    with pytest.raises(ValueError, match="a domain of"):
        allot(group_of(LINEAR, 4 * UNIT), (), size)
    with pytest.raises(ValueError, match="a disk of"):
        allot_ranges(4 * UNIT, (), size)


def test_allot_ranges_partial_last_unit_of_domain_is_not_used() -> None:
    assert free_ranges(2 * UNIT + 100, ()) == (Range(0, 2 * UNIT),)


def test_allot_ranges_fragmented_uses_fewest_ranges() -> None:
    taken = [Range(2 * UNIT, UNIT), Range(4 * UNIT, UNIT)]
    assert allot_ranges(10 * UNIT, taken, 2 * UNIT) == (Range(0, 2 * UNIT),)
    assert allot_ranges(10 * UNIT, taken, 7 * UNIT) == (Range(0, 2 * UNIT), Range(5 * UNIT, 5 * UNIT))


def test_allot_ranges_too_large_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(RefusedError) as refusal:
        allot_ranges(100 << 20, [Range(0, 30 << 20)], 80 << 20)
    assert str(refusal.value) == (
        "the domain of 100M has 70M free and the disk needs 80M, 10M short; "
        "ask for less, remove a disk or use a larger domain"
    )


def test_grow_ranges_free_space_behind_extends_in_place() -> None:
    held = (Range(0, UNIT), Range(4 * UNIT, UNIT))
    assert grow_ranges(10 * UNIT, [Range(7 * UNIT, UNIT)], held, 4 * UNIT) == (
        Range(0, UNIT),
        Range(4 * UNIT, 3 * UNIT),
    )
    assert grow_ranges(10 * UNIT, [Range(7 * UNIT, UNIT)], held, 7 * UNIT) == (
        Range(0, UNIT),
        Range(4 * UNIT, 3 * UNIT),
        Range(UNIT, 3 * UNIT),
    )


def test_grow_ranges_more_than_the_space_behind_goes_on_elsewhere() -> None:
    held, taken = (Range(0, UNIT),), [Range(3 * UNIT, UNIT)]
    assert grow_ranges(10 * UNIT, taken, held, 4 * UNIT) == (Range(0, 3 * UNIT), Range(4 * UNIT, UNIT))


def test_shrink_ranges_takes_back_what_growing_gave() -> None:
    held = (Range(3 * UNIT, 2 * UNIT), Range(0, UNIT))
    taken = [Range(6 * UNIT, UNIT)]
    grown = grow_ranges(10 * UNIT, taken, held, 6 * UNIT)
    assert len(grown) > len(held)
    assert shrink_ranges(grown, 3 * UNIT - 1) == held
    assert shrink_ranges(grown, 6 * UNIT) == grown
    assert shrink_ranges(grown, UNIT + 1) == (Range(3 * UNIT, 2 * UNIT),)


def test_grow_ranges_too_large_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(RefusedError) as refusal:
        grow_ranges(100 << 20, [Range(0, 30 << 20)], [Range(30 << 20, 20 << 20)], 80 << 20)
    assert str(refusal.value) == (
        "the domain of 100M has 50M free and the disk needs 60M more, 10M short; "
        "ask for less, remove a disk or use a larger domain"
    )


def test_grow_ranges_size_within_held_space_changes_nothing() -> None:
    held = (Range(0, 2 * UNIT),)
    assert grow_ranges(2 * UNIT, (), held, UNIT + 5) == held


def test_grow_ranges_held_given_as_taken_is_an_error() -> None:
    with pytest.raises(ValueError, match="overlap"):
        grow_ranges(4 * UNIT, [Range(0, UNIT)], [Range(0, UNIT)], 2 * UNIT)


def test_disk_of_a_striped_domain_reaches_the_same_bytes_through_both_maps() -> None:
    group = group_of(STRIPED, 8 * UNIT, 8 * UNIT)
    domain_map = group_map(group.layout, 2, allot(group, (), 8 * UNIT))
    disk = allot_ranges(8 * UNIT, [Range(0, UNIT)], 2 * UNIT)
    assert list(domain_map.compose(disk)) == [
        Extent(0, UNIT, 1, UNIT),
        Extent(UNIT, UNIT, 0, 2 * UNIT),
    ]
