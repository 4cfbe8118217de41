"""The server's side of NBD negotiation, from the greeting to a chosen export. Pure: fed bytes, gives events.

Fixed newstyle with ``NO_ZEROES``; no TLS, no structured replies. What the client's next bytes are is
the ``Phase``, and ``TRANSITIONS`` has every step there is::

    CLIENT_FLAGS ──> OPTION_HEADER ──> OPTION_DATA ──> OPTION_HEADER    answered, the next option
                         │                  └────────> CHOSEN           EXPORT_NAME or GO accepted
                         └───────────> OPTION_SKIP ──> OPTION_HEADER    data not wanted or too much
    any of them ──> HUNG_UP

A reply is an error wherever the protocol has one to give; only what leaves the two ends out of step
(wrong magic, unknown handshake flags), what cannot be answered (``EXPORT_NAME`` of an unknown export)
and what has no end (limits below) ends the connection.

Its memory is bounded: at most ``OPTION_DATA_MAX`` bytes are kept between two calls, whatever length
an option announces. Time is not its business: whoever drives it sets a deadline for the whole.

Source: NBD proto.md, "Newstyle negotiation", "Fixed newstyle negotiation", "Termination of the session
during option haggling", "Option types".
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from backends import nbdproto
from backends.nbdproto import ClientFlag, HandshakeFlag, Info, Option, ReplyType, TransmissionFlag

#: The most data of one option that is read: the longest name the protocol allows is half of it,
#: and the other half has room for two thousand information requests, of which four kinds exist.
OPTION_DATA_MAX = 2 * nbdproto.STRING_BYTES_MAX

#: ``qemu-nbd --list`` sends two options for each export, so a domain of 500 disks can still be listed.
OPTIONS_MAX = 1024

#: Options are answered for nothing up to this; without it, 1024 times ``LIST`` in one packet would
#: make replies worth hundreds of megabytes. One listing of 500 disks is 100 KB at most.
REPLY_BYTES_MAX = 4 * 1024 * 1024

#: How much of a name that a client sent is repeated to it or in a log; ours have 63 characters.
_NAME_CHARACTERS_SHOWN = 80

_OFFERED = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES


@dataclass(frozen=True, slots=True)
class Export:
    """What a client is told of one export: sizes in bytes, ``flags`` always with ``HAS_FLAGS``.

    ``block_size_min`` binds only clients that asked for it (``Chosen.obeys_block_size``).
    """

    name: str
    description: str
    size: int
    flags: TransmissionFlag
    block_size_min: int
    block_size_preferred: int
    payload_max: int

    def __post_init__(self) -> None:
        assert TransmissionFlag.HAS_FLAGS in self.flags
        assert TransmissionFlag.SEND_DF not in self.flags, "structured replies are not negotiated"
        assert max(len(self.name.encode()), len(self.description.encode())) <= nbdproto.STRING_BYTES_MAX
        fault = nbdproto.block_size_fault(self.block_size_min, self.block_size_preferred, self.payload_max)
        assert fault is None, fault


@dataclass(frozen=True, slots=True)
class Send:
    """``data`` goes to the client before anything else happens to the connection."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Chosen:
    """Negotiation is over and the transmission phase begins, with ``leftover`` as its first bytes.

    ``obeys_block_size``: the client asked for the block sizes in its ``GO``, so it must align its
    requests to ``export.block_size_min``; any other may send requests of any offset and length.
    """

    export: Export
    obeys_block_size: bool
    leftover: bytes


@dataclass(frozen=True, slots=True)
class Hangup:
    """The connection is to be closed; ``reason`` is for a log."""

    reason: str


Event = Send | Chosen | Hangup


class Phase(Enum):
    """What the next bytes of the client are."""

    CLIENT_FLAGS = "client flags"
    OPTION_HEADER = "option header"
    OPTION_DATA = "option data"
    OPTION_SKIP = "option data that is not read"
    CHOSEN = "transmission"
    HUNG_UP = "nothing"


TRANSITIONS: Mapping[Phase, frozenset[Phase]] = MappingProxyType(
    {
        Phase.CLIENT_FLAGS: frozenset({Phase.OPTION_HEADER, Phase.HUNG_UP}),
        Phase.OPTION_HEADER: frozenset({Phase.OPTION_DATA, Phase.OPTION_SKIP, Phase.HUNG_UP}),
        Phase.OPTION_DATA: frozenset({Phase.OPTION_HEADER, Phase.CHOSEN, Phase.HUNG_UP}),
        Phase.OPTION_SKIP: frozenset({Phase.OPTION_HEADER, Phase.HUNG_UP}),
        Phase.CHOSEN: frozenset(),
        Phase.HUNG_UP: frozenset(),
    }
)


class _OptionError(Exception):
    """An option that cannot be granted, as the reply that says so."""

    def __init__(self, reply_type: ReplyType, text: str) -> None:
        super().__init__(text)
        self.reply_type = reply_type
        self.text = text


class Negotiation:
    """One client's negotiation.

    ``greeting`` is sent first, at once. Then every piece the client sends goes to ``receive``, and
    what comes back is done in order, until it ends with ``Chosen`` or ``Hangup``.

    Args:
        exports: what can be chosen, by name. It is looked at anew for every option, never kept.
    """

    def __init__(self, exports: Mapping[str, Export]) -> None:
        self._exports = exports
        self._phase = Phase.CLIENT_FLAGS
        self._awaited_bytes = nbdproto.CLIENT_FLAGS.size
        self._buffer = bytearray()
        self._client_flags = ClientFlag(0)
        self._option = 0
        self._option_length = 0
        self._options_seen = 0
        self._reply_bytes = 0

    @property
    def greeting(self) -> bytes:
        """What a server sends before its client has said anything."""
        return nbdproto.GREETING.pack(nbdproto.NBD_MAGIC, nbdproto.OPTION_MAGIC, _OFFERED)

    @property
    def phase(self) -> Phase:
        """What is awaited of the client; ``CHOSEN`` and ``HUNG_UP`` are the end."""
        return self._phase

    @property
    def buffered_bytes(self) -> int:
        """How much is kept of what the client sent; never more than ``OPTION_DATA_MAX`` between calls."""
        return len(self._buffer)

    def receive(self, data: bytes) -> list[Event]:
        """What ``data`` brings about, in order; empty when more must come first.

        Args:
            data: what the client sent next, cut anywhere; ``b""`` when it closed the connection.

        Raises:
            RuntimeError: negotiation is over already; nothing is changed.
        """
        if not TRANSITIONS[self._phase]:
            raise RuntimeError(f"negotiation is over: {self._phase.name}")
        if not data:
            return self._hang_up(f"client closed the connection where {self._phase.value} should follow")
        self._buffer += data
        events: list[Event] = []
        while TRANSITIONS[self._phase] and self._has_awaited():
            events += _STEPS[self._phase](self, self._take())
        return events

    def _has_awaited(self) -> bool:
        if self._phase is Phase.OPTION_SKIP:
            skipped = min(self._awaited_bytes, len(self._buffer))
            del self._buffer[:skipped]
            self._awaited_bytes -= skipped
            return self._awaited_bytes == 0
        return len(self._buffer) >= self._awaited_bytes

    def _take(self) -> bytes:
        taken = bytes(self._buffer[: self._awaited_bytes])
        del self._buffer[: self._awaited_bytes]
        return taken

    def _enter(self, phase: Phase, awaited_bytes: int = 0) -> None:
        assert phase in TRANSITIONS[self._phase], f"{self._phase.name} to {phase.name}"
        self._phase = phase
        self._awaited_bytes = awaited_bytes

    def _hang_up(self, reason: str) -> list[Event]:
        self._enter(Phase.HUNG_UP)
        self._buffer.clear()
        return [Hangup(reason)]

    def _on_client_flags(self, data: bytes) -> list[Event]:
        (flags,) = nbdproto.CLIENT_FLAGS.unpack(data)
        # As an int: the complement of an IntFlag has only the bits that have names.
        if flags & ~int(_OFFERED):
            return self._hang_up(
                f"client set handshake flags {flags:#x}, of which only {_OFFERED:#x} were offered"
            )
        self._client_flags = ClientFlag(flags)
        self._enter(Phase.OPTION_HEADER, nbdproto.OPTION_HEADER.size)
        return []

    def _on_option_header(self, data: bytes) -> list[Event]:
        magic, self._option, self._option_length = nbdproto.OPTION_HEADER.unpack(data)
        self._options_seen += 1
        if magic != nbdproto.OPTION_MAGIC:
            return self._hang_up(f"client sent {magic:#018x} where an option should begin")
        if self._options_seen > OPTIONS_MAX or self._reply_bytes > REPLY_BYTES_MAX:
            return self._hang_up(
                f"client chose no export in {OPTIONS_MAX} options or {REPLY_BYTES_MAX} bytes of replies"
            )
        if self._option == Option.EXPORT_NAME:
            if self._option_length > nbdproto.STRING_BYTES_MAX:
                return self._hang_up(f"client named an export in {self._option_length} bytes")
        elif ClientFlag.FIXED_NEWSTYLE not in self._client_flags:
            # Such a client has not said that it understands replies: nothing could be told to it.
            return self._hang_up(f"client sent {_name_of(self._option)} without fixed newstyle")
        is_read = self._option in _OPTIONS_READ and self._option_length <= OPTION_DATA_MAX
        self._enter(Phase.OPTION_DATA if is_read else Phase.OPTION_SKIP, self._option_length)
        return []

    def _on_option_data(self, data: bytes) -> list[Event]:
        if self._option == Option.EXPORT_NAME:
            return self._choose_by_name(data)
        try:
            name, requested = _parse_info(data)
            export = self._find(name)
        except _OptionError as error:
            return self._reply_and_go_on(self._reply(error.reply_type, error.text.encode()))
        replies = self._describe(export, requested) + self._reply(ReplyType.ACK)
        if self._option == Option.INFO:
            return self._reply_and_go_on(replies)
        return [Send(replies), self._choose(export, obeys_block_size=Info.BLOCK_SIZE in requested)]

    def _on_option_skipped(self, _: bytes) -> list[Event]:
        match self._option:
            case Option.ABORT:
                # The client need not wait for this, so sending it may fail.
                return [Send(self._reply(ReplyType.ACK)), *self._hang_up("client ended the negotiation")]
            case Option.LIST if self._option_length == 0:
                listing = b"".join(self._list_entry(export) for export in self._exports.values())
                return self._reply_and_go_on(listing + self._reply(ReplyType.ACK))
            case Option.LIST:
                reply_type, text = ReplyType.ERR_INVALID, "LIST takes no data"
            case Option.INFO | Option.GO:
                reply_type = ReplyType.ERR_TOO_BIG
                text = (
                    f"{self._option_length} bytes of data are more than the {OPTION_DATA_MAX} that are read"
                )
            case _:
                reply_type, text = (
                    ReplyType.ERR_UNSUP,
                    f"{_name_of(self._option)} is not supported by this server",
                )
        return self._reply_and_go_on(self._reply(reply_type, text.encode()))

    def _choose_by_name(self, name: bytes) -> list[Event]:
        try:
            export = self._find(name)
        except _OptionError as error:
            return self._hang_up(f"client asked with EXPORT_NAME, which has no error reply: {error.text}")
        answer = nbdproto.EXPORT.pack(export.size, export.flags)
        if ClientFlag.NO_ZEROES not in self._client_flags:
            answer += bytes(nbdproto.ZEROES_LENGTH)
        return [Send(answer), self._choose(export, obeys_block_size=False)]

    def _choose(self, export: Export, *, obeys_block_size: bool) -> Chosen:
        self._enter(Phase.CHOSEN)
        leftover = bytes(self._buffer)
        self._buffer.clear()
        return Chosen(export, obeys_block_size, leftover)

    def _find(self, name_bytes: bytes) -> Export:
        """The export a client means; the empty name means the only one there is.

        Raises:
            _OptionError: the name is malformed, or there is no such export.
        """
        if len(name_bytes) > nbdproto.STRING_BYTES_MAX:
            raise _OptionError(
                ReplyType.ERR_INVALID, f"an export name of {len(name_bytes)} bytes is too long"
            )
        try:
            name = name_bytes.decode()
        except UnicodeDecodeError:
            raise _OptionError(ReplyType.ERR_INVALID, "the export name is not UTF-8") from None
        if name == "":
            if len(self._exports) != 1:
                raise _OptionError(
                    ReplyType.ERR_UNKNOWN, f"there is no default among {len(self._exports)} exports: name one"
                )
            return next(iter(self._exports.values()))
        export = self._exports.get(name)
        if export is None:
            raise _OptionError(ReplyType.ERR_UNKNOWN, f"there is no export named {_shown(name)}")
        return export

    def _describe(self, export: Export, requested: frozenset[int]) -> bytes:
        described = {
            Info.EXPORT: nbdproto.EXPORT.pack(export.size, export.flags),
            Info.NAME: export.name.encode(),
            Info.DESCRIPTION: export.description.encode(),
            Info.BLOCK_SIZE: nbdproto.BLOCK_SIZE.pack(
                export.block_size_min, export.block_size_preferred, export.payload_max
            ),
        }
        return b"".join(
            self._reply(ReplyType.INFO, nbdproto.INFO.pack(info) + content)
            for info, content in described.items()
            if info is Info.EXPORT or info in requested
        )

    def _list_entry(self, export: Export) -> bytes:
        name = export.name.encode()
        return self._reply(
            ReplyType.SERVER, nbdproto.STRING_LENGTH.pack(len(name)) + name + export.description.encode()
        )

    def _reply(self, reply_type: ReplyType, data: bytes = b"") -> bytes:
        return (
            nbdproto.OPTION_REPLY_HEADER.pack(
                nbdproto.OPTION_REPLY_MAGIC, self._option, reply_type, len(data)
            )
            + data
        )

    def _reply_and_go_on(self, replies: bytes) -> list[Event]:
        self._reply_bytes += len(replies)
        self._enter(Phase.OPTION_HEADER, nbdproto.OPTION_HEADER.size)
        return [Send(replies)]


#: The options whose data means something here; that of all others is skipped, so that its length
#: costs no memory.
_OPTIONS_READ = frozenset({Option.EXPORT_NAME, Option.INFO, Option.GO})

_STEPS: Mapping[Phase, Callable[[Negotiation, bytes], list[Event]]] = {
    Phase.CLIENT_FLAGS: Negotiation._on_client_flags,
    Phase.OPTION_HEADER: Negotiation._on_option_header,
    Phase.OPTION_DATA: Negotiation._on_option_data,
    Phase.OPTION_SKIP: Negotiation._on_option_skipped,
}


def _parse_info(data: bytes) -> tuple[bytes, frozenset[int]]:
    """The export's name and the information requested, of the data of ``INFO`` or ``GO``.

    Raises:
        _OptionError: the lengths in it do not add up to its own.
    """
    rest_length = len(data) - nbdproto.STRING_LENGTH.size - nbdproto.INFO.size
    if rest_length < 0:
        raise _OptionError(ReplyType.ERR_INVALID, f"{len(data)} bytes of data are too few")
    (name_length,) = nbdproto.STRING_LENGTH.unpack_from(data)
    if name_length > rest_length:
        raise _OptionError(
            ReplyType.ERR_INVALID,
            f"the name's length {name_length} is beyond the {rest_length} bytes there are",
        )
    name_end = nbdproto.STRING_LENGTH.size + name_length
    (count,) = nbdproto.INFO.unpack_from(data, name_end)
    requests = data[name_end + nbdproto.INFO.size :]
    if len(requests) != count * nbdproto.INFO.size:
        raise _OptionError(
            ReplyType.ERR_INVALID,
            f"{count} information requests do not fit the {len(requests)} bytes sent of them",
        )
    requested = frozenset(info for (info,) in nbdproto.INFO.iter_unpack(requests))
    return data[nbdproto.STRING_LENGTH.size : name_end], requested


def _name_of(option: int) -> str:
    try:
        return f"option {Option(option).name}"
    except ValueError:
        return f"option {option}"


def _shown(name: str) -> str:
    """A client's string, short and without control characters, for a message or a log."""
    return repr(name if len(name) <= _NAME_CHARACTERS_SHOWN else name[:_NAME_CHARACTERS_SHOWN] + "…")
