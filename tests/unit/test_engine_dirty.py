"""The dirty bitmap: marked before written, cleared after flushed, and what a leg lacks is always known."""

import errno

from proxy.engine import EventKind, LegRole, OpKind
from proxy.extentmap import Range
from tests.sim.rig import Client, Rig, pattern

KIB = 1024
MIB = 1024 * KIB
REGION = 64 * KIB
SIZE = 16 * REGION
SYNCING = LegRole.SYNCING
#: Longer than a round of clearing.
ROUND_S = 4.1


def rig_of(*legs: int, away: tuple[int, ...] = ()) -> tuple[Rig, Client]:
    """Legs of two devices each, the first one active, with a bitmap."""
    rig = Rig()
    for leg in (*legs, *away):
        rig.add_leg(leg, (SIZE // 2, SIZE // 2)).fill(pattern(SIZE))
    rig.open_bitmap(SIZE)
    rig.install(*legs, away=away)
    rig.engine.release()
    return rig, rig.connect()


def device_writes(rig: Rig) -> int:
    assert rig.bitmap is not None
    return sum(op.kind is OpKind.WRITE and op.fd != rig.bitmap.fd for op in rig.file_ops())


def write_all(rig: Rig, client: Client, offset: int, data: bytes) -> None:
    cookie = client.write(offset, data)
    rig.run()
    assert client.error(cookie) == 0


def test_write_reaches_no_leg_before_its_region_is_marked_durably() -> None:
    rig, client = rig_of(1, 2)
    cookie = client.write(3 * REGION, pattern(4096, 5))
    rig.pump()
    assert device_writes(rig) == 0
    (marking,) = rig.bitmap_ops()
    assert marking.flags  # RWF_DSYNC
    rig.carry_out(marking)
    rig.pump()
    assert rig.marked(0) == {3}
    assert device_writes(rig) == 2
    rig.run()
    assert client.error(cookie) == 0


def test_write_to_a_marked_region_waits_for_nothing() -> None:
    rig, client = rig_of(1, 2)
    write_all(rig, client, 0, pattern(4096, 5))
    client.write(8192, pattern(4096, 6))
    rig.pump()
    assert device_writes(rig) == 2
    assert rig.bitmap_ops() == []


def test_write_across_regions_waits_for_all_of_them() -> None:
    rig, client = rig_of(1, 2)
    write_all(rig, client, 0, pattern(4096, 5))
    cookie = client.write(REGION - 4096, pattern(8192, 6))
    rig.pump()
    assert device_writes(rig) == 0
    rig.run()
    assert client.error(cookie) == 0
    assert rig.marked(0) >= {0, 1}


def test_writes_one_after_the_other_are_marked_ahead() -> None:
    rig, client = rig_of(1, 2)
    write_all(rig, client, 0, pattern(4096, 5))
    assert rig.marked(0) == {0}
    write_all(rig, client, REGION, pattern(4096, 5))
    assert rig.marked(0) == set(range(16))


def test_writes_that_come_while_the_bitmap_is_written_are_marked_together_next() -> None:
    rig, client = rig_of(1, 2)
    for region in range(0, 8, 2):
        client.write(region * REGION, pattern(4096, region + 1))
        rig.pump()
    (first,) = rig.bitmap_ops()
    rig.carry_out(first)
    rig.pump()
    assert rig.marked(0) == {0}
    assert device_writes(rig) == 2
    (second,) = rig.bitmap_ops()
    rig.carry_out(second)
    rig.pump()
    assert rig.marked(0) == {0, 2, 4, 6}
    assert device_writes(rig) == 8


def test_zeroing_of_a_whole_disk_marks_all_of_it() -> None:
    rig, client = rig_of(1, 2)
    cookie = client.zero(0, SIZE)
    rig.run()
    assert client.error(cookie) == 0
    assert rig.marked(0) == set(range(16))


def test_disk_elsewhere_in_the_domain_is_marked_where_it_lies() -> None:
    rig, _ = rig_of(1, 2)
    rig.install(1, 2, disks=[(0, Range(0, 4 * REGION)), (1, Range(9 * REGION, 7 * REGION))])
    write_all(rig, rig.connect(1), REGION, pattern(4096, 5))
    assert rig.marked(0) == {10}


def test_domain_of_one_leg_marks_nothing() -> None:
    rig = Rig()
    rig.add_leg(1, (SIZE,))
    rig.install(1)
    rig.open_bitmap(SIZE)
    rig.engine.release()
    client = rig.connect()
    client.write(0, pattern(4096, 5))
    rig.pump()
    assert rig.bitmap_ops() == []
    assert device_writes(rig) == 1


def test_domain_of_one_leg_outlives_a_round_while_it_is_written_to() -> None:
    rig = Rig()
    rig.add_leg(1, (SIZE,))
    rig.install(1)  # before there is a bitmap: without tracking
    rig.open_bitmap(SIZE)
    rig.engine.release()
    client = rig.connect()
    cookie = client.write(0, pattern(4096, 5))
    rig.pass_time(ROUND_S)
    rig.run()
    assert client.error(cookie) == 0


def test_writer_that_is_marked_while_the_domain_holds_waits_for_the_release() -> None:
    rig, client = rig_of(1, 2)
    cookie = client.write(0, pattern(4096, 5))
    rig.pump()
    rig.engine.hold()
    rig.run()
    assert rig.marked(0) == {0}
    assert rig.take_events(EventKind.DRAINED)
    assert client.error(cookie) is None and device_writes(rig) == 0
    rig.engine.release()
    rig.run()
    assert client.error(cookie) == 0


def test_read_of_what_waits_to_be_marked_sees_it_afterwards() -> None:
    rig, client = rig_of(1, 2)
    client.write(0, pattern(4096, 5))
    read = client.read(0, 4096)
    rig.pump()
    assert rig.file_ops(kind=OpKind.READ) == []
    rig.run()
    assert client.replies[read].payload == pattern(4096, 5)


# --- Rounds ---------------------------------------------------------------------------------------


def pass_rounds(rig: Rig, count: int) -> None:
    for _ in range(count):
        rig.pass_time(ROUND_S)
        rig.run()


def test_quiet_region_is_cleared_after_a_flush_of_every_leg() -> None:
    rig, client = rig_of(1, 2)
    write_all(rig, client, 0, pattern(4096, 5))
    pass_rounds(rig, 1)
    assert rig.marked(0) == {0}
    for _ in range(2):
        rig.pass_time(ROUND_S)
    syncs = rig.file_ops(kind=OpKind.SYNC)
    assert {op.fd for op in syncs} == {device.fd for leg in (1, 2) for device in rig.legs[leg].devices}
    assert rig.marked(0) == {0}
    rig.run()
    assert rig.marked(0) == set()
    assert rig.engine.dirty_bytes(2, away=True) == 0


def test_region_written_to_again_stays_marked() -> None:
    rig, client = rig_of(1, 2)
    for _ in range(5):
        write_all(rig, client, 0, pattern(4096, 5))
        pass_rounds(rig, 1)
    assert rig.marked(0) == {0}


def test_region_written_to_during_the_flush_of_its_round_stays_marked() -> None:
    rig, client = rig_of(1, 2)
    write_all(rig, client, 0, pattern(4096, 5))
    pass_rounds(rig, 1)
    rig.pass_time(ROUND_S)
    rig.pass_time(ROUND_S)
    assert rig.file_ops(kind=OpKind.SYNC)
    client.write(0, pattern(4096, 6))
    rig.run()
    assert rig.marked(0) == {0}


def test_region_of_a_write_that_is_slow_for_rounds_stays_marked() -> None:
    rig, client = rig_of(1, 2)
    client.write(0, pattern(4096, 5))
    rig.pump()
    rig.carry_out(rig.bitmap_ops()[0])
    rig.pump()
    for _ in range(4):
        rig.pass_time(ROUND_S)
        for op in rig.file_ops(kind=OpKind.SYNC):
            rig.carry_out(op)
        rig.pump()
    assert rig.marked(0) == {0}


def test_region_whose_flush_fails_stays_marked() -> None:
    rig, client = rig_of(1, 2)
    write_all(rig, client, 0, pattern(4096, 5))
    pass_rounds(rig, 1)
    rig.pass_time(ROUND_S)
    rig.pass_time(ROUND_S)
    rig.fail(rig.file_ops(2, kind=OpKind.SYNC)[0])
    for op in rig.file_ops(kind=OpKind.SYNC):
        if op.fd != rig.legs[2].devices[0].fd:
            rig.carry_out(op)
    rig.pump()
    assert rig.marked(0) == {0}
    rig.engine.hold()
    rig.engine.fence_leg(2)
    rig.install(1, away=(2,))
    rig.engine.release()
    rig.run()
    assert rig.marked(0) | rig.marked(2) == {0}


def test_mark_that_a_leg_lacks_is_in_its_plane_before_it_is_cleared() -> None:
    rig, client = rig_of(1, away=(2,))
    write_all(rig, client, 5 * REGION, pattern(4096, 5))
    pass_rounds(rig, 1)
    rig.pass_time(ROUND_S)
    rig.pass_time(ROUND_S)
    for _ in range(6):
        for op in rig.file_ops():
            rig.carry_out(op)
            rig.pump()
            assert rig.marked(0) | rig.marked(2) == {5}
        rig.pass_time(0.2)
    assert rig.marked(0) == set()
    assert rig.marked(2) == {5}
    assert rig.engine.dirty_bytes(2, away=True) == REGION


# --- Legs that come back ----------------------------------------------------------------------------


def lose(rig: Rig, leg: int, *left: int) -> None:
    rig.engine.hold()
    rig.engine.fence_leg(leg)
    rig.pump()
    rig.install(*left, away=(leg,))
    rig.engine.release()
    rig.run()


def bring_back(rig: Rig, leg: int, *others: int) -> Rig:
    """Open the leg's devices again, and copy to it what it lacks."""
    old = rig.legs[leg]
    rig.engine.close_leg(leg)
    rig.pump()
    fresh = rig.add_leg(leg, (SIZE // 2, SIZE // 2))
    fresh.fill(old.read(0, SIZE))
    rig.install(*others, (leg, SYNCING))
    return rig


def test_leg_that_comes_back_is_given_what_it_lacks_and_nothing_else() -> None:
    rig, client = rig_of(1, 2)
    write_all(rig, client, 0, pattern(4096, 5))
    pass_rounds(rig, 3)  # region 0 is on both, durably
    lose(rig, 2, 1)
    write_all(rig, client, 4 * REGION, pattern(4096, 6))
    write_all(rig, client, 9 * REGION - 4096, pattern(8192, 7))
    pass_rounds(rig, 2)
    write_all(rig, client, 12 * REGION, pattern(4096, 8))
    bring_back(rig, 2, 1)
    rig.engine.copy_leg(2, [(0, 0, SIZE)])
    assert rig.engine.copy_progress(2) == (0, 4 * REGION)
    rig.run()
    (event,) = rig.take_events(EventKind.COPIED)
    assert (event.leg, event.code, event.a) == (2, 0, 4 * REGION)
    assert rig.legs[2].read(0, SIZE) == rig.legs[1].read(0, SIZE)
    assert rig.marked(2) == set()


def test_write_in_flight_when_a_leg_was_lost_is_among_what_it_lacks() -> None:
    rig, client = rig_of(1, 2)
    cookie = client.write(6 * REGION, pattern(4096, 5))
    rig.pump()
    rig.carry_out(rig.bitmap_ops()[0])
    rig.pump()
    rig.carry_out_all(1, kind=OpKind.WRITE)
    rig.fail(rig.file_ops(2, kind=OpKind.WRITE)[0])
    rig.pump()
    lose(rig, 2, 1)
    assert client.error(cookie) == 0
    bring_back(rig, 2, 1)
    assert rig.engine.dirty_bytes(2, away=False) == REGION
    rig.engine.copy_leg(2, [(0, 0, SIZE)])
    rig.run()
    assert rig.legs[2].read(0, SIZE) == rig.legs[1].read(0, SIZE)


def test_copy_that_is_cut_short_leaves_what_was_not_flushed_among_what_the_leg_lacks() -> None:
    rig, client = rig_of(1, 2)
    lose(rig, 2, 1)
    for region in (1, 5, 11):
        write_all(rig, client, region * REGION, pattern(4096, 5))
    bring_back(rig, 2, 1)
    rig.engine.copy_leg(2, [(0, 0, SIZE)])
    rig.pump()
    for op in rig.file_ops(kind=OpKind.READ):
        rig.carry_out(op)
    rig.pump()
    lose(rig, 2, 1)
    assert rig.marked(2) | rig.marked(0) >= {1, 5, 11}


def test_copy_in_steps_smaller_than_a_region_keeps_its_progress() -> None:
    rig, client = rig_of(1, 2)
    lose(rig, 2, 1)
    for region in (1, 5, 11):
        write_all(rig, client, region * REGION, pattern(4096, 5))
    bring_back(rig, 2, 1)
    step = REGION // 4
    rig.engine.copy_leg(2, [(0, offset, step) for offset in range(0, 12 * REGION - step, step)])
    rig.run()
    rig.engine.copy_leg(2, [(0, 0, SIZE)])
    rig.run()
    assert rig.marked(2) == set()
    assert rig.legs[2].read(0, SIZE) == rig.legs[1].read(0, SIZE)


def test_leg_of_which_nothing_is_known_is_given_everything() -> None:
    rig, _ = rig_of(1, away=(2,))
    rig.engine.fill_plane(2)
    rig.run()
    assert rig.marked(2) == set(range(16))
    bring_back(rig, 2, 1)
    rig.engine.copy_leg(2, [(0, 0, SIZE)])
    assert rig.engine.copy_progress(2) == (0, SIZE)


def test_two_disks_are_copied_where_they_are_marked() -> None:
    rig, _ = rig_of(1, 2)
    disks = [(0, Range(0, 4 * REGION)), (1, Range(8 * REGION, 8 * REGION))]
    rig.install(1, disks=disks, away=(2,))
    write_all(rig, rig.connect(0), REGION, pattern(4096, 5))
    write_all(rig, rig.connect(1), 3 * REGION, pattern(4096, 6))
    rig.install(1, (2, SYNCING), disks=disks)
    rig.engine.copy_leg(2, [(0, 0, 4 * REGION), (1, 0, 8 * REGION)])
    assert rig.engine.copy_progress(2) == (0, 2 * REGION)
    rig.run()
    assert rig.legs[2].read(0, SIZE) == rig.legs[1].read(0, SIZE)


def test_mark_is_cleared_only_after_a_leg_that_came_back_has_it_in_its_plane() -> None:
    rig, client = rig_of(1, away=(2,))
    write_all(rig, client, 5 * REGION, pattern(4096, 5))
    write_all(rig, client, 9 * REGION, pattern(4096, 5))
    client.write(12 * REGION, pattern(4096, 6))
    rig.pump()  # the bitmap's disk is slow with this mark
    old = rig.legs[2]
    rig.engine.close_leg(2)
    rig.pump()
    rig.add_leg(2, (SIZE // 2, SIZE // 2)).fill(old.read(0, SIZE))
    rig.install(1, (2, SYNCING))
    for _ in range(4):
        rig.pass_time(ROUND_S)
        for op in rig.file_ops(kind=OpKind.SYNC):
            rig.carry_out(op)
        rig.pump()
    while rig.bitmap_ops():
        rig.carry_out(rig.bitmap_ops()[0])
        assert rig.marked(0) | rig.marked(2) >= {5, 9}
        rig.pump()


def test_what_a_returned_active_leg_may_have_lost_is_among_what_a_copied_leg_lacks() -> None:
    rig, client = rig_of(1, 2)
    lose(rig, 2, 1)
    bring_back(rig, 2, 1)
    rig.engine.copy_leg(2, [(0, 0, SIZE)])
    rig.run()
    before = rig.legs[1].read(0, SIZE)
    write_all(rig, client, 5 * REGION, pattern(4096, 5))  # on both legs, and not flushed
    rig.engine.hold()
    rig.engine.close_leg(1)
    rig.pump()
    rig.add_leg(4, (SIZE // 2, SIZE // 2)).fill(before)  # leg 1 again, whose power was cut
    rig.install(4, (2, SYNCING))
    rig.engine.release()
    rig.run()
    pass_rounds(rig, 3)
    assert rig.marked(0) | rig.marked(2) >= {5}


# --- The bitmap's own disk --------------------------------------------------------------------------


def test_bitmap_that_cannot_be_written_is_told_and_tried_again_and_nothing_is_written_meanwhile() -> None:
    rig, client = rig_of(1, 2)
    cookie = client.write(0, pattern(4096, 5))
    rig.pump()
    rig.fail(rig.bitmap_ops()[0], errno.ENOSPC)
    rig.pump()
    (event,) = rig.take_events(EventKind.BITMAP_FAILED)
    assert event.code == errno.ENOSPC
    assert device_writes(rig) == 0 and rig.bitmap_ops() == []
    rig.pass_time(0.6)
    rig.run()
    assert client.error(cookie) == 0
    (event,) = rig.take_events(EventKind.BITMAP_FAILED)
    assert event.code == 0


def test_bitmap_that_is_not_written_in_time_is_told() -> None:
    rig, client = rig_of(1, 2)
    cookie = client.write(0, pattern(4096, 5))
    rig.pass_time(1.2)
    assert [event.code for event in rig.take_events(EventKind.BITMAP_FAILED)] == [errno.ETIMEDOUT]
    rig.run()
    assert client.error(cookie) == 0
    assert [event.code for event in rig.take_events(EventKind.BITMAP_FAILED)] == [0]


def test_bitmap_that_cannot_be_written_does_not_keep_marked_regions_waiting() -> None:
    rig, client = rig_of(1, 2)
    write_all(rig, client, 0, pattern(4096, 5))
    client.write(REGION, pattern(4096, 6))
    rig.pump()
    rig.fail(rig.bitmap_ops()[0], errno.EIO)
    cookie = client.write(4096, pattern(4096, 7))
    rig.run()
    assert client.error(cookie) == 0


# --- Pace -----------------------------------------------------------------------------------------


def test_copy_yields_to_a_client_at_work_and_goes_on_at_its_floor() -> None:
    rig, client = rig_of(1, 2)
    rig.install(1, (2, SYNCING))
    rig.engine.fill_plane(2)
    rig.run()
    rig.engine.pace_copies(rate=0, floor=MIB)
    client.read(0, 4096)
    rig.run()
    rig.engine.copy_leg(2, [(0, 0, SIZE)])
    rig.pump()
    assert sum(op.length for op in rig.file_ops(kind=OpKind.READ)) == 64 * KIB
    rig.run()
    assert rig.engine.copy_progress(2) == (64 * KIB, SIZE)
    client.read(0, 4096)
    rig.pass_time(0.01)
    rig.run()
    assert rig.engine.copy_progress(2) == (64 * KIB, SIZE)
    rig.pass_time(0.06)
    rig.run()
    assert rig.engine.copy_progress(2) is None  # the client is gone, and the copy goes on as it can


def test_copy_keeps_to_its_rate_when_nobody_else_is_at_work() -> None:
    rig, _ = rig_of(1, 2)
    rig.install(1, (2, SYNCING))
    rig.engine.fill_plane(2)
    rig.run()
    rig.engine.pace_copies(rate=MIB, floor=0)
    rig.engine.copy_leg(2, [(0, 0, SIZE)])
    rig.run()
    assert rig.engine.copy_progress(2) == (512 * KIB, SIZE)
    rig.pass_time(0.6)
    rig.run()
    assert rig.take_events(EventKind.COPIED)


def test_round_over_a_map_without_marks_leaves_a_write_under_way_alone() -> None:
    rig = Rig()
    leg = rig.add_leg(1, [SIZE])
    rig.open_bitmap(SIZE)
    rig.engine.install(1, [(1, LegRole.ACTIVE)], [(0, SIZE, [leg.map])])
    rig.engine.release()
    client = rig.connect()
    cookie = client.write(0, pattern(4096))
    rig.pump()
    rig.pass_time(ROUND_S)
    rig.run()
    assert client.replies[cookie].error == 0
