"""Read repair: what the active leg cannot read is answered from a backup, and written back."""

import errno

import pytest

from proxy.engine import Event, EventKind, LegRole, OpKind, PendingOp
from tests.sim.rig import DEVICE_BASE, Rig, pattern

KIB = 1024
SIZE = 64 * KIB


def rig_of_legs(*legs: int | tuple[int, LegRole]) -> Rig:
    """Legs with one content, the first one active, striped differently so that every offset tells."""
    rig = Rig()
    for place, leg in enumerate(legs):
        lengths = (SIZE,) if place else (SIZE // 2, SIZE // 2)
        rig.add_leg(leg if isinstance(leg, int) else leg[0], lengths).fill(pattern(SIZE))
    rig.start(*legs)
    return rig


def fail_reads(rig: Rig, leg: int = 1, error_number: int = errno.EIO) -> list[PendingOp]:
    """Have every read pending on a leg fail, with rubbish in its buffer; which these were."""
    failed = rig.file_ops(leg, kind=OpKind.READ)
    for op in failed:
        rig.fail(op, error_number, b"\xee" * op.length)
    rig.pump()
    return failed


def evidence(rig: Rig) -> list[Event]:
    return rig.take_events(EventKind.DEVICE_ERROR, EventKind.DEVICE_LOST, EventKind.DEADLINE_MISSED)


def repairs(rig: Rig) -> list[tuple[int, int, int, int, int]]:
    events = rig.take_events(EventKind.READ_REPAIRED)
    return [(event.leg, event.device, event.code, event.a, event.b) for event in events]


@pytest.mark.parametrize("error_number", [errno.EIO, errno.EILSEQ, errno.ENODATA])
def test_medium_error_of_a_read_is_answered_from_the_backup_and_written_back(error_number: int) -> None:
    rig = rig_of_legs(1, 2)
    (client,) = rig.clients
    cookie = client.read(40 * KIB, 4 * KIB)
    rig.pump()
    fail_reads(rig, error_number=error_number)
    assert rig.op(2).kind is OpKind.READ
    rig.carry_out_all(2)
    assert client.error(cookie) == 0
    assert client.replies[cookie].payload == pattern(SIZE)[40 * KIB : 44 * KIB]
    assert (rig.op(2).kind, repairs(rig)) == (OpKind.READ, [])
    rig.carry_out_all(2)
    write = rig.op(1, 1)
    assert (write.kind, write.offset, write.length) == (OpKind.WRITE, DEVICE_BASE + 8 * KIB, 4 * KIB)
    assert rig.engine.data(write.number) == pattern(SIZE)[40 * KIB : 44 * KIB]
    rig.run()
    assert repairs(rig) == [(1, 1, error_number, DEVICE_BASE + 8 * KIB, 4 * KIB)]
    assert evidence(rig) == []
    assert rig.engine.statistics().read_repairs == 1
    assert [device.read_repairs for device in rig.engine.device_statistics(1)] == [0, 1]
    assert [device.errors for device in rig.engine.device_statistics(1)] == [0, 1]
    assert rig.engine.statistics().memory_bytes == 0


def test_read_over_two_devices_is_read_again_whole_and_only_the_bad_part_is_written() -> None:
    rig = rig_of_legs(1, 2)
    (client,) = rig.clients
    cookie = client.read(28 * KIB + 100, 8 * KIB)
    rig.pump()
    rig.fail(rig.op(1, 0), data=b"\xee" * 512)
    rig.pump()
    assert rig.file_ops(2) == []
    rig.carry_out_all(1)
    rig.run()
    assert client.replies[cookie].payload == pattern(SIZE)[28 * KIB + 100 :][: 8 * KIB]
    assert repairs(rig) == [(1, 0, errno.EIO, DEVICE_BASE + 28 * KIB, 4 * KIB)]


def test_repair_writes_zeroes_too_and_punches_no_hole() -> None:
    rig = rig_of_legs(1, 2)
    for leg in rig.legs.values():
        leg.fill(bytes(SIZE))
    rig.clients[0].read(0, 4 * KIB)
    rig.pump()
    fail_reads(rig)
    rig.carry_out_all(2)
    rig.carry_out_all(2)
    assert rig.op(1, 0).kind is OpKind.WRITE


def test_long_read_is_repaired_in_bounded_steps() -> None:
    size = 4 << 20
    rig = Rig()
    rig.add_leg(1, (size,), transfer_max=size).fill(pattern(size))
    rig.add_leg(2, (size,)).fill(pattern(size))
    client = rig.start(1, 2)
    cookie = client.read(0, size)
    rig.pump()
    fail_reads(rig)
    rig.carry_out_all(2)
    assert client.error(cookie) == 0
    assert rig.engine.statistics().memory_bytes <= 1 << 20
    rig.run()
    assert repairs(rig) == [(1, 0, errno.EIO, DEVICE_BASE, size)]


@pytest.mark.parametrize("error_number", [errno.ENODEV, errno.ENXIO, errno.ENOMEM])
def test_error_that_is_not_of_the_medium_is_evidence(error_number: int) -> None:
    rig = rig_of_legs(1, 2)
    rig.clients[0].read(0, 4 * KIB)
    rig.pump()
    fail_reads(rig, error_number=error_number)
    assert [(event.leg, event.code) for event in evidence(rig)] == [(1, error_number)]
    assert rig.file_ops() == []


def test_lost_connection_is_evidence_whatever_its_errno() -> None:
    rig = Rig()
    rig.add_leg(1, (SIZE,), remote=True)
    rig.add_leg(2, (SIZE,))
    client = rig.start(1, 2)
    client.read(0, 4 * KIB)
    rig.pump()
    rig.streams[rig.legs[1].devices[0].fd].ended = errno.EIO
    rig.run()
    assert [event.kind for event in evidence(rig)] == [EventKind.DEVICE_LOST]
    assert rig.engine.statistics().parked == 1


def test_end_of_a_file_is_evidence_and_nothing_is_written_behind_it() -> None:
    rig = rig_of_legs(1, 2)
    rig.clients[0].read(0, 4 * KIB)
    rig.pump()
    rig.engine.complete(rig.op(1).number, 0)
    rig.run()
    assert [(event.leg, event.code) for event in evidence(rig)] == [(1, errno.EIO)]
    assert repairs(rig) == []


@pytest.mark.parametrize("role", [None, LegRole.SYNCING])
def test_medium_error_without_an_uptodate_backup_is_evidence(role: LegRole | None) -> None:
    rig = rig_of_legs(1) if role is None else rig_of_legs(1, (2, role))
    rig.clients[0].read(0, 4 * KIB)
    rig.pump()
    fail_reads(rig)
    assert [(event.leg, event.code) for event in evidence(rig)] == [(1, errno.EIO)]


def test_medium_error_with_the_backup_fenced_is_evidence() -> None:
    rig = rig_of_legs(1, 2)
    rig.clients[0].read(0, 4 * KIB)
    rig.pump()
    rig.engine.fence_leg(2)
    fail_reads(rig)
    assert [event.leg for event in evidence(rig)] == [1]
    assert rig.file_ops() == []


def test_engine_that_was_told_of_no_medium_errors_repairs_nothing() -> None:
    from proxy.engine import SimulatedEngine

    rig = Rig(SimulatedEngine(nbd_errors={}, deadline_ns=10**9))
    for leg_id in (1, 2):
        rig.add_leg(leg_id, (SIZE,))
    client = rig.start(1, 2)
    client.read(0, 4 * KIB)
    rig.pump()
    fail_reads(rig)
    assert [event.leg for event in evidence(rig)] == [1]


# --- Edges and copies -----------------------------------------------------------------------------


def test_edge_of_an_unaligned_write_is_read_from_the_backup() -> None:
    rig = rig_of_legs(1, 2)
    (client,) = rig.clients
    cookie = client.write(100, pattern(1000, 7))
    rig.pump()
    assert len(fail_reads(rig)) == 2
    assert {op.fd for op in rig.file_ops()} == {rig.legs[2].devices[0].fd}
    rig.run()
    assert client.error(cookie) == 0
    expected = pattern(SIZE)[:100] + pattern(1000, 7) + pattern(SIZE)[1100:]
    assert rig.legs[1].read(0, SIZE) == rig.legs[2].read(0, SIZE) == expected
    assert repairs(rig) == [(1, 0, errno.EIO, DEVICE_BASE, 4 * KIB)]


def test_second_edge_is_repaired_where_it_lies() -> None:
    rig = rig_of_legs(1, 2)
    (client,) = rig.clients
    cookie = client.write(100, pattern(9000, 7))
    rig.pump()
    first, second = rig.file_ops(1)
    rig.carry_out(first)
    rig.fail(second)
    rig.run()
    assert client.error(cookie) == 0
    assert rig.legs[1].read(0, SIZE) == rig.legs[2].read(0, SIZE)
    assert repairs(rig) == [(1, 0, errno.EIO, DEVICE_BASE + 8 * KIB + 512, 4 * KIB)]


def test_copy_reads_from_a_backup_what_the_active_leg_cannot() -> None:
    rig = rig_of_legs(1, 2, (3, LegRole.SYNCING))
    rig.legs[3].fill(pattern(SIZE, 99))
    rig.engine.copy_leg(3, [(0, 0, SIZE)])
    rig.pump()
    fail_reads(rig)
    rig.run()
    assert [event.code for event in rig.take_events(EventKind.COPIED)] == [0]
    assert rig.legs[3].read(0, SIZE) == pattern(SIZE)
    assert len(repairs(rig)) == 2
    assert evidence(rig) == []


# --- Clients meanwhile ----------------------------------------------------------------------------


def rig_in_repair() -> Rig:
    """A read of the first block was answered from leg 2; the repair is about to read from it too."""
    rig = rig_of_legs(1, 2)
    (client,) = rig.clients
    cookie = client.read(0, 4 * KIB)
    rig.pump()
    fail_reads(rig)
    rig.carry_out_all(2)
    assert client.error(cookie) == 0
    assert rig.op(2).kind is OpKind.READ
    return rig


def test_write_of_a_client_waits_for_the_repair_and_lands_after_it() -> None:
    rig = rig_in_repair()
    (client,) = rig.clients
    cookie = client.write(0, pattern(4 * KIB, 5))
    rig.pump()
    assert len(rig.file_ops()) == 1
    rig.run()
    assert client.error(cookie) == 0
    for leg in rig.legs.values():
        assert leg.read(0, 4 * KIB) == pattern(4 * KIB, 5)
    assert len(repairs(rig)) == 1


def test_repair_waits_for_a_write_of_a_client_and_takes_what_it_wrote() -> None:
    rig = rig_of_legs(1, 2)
    (client,) = rig.clients
    client.read(0, 4 * KIB)
    write = client.write(0, pattern(4 * KIB, 5))
    rig.pump()
    fail_reads(rig)
    rig.carry_out_all(2)
    assert {op.kind for op in rig.file_ops()} == {OpKind.WRITE}
    rig.run()
    assert client.error(write) == 0
    for leg in rig.legs.values():
        assert leg.read(0, 4 * KIB) == pattern(4 * KIB, 5)
    assert len(repairs(rig)) == 1


def test_reads_of_one_bad_block_are_one_repair() -> None:
    rig = rig_of_legs(1, 2)
    (client,) = rig.clients
    cookies = [client.read(offset, 512) for offset in range(0, 4 * KIB, 512)]
    rig.pump()
    assert len(fail_reads(rig)) == 8
    rig.run()
    assert [client.error(cookie) for cookie in cookies] == [0] * 8
    assert repairs(rig) == [(1, 0, errno.EIO, DEVICE_BASE, 4 * KIB)]


def test_more_bad_blocks_than_can_be_noted_are_all_answered() -> None:
    size = 1 << 20
    rig = Rig()
    for leg_id in (1, 2):
        rig.add_leg(leg_id, (size,)).fill(pattern(size))
    client = rig.start(1, 2)
    cookies = [client.read(offset, 4 * KIB) for offset in range(0, 512 * KIB, 4 * KIB)]
    rig.pump()
    assert len(fail_reads(rig)) == 128
    rig.run()
    assert {client.error(cookie) for cookie in cookies} == {0}
    assert len(repairs(rig)) == 64
    assert evidence(rig) == []
    assert rig.engine.statistics().memory_bytes == 0


def test_events_of_repairs_that_nobody_takes_are_bounded() -> None:
    rig = rig_of_legs(1, 2)
    (client,) = rig.clients
    taken = 0
    for _ in range(9000):
        client.read(0, 512)
        while not rig.file_ops():
            rig.engine.step()
            for op in rig.engine.pending():
                if op.fd == client.fd:
                    client.move(rig.engine, op)
        for op in rig.file_ops(1):
            rig.fail(op)
        for _ in range(3):
            rig.engine.step()
            for op in rig.file_ops():
                rig.carry_out(op)
        rig.engine.step()
    taken = len(repairs(rig))
    assert taken < rig.engine.statistics().read_repairs
    assert taken <= 8192


# --- What goes wrong in the middle ----------------------------------------------------------------


def test_repair_whose_write_fails_is_evidence_against_the_active_leg() -> None:
    rig = rig_in_repair()
    rig.carry_out_all(2)
    rig.fail(rig.op(1, kind=OpKind.WRITE))
    rig.pump()
    assert [(event.leg, event.code) for event in evidence(rig)] == [(1, errno.EIO)]
    failover(rig, 1, 2)
    assert repairs(rig) == []
    assert rig.file_ops() == []
    assert rig.engine.statistics().memory_bytes == 0


def test_backup_that_cannot_read_either_is_evidence_against_the_backup() -> None:
    rig = rig_of_legs(1, 2)
    (client,) = rig.clients
    cookie = client.read(0, 4 * KIB)
    rig.pump()
    fail_reads(rig)
    fail_reads(rig, 2)
    assert [(event.leg, event.code) for event in evidence(rig)] == [(2, errno.EIO)]
    assert client.error(cookie) is None
    failover(rig, 2, 1)
    fail_reads(rig)
    assert [event.leg for event in evidence(rig)] == [1]
    rig.engine.fail_parked()
    rig.run()
    assert client.error(cookie) == errno.EIO
    assert repairs(rig) == []
    assert rig.engine.statistics().memory_bytes == 0


def failover(rig: Rig, lost: int, *left: int | tuple[int, LegRole]) -> None:
    """What the manager has done when a leg is lost."""
    rig.engine.hold()
    rig.engine.fence_leg(lost)
    for leg in left:
        rig.run_leg(leg if isinstance(leg, int) else leg[0])
    assert rig.take_events(EventKind.DRAINED)
    rig.install(*left)
    rig.engine.release()
    rig.pump()


def test_second_read_goes_on_while_held_and_the_repair_waits_for_the_release() -> None:
    rig = rig_of_legs(1, 2)
    (client,) = rig.clients
    cookie = client.read(0, 4 * KIB)
    rig.pump()
    rig.engine.hold()
    fail_reads(rig)
    rig.run()
    assert client.error(cookie) == 0
    assert rig.take_events(EventKind.DRAINED)
    assert rig.file_ops() == []
    rig.engine.release()
    rig.run()
    assert len(repairs(rig)) == 1


def test_failover_while_the_backup_is_read_drops_the_repair() -> None:
    rig = rig_of_legs(1, 2)
    (client,) = rig.clients
    cookie = client.read(0, 4 * KIB)
    rig.pump()
    fail_reads(rig)
    failover(rig, 1, 2)
    rig.run()
    assert client.error(cookie) == 0
    assert client.replies[cookie].payload == pattern(SIZE)[: 4 * KIB]
    assert repairs(rig) == []
    assert rig.engine.statistics().memory_bytes == 0


@pytest.mark.parametrize("steps", [0, 1])
def test_failover_in_the_middle_of_a_repair_drops_it(steps: int) -> None:
    rig = rig_in_repair()
    for _ in range(steps):
        rig.carry_out_all(2)
    late = rig.file_ops()
    failover(rig, 1, 2)
    (client,) = rig.clients
    write = client.write(0, pattern(4 * KIB, 5))
    for op in late:
        if op in rig.file_ops():
            rig.carry_out(op)
    rig.run()
    assert client.error(write) == 0
    assert rig.legs[2].read(0, 4 * KIB) == pattern(4 * KIB, 5)
    assert repairs(rig) == []
    assert rig.engine.statistics().memory_bytes == 0


def test_failover_there_and_back_to_a_new_leg_repairs_nothing_of_the_old_one() -> None:
    rig = rig_in_repair()
    failover(rig, 1, 2)
    rig.add_leg(3, (SIZE,)).fill(pattern(SIZE))
    rig.install(3, 2)
    rig.run()
    assert repairs(rig) == []
    assert rig.file_ops() == []


def test_loss_of_the_backup_in_the_middle_goes_on_with_another_one() -> None:
    rig = rig_of_legs(1, 2, 3)
    (client,) = rig.clients
    cookie = client.read(0, 4 * KIB)
    rig.pump()
    fail_reads(rig)
    failover(rig, 2, 1, 3)
    fail_reads(rig)
    rig.run()
    assert client.error(cookie) == 0
    assert len(repairs(rig)) == 1
    assert evidence(rig) == []


def test_loss_of_the_only_backup_drops_the_repair() -> None:
    rig = rig_in_repair()
    failover(rig, 2, 1)
    rig.run()
    assert repairs(rig) == []
    assert rig.file_ops() == []
    assert rig.engine.statistics().memory_bytes == 0


def test_install_without_a_hold_in_the_middle_of_a_repair_does_no_harm() -> None:
    rig = rig_in_repair()
    rig.add_leg(3, (SIZE,))
    rig.install(1, 2, (3, LegRole.SYNCING))
    rig.run()
    assert len(repairs(rig)) == 1
    assert rig.legs[1].read(0, SIZE) == pattern(SIZE)


# --- The dirty bitmap -----------------------------------------------------------------------------


def test_repair_waits_for_its_marks_without_keeping_readers_out() -> None:
    rig = Rig()
    for leg_id in (1, 2):
        rig.add_leg(leg_id, (SIZE,)).fill(pattern(SIZE))
    rig.open_bitmap(SIZE)
    client = rig.start(1, 2)
    cookie = client.read(0, 4 * KIB)
    rig.pump()
    fail_reads(rig)
    rig.carry_out_all(2)
    assert client.error(cookie) == 0
    (marking,) = rig.bitmap_ops()
    again = client.read(0, 4 * KIB)
    rig.pump()
    rig.carry_out_all(1)
    assert client.error(again) == 0
    assert rig.file_ops(2) == []
    rig.carry_out(marking)
    rig.run()
    assert rig.marked(0) == {0}
    assert len(repairs(rig)) == 1
    assert rig.engine.statistics().memory_bytes == 0
