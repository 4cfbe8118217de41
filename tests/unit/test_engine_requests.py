"""One request of a client, from its arrival to its answer, over legs of several devices."""

import errno

from proxy.engine import EventKind, LegRole, OpKind
from tests.sim.rig import DEVICE_BASE, Rig, pattern

KIB = 1024


def test_read_over_three_extents_is_split_and_put_together() -> None:
    rig = Rig()
    leg = rig.add_leg(1, (16 * KIB, 8 * KIB, 16 * KIB))
    leg.fill(pattern(40 * KIB))
    client = rig.start(1)
    cookie = client.read(12 * KIB, 16 * KIB)
    rig.pump()
    devices = [device.fd for device in leg.devices]
    assert [(op.fd, op.offset, op.length) for op in rig.file_ops()] == [
        (devices[0], DEVICE_BASE + 12 * KIB, 4 * KIB),
        (devices[1], DEVICE_BASE, 8 * KIB),
        (devices[2], DEVICE_BASE, 4 * KIB),
    ]
    for op in reversed(rig.file_ops()):
        assert client.error(cookie) is None
        rig.carry_out(op)
        rig.pump()
    assert client.replies[cookie].payload == pattern(40 * KIB)[12 * KIB : 28 * KIB]


def test_write_over_three_extents_reaches_two_legs_of_other_geometry() -> None:
    rig = Rig()
    active = rig.add_leg(1, (16 * KIB, 8 * KIB, 40 * KIB))
    backup = rig.add_leg(2, (32 * KIB, 32 * KIB), chunk=4 * KIB)
    client = rig.start(1, 2)
    data = pattern(32 * KIB)
    cookie = client.write(8 * KIB, data)
    rig.run()
    assert client.error(cookie) == 0
    for leg in (active, backup):
        assert leg.read(0, 64 * KIB) == bytes(8 * KIB) + data + bytes(24 * KIB)


def test_write_is_answered_only_when_every_leg_has_all_of_it() -> None:
    rig = Rig()
    for leg_id in (1, 2, 3):
        rig.add_leg(leg_id, (8 * KIB, 8 * KIB))
    client = rig.start(1, 2, (3, LegRole.SYNCING))
    cookie = client.write(4 * KIB, pattern(8 * KIB))
    rig.pump()
    assert len(rig.file_ops()) == 6
    for op in rig.file_ops():
        assert client.error(cookie) is None
        rig.carry_out(op)
        rig.pump()
    assert client.error(cookie) == 0


def test_read_goes_to_the_active_leg_only() -> None:
    rig = Rig()
    for leg_id in (1, 2, 3):
        rig.add_leg(leg_id)
    client = rig.start((1, LegRole.BACKUP), (2, LegRole.ACTIVE), (3, LegRole.SYNCING))
    client.read(0, 4 * KIB)
    rig.pump()
    assert [op.fd for op in rig.file_ops()] == [rig.legs[2].devices[0].fd]


def test_request_longer_than_a_device_takes_is_split_by_its_largest_transfer() -> None:
    rig = Rig()
    leg = rig.add_leg(1, (64 * KIB,), transfer_max=16 * KIB)
    leg.fill(pattern(64 * KIB))
    client = rig.start(1)
    read = client.read(0, 64 * KIB)
    rig.pump()
    assert [op.length for op in rig.file_ops()] == [16 * KIB] * 4
    rig.run()
    write = client.write(4 * KIB, pattern(40 * KIB, 2))
    rig.pump()
    assert [op.length for op in rig.file_ops()] == [16 * KIB, 16 * KIB, 8 * KIB]
    rig.run()
    assert client.replies[read].payload == pattern(64 * KIB)
    assert client.error(write) == 0
    assert leg.read(4 * KIB, 40 * KIB) == pattern(40 * KIB, 2)


def test_request_of_more_parts_than_its_share_advances_in_steps() -> None:
    rig = Rig()
    leg = rig.add_leg(1, (512 * KIB, 512 * KIB), chunk=4 * KIB)
    client = rig.start(1)
    data = pattern(1024 * KIB)
    cookie = client.write(0, data)
    rig.pump()
    most = len(rig.file_ops())
    assert most < 256
    while rig.file_ops():
        rig.carry_out(rig.file_ops()[0])
        rig.pump()
        assert len(rig.file_ops()) <= most
    assert client.error(cookie) == 0
    assert leg.read(0, 1024 * KIB) == data


def test_disks_of_a_domain_do_not_see_each_other() -> None:
    from proxy.extentmap import Range

    rig = Rig()
    leg = rig.add_leg(1, (32 * KIB, 32 * KIB))
    rig.install(1, disks=[(3, Range(0, 24 * KIB)), (7, Range(24 * KIB, 40 * KIB))])
    rig.engine.release()
    first, second = rig.connect(3), rig.connect(7)
    a = first.write(8 * KIB, pattern(16 * KIB, 1))
    b = second.write(0, pattern(16 * KIB, 2))
    past = first.write(20 * KIB, pattern(8 * KIB, 3))
    rig.run()
    assert (first.error(a), second.error(b), first.error(past)) == (0, 0, errno.ENOSPC)
    assert leg.read(8 * KIB, 32 * KIB) == pattern(16 * KIB, 1) + pattern(16 * KIB, 2)


def test_write_that_one_leg_fails_is_not_answered_but_done_again_whole_under_the_next_map() -> None:
    rig = Rig()
    rig.add_leg(1, (8 * KIB, 56 * KIB))
    rig.add_leg(2)
    rig.add_leg(3)
    client = rig.start(1, 2, 3)
    cookie = client.write(4 * KIB, pattern(8 * KIB))
    rig.pump()
    rig.fail(rig.op(1, 0), errno.EIO)
    rig.run()
    assert client.error(cookie) is None
    (event,) = rig.take_events(EventKind.DEVICE_ERROR)
    assert (event.leg, event.device, event.code, event.generation) == (1, 0, errno.EIO, 1)
    assert event.b == DEVICE_BASE + 4 * KIB
    rig.install(2, 3)
    rig.pump()
    # Whole: also what leg 2 had done already.
    assert [(op.fd, op.length) for op in rig.file_ops(kind=OpKind.WRITE)] == [
        (rig.legs[2].devices[0].fd, 8 * KIB),
        (rig.legs[3].devices[0].fd, 8 * KIB),
    ]
    rig.run()
    assert client.error(cookie) == 0


def test_read_that_the_active_leg_fails_is_answered_by_the_next_one() -> None:
    rig = Rig()
    for leg_id in (1, 2):
        rig.add_leg(leg_id).fill(pattern(64 * KIB))
    client = rig.start(1, 2)
    cookie = client.read(8 * KIB, 8 * KIB)
    rig.pump()
    rig.fail(rig.op(1), errno.EIO, b"\xee" * 8 * KIB)
    rig.pump()
    assert client.error(cookie) is None
    rig.install(2)
    rig.run()
    assert client.replies[cookie].payload == pattern(64 * KIB)[8 * KIB : 16 * KIB]


def test_parked_requests_are_done_again_in_their_order() -> None:
    rig = Rig()
    for leg_id in (1, 2):
        rig.add_leg(leg_id)
    client = rig.start(1, 2)
    first = client.write(0, pattern(8 * KIB, 1))
    second = client.write(4 * KIB, pattern(8 * KIB, 2))
    read = client.read(0, 12 * KIB)
    rig.pump()
    rig.fail(rig.op(2))
    rig.carry_out(rig.op(1))
    rig.pump()
    assert rig.file_ops() == []
    rig.install(1)
    rig.pump()
    assert rig.engine.data(rig.op(1).number) == pattern(8 * KIB, 1)
    rig.run()
    assert [client.error(cookie) for cookie in (first, second, read)] == [0, 0, 0]
    assert client.replies[read].payload == pattern(8 * KIB, 1)[: 4 * KIB] + pattern(8 * KIB, 2)


def test_device_error_is_reported_once_until_the_next_map() -> None:
    rig = Rig()
    for leg_id in (1, 2):
        rig.add_leg(leg_id)
    client = rig.start(1, 2)
    client.write(0, pattern(4 * KIB))
    client.write(8 * KIB, pattern(4 * KIB))
    rig.pump()
    for op in rig.file_ops(2):
        rig.fail(op)
    rig.pump()
    assert len(rig.take_events(EventKind.DEVICE_ERROR)) == 1
    rig.run()
    rig.install(1, 2)
    rig.pump()
    for op in rig.file_ops(2):
        rig.fail(op)
    rig.pump()
    assert len(rig.take_events(EventKind.DEVICE_ERROR)) == 1


def test_fail_parked_answers_with_the_error_that_was_met() -> None:
    rig = Rig()
    rig.add_leg(1)
    client = rig.start(1)
    read, write = client.read(0, 4 * KIB), client.write(8 * KIB, pattern(4 * KIB))
    rig.pump()
    rig.fail(rig.op(1, kind=OpKind.READ), errno.EIO)
    rig.fail(rig.op(1, kind=OpKind.WRITE), errno.ENOSPC)
    rig.pump()
    rig.engine.fail_parked()
    rig.pump()
    assert client.error(read) == errno.EIO
    assert client.error(write) == errno.ENOSPC
    again = client.read(0, 4 * KIB)
    rig.run()
    assert client.error(again) == 0
    assert rig.engine.statistics().memory_bytes == 0


def test_fail_parked_also_answers_requests_whose_other_parts_come_later() -> None:
    rig = Rig()
    rig.add_leg(1, (8 * KIB, 8 * KIB))
    client = rig.start(1)
    cookie = client.write(4 * KIB, pattern(8 * KIB))
    rig.pump()
    rig.fail(rig.op(1, 0), errno.EIO)
    rig.pump()
    assert len(rig.take_events(EventKind.DEVICE_ERROR)) == 1
    rig.engine.fail_parked()
    rig.pump()
    rig.carry_out(rig.op(1, 1))
    rig.pump()
    # Nobody will be told of this device again, so nobody would ever fail the request again.
    assert client.error(cookie) == errno.EIO


def test_unknown_errno_of_a_device_becomes_eio_and_a_full_one_enospc() -> None:
    rig = Rig()
    rig.add_leg(1)
    client = rig.start(1)
    for error_number, told in (
        (errno.EDQUOT, errno.ENOSPC),
        (errno.EFBIG, errno.ENOSPC),
        (errno.ENOSPC, errno.ENOSPC),
        (errno.EREMOTEIO, errno.EIO),
        (errno.ENXIO, errno.EIO),
        (512, errno.EIO),
    ):
        cookie = client.write(0, pattern(4 * KIB))
        rig.pump()
        rig.fail(rig.op(1), error_number)
        rig.pump()
        rig.engine.fail_parked()
        rig.pump()
        assert client.error(cookie) == told


def test_map_that_is_replaced_while_requests_run_keeps_serving_them() -> None:
    rig = Rig()
    for leg_id in (1, 2):
        rig.add_leg(leg_id)
    client = rig.start(1)
    before = client.write(0, pattern(4 * KIB, 1))
    rig.pump()
    rig.install(1, (2, LegRole.SYNCING))
    after = client.write(8 * KIB, pattern(4 * KIB, 2))
    rig.pump()
    assert len(rig.file_ops(1)) == 2
    assert len(rig.file_ops(2)) == 1
    assert rig.take_events(EventKind.MAP_RETIRED) == []
    rig.carry_out(rig.file_ops(1)[0])
    rig.pump()
    assert client.error(before) == 0
    assert [event.generation for event in rig.take_events(EventKind.MAP_RETIRED)] == [1]
    rig.run()
    assert client.error(after) == 0


def test_disk_that_a_new_map_drops_answers_eshutdown() -> None:
    from proxy.extentmap import Range

    rig = Rig()
    rig.add_leg(1)
    rig.install(1, disks=[(1, Range(0, 32 * KIB)), (2, Range(32 * KIB, 32 * KIB))])
    rig.engine.release()
    client = rig.connect(2)
    rig.engine.hold()
    held = client.read(0, 4 * KIB)
    rig.pump()
    rig.install(1, disks=[(1, Range(0, 32 * KIB))])
    rig.engine.release()
    late = client.read(0, 4 * KIB)
    rig.run()
    assert client.error(held) == client.error(late) == errno.ESHUTDOWN


def test_statistics_count_what_was_answered() -> None:
    rig = Rig()
    rig.add_leg(1)
    client = rig.start(1)
    client.read(0, 4 * KIB)
    client.write(0, pattern(8 * KIB))
    client.zero(8 * KIB, 4 * KIB)
    client.trim(16 * KIB, 4 * KIB)
    client.flush()
    client.read(64 * KIB, 4 * KIB)
    rig.run()
    s = rig.engine.statistics()
    assert (s.reads, s.writes, s.zeroes, s.trims, s.flushes) == (1, 1, 1, 1, 1)
    assert (s.read_bytes, s.written_bytes, s.errors, s.refused) == (4 * KIB, 8 * KIB, 1, 1)
    assert (s.running, s.held, s.connections, s.generation) == (0, False, 1, 1)
    assert s.memory_bytes == 0
