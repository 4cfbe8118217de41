"""``nbd://host[:port]/export`` and ``nbd+unix:///export?socket=/path``: an export of an NBD server.

The negotiation and the codec are pure (``nbdnegotiation``, ``nbdcommand``); here are the sockets.
"""

import errno
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import trio

from backends import nbdcommand, nbdproto
from backends.base import BLOCK_SIZE_MAX, DataPath, DeviceInfo, Location, OpenDevice
from backends.errors import DeviceError, DeviceUnavailableError
from backends.nbdcommand import ReplyDecoder, Request
from backends.nbdnegotiation import ClientNegotiation, NbdNegotiationError, Remote
from backends.nbdproto import TransmissionFlag
from backends.url import DeviceUrl

#: Where an NBD server listens when the URL names no port. Source: NBD uri.md.
PORT_DEFAULT = 10809

#: The longest path of a Unix socket: sun_path has 108 bytes and ends with a zero. Source: unix(7).
SOCKET_PATH_BYTES_MAX = 107

#: Finding the host and connecting: a server of the same machine room answers in milliseconds, and
#: three losses of the first packet (retried after 1, 2 and 4 s) still pass.
CONNECT_TIMEOUT_S = 10.0

#: From the connection to the agreement, a few round trips.
NEGOTIATION_TIMEOUT_S = 10.0

#: One request of the control path; as long as the kernel gives a local disk before it resets it.
REQUEST_TIMEOUT_S = 30.0

#: How long a farewell may take before the connection is closed without one.
DISCONNECT_TIMEOUT_S = 1.0

_RECEIVE_MAX = 256 * 1024

#: A peer that vanished without a word on an idle connection is noticed within
#: 10 + 3 * 5 = 25 s; requests have deadlines of their own.
_TCP_OPTIONS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    # And one that vanished with requests under way, in as long; without it the kernel goes on for 15 minutes.
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 25_000),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    # The system's default again: trio sets 16 KiB on every stream, which would make the engine wait
    # with less than one large write in the socket.
    (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 0),
)


@dataclass(frozen=True, slots=True)
class TcpEndpoint:
    """A host (a name or an address) and a port."""

    host: str
    port: int

    async def connect(self) -> trio.SocketStream:
        """A connected stream, set up for the engine. Raises OSError."""
        stream = await trio.open_tcp_stream(self.host, self.port)
        for level, option, value in _TCP_OPTIONS:
            stream.setsockopt(level, option, value)
        return stream


@dataclass(frozen=True, slots=True)
class UnixEndpoint:
    """The path of a Unix socket."""

    path: str

    async def connect(self) -> trio.SocketStream:
        """A connected stream. Raises OSError."""
        return await trio.open_unix_socket(self.path)


@dataclass(frozen=True, slots=True)
class NbdLocation(Location):
    """An export, empty for the server's default one, and where its server listens."""

    url: str
    export_name: str
    endpoint: TcpEndpoint | UnixEndpoint

    async def open(self, *, create: bool) -> "NbdDevice":
        """See ``Location.open``; an export is never created."""
        stream = await self._connect()
        try:
            remote = await self._negotiate(stream)
            info = _device_info(self.url, remote)
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return NbdDevice(self.url, stream, info)

    async def _connect(self) -> trio.SocketStream:
        try:
            with trio.fail_after(CONNECT_TIMEOUT_S):
                return await self.endpoint.connect()
        except trio.TooSlowError:
            error_number, reason = errno.ETIMEDOUT, f"no answer within {CONNECT_TIMEOUT_S:g} s"
        except OSError as error:
            error_number, reason = _reason(error)
        raise DeviceUnavailableError(
            f"{self.url}: cannot connect: {reason}; check that its NBD server runs and listens there",
            error_number=error_number,
        )

    async def _negotiate(self, stream: trio.SocketStream) -> Remote:
        negotiation = ClientNegotiation(self.export_name, device=self.url)
        try:
            with _stream_errors(self.url, "negotiation", NEGOTIATION_TIMEOUT_S):
                while negotiation.remote is None:
                    answer = negotiation.receive(await stream.receive_some(_RECEIVE_MAX))
                    if answer:
                        await stream.send_all(answer)
        except NbdNegotiationError as error:
            with suppress(trio.BrokenResourceError), trio.move_on_after(DISCONNECT_TIMEOUT_S):
                await stream.send_all(error.farewell)
            raise
        return negotiation.remote


class NbdDevice(OpenDevice):
    """An export on the control path: one request at a time, each with a deadline.

    Owns the connection until ``detach``. A request that did not get its reply (cancelled, timed out)
    leaves the connection unusable: nobody could tell whose reply comes next.
    """

    def __init__(self, url: str, stream: trio.SocketStream, info: DeviceInfo) -> None:
        super().__init__(url, info)
        self._stream: trio.SocketStream | None = stream
        self._cookie = 0
        self._is_reply_due = False

    async def flush(self) -> None:
        """See ``OpenDevice.flush``; nothing is asked of a server that offers no flush."""
        self._use()
        if self.info.can_flush:
            await self._exchange(nbdcommand.flush(cookie=self._next_cookie()))

    async def lock(self, ranges: Sequence[tuple[int, int]], *, timeout_s: float) -> None:
        """Does nothing: the protocol has no locks, so nothing keeps another client of the server away.

        Nor is it needed against a dead predecessor's late writes on this machine, whose connection the
        kernel closes with it; what its server had received by then, the server may still carry out.
        """
        self._use()
        await trio.lowlevel.checkpoint()

    def detach(self) -> int:
        """See ``OpenDevice.detach``: the socket, in the transmission phase, no reply outstanding."""
        stream = self._use()
        self._stream = None
        descriptor = stream.socket.detach()
        # io_uring fails a request on a non-blocking socket at once, where it should wait for it.
        os.set_blocking(descriptor, True)
        return descriptor

    async def aclose(self) -> None:
        """See ``OpenDevice.aclose``; the server is told, unless it still owes a reply."""
        if self._stream is None:
            return
        stream, self._stream = self._stream, None
        with trio.CancelScope(shield=True):
            if not self._is_reply_due:
                with suppress(trio.BrokenResourceError), trio.move_on_after(DISCONNECT_TIMEOUT_S):
                    await stream.send_all(nbdcommand.disconnect().encode())
            await trio.aclose_forcefully(stream)

    async def _read_blocks(self, offset: int, length: int) -> bytes:
        pieces = [
            await self._exchange(nbdcommand.read(start, size, cookie=self._next_cookie()))
            for start, size in self._transfers(offset, length)
        ]
        return b"".join(pieces)

    async def _write_blocks(self, offset: int, data: bytes) -> None:
        for start, size in self._transfers(offset, len(data)):
            piece = data[start - offset : start - offset + size]
            await self._exchange(nbdcommand.write(start, piece, cookie=self._next_cookie()))

    def _transfers(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The range cut into (offset, length) of at most ``transfer_max``."""
        end = offset + length
        for start in range(offset, end, self.info.transfer_max):
            yield start, min(self.info.transfer_max, end - start)

    async def _exchange(self, request: Request) -> bytes:
        """Send one request and wait for its reply. Raises DeviceError."""
        stream = self._use()
        decoder = ReplyDecoder(request, device=self.url)
        self._is_reply_due = True
        try:
            with _stream_errors(self.url, request.command.name, REQUEST_TIMEOUT_S):
                await stream.send_all(request.encode())
                payload = None
                while payload is None:
                    payload = decoder.receive(await stream.receive_some(_RECEIVE_MAX))
        except DeviceError as error:
            # An error the server answered with is a reply like any other.
            self._is_reply_due = error.error_number in (errno.EPROTO, errno.ECONNRESET, errno.ETIMEDOUT)
            raise
        self._is_reply_due = False
        return payload

    def _use(self) -> trio.SocketStream:
        if self._stream is None:
            raise trio.ClosedResourceError(f"{self.url} is closed or detached")
        if self._is_reply_due:
            raise DeviceError(
                f"{self.url}: an earlier request was not answered, so the connection cannot be used; "
                "open the device anew"
            )
        return self._stream

    def _next_cookie(self) -> int:
        self._cookie += 1
        return self._cookie


def parse(url: DeviceUrl) -> NbdLocation:
    """Understand an ``nbd:`` or ``nbd+unix:`` URL. Raises DeviceUrlError. Source: NBD uri.md."""
    endpoint = _parse_unix(url) if url.scheme == "nbd+unix" else _parse_tcp(url)
    # One slash parts the name from the authority; any further one belongs to the name.
    export_name = url.path.removeprefix("/")
    if len(export_name.encode()) > nbdproto.STRING_BYTES_MAX:
        raise url.refusal(f"has an export name longer than {nbdproto.STRING_BYTES_MAX} bytes")
    return NbdLocation(url=url.text, export_name=export_name, endpoint=endpoint)


def _parse_tcp(url: DeviceUrl) -> TcpEndpoint:
    url.expect_parameters(())
    if not url.host:
        raise url.refusal("needs a host, nbd://host/export or nbd://host:10809/export")
    if url.port == 0:
        raise url.refusal("names port 0, where nothing can listen")
    return TcpEndpoint(url.host, PORT_DEFAULT if url.port is None else url.port)


def _parse_unix(url: DeviceUrl) -> UnixEndpoint:
    url.expect_parameters(("socket",))
    example = "nbd+unix:///export?socket=/run/nbd.sock"
    if url.authority:
        raise url.refusal(f"names a host, {url.authority!r}; a Unix socket takes three slashes, {example}")
    path = url.parameters.get("socket", "")
    if not path.startswith("/"):
        raise url.refusal(f"needs the absolute path of a socket, {example}")
    length = len(path.encode())
    if length > SOCKET_PATH_BYTES_MAX:
        raise url.refusal(
            f"has a socket path of {length} bytes; the system allows {SOCKET_PATH_BYTES_MAX}, "
            "choose a shorter one"
        )
    return UnixEndpoint(path)


def _device_info(url: str, remote: Remote) -> DeviceInfo:
    """What the engine has to know of an export. Raises DeviceUnavailableError."""
    if TransmissionFlag.READ_ONLY in remote.flags:
        raise DeviceUnavailableError(
            f"{url}: its server offers it read-only; start the server with write access",
            error_number=errno.EROFS,
        )
    block_size = remote.block_size_min
    if block_size > BLOCK_SIZE_MAX:
        raise DeviceUnavailableError(
            f"{url}: has blocks of {block_size} bytes; at most {BLOCK_SIZE_MAX} can be used"
        )
    return DeviceInfo(
        size=remote.size - remote.size % block_size,
        block_size=block_size,
        transfer_max=remote.payload_max - remote.payload_max % block_size,
        path=DataPath.NBD,
        in_memory=False,
        can_flush=TransmissionFlag.SEND_FLUSH in remote.flags,
        can_fua=TransmissionFlag.SEND_FUA in remote.flags,
        can_zero=TransmissionFlag.SEND_WRITE_ZEROES in remote.flags,
        can_trim=TransmissionFlag.SEND_TRIM in remote.flags,
        rotational=TransmissionFlag.ROTATIONAL in remote.flags,
    )


@contextmanager
def _stream_errors(url: str, what: str, timeout_s: float) -> Iterator[None]:
    """Within ``timeout_s``, and with the errors of a stream told as DeviceError."""
    try:
        with trio.fail_after(timeout_s):
            yield
    except trio.TooSlowError:
        raise DeviceError(
            f"{url}: {what} got no answer within {timeout_s:g} s; check its server and the network",
            error_number=errno.ETIMEDOUT,
        ) from None
    except trio.BrokenResourceError as error:
        raise DeviceError(
            f"{url}: {what} failed: the connection broke; check its server and the network",
            error_number=errno.ECONNRESET,
        ) from error


def _reason(error: OSError) -> tuple[int, str]:
    """The errno and the words for a connection that failed.

    trio tries every address of a host and raises one error caused by all of theirs.
    """
    cause = error.__cause__
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    if isinstance(cause, OSError):
        error = cause
    if isinstance(error, socket.gaierror):
        # Its errno is of the resolver's own numbering.
        return errno.EHOSTUNREACH, f"the host's name does not resolve: {error.strerror}"
    return error.errno or errno.ECONNREFUSED, error.strerror or str(error)
