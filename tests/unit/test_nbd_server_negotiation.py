"""The server's negotiation: one list of cases drives it whole, byte by byte and with trailing data.

The bytes are written here by hand, with the numbers of NBD proto.md, so that a wrong constant shows.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from struct import pack
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.nbdproto import TransmissionFlag
from proxy.domainserver.negotiation import (
    OPTION_DATA_MAX,
    OPTIONS_MAX,
    REPLY_BYTES_MAX,
    TRANSITIONS,
    Chosen,
    Export,
    Hangup,
    Negotiation,
    Phase,
    Send,
)

EXPORT_NAME, ABORT, LIST, PEEK_EXPORT, STARTTLS, INFO, GO, STRUCTURED_REPLY = 1, 2, 3, 4, 5, 6, 7, 8
LIST_META_CONTEXT, SET_META_CONTEXT, EXTENDED_HEADERS = 9, 10, 11
ACK, SERVER, REP_INFO = 1, 2, 3
ERR_UNSUP, ERR_INVALID, ERR_UNKNOWN, ERR_TOO_BIG = 0x80000001, 0x80000003, 0x80000006, 0x80000009
INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE = 0, 1, 2, 3

FLAGS = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH | TransmissionFlag.CAN_MULTI_CONN
FLAGS_ON_WIRE = 0x0105
ROOT = Export("root", "the root disk", 5 << 20, FLAGS, 512, 4096, 32 << 20)
SWAP = Export("swap-ü", "", 1 << 40, FLAGS | TransmissionFlag.READ_ONLY, 1, 65536, 1 << 20)
ONE = {"root": ROOT}
TWO = {"root": ROOT, "swap-ü": SWAP}

GREETING = b"NBDMAGIC" + b"IHAVEOPT" + b"\x00\x03"
FIXED_NO_ZEROES = pack(">I", 3)
FIXED = pack(">I", 1)
PLAIN = pack(">I", 0)


def option(number: int, data: bytes = b"", *, length: int | None = None) -> bytes:
    return b"IHAVEOPT" + pack(">II", number, len(data) if length is None else length) + data


def asking(name: bytes, *infos: int) -> bytes:
    return pack(">I", len(name)) + name + pack(f">H{len(infos)}H", len(infos), *infos)


def reply(number: int, reply_type: int, data: bytes = b"") -> bytes:
    return pack(">QIII", 0x0003E889045565A9, number, reply_type, len(data)) + data


def info_export(number: int, export: Export, flags: int) -> bytes:
    return reply(number, REP_INFO, pack(">HQH", INFO_EXPORT, export.size, flags))


@dataclass(frozen=True)
class Refused:
    """An error reply whose text, for a person, has these words in it."""

    number: int
    reply_type: int
    words: str


@dataclass(frozen=True)
class Case:
    name: str
    sent: bytes
    expected: tuple[bytes | Refused, ...]
    end: Chosen | str | None = None
    """What was chosen, the words of a hang-up's reason, or ``None``: still open."""
    exports: tuple[Export, ...] = (ROOT, SWAP)


def open_case(name: str, number: int, data: bytes, *expected: bytes | Refused) -> Case:
    """One option that is answered, and after it another, which shows that both ends are in step."""
    return Case(
        name,
        FIXED_NO_ZEROES + option(number, data) + option(0xABCD, b"some data"),
        (*expected, Refused(0xABCD, ERR_UNSUP, "option 43981 is not supported")),
    )


def unsupported(name: str, number: int, data: bytes = b"") -> Case:
    return open_case(f"{name} is not supported", number, data, Refused(number, ERR_UNSUP, name))


def refused(name: str, number: int, data: bytes, reply_type: int, words: str) -> Case:
    return open_case(name, number, data, Refused(number, reply_type, words))


LISTING = (
    reply(LIST, SERVER, pack(">I", 4) + b"root" + b"the root disk"),
    reply(LIST, SERVER, pack(">I", 7) + "swap-ü".encode()),
    reply(LIST, ACK),
)

CASES = [
    Case("nothing but flags", FIXED_NO_ZEROES, ()),
    Case(
        "go",
        FIXED_NO_ZEROES + option(GO, asking(b"root")),
        (info_export(GO, ROOT, 0x0105), reply(GO, ACK)),
        Chosen(ROOT, obeys_block_size=False, leftover=b""),
    ),
    Case(
        "go without no-zeroes has no zeroes either",
        FIXED + option(GO, asking("swap-ü".encode())),
        (info_export(GO, SWAP, 0x0107), reply(GO, ACK)),
        Chosen(SWAP, obeys_block_size=False, leftover=b""),
    ),
    Case(
        "go with every info, unknown ones and one twice",
        FIXED_NO_ZEROES + option(GO, asking(b"root", INFO_BLOCK_SIZE, 77, INFO_NAME, INFO_DESCRIPTION, 77)),
        (
            info_export(GO, ROOT, 0x0105),
            reply(GO, REP_INFO, pack(">H", INFO_NAME) + b"root"),
            reply(GO, REP_INFO, pack(">H", INFO_DESCRIPTION) + b"the root disk"),
            reply(GO, REP_INFO, pack(">HIII", INFO_BLOCK_SIZE, 512, 4096, 32 << 20)),
            reply(GO, ACK),
        ),
        Chosen(ROOT, obeys_block_size=True, leftover=b""),
    ),
    Case(
        "block size learnt by info does not bind a go without it",
        FIXED_NO_ZEROES
        + option(INFO, asking(b"root", INFO_BLOCK_SIZE))
        + option(GO, asking(b"root", INFO_EXPORT)),
        (
            info_export(INFO, ROOT, 0x0105),
            reply(INFO, REP_INFO, pack(">HIII", INFO_BLOCK_SIZE, 512, 4096, 32 << 20)),
            reply(INFO, ACK),
            info_export(GO, ROOT, 0x0105),
            reply(GO, ACK),
        ),
        Chosen(ROOT, obeys_block_size=False, leftover=b""),
    ),
    Case(
        "go with no name takes the only export and tells its name",
        FIXED_NO_ZEROES + option(GO, asking(b"", INFO_NAME)),
        (
            info_export(GO, ROOT, 0x0105),
            reply(GO, REP_INFO, pack(">H", INFO_NAME) + b"root"),
            reply(GO, ACK),
        ),
        Chosen(ROOT, obeys_block_size=False, leftover=b""),
        exports=(ROOT,),
    ),
    open_case("list", LIST, b"", *LISTING),
    Case("list of nothing", FIXED + option(LIST), (reply(LIST, ACK),), exports=()),
    open_case("info", INFO, asking(b"root"), info_export(INFO, ROOT, 0x0105), reply(INFO, ACK)),
    refused("list with data", LIST, b"x", ERR_INVALID, "LIST takes no data"),
    refused("list with more data than is read", LIST, bytes(20_000), ERR_INVALID, "LIST takes no data"),
    refused("go of an unknown export", GO, asking(b"nope"), ERR_UNKNOWN, "no export named 'nope'"),
    refused("info of an unknown export", INFO, asking(b"nope"), ERR_UNKNOWN, "no export named 'nope'"),
    refused(
        "go with no name among two", GO, asking(b""), ERR_UNKNOWN, "no default among 2 exports: name one"
    ),
    refused("go of a name with a line end", GO, asking(b"a\nb\0"), ERR_UNKNOWN, r"named 'a\nb\x00'"),
    refused("go of the longest name", GO, asking(b"n" * 4096), ERR_UNKNOWN, f"named '{'n' * 80}…'"),
    refused("go of a longer name", GO, asking(b"n" * 4097), ERR_INVALID, "4097 bytes is too long"),
    refused("go of a name not UTF-8", GO, asking(b"\xff\xfe"), ERR_INVALID, "not UTF-8"),
    refused("go without data", GO, b"", ERR_INVALID, "too few"),
    refused("go with half a name length", GO, b"\0\0\0", ERR_INVALID, "too few"),
    refused("go with a name beyond its data", GO, pack(">I", 5) + b"root\0\0", ERR_INVALID, "beyond the 4"),
    refused("go with a huge name length", GO, pack(">IH", 0xFFFFFFFF, 0), ERR_INVALID, "beyond the 0"),
    refused("info with half a request", INFO, asking(b"root", 3)[:-1], ERR_INVALID, "1 information requests"),
    refused("info with a request too many", INFO, asking(b"root", 3) + b"\0\0", ERR_INVALID, "do not fit"),
    refused("info with too few requests", INFO, pack(">I4sH", 4, b"root", 9), ERR_INVALID, "do not fit"),
    refused(
        "go with too much data", GO, asking(b"root") + bytes(OPTION_DATA_MAX), ERR_TOO_BIG, "more than the"
    ),
    refused("info with too much data", INFO, bytes(OPTION_DATA_MAX + 1), ERR_TOO_BIG, "more than the 8192"),
    refused("info with all the data that is read", INFO, bytes(OPTION_DATA_MAX), ERR_INVALID, "do not fit"),
    unsupported("PEEK_EXPORT", PEEK_EXPORT),
    unsupported("STARTTLS", STARTTLS),
    unsupported("STRUCTURED_REPLY", STRUCTURED_REPLY),
    unsupported("LIST_META_CONTEXT", LIST_META_CONTEXT, pack(">I4sI", 4, b"root", 0)),
    unsupported("SET_META_CONTEXT", SET_META_CONTEXT, pack(">I4sI", 4, b"root", 0)),
    unsupported("EXTENDED_HEADERS", EXTENDED_HEADERS),
    unsupported("option 0", 0),
    unsupported("option 4294967295", 0xFFFFFFFF, bytes(100_000)),
    Case(
        "export name",
        FIXED_NO_ZEROES + option(EXPORT_NAME, b"root"),
        (pack(">QH", 5 << 20, FLAGS_ON_WIRE),),
        Chosen(ROOT, obeys_block_size=False, leftover=b""),
    ),
    Case(
        "export name with zeroes",
        FIXED + option(EXPORT_NAME, b"root"),
        (pack(">QH124x", 5 << 20, FLAGS_ON_WIRE),),
        Chosen(ROOT, obeys_block_size=False, leftover=b""),
    ),
    Case(
        "export name without fixed newstyle",
        PLAIN + option(EXPORT_NAME, b"root"),
        (pack(">QH124x", 5 << 20, FLAGS_ON_WIRE),),
        Chosen(ROOT, obeys_block_size=False, leftover=b""),
    ),
    Case(
        "export name without fixed newstyle, with no-zeroes",
        pack(">I", 2) + option(EXPORT_NAME, b"root"),
        (pack(">QH", 5 << 20, FLAGS_ON_WIRE),),
        Chosen(ROOT, obeys_block_size=False, leftover=b""),
    ),
    Case(
        "export name after an error, empty for the only one",
        FIXED_NO_ZEROES + option(GO, asking(b"nope")) + option(EXPORT_NAME),
        (Refused(GO, ERR_UNKNOWN, "nope"), pack(">QH", 5 << 20, FLAGS_ON_WIRE)),
        Chosen(ROOT, obeys_block_size=False, leftover=b""),
        exports=(ROOT,),
    ),
    Case("export name unknown", FIXED + option(EXPORT_NAME, b"nope"), (), "no export named 'nope'"),
    Case("export name empty among two", FIXED + option(EXPORT_NAME), (), "no default among 2"),
    Case("export name empty among none", FIXED + option(EXPORT_NAME), (), "no default among 0", exports=()),
    Case("export name not UTF-8", FIXED + option(EXPORT_NAME, b"\xff"), (), "not UTF-8"),
    Case("export name too long", FIXED + option(EXPORT_NAME, length=4097), (), "4097 bytes"),
    Case("abort", FIXED + option(ABORT), (reply(ABORT, ACK),), "client ended the negotiation"),
    Case("abort with data", FIXED + option(ABORT, bytes(9)), (reply(ABORT, ACK),), "client ended"),
    Case("unknown flags", pack(">I", 4), (), "handshake flags 0x4"),
    Case("known and unknown flags", pack(">I", 0x80000003), (), "handshake flags 0x80000003"),
    Case("garbage for an option", FIXED + b"GET / HTTP/1.1\r\n", (), "0x474554202f204854"),
    Case("list without fixed newstyle", PLAIN + option(LIST), (), "LIST without fixed newstyle"),
    Case("abort without fixed newstyle", PLAIN + option(ABORT), (), "ABORT without fixed newstyle"),
]


def replies_in(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(option, reply type, data) of every reply."""
    while data:
        assert data[:8] == pack(">Q", 0x0003E889045565A9)
        number, reply_type, length = (int.from_bytes(data[at : at + 4]) for at in (8, 12, 16))
        assert len(data) >= 20 + length
        yield number, reply_type, data[20 : 20 + length]
        data = data[20 + length :]


def assert_replies(sent: bytes, expected: Iterable[bytes | Refused]) -> None:
    """``sent`` is exactly the ``expected`` replies, in this order."""
    for piece in expected:
        if isinstance(piece, bytes):
            assert sent[: len(piece)] == piece
            sent = sent[len(piece) :]
        else:
            number, reply_type, text = next(replies_in(sent))
            assert (number, reply_type) == (piece.number, piece.reply_type)
            assert piece.words in text.decode()
            sent = sent[20 + len(text) :]
    assert sent == b""


def feed(negotiation: Negotiation, pieces: Iterable[bytes]) -> tuple[bytes, Chosen | Hangup | None]:
    """All that was sent, and how it ended; pieces after the end are not given."""
    sent = b""
    for piece in pieces:
        for event in negotiation.receive(piece):
            match event:
                case Send(data):
                    sent += data
                case Chosen() | Hangup():
                    return sent, event
        assert negotiation.buffered_bytes <= OPTION_DATA_MAX
    return sent, None


def single_bytes(data: bytes) -> Iterator[bytes]:
    return (data[at : at + 1] for at in range(len(data)))


def check(case: Case, sent: bytes, end: Chosen | Hangup | None, leftover: bytes) -> None:
    assert_replies(sent, case.expected)
    if isinstance(case.end, str):
        assert isinstance(end, Hangup)
        assert case.end in end.reason
    elif isinstance(case.end, Chosen):
        assert end == Chosen(case.end.export, case.end.obeys_block_size, leftover)
    else:
        assert end is None


def start(case: Case) -> Negotiation:
    negotiation = Negotiation({export.name: export for export in case.exports})
    assert negotiation.greeting == GREETING
    return negotiation


each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@each_case
def test_negotiation_fed_whole_answers_as_the_protocol_says(case: Case) -> None:
    negotiation = start(case)
    sent, end = feed(negotiation, [case.sent])
    check(case, sent, end, b"")


@each_case
def test_negotiation_fed_byte_by_byte_answers_the_same(case: Case) -> None:
    negotiation = start(case)
    sent, end = feed(negotiation, single_bytes(case.sent))
    check(case, sent, end, b"")


@each_case
def test_negotiation_with_trailing_data_leaves_it_to_transmission(case: Case) -> None:
    negotiation = start(case)
    trailing = b"\x25\x60\x95\x13 the first request"
    sent, end = feed(negotiation, [case.sent + trailing])
    if case.end is None:
        # It is the beginning of the next option, and is complete enough to be refused.
        assert isinstance(end, Hangup)
        assert "where an option should begin" in end.reason
    else:
        check(case, sent, end, trailing)


@each_case
def test_negotiation_that_is_over_raises_and_stays(case: Case) -> None:
    negotiation = start(case)
    feed(negotiation, [case.sent])
    if case.end is None:
        [hangup] = negotiation.receive(b"")
        assert isinstance(hangup, Hangup)
        assert "closed the connection where option header should follow" in hangup.reason
    phase = negotiation.phase
    for data in (b"", b"IHAVEOPT"):
        with pytest.raises(RuntimeError, match="negotiation is over"):
            negotiation.receive(data)
    assert negotiation.phase is phase
    assert negotiation.buffered_bytes == 0


def test_negotiation_of_a_client_that_says_nothing_ends_with_its_connection() -> None:
    [hangup] = Negotiation(ONE).receive(b"")
    assert isinstance(hangup, Hangup)
    assert "where client flags should follow" in hangup.reason


def test_negotiation_looks_exports_up_anew_for_every_option() -> None:
    exports = dict(ONE)
    negotiation = Negotiation(exports)
    negotiation.receive(FIXED)
    exports["swap-ü"] = SWAP
    assert negotiation.receive(option(LIST)) == [Send(b"".join(LISTING))]
    del exports["root"]
    [send] = negotiation.receive(option(GO, asking(b"root")))
    assert isinstance(send, Send)
    assert_replies(send.data, [Refused(GO, ERR_UNKNOWN, "root")])
    assert feed(negotiation, [option(GO, asking(b""))])[1] == Chosen(SWAP, False, b"")


def test_negotiation_skips_data_of_any_length_without_keeping_it() -> None:
    negotiation = Negotiation(ONE)
    negotiation.receive(FIXED + option(GO, length=1 << 24))
    for _ in range((1 << 8) - 1):
        assert negotiation.receive(bytes(1 << 16)) == []
        assert negotiation.buffered_bytes == 0
    [send] = negotiation.receive(bytes(1 << 16))
    assert isinstance(send, Send)
    assert_replies(send.data, [Refused(GO, ERR_TOO_BIG, f"{1 << 24} bytes")])
    assert feed(negotiation, [option(GO, asking(b"root"))])[1] == Chosen(ROOT, False, b"")


def test_negotiation_of_options_without_end_is_given_up() -> None:
    negotiation = Negotiation(ONE)
    sent, end = feed(negotiation, [FIXED, *[option(STRUCTURED_REPLY)] * OPTIONS_MAX])
    assert len(list(replies_in(sent))) == OPTIONS_MAX
    assert end is None
    [hangup] = negotiation.receive(option(GO, asking(b"root")))
    assert isinstance(hangup, Hangup)
    assert "chose no export in 1024 options" in hangup.reason


def test_negotiation_of_many_listings_in_one_packet_answers_a_bounded_number() -> None:
    exports = {
        name: Export(name, "d" * 200, 1 << 20, FLAGS, 1, 4096, 1 << 20) for name in map(str, range(500))
    }
    listing_length = len(feed(Negotiation(exports), [FIXED + option(LIST)])[0])
    sent, end = feed(Negotiation(exports), [FIXED + option(LIST) * OPTIONS_MAX])
    assert isinstance(end, Hangup)
    assert REPLY_BYTES_MAX < len(sent) <= REPLY_BYTES_MAX + listing_length


@pytest.mark.parametrize(
    "change",
    [
        {"flags": TransmissionFlag.SEND_FLUSH},
        {"flags": FLAGS | TransmissionFlag.SEND_DF},
        {"block_size_min": 513},
        {"block_size_min": 0},
        {"block_size_min": 1 << 17, "block_size_preferred": 1 << 17},
        {"block_size_preferred": 256},
        {"block_size_preferred": 6144},
        {"payload_max": 2048},
        {"name": "n" * 4097},
    ],
)
def test_export_that_the_protocol_forbids_cannot_be_made(change: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        replace(ROOT, **change)


def test_transitions_reach_every_phase_and_end() -> None:
    reached, found = {Phase.CLIENT_FLAGS}, {Phase.CLIENT_FLAGS}
    while found:
        found = {after for phase in found for after in TRANSITIONS[phase]} - reached
        reached |= found
    assert reached == set(TRANSITIONS) == set(Phase)
    assert all(Phase.HUNG_UP in after for after in TRANSITIONS.values() if after)


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    bounds = [0, *sorted({cut for cut in cuts if 0 < cut < len(data)}), len(data)]
    return [data[a:b] for a, b in pairwise(bounds) if a < b]


names = st.sampled_from([b"", b"root", "swap-ü".encode(), b"nope", b"\xff", b"n" * 4096])
infos = st.lists(st.integers(0, 5), max_size=6)
well_formed = st.builds(
    lambda number, name, wanted: option(number, asking(name, *wanted)),
    st.sampled_from([INFO, GO]),
    names,
    infos,
)
bare = st.builds(option, st.integers(0, 12) | st.integers(0, 0xFFFFFFFF), st.binary(max_size=20))
damaged = st.builds(
    lambda data, at, value: data[: at % len(data)] + bytes([value]) + data[at % len(data) + 1 :],
    well_formed | bare,
    st.integers(0, 5000),
    st.integers(0, 255),
)
haggling = st.builds(
    lambda flags, options: pack(">I", flags) + b"".join(options),
    st.integers(0, 4),
    st.lists(well_formed | bare | damaged, max_size=12),
)
exports_given = st.sampled_from([{}, ONE, TWO])


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200) | haggling, exports=exports_given, cuts=st.lists(st.integers(0, 9000)))
def test_negotiation_of_any_bytes_never_raises_and_does_not_care_how_they_are_cut(
    data: bytes, exports: dict[str, Export], cuts: list[int]
) -> None:
    whole, in_pieces = Negotiation(exports), Negotiation(exports)
    pieces = pieces_of(data, cuts)
    sent, end = feed(whole, [data] if data else [])
    sent_in_pieces, end_in_pieces = feed(in_pieces, pieces)

    assert sent == sent_in_pieces
    assert len(sent) <= REPLY_BYTES_MAX
    if isinstance(end, Chosen):
        assert isinstance(end_in_pieces, Chosen)
        assert (end.export, end.obeys_block_size) == (end_in_pieces.export, end_in_pieces.obeys_block_size)
        assert data.endswith(end.leftover)
        assert end.leftover.startswith(end_in_pieces.leftover)
    else:
        assert end == end_in_pieces
    if end is not None:
        for negotiation in (whole, in_pieces):
            assert negotiation.phase in (Phase.CHOSEN, Phase.HUNG_UP)
            with pytest.raises(RuntimeError):
                negotiation.receive(data)
