"""Simulated clients: many requests of every kind in flight, over sockets that carry bytes in pieces."""

import errno
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from proxy.engine import OpKind, PendingOp, SimulatedEngine
from tests.sim.agenda import MICROSECOND_NS, Agenda
from tests.sim.history import CELLS_PER_SECTOR, History, Kind, Operation
from tests.sim.medium import SECTOR
from tests.sim.wire import Command, Flag, Reply, ReplyReader, Request

COMMANDS = {
    Kind.READ: Command.READ,
    Kind.WRITE: Command.WRITE,
    Kind.ZERO: Command.ZERO,
    Kind.TRIM: Command.TRIM,
    Kind.FLUSH: Command.FLUSH,
}


@dataclass(frozen=True, slots=True)
class Workload:
    """What clients do in this simulation: weights of requests, and where."""

    weights: dict[Kind, int]
    depth: int
    hot_cells: int
    unaligned: float
    long: float
    durable: float
    leave: float
    think_ns: int
    take_ns: int

    @classmethod
    def draw(cls, agenda: Agenda) -> "Workload":
        """One at random."""
        random = agenda.random
        return cls(
            weights={
                Kind.READ: random.choice((2, 6, 12)),
                Kind.WRITE: random.choice((4, 8, 12)),
                Kind.ZERO: random.choice((0, 1, 3)),
                Kind.TRIM: random.choice((0, 1, 2)),
                Kind.FLUSH: random.choice((0, 1, 2)),
            },
            depth=random.choice((1, 4, 8, 16)),
            hot_cells=random.choice((6, 24, 1000)) * CELLS_PER_SECTOR,
            unaligned=random.choice((0.0, 0.3, 0.8)),
            long=random.choice((0.0, 0.1)),
            durable=random.choice((0.0, 0.1, 0.4)),
            leave=random.choice((0.0, 0.0, 0.02)),
            think_ns=random.choice((100, 1_000, 5_000)) * MICROSECOND_NS,
            take_ns=random.choice((50, 50, 5_000)) * MICROSECOND_NS,
        )


class ClientStream:
    """One connection of a client; both ends of it.

    Attributes:
        waiting: what was asked on it and not answered, by cookie.
        number: the engine's for it.
    """

    def __init__(self, client: "Client", engine: SimulatedEngine) -> None:
        self.client = client
        self.engine = engine
        self.number = -1
        self.waiting: dict[int, Operation] = {}
        self.leaving = False
        self._agenda = client.agenda
        self._lengths: dict[int, int] = {}
        self._reader = ReplyReader(self._lengths)
        self._outbox = bytearray()
        self._delivered_bytes = 0
        self._asked_bytes = 0
        self._marks: deque[tuple[int, Operation]] = deque()
        self._receive: PendingOp | None = None
        self._send: PendingOp | None = None
        self._delivering = False
        self._end: int | None = None  # what follows the outbox: 0 or an errno
        self._gone = False

    # --- The client's end -------------------------------------------------------------------------

    def ask(self, operation: Operation) -> None:
        """Put a request on the wire."""
        flags = Flag.FUA if operation.durable else Flag.NONE
        payload = operation.content() if operation.kind is Kind.WRITE else b""
        length = 0 if operation.kind is Kind.FLUSH else operation.length
        offset = 0 if operation.kind is Kind.FLUSH else operation.offset
        request = Request(COMMANDS[operation.kind], flags, operation.number, offset, length, payload)
        self._lengths[operation.number] = length if operation.kind is Kind.READ else 0
        self.waiting[operation.number] = operation
        data = request.pack()
        self._outbox += data
        self._asked_bytes += len(data)
        self._marks.append((self._asked_bytes, operation))
        self._deliver()

    def leave(self) -> None:
        """Go away, politely or not."""
        self.leaving = True
        how = self._agenda.random.choice(("disconnect", "half close", "reset"))
        self._agenda.count(f"client {how}")
        if how == "disconnect":
            self._outbox += Request(Command.DISC, 0, 0, 0, 0).pack()
        elif how == "half close":
            self._end = 0
        else:
            self._gone = True
            self._end = errno.ECONNRESET
            self._outbox.clear()
            if self._send is not None:
                self._agenda.soon(self._take)
        self._deliver()

    # --- The engine's end -------------------------------------------------------------------------

    def begin(self, op: PendingOp) -> None:
        """The engine has submitted an operation."""
        if op.kind is OpKind.RECEIVE:
            self._receive = op
            self._deliver()
        else:
            self._send = op
            self._agenda.soon(self._take, self.client.workload.take_ns)

    def shut(self) -> None:
        """The engine has ended the stream."""
        self._gone = True
        if self._receive is not None:
            op, self._receive = self._receive, None
            self.engine.complete(op.number, 0)
        if self._send is not None:
            op, self._send = self._send, None
            self.engine.complete(op.number, -errno.EPIPE)

    def crash(self) -> None:
        """The engine is gone."""
        self._gone = True
        self._receive = self._send = None

    def _deliver(self) -> None:
        if self._receive is not None and not self._delivering and (self._outbox or self._end is not None):
            self._delivering = True
            self._agenda.soon(self._delivered, 30 * MICROSECOND_NS)

    def _delivered(self) -> None:
        self._delivering = False
        if self._receive is None:
            return
        op, self._receive = self._receive, None
        if not self._outbox:
            assert self._end is not None
            self.engine.complete(op.number, -self._end)
            return
        length = min(op.length, len(self._outbox))
        if self._agenda.chance(0.3):
            length = self._agenda.random.randrange(1, length + 1)
        data = bytes(self._outbox[:length])
        del self._outbox[:length]
        self._delivered_bytes += length
        self.engine.complete(op.number, length, data)
        while self._marks and self._marks[0][0] <= self._delivered_bytes:
            self.client.history.ask(self._marks.popleft()[1])

    def take_all(self) -> None:
        """Take at once what the engine is sending."""
        self._take(whole=True)

    @property
    def is_sending(self) -> bool:
        """Whether the engine has answers on their way."""
        return self._send is not None

    def _take(self, *, whole: bool = False) -> None:
        if self._send is None:
            return
        op, self._send = self._send, None
        if self._gone:
            self.engine.complete(op.number, -errno.EPIPE)
            return
        data = self.engine.data(op.number)
        if not whole and self._agenda.chance(0.2):
            data = data[: self._agenda.random.randrange(1, len(data) + 1)]
        self.engine.complete(op.number, len(data))
        for reply in self._reader.feed(data):
            self.client.replied(self, reply)

    def closed(self) -> None:
        """The engine has let go of it: what was not answered is settled, one way or the other."""
        for operation in self.waiting.values():
            self.client.history.settle(operation)
        self.waiting.clear()


class Client:
    """A client of one disk at a time; it comes back, to any, whenever it has left or was cut off.

    Args:
        answered: called with each request and its reply.
        more: whether another request is wanted; asking counts as having made it.
        think_ns: how long at most it waits before it asks again.
    """

    def __init__(
        self,
        agenda: Agenda,
        history: History,
        workload: Workload,
        *,
        answered: Callable[[Operation, Reply], None],
        more: Callable[[], bool],
        think_ns: Callable[[], int],
    ) -> None:
        self.agenda = agenda
        self.history = history
        self.workload = workload
        self.disk = 0
        self.stream: ClientStream | None = None
        self._answered = answered
        self._more = more
        self._think_ns = think_ns
        self._cells = 0

    def connected(self, stream: ClientStream, disk: int, size: int) -> None:
        """It has a connection to a disk of ``size`` bytes, and begins to ask."""
        self.stream = stream
        self.disk = disk
        self._cells = size // SECTOR * CELLS_PER_SECTOR
        self.fill()

    def replied(self, stream: ClientStream, reply: Reply) -> None:
        """An answer has come."""
        operation = stream.waiting.pop(reply.cookie, None)
        assert operation is not None, f"an answer to what was not asked: {reply.cookie}"
        self._answered(operation, reply)
        self.agenda.soon(self.fill, self._think_ns())

    def fill(self) -> None:
        """Ask, until as much is in flight as is wanted."""
        stream = self.stream
        while stream is not None and not stream.leaving and len(stream.waiting) < self.workload.depth:
            if not self._more():
                return
            stream.ask(self._next())
            if self.agenda.chance(self.workload.leave):
                stream.leave()
                self.stream = None

    def read_all(self) -> None:
        """Ask for every byte of the disk."""
        assert self.stream is not None
        self.stream.ask(self.history.new(Kind.READ, self.disk, 0, self._cells))

    def _next(self) -> Operation:
        random, workload = self.agenda.random, self.workload
        kind = random.choices(list(workload.weights), list(workload.weights.values()))[0]
        if kind is Kind.FLUSH:
            return self.history.new(kind, self.disk, 0, 0)
        hot = min(workload.hot_cells, self._cells)
        if self.agenda.chance(workload.long):
            first, count = random.randrange(self._cells), random.randrange(1, self._cells)
        else:
            first, count = random.randrange(hot), random.randrange(1, 16 * CELLS_PER_SECTOR)
        if not self.agenda.chance(workload.unaligned):
            first -= first % CELLS_PER_SECTOR
            count += -count % CELLS_PER_SECTOR
        last = min(first + count, self._cells)
        durable = kind is not Kind.READ and self.agenda.chance(workload.durable)
        return self.history.new(kind, self.disk, first, last, durable=durable)
