"""The client's negotiation and commands: cases drive them whole, byte by byte and with trailing data.

The bytes are written here by hand, with the numbers of NBD proto.md, so that a wrong constant shows.
At the end both of our cores talk to each other in memory.
"""

import errno
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from struct import pack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends import nbdcommand, nbdproto
from backends.errors import DeviceError
from backends.nbdcommand import ReplyDecoder, Request
from backends.nbdnegotiation import (
    REPLIES_MAX,
    REPLY_DATA_MAX,
    TRANSITIONS,
    ClientNegotiation,
    NbdNegotiationError,
    Phase,
    Remote,
)
from backends.nbdproto import TransmissionFlag
from proxy.domainserver import negotiation as server

DEVICE = "nbd://storage7/disk"
EXPORT_NAME, ABORT, INFO, GO = 1, 2, 6, 7
ACK, SERVER, REP_INFO = 1, 2, 3
ERR_UNSUP, ERR_POLICY, ERR_TLS_REQD = 0x80000001, 0x80000002, 0x80000005
ERR_UNKNOWN, ERR_SHUTDOWN = 0x80000006, 0x80000007
INFO_EXPORT, INFO_NAME, INFO_BLOCK_SIZE = 0, 1, 3

SIZE = 5 << 20
FLAGS = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH


def greeting(flags: int) -> bytes:
    return b"NBDMAGIC" + b"IHAVEOPT" + pack(">H", flags)


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + pack(">II", number, len(data)) + data


def go(name: bytes) -> bytes:
    return option(GO, pack(">I", len(name)) + name + pack(">HH", 1, INFO_BLOCK_SIZE))


def reply(reply_type: int, data: bytes = b"", *, number: int = GO) -> bytes:
    return pack(">QIII", 0x0003E889045565A9, number, reply_type, len(data)) + data


def info_export(size: int = SIZE, flags: int = 0x0005) -> bytes:
    return reply(REP_INFO, pack(">HQH", INFO_EXPORT, size, flags))


def info_block_size(minimum: int, preferred: int, payload_max: int) -> bytes:
    return reply(REP_INFO, pack(">HIII", INFO_BLOCK_SIZE, minimum, preferred, payload_max))


FIXED = greeting(3)
ASKED = pack(">I", 3) + go(b"disk")
ABORTED = option(ABORT)
DISCONNECTED = pack(">IHHQQI", 0x25609513, 0, 2, 0, 0, 0)


@dataclass(frozen=True)
class Refused:
    """What the error says and carries."""

    words: str
    error_number: int = errno.EPROTO
    reply_type: int | None = None
    server_text: str = ""
    farewell: bytes = b""


@dataclass(frozen=True)
class Case:
    name: str
    received: bytes
    sent: bytes
    end: Remote | Refused | None


def agreed(name: str, replies: bytes, remote: Remote) -> Case:
    return Case(name, FIXED + replies, ASKED, remote)


def refused(name: str, replies: bytes, words: str, *, farewell: bytes = b"") -> Case:
    return Case(name, FIXED + replies, ASKED, Refused(words, farewell=farewell))


def refused_by_server(name: str, reply_type: int, text: str, words: str, error_number: int) -> Case:
    end = Refused(words, error_number, reply_type, text, ABORTED)
    return Case(name, FIXED + reply(reply_type, text.encode()), ASKED, end)


def unusable(name: str, replies: bytes, words: str) -> Case:
    return refused(name, replies + reply(ACK), words, farewell=DISCONNECTED)


CASES = [
    Case("only a greeting", FIXED, ASKED, None),
    agreed("go without block sizes", info_export() + reply(ACK), Remote(SIZE, FLAGS, 1, 4096, 32 << 20)),
    agreed(
        "go with block sizes",
        info_export() + info_block_size(512, 65536, 1 << 20) + reply(ACK),
        Remote(SIZE, FLAGS, 512, 65536, 1 << 20),
    ),
    agreed(
        "go with block sizes first and infos not asked for",
        info_block_size(65536, 65536, 0xFFFFFFFF)
        + reply(REP_INFO, pack(">H", INFO_NAME) + b"disk")
        + reply(REP_INFO, pack(">H", 999) + b"whatever")
        + info_export(flags=0x8005)
        + reply(ACK),
        Remote(SIZE, TransmissionFlag(0x8005), 65536, 65536, 0xFFFFFFFF),
    ),
    agreed(
        "largest size",
        info_export(size=(1 << 63) - 1) + reply(ACK),
        Remote((1 << 63) - 1, FLAGS, 1, 4096, 32 << 20),
    ),
    Case(
        "go not supported, then the name",
        FIXED + reply(ERR_UNSUP, b"what is GO?") + pack(">QH", SIZE, 5),
        ASKED + option(EXPORT_NAME, b"disk"),
        Remote(SIZE, FLAGS, 1, 4096, 32 << 20),
    ),
    Case(
        "go not supported after all, block sizes said before do not hold",
        FIXED + info_block_size(512, 512, 512) + reply(ERR_UNSUP) + pack(">QH", SIZE, 5),
        ASKED + option(EXPORT_NAME, b"disk"),
        Remote(SIZE, FLAGS, 1, 4096, 32 << 20),
    ),
    Case(
        "go not supported, then the name with zeroes",
        greeting(1) + reply(ERR_UNSUP) + pack(">QH124x", SIZE, 5),
        pack(">I", 1) + go(b"disk") + option(EXPORT_NAME, b"disk"),
        Remote(SIZE, FLAGS, 1, 4096, 32 << 20),
    ),
    Case(
        "newstyle that is not fixed",
        greeting(0) + pack(">QH124x", SIZE, 5),
        pack(">I", 0) + option(EXPORT_NAME, b"disk"),
        Remote(SIZE, FLAGS, 1, 4096, 32 << 20),
    ),
    Case(
        "newstyle that is not fixed, without zeroes",
        greeting(2) + pack(">QH", SIZE, 5),
        pack(">I", 2) + option(EXPORT_NAME, b"disk"),
        Remote(SIZE, FLAGS, 1, 4096, 32 << 20),
    ),
    Case("handshake flags of the future are not taken", greeting(0xFFFF), ASKED, None),
    refused_by_server(
        "unknown export", ERR_UNKNOWN, "no such\nexport", r"'disk' with ERR_UNKNOWN", errno.ENOENT
    ),
    refused_by_server("unknown export without a word", ERR_UNKNOWN, "", "ERR_UNKNOWN: check", errno.ENOENT),
    refused_by_server("policy", ERR_POLICY, "not you", "ERR_POLICY ('not you')", errno.EACCES),
    refused_by_server("TLS wanted", ERR_TLS_REQD, "tls", "without TLS", errno.EACCES),
    refused_by_server("shutting down", ERR_SHUTDOWN, "bye", "shutting down", errno.ESHUTDOWN),
    refused_by_server("error of the future", 0x80001234, "x" * 4096, "error 0x80001234", errno.EPROTO),
    Case(
        "error after infos",
        FIXED + info_export() + reply(ERR_POLICY),
        ASKED,
        Refused("ERR_POLICY", errno.EACCES, ERR_POLICY, "", ABORTED),
    ),
    Case(
        "another protocol",
        b"SSH-2.0-OpenSSH_9.2p1\r\n",
        b"",
        Refused("not an NBD server: it began with b'SSH-2.0-"),
    ),
    Case("oldstyle", b"NBDMAGIC" + pack(">QQI124x", 0x420281861253, SIZE, 1), b"", Refused("oldstyle")),
    Case("neither old nor new", b"NBDMAGIC" + b"NBDMAGIC", b"", Refused("it went on with b'NBDMAGIC'")),
    refused("reply without its magic", bytes(20), "0x0000000000000000 where a reply should begin"),
    refused("reply to another option", reply(ACK, number=INFO), "answered option 6"),
    refused("reply too long", pack(">QIII", 0x3E889045565A9, GO, REP_INFO, REPLY_DATA_MAX + 1), "8193 bytes"),
    refused("reply of another kind", reply(SERVER), "reply type 0x2"),
    refused("replies without end", info_export() * (REPLIES_MAX + 1), "more than 64 replies"),
    refused("accepted without a size", reply(ACK), "without telling the export's size"),
    refused("info without its type", reply(REP_INFO, b"\0"), "without its type"),
    refused("info cut short", reply(REP_INFO, pack(">HQ", INFO_EXPORT, SIZE)), "8 bytes, not 10"),
    refused(
        "block sizes cut short", reply(REP_INFO, pack(">HII", INFO_BLOCK_SIZE, 1, 512)), "8 bytes, not 12"
    ),
    unusable("empty", info_export(size=0), "its size is 0 bytes"),
    unusable("larger than an offset", info_export(size=1 << 63), f"its size is {1 << 63} bytes"),
    unusable("flags without their mark", info_export(flags=4), "0x0004 are not marked"),
    unusable("minimum zero", info_export() + info_block_size(0, 4096, 1 << 20), "minimum block size 0"),
    unusable("minimum odd", info_export() + info_block_size(513, 4096, 1 << 20), "minimum block size 513"),
    unusable(
        "minimum large",
        info_export() + info_block_size(1 << 17, 1 << 17, 1 << 20),
        "minimum block size 131072",
    ),
    unusable(
        "preferred odd", info_export() + info_block_size(512, 5000, 1 << 20), "preferred block size 5000"
    ),
    unusable(
        "preferred below minimum", info_export() + info_block_size(4096, 512, 1 << 20), "size 512 is not"
    ),
    unusable("payload small", info_export() + info_block_size(1, 4096, 4095), "maximum payload 4095"),
]

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def single_bytes(data: bytes) -> Iterator[bytes]:
    return (data[at : at + 1] for at in range(len(data)))


def feed(negotiation: ClientNegotiation, pieces: Iterable[bytes]) -> tuple[bytes, NbdNegotiationError | None]:
    """All that was sent, and the error that ended it; pieces after the end are not given."""
    sent = b""
    try:
        for piece in pieces:
            if negotiation.phase in (Phase.READY, Phase.FAILED):
                break
            sent += negotiation.receive(piece)
    except NbdNegotiationError as error:
        return sent, error
    return sent, None


def check(case: Case, negotiation: ClientNegotiation, error: NbdNegotiationError | None) -> None:
    match case.end:
        case Refused() as expected:
            assert error is not None
            assert negotiation.phase is Phase.FAILED
            assert negotiation.remote is None
            assert str(error).startswith(f"{DEVICE}: ")
            assert expected.words in str(error)
            assert "\n" not in str(error)
            assert len(str(error)) < 500
            assert error.error_number == expected.error_number
            assert error.reply_type == expected.reply_type
            assert error.server_text == expected.server_text
            assert error.farewell == expected.farewell
        case expected:
            assert error is None
            assert negotiation.remote == expected


@each_case
def test_client_fed_whole_ends_as_the_protocol_says(case: Case) -> None:
    negotiation = ClientNegotiation("disk", device=DEVICE)
    sent, error = feed(negotiation, [case.received])
    check(case, negotiation, error)
    # What would have been sent before an error in the same piece is of no use to anyone.
    assert sent == case.sent if error is None else sent == b""


@each_case
def test_client_fed_byte_by_byte_sends_and_ends_the_same(case: Case) -> None:
    negotiation = ClientNegotiation("disk", device=DEVICE)
    sent, error = feed(negotiation, single_bytes(case.received))
    check(case, negotiation, error)
    assert sent == case.sent


@each_case
def test_client_with_trailing_data_refuses_what_it_did_not_ask_for(case: Case) -> None:
    negotiation = ClientNegotiation("disk", device=DEVICE)
    _, error = feed(negotiation, [case.received + b"\x67\x44\x66\x98"])
    if isinstance(case.end, Remote):
        check(
            Case(case.name, b"", b"", Refused("server sent 4 bytes that were not asked for")),
            negotiation,
            error,
        )
    else:
        check(case, negotiation, error)


@each_case
def test_client_that_is_over_raises_and_stays(case: Case) -> None:
    negotiation = ClientNegotiation("disk", device=DEVICE)
    feed(negotiation, [case.received])
    if case.end is None:
        with pytest.raises(NbdNegotiationError, match="closed the connection before a reply") as caught:
            negotiation.receive(b"")
        assert caught.value.error_number == errno.ECONNRESET
    remote, phase = negotiation.remote, negotiation.phase
    assert phase in (Phase.READY, Phase.FAILED)
    for data in (b"", FIXED):
        with pytest.raises(RuntimeError, match="negotiation is over"):
            negotiation.receive(data)
    assert (negotiation.remote, negotiation.phase) == (remote, phase)


def test_client_hung_up_on_after_export_name_says_what_that_means() -> None:
    negotiation = ClientNegotiation("disk", device=DEVICE)
    negotiation.receive(greeting(0))
    with pytest.raises(NbdNegotiationError, match="closes when it has no such export"):
        negotiation.receive(b"")


@pytest.mark.parametrize("name", ["n" * 4097, "ü" * 2049, "a\0b", "\ud800"])
def test_client_of_a_name_no_server_can_have_is_refused(name: str) -> None:
    with pytest.raises(NbdNegotiationError, match=f"{DEVICE}: its export name") as caught:
        ClientNegotiation(name, device=DEVICE)
    assert caught.value.error_number == errno.EINVAL


def test_client_transitions_reach_every_phase_and_end() -> None:
    reached, found = {Phase.MAGIC}, {Phase.MAGIC}
    while found:
        found = {after for phase in found for after in TRANSITIONS[phase]} - reached
        reached |= found
    assert reached == set(TRANSITIONS) == set(Phase)
    assert all(Phase.FAILED in after for after in TRANSITIONS.values() if after)


some_reply = st.builds(
    lambda reply_type, data, number: reply(reply_type, data, number=number),
    st.sampled_from([ACK, SERVER, REP_INFO, ERR_UNSUP, ERR_UNKNOWN, 77]),
    st.binary(max_size=30) | st.just(pack(">HQH", INFO_EXPORT, SIZE, 5)),
    st.sampled_from([GO, GO, GO, INFO]),
)
some_server = st.builds(
    lambda flags, replies, rest: greeting(flags) + b"".join(replies) + rest,
    st.integers(0, 5),
    st.lists(some_reply, max_size=5),
    st.binary(max_size=140),
)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200) | some_server)
def test_client_of_any_bytes_ends_in_a_remote_or_one_error(data: bytes) -> None:
    negotiation = ClientNegotiation("disk", device=DEVICE)
    sent, error = feed(negotiation, single_bytes(data))
    assert (negotiation.phase is Phase.FAILED) == (error is not None)
    assert (negotiation.phase is Phase.READY) == (negotiation.remote is not None)
    assert len(sent) <= len(ASKED + option(EXPORT_NAME, b"disk"))


# The one-at-a-time commands.


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (nbdcommand.read(4096, 512, cookie=7), pack(">IHHQQI", 0x25609513, 0, 0, 7, 4096, 512)),
        (nbdcommand.write(1, b"label", cookie=8), pack(">IHHQQI", 0x25609513, 0, 1, 8, 1, 5) + b"label"),
        (nbdcommand.flush(cookie=9), pack(">IHHQQI", 0x25609513, 0, 3, 9, 0, 0)),
        (nbdcommand.disconnect(), DISCONNECTED),
    ],
)
def test_request_encodes_as_the_protocol_says(request_: Request, expected: bytes) -> None:
    assert request_.encode() == expected


READ = nbdcommand.read(4096, 5, cookie=7)
WRITE = nbdcommand.write(4096, b"label", cookie=7)


def simple_reply(error: int = 0, cookie: int = 7, magic: int = 0x67446698) -> bytes:
    return pack(">IIQ", magic, error, cookie)


@pytest.mark.parametrize(
    ("request_", "received", "expected"),
    [
        (READ, simple_reply() + b"label", b"label"),
        (WRITE, simple_reply(), b""),
        (nbdcommand.flush(cookie=7), simple_reply(), b""),
        (nbdcommand.read(0, 0, cookie=7), simple_reply(), b""),
    ],
)
def test_reply_complete_is_its_data_however_it_comes(
    request_: Request, received: bytes, expected: bytes
) -> None:
    whole, in_bytes = ReplyDecoder(request_, device=DEVICE), ReplyDecoder(request_, device=DEVICE)
    assert whole.receive(received) == expected
    *incomplete, last = [in_bytes.receive(piece) for piece in single_bytes(received)]
    assert last == expected
    assert set(incomplete) == {None}
    for decoder in (whole, in_bytes):
        with pytest.raises(RuntimeError, match="is complete"):
            decoder.receive(received)
    with pytest.raises(DeviceError, match="more than one reply") as caught:
        ReplyDecoder(request_, device=DEVICE).receive(received + b"\x67")
    assert caught.value.error_number == errno.EPROTO


@pytest.mark.parametrize(
    ("received", "words", "error_number"),
    [
        (simple_reply(error=5), "READ of 5 bytes at 4096 failed: server answered with error 5", errno.EIO),
        (simple_reply(error=108), "error 108", errno.ESHUTDOWN),
        (simple_reply(error=122), "error 122", errno.EINVAL),
        (simple_reply(magic=0x668E33EF), "0x668e33ef where a reply should begin", errno.EPROTO),
        (simple_reply(cookie=8), "cookie 0x8 instead of 0x7", errno.EPROTO),
        (b"", "closed the connection", errno.ECONNRESET),
    ],
)
def test_reply_of_an_error_or_a_wrong_one_raises_with_its_errno(
    received: bytes, words: str, error_number: int
) -> None:
    decoder = ReplyDecoder(READ, device=DEVICE)
    with pytest.raises(DeviceError) as caught:
        decoder.receive(received)
    assert str(caught.value).startswith(f"{DEVICE}: ")
    assert words in str(caught.value)
    assert caught.value.error_number == error_number
    with pytest.raises(RuntimeError):
        decoder.receive(received)


# Both cores.


ROOT = server.Export("root", "the root disk", SIZE, FLAGS, 512, 4096, 1 << 20)
LARGE = server.Export(
    "large-ü", "", (1 << 63) - 512, FLAGS | TransmissionFlag.READ_ONLY, 1, 65536, 0xFFFFFFFF
)
EXPORTS = {export.name: export for export in (ROOT, LARGE)}


def converse(client: ClientNegotiation, host: server.Negotiation, *, knows_go: bool = True) -> server.Event:
    """Both until the server is done; a server that does not know ``GO`` answers so in its place."""
    to_host = client.receive(host.greeting)
    while True:
        if not knows_go and to_host[4:].startswith(option(GO)[:12]):
            events: list[server.Event] = [*host.receive(to_host[:4]), server.Send(reply(ERR_UNSUP))]
        else:
            events = host.receive(to_host)
        to_host = b""
        for event in events:
            if not isinstance(event, server.Send):
                return event
            to_host += client.receive(event.data)


@pytest.mark.parametrize("name", EXPORTS)
def test_cores_that_talk_by_go_agree_on_everything(name: str) -> None:
    client, export = ClientNegotiation(name, device=DEVICE), EXPORTS[name]
    end = converse(client, server.Negotiation(EXPORTS))
    assert end == server.Chosen(export, obeys_block_size=True, leftover=b"")
    assert client.remote == Remote(
        export.size, export.flags, export.block_size_min, export.block_size_preferred, export.payload_max
    )


@pytest.mark.parametrize("name", EXPORTS)
def test_cores_that_talk_by_export_name_agree_on_size_and_flags(name: str) -> None:
    client, export = ClientNegotiation(name, device=DEVICE), EXPORTS[name]
    end = converse(client, server.Negotiation(EXPORTS), knows_go=False)
    assert end == server.Chosen(export, obeys_block_size=False, leftover=b"")
    assert client.remote == Remote(export.size, export.flags)


def test_cores_that_talk_of_the_default_export_agree_on_the_only_one() -> None:
    client = ClientNegotiation("", device=DEVICE)
    end = converse(client, server.Negotiation({"root": ROOT}))
    assert end == server.Chosen(ROOT, obeys_block_size=True, leftover=b"")


@pytest.mark.parametrize(
    ("name", "words"), [("", "no default among 2 exports"), ("nope", "no export named 'nope'")]
)
def test_cores_that_disagree_part_with_the_servers_words(name: str, words: str) -> None:
    client, host = ClientNegotiation(name, device=DEVICE), server.Negotiation(EXPORTS)
    with pytest.raises(NbdNegotiationError) as caught:
        converse(client, host)
    assert caught.value.reply_type == nbdproto.ReplyType.ERR_UNKNOWN
    assert words in caught.value.server_text
    acknowledged, hangup = host.receive(caught.value.farewell)
    assert acknowledged == server.Send(reply(ACK, number=ABORT))
    assert isinstance(hangup, server.Hangup)


def test_cores_without_go_and_without_the_export_part_by_hangup() -> None:
    client, host = ClientNegotiation("nope", device=DEVICE), server.Negotiation(EXPORTS)
    end = converse(client, host, knows_go=False)
    assert isinstance(end, server.Hangup)
    with pytest.raises(NbdNegotiationError, match="no such export"):
        client.receive(b"")
