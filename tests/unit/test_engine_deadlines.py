"""A device that hangs is evidence, never a hang."""

import errno

from proxy.engine import EventKind
from tests.sim.rig import DEADLINE_NS, Rig, pattern

KIB = 1024
DEADLINE_S = DEADLINE_NS / 1e9


def rig_of_two() -> Rig:
    rig = Rig()
    rig.add_leg(1, (32 * KIB, 32 * KIB))
    rig.add_leg(2)
    rig.start(1, 2)
    return rig


def missed(rig: Rig) -> list[tuple[int, int]]:
    return [(event.leg, event.device) for event in rig.take_events(EventKind.DEADLINE_MISSED)]


def test_operation_older_than_the_deadline_is_reported_with_its_age() -> None:
    rig = rig_of_two()
    rig.clients[0].read(40 * KIB, 512)
    rig.pump()
    rig.pass_time(0.9 * DEADLINE_S)
    assert missed(rig) == []
    rig.pass_time(0.2 * DEADLINE_S)
    (event,) = rig.take_events(EventKind.DEADLINE_MISSED)
    assert (event.leg, event.device, event.code) == (1, 1, errno.ETIMEDOUT)
    assert DEADLINE_NS < event.a <= 1.2 * DEADLINE_NS


def test_hanging_device_is_reported_once_until_the_next_map() -> None:
    rig = rig_of_two()
    rig.clients[0].read(0, 512)
    rig.pump()
    for _ in range(5):
        rig.pass_time(2 * DEADLINE_S)
    assert missed(rig) == [(1, 0)]
    rig.install(1, 2)
    rig.pass_time(DEADLINE_S)
    assert missed(rig) == [(1, 0)]


def test_each_hanging_device_is_reported() -> None:
    rig = rig_of_two()
    rig.clients[0].write(28 * KIB, pattern(8 * KIB))
    rig.pump()
    rig.pass_time(2 * DEADLINE_S)
    assert sorted(missed(rig)) == [(1, 0), (1, 1), (2, 0)]


def test_flush_may_take_longer() -> None:
    rig = rig_of_two()
    rig.clients[0].flush()
    rig.pump()
    rig.pass_time(3.5 * DEADLINE_S)
    assert missed(rig) == []
    rig.pass_time(DEADLINE_S)
    assert len(missed(rig)) == 3


def test_young_operation_behind_an_old_flush_is_judged_by_its_own_age() -> None:
    rig = rig_of_two()
    (client,) = rig.clients
    client.flush()
    rig.pump()
    rig.pass_time(1.5 * DEADLINE_S)
    client.read(0, 512)
    rig.pump()
    rig.pass_time(0.9 * DEADLINE_S)
    assert missed(rig) == []
    rig.pass_time(0.2 * DEADLINE_S)
    assert missed(rig) == [(1, 0)]


def test_engine_that_was_stopped_itself_hears_what_has_come_before_it_judges() -> None:
    rig = rig_of_two()
    (client,) = rig.clients
    cookie = client.read(0, 512)
    rig.pump()
    rig.engine.now_ns += 10 * DEADLINE_NS
    rig.engine.step()
    rig.run()
    assert client.error(cookie) == 0
    rig.pass_time(DEADLINE_S)
    assert missed(rig) == []


def test_device_that_hangs_is_found_out_soon_after_the_engine_was_stopped() -> None:
    rig = rig_of_two()
    rig.clients[0].read(0, 512)
    rig.pump()
    rig.engine.now_ns += 10 * DEADLINE_NS
    rig.pump()
    assert missed(rig) == []
    rig.pass_time(0.5 * DEADLINE_S)
    assert missed(rig) == [(1, 0)]


def test_idle_devices_miss_no_deadline() -> None:
    rig = rig_of_two()
    rig.clients[0].write(0, pattern(4 * KIB))
    rig.run()
    rig.pass_time(1000)
    assert missed(rig) == []


def test_late_answer_after_all_lets_the_domain_go_on() -> None:
    rig = rig_of_two()
    (client,) = rig.clients
    cookie = client.write(0, pattern(512))
    rig.pump()
    rig.pass_time(2 * DEADLINE_S)
    rig.engine.hold()
    rig.pump()
    assert rig.take_events(EventKind.DRAINED) == []
    rig.run()
    assert len(rig.take_events(EventKind.DRAINED)) == 1
    rig.install(1, 2)
    rig.engine.release()
    rig.run()
    assert client.error(cookie) == 0
