"""Probes: what nobody asks for anything is asked, and judged like anything else."""

import errno

import pytest

from proxy.engine import EventKind, OpKind, PendingOp
from tests.sim.rig import DEADLINE_NS, RemoteDevice, Rig, new_engine
from tests.sim.wire import Command

KIB = 1024
PROBE_S = 0.5
DEADLINE_S = DEADLINE_NS / 1e9


def rig_of(*legs: int, remote: int = 0) -> Rig:
    """Legs of one device each, serving, with nothing asked of them yet."""
    rig = Rig(new_engine(probe_ns=round(PROBE_S * 1e9)))
    for leg in legs:
        rig.add_leg(leg, remote=leg == remote)
    rig.start(*legs)
    rig.pump()
    return rig


def probes(rig: Rig, leg: int) -> list[PendingOp]:
    return [op for op in rig.file_ops(leg) if op.kind is OpKind.READ and op.offset == 0]


def test_silent_devices_of_every_leg_are_probed_and_nothing_comes_of_their_answers() -> None:
    rig = rig_of(1, 2)
    for _ in range(3):
        rig.pass_time(PROBE_S)
        rig.pump()
        assert (len(probes(rig, 1)), len(probes(rig, 2))) == (1, 1)
        rig.run()
    assert not rig.take_events(EventKind.DEVICE_ERROR, EventKind.DEADLINE_MISSED, EventKind.READ_REPAIRED)
    statistics = rig.engine.statistics()
    assert (statistics.memory_bytes, statistics.running, statistics.late) == (0, 0, 0)


def test_device_that_answers_others_is_not_probed() -> None:
    rig = rig_of(1, 2)
    (client,) = rig.clients
    for _ in range(4):
        rig.pass_time(PROBE_S * 0.7)
        client.write(0, bytes(4 * KIB))
        rig.pump()
        assert not probes(rig, 1) and not probes(rig, 2)
        rig.run()
    client.read(0, 4 * KIB)
    rig.run()
    rig.pass_time(PROBE_S * 0.7)
    client.read(0, 4 * KIB)
    rig.run()
    rig.pass_time(PROBE_S * 0.7)
    rig.pump()
    assert not probes(rig, 1)
    assert len(probes(rig, 2)) == 1  # reads say nothing of a backup


@pytest.mark.parametrize("leg", [1, 2])
def test_device_that_hangs_is_found_although_nobody_waits_for_it(leg: int) -> None:
    rig = rig_of(1, 2)
    rig.pass_time(PROBE_S)
    rig.pump()
    rig.run_leg(3 - leg)
    rig.pass_time(DEADLINE_S * 1.1)
    rig.pump()
    (event,) = rig.take_events(EventKind.DEADLINE_MISSED)
    assert (event.leg, event.code) == (leg, errno.ETIMEDOUT)
    assert len(probes(rig, leg)) == 1  # one is enough


@pytest.mark.parametrize(("error", "told"), [(errno.EIO, 0), (errno.ENODATA, 0), (errno.ENODEV, 1)])
def test_probe_that_meets_an_error_speaks_against_a_device_that_is_gone_only(error: int, told: int) -> None:
    rig = rig_of(1, 2)
    rig.pass_time(PROBE_S)
    rig.pump()
    rig.run_leg(1)
    rig.fail(rig.op(2), error)
    rig.pump()
    assert len(rig.take_events(EventKind.DEVICE_ERROR)) == told
    assert not rig.take_events(EventKind.READ_REPAIRED)
    assert rig.engine.statistics().parked == 0


def test_held_domain_is_not_probed_and_waits_for_no_probe() -> None:
    rig = rig_of(1, 2)
    rig.pass_time(PROBE_S)
    rig.pump()
    rig.engine.hold()
    rig.pump()
    assert rig.take_events(EventKind.DRAINED)
    rig.run()
    rig.pass_time(PROBE_S * 3)
    rig.pump()
    assert not rig.file_ops()


def test_leg_fenced_with_a_probe_under_way_is_drained_when_that_is_answered() -> None:
    rig = rig_of(1, 2)
    rig.pass_time(PROBE_S)
    rig.pump()
    rig.engine.fence_leg(2)
    rig.pump()
    assert not rig.take_events(EventKind.LEG_DRAINED)
    rig.run()
    assert [event.leg for event in rig.take_events(EventKind.LEG_DRAINED)] == [2]
    rig.pass_time(PROBE_S)
    rig.pump()
    assert len(probes(rig, 1)) == 1 and not probes(rig, 2)
    rig.run()
    assert rig.engine.statistics().memory_bytes == 0


def test_remote_device_is_probed_over_its_one_stream_and_its_loss_is_told_once() -> None:
    rig = rig_of(1, 2, remote=2)
    server = rig.legs[2].devices[0]
    assert isinstance(server, RemoteDevice)
    rig.pass_time(PROBE_S)
    rig.pump()
    assert [(one.command, one.offset, one.length) for one in server.commands] == [(Command.READ, 0, 4 * KIB)]
    server.ended = errno.ECONNRESET
    rig.run()
    (event,) = rig.take_events(EventKind.DEVICE_LOST, EventKind.DEVICE_ERROR)
    assert (event.kind, event.leg) == (EventKind.DEVICE_LOST, 2)
    rig.pass_time(PROBE_S)
    rig.pump()
    assert rig.engine.statistics().running == 0


def test_hold_waits_for_the_answer_of_the_leg_that_is_to_take_over() -> None:
    rig = rig_of(1, 2, 3)
    rig.pass_time(PROBE_S)
    rig.pump()
    rig.engine.hold((2,))
    rig.run_leg(3)
    assert not rig.take_events(EventKind.DRAINED)
    rig.run_leg(2)
    assert rig.take_events(EventKind.DRAINED)
    assert len(probes(rig, 1)) == 1
