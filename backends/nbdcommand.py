"""Requests and simple replies of the NBD transmission phase, one at a time. Pure: gives bytes, is fed bytes.

This is for the control path (labels); client data goes through the engine, which has its own codec.

Source: NBD proto.md, "Request message", "Simple reply message", "Error values".
"""

import errno
from dataclasses import dataclass

from backends import nbdproto
from backends.errors import DeviceError
from backends.nbdproto import Command

#: The error values of the protocol, which took them from Linux, so they are their own errno.
_ERROR_VALUES = frozenset(
    {
        errno.EPERM,
        errno.EIO,
        errno.ENOMEM,
        errno.EINVAL,
        errno.ENOSPC,
        errno.EOVERFLOW,
        errno.ENOTSUP,
        errno.ESHUTDOWN,
    }
)


@dataclass(frozen=True, slots=True)
class Request:
    """One request without command flags; ``offset`` and ``length`` in bytes.

    ``cookie`` is any 64-bit number that no other request in flight on the connection has.
    """

    command: Command
    cookie: int = 0
    offset: int = 0
    length: int = 0
    payload: bytes = b""

    def encode(self) -> bytes:
        """What goes to the server, payload and all."""
        header = nbdproto.REQUEST.pack(
            nbdproto.REQUEST_MAGIC, 0, self.command, self.cookie, self.offset, self.length
        )
        return header + self.payload


def read(offset: int, length: int, *, cookie: int) -> Request:
    """Ask for ``length`` bytes at ``offset``; the caller keeps to the server's block sizes and payload."""
    return Request(Command.READ, cookie, offset, length)


def write(offset: int, payload: bytes, *, cookie: int) -> Request:
    """Write ``payload`` at ``offset``; the caller keeps to the server's block sizes and payload."""
    return Request(Command.WRITE, cookie, offset, len(payload), payload)


def flush(*, cookie: int) -> Request:
    """Make every write answered so far durable; only for a server that offers ``SEND_FLUSH``."""
    return Request(Command.FLUSH, cookie)


def disconnect() -> Request:
    """End the transmission phase; there is no reply to it."""
    return Request(Command.DISC)


class ReplyDecoder:
    """The reply to one request, put together of whatever pieces it comes in.

    Args:
        request: what was sent, and is the only request in flight.
        device: the device's URL, for messages.
    """

    def __init__(self, request: Request, *, device: str) -> None:
        self._request = request
        self._device = device
        self._buffer = bytearray()
        self._error_number: int | None = None
        self._is_over = False

    def receive(self, data: bytes) -> bytes | None:
        """The data that a ``READ`` asked for, or ``b""`` for any other command; ``None`` while incomplete.

        Args:
            data: what the server sent next; ``b""`` when it closed the connection.

        Raises:
            DeviceError: the server answered with an error, which is ``error_number`` (an error the
                protocol does not define counts as EINVAL) and leaves the connection usable. EPROTO: what
                it sent is no reply to this request. ECONNRESET: it closed the connection.
            RuntimeError: the reply is complete already; nothing is changed.
        """
        if self._is_over:
            raise RuntimeError(f"the reply to {self._request.command.name} is complete")
        if not data:
            raise self._failure("server closed the connection instead of answering", errno.ECONNRESET)
        self._buffer += data
        if self._error_number is None:
            if len(self._buffer) < nbdproto.SIMPLE_REPLY.size:
                return None
            self._error_number = self._take_header()
        payload_length = 0
        if self._request.command is Command.READ and self._error_number == 0:
            payload_length = self._request.length
        if len(self._buffer) < payload_length:
            return None
        if len(self._buffer) > payload_length:
            raise self._failure("server sent more than one reply to one request", errno.EPROTO)
        if self._error_number != 0:
            known = self._error_number if self._error_number in _ERROR_VALUES else errno.EINVAL
            raise self._failure(f"server answered with error {self._error_number}", known)
        self._is_over = True
        return bytes(self._buffer)

    def _take_header(self) -> int:
        header = self._buffer[: nbdproto.SIMPLE_REPLY.size]
        del self._buffer[: nbdproto.SIMPLE_REPLY.size]
        magic, error, cookie = nbdproto.SIMPLE_REPLY.unpack(header)
        if magic != nbdproto.SIMPLE_REPLY_MAGIC:
            raise self._failure(f"server sent {magic:#010x} where a reply should begin", errno.EPROTO)
        if cookie != self._request.cookie:
            raise self._failure(
                f"server answered cookie {cookie:#x} instead of {self._request.cookie:#x}", errno.EPROTO
            )
        assert isinstance(error, int)
        return error

    def _failure(self, what: str, error_number: int) -> DeviceError:
        self._is_over = True
        request = self._request
        where = f" of {request.length} bytes at {request.offset}" if request.length else ""
        return DeviceError(
            f"{self._device}: {request.command.name}{where} failed: {what}", error_number=error_number
        )
