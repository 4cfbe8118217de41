"""The NBD door: what clients send, in whatever pieces, and what it costs whom.

Source: NBD proto.md, "Transmission phase", "Request types", "Error values".
"""

import errno

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.engine import EventKind
from tests.sim.rig import Client, Rig, is_open, new_descriptor, pattern
from tests.sim.wire import REQUEST, REQUEST_MAGIC, Command, Flag, Request

KIB = 1024
MIB = 1024 * KIB
SIZE = 64 * KIB


def rig_of_one(*, obeys_block_size: bool = False) -> tuple[Rig, Client]:
    rig = Rig()
    rig.add_leg(1, (SIZE,)).fill(pattern(SIZE))
    rig.install(1)
    rig.engine.release()
    return rig, rig.connect(obeys_block_size=obeys_block_size)


# --- Pieces ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("receive_max", [1, 7, 28, 29, 4096, 1 << 20])
def test_requests_in_any_pieces_are_understood(receive_max: int) -> None:
    rig, client = rig_of_one()
    client.receive_max = receive_max
    write = client.write(1000, pattern(600, 2))
    read = client.read(0, 2000)
    refused = client.write(SIZE, pattern(100))
    flush = client.flush()
    rig.run()
    assert [client.error(cookie) for cookie in (write, read, refused, flush)] == [0, 0, errno.ENOSPC, 0]
    expected = pattern(SIZE)[:1000] + pattern(600, 2) + pattern(SIZE)[1600:2000]
    assert client.replies[read].payload == expected


def test_many_requests_in_one_receive_are_submitted_and_answered_together() -> None:
    rig, client = rig_of_one()
    cookies = [client.read(place * KIB, KIB) for place in range(32)]
    rig.engine.step()
    (receive,) = rig.engine.pending()
    rig.engine.complete(receive.number, len(client.outbox), bytes(client.outbox))
    del client.outbox[:]
    rig.engine.step()
    assert len(rig.file_ops()) == 32
    for op in rig.file_ops():
        rig.carry_out(op)
    rig.engine.step()
    sends = [op for op in rig.engine.pending() if op.fd == client.fd and op.kind == 6]
    assert [op.length for op in sends] == [32 * (16 + KIB)]
    rig.run()
    assert client.order == cookies


@pytest.mark.parametrize("accepts", [1, 5, 16, 17, 1000])
def test_answers_sent_in_any_pieces_arrive_whole(accepts: int) -> None:
    rig, client = rig_of_one()
    client.accepts = 0
    cookies = [client.read(place * 100, 700) for place in range(4)]
    rig.run()
    while len(client.replies) < 4:
        client.accepts = accepts
        rig.run()
    assert client.order == cookies
    for place, cookie in enumerate(cookies):
        assert client.replies[cookie].payload == pattern(SIZE)[place * 100 : place * 100 + 700]


def test_early_bytes_of_negotiation_are_the_first_requests() -> None:
    rig, _ = rig_of_one()
    first = Request(Command.READ, 0, 901, 0, 512).pack()
    second = Request(Command.WRITE, 0, 902, 4096, 512, pattern(512, 2)).pack()
    client = rig.connect(leftover=first + second[:100])
    client._lengths.update({901: 512, 902: 0})
    client.outbox += second[100:]
    rig.run()
    assert (client.error(901), client.error(902)) == (0, 0)


def test_too_many_early_bytes_are_refused_and_the_descriptor_closed() -> None:
    rig, _ = rig_of_one()
    descriptor = new_descriptor()
    with pytest.raises(ValueError, match="early"):
        rig.engine.add_connection(descriptor, 0, obeys_block_size=False, leftover=bytes(1 << 20))
    assert not is_open(descriptor)


@pytest.mark.parametrize("error_number", [errno.EINTR, errno.EAGAIN])
def test_interrupted_socket_goes_on(error_number: int) -> None:
    rig, client = rig_of_one()
    client.accepts = 0
    cookie = client.read(0, 512)
    rig.engine.step()
    (receive,) = rig.engine.pending()
    rig.engine.complete(receive.number, -error_number)
    rig.run()
    (send,) = [op for op in rig.engine.pending() if op.kind == 6]
    rig.engine.complete(send.number, -error_number)
    client.accepts = None
    rig.run()
    assert client.replies[cookie].payload == pattern(SIZE)[:512]


# --- What is wrong --------------------------------------------------------------------------------


def test_bad_magic_ends_that_connection_only() -> None:
    rig, client = rig_of_one()
    other = rig.connect()
    waiting = other.read(0, 512)
    client.outbox += b"GET / HTTP/1.1\r\nHost: storage\r\n\r\n"
    rig.run()
    assert client.closed is not None
    assert client.closed.code == errno.EPROTO
    assert other.closed is None
    again = other.read(512, 512)
    rig.run()
    assert other.error(waiting) == other.error(again) == 0


def test_bad_magic_after_good_requests_still_has_those_carried_out() -> None:
    rig, client = rig_of_one()
    client.write(0, pattern(512, 2))
    client.outbox += bytes(28)
    rig.run()
    assert client.closed is not None
    assert rig.legs[1].read(0, 512) == pattern(512, 2)


@pytest.mark.parametrize("command", [5, 7, 8, 200, 0xFFFF])
def test_unknown_command_is_refused_and_the_stream_stays_in_step(command: int) -> None:
    rig, client = rig_of_one()
    unknown = client.ask(command, 0, 4096)
    read = client.read(0, 512)
    rig.run()
    assert (client.error(unknown), client.error(read)) == (errno.EINVAL, 0)


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (Command.READ, Flag.NO_HOLE),
        (Command.READ, 1 << 2),
        (Command.WRITE, Flag.NO_HOLE),
        (Command.WRITE, 1 << 5),
        (Command.FLUSH, 0x8000),
        (Command.TRIM, Flag.NO_HOLE),
        (Command.ZERO, 1 << 4),
    ],
)
def test_flag_that_was_not_negotiated_is_refused(command: Command, flags: int) -> None:
    rig, client = rig_of_one()
    length = 0 if command is Command.FLUSH else 512
    payload = pattern(512) if command is Command.WRITE else b""
    refused = client.ask(command, 0, length, payload, flags)
    read = client.read(0, 512)
    rig.run()
    assert (client.error(refused), client.error(read)) == (errno.EINVAL, 0)
    assert client.replies[read].payload == pattern(SIZE)[:512]


@pytest.mark.parametrize("command", [Command.READ, Command.WRITE, Command.FLUSH, Command.TRIM, Command.ZERO])
def test_fua_is_allowed_on_every_command(command: Command) -> None:
    rig, client = rig_of_one()
    length = 0 if command is Command.FLUSH else 512
    payload = pattern(512) if command is Command.WRITE else b""
    cookie = client.ask(command, 0, length, payload, Flag.FUA)
    rig.run()
    assert client.error(cookie) == 0


@pytest.mark.parametrize(
    ("offset", "length"),
    [(SIZE, 1), (SIZE - 1, 2), (0, SIZE + 1), ((1 << 64) - 512, 1024), ((1 << 64) - 1, 1)],
)
@pytest.mark.parametrize(
    ("command", "told"),
    [
        (Command.READ, errno.EINVAL),
        (Command.WRITE, errno.ENOSPC),
        (Command.TRIM, errno.EINVAL),
        (Command.ZERO, errno.ENOSPC),
    ],
)
def test_request_past_the_end_is_refused(command: Command, told: int, offset: int, length: int) -> None:
    rig, client = rig_of_one()
    payload = bytes(length) if command is Command.WRITE else b""
    refused = client.ask(command, offset, length, payload)
    read = client.read(0, 512)
    rig.run()
    assert (client.error(refused), client.error(read)) == (told, 0)
    assert rig.engine.statistics().refused == 1


@pytest.mark.parametrize("length", [(32 << 20) + 1, (1 << 32) - 1])
def test_huge_read_is_refused_and_takes_no_memory(length: int) -> None:
    rig, client = rig_of_one()
    refused = client.read(0, length)
    rig.pump()
    assert client.error(refused) == errno.EINVAL
    assert rig.engine.statistics().memory_bytes == 0


def test_huge_write_is_refused_and_its_payload_thrown_away() -> None:
    rig, client = rig_of_one()
    length = (32 << 20) + 512
    refused = client.ask(Command.WRITE, 0, length, bytes(length))
    read = client.read(0, 512)
    rig.run()
    assert (client.error(refused), client.error(read)) == (errno.EINVAL, 0)
    assert rig.legs[1].read(0, 512) == pattern(SIZE)[:512]


def test_payload_that_looks_like_requests_is_thrown_away_with_a_refused_write() -> None:
    rig, client = rig_of_one()
    trap = REQUEST.pack(REQUEST_MAGIC, 0, Command.ZERO, 7, 0, SIZE) * 20
    refused = client.write(SIZE, trap)
    rig.run()
    assert client.error(refused) == errno.ENOSPC
    assert rig.legs[1].read(0, SIZE) == pattern(SIZE)


@pytest.mark.parametrize("command", [Command.READ, Command.WRITE, Command.TRIM, Command.ZERO])
@pytest.mark.parametrize("offset", [0, 100, SIZE])
def test_request_of_no_bytes_succeeds_and_touches_nothing(command: Command, offset: int) -> None:
    rig, client = rig_of_one()
    cookie = client.ask(command, offset, 0)
    rig.pump()
    assert client.error(cookie) == 0
    assert rig.file_ops() == []


@pytest.mark.parametrize(("offset", "length"), [(512, 0), (0, 512), (1, 1)])
def test_flush_with_a_range_is_refused(offset: int, length: int) -> None:
    rig, client = rig_of_one()
    cookie = client.ask(Command.FLUSH, offset, length)
    rig.pump()
    assert client.error(cookie) == errno.EINVAL


def test_client_that_agreed_to_a_block_size_is_held_to_it() -> None:
    rig, client = rig_of_one(obeys_block_size=True)
    good, bad_offset, bad_length = client.read(512, 512), client.read(100, 512), client.read(0, 100)
    write = client.write(0, bytes(100))
    last = client.read(1024, 512)
    rig.run()
    assert [client.error(c) for c in (good, last)] == [0, 0]
    assert [client.error(c) for c in (bad_offset, bad_length, write)] == [errno.EINVAL] * 3


def test_connection_to_no_disk_is_told_eshutdown() -> None:
    rig, _ = rig_of_one()
    client = rig.connect(disk=9)
    cookie = client.read(0, 512)
    rig.pump()
    assert client.error(cookie) == errno.ESHUTDOWN


# --- The end --------------------------------------------------------------------------------------


def test_disconnect_answers_what_is_in_flight_first() -> None:
    rig, client = rig_of_one()
    write, read = client.write(0, pattern(512, 2)), client.read(4096, 512)
    client.ask(Command.DISC)
    after = client.read(0, 512)
    rig.pump()
    assert client.closed is None
    rig.run()
    assert (client.error(write), client.error(read), client.error(after)) == (0, 0, None)
    assert client.closed is not None
    assert client.closed.code == 0
    assert not is_open(client.fd)


def test_half_closed_client_still_gets_its_answers() -> None:
    rig, client = rig_of_one()
    read = client.read(0, 512)
    client.ended = 0
    rig.pump()
    assert client.closed is None
    rig.run()
    assert client.error(read) == 0
    assert client.closed is not None
    assert client.closed.code == 0


@pytest.mark.parametrize("sent", [1, 27, 28, 29, 400])
@pytest.mark.parametrize("ended", [0, errno.ECONNRESET])
def test_client_gone_in_the_middle_of_a_write_changes_nothing(sent: int, ended: int) -> None:
    rig, client = rig_of_one()
    client.outbox += Request(Command.WRITE, 0, 1, 0, 512, pattern(512, 2)).pack()[:sent]
    client.ended = ended
    rig.run()
    assert client.closed is not None
    assert client.closed.code == ended
    assert rig.legs[1].read(0, 512) == pattern(SIZE)[:512]
    assert rig.engine.statistics().memory_bytes == 0


def test_client_gone_in_the_middle_of_a_refused_payload_is_let_go() -> None:
    rig, client = rig_of_one()
    client.outbox += Request(Command.WRITE, 0, 1, SIZE, 512, pattern(512)).pack()[:100]
    client.ended = 0
    rig.run()
    assert client.closed is not None


def test_client_gone_with_requests_in_flight_is_let_go_when_they_are_done() -> None:
    rig, client = rig_of_one()
    client.write(0, pattern(512, 2))
    client.read(4096, 512)
    rig.pump()
    client.ended = errno.ECONNRESET
    rig.pump()
    assert client.closed is None
    assert is_open(client.fd)
    rig.run()
    assert client.closed is not None
    assert not is_open(client.fd)
    assert rig.legs[1].read(0, 512) == pattern(512, 2)
    assert rig.engine.statistics().memory_bytes == 0


def test_client_gone_while_the_domain_holds_is_let_go_after_it() -> None:
    rig, client = rig_of_one()
    client.write(0, pattern(512, 2))
    rig.pump()
    rig.engine.hold()
    client.write(512, pattern(512, 3))
    rig.run()
    client.ended = errno.ECONNRESET
    rig.pump()
    rig.engine.release()
    rig.run()
    assert client.closed is not None
    assert rig.legs[1].read(0, 1024) == pattern(512, 2) + pattern(512, 3)
    assert rig.engine.statistics().memory_bytes == 0


def test_client_that_takes_no_answers_can_still_leave() -> None:
    rig, client = rig_of_one()
    client.accepts = 0
    for place in range(8):
        client.read(place * 512, 512)
    rig.run()
    client.ended = errno.ECONNRESET
    rig.run()
    assert client.closed is not None
    assert rig.engine.statistics().memory_bytes == 0


def test_send_that_breaks_ends_the_connection_and_carries_out_the_rest() -> None:
    rig, client = rig_of_one()
    client.accepts = 0
    client.read(0, 512)
    rig.run()
    client.write(4096, pattern(512, 2))
    rig.pump()
    (send,) = [op for op in rig.engine.pending() if op.kind == 6]
    rig.engine.complete(send.number, -errno.EPIPE)
    rig.run()
    assert client.closed is not None
    assert client.closed.code == errno.EPIPE
    assert rig.legs[1].read(4096, 512) == pattern(512, 2)


def test_ended_connection_is_read_no_more_but_answered() -> None:
    rig, client = rig_of_one()
    first = client.read(0, 512)
    rig.pump()
    rig.end(client)
    second = client.read(512, 512)
    rig.pump()
    assert client.closed is None
    rig.run()
    assert (client.error(first), client.error(second)) == (0, None)
    assert client.closed is not None
    assert client.closed.code == 0


def test_number_of_a_closed_connection_is_used_again() -> None:
    rig, client = rig_of_one()
    client.ended = 0
    rig.run()
    assert rig.connect().number == client.number
    with pytest.raises(KeyError):
        rig.engine.end_connection(77)


# --- Back-pressure --------------------------------------------------------------------------------


def test_connection_has_at_most_256_requests_in_flight() -> None:
    rig, client = rig_of_one()
    cookies = [client.read(place % 64 * KIB, KIB) for place in range(600)]
    rig.pump()
    assert len(rig.file_ops()) == 256
    rig.run()
    assert client.order == cookies


def test_connection_past_its_share_is_not_read() -> None:
    rig, client = rig_of_one()
    for _ in range(257):
        client.read(0, 512)
    rig.pump()
    client.outbox += bytes(100)
    rig.pump()
    assert len(client.outbox) == 100


def test_connection_has_at_most_48_mib_in_flight() -> None:
    rig = Rig()
    rig.add_leg(1, (64 * MIB,))
    client = rig.start(1)
    cookies = [client.read(place * 8 * MIB, 8 * MIB) for place in range(8)]
    rig.pump()
    assert rig.engine.statistics().memory_bytes == 48 * MIB
    rig.run()
    assert client.order == cookies


def test_request_of_32_mib_is_served_aligned_or_not() -> None:
    rig = Rig()
    leg = rig.add_leg(1, (40 * MIB,))
    client = rig.start(1)
    data = pattern(32 * MIB)
    write = client.write(100, data)
    rig.run()
    read = client.read(100, 32 * MIB)
    rig.run()
    assert client.error(write) == 0
    assert client.replies[read].payload == data
    assert leg.read(100, 32 * MIB) == data


def fill_memory(rig: Rig) -> tuple[list[Client], list[int]]:
    """Clients that have all the memory clients may have, in a read each."""
    clients = [rig.start(1), *(rig.connect() for _ in range(3))]
    cookies = [client.read(0, 32 * MIB) for client in clients]
    rig.pump()
    return clients, cookies


def test_memory_goes_to_those_in_line_first_come_first_served() -> None:
    rig = Rig()
    rig.add_leg(1, (64 * MIB,), transfer_max=64 * MIB)
    holders, _ = fill_memory(rig)
    large, small = rig.connect(), rig.connect()
    first = large.read(0, 32 * MIB)
    rig.pump()
    # There is no room for it; the small one came later and waits behind it.
    second = small.read(0, 4 * KIB)
    rig.pump()
    assert len(rig.file_ops()) == len(holders)
    rig.carry_out(rig.file_ops()[0])
    rig.pump()
    assert sorted(op.length for op in rig.file_ops())[0] == 32 * MIB
    rig.run()
    assert (large.error(first), small.error(second)) == (0, 0)


def test_greedy_client_does_not_starve_a_modest_one() -> None:
    rig = Rig()
    rig.add_leg(1, (64 * MIB,), transfer_max=64 * MIB)
    greedy = rig.start(1)
    others = [rig.connect() for _ in range(2)]
    modest = rig.connect()
    for client in (greedy, *others):
        for _ in range(40):
            client.read(0, 24 * MIB)
    rig.pump()
    cookie = modest.read(0, 4 * KIB)
    turns = 0
    while modest.error(cookie) is None:
        rig.carry_out(rig.file_ops()[0])
        rig.pump()
        turns += 1
    assert turns < 12


def test_client_that_leaves_while_in_line_is_let_go() -> None:
    rig = Rig()
    rig.add_leg(1, (64 * MIB,), transfer_max=64 * MIB)
    fill_memory(rig)
    third = rig.connect()
    waiting = third.read(0, 32 * MIB)
    rig.pump()
    third.ended = errno.ECONNRESET
    rig.engine.end_connection(third.number)
    rig.run()
    assert third.closed is not None
    assert third.error(waiting) is None
    assert rig.engine.statistics().memory_bytes == 0


def test_client_paused_within_a_payload_is_let_be_while_nobody_waits_for_it() -> None:
    rig, client = rig_of_one()
    client.outbox += Request(Command.WRITE, 0, 1, 0, 512, pattern(512, 2)).pack()[:100]
    rig.pump()
    rig.pass_time(86400)
    assert client.closed is None


@pytest.mark.parametrize("trickle", [False, True])
def test_client_slow_with_its_payload_loses_its_connection_to_those_it_keeps_waiting(trickle: bool) -> None:
    rig = Rig()
    rig.add_leg(1, (64 * MIB,), transfer_max=64 * MIB)
    slow = [rig.start(1), *(rig.connect() for _ in range(3))]
    for client in slow:
        client.outbox += Request(Command.WRITE, 0, 1, 0, 32 * MIB, bytes(32 * MIB)).pack()[:100]
        rig.pump()
        rig.pass_time(0.5)
    victim = rig.connect()
    cookie = victim.read(0, 4 * KIB)
    for _ in range(11):
        if trickle:
            for client in slow:
                client.outbox += b"x"
        rig.pass_time(0.5)
    rig.run()
    assert victim.error(cookie) == 0
    assert [client.closed is not None for client in slow] == [True, False, False, False]
    assert slow[0].closed is not None
    assert slow[0].closed.code == errno.ETIMEDOUT


@pytest.mark.slow
def test_client_that_takes_no_answers_loses_its_connection_to_those_it_keeps_waiting() -> None:
    rig = Rig()
    rig.add_leg(1, (64 * MIB,), transfer_max=64 * MIB)
    clients, _ = fill_memory(rig)
    for client in clients:
        client.accepts = 1000
    rig.run()
    victim = rig.connect()
    cookie = victim.read(0, 4 * KIB)
    rig.pass_time(4)
    rig.run()
    assert victim.error(cookie) is None
    rig.pass_time(2)
    rig.run()
    assert victim.error(cookie) == 0
    assert [client.closed is not None for client in clients].count(True) == 1


def test_clients_with_many_small_unread_answers_leave_slots_for_others() -> None:
    rig = Rig()
    rig.add_leg(1, (64 * MIB,), transfer_max=64 * MIB)
    greedy = [rig.start(1), *(rig.connect() for _ in range(15))]
    for client in greedy:
        client.accepts = 0
        for place in range(256):
            client.read(place * 4 * KIB, 4 * KIB)
    rig.run()
    modest = rig.connect()
    cookie = modest.read(0, 4 * KIB)
    rig.run()
    assert modest.error(cookie) == 0
    assert [client.closed for client in greedy] == [None] * 16


def test_idle_client_keeps_its_connection() -> None:
    rig, client = rig_of_one()
    client.outbox += Request(Command.READ, 0, 1, 0, 512).pack()[:10]
    rig.pump()
    rig.pass_time(86400)
    assert client.closed is None


def test_more_connections_than_there_are_places_are_refused_and_closed() -> None:
    rig, _ = rig_of_one()
    for _ in range(1023):
        rig.connect()
    descriptor = new_descriptor()
    with pytest.raises(OSError, match="1024"):
        rig.engine.add_connection(descriptor, 0, obeys_block_size=False)
    assert not is_open(descriptor)


# --- Garbage --------------------------------------------------------------------------------------

request_bytes = st.builds(
    lambda magic, flags, command, cookie, offset, length: REQUEST.pack(
        magic, flags, command, cookie, offset, length
    ),
    st.sampled_from([REQUEST_MAGIC] * 9 + [0]),
    st.sampled_from([0, 0, 0, 1, 2, 3, 0xFFFF]),
    st.sampled_from([0, 0, 1, 1, 2, 3, 4, 5, 6, 6, 7, 0x1234]),
    st.integers(0, (1 << 64) - 1),
    st.one_of(st.integers(0, SIZE), st.sampled_from([SIZE - 1, (1 << 63), (1 << 64) - 1])),
    st.one_of(st.integers(0, 9000), st.sampled_from([SIZE, (1 << 25) + 1, (1 << 32) - 1])),
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(request_bytes, request_bytes, st.binary(max_size=200)), max_size=8),
    st.sampled_from([1 << 20, 4096, 100, 13]),
    st.sampled_from([0, errno.ECONNRESET]),
)
def test_garbage_costs_at_most_its_own_connection(pieces: list[bytes], receive_max: int, ended: int) -> None:
    rig, good = rig_of_one()
    bad = rig.connect()
    bad.take = lambda data: None  # type: ignore[method-assign]
    bad.outbox += b"".join(pieces)
    bad.receive_max = receive_max
    before = good.read(0, 512)
    rig.run()
    bad.ended = ended
    rig.run()
    after = good.write(512, pattern(512, 3))
    rig.run()
    assert bad.closed is not None
    assert good.error(before) == good.error(after) == 0
    assert good.closed is None
    assert rig.engine.statistics().memory_bytes == 0
    assert rig.take_events(EventKind.DEVICE_ERROR) == []
