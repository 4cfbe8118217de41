"""NBD's transmission phase as bytes, both ways, written from the specification and not from the engine.

Source: NBD proto.md, "Transmission phase" (requests and simple replies).
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, IntFlag

REQUEST_MAGIC = 0x25609513
REPLY_MAGIC = 0x67446698
REQUEST = struct.Struct(">IHHQQI")
REPLY = struct.Struct(">IIQ")


class Command(IntEnum):
    """Request types."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    ZERO = 6


class Flag(IntFlag):
    """Command flags."""

    NONE = 0
    FUA = 1
    NO_HOLE = 2


@dataclass(frozen=True, slots=True)
class Request:
    """One request; ``offset`` and ``length`` in bytes, ``payload`` of a WRITE only."""

    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    payload: bytes = b""

    def pack(self) -> bytes:
        """The request as it goes over the wire."""
        header = REQUEST.pack(REQUEST_MAGIC, self.flags, self.command, self.cookie, self.offset, self.length)
        return header + self.payload


@dataclass(frozen=True, slots=True)
class Reply:
    """A simple reply; ``payload`` of a READ without error only."""

    error: int
    cookie: int
    payload: bytes = b""

    def pack(self) -> bytes:
        """The reply as it goes over the wire."""
        return REPLY.pack(REPLY_MAGIC, self.error, self.cookie) + self.payload


class ProtocolError(Exception):
    """The peer sent what the protocol does not allow."""


class RequestReader:
    """A server's end of a stream: bytes in, requests out."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Request]:
        """Requests that ``data`` completes, in order. Raises ProtocolError."""
        self._buffer += data
        found = []
        while len(self._buffer) >= REQUEST.size:
            magic, flags, command, cookie, offset, length = REQUEST.unpack_from(self._buffer)
            if magic != REQUEST_MAGIC:
                raise ProtocolError(f"request magic {magic:#x}")
            end = REQUEST.size + (length if command == Command.WRITE else 0)
            if len(self._buffer) < end:
                break
            payload = bytes(self._buffer[REQUEST.size : end])
            del self._buffer[:end]
            found.append(Request(command, flags, cookie, offset, length, payload))
        return found


class ReplyReader:
    """A client's end of a stream: bytes in, replies out.

    Args:
        payload_lengths: bytes that follow a reply without error, by cookie of the READs in flight; the
            caller keeps it up to date.
    """

    def __init__(self, payload_lengths: Mapping[int, int]) -> None:
        self._payload_lengths = payload_lengths
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Reply]:
        """Replies that ``data`` completes, in order. Raises ProtocolError."""
        self._buffer += data
        found = []
        while len(self._buffer) >= REPLY.size:
            magic, error, cookie = REPLY.unpack_from(self._buffer)
            if magic != REPLY_MAGIC:
                raise ProtocolError(f"reply magic {magic:#x}")
            end = REPLY.size + (0 if error else self._payload_lengths.get(cookie, 0))
            if len(self._buffer) < end:
                break
            found.append(Reply(error, cookie, bytes(self._buffer[REPLY.size : end])))
            del self._buffer[:end]
        return found
