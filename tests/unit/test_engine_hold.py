"""Holding a domain: what runs on, what waits, what is told, and the order in which it all goes on."""

import errno

from proxy.engine import EventKind, OpKind, RequestKind
from tests.sim.rig import DEVICE_BASE, Rig, pattern

KIB = 1024


def test_hold_keeps_new_requests_from_the_devices() -> None:
    rig = Rig()
    rig.add_leg(1)
    client = rig.start(1)
    rig.engine.hold()
    client.read(0, 4 * KIB)
    client.write(0, pattern(4 * KIB))
    client.flush()
    client.zero(0, 4 * KIB)
    client.trim(0, 4 * KIB)
    client.read(0, 0)
    rig.pump()
    assert rig.file_ops() == []
    assert client.replies == {}


def test_hold_still_refuses_what_is_wrong() -> None:
    rig = Rig()
    rig.add_leg(1)
    client = rig.start(1)
    rig.engine.hold()
    cookie = client.read(64 * KIB, 4 * KIB)
    rig.pump()
    assert client.error(cookie) == errno.EINVAL


def test_hold_answers_reads_under_way_and_withholds_every_other_answer() -> None:
    rig = Rig()
    rig.add_leg(1)
    rig.add_leg(2)
    client = rig.start(1, 2)
    read = client.read(0, 4 * KIB)
    others = [
        client.write(8 * KIB, pattern(4 * KIB)),
        client.zero(16 * KIB, 4 * KIB),
        client.trim(24 * KIB, 4 * KIB),
        client.flush(),
    ]
    rig.pump()
    rig.engine.hold()
    rig.run()
    assert client.error(read) == 0
    assert [client.error(cookie) for cookie in others] == [None] * 4
    rig.engine.release()
    rig.pump()
    assert [client.error(cookie) for cookie in others] == [0] * 4


def test_hold_withholds_a_write_refused_by_every_leg() -> None:
    rig = Rig()
    rig.add_leg(1)
    client = rig.start(1)
    cookie = client.write(0, pattern(4 * KIB))
    rig.pump()
    rig.fail(rig.op(1), errno.ENOSPC)
    rig.pump()
    rig.engine.hold()
    rig.engine.fail_parked()
    rig.pump()
    assert client.error(cookie) is None
    rig.engine.release()
    rig.pump()
    assert client.error(cookie) == errno.ENOSPC


def test_drained_comes_when_the_last_request_under_way_is_done() -> None:
    rig = Rig()
    rig.add_leg(1)
    client = rig.start(1)
    client.write(0, pattern(4 * KIB))
    client.write(8 * KIB, pattern(4 * KIB))
    rig.pump()
    number = rig.engine.hold()
    rig.pump()
    assert rig.take_events(EventKind.DRAINED) == []
    rig.carry_out(rig.file_ops()[1])
    rig.pump()
    assert rig.take_events(EventKind.DRAINED) == []
    rig.carry_out(rig.file_ops()[0])
    rig.pump()
    (event,) = rig.take_events(EventKind.DRAINED)
    assert (event.a, event.generation) == (number, 1)


def test_drained_names_the_hold_it_answers() -> None:
    rig = Rig()
    rig.add_leg(1)
    client = rig.start(1)
    client.write(0, pattern(4 * KIB))
    rig.pump()
    first = rig.engine.hold()
    second = rig.engine.hold()
    assert second > first
    rig.run()
    assert [event.a for event in rig.take_events(EventKind.DRAINED)] == [second]
    third = rig.engine.hold()
    rig.pump()
    assert [event.a for event in rig.take_events(EventKind.DRAINED)] == [third]


def test_drained_before_the_first_map_has_no_generation() -> None:
    rig = Rig()
    number = rig.engine.hold()
    rig.pump()
    (event,) = rig.take_events(EventKind.DRAINED)
    assert (event.a, event.generation) == (number, 0)


def test_requests_that_wait_for_an_overlapping_one_stay_while_the_domain_holds() -> None:
    rig = Rig()
    rig.add_leg(1)
    client = rig.start(1)
    first = client.write(0, pattern(4 * KIB, 1))
    second = client.write(0, pattern(4 * KIB, 2))
    rig.pump()
    rig.engine.hold()
    rig.carry_out(rig.op(1))
    rig.pump()
    assert len(rig.take_events(EventKind.DRAINED)) == 1
    assert rig.file_ops() == []
    rig.engine.release()
    rig.run()
    assert client.error(first) == client.error(second) == 0
    assert rig.legs[1].read(0, 4 * KIB) == pattern(4 * KIB, 2)


def test_release_keeps_the_order_of_withheld_parked_waiting_and_held_requests() -> None:
    rig = Rig()
    rig.add_leg(1)
    rig.add_leg(2)
    client = rig.start(1, 2)
    withheld = client.write(32 * KIB, pattern(4 * KIB))
    parked = client.write(0, pattern(4 * KIB, 1))
    waiting = client.write(0, pattern(4 * KIB, 2))
    rig.pump()
    rig.engine.hold()
    rig.carry_out_all(1)
    done, failed = rig.file_ops(2)
    rig.carry_out(done)
    rig.fail(failed)
    rig.pump()
    held = [
        client.write(0, pattern(4 * KIB, 3)),
        client.read(0, 4 * KIB),
        client.write(0, pattern(4 * KIB, 4)),
    ]
    rig.pump()
    rig.engine.fence_leg(2)
    rig.install(1)
    rig.pump()
    assert rig.file_ops() == []
    assert client.replies == {}
    rig.engine.release()
    rig.pump()
    for expected in (1, 2, 3):
        assert rig.engine.data(rig.op(1).number) == pattern(4 * KIB, expected)
        rig.carry_out(rig.op(1))
        rig.pump()
    assert rig.op(1).kind is OpKind.READ
    rig.run()
    assert client.order == [withheld, parked, waiting, *held]
    assert client.replies[held[1]].payload == pattern(4 * KIB, 3)


def test_withheld_write_is_done_again_on_an_active_leg_that_may_lack_it() -> None:
    rig = Rig()
    rig.add_leg(1)
    rig.add_leg(2)
    client = rig.start(1)
    withheld = client.write(0, pattern(4 * KIB))
    rig.pump()
    rig.engine.hold()
    rig.run()
    rig.engine.fence_leg(1)
    rig.install(2)
    rig.engine.release()
    rig.pump()
    assert client.error(withheld) is None
    rig.run()
    assert client.error(withheld) == 0
    assert rig.legs[2].read(0, 4 * KIB) == pattern(4 * KIB)
    assert rig.engine.statistics().memory_bytes == 0


def test_replayed_tells_how_many_felt_the_hold_and_for_how_long() -> None:
    rig = Rig()
    rig.add_leg(1)
    client = rig.start(1)
    rig.pump()
    rig.take_events()
    client.write(0, pattern(4 * KIB))
    rig.pump()
    rig.engine.hold()
    rig.run()
    client.read(8 * KIB, 4 * KIB)
    rig.pump()
    rig.pass_time(0.25)
    rig.engine.release()
    rig.pump()
    assert rig.take_events(EventKind.REPLAYED) == []
    rig.pass_time(0.125)
    rig.run()
    (event,) = rig.take_events(EventKind.REPLAYED)
    assert (event.a, event.b) == (2, 375_000_000)


def test_release_without_a_map_is_refused() -> None:
    rig = Rig()
    try:
        rig.engine.release()
    except RuntimeError:
        return
    raise AssertionError("released with nothing to run under")


def test_fail_parked_before_the_first_map_does_nothing() -> None:
    rig = Rig()
    rig.engine.fail_parked()
    rig.pump()


def test_client_that_comes_before_the_first_map_waits_for_it() -> None:
    rig = Rig()
    client = rig.connect()
    read, past = client.read(0, 4 * KIB), client.read(64 * KIB, 4 * KIB)
    stranger = rig.connect(disk=9)
    unknown = stranger.read(0, 4 * KIB)
    rig.pump()
    assert client.replies == stranger.replies == {}
    rig.add_leg(1)
    rig.install(1)
    rig.engine.release()
    rig.run()
    assert (client.error(read), client.error(past)) == (0, errno.EINVAL)
    assert stranger.error(unknown) == errno.ESHUTDOWN


def test_own_request_under_hold_waits_and_tells_done_with_its_token() -> None:
    rig = Rig()
    rig.add_leg(1)
    rig.start(1)
    rig.engine.hold()
    first = rig.engine.submit(RequestKind.ZERO, 0, 0, 8 * KIB)
    second = rig.engine.submit(RequestKind.ZERO, 0, 8 * KIB, 8 * KIB)
    rig.run()
    assert rig.take_events(EventKind.DONE) == []
    rig.engine.release()
    rig.run()
    assert sorted(event.a for event in rig.take_events(EventKind.DONE)) == [first, second]


def test_read_past_the_end_of_a_disk_that_shrank_while_it_was_held_is_refused() -> None:
    rig = Rig()
    rig.add_leg(1)
    client = rig.start(1)
    rig.engine.hold()
    read, write = client.read(32 * KIB, 4 * KIB), client.write(32 * KIB, pattern(4 * KIB))
    rig.pump()
    rig.install(1, size=32 * KIB)
    rig.engine.release()
    rig.run()
    assert (client.error(read), client.error(write)) == (errno.EINVAL, errno.ENOSPC)


def test_flush_of_our_own_is_done_while_clients_are_held_and_theirs_waits() -> None:
    rig = Rig()
    rig.add_leg(1)
    client = rig.start(1)
    cookie = client.write(0, pattern(4096))
    rig.run()
    assert client.error(cookie) == 0
    rig.engine.hold()
    theirs = client.flush()
    token = rig.engine.submit(RequestKind.FLUSH)
    rig.run()
    assert [event.a for event in rig.take_events(EventKind.DONE)] == [token]
    assert client.error(theirs) is None
    (device,) = rig.legs[1].devices
    assert device.medium.durable[DEVICE_BASE : DEVICE_BASE + 4096] == pattern(4096)
    rig.engine.release()
    rig.run()
    assert client.error(theirs) == 0


def test_flush_of_our_own_that_a_lost_leg_fails_after_the_release_is_done_again() -> None:
    rig = Rig()
    rig.add_leg(1)
    rig.add_leg(2)
    rig.start(1, 2)
    rig.engine.hold()
    rig.engine.fence_leg(2)
    token = rig.engine.submit(RequestKind.FLUSH)
    rig.pump()
    late = rig.op(1, kind=OpKind.SYNC)
    rig.install(1)
    rig.engine.release()
    rig.pump()
    rig.carry_out(late)
    rig.run()
    assert [(event.a, event.code) for event in rig.take_events(EventKind.DONE)] == [(token, 0)]
