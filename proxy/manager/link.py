"""The manager's end of a control channel: commands with their replies, and the server's events."""

import math
from pathlib import Path
from typing import Any

import trio

from proxy.errors import StandfastError
from proxy.wire import Decoder, Frame, WireError

#: No command waits for a device or a client, except opening a leg and stopping, which have limits of their own.
COMMAND_TIMEOUT_S = 20


class ServerGoneError(StandfastError):
    """The domain server has ended, or does not obey any more."""


class CommandError(StandfastError):
    """The domain server could not do as told. ``details`` has ``text`` and what else it said."""

    def __init__(self, operation: str, details: dict[str, Any]) -> None:
        super().__init__(details["text"])
        self.operation = operation
        self.details = details


class Link:
    """A connection to one domain server.

    ``events`` delivers what the server tells, in order; it ends when the server does. Every event
    told before a reply is in it before that reply is returned.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._replies: dict[int, tuple[trio.Event, list[dict[str, Any]]]] = {}
        self._next_id = 1
        self._sending = trio.Lock()
        # Unbounded on purpose: the engine bounds what it tells, and a bound here could deadlock a
        # command that waits for its reply with the reader that waits for the events' consumer.
        self._deliver, self.events = trio.open_memory_channel[dict[str, Any]](math.inf)
        self.gone = trio.Event()

    @classmethod
    async def connect(cls, path: Path) -> "Link":
        """Connect to the server at ``path``. Raises OSError."""
        sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        try:
            await sock.connect(str(path))
        except BaseException:
            sock.close()
            raise
        return cls(trio.SocketStream(sock))

    async def run(self) -> None:
        """Take in what the server sends until it is gone."""
        decoder = Decoder()
        try:
            async for data in self._stream:
                for frame in decoder.receive(data):
                    self._take(frame)
        except (trio.BrokenResourceError, trio.ClosedResourceError, WireError):
            pass
        finally:
            self.gone.set()
            self._deliver.close()
            for replied, _ in self._replies.values():
                replied.set()
            await trio.aclose_forcefully(self._stream)

    def _take(self, frame: Frame) -> None:
        if "event" in frame.body:
            self._deliver.send_nowait(frame.body["event"])
            return
        waiting = self._replies.get(frame.body.get("id", 0))
        if waiting is not None:
            waiting[1].append(frame.body)
            waiting[0].set()

    async def call(
        self, operation: str, *, payload: bytes = b"", limit_s: float = COMMAND_TIMEOUT_S, **arguments: Any
    ) -> Any:
        """Have a command carried out within ``limit_s``; its result.

        Raises:
            ServerGoneError: the server ended first, or took impossibly long.
            CommandError: it could not.
        """
        command = self._next_id
        self._next_id += 1
        replied, replies = self._replies[command] = (trio.Event(), [])
        try:
            with trio.fail_after(limit_s):
                async with self._sending:
                    await self._send(Frame({"id": command, "op": operation, **arguments}, payload))
                if not self.gone.is_set():
                    await replied.wait()
        except trio.TooSlowError:
            raise ServerGoneError(f"it did not answer to {operation!r} within {limit_s:g} s") from None
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise ServerGoneError("it has ended") from None
        finally:
            del self._replies[command]
        if not replies:
            raise ServerGoneError("it has ended")
        if "error" in replies[0]:
            raise CommandError(operation, replies[0]["error"])
        return replies[0]["result"]

    async def _send(self, frame: Frame) -> None:
        try:
            await self._stream.send_all(frame.encode())
        except trio.Cancelled:
            await trio.aclose_forcefully(self._stream)  # half a frame is in it, and nothing can follow that
            raise
