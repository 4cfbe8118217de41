"""Devices that are files: what the kernel may answer, and what then."""

import errno

import pytest

from proxy.engine import EventKind, OpKind
from tests.sim.rig import DEVICE_BASE, Rig, pattern

KIB = 1024


def rig_of_one() -> Rig:
    rig = Rig()
    rig.add_leg(1).fill(pattern(64 * KIB))
    rig.start(1)
    return rig


def test_short_read_goes_on_where_it_stopped() -> None:
    rig = rig_of_one()
    (client,) = rig.clients
    cookie = client.read(4 * KIB, 16 * KIB)
    rig.pump()
    for length in (512, 4 * KIB, 1 * KIB):
        rig.carry_out(rig.op(1), length)
        rig.pump()
    op = rig.op(1)
    assert (op.offset, op.length) == (DEVICE_BASE + 4 * KIB + 5632, 16 * KIB - 5632)
    rig.run()
    assert client.replies[cookie].payload == pattern(64 * KIB)[4 * KIB : 20 * KIB]


def test_short_write_goes_on_where_it_stopped() -> None:
    rig = rig_of_one()
    (client,) = rig.clients
    cookie = client.write(4 * KIB, pattern(16 * KIB, 2))
    rig.pump()
    for length in (512, 4 * KIB, 1 * KIB):
        rig.carry_out(rig.op(1), length)
        rig.pump()
        assert client.error(cookie) is None
    rig.run()
    assert client.error(cookie) == 0
    assert rig.legs[1].read(4 * KIB, 16 * KIB) == pattern(16 * KIB, 2)


@pytest.mark.parametrize("error_number", [errno.EINTR, errno.EAGAIN])
@pytest.mark.parametrize("kind", ["read", "write", "flush", "zero"])
def test_interrupted_operation_is_tried_again(kind: str, error_number: int) -> None:
    rig = rig_of_one()
    (client,) = rig.clients
    match kind:
        case "read":
            cookie = client.read(0, 4 * KIB)
        case "write":
            cookie = client.write(0, pattern(4 * KIB))
        case "flush":
            cookie = client.flush()
        case _:
            cookie = client.zero(0, 4 * KIB)
    for _ in range(3):
        rig.pump()
        rig.fail(rig.op(1), error_number)
    rig.run()
    assert client.error(cookie) == 0
    assert rig.take_events(EventKind.DEVICE_ERROR) == []


@pytest.mark.parametrize("kind", ["read", "write"])
def test_device_that_has_shrunk_is_an_error_not_a_loop(kind: str) -> None:
    rig = rig_of_one()
    (client,) = rig.clients
    cookie = client.read(0, 8 * KIB) if kind == "read" else client.write(0, pattern(8 * KIB))
    rig.pump()
    rig.carry_out(rig.op(1), 4 * KIB)
    rig.pump()
    rig.engine.complete(rig.op(1).number, 0)
    rig.pump()
    (event,) = rig.take_events(EventKind.DEVICE_ERROR)
    assert event.code == errno.EIO
    assert rig.file_ops() == []
    assert client.error(cookie) is None


def test_error_after_a_short_write_parks_the_whole_request() -> None:
    rig = rig_of_one()
    rig.add_leg(2)
    rig.install(1, 2)
    (client,) = rig.clients
    cookie = client.write(0, pattern(8 * KIB, 2))
    rig.pump()
    rig.carry_out_all(1)
    rig.carry_out(rig.op(2), 4 * KIB)
    rig.pump()
    rig.fail(rig.op(2), errno.ENOSPC)
    rig.pump()
    assert client.error(cookie) is None
    rig.install(1)
    rig.pump()
    assert (rig.op(1).kind, rig.op(1).length) == (OpKind.WRITE, 8 * KIB)


def test_device_statistics_count_each_device_by_itself() -> None:
    rig = Rig()
    rig.add_leg(1, (8 * KIB, 56 * KIB))
    client = rig.start(1)
    client.write(4 * KIB, pattern(8 * KIB))
    client.read(0, 4 * KIB)
    client.flush()
    rig.pump()
    rig.engine.now_ns += 5_000_000
    rig.run()
    first, second = rig.engine.device_statistics(1)
    assert (first.reads, first.writes, first.flushes) == (1, 1, 1)
    assert (first.read_bytes, first.written_bytes) == (4 * KIB, 4 * KIB)
    assert (second.reads, second.writes, second.flushes) == (0, 1, 1)
    assert first.latency_max_ns >= 5_000_000
    assert (first.in_flight, first.errors, first.lost) == (0, 0, False)
    client.read(0, 4 * KIB)
    rig.pump()
    assert rig.engine.device_statistics(1)[0].in_flight == 1
    rig.fail(rig.op(1, 0), errno.EREMOTEIO)
    rig.pump()
    assert rig.engine.device_statistics(1)[0].errors == 1
    assert rig.engine.device_statistics(1)[0].error_number == errno.EREMOTEIO
