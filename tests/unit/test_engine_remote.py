"""Devices that are NBD exports of another server: many commands on one stream, and how it can break."""

import errno

import pytest

from proxy.engine import EventKind, OpKind
from tests.sim.rig import DEADLINE_NS, DEVICE_BASE, RemoteDevice, Rig, pattern
from tests.sim.wire import REPLY, Command, Reply

KIB = 1024


def rig_of_two(*, transfer_max: int = 1 << 20, can_zero: bool = True) -> tuple[Rig, RemoteDevice]:
    """A remote active leg and a backup that is a file."""
    rig = Rig()
    leg = rig.add_leg(1, (64 * KIB,), remote=True, transfer_max=transfer_max, can_zero=can_zero)
    leg.fill(pattern(64 * KIB))
    rig.add_leg(2).fill(pattern(64 * KIB))
    rig.start(1, 2)
    (server,) = leg.devices
    assert isinstance(server, RemoteDevice)
    return rig, server


def failover(rig: Rig) -> None:
    rig.engine.hold()
    rig.engine.fence_leg(1)
    rig.run_leg(2)
    rig.install(2)
    rig.engine.release()
    rig.pump()


def lost(rig: Rig) -> list[tuple[int, int, int]]:
    return [(event.leg, event.code, event.a) for event in rig.take_events(EventKind.DEVICE_LOST)]


# --- The stream -----------------------------------------------------------------------------------


def test_commands_are_pipelined_and_answered_in_any_order() -> None:
    rig, server = rig_of_two()
    (client,) = rig.clients
    cookies = [client.read(place * 4 * KIB, 4 * KIB) for place in range(8)]
    rig.pump()
    assert [(c.command, c.offset, c.length) for c in server.commands] == [
        (Command.READ, DEVICE_BASE + place * 4 * KIB, 4 * KIB) for place in range(8)
    ]
    assert len({command.cookie for command in server.commands}) == 8
    for command in server.commands[::-1]:
        server.answer(command)
    rig.pump()
    assert client.order == cookies[::-1]
    for place, cookie in enumerate(cookies):
        assert client.replies[cookie].payload == pattern(64 * KIB)[place * 4 * KIB :][: 4 * KIB]


def test_commands_of_one_batch_go_out_in_one_send() -> None:
    rig, server = rig_of_two()
    server.accepts = 0
    (client,) = rig.clients
    for place in range(8):
        client.read(place * 4 * KIB, 4 * KIB)
    rig.pump()
    (send,) = [op for op in rig.engine.pending() if op.fd == server.fd and op.kind is OpKind.SEND]
    assert send.length == 8 * 28


@pytest.mark.parametrize("receive_max", [1, 15, 16, 17, 4000])
def test_replies_in_any_pieces_are_understood(receive_max: int) -> None:
    rig, server = rig_of_two()
    server.receive_max = receive_max
    (client,) = rig.clients
    cookies = [client.read(100 * place, 1000) for place in range(4)]
    write = client.write(8 * KIB, pattern(4 * KIB, 2))
    rig.run()
    assert client.error(write) == 0
    for place, cookie in enumerate(cookies):
        assert client.replies[cookie].payload == pattern(64 * KIB)[100 * place : 100 * place + 1000]


@pytest.mark.parametrize("accepts", [1, 27, 28, 29, 1000])
def test_commands_in_any_pieces_arrive_whole(accepts: int) -> None:
    rig, server = rig_of_two()
    (client,) = rig.clients
    server.accepts = 0
    cookies = [client.write(4 * KIB * place, pattern(2 * KIB, place + 2)) for place in range(3)]
    rig.pump()
    while len(server.commands) < 3:
        server.accepts = accepts
        rig.pump()
    server.accepts = None
    rig.run()
    assert [client.error(cookie) for cookie in cookies] == [0, 0, 0]
    for place in range(3):
        assert rig.legs[1].read(4 * KIB * place, 2 * KIB) == pattern(2 * KIB, place + 2)


def test_command_is_split_by_the_largest_transfer() -> None:
    rig, server = rig_of_two(transfer_max=16 * KIB)
    (client,) = rig.clients
    read, write = client.read(0, 40 * KIB), client.write(40 * KIB, pattern(24 * KIB, 2))
    rig.pump()
    assert [c.length for c in server.commands] == [16 * KIB, 16 * KIB, 8 * KIB, 16 * KIB, 8 * KIB]
    rig.run()
    assert client.replies[read].payload == pattern(40 * KIB)
    assert client.error(write) == 0


def test_more_commands_than_one_send_holds_all_go_out() -> None:
    rig, server = rig_of_two()
    first = rig.clients[0]
    clients = [first, rig.connect(), rig.connect()]
    server.accepts = 0
    cookies = [
        (client, client.write(512 * (place * 3 + each), pattern(512, place)))
        for each, client in enumerate(clients)
        for place in range(40)
    ]
    for client in clients:
        for _ in range(120):
            cookies.append((client, client.read(62 * KIB, 512)))
    rig.pump()
    server.accepts = None
    rig.run()
    assert all(client.error(cookie) == 0 for client, cookie in cookies)


@pytest.mark.parametrize("error_number", [errno.EINTR, errno.EAGAIN])
def test_interrupted_stream_goes_on(error_number: int) -> None:
    rig, server = rig_of_two()
    (client,) = rig.clients
    server.accepts = 0
    cookie = client.read(0, 512)
    rig.pump()
    for op in rig.engine.pending():
        if op.fd == server.fd:
            rig.engine.complete(op.number, -error_number)
    server.accepts = None
    rig.run()
    assert client.error(cookie) == 0
    assert lost(rig) == []


# --- Errors of commands ---------------------------------------------------------------------------


def test_error_reply_is_a_device_error_and_the_stream_goes_on() -> None:
    rig, server = rig_of_two()
    (client,) = rig.clients
    failing, good = client.read(0, 4 * KIB), client.read(8 * KIB, 4 * KIB)
    rig.pump()
    server.answer(server.commands[0], errno.ENODEV)
    rig.run()
    (event,) = rig.take_events(EventKind.DEVICE_ERROR)
    assert (event.leg, event.code, event.b) == (1, errno.ENODEV, DEVICE_BASE)
    assert client.error(good) == 0
    failover(rig)
    rig.run()
    assert client.error(failing) == 0


def test_error_that_is_no_errno_is_eio() -> None:
    rig, server = rig_of_two()
    (client,) = rig.clients
    client.write(0, pattern(4 * KIB))
    rig.pump()
    server.answer(server.commands[0], 0xDEADBEEF)
    rig.pump()
    assert [event.code for event in rig.take_events(EventKind.DEVICE_ERROR)] == [errno.EIO]


# --- A stream that breaks -------------------------------------------------------------------------


@pytest.mark.parametrize("ended", [0, errno.ECONNRESET, errno.ETIMEDOUT])
def test_lost_stream_is_told_with_how_many_are_of_unknown_fate(ended: int) -> None:
    rig, server = rig_of_two()
    (client,) = rig.clients
    requests = [client.write(0, pattern(4 * KIB, 2)), client.read(8 * KIB, 4 * KIB)]
    rig.pump()
    server.ended = ended
    rig.pump()
    assert lost(rig) == [(1, ended or errno.ECONNRESET, 2)]
    failover(rig)
    (event,) = rig.take_events(EventKind.LEG_DRAINED)
    # Of the two only the write could still do harm.
    assert (event.leg, event.a) == (1, 1)
    assert rig.engine.device_statistics(1)[0].unproven == 1
    rig.run()
    assert [client.error(cookie) for cookie in requests] == [0, 0]
    assert rig.engine.statistics().memory_bytes == 0


def test_lost_idle_stream_leaves_nothing_unproven() -> None:
    rig, server = rig_of_two()
    server.ended = 0
    rig.pump()
    assert lost(rig) == [(1, errno.ECONNRESET, 0)]
    rig.engine.fence_leg(1)
    rig.pump()
    assert [event.a for event in rig.take_events(EventKind.LEG_DRAINED)] == [0]


def test_requests_to_a_lost_device_are_parked_until_the_next_map() -> None:
    rig, server = rig_of_two()
    (client,) = rig.clients
    server.ended = 0
    rig.pump()
    requests = [client.read(0, 4 * KIB), client.write(0, pattern(4 * KIB)), client.flush()]
    rig.pump()
    assert client.replies == {}
    assert len(lost(rig)) == 1
    failover(rig)
    rig.run()
    assert [client.error(cookie) for cookie in requests] == [0, 0, 0]


def test_lost_stream_with_commands_queued_counts_only_what_went_out() -> None:
    rig, server = rig_of_two()
    (client,) = rig.clients
    server.accepts = 0
    client.write(0, pattern(4 * KIB, 2))
    rig.pump()
    client.write(8 * KIB, pattern(4 * KIB, 3))
    client.write(16 * KIB, pattern(4 * KIB, 3))
    rig.pump()
    server.ended = errno.ECONNRESET
    rig.pump()
    assert len(lost(rig)) == 1
    failover(rig)
    assert [event.a for event in rig.take_events(EventKind.LEG_DRAINED)] == [1]
    rig.run()
    assert len(client.replies) == 3


def test_lost_stream_with_a_payload_half_received_does_not_answer_with_it() -> None:
    rig, server = rig_of_two()
    (client,) = rig.clients
    cookie = client.read(0, 4 * KIB)
    rig.pump()
    (command,) = server.commands
    server.outbox += Reply(0, command.cookie, b"\xee" * 4 * KIB).pack()[:2000]
    server.ended = 0
    rig.pump()
    failover(rig)
    rig.run()
    assert client.replies[cookie].payload == pattern(4 * KIB)
    assert rig.engine.statistics().memory_bytes == 0


def test_stream_that_takes_nothing_any_more_is_lost_by_its_send_too() -> None:
    rig, server = rig_of_two()
    (client,) = rig.clients
    server.accepts = 0
    client.write(0, pattern(4 * KIB))
    rig.pump()
    (send,) = [op for op in rig.engine.pending() if op.fd == server.fd and op.kind is OpKind.SEND]
    rig.engine.complete(send.number, -errno.EPIPE)
    rig.pump()
    assert lost(rig) == [(1, errno.EPIPE, 1)]


@pytest.mark.parametrize(
    "garbage",
    [
        pytest.param(REPLY.pack(0x12345678, 0, 1), id="magic"),
        pytest.param(REPLY.pack(0x67446698, 0, 0xFFFFFFFF), id="slot"),
        pytest.param(REPLY.pack(0x67446698, 0, 0x7FFFFFFF_00000001), id="serial"),
        pytest.param(REPLY.pack(0x668E33EF, 0, 1) + bytes(16), id="structured"),
    ],
)
def test_reply_to_what_was_not_asked_loses_the_device(garbage: bytes) -> None:
    rig, server = rig_of_two()
    (client,) = rig.clients
    cookie = client.read(0, 4 * KIB)
    rig.pump()
    server.outbox += garbage
    rig.pump()
    assert lost(rig) == [(1, errno.EPROTO, 1)]
    assert server.shut
    failover(rig)
    rig.run()
    assert client.replies[cookie].payload == pattern(4 * KIB)


def test_second_reply_to_one_command_loses_the_device() -> None:
    rig, server = rig_of_two()
    (client,) = rig.clients
    first, second = client.write(0, pattern(512)), client.read(4 * KIB, 512)
    rig.pump()
    write = server.commands[0]
    server.answer(write)
    server.outbox += Reply(0, write.cookie).pack()
    rig.pump()
    assert lost(rig) == [(1, errno.EPROTO, 1)]
    failover(rig)
    rig.run()
    assert client.error(first) == client.error(second) == 0


def test_reply_to_a_command_that_is_still_queued_loses_the_device() -> None:
    rig, server = rig_of_two()
    (client,) = rig.clients
    client.read(0, 512)
    rig.pump()
    known = server.commands[0].cookie
    server.answer(server.commands[0])
    rig.pump()
    server.accepts = 0
    client.read(512, 512)
    rig.pump()
    client.read(1024, 512)
    rig.pump()
    # The slot of the first read is used again, by the read that is being sent or the one queued.
    for serial in range(1, 4):
        server.outbox += Reply(0, (serial + (known >> 32)) << 32 | 0).pack()
    rig.pump()
    assert len(lost(rig)) == 1


def test_reply_that_is_there_before_its_command_was_sent_whole_waits_for_that() -> None:
    rig, server = rig_of_two()
    (client,) = rig.clients
    server.accepts = 28 + 100
    cookie = client.write(0, pattern(4 * KIB, 2))
    rig.pump()
    rig.run_leg(2)
    (send,) = [op for op in rig.engine.pending() if op.fd == server.fd and op.kind is OpKind.SEND]
    assert send.length == 4 * KIB - 100
    # Servers may refuse a write as soon as they have seen its header.
    header_cookie = server._reader._buffer[8:16]
    server.outbox += REPLY.pack(0x67446698, errno.ENOSPC, int.from_bytes(header_cookie, "big"))
    rig.pump()
    assert rig.engine.data(send.number) == pattern(4 * KIB, 2)[100:]
    assert rig.take_events(EventKind.DEVICE_ERROR) == []
    server.accepts = None
    rig.pump()
    assert [event.code for event in rig.take_events(EventKind.DEVICE_ERROR)] == [errno.ENOSPC]
    assert client.error(cookie) is None


# --- Fence ----------------------------------------------------------------------------------------


def test_fence_lets_no_queued_command_out_and_waits_for_what_is_out() -> None:
    rig, server = rig_of_two()
    (client,) = rig.clients
    requests = [client.write(0, pattern(4 * KIB, 2)), client.read(8 * KIB, 4 * KIB)]
    rig.pump()
    out = list(server.commands)
    failover(rig)
    rig.run_leg(2)
    assert [client.error(cookie) for cookie in requests] == [0, 0]
    assert server.commands == out
    assert not server.shut
    assert rig.take_events(EventKind.LEG_DRAINED) == []
    for command in out:
        server.answer(command)
    rig.pump()
    (event,) = rig.take_events(EventKind.LEG_DRAINED)
    assert (event.leg, event.a) == (1, 0)
    assert rig.engine.statistics().memory_bytes == 0


def test_fence_with_a_send_half_way_cuts_the_stream() -> None:
    rig, server = rig_of_two()
    (client,) = rig.clients
    server.accepts = 100
    write = client.write(0, pattern(4 * KIB, 2))
    rig.pump()
    queued = client.write(8 * KIB, pattern(4 * KIB, 3))
    rig.pump()
    failover(rig)
    assert server.shut
    rig.run()
    assert client.error(write) == client.error(queued) == 0
    # Only what was being sent can have reached the server.
    (event,) = rig.take_events(EventKind.LEG_DRAINED)
    assert (event.leg, event.a) == (1, 1)
    assert lost(rig) == []
    assert rig.engine.statistics().memory_bytes == 0


def test_fenced_server_that_goes_away_leaves_its_writes_unproven() -> None:
    rig, server = rig_of_two()
    (client,) = rig.clients
    client.write(0, pattern(4 * KIB, 2))
    client.write(8 * KIB, pattern(4 * KIB, 3))
    rig.pump()
    failover(rig)
    server.answer(server.commands[0])
    rig.pump()
    server.ended = errno.ECONNRESET
    rig.pump()
    (event,) = rig.take_events(EventKind.LEG_DRAINED)
    assert (event.leg, event.a) == (1, 1)
    assert lost(rig) == []


def test_late_payload_of_a_fenced_server_does_not_touch_the_answer() -> None:
    rig, server = rig_of_two()
    (client,) = rig.clients
    cookie = client.read(0, 4 * KIB)
    rig.pump()
    (command,) = server.commands
    server.outbox += Reply(0, command.cookie, b"\xee" * 4 * KIB).pack()[:100]
    rig.pump()
    client.accepts = 0
    failover(rig)
    rig.run_leg(2)
    server.outbox += (b"\xee" * 4 * KIB)[: 4 * KIB - 84]
    rig.pump()
    client.accepts = None
    rig.pump()
    assert client.replies[cookie].payload == pattern(4 * KIB)
    assert [event.a for event in rig.take_events(EventKind.LEG_DRAINED)] == [0]


def test_fence_stops_the_rest_of_a_zero_that_is_written_in_parts() -> None:
    rig, server = rig_of_two(can_zero=False, transfer_max=8 * KIB)
    (client,) = rig.clients
    client.zero(0, 32 * KIB)
    rig.pump()
    assert len(server.commands) == 1
    failover(rig)
    server.answer(server.commands[0])
    rig.pump()
    assert server.commands == []
    assert [event.a for event in rig.take_events(EventKind.LEG_DRAINED)] == [0]


def test_silent_server_misses_its_deadline() -> None:
    rig, _ = rig_of_two()
    (client,) = rig.clients
    client.read(0, 512)
    rig.pump()
    rig.pass_time(1.5 * DEADLINE_NS / 1e9)
    (event,) = rig.take_events(EventKind.DEADLINE_MISSED)
    assert (event.leg, event.device, event.code) == (1, 0, errno.ETIMEDOUT)


def test_lost_stream_keeps_memory_that_a_receive_may_still_write_into() -> None:
    rig = Rig()
    server = rig.add_leg(1, remote=True).devices[0]
    assert isinstance(server, RemoteDevice)
    client = rig.start(1)
    client.read(0, 8192)
    rig.pump()
    server.answer(server.commands[0])
    del server.outbox[100:]  # the header and a part of the payload
    rig.pump()
    server.accepts = 0
    client.write(16384, pattern(512))
    rig.pump()
    ops = {op.kind: op for op in rig.engine.pending() if op.fd == server.fd}
    rig.engine.complete(ops[OpKind.SEND].number, -errno.EPIPE)
    rig.engine.step()
    assert rig.engine.statistics().parked == 0
    rig.engine.complete(ops[OpKind.RECEIVE].number, 0)
    rig.engine.step()
    assert rig.engine.statistics().parked == 2
