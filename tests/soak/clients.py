"""Clients of the domain: many requests of every kind in flight, over real connections, all remembered."""

import random
import socket
import struct
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import trio

from tests.sim.clients import COMMANDS
from tests.sim.history import CELLS_PER_SECTOR, Kind, Operation, Violation
from tests.sim.wire import Command, Flag, ReplyReader, Request
from tests.soak.record import LongHistory

DEPTH_MAX = 16
#: Between two requests of a client, at most: enough work for faults to meet, little enough to be checked.
THINK_S = 0.003
#: A few sectors that most requests touch, so that they meet.
HOT_CELLS = 128 * CELLS_PER_SECTOR
LONG_CELLS = 300
#: A process that was killed has gone, and its successor's socket is there, long before this.
DEATH_PATIENCE_S = 5
_WEIGHTS = {Kind.READ: 8, Kind.WRITE: 8, Kind.ZERO: 1, Kind.TRIM: 1, Kind.FLUSH: 1}
_CREDENTIALS = struct.Struct("3i")
_GREETING = struct.Struct(">8s8sH")
_EXPORT_NAME = struct.Struct(">I8sII")
_EXPORT = struct.Struct(">QH")
_FIXED_NEWSTYLE_NO_ZEROES = 3
_RECEIVE_BYTES = 1 << 18


class Leave(Enum):
    """How a client goes away."""

    POLITELY = "politely"
    HALF_CLOSED = "half-closed"
    SILENTLY = "without a word"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A client was told of an error; times are trio's."""

    operation: Operation
    error: int
    asked_at: float
    told_at: float

    def __str__(self) -> str:
        return f"{self.operation} was answered with error {self.error} after {self.told_at - self.asked_at:.3f} s"


class Servers:
    """What is known of domain servers from the connections to them.

    Attributes:
        killed: pids of those that we ended.
    """

    def __init__(self, history: LongHistory) -> None:
        self.killed: set[int] = set()
        self._history = history
        self._newest = 0
        self._past: set[int] = set()
        self._undecided: defaultdict[int, list[Operation]] = defaultdict(list)

    def leave_undecided(self, server: int, operations: Iterator[Operation]) -> None:
        """What was asked of a server and will never be answered may still happen, as long as it lives."""
        self._undecided[server] += operations
        if server in self._past:
            self._settle(server)

    def answered(self, server: int) -> None:
        """A server answers: whatever the one before it was asked has happened by now, or never will."""
        if server == self._newest or server in self._past:
            return
        self._past.add(self._newest)
        self._settle(self._newest)
        self._newest = server

    def has_answered(self, server: int) -> bool:
        """Whether a server has ever answered a request."""
        return server == self._newest or server in self._past

    def settle_all(self) -> None:
        """Nothing runs any more."""
        for server in list(self._undecided):
            self._settle(server)

    def _settle(self, server: int) -> None:
        for operation in self._undecided.pop(server, ()):
            self._history.settle(operation)


class Connection:
    """One connection to a disk.

    Args:
        stream: in the transmission phase.
        servers, history: shared by all clients.
    """

    def __init__(self, stream: trio.SocketStream, servers: Servers, history: LongHistory) -> None:
        self.refusals: list[Refusal] = []
        self.waiting: dict[int, tuple[Operation, float]] = {}
        self.contents: dict[int, bytes] = {}  # of reads that somebody wants to see
        self._stream = stream
        self._servers = servers
        self._history = history
        self._lengths: dict[int, int] = {}
        self._reader = ReplyReader(self._lengths)
        self._answered = trio.Event()
        credentials = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        self.server: int = _CREDENTIALS.unpack(credentials)[0]

    async def ask(self, operation: Operation) -> None:
        """Send a request. Raises OSError or trio.BrokenResourceError when the connection is no more."""
        flags = Flag.FUA if operation.durable else Flag.NONE
        payload = operation.content() if operation.kind is Kind.WRITE else b""
        place = (0, 0) if operation.kind is Kind.FLUSH else (operation.offset, operation.length)
        request = Request(COMMANDS[operation.kind], flags, operation.number, *place, payload)
        self._lengths[operation.number] = operation.length if operation.kind is Kind.READ else 0
        self.waiting[operation.number] = (operation, trio.current_time())
        self._history.ask(operation)  # from before its first byte is on its way
        await self._stream.send_all(request.pack())

    async def receive(self) -> None:
        """Take answers until the connection ends. Raises Violation."""
        with suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await self._stream.receive_some(_RECEIVE_BYTES):
                self._servers.answered(self.server)
                for reply in self._reader.feed(data):
                    if reply.cookie not in self.waiting:
                        raise Violation(f"an answer to request {reply.cookie}, which nobody waits for")
                    operation, asked_at = self.waiting.pop(reply.cookie)
                    del self._lengths[reply.cookie]
                    if reply.error:
                        self._history.settle(operation)
                        self.refusals.append(Refusal(operation, reply.error, asked_at, trio.current_time()))
                    else:
                        self._history.answer(operation, reply.payload)
                        if operation.number in self.contents:
                            self.contents[operation.number] = reply.payload
                    self._history.happened[
                        f"{operation.kind.value} {'refused' if reply.error else 'answered'}"
                    ] += 1
                self._answered.set()
                self._answered = trio.Event()

    async def wait_fewer(self, count: int) -> None:
        """Return when fewer than ``count`` requests wait for an answer."""
        while len(self.waiting) >= count:
            await self._answered.wait()

    async def leave(self, how: Leave) -> None:
        """Go away, with whatever is in flight. The other end answers that and closes, unless we have vanished."""
        if how is Leave.SILENTLY:
            await self._stream.aclose()
        elif how is Leave.HALF_CLOSED:
            self._stream.socket.shutdown(socket.SHUT_WR)
        else:
            await self._stream.send_all(Request(Command.DISC, 0, 0, 0, 0).pack())

    def give_up(self) -> None:
        """What has not been answered by now never will be."""
        self._servers.leave_undecided(self.server, (operation for operation, _ in self.waiting.values()))
        self.waiting.clear()

    async def check_end(self) -> None:
        """The connection has ended, not by us. Raises Violation unless its server was killed, or never served."""
        with trio.move_on_after(DEATH_PATIENCE_S):
            while is_alive(self.server):
                await trio.sleep(0.01)
        # A manager that finds one which another had only begun to start replaces it.
        if self.server not in self._servers.killed and self._servers.has_answered(self.server):
            what = "lives" if is_alive(self.server) else "ended by itself"
            raise Violation(f"a connection ended, and its server (pid {self.server}) {what}")


def is_alive(process: int) -> bool:
    """Whether a process runs, of whomever it is a child."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


async def connect(address: Path, disk: str) -> trio.SocketStream:
    """A connection to a disk, in the transmission phase. Raises OSError, EOFError or trio.BrokenResourceError.

    It does not ask for block sizes, so it may make requests at any offset and of any length.
    Source: NBD proto.md, "Fixed newstyle negotiation" and NBD_OPT_EXPORT_NAME.
    """
    stream = await trio.open_unix_socket(address)
    try:
        magic, option_magic, _ = _GREETING.unpack(await _receive(stream, _GREETING.size))
        assert (magic, option_magic) == (b"NBDMAGIC", b"IHAVEOPT")
        name = disk.encode()
        await stream.send_all(_EXPORT_NAME.pack(_FIXED_NEWSTYLE_NO_ZEROES, b"IHAVEOPT", 1, len(name)) + name)
        await _receive(stream, _EXPORT.size)
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return stream


async def _receive(stream: trio.SocketStream, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = await stream.receive_some(length - len(data))
        if not more:
            raise EOFError
        data += more
    return data


class Client:
    """One client at work on one disk, now on this connection and then on another.

    Args:
        address: the domain's socket.
        disk: its number; it is called ``diskNUMBER``.
        servers, history: shared by all clients.
        choices: of what it does.
    """

    def __init__(
        self, address: Path, disk: int, servers: Servers, history: LongHistory, choices: random.Random
    ) -> None:
        self.refusals: list[Refusal] = []
        self._address = address
        self._disk = disk
        self._servers = servers
        self._history = history
        self._choices = choices
        self._depth = choices.randint(1, DEPTH_MAX)
        self._hot = choices.randrange(len(history.cells[disk]) - HOT_CELLS)
        self._finishing = False

    def finish(self) -> None:
        """Ask nothing more, and end when all is answered."""
        self._finishing = True

    async def run(self) -> None:
        """Work until told to finish. Raises Violation."""
        while not self._finishing:
            try:
                stream = await connect(self._address, f"disk{self._disk}")
            except (OSError, EOFError, trio.BrokenResourceError):
                await trio.sleep(0.02)  # a server is being started; nothing tells when its socket is there
                continue
            self._history.happened["connections"] += 1
            connection = Connection(stream, self._servers, self._history)
            async with stream:
                await self._work(connection)
            connection.give_up()
            self.refusals += connection.refusals

    async def _work(self, connection: Connection) -> None:
        """Use a connection until it ends, or we leave it."""
        how: Leave | None = None
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                await connection.receive()
                nursery.cancel_scope.cancel()

            nursery.start_soon(receive)
            with suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError):
                for _ in range(self._choices.randint(20, 1500)):
                    if self._finishing:
                        break
                    await connection.wait_fewer(self._depth)
                    await connection.ask(self._choose())
                    await trio.sleep(self._choices.uniform(0, THINK_S))
                if self._finishing or self._choices.random() < 0.3:
                    how = Leave.POLITELY
                    await connection.wait_fewer(1)
                else:
                    how = self._choices.choice(list(Leave))
                self._history.happened[f"clients left {how.value}"] += 1
                await connection.leave(how)
                if how is Leave.SILENTLY:
                    nursery.cancel_scope.cancel()
            await trio.sleep_forever()  # until the other end has closed
        if how is None:
            self._history.happened["connections cut"] += 1
            await connection.check_end()
        elif how is not Leave.SILENTLY and connection.waiting:
            await connection.check_end()

    def _choose(self) -> Operation:
        choices = self._choices
        kind = choices.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
        end = len(self._history.cells[self._disk])
        if kind is Kind.FLUSH:
            return self._history.new(kind, self._disk, 0, 0)
        low, high = (0, end) if choices.random() < 0.3 else (self._hot, self._hot + HOT_CELLS)
        first = choices.randrange(low, high)
        last = first + (choices.randint(1, LONG_CELLS) if choices.random() < 0.05 else choices.randint(1, 9))
        if choices.random() < 0.6:
            first -= first % CELLS_PER_SECTOR
            last += -last % CELLS_PER_SECTOR
        durable = kind in (Kind.WRITE, Kind.ZERO) and choices.random() < 0.2
        return self._history.new(kind, self._disk, first, min(last, end), durable=durable)


async def read_all(address: Path, disk: int, servers: Servers, history: LongHistory) -> bytes:
    """All of a disk, as one more client sees it. Raises Violation."""
    count = len(history.cells[disk])
    async with await connect(address, f"disk{disk}") as stream, trio.open_nursery() as nursery:
        connection = Connection(stream, servers, history)
        nursery.start_soon(connection.receive)
        reads = []
        for first in range(0, count, LONG_CELLS):
            reads.append(history.new(Kind.READ, disk, first, min(first + LONG_CELLS, count)))
            connection.contents[reads[-1].number] = b""
            await connection.wait_fewer(DEPTH_MAX)
            await connection.ask(reads[-1])
        await connection.wait_fewer(1)
        nursery.cancel_scope.cancel()
    if connection.refusals:
        raise Violation(f"nothing is wrong, and yet: {connection.refusals[0]}")
    return b"".join(connection.contents[read.number] for read in reads)
