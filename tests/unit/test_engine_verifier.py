"""Comparing the legs while clients go on: every difference found, and none that is not there."""

import errno
import os

import pytest

from proxy.engine import EventKind, LegRole, Mismatch, OpKind, PendingOp, VerifyReport
from proxy.extentmap import Range
from tests.sim.rig import Rig, pattern

KIB = 1024
MIB = 1024 * KIB
SIZE = 64 * KIB
ALL = [(0, 0, SIZE)]


def rig_of_legs(*legs: int | tuple[int, LegRole], size: int = SIZE) -> Rig:
    """Legs of one content and of different geometries, the first one active."""
    rig = Rig()
    for place, leg in enumerate(legs):
        number = leg if isinstance(leg, int) else leg[0]
        rig.add_leg(number, (size,) if place else (size // 2, size // 2)).fill(pattern(size))
    rig.start(*legs)
    return rig


def ended(rig: Rig) -> VerifyReport:
    """What the verify that has just ended has found."""
    (event,) = rig.take_events(EventKind.VERIFIED)
    report = rig.engine.verify_report()
    assert report is not None and not report.running
    assert (event.code, event.a, event.b) == (report.error_number, report.compared, report.mismatched)
    assert rig.engine.statistics().memory_bytes == 0
    return report


def clean(total: int = SIZE, *, repair: bool = False) -> VerifyReport:
    return VerifyReport(False, 0, repair, total, total, 0, 0, 0, 0, ())


def goes_on(rig: Rig) -> bool:
    report = rig.engine.verify_report()
    return report is not None and report.running


def failover(rig: Rig, lost: int, *left: int) -> None:
    """What the manager has done when a leg is lost."""
    rig.engine.hold()
    rig.engine.fence_leg(lost)
    for leg in left:
        rig.run_leg(leg)
    assert rig.take_events(EventKind.DRAINED)
    rig.install(*left)
    rig.engine.release()


# --- What it finds --------------------------------------------------------------------------------


def test_verify_of_equal_legs_finds_nothing_and_writes_nothing() -> None:
    rig = rig_of_legs(1, 2, 3)
    assert rig.engine.verify_report() is None
    rig.engine.verify(ALL)
    rig.run()
    assert ended(rig) == clean()
    assert [device.writes for leg in (1, 2, 3) for device in rig.engine.device_statistics(leg)] == [0] * 4


def test_verify_finds_each_difference_by_leg_and_block() -> None:
    rig = rig_of_legs(1, 2, 3)
    rig.legs[2].fill(b"\x00", 5000)
    rig.legs[2].fill(b"\x00", 8 * KIB)
    rig.legs[3].fill(b"\x00", SIZE - 1)
    rig.engine.verify(ALL)
    rig.run()
    report = ended(rig)
    assert report.mismatches == (Mismatch(2, 0, 4 * KIB, 8 * KIB), Mismatch(3, 0, 60 * KIB, 4 * KIB))
    assert (report.compared, report.mismatched, report.repaired) == (SIZE, 12 * KIB, 0)
    assert rig.legs[2].read(5000, 1) == b"\x00"


def test_difference_over_the_border_of_two_steps_is_one_range() -> None:
    rig = rig_of_legs(1, 2, size=MIB)
    rig.legs[2].fill(bytes(16 * KIB), 248 * KIB)
    rig.engine.verify([(0, 0, MIB)])
    rig.pump()
    for op in reversed(rig.file_ops()):
        rig.carry_out(op)
    rig.run()
    assert ended(rig).mismatches == (Mismatch(2, 0, 248 * KIB, 16 * KIB),)


def test_verify_is_of_the_ranges_asked_for() -> None:
    rig = rig_of_legs(1, 2)
    rig.legs[2].fill(bytes(SIZE))
    rig.engine.verify([(0, 4 * KIB, 4 * KIB), (0, 32 * KIB, 8 * KIB)])
    rig.run()
    report = ended(rig)
    assert report.mismatches == (Mismatch(2, 0, 4 * KIB, 4 * KIB), Mismatch(2, 0, 32 * KIB, 8 * KIB))
    assert (report.total, report.compared) == (12 * KIB, 12 * KIB)


def test_ranges_beyond_those_listed_are_counted() -> None:
    size = 16 * MIB
    rig = rig_of_legs(1, 2, size=size)
    for offset in range(0, size, 8 * KIB):
        rig.legs[2].fill(b"\x00", offset)
    rig.engine.verify([(0, 0, size)])
    rig.run()
    report = ended(rig)
    assert len(report.mismatches) == 1000
    assert report.mismatched == size // 2
    assert report.unlisted == size // 2 - 1000 * 4 * KIB


def test_leg_that_is_syncing_is_not_compared() -> None:
    rig = rig_of_legs(1, 2, (3, LegRole.SYNCING))
    rig.legs[3].fill(bytes(SIZE))
    rig.engine.verify(ALL)
    rig.run()
    assert ended(rig) == clean()


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("legs", [(1,), (1, (2, LegRole.SYNCING))])
def test_verify_without_an_uptodate_backup_is_refused(legs: tuple[int | tuple[int, LegRole], ...]) -> None:
    rig = rig_of_legs(*legs)
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        rig.engine.verify(ALL)


def test_second_verify_at_once_is_refused_and_a_later_one_is_not() -> None:
    rig = rig_of_legs(1, 2)
    rig.engine.verify(ALL)
    with pytest.raises(OSError, match=os.strerror(errno.EBUSY)):
        rig.engine.verify(ALL)
    rig.run()
    assert ended(rig) == clean()
    rig.engine.verify(ALL)
    rig.run()
    assert ended(rig) == clean()


@pytest.mark.parametrize("bad", [(0, 1, 4096), (0, 0, 100), (0, 0, 0)])
def test_range_that_is_not_of_whole_blocks_is_refused(bad: tuple[int, int, int]) -> None:
    rig = rig_of_legs(1, 2)
    with pytest.raises(ValueError, match="whole blocks"):
        rig.engine.verify([bad])
    assert rig.engine.verify_report() is None


# --- Clients meanwhile ----------------------------------------------------------------------------


def test_write_under_way_is_no_false_alarm() -> None:
    rig = rig_of_legs(1, 2)
    (client,) = rig.clients
    write = client.write(8 * KIB, pattern(4 * KIB, 5))
    rig.pump()
    rig.carry_out_all(1)  # on one leg, and not yet on the other
    rig.engine.verify(ALL)
    rig.pump()
    assert rig.file_ops(kind=OpKind.READ) == []
    rig.run()
    assert client.error(write) == 0
    assert ended(rig) == clean()


def test_write_waits_for_the_step_under_way_and_reads_do_not() -> None:
    rig = rig_of_legs(1, 2)
    (client,) = rig.clients
    rig.engine.verify(ALL)
    rig.pump()
    write = client.write(8 * KIB, pattern(4 * KIB, 5))
    rig.pump()
    assert rig.file_ops(kind=OpKind.WRITE) == []
    rig.run()
    assert client.error(write) == 0
    assert ended(rig) == clean()
    rig.engine.verify(ALL)
    rig.pump()
    read = client.read(8 * KIB, 4 * KIB)
    rig.pump()
    rig.carry_out(rig.file_ops(1)[-1])
    rig.pump()
    assert client.replies[read].payload == pattern(4 * KIB, 5)
    rig.run()
    assert ended(rig) == clean()


def test_verify_is_bounded_in_flight() -> None:
    rig = rig_of_legs(1, 2, size=16 * MIB)
    rig.engine.verify([(0, 0, 16 * MIB)])
    most = 0
    while goes_on(rig):
        rig.pump()
        most = max(most, rig.engine.statistics().memory_bytes)
        for op in rig.file_ops()[:1]:
            rig.carry_out(op)
    assert most <= 2 * MIB
    assert ended(rig) == clean(16 * MIB)


def test_rate_is_kept_to() -> None:
    rig = rig_of_legs(1, 2, size=4 * MIB)
    began_ns = rig.engine.now_ns
    rig.engine.verify([(0, 0, 4 * MIB)], rate=MIB)
    while goes_on(rig):
        rig.run()
        rig.engine.now_ns += 10_000_000
        report = rig.engine.verify_report()
        assert report is not None
        elapsed_s = (rig.engine.now_ns - began_ns) / 1e9
        assert report.compared <= MIB * elapsed_s + 512 * KIB
    assert 3.5 <= elapsed_s <= 4.2
    assert ended(rig) == clean(4 * MIB)


def test_what_a_rate_has_missed_is_not_made_good_at_once() -> None:
    rig = rig_of_legs(1, 2, size=4 * MIB)
    rig.engine.verify([(0, 0, 4 * MIB)], rate=MIB)
    rig.engine.hold()
    rig.engine.now_ns += 3_000_000_000
    rig.engine.release()
    rig.run()
    report = rig.engine.verify_report()
    assert report is not None and report.compared <= 512 * KIB


# --- Repair ---------------------------------------------------------------------------------------


def test_repair_makes_the_backup_equal_and_durable_before_it_says_so() -> None:
    rig = rig_of_legs(1, 2, 3)
    rig.legs[2].fill(bytes(8 * KIB), 4 * KIB)
    rig.legs[3].fill(bytes(100), 40 * KIB)
    rig.engine.verify(ALL, repair=True)
    while not rig.file_ops(kind=OpKind.SYNC):
        rig.pump()
        for op in rig.file_ops():
            if op.kind is not OpKind.SYNC:
                rig.carry_out(op)
    assert rig.take_events(EventKind.VERIFIED) == []
    rig.run()
    report = ended(rig)
    assert report.mismatches == (Mismatch(2, 0, 4 * KIB, 8 * KIB), Mismatch(3, 0, 40 * KIB, 4 * KIB))
    assert (report.mismatched, report.repaired, report.compared) == (12 * KIB, 12 * KIB, SIZE)
    for leg in (2, 3):
        assert rig.legs[leg].read(0, SIZE) == pattern(SIZE)
        medium = rig.legs[leg].devices[0].medium
        assert medium.durable == medium.content
    assert [device.writes for device in rig.engine.device_statistics(1)] == [0, 0]
    assert [device.written_bytes for device in rig.engine.device_statistics(2)] == [8 * KIB]


def test_repair_of_equal_legs_is_only_a_comparison() -> None:
    rig = rig_of_legs(1, 2)
    rig.engine.verify(ALL, repair=True)
    rig.run()
    assert ended(rig) == clean(repair=True)
    assert [device.writes + device.flushes for device in rig.engine.device_statistics(2)] == [0]


def test_repair_puts_nothing_old_over_what_a_client_writes_meanwhile() -> None:
    rig = rig_of_legs(1, 2)
    (client,) = rig.clients
    rig.legs[2].fill(bytes(SIZE))
    rig.engine.verify(ALL, repair=True)
    rig.pump()
    first = client.write(0, pattern(4 * KIB, 5))
    rig.pump()
    while not rig.file_ops(kind=OpKind.WRITE):
        rig.carry_out(rig.file_ops()[0])
        rig.pump()
    second = client.write(4 * KIB, pattern(4 * KIB, 6))
    rig.run()
    assert client.error(first) == client.error(second) == 0
    assert rig.legs[1].read(0, SIZE) == rig.legs[2].read(0, SIZE)
    assert rig.legs[1].read(0, 8 * KIB) == pattern(4 * KIB, 5) + pattern(4 * KIB, 6)
    # The write that came first made its block equal before the repair had its turn.
    assert ended(rig).repaired == SIZE - 4 * KIB


def test_device_that_does_not_keep_what_it_is_given_is_not_said_to_be_repaired() -> None:
    rig = rig_of_legs(1, 2)
    rig.legs[2].fill(bytes(4 * KIB))
    rig.engine.verify(ALL, repair=True)
    rig.pump()
    while not rig.file_ops(kind=OpKind.WRITE):
        rig.carry_out(rig.file_ops()[0])
        rig.pump()
    rig.engine.complete(rig.op(2).number, 4 * KIB)
    rig.run()
    report = ended(rig)
    assert (report.mismatched, report.repaired) == (4 * KIB, 0)


def test_repair_whose_write_fails_is_evidence_and_ends_it() -> None:
    rig = rig_of_legs(1, 2, 3)
    rig.legs[2].fill(bytes(4 * KIB))
    rig.engine.verify(ALL, repair=True)
    rig.pump()
    while not rig.file_ops(kind=OpKind.WRITE):
        rig.carry_out(rig.file_ops()[0])
        rig.pump()
    rig.fail(rig.op(2))
    rig.pump()
    assert [event.leg for event in rig.take_events(EventKind.DEVICE_ERROR)] == [2]
    failover(rig, 2, 1, 3)
    rig.run()
    assert ended(rig).error_number == errno.ESTALE


# --- What goes wrong in the middle ----------------------------------------------------------------


@pytest.mark.parametrize("steps", range(4))
@pytest.mark.parametrize("lost", [1, 2])
def test_leg_lost_in_the_middle_ends_it_without_a_false_alarm(lost: int, steps: int) -> None:
    rig = rig_of_legs(1, 2, 3, size=MIB)
    rig.engine.verify([(0, 0, MIB)])
    rig.pump()
    for _ in range(steps):
        rig.carry_out(rig.file_ops()[0])
        rig.pump()
    late = rig.file_ops(lost)
    failover(rig, lost, *({1, 2, 3} - {lost}))
    for op in late:
        rig.fail(op, errno.EIO, b"\xee" * op.length)
    rig.run()
    report = ended(rig)
    assert (report.error_number, report.mismatched) == (errno.ESTALE, 0)


def test_ordered_failover_between_the_same_legs_ends_it() -> None:
    rig = rig_of_legs(1, 2)
    rig.engine.verify(ALL)
    rig.pump()
    rig.install(2, 1)
    rig.run()
    assert ended(rig).error_number == errno.ESTALE


def test_map_with_the_same_legs_and_another_disk_or_leg_goes_on() -> None:
    rig = rig_of_legs(1, 2, size=MIB)
    rig.engine.verify([(0, 0, MIB)])
    rig.pump()
    rig.add_leg(3, (MIB,))
    rig.install(1, 2, (3, LegRole.SYNCING))
    rig.run()
    assert ended(rig) == clean(MIB)


def test_disk_removed_in_the_middle_is_left_out() -> None:
    rig = rig_of_legs(1, 2, size=4 * MIB)
    halves = [(0, Range(0, 2 * MIB)), (1, Range(2 * MIB, 2 * MIB))]
    rig.install(1, 2, disks=halves)
    rig.engine.verify([(0, 0, 2 * MIB), (1, 0, 2 * MIB)])
    rig.pump()
    rig.install(1, 2, disks=halves[:1])
    rig.run()
    assert ended(rig) == clean(2 * MIB)


def test_hold_in_the_middle_lets_it_go_on_after_the_release() -> None:
    rig = rig_of_legs(1, 2, size=4 * MIB)
    rig.engine.verify([(0, 0, 4 * MIB)])
    rig.pump()
    rig.engine.hold()
    rig.run()
    assert rig.take_events(EventKind.DRAINED)
    report = rig.engine.verify_report()
    assert report is not None and report.running and report.compared == MIB
    rig.engine.release()
    rig.run()
    assert ended(rig) == clean(4 * MIB)


@pytest.mark.parametrize("held", [False, True])
def test_stop_ends_it_as_told(held: bool) -> None:
    rig = rig_of_legs(1, 2, size=4 * MIB)
    rig.engine.stop_verify()
    rig.engine.verify([(0, 0, 4 * MIB)])
    rig.pump()
    if held:
        rig.engine.hold()
    rig.engine.stop_verify()
    rig.run()
    report = ended(rig)
    assert (report.error_number, report.compared, report.mismatched) == (errno.ECANCELED, MIB, 0)
    rig.engine.stop_verify()
    rig.run()
    assert rig.take_events(EventKind.VERIFIED) == []


def test_bad_block_of_the_active_leg_is_repaired_and_told_apart_from_a_mismatch() -> None:
    rig = rig_of_legs(1, 2)
    rig.engine.verify(ALL)
    rig.pump()
    rig.fail(rig.op(1, 0), errno.EIO, b"\xee" * 512)
    rig.run()
    report = ended(rig)
    assert (report.error_number, report.unreadable, report.mismatched, report.compared) == (0, SIZE, 0, 0)
    assert len(rig.take_events(EventKind.READ_REPAIRED)) == 1
    assert rig.take_events(EventKind.DEVICE_ERROR) == []


def test_bad_block_of_a_backup_is_evidence_against_it() -> None:
    rig = rig_of_legs(1, 2)
    rig.engine.verify(ALL)
    rig.pump()
    rig.carry_out_all(1)
    rig.fail(rig.op(2), errno.EIO)
    rig.pump()
    assert [event.leg for event in rig.take_events(EventKind.DEVICE_ERROR)] == [2]
    failover(rig, 2, 1)
    rig.run()
    assert ended(rig).error_number == errno.ESTALE


def test_leg_closed_in_the_middle_is_let_go_of() -> None:
    rig = rig_of_legs(1, 2, 3)
    rig.engine.verify(ALL)
    rig.pump()
    failover(rig, 2, 1, 3)
    rig.engine.close_leg(2)
    rig.run()
    for op in rig.file_ops(2):
        rig.fail(op)
    rig.run()
    assert ended(rig).error_number == errno.ESTALE
    assert [event.leg for event in rig.take_events(EventKind.LEG_FORGOTTEN)] == [2]


# --- The dirty bitmap -----------------------------------------------------------------------------


def rig_that_marks() -> tuple[Rig, PendingOp]:
    """A verify has found a difference, and its region is being marked."""
    rig = Rig()
    for leg_id in (1, 2):
        rig.add_leg(leg_id, (SIZE,)).fill(pattern(SIZE))
    rig.legs[2].fill(bytes(4 * KIB))
    rig.open_bitmap(SIZE)
    rig.start(1, 2)
    rig.engine.verify(ALL, repair=True)
    rig.pump()
    rig.carry_out_all(1)
    rig.carry_out_all(2)
    (marking,) = rig.bitmap_ops()
    return rig, marking


def test_repair_waits_for_its_marks_without_keeping_readers_out() -> None:
    rig, marking = rig_that_marks()
    (client,) = rig.clients
    read = client.read(0, 4 * KIB)
    rig.pump()
    rig.carry_out_all(1)
    assert client.error(read) == 0
    assert rig.file_ops(2) == []
    rig.carry_out(marking)
    rig.run()
    assert rig.marked(0) == {0}
    assert ended(rig).repaired == 4 * KIB


def test_stop_while_marks_are_awaited_counts_what_was_found_and_repairs_nothing() -> None:
    rig, marking = rig_that_marks()
    rig.engine.stop_verify()
    rig.pump()
    report = ended(rig)
    assert (report.error_number, report.mismatched, report.repaired) == (errno.ECANCELED, 4 * KIB, 0)
    rig.carry_out(marking)
    rig.run()
    assert [device.writes for device in rig.engine.device_statistics(2)] == [0]


def test_verify_nobody_told_a_rate_yields_to_clients_as_copies_do() -> None:
    rig = rig_of_legs(1, 2, size=4 * MIB)
    rig.engine.pace_copies(rate=0, floor=MIB)
    rig.clients[0].read(0, 512)
    rig.run()
    rig.engine.verify([(0, 0, 4 * MIB)])
    rig.run()
    report = rig.engine.verify_report()
    assert report is not None and report.running and report.compared <= MIB
    rig.pass_time(1.5)
    rig.run()
    assert ended(rig) == clean(4 * MIB)
