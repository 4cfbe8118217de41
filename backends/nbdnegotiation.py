"""The client's side of NBD negotiation, from the server's greeting to a ``Remote``.

Pure: fed bytes, gives bytes. Newstyle, with or without "fixed"; asks with ``GO`` and for the block
sizes, and with ``EXPORT_NAME`` where ``GO`` is not known. It negotiates no structured replies and no
TLS. What the server's next bytes are is the ``Phase``, and ``TRANSITIONS`` has every step there is::

    MAGIC ──> STYLE ──> HANDSHAKE_FLAGS ──> REPLY_HEADER ──> REPLY_DATA ──> REPLY_HEADER   INFO, more follows
                               │                                  ├───────> READY          ACK
                               │                                  v
                               └─────────────────────────────> EXPORT ────> READY          EXPORT_NAME
    any of them ──> FAILED

Source: NBD proto.md, "Newstyle negotiation", "Fixed newstyle negotiation", "Termination of the session
during option haggling", "Option types", "Size constraints".
"""

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from struct import Struct
from types import MappingProxyType

from backends import nbdcommand, nbdproto
from backends.errors import DeviceError
from backends.nbdproto import ClientFlag, HandshakeFlag, Info, Option, ReplyType, TransmissionFlag
from backends.sizes import SIZE_MAX

#: The most data of one reply: twice the longest string the protocol allows, and every other reply
#: to ``GO`` is shorter.
REPLY_DATA_MAX = 2 * nbdproto.STRING_BYTES_MAX

#: How many replies a ``GO`` may have: there are four kinds of information, each sent once.
REPLIES_MAX = 64

#: How much of a server's own words goes into a message that has to stay one line.
_TEXT_CHARACTERS_SHOWN = 200

_HANDSHAKE_FLAGS_LENGTH = 2
_MAGIC_LENGTH = 8

#: What an error reply means to those who classify by errno, and what an operator can do about it.
_REFUSALS: Mapping[int, tuple[int, str]] = MappingProxyType(
    {
        ReplyType.ERR_UNKNOWN: (errno.ENOENT, "check the export's name"),
        ReplyType.ERR_POLICY: (errno.EACCES, "its policy has to allow this client"),
        ReplyType.ERR_TLS_REQD: (errno.EACCES, "it has to offer the export without TLS"),
        ReplyType.ERR_SHUTDOWN: (errno.ESHUTDOWN, "it is shutting down"),
    }
)
_REFUSAL_OTHER = (errno.EPROTO, "see the server's log")


class NbdNegotiationError(DeviceError):
    """A server that is not one, or does not let us at the export; the connection is to be closed.

    Attributes:
        reply_type: the error reply (a ``ReplyType``, or a number it does not have) if that is what
            ended it, else ``None``.
        server_text: the server's own words, with whatever characters it sent; often empty.
        farewell: what the protocol wants sent before the connection is closed; often empty.
    """

    def __init__(
        self,
        message: str,
        *,
        error_number: int = errno.EPROTO,
        reply_type: int | None = None,
        server_text: str = "",
        farewell: bytes = b"",
    ) -> None:
        super().__init__(message, error_number=error_number)
        self.reply_type = reply_type
        self.server_text = server_text
        self.farewell = farewell


@dataclass(frozen=True, slots=True)
class Remote:
    """The export as its server describes it, sizes in bytes; the defaults are the protocol's.

    Requests must be multiples of ``block_size_min``, and of at most ``payload_max`` bytes where they
    carry data (``0xffffffff``: the server has no limit of its own).
    """

    size: int
    flags: TransmissionFlag
    block_size_min: int = nbdproto.BLOCK_SIZE_MIN_DEFAULT
    block_size_preferred: int = nbdproto.BLOCK_SIZE_PREFERRED_DEFAULT
    payload_max: int = nbdproto.PAYLOAD_DEFAULT_MAX


class Phase(Enum):
    """What the next bytes of the server are."""

    MAGIC = "its greeting"
    STYLE = "the rest of its greeting"
    HANDSHAKE_FLAGS = "its handshake flags"
    REPLY_HEADER = "a reply"
    REPLY_DATA = "the rest of a reply"
    EXPORT = "the export's size (it closes when it has no such export)"
    READY = "nothing"
    FAILED = "nothing more"


TRANSITIONS: Mapping[Phase, frozenset[Phase]] = MappingProxyType(
    {
        Phase.MAGIC: frozenset({Phase.STYLE, Phase.FAILED}),
        Phase.STYLE: frozenset({Phase.HANDSHAKE_FLAGS, Phase.FAILED}),
        Phase.HANDSHAKE_FLAGS: frozenset({Phase.REPLY_HEADER, Phase.EXPORT, Phase.FAILED}),
        Phase.REPLY_HEADER: frozenset({Phase.REPLY_DATA, Phase.FAILED}),
        Phase.REPLY_DATA: frozenset({Phase.REPLY_HEADER, Phase.EXPORT, Phase.READY, Phase.FAILED}),
        Phase.EXPORT: frozenset({Phase.READY, Phase.FAILED}),
        Phase.READY: frozenset(),
        Phase.FAILED: frozenset(),
    }
)


class ClientNegotiation:
    """One negotiation for one export. The server speaks first::

        while negotiation.remote is None:
            send(negotiation.receive(received()))

    Args:
        export_name: as the server knows it; empty for its default export.
        device: the device's URL, for messages.

    Raises:
        NbdNegotiationError: no server can know that name.
    """

    def __init__(self, export_name: str, *, device: str) -> None:
        self._device = device
        self._export_name = export_name
        self._name_bytes = _encode_name(export_name, device)
        self._phase = Phase.MAGIC
        self._awaited_bytes = _MAGIC_LENGTH
        self._buffer = bytearray()
        self._client_flags = ClientFlag(0)
        self._reply_type = 0
        self._replies_seen = 0
        self._export: tuple[int, ...] | None = None
        self._block_size: tuple[int, ...] = ()
        self._remote: Remote | None = None

    @property
    def remote(self) -> Remote | None:
        """What was agreed on, once it is: the next byte sent is the transmission phase's first."""
        return self._remote

    @property
    def phase(self) -> Phase:
        """What is awaited of the server; ``READY`` and ``FAILED`` are the end."""
        return self._phase

    def receive(self, data: bytes) -> bytes:
        """What to send now; often nothing.

        Args:
            data: what the server sent next, cut anywhere; ``b""`` when it closed the connection.

        Raises:
            NbdNegotiationError: this server will not do, and why; negotiation is over.
            RuntimeError: negotiation is over already; nothing is changed.
        """
        if not TRANSITIONS[self._phase]:
            raise RuntimeError(f"negotiation is over: {self._phase.name}")
        if not data:
            raise self._failure(
                f"server closed the connection before {self._phase.value}", error_number=errno.ECONNRESET
            )
        self._buffer += data
        answer = b""
        while TRANSITIONS[self._phase] and len(self._buffer) >= self._awaited_bytes:
            taken = bytes(self._buffer[: self._awaited_bytes])
            del self._buffer[: self._awaited_bytes]
            answer += _STEPS[self._phase](self, taken)
        return answer

    def _enter(self, phase: Phase, awaited_bytes: int = 0) -> None:
        assert phase in TRANSITIONS[self._phase], f"{self._phase.name} to {phase.name}"
        self._phase = phase
        self._awaited_bytes = awaited_bytes

    def _failure(
        self,
        what: str,
        *,
        error_number: int = errno.EPROTO,
        reply_type: int | None = None,
        server_text: str = "",
        farewell: bytes = b"",
    ) -> NbdNegotiationError:
        self._enter(Phase.FAILED)
        self._buffer.clear()
        return NbdNegotiationError(
            f"{self._device}: {what}",
            error_number=error_number,
            reply_type=reply_type,
            server_text=server_text,
            farewell=farewell,
        )

    def _on_magic(self, data: bytes) -> bytes:
        if int.from_bytes(data) != nbdproto.NBD_MAGIC:
            raise self._failure(f"not an NBD server: it began with {data!r}")
        self._enter(Phase.STYLE, _MAGIC_LENGTH)
        return b""

    def _on_style(self, data: bytes) -> bytes:
        style = int.from_bytes(data)
        if style == nbdproto.OLDSTYLE_MAGIC:
            raise self._failure("server speaks only the oldstyle handshake; it has to offer newstyle")
        if style != nbdproto.OPTION_MAGIC:
            raise self._failure(f"not an NBD server: it went on with {data!r}")
        self._enter(Phase.HANDSHAKE_FLAGS, _HANDSHAKE_FLAGS_LENGTH)
        return b""

    def _on_handshake_flags(self, data: bytes) -> bytes:
        offered = HandshakeFlag(int.from_bytes(data))
        self._client_flags = ClientFlag(offered & (HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES))
        flags = nbdproto.CLIENT_FLAGS.pack(self._client_flags)
        if HandshakeFlag.FIXED_NEWSTYLE not in offered:
            return flags + self._ask_by_name()
        self._enter(Phase.REPLY_HEADER, nbdproto.OPTION_REPLY_HEADER.size)
        return flags + _option(
            Option.GO,
            nbdproto.STRING_LENGTH.pack(len(self._name_bytes)) + self._name_bytes,
            nbdproto.INFO.pack(1) + nbdproto.INFO.pack(Info.BLOCK_SIZE),
        )

    def _ask_by_name(self) -> bytes:
        has_zeroes = ClientFlag.NO_ZEROES not in self._client_flags
        self._enter(Phase.EXPORT, nbdproto.EXPORT.size + (nbdproto.ZEROES_LENGTH if has_zeroes else 0))
        return _option(Option.EXPORT_NAME, self._name_bytes)

    def _on_reply_header(self, data: bytes) -> bytes:
        magic, option, self._reply_type, length = nbdproto.OPTION_REPLY_HEADER.unpack(data)
        self._replies_seen += 1
        if magic != nbdproto.OPTION_REPLY_MAGIC:
            raise self._failure(f"server sent {magic:#018x} where a reply should begin")
        if option != Option.GO:
            raise self._failure(f"server answered option {option}, which was not sent")
        if length > REPLY_DATA_MAX:
            raise self._failure(f"server announced a reply of {length} bytes, more than {REPLY_DATA_MAX}")
        if self._replies_seen > REPLIES_MAX:
            raise self._failure(f"server sent more than {REPLIES_MAX} replies to one option")
        self._enter(Phase.REPLY_DATA, length)
        return b""

    def _on_reply_data(self, data: bytes) -> bytes:
        if self._reply_type == ReplyType.ERR_UNSUP:
            return self._ask_by_name()
        if self._reply_type & nbdproto.REPLY_ERROR_BIT:
            raise self._refusal(data.decode(errors="replace"))
        if self._reply_type == ReplyType.ACK:
            if self._export is None:
                raise self._failure("server accepted without telling the export's size")
            return self._agree(*self._export)
        if self._reply_type != ReplyType.INFO:
            raise self._failure(f"server sent reply type {self._reply_type:#x}, which does not belong to GO")
        self._take_info(data)
        self._enter(Phase.REPLY_HEADER, nbdproto.OPTION_REPLY_HEADER.size)
        return b""

    def _take_info(self, data: bytes) -> None:
        info, content = int.from_bytes(data[: nbdproto.INFO.size]), data[nbdproto.INFO.size :]
        if len(data) < nbdproto.INFO.size:
            raise self._failure("server sent an information reply without its type")
        if info == Info.EXPORT:
            self._export = self._unpack_info(nbdproto.EXPORT, content)
        elif info == Info.BLOCK_SIZE:
            self._block_size = self._unpack_info(nbdproto.BLOCK_SIZE, content)

    def _unpack_info(self, layout: Struct, content: bytes) -> tuple[int, ...]:
        if len(content) != layout.size:
            raise self._failure(
                f"server sent an information reply of {len(content)} bytes, not {layout.size}"
            )
        return layout.unpack(content)

    def _on_export(self, data: bytes) -> bytes:
        self._block_size = ()
        return self._agree(*nbdproto.EXPORT.unpack_from(data))

    def _agree(self, size: int, flags: int) -> bytes:
        remote = Remote(size, TransmissionFlag(flags), *self._block_size)
        fault = _fault_of(remote)
        if fault is not None:
            raise self._failure(f"unusable export: {fault}", farewell=nbdcommand.disconnect().encode())
        if self._buffer:
            raise self._failure(f"server sent {len(self._buffer)} bytes that were not asked for")
        self._enter(Phase.READY)
        self._remote = remote
        return b""

    def _refusal(self, server_text: str) -> NbdNegotiationError:
        error_number, advice = _REFUSALS.get(self._reply_type, _REFUSAL_OTHER)
        words = f" ({server_text[:_TEXT_CHARACTERS_SHOWN]!r})" if server_text else ""
        return self._failure(
            f"server refused export {self._export_name!r}"
            f" with {_reply_type_name(self._reply_type)}{words}: {advice}",
            error_number=error_number,
            reply_type=self._reply_type,
            server_text=server_text,
            farewell=_option(Option.ABORT),
        )


_STEPS: Mapping[Phase, Callable[[ClientNegotiation, bytes], bytes]] = {
    Phase.MAGIC: ClientNegotiation._on_magic,
    Phase.STYLE: ClientNegotiation._on_style,
    Phase.HANDSHAKE_FLAGS: ClientNegotiation._on_handshake_flags,
    Phase.REPLY_HEADER: ClientNegotiation._on_reply_header,
    Phase.REPLY_DATA: ClientNegotiation._on_reply_data,
    Phase.EXPORT: ClientNegotiation._on_export,
}


def _encode_name(export_name: str, device: str) -> bytes:
    try:
        name = export_name.encode()
    except UnicodeEncodeError:
        fault = "is not text"
    else:
        if len(name) <= nbdproto.STRING_BYTES_MAX and b"\0" not in name:
            return name
        fault = f"is longer than {nbdproto.STRING_BYTES_MAX} bytes or has a NUL in it"
    raise NbdNegotiationError(
        f"{device}: its export name {fault}, so no server can have it", error_number=errno.EINVAL
    )


def _option(option: Option, *pieces: bytes) -> bytes:
    data = b"".join(pieces)
    return nbdproto.OPTION_HEADER.pack(nbdproto.OPTION_MAGIC, option, len(data)) + data


def _fault_of(remote: Remote) -> str | None:
    """What makes ``remote`` useless as a device, in words; ``None`` when nothing does."""
    if TransmissionFlag.HAS_FLAGS not in remote.flags:
        return f"its transmission flags {int(remote.flags):#06x} are not marked as such"
    if not 0 < remote.size <= SIZE_MAX:
        return f"its size is {remote.size} bytes"
    return nbdproto.block_size_fault(remote.block_size_min, remote.block_size_preferred, remote.payload_max)


def _reply_type_name(reply_type: int) -> str:
    try:
        return ReplyType(reply_type).name
    except ValueError:
        return f"error {reply_type:#x}"
