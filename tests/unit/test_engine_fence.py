"""A fenced leg: nothing more goes to it, nobody waits for it, and what is late from it does no harm."""

import errno

import pytest

from proxy.engine import EventKind, LegRole, OpKind
from tests.sim.rig import Rig, pattern

KIB = 1024


def failover(rig: Rig, lost: int, *left: int | tuple[int, LegRole]) -> None:
    """What the supervisor does when a leg is lost."""
    rig.engine.hold()
    rig.engine.fence_leg(lost)
    for leg in left:
        rig.run_leg(leg if isinstance(leg, int) else leg[0])
    assert rig.take_events(EventKind.DRAINED)
    rig.install(*left)
    rig.engine.release()
    rig.pump()


def two_legs(**options: bool) -> Rig:
    rig = Rig()
    for leg_id in (1, 2):
        rig.add_leg(leg_id, (32 * KIB, 32 * KIB), **options).fill(pattern(64 * KIB))
    return rig


def test_fence_stops_everything_to_that_leg_at_once() -> None:
    rig = two_legs()
    client = rig.start(1, 2)
    client.write(0, pattern(4 * KIB, 2))
    client.write(0, pattern(4 * KIB, 3))
    rig.pump()
    newest = rig.engine.pending()[-1].number
    rig.engine.fence_leg(1)
    client.read(8 * KIB, 4 * KIB)
    client.write(16 * KIB, pattern(4 * KIB))
    client.flush()
    rig.pump()
    for op in rig.file_ops(2):
        rig.carry_out(op)
    rig.pump()
    assert [op for op in rig.file_ops(1) if op.number > newest] == []


def test_fence_lets_nothing_more_out_of_a_short_write() -> None:
    rig = two_legs()
    client = rig.start(1, 2)
    client.write(0, pattern(8 * KIB))
    rig.pump()
    rig.engine.fence_leg(1)
    rig.carry_out(rig.op(1, 0), 4 * KIB)
    rig.pump()
    assert rig.file_ops(1) == []


def test_fence_lets_nothing_be_tried_again_there() -> None:
    rig = two_legs()
    client = rig.start(1, 2)
    client.write(0, pattern(4 * KIB))
    client.zero(8 * KIB, 4 * KIB)
    rig.pump()
    rig.engine.fence_leg(1)
    rig.fail(rig.op(1, 0, OpKind.WRITE), errno.EINTR)
    rig.fail(rig.op(1, 0, OpKind.ALLOCATE), errno.EOPNOTSUPP)
    rig.pump()
    assert rig.file_ops(1) == []


def test_requests_on_a_fenced_leg_are_parked_without_waiting_for_it() -> None:
    rig = two_legs()
    client = rig.start(1, 2)
    read, write = client.read(8 * KIB, 4 * KIB), client.write(0, pattern(4 * KIB, 2))
    rig.pump()
    hung = rig.file_ops(1)
    rig.carry_out_all(2)
    failover(rig, 1, 2)
    rig.run_leg(2)
    assert client.error(write) == 0
    assert client.replies[read].payload == pattern(64 * KIB)[8 * KIB : 12 * KIB]
    assert {op.number for op in rig.file_ops(1)} == {op.number for op in hung}


def test_write_on_a_fenced_backup_is_done_again_on_the_legs_left() -> None:
    rig = two_legs()
    client = rig.start(1, 2)
    write = client.write(0, pattern(4 * KIB, 2))
    rig.pump()
    rig.carry_out_all(1)
    failover(rig, 2, 1)
    assert client.error(write) is None
    rig.run_leg(1)
    assert client.error(write) == 0


def test_late_read_does_not_touch_the_answer_of_the_read_done_again() -> None:
    rig = two_legs()
    client = rig.start(1, 2)
    client.accepts = 0
    read = client.read(8 * KIB, 4 * KIB)
    rig.pump()
    late = rig.op(1, 0)
    failover(rig, 1, 2)
    rig.carry_out_all(2)
    # Its answer waits in the socket when what the fenced leg reads at last arrives.
    rig.engine.complete(late.number, 4 * KIB, b"\xee" * 4 * KIB)
    client.accepts = None
    rig.run()
    assert client.replies[read].payload == pattern(64 * KIB)[8 * KIB : 12 * KIB]
    assert rig.engine.statistics().memory_bytes == 0


def test_late_read_does_not_touch_the_memory_of_another_request() -> None:
    rig = two_legs()
    client = rig.start(1, 2)
    read = client.read(0, 4 * KIB)
    rig.pump()
    late = rig.op(1, 0)
    failover(rig, 1, 2)
    rig.run_leg(2)
    assert client.error(read) == 0
    writes = [client.write(4 * KIB * place, pattern(4 * KIB, place + 2)) for place in range(8)]
    rig.pump()
    rig.engine.complete(late.number, 4 * KIB, b"\xee" * 4 * KIB)
    rig.run()
    assert [client.error(cookie) for cookie in writes] == [0] * 8
    for place in range(8):
        assert rig.legs[2].read(4 * KIB * place, 4 * KIB) == pattern(4 * KIB, place + 2)


def test_late_read_of_an_edge_does_not_touch_the_write_done_again() -> None:
    rig = two_legs()
    client = rig.start(1, 2)
    write = client.write(100, pattern(1000, 2))
    rig.pump()
    late = rig.file_ops(1, kind=OpKind.READ)
    assert late
    failover(rig, 1, 2)
    for op in rig.file_ops(2, kind=OpKind.READ):
        rig.carry_out(op)
    for op in late:
        rig.engine.complete(op.number, op.length, b"\xee" * op.length)
    rig.run()
    assert client.error(write) == 0
    assert rig.legs[2].read(0, 2 * KIB) == (
        pattern(64 * KIB)[:100] + pattern(1000, 2) + pattern(64 * KIB)[1100 : 2 * KIB]
    )


def test_late_write_still_finds_its_own_data() -> None:
    rig = two_legs()
    client = rig.start(1, 2)
    client.write(0, pattern(4 * KIB, 2))
    rig.pump()
    late = rig.op(1, 0)
    failover(rig, 1, 2)
    rig.run_leg(2)
    for place in range(1, 8):
        client.write(4 * KIB * place, b"\xcc" * 4 * KIB)
    rig.run_leg(2)
    # Whatever the device does with it, it must not be another client's data.
    assert rig.engine.data(late.number) == pattern(4 * KIB, 2)


def test_leg_drained_comes_once_when_the_last_late_answer_is_in() -> None:
    rig = two_legs()
    client = rig.start(1, 2)
    client.write(0, pattern(4 * KIB))
    client.read(40 * KIB, 4 * KIB)
    rig.pump()
    failover(rig, 1, 2)
    first, second = rig.file_ops(1)
    rig.carry_out(first)
    rig.run_leg(2)
    assert rig.take_events(EventKind.LEG_DRAINED) == []
    rig.fail(second)
    rig.pump()
    (event,) = rig.take_events(EventKind.LEG_DRAINED)
    assert (event.leg, event.a) == (1, 0)
    rig.engine.close_leg(1)
    rig.pump()
    assert rig.take_events(EventKind.LEG_DRAINED) == []
    assert rig.engine.statistics().late == 2


def test_leg_with_nothing_in_flight_is_drained_as_it_is_fenced() -> None:
    rig = two_legs()
    rig.start(1, 2)
    rig.engine.fence_leg(2)
    rig.pump()
    (event,) = rig.take_events(EventKind.LEG_DRAINED)
    assert (event.leg, event.a) == (2, 0)


def test_late_errors_of_a_fenced_leg_are_counted_and_not_reported() -> None:
    rig = two_legs()
    client = rig.start(1, 2)
    client.read(0, 4 * KIB)
    rig.pump()
    failover(rig, 1, 2)
    rig.fail(rig.op(1, 0))
    rig.run_leg(2)
    rig.pass_time(10)
    assert rig.take_events(EventKind.DEVICE_ERROR, EventKind.DEADLINE_MISSED) == []
    assert rig.engine.device_statistics(1)[0].late == 1


def test_requests_after_a_fence_wait_for_the_next_map() -> None:
    rig = two_legs()
    client = rig.start(1, 2)
    rig.engine.fence_leg(1)
    requests = [client.read(0, 4 * KIB), client.write(8 * KIB, pattern(4 * KIB, 2)), client.flush()]
    rig.pump()
    rig.run_leg(2)
    assert [client.error(cookie) for cookie in requests] == [None] * 3
    rig.install(2)
    rig.run()
    assert [client.error(cookie) for cookie in requests] == [0] * 3


def test_second_failover_with_two_legs_hanging_keeps_every_answer_right() -> None:
    rig = Rig()
    for leg_id in (1, 2, 3):
        rig.add_leg(leg_id).fill(pattern(64 * KIB))
    client = rig.start(1, 2, 3)
    read = client.read(8 * KIB, 8 * KIB)
    rig.pump()
    first = rig.op(1)
    failover(rig, 1, 2, 3)
    second = rig.op(2)
    failover(rig, 2, 3)
    for late in (second, first):
        rig.engine.complete(late.number, 8 * KIB, b"\xee" * 8 * KIB)
    rig.run()
    assert client.replies[read].payload == pattern(64 * KIB)[8 * KIB : 16 * KIB]
    assert rig.engine.statistics().memory_bytes == 0


def test_hung_leg_does_not_take_the_memory_clients_go_on_with() -> None:
    rig = Rig()
    for leg_id in (1, 2):
        rig.add_leg(leg_id, (64 << 20,), transfer_max=32 << 20)
    client = rig.start(1, 2)
    clients = [client, *(rig.connect() for _ in range(7))]
    data = bytes([1]) * (8 << 20)
    writes = [(each, each.write(place * len(data), data)) for place, each in enumerate(clients)]
    rig.pump()
    assert len(rig.file_ops(1)) == 8
    failover(rig, 1, 2)
    rig.run_leg(2)
    assert [each.error(cookie) for each, cookie in writes] == [0] * 8
    read = client.read(0, 4 * KIB)
    rig.pump()
    rig.run_leg(2)
    assert client.error(read) == 0


@pytest.mark.slow
def test_reads_without_memory_to_be_done_again_in_wait_for_it() -> None:
    rig = Rig()
    legs = range(1, 6)
    for leg_id in legs:
        rig.add_leg(leg_id, (128 << 20,), transfer_max=32 << 20)
    clients = [rig.start(1), *(rig.connect() for _ in range(3))]
    reads = [client.read(place * (32 << 20), 32 << 20) for place, client in enumerate(clients)]
    rig.pump()
    hung = []
    for leg_id in legs[:-1]:
        # One after the other hangs, and keeps what was to be read from it.
        hung.append(rig.file_ops(leg_id))
        assert len(hung[-1]) == 4
        failover(rig, leg_id, leg_id + 1)
    rig.run_leg(5)
    assert [client.error(cookie) for client, cookie in zip(clients, reads, strict=True)] == [None] * 4
    for op in hung[0]:
        rig.fail(op, errno.EIO)
        rig.run_leg(5)
    assert [client.error(cookie) for client, cookie in zip(clients, reads, strict=True)] == [0] * 4
    for op in (op for ops in hung[1:] for op in ops):
        rig.fail(op, errno.EIO)
    rig.run_leg(5)
    assert rig.engine.statistics().memory_bytes == 0


def test_hung_leg_does_not_take_every_slot_there_is() -> None:
    rig = Rig()
    for leg_id in (1, 2):
        rig.add_leg(leg_id, (8 << 20, 8 << 20), chunk=4 * KIB)
    client = rig.start(1, 2)
    zeroes = [client.zero(part * 256 * KIB, 256 * KIB) for part in range(64)]
    rig.pump()
    assert len(rig.file_ops(1)) > 1000
    failover(rig, 1, 2)
    rig.run_leg(2)
    assert [client.error(cookie) for cookie in zeroes] == [0] * 64
