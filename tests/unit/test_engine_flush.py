"""FLUSH, FUA, ZERO and TRIM, natively and where a device cannot."""

import errno

import pytest

from proxy.engine import EventKind, LegRole, OpKind
from tests.sim.rig import DEVICE_BASE, RemoteDevice, Rig, pattern
from tests.sim.wire import Command, Flag

KIB = 1024
RWF_DSYNC = 2
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16


def durable(rig: Rig, leg: int) -> bool:
    """Whether all that was written to the leg would survive a loss of power."""
    return all(device.medium.durable == device.medium.content for device in rig.legs[leg].devices)


# --- FLUSH ----------------------------------------------------------------------------------------


def test_flush_goes_to_every_device_of_every_leg_and_waits_for_all() -> None:
    rig = Rig()
    rig.add_leg(1, (16 * KIB, 16 * KIB, 32 * KIB))
    rig.add_leg(2, (32 * KIB, 32 * KIB))
    rig.add_leg(3)
    client = rig.start(1, 2, (3, LegRole.SYNCING))
    flush = client.flush()
    rig.pump()
    assert rig.counts() == {OpKind.SYNC: 6}
    for op in rig.file_ops():
        assert client.error(flush) is None
        rig.carry_out(op)
        rig.pump()
    assert client.error(flush) == 0


def test_flush_skips_devices_that_have_nothing_to_flush() -> None:
    rig = Rig()
    rig.add_leg(1, can_flush=False)
    rig.add_leg(2)
    client = rig.start(1, 2)
    client.flush()
    rig.pump()
    assert [op.fd for op in rig.file_ops()] == [rig.legs[2].devices[0].fd]


def test_flush_with_no_device_to_flush_succeeds() -> None:
    rig = Rig()
    rig.add_leg(1, can_flush=False)
    client = rig.start(1)
    flush = client.flush()
    rig.pump()
    assert client.error(flush) == 0


def test_flush_that_one_leg_fails_is_done_again_on_the_legs_left() -> None:
    rig = Rig()
    rig.add_leg(1)
    rig.add_leg(2)
    client = rig.start(1, 2)
    flush = client.flush()
    rig.pump()
    rig.fail(rig.op(2))
    rig.carry_out_all(1)
    assert client.error(flush) is None
    assert len(rig.take_events(EventKind.DEVICE_ERROR)) == 1
    rig.install(1)
    rig.pump()
    assert rig.op(1).kind is OpKind.SYNC
    rig.run()
    assert client.error(flush) == 0


def test_flush_to_a_remote_device_is_a_flush_command() -> None:
    rig = Rig()
    leg = rig.add_leg(1, remote=True)
    client = rig.start(1)
    write = client.write(0, pattern(4 * KIB))
    rig.run()
    assert client.error(write) == 0
    assert not durable(rig, 1)
    flush = client.flush()
    rig.pump()
    (server,) = leg.devices
    assert isinstance(server, RemoteDevice)
    assert [(c.command, c.flags, c.offset, c.length) for c in server.commands] == [(Command.FLUSH, 0, 0, 0)]
    rig.run()
    assert client.error(flush) == 0
    assert durable(rig, 1)


# --- FUA ------------------------------------------------------------------------------------------


def test_fua_write_goes_out_as_a_durable_write_where_every_device_can() -> None:
    rig = Rig()
    rig.add_leg(1)
    rig.add_leg(2, remote=True)
    client = rig.start(1, 2)
    write = client.write(0, pattern(4 * KIB), Flag.FUA)
    rig.pump()
    assert rig.op(1).flags == RWF_DSYNC
    (server,) = rig.legs[2].devices
    assert isinstance(server, RemoteDevice)
    assert [command.flags for command in server.commands] == [Flag.FUA]
    rig.run()
    assert client.error(write) == 0
    assert durable(rig, 1)
    assert durable(rig, 2)


def test_write_without_fua_does_not_ask_for_it() -> None:
    rig = Rig()
    rig.add_leg(1)
    client = rig.start(1)
    client.write(0, pattern(4 * KIB))
    rig.pump()
    assert rig.op(1).flags == 0


def test_fua_write_is_followed_by_a_flush_where_one_device_cannot() -> None:
    rig = Rig()
    rig.add_leg(1)
    rig.add_leg(2, can_fua=False)
    client = rig.start(1, 2)
    write = client.write(0, pattern(4 * KIB), Flag.FUA)
    rig.pump()
    assert [(op.kind, op.flags) for op in rig.file_ops()] == [(OpKind.WRITE, 0)] * 2
    rig.carry_out_all(1)
    rig.carry_out_all(2)
    assert client.error(write) is None
    assert rig.counts() == {OpKind.SYNC: 2}
    rig.run()
    assert client.error(write) == 0
    assert durable(rig, 1)
    assert durable(rig, 2)


@pytest.mark.parametrize(("offset", "length"), [(0, 8 * KIB), (100, 8 * KIB), (100, 50)])
@pytest.mark.parametrize("kind", ["write", "zero", "trim"])
@pytest.mark.parametrize("can_fua", [True, False])
def test_fua_answer_comes_only_when_everything_is_durable(
    kind: str, can_fua: bool, offset: int, length: int
) -> None:
    rig = Rig()
    rig.add_leg(1, (4 * KIB, 60 * KIB), can_fua=can_fua)
    rig.add_leg(2, (64 * KIB,), remote=True, can_fua=can_fua)
    client = rig.start(1, 2)
    fill = client.write(0, pattern(16 * KIB))
    flush = client.flush()
    rig.run()
    assert client.error(fill) == client.error(flush) == 0
    if kind == "write":
        cookie = client.write(offset, pattern(length, 2), Flag.FUA)
    else:
        cookie = client.ask(Command.ZERO if kind == "zero" else Command.TRIM, offset, length, flags=Flag.FUA)
    rig.run()
    assert client.error(cookie) == 0
    assert durable(rig, 1)
    assert durable(rig, 2)


# --- ZERO and TRIM --------------------------------------------------------------------------------


def test_zero_and_trim_punch_holes_on_every_leg() -> None:
    rig = Rig()
    rig.add_leg(1, (4 * KIB, 60 * KIB))
    rig.add_leg(2)
    client = rig.start(1, 2)
    for ask in (client.zero, client.trim):
        cookie = ask(0, 8 * KIB)
        rig.pump()
        assert [(op.kind, op.offset, op.length, op.flags) for op in rig.file_ops()] == [
            (OpKind.ALLOCATE, DEVICE_BASE, 4 * KIB, PUNCH_HOLE | KEEP_SIZE),
            (OpKind.ALLOCATE, DEVICE_BASE, 4 * KIB, PUNCH_HOLE | KEEP_SIZE),
            (OpKind.ALLOCATE, DEVICE_BASE, 8 * KIB, PUNCH_HOLE | KEEP_SIZE),
        ]
        rig.run()
        assert client.error(cookie) == 0


def test_zero_without_hole_keeps_the_space() -> None:
    rig = Rig()
    rig.add_leg(1)
    rig.add_leg(2, remote=True)
    client = rig.start(1, 2)
    client.zero(0, 4 * KIB, Flag.NO_HOLE)
    rig.pump()
    assert rig.op(1).flags == ZERO_RANGE
    (server,) = rig.legs[2].devices
    assert isinstance(server, RemoteDevice)
    assert [(c.command, c.flags) for c in server.commands] == [(Command.ZERO, Flag.NO_HOLE)]


def test_zero_falls_back_from_hole_to_zero_range_to_writing_and_remembers() -> None:
    rig = Rig()
    leg = rig.add_leg(1, (4 << 20,))
    leg.fill(pattern(4 << 20))
    client = rig.start(1)
    cookie = client.zero(4 * KIB, 3 << 20)
    for flags in (PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE):
        rig.pump()
        op = rig.op(1)
        assert (op.kind, op.flags) == (OpKind.ALLOCATE, flags)
        rig.fail(op, errno.EOPNOTSUPP)
    rig.pump()
    assert rig.op(1).kind is OpKind.WRITE
    rig.run()
    assert client.error(cookie) == 0
    assert leg.read(4 * KIB, 3 << 20) == bytes(3 << 20)
    assert rig.take_events(EventKind.DEVICE_ERROR) == []
    client.zero(0, 4 * KIB)
    rig.pump()
    assert rig.op(1).kind is OpKind.WRITE


def test_zero_that_is_written_keeps_to_the_largest_transfer() -> None:
    rig = Rig()
    rig.add_leg(1, transfer_max=8 * KIB)
    client = rig.start(1)
    client.zero(0, 32 * KIB)
    for _ in range(2):
        rig.pump()
        rig.fail(rig.op(1), errno.EOPNOTSUPP)
    rig.pump()
    written = 0
    while rig.file_ops():
        assert rig.op(1).length <= 8 * KIB
        written += rig.op(1).length
        rig.carry_out(rig.op(1))
        rig.pump()
    assert written == 32 * KIB


def test_zero_of_a_remote_device_that_cannot_is_written_by_largest_transfers() -> None:
    rig = Rig()
    leg = rig.add_leg(1, remote=True, can_zero=False, transfer_max=16 * KIB)
    leg.fill(pattern(64 * KIB))
    client = rig.start(1)
    cookie = client.zero(0, 40 * KIB)
    lengths = []
    (server,) = leg.devices
    assert isinstance(server, RemoteDevice)
    rig.pump()
    while server.commands:
        lengths += [(c.command, c.length) for c in server.commands]
        server.answer(server.commands[0])
        rig.pump()
    assert lengths == [(Command.WRITE, 16 * KIB), (Command.WRITE, 16 * KIB), (Command.WRITE, 8 * KIB)]
    assert client.error(cookie) == 0
    assert leg.read(0, 64 * KIB) == bytes(40 * KIB) + pattern(64 * KIB)[40 * KIB :]


def test_zero_that_a_remote_device_refuses_as_unsupported_is_written() -> None:
    rig = Rig()
    leg = rig.add_leg(1, remote=True)
    leg.fill(pattern(64 * KIB))
    client = rig.start(1)
    cookie = client.zero(0, 8 * KIB)
    rig.pump()
    (server,) = leg.devices
    assert isinstance(server, RemoteDevice)
    server.answer(server.commands[0], errno.EOPNOTSUPP)
    rig.pump()
    assert [c.command for c in server.commands] == [Command.WRITE]
    rig.run()
    assert client.error(cookie) == 0
    assert leg.read(0, 8 * KIB) == bytes(8 * KIB)


def test_trim_does_nothing_on_any_leg_when_one_cannot_zero() -> None:
    rig = Rig()
    rig.add_leg(1).fill(pattern(64 * KIB))
    rig.add_leg(2, remote=True, can_zero=False).fill(pattern(64 * KIB))
    client = rig.start(1, 2)
    cookie = client.trim(0, 8 * KIB)
    rig.run()
    assert client.error(cookie) == 0
    assert rig.legs[1].read(0, 64 * KIB) == rig.legs[2].read(0, 64 * KIB) == pattern(64 * KIB)


@pytest.mark.parametrize("other", ["cannot zero", "has larger blocks"])
def test_trim_that_is_done_again_leaves_all_legs_equal(other: str) -> None:
    rig = Rig()
    for leg_id in (1, 2):
        rig.add_leg(leg_id).fill(pattern(64 * KIB))
    rig.add_leg(
        3, remote=True, can_zero=other != "cannot zero", block_size=4096 if other != "cannot zero" else 512
    ).fill(pattern(64 * KIB))
    client = rig.start(1, 2)
    cookie = client.trim(512, 16 * KIB)
    rig.pump()
    rig.carry_out(rig.op(1))
    rig.fail(rig.op(2))
    rig.pump()
    rig.install(1, 3)
    rig.run()
    assert client.error(cookie) == 0
    assert rig.legs[1].read(0, 64 * KIB) == rig.legs[3].read(0, 64 * KIB)


def test_long_zero_is_done_in_steps_that_end_within_a_deadline() -> None:
    rig = Rig()
    rig.add_leg(1, (160 << 20,))
    client = rig.start(1)
    cookie = client.zero(0, 160 << 20)
    rig.pump()
    assert max(op.length for op in rig.file_ops()) <= 64 << 20
    assert sum(op.length for op in rig.file_ops()) == 160 << 20
    for op in rig.file_ops():
        rig.engine.complete(op.number, 0)
    rig.pump()
    assert client.error(cookie) == 0
