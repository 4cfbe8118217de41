"""Simulated devices: files and NBD servers that are slow, err, hang, tear, and answer when nobody waits.

A device does *jobs*. A job lands on the medium at one moment, or in two pieces at two, and is answered later;
both can be put off by a stall, after which it is as good as ever. A job may be killed before it lands. Until
it has landed or was killed a write is *unlanded*, which is what quarantine is about (``Device.is_quiet``).
"""

import errno
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum

from proxy.engine import DeviceKind, DeviceSpec, OpKind, PendingOp, SimulatedEngine
from tests.sim.agenda import MICROSECOND_NS, MILLISECOND_NS, Agenda
from tests.sim.medium import SECTOR, Medium, Snapshot
from tests.sim.wire import Command, Flag, Reply, Request, RequestReader

PUNCH_HOLE = 2
ZERO_RANGE = 16

#: How often what waits for a device looks again.
LOOK_NS = 50 * MILLISECOND_NS
#: How long after its connection is gone a server may still carry out a write: well below the quarantine.
LATE_NS = 250 * MILLISECOND_NS

GARBAGE = b"\xee" * (1 << 20)


@dataclass(frozen=True, slots=True)
class Faults:
    """How often what goes wrong with one operation of a device, in this simulation."""

    error: float = 0.0
    unreadable: float = 0.0  # a read that meets a bad block
    short: float = 0.0
    interrupted: float = 0.0
    torn: float = 0.0
    slow: float = 0.0
    garbled: float = 0.0  # a reply of a server that breaks the protocol
    fatal: float = 0.0  # a server's connections break over a write


class JobKind(Enum):
    """What a job does to the medium."""

    READ = "read"
    WRITE = "write"
    ZERO = "zero"
    FLUSH = "flush"


@dataclass(slots=True, eq=False)
class Job:
    """One thing to do; ``done(error, data)`` is called when it is answered, ``data()`` when it lands."""

    kind: JobKind
    offset: int
    length: int
    data: Callable[[], bytes]
    durable: bool
    done: Callable[[int, bytes], None]
    owner: "FileHandle | ServerStream"
    power: int = 0  # of the device when it began: a loss of power ends it
    began_ns: int = 0
    killed: bool = False
    stuck_ns: int = 0  # it does not go on before
    answered: bool = False
    read: bytearray = field(default_factory=bytearray)
    snapshot: Snapshot | None = None


class Device:
    """One device of a group, whoever has it open.

    Attributes:
        offset: where the domain's part of it begins.
    """

    def __init__(
        self,
        name: str,
        agenda: Agenda,
        faults: Faults,
        *,
        size: int,
        remote: bool,
        offset: int,
    ) -> None:
        random = agenda.random
        self.name = name
        self.agenda = agenda
        self.faults = faults
        self.remote = remote
        self.offset = offset
        self.medium = Medium(self.offset + size)
        self.block_size = random.choice((512, 512, 4096))
        self.transfer_max = random.choice((4096, 16384, 65536, 1 << 20))
        if agenda.chance(0.1):
            # It makes of a long request more operations than may be in flight.
            self.transfer_max = self.block_size
        self.can_flush = agenda.chance(0.9)
        self.can_fua = self.can_flush and agenda.chance(0.7)
        self.can_zero = agenda.chance(0.8)
        self.can_punch = self.can_zero and agenda.chance(0.7)
        self.can_zero_range = self.can_zero and agenda.chance(0.5)
        self.pace_ns = random.choice((30, 300, 3_000)) * MICROSECOND_NS
        self.streams: list[ServerStream] = []
        self.lock: object = None  # who has it open and locked
        self.size = self.offset + size
        host, _, path = name.partition("/")
        self.url = f"nbd://{host}/{path}" if remote else f"file:///{name}"
        self._power = 0
        self._awake_ns = 0
        self._up_ns = 0
        self._well_ns = 0
        self._unlanded: dict[Job, None] = {}

    # --- How it is --------------------------------------------------------------------------------

    @property
    def is_up(self) -> bool:
        """Whether it can be opened."""
        return self.agenda.now_ns >= max(self._up_ns, self._awake_ns)

    @property
    def is_stalled(self) -> bool:
        """Whether whoever wants to open it waits."""
        return self.agenda.now_ns < self._awake_ns

    @property
    def is_quiet(self) -> bool:
        """Whether no write of the past can still land on it."""
        return not self._unlanded

    @property
    def is_locked(self) -> bool:
        """Whether somebody has it locked; a lock outlives its process until its last write has landed."""
        lock = self.lock
        return lock is not None and not (
            isinstance(lock, FileHandle) and lock.is_closed and not self.has_unlanded(lock)
        )

    def has_unlanded(self, owner: object) -> bool:
        """Whether a write of this one can still land on it."""
        return any(job.owner is owner for job in self._unlanded)

    def stall(self, duration_ns: int) -> None:
        """Stop for a while as a stopped process does: nothing lands, nothing is answered."""
        self._end_orphans()
        self._awake_ns = max(self._awake_ns, self.agenda.now_ns + duration_ns)

    def go_down(self, duration_ns: int) -> None:
        """Be out of reach for a while: streams break, a file answers with errors."""
        self._end_orphans()
        self._up_ns = max(self._up_ns, self.agenda.now_ns + duration_ns)
        self.break_streams()

    def lose_power(self, duration_ns: int) -> None:
        """Lose what is not durable, or part of it, and all that is under way; be back after a while."""
        self.agenda.count("power losses")
        self._power += 1
        self.break_streams()
        self.kill_unlanded()
        self.medium.lose_power(lambda: self.agenda.chance(0.5))
        self._awake_ns = 0
        self._up_ns = self.agenda.now_ns + duration_ns

    def _end_orphans(self) -> None:
        """Have done with writes of connections that are gone.

        A server that is well enough to be connected to has done with them within the quarantine. That is
        what quarantine relies on, so no stall may come between.
        """
        for job in list(self._unlanded):
            if self.remote and job.owner.is_dead:
                if self.agenda.chance(0.5):
                    self._land_piece(job, 0, job.length)
                job.killed = True
                del self._unlanded[job]

    def sicken(self, duration_ns: int) -> None:
        """Have a bad medium for a while: it answers, and many a write with an error."""
        self._well_ns = max(self._well_ns, self.agenda.now_ns + duration_ns)

    def break_streams(self) -> None:
        """Lose all connections; what they had asked for goes on, or dies with the server."""
        kill = self.agenda.chance(0.2)
        for stream in self.streams[:]:
            stream.break_off(self.agenda.random.choice((0, errno.ECONNRESET)))
        if kill and self.remote:
            self.kill_unlanded()
        else:
            self.delay_unlanded()

    def kill_unlanded(self) -> None:
        """What has not landed never will."""
        for job in self._unlanded:
            job.killed = True
        self._unlanded.clear()

    def delay_unlanded(self, owner: object = None) -> None:
        """What has not landed (of this one) may do so much later, when nobody thinks of it any more."""
        for job in self._unlanded:
            if owner is None or job.owner is owner:
                self.delay(job)

    def delay(self, job: Job) -> None:
        """Have a job land later, perhaps."""
        if self.agenda.chance(0.7):
            job.stuck_ns = self.agenda.now_ns + self.agenda.random.randrange(LATE_NS)

    def recover(self) -> None:
        """Be well from now on."""
        self._up_ns = self._awake_ns = self._well_ns = 0
        self.faults = Faults()

    def spec(self, descriptor: int) -> DeviceSpec:
        """What the engine is told."""
        return DeviceSpec(
            fd=descriptor,
            kind=DeviceKind.NBD if self.remote else DeviceKind.FILE,
            block_size=self.block_size,
            transfer_max=self.transfer_max,
            in_memory=False,
            can_flush=self.can_flush,
            can_fua=self.can_fua,
            can_zero=self.can_zero,
        )

    # --- What it does -----------------------------------------------------------------------------

    def begin(self, job: Job) -> None:
        """Take on a job."""
        random = self.agenda.random
        job.began_ns = self.agenda.now_ns
        job.power = self._power
        if job.kind in (JobKind.WRITE, JobKind.ZERO):
            self._unlanded[job] = None
            if self.agenda.chance(self.faults.fatal):
                self.agenda.soon(self.break_streams, self.pace_ns)
        elif job.kind is JobKind.FLUSH:
            job.snapshot = self.medium.flush_begin()
        delay = random.randrange(self.pace_ns)
        if self.agenda.chance(self.faults.slow):
            delay += random.randrange(20 * MILLISECOND_NS)
        error = 0
        if self.agenda.now_ns < self._up_ns:
            error = random.choice((errno.EIO, errno.ENODEV, errno.ENXIO))
        elif self.agenda.now_ns < self._well_ns and job.kind is JobKind.WRITE and self.agenda.chance(0.3):
            error = errno.EIO
        elif job.kind is JobKind.READ and self.agenda.chance(self.faults.unreadable):
            error = random.choice((errno.EIO, errno.EILSEQ, errno.ENODATA))
        elif self.agenda.chance(self.faults.error):
            error = random.choice((errno.EIO, errno.EIO, errno.ENOSPC))
        pieces = [(0, job.length)]
        if job.length > SECTOR and (error or self.agenda.chance(self.faults.torn)):
            middle = random.randrange(1, job.length // SECTOR) * SECTOR
            pieces = [(0, middle), (middle, job.length)]
            random.shuffle(pieces)
            self.agenda.count("torn")
        if error:
            # What a failed write has done to the medium is anybody's guess.
            pieces = pieces[: random.randrange(len(pieces) + 1)]
            self.agenda.count("device errors")
        self.agenda.after(delay, lambda: self._land(job, pieces, error))

    def when_awake(self, action: Callable[[], None], not_before_ns: int = 0) -> bool:
        """Whether it can go on; if not, ``action`` is done when it can."""
        ready_ns = max(self._awake_ns, not_before_ns)
        if self.agenda.now_ns >= ready_ns:
            return True
        # Not at once when that is: it may recover before.
        self.agenda.after(min(ready_ns - self.agenda.now_ns + 1, LOOK_NS), action)
        return False

    def _land(self, job: Job, pieces: list[tuple[int, int]], error: int) -> None:
        if (
            job.killed
            or job.power != self._power
            or not self.when_awake(lambda: self._land(job, pieces, error), job.stuck_ns)
        ):
            return
        if pieces:
            self._land_piece(job, *pieces[0])
            if len(pieces) > 1:
                self.agenda.soon(lambda: self._land(job, pieces[1:], error), self.pace_ns)
                return
        if job.snapshot is not None and not error:
            self.medium.persist(job.snapshot)
        self._unlanded.pop(job, None)
        self.agenda.soon(lambda: self._answer(job, error), self.pace_ns)

    def _land_piece(self, job: Job, begin: int, end: int) -> None:
        durable = job.durable or not self.can_flush
        if job.kind is JobKind.WRITE:
            self.medium.write(job.offset + begin, job.data()[begin:end], durable=durable)
        elif job.kind is JobKind.ZERO:
            self.medium.write(job.offset + begin, bytes(end - begin), durable=durable)
        elif job.kind is JobKind.READ:
            if not job.read:
                job.read = bytearray(b"\xbb" * job.length)
            job.read[begin:end] = self.medium.read(job.offset + begin, end - begin)

    def _answer(self, job: Job, error: int) -> None:
        if (
            job.power == self._power
            and not job.killed
            and not job.answered
            and self.when_awake(lambda: self._answer(job, error))
        ):
            job.answered = True
            job.done(error, bytes(job.read))


def is_late(jobs: Iterable[Job], patience_ns: int, agenda: Agenda) -> bool:
    """Whether one of these, but a flush, was begun so long ago."""
    return any(job.kind is not JobKind.FLUSH and agenda.now_ns - job.began_ns > patience_ns for job in jobs)


class FileHandle:
    """A file device as one engine has it open.

    Attributes:
        is_fenced: whatever it reads from now on is of no meaning, and is made to show it.
        is_dead: the engine's process is gone.
        is_closed: the engine has closed it, or its process is gone.
    """

    def __init__(self, device: Device, engine: SimulatedEngine) -> None:
        self.device = device
        self.engine = engine
        self.is_fenced = False
        self.is_dead = False
        self.is_closed = False
        self._has_failed = False
        self._jobs: dict[int, Job] = {}

    def begin(self, op: PendingOp) -> None:
        """The engine has submitted an operation."""
        device, agenda = self.device, self.device.agenda
        if agenda.chance(device.faults.interrupted):
            result = -agenda.random.choice((errno.EINTR, errno.EAGAIN))
            agenda.count("interrupted")
            self._later(op, result)
            return
        length = op.length
        if op.kind in (OpKind.READ, OpKind.WRITE) and agenda.chance(device.faults.short):
            length = agenda.random.randrange(op.length // device.block_size) * device.block_size or length
            agenda.count("short")
        if op.kind is OpKind.ALLOCATE and not (
            device.can_punch if op.flags & PUNCH_HOLE else device.can_zero_range
        ):
            self._later(op, -errno.EOPNOTSUPP)
            return
        kind = {
            OpKind.READ: JobKind.READ,
            OpKind.WRITE: JobKind.WRITE,
            OpKind.ALLOCATE: JobKind.ZERO,
            OpKind.SYNC: JobKind.FLUSH,
        }[op.kind]

        def data() -> bytes:
            # The kernel reads the engine's memory when it comes to it, not when it is asked to.
            return self.engine.data(op.number)

        def done(error: int, data: bytes) -> None:
            del self._jobs[op.number]
            result = length if kind in (JobKind.READ, JobKind.WRITE) else 0
            self._has_failed = bool(error) or length < op.length
            if self.is_fenced:
                data = GARBAGE[: len(data)]
            self.engine.complete(op.number, -error if error else result, data)

        durable = kind is JobKind.WRITE and op.flags != 0
        job = Job(kind, op.offset, length if kind is not JobKind.FLUSH else 0, data, durable, done, self)
        self._jobs[op.number] = job
        device.begin(job)

    @property
    def is_idle(self) -> bool:
        """Whether the engine has nothing under way here, and the last it had was done whole."""
        return not self._jobs and not self._has_failed

    def _later(self, op: PendingOp, result: int) -> None:
        job = Job(JobKind.FLUSH, 0, 0, bytes, False, lambda error, data: None, self)
        job.began_ns = self.device.agenda.now_ns
        self._jobs[op.number] = job

        def answer() -> None:
            if not job.killed:
                del self._jobs[op.number]
                self._has_failed = True
                self.engine.complete(op.number, result)

        self.device.agenda.soon(answer)

    def finish_reads(self) -> None:
        """Answer every read at once, whatever the device is at."""
        for job in list(self._jobs.values()):
            if job.kind is JobKind.READ and not job.answered:
                job.answered = True
                job.done(0, bytes(job.length))

    def is_late(self, patience_ns: int) -> bool:
        """Whether something but a flush has not been answered for so long."""
        return is_late(self._jobs.values(), patience_ns, self.device.agenda)

    def shut(self) -> None:
        raise AssertionError("a file is no stream")

    def crash(self) -> None:
        """The engine's process is gone. The kernel has taken its memory along: what may still land has it."""
        self.is_dead = self.is_closed = True
        kill = self.device.agenda.chance(0.5)
        for number, job in self._jobs.items():
            if job.kind is JobKind.WRITE:
                kept = self.engine.data(number)
                job.data = lambda kept=kept: kept  # type: ignore[misc]
            job.done = lambda error, data: None
            if kill or job.kind not in (JobKind.WRITE, JobKind.ZERO):
                job.killed = True
                self.device._unlanded.pop(job, None)
            else:
                self.device.delay(job)
                self.device.agenda.count("late after a crash")


class ServerStream:
    """A connection of an engine to a device that is an NBD server; both ends of it.

    Args:
        asked: called with each command that the engine sends, and its offset.

    Attributes:
        is_fenced: whatever it reads from now on is of no meaning, and is made to show it.
    """

    def __init__(self, device: Device, engine: SimulatedEngine, asked: Callable[[int, int], None]) -> None:
        self.device = device
        self.engine = engine
        self.is_fenced = False
        self._asked = asked
        self._sent = RequestReader()
        self._sent_bytes = 0
        self._accepted_bytes = 0
        self._agenda = device.agenda
        self._reader = RequestReader()
        self._outbox = bytearray()
        self._receive: PendingOp | None = None
        self._receiving = False
        self._send: PendingOp | None = None
        self._broken: int | None = None
        self._alive = True
        self._jobs: dict[Job, None] = {}
        device.streams.append(self)

    # --- The engine's end -------------------------------------------------------------------------

    def begin(self, op: PendingOp) -> None:
        """The engine has submitted an operation."""
        if op.kind is OpKind.RECEIVE:
            self._receive = op
            self._deliver()
        else:
            self._send = op
            data = self.engine.data(op.number)
            for request in self._sent.feed(data[self._sent_bytes - self._accepted_bytes :]):
                self._asked(request.command, request.offset)
            self._sent_bytes = self._accepted_bytes + len(data)
            self._agenda.soon(self._accept, self.device.pace_ns)

    def is_late(self, patience_ns: int) -> bool:
        """Whether something but a flush has not been answered for so long."""
        return is_late(self._jobs, patience_ns, self._agenda)

    @property
    def is_dead(self) -> bool:
        """Whether the connection is gone."""
        return not self._alive

    def shut(self) -> None:
        """The engine has cut the stream. Part of what it was sending may be on its way already."""
        if self._alive:
            self._take_part_of_send()
            self._end()
            self.device.delay_unlanded(self)
        self._fail_pending(0)

    def crash(self) -> None:
        """The engine's process is gone, and its kernel ends the stream."""
        if self._alive:
            self._take_part_of_send()
            self._end()
            self.device.delay_unlanded(self)
        self._send = self._receive = None

    def break_off(self, error: int) -> None:
        """The connection is lost; ``error`` is what the engine sees, 0 for an orderly end."""
        self._take_part_of_send()
        self._end()
        self._agenda.count("lost connections")
        self._fail_pending(error)

    def _end(self) -> None:
        self._alive = False
        self.device.streams.remove(self)

    def _fail_pending(self, error: int) -> None:
        self._broken = error
        if self._send is not None:
            self.engine.complete(self._send.number, -errno.EPIPE)
            self._send = None
        if self._receive is not None:
            self.engine.complete(self._receive.number, -error)
            self._receive = None

    def _take_part_of_send(self) -> None:
        if self._send is not None and self.device.is_up:
            data = self.engine.data(self._send.number)
            self._read(data[: self._agenda.random.randrange(len(data) + 1)])

    def _accept(self) -> None:
        """Take what the engine sends, or part of it."""
        if self._send is None:
            return
        if self._broken is not None:
            self._fail_pending(self._broken)
            return
        if not self.device.when_awake(self._accept):
            return
        op, self._send = self._send, None
        data = self.engine.data(op.number)
        if self._agenda.chance(0.4):
            data = data[: self._agenda.random.randrange(1, len(data) + 1)]
        self.engine.complete(op.number, len(data))
        self._accepted_bytes += len(data)
        self._read(data)

    def _deliver(self) -> None:
        """Complete the engine's receive, if there is anything for it."""
        if self._receive is None or self._receiving:
            return
        if self._broken is not None:
            self._fail_pending(self._broken)
        elif self._outbox:
            self._receiving = True
            self._agenda.soon(self._delivered, self.device.pace_ns)

    def _delivered(self) -> None:
        self._receiving = False
        if self._receive is None or self._broken is not None:
            self._deliver()
            return
        op, self._receive = self._receive, None
        length = min(len(self._outbox), op.length)
        if self._agenda.chance(0.3):
            length = self._agenda.random.randrange(1, length + 1)
        data = bytes(self._outbox[:length])
        del self._outbox[:length]
        self.engine.complete(op.number, length, data)

    # --- The server's end -------------------------------------------------------------------------

    def _read(self, data: bytes) -> None:
        for request in self._reader.feed(data):
            self._take(request)

    def _take(self, request: Request) -> None:
        kind = {
            Command.READ: JobKind.READ,
            Command.WRITE: JobKind.WRITE,
            Command.ZERO: JobKind.ZERO,
            Command.FLUSH: JobKind.FLUSH,
        }[Command(request.command)]

        def done(error: int, data: bytes) -> None:
            self._jobs.pop(job, None)
            if self._alive:
                if self._agenda.chance(self.device.faults.garbled):
                    self._garble(request)
                    return
                if self.is_fenced:
                    data = GARBAGE[: len(data)]
                self._outbox += Reply(error, request.cookie, b"" if error else data).pack()
                self._deliver()

        durable = bool(request.flags & Flag.FUA)
        job = Job(kind, request.offset, request.length, lambda: request.payload, durable, done, self)
        if kind is JobKind.ZERO and not self.device.can_punch:
            done(errno.EOPNOTSUPP, b"")
            return
        self._jobs[job] = None
        self.device.begin(job)

    def _garble(self, request: Request) -> None:
        """Break the protocol."""
        self._agenda.count("garbled")
        self._outbox += self._agenda.random.choice(
            (
                Reply(0, request.cookie ^ (1 << 40)).pack(),
                Reply(0, request.cookie).pack()[:8] + bytes(8),
                bytes(16),
            )
        )
        self._deliver()


DeviceEnd = FileHandle | ServerStream
