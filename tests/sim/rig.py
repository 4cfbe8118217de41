"""A bench for tests of the engine: sockets move by themselves, devices only when the test says so.

``Rig.pump`` runs the engine and carries bytes between it and its clients and remote servers until only
devices are left to act. A test then lands, fails, delays or reorders the operations of devices one by one,
or has all of them done with ``run``. There is no time but ``pass_time``.
"""

import errno
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from uuid import UUID

from proxy.dirtymap import DirtyMap, LegContent, plane_size, renewed
from proxy.engine import (
    DeviceKind,
    DeviceSpec,
    Event,
    EventKind,
    LegRole,
    OpKind,
    PendingOp,
    SimulatedEngine,
    Tracking,
)
from proxy.errors import NBD_ERROR_BY_ERRNO
from proxy.extentmap import ExtentMap, Range, Run
from proxy.failover import MEDIUM_ERRORS
from tests.sim.medium import Medium
from tests.sim.wire import Command, Flag, Reply, ReplyReader, Request, RequestReader

#: Where a domain's space begins on every device, so that a device offset is never a disk offset by chance.
DEVICE_BASE = 8192

DEADLINE_NS = 1_000_000_000


def new_engine(probe_ns: int = 0) -> SimulatedEngine:
    """An engine with the real tables of errors and a deadline of ``DEADLINE_NS``; by default it does not probe."""
    return SimulatedEngine(
        nbd_errors=dict(NBD_ERROR_BY_ERRNO),
        deadline_ns=DEADLINE_NS,
        medium_errors=MEDIUM_ERRORS,
        probe_ns=probe_ns,
    )


def new_descriptor() -> int:
    """A real descriptor for the engine to own and close; what is behind it is never used."""
    return os.memfd_create("sim")


def is_open(descriptor: int) -> bool:
    """Whether this process has such a descriptor."""
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


class Stream:
    """The far end of a stream socket of the engine.

    Attributes:
        outbox: bytes on their way to the engine.
        accepts: how many more bytes the socket takes from the engine; None: any number.
        receive_max: bytes that one receive of the engine brings at most.
        ended: nothing follows the outbox (an orderly end), or an errno (a broken stream).
        shut: the engine has ended the stream.
        reading_shut: the engine has ended only its own reading.
    """

    def __init__(self, descriptor: int) -> None:
        self.fd = descriptor
        self.outbox = bytearray()
        self.accepts: int | None = None
        self.receive_max = 1 << 30
        self.ended: int | None = None
        self.shut = False
        self.reading_shut = False

    def take(self, data: bytes) -> None:
        """Bytes from the engine."""
        raise NotImplementedError

    def move(self, engine: SimulatedEngine, op: PendingOp) -> bool:
        """Complete ``op`` if that is possible now."""
        return self._receive(engine, op) if op.kind is OpKind.RECEIVE else self._send(engine, op)

    def _receive(self, engine: SimulatedEngine, op: PendingOp) -> bool:
        if self.shut or self.reading_shut:
            engine.complete(op.number, 0)
        elif self.outbox:
            data = bytes(self.outbox[: min(op.length, self.receive_max)])
            del self.outbox[: len(data)]
            engine.complete(op.number, len(data), data)
        elif self.ended is not None:
            engine.complete(op.number, -self.ended)
        else:
            return False
        return True

    def _send(self, engine: SimulatedEngine, op: PendingOp) -> bool:
        if self.shut or self.ended:
            engine.complete(op.number, -errno.EPIPE)
            return True
        data = engine.data(op.number)[: self.accepts]
        if not data:
            return False
        if self.accepts is not None:
            self.accepts -= len(data)
        engine.complete(op.number, len(data))
        self.take(data)
        return True


class Client(Stream):
    """An NBD client in the transmission phase."""

    def __init__(self, rig: "Rig", descriptor: int) -> None:
        super().__init__(descriptor)
        self.rig = rig
        self.number = -1
        self.closed: Event | None = None
        self.replies: dict[int, Reply] = {}
        self.order: list[int] = []
        self._lengths: dict[int, int] = {}
        self._reader = ReplyReader(self._lengths)

    def take(self, data: bytes) -> None:
        for reply in self._reader.feed(data):
            assert reply.cookie in self._lengths, "a reply to what was not asked"
            assert reply.cookie not in self.replies, "two replies to one request"
            self.replies[reply.cookie] = reply
            self.order.append(reply.cookie)

    def ask(
        self, command: int, offset: int = 0, length: int = 0, payload: bytes = b"", flags: int = Flag.NONE
    ) -> int:
        """Put a request on the wire; its cookie."""
        cookie = self.rig.next_cookie()
        self._lengths[cookie] = length if command == Command.READ else 0
        self.outbox += Request(command, flags, cookie, offset, length, payload).pack()
        return cookie

    def read(self, offset: int, length: int) -> int:
        return self.ask(Command.READ, offset, length)

    def write(self, offset: int, data: bytes, flags: int = Flag.NONE) -> int:
        return self.ask(Command.WRITE, offset, len(data), data, flags)

    def zero(self, offset: int, length: int, flags: int = Flag.NONE) -> int:
        return self.ask(Command.ZERO, offset, length, flags=flags)

    def trim(self, offset: int, length: int, flags: int = Flag.NONE) -> int:
        return self.ask(Command.TRIM, offset, length, flags=flags)

    def flush(self) -> int:
        return self.ask(Command.FLUSH)

    def error(self, cookie: int) -> int | None:
        """The error of a reply, 0 for success; None while there is no reply."""
        reply = self.replies.get(cookie)
        return None if reply is None else reply.error


@dataclass(slots=True)
class FileDevice:
    """A device that is a file: its operations are the engine's pending ones."""

    fd: int
    medium: Medium


class RemoteDevice(Stream):
    """A device that is an NBD server; ``commands`` are received and not answered yet, in order."""

    def __init__(self, descriptor: int, medium: Medium) -> None:
        super().__init__(descriptor)
        self.medium = medium
        self.commands: list[Request] = []
        self._reader = RequestReader()

    def take(self, data: bytes) -> None:
        self.commands += self._reader.feed(data)

    def answer(self, command: Request, error: int = 0) -> None:
        """Carry a command out, unless it fails, and put the reply on the wire."""
        self.commands.remove(command)
        payload = b""
        if not error:
            payload = self._carry_out(command)
        self.outbox += Reply(error, command.cookie, payload).pack()

    def _carry_out(self, command: Request) -> bytes:
        durable = bool(command.flags & Flag.FUA)
        match command.command:
            case Command.READ:
                return self.medium.read(command.offset, command.length)
            case Command.WRITE:
                self.medium.write(command.offset, command.payload, durable=durable)
            case Command.ZERO:
                self.medium.write(command.offset, bytes(command.length), durable=durable)
            case Command.FLUSH:
                self.medium.persist(self.medium.flush_begin())
            case _:
                raise AssertionError(f"command {command.command} from the engine")
        return b""


Device = FileDevice | RemoteDevice


@dataclass(slots=True)
class Leg:
    """A leg as the test sees it: its devices, and where each byte of the domain lies on them."""

    id: int
    devices: list[Device]
    map: ExtentMap

    def read(self, offset: int, length: int) -> bytes:
        """What lies on its devices, past the engine."""
        pieces = self.map.pieces(offset, length)
        return b"".join(self.devices[p.device].medium.read(p.device_offset, p.length) for p in pieces)

    def fill(self, data: bytes, offset: int = 0) -> None:
        """Put ``data`` on its devices, past the engine."""
        for piece in self.map.pieces(offset, len(data)):
            begin = piece.offset - offset
            part = data[begin : begin + piece.length]
            self.devices[piece.device].medium.write(piece.device_offset, part, durable=True)


@dataclass(slots=True)
class Rig:
    """One engine, its legs and its clients."""

    engine: SimulatedEngine = field(default_factory=new_engine)
    legs: dict[int, Leg] = field(default_factory=dict)
    streams: dict[int, Stream] = field(default_factory=dict)
    files: dict[int, FileDevice] = field(default_factory=dict)
    clients: list[Client] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    generation: int = 0
    bitmap: FileDevice | None = None
    _domain: DirtyMap | None = None
    _cookie: int = 0

    # --- Setting up -------------------------------------------------------------------------------

    def add_leg(
        self,
        leg_id: int,
        lengths: Sequence[int] = (65536,),
        *,
        remote: bool = False,
        chunk: int = 0,
        block_size: int = 512,
        transfer_max: int = 1 << 20,
        can_flush: bool = True,
        can_fua: bool = True,
        can_zero: bool = True,
    ) -> Leg:
        """A leg of one device for each of ``lengths``, linear, or striped when there is a ``chunk``."""
        devices: list[Device] = []
        for length in lengths:
            medium = Medium(DEVICE_BASE + length)
            descriptor = new_descriptor()
            if remote:
                server = RemoteDevice(descriptor, medium)
                self.streams[descriptor] = server
                devices.append(server)
            else:
                file = FileDevice(descriptor, medium)
                self.files[descriptor] = file
                devices.append(file)
        kind = DeviceKind.NBD if remote else DeviceKind.FILE
        specs = [
            DeviceSpec(device.fd, kind, block_size, transfer_max, False, can_flush, can_fua, can_zero)
            for device in devices
        ]
        runs = [Run(index, DEVICE_BASE, length) for index, length in enumerate(lengths)]
        extents = ExtentMap.striped(runs, len(runs), chunk) if chunk else ExtentMap.linear(runs)
        self.engine.add_leg(leg_id, specs)
        self.legs[leg_id] = Leg(leg_id, devices, extents)
        return self.legs[leg_id]

    def install(
        self,
        *legs: int | tuple[int, LegRole],
        size: int | None = None,
        disks: Sequence[tuple[int, Range]] | None = None,
        away: Sequence[int] = (),
        backlog: int = 0,
    ) -> int:
        """Install a map of these legs, the first one active; the generation.

        One disk, number 0, of ``size`` bytes (by default all of the first leg), unless ``disks`` says
        which disk has which range of the domain. With a bitmap, the leg of id ``n`` has plane ``n``, and
        ``away`` are those that take no part. ``backlog``: as the engine's.
        """
        self.generation += 1
        roles = [
            leg if isinstance(leg, tuple) else (leg, LegRole.BACKUP if place else LegRole.ACTIVE)
            for place, leg in enumerate(legs)
        ]
        tables = [self.legs[leg_id].map for leg_id, _ in roles]
        if disks is None:
            length = tables[0].size if size is None else size
            rows = [(0, length, tables)]
        else:
            rows = [
                (number, space.length, [table.compose([space]) for table in tables])
                for number, space in disks
            ]
        tracking = None
        if self.bitmap is not None:
            spaces = (
                [Range(0, rows[0][1] + -rows[0][1] % 4096)] if disks is None else [one for _, one in disks]
            )
            places = [ExtentMap.linear([Run(0, space.offset, space.length)]) for space in spaces]
            tracking = Tracking([leg_id for leg_id, _ in roles], away, places)
        self.engine.install(self.generation, roles, rows, tracking=tracking, backlog=backlog)
        return self.generation

    def open_bitmap(self, size: int, content: DirtyMap | None = None) -> None:
        """Give the engine the bitmap of a domain of this size; the leg of id ``n`` has plane ``n``.

        ``content`` is what its file begins with: by default regions of 64 KiB, and nothing marked.
        """
        if content is None:
            legs = [LegContent(UUID(int=number), True) for number in (1, 2, 3, 4)]
            fresh = renewed(None, UUID(int=7), size, 1, legs, clean=True)
            content = replace(
                fresh, region_shift=16, planes=(bytes(plane_size(size, 16)),) * len(fresh.planes)
            )
        self._domain = fresh = content
        data = fresh.encode()
        medium = Medium(len(data))
        medium.write(0, data, durable=True)
        descriptor = new_descriptor()
        self.bitmap = self.files[descriptor] = FileDevice(descriptor, medium)
        self.engine.open_bitmap(
            descriptor,
            shift=fresh.region_shift,
            regions=fresh.regions,
            identity=fresh.identity,
            planes=fresh.planes,
        )

    def bitmap_ops(self) -> list[PendingOp]:
        """Pending operations of the bitmap's file."""
        assert self.bitmap is not None
        return [op for op in self.engine.pending() if op.fd == self.bitmap.fd]

    def marked(self, plane: int) -> set[int]:
        """The regions that are durably marked in a plane."""
        assert self.bitmap is not None and self._domain is not None
        found = DirtyMap.decode(
            bytes(self.bitmap.medium.durable), domain=self._domain.domain, size=self._domain.size
        )
        bits = int.from_bytes(found.planes[plane], "little")
        return {number for number in range(found.regions) if bits >> number & 1}

    def start(self, *legs: int | tuple[int, LegRole], size: int | None = None) -> Client:
        """Install the first map, release, and connect a client."""
        self.install(*legs, size=size)
        self.engine.release()
        return self.connect()

    def connect(self, disk: int = 0, *, obeys_block_size: bool = False, leftover: bytes = b"") -> Client:
        """A client of a disk."""
        client = Client(self, new_descriptor())
        self.streams[client.fd] = client
        self.clients.append(client)
        client.number = self.engine.add_connection(
            client.fd, disk, obeys_block_size=obeys_block_size, leftover=leftover
        )
        return client

    def end(self, client: Client) -> None:
        """Have the engine read no more from a client."""
        self.engine.end_connection(client.number)
        assert self.engine.take_shut() == [client.fd]
        client.reading_shut = True

    def next_cookie(self) -> int:
        self._cookie += 1
        return self._cookie

    # --- Running ----------------------------------------------------------------------------------

    def pump(self) -> None:
        """Run until only devices, and sockets that take nothing, are left to act."""
        while True:
            self.engine.step()
            for descriptor in self.engine.take_shut():
                self.streams[descriptor].shut = True
            self._take_events()
            moved = False
            for op in self.engine.pending():
                stream = self.streams.get(op.fd)
                if stream is not None and stream.move(self.engine, op):
                    moved = True
            if not moved:
                return

    def run(self) -> None:
        """Run with every operation of a device carried out in order, until nothing is left."""
        while True:
            self.pump()
            ops = self.file_ops()
            commands = [
                (server, command)
                for server in self.streams.values()
                if isinstance(server, RemoteDevice) and not server.shut
                for command in server.commands
            ]
            if not ops and not commands:
                return
            for op in ops:
                self.carry_out(op)
            for server, command in commands:
                server.answer(command)

    def run_leg(self, leg: int) -> None:
        """Run with only this leg's files acting, until nothing is left for them to do."""
        self.pump()
        while self.file_ops(leg):
            self.carry_out_all(leg)

    def pass_time(self, seconds: float) -> None:
        """Let the clock go on, and the engine look at it often enough not to think that it was stopped itself."""
        end_ns = self.engine.now_ns + int(seconds * 1e9)
        pace_ns = max(DEADLINE_NS // 8, int(seconds * 1e9) // 100)
        while self.engine.now_ns < end_ns:
            self.engine.now_ns = min(self.engine.now_ns + pace_ns, end_ns)
            self.pump()

    def _take_events(self) -> None:
        for event in self.engine.events():
            self.events.append(event)
            if event.kind is EventKind.CONNECTION_CLOSED:
                (client,) = [c for c in self.clients if c.number == event.a and c.closed is None]
                client.closed = event
                del self.streams[client.fd]
            elif event.kind is EventKind.LEG_CLOSED:
                for device in self.legs[event.leg].devices:
                    self.streams.pop(device.fd, None)
                    self.files.pop(device.fd, None)

    def take_events(self, *kinds: EventKind) -> list[Event]:
        """Events of these kinds so far (of any, when none is named); they are not seen again."""
        self._take_events()
        taken = [event for event in self.events if not kinds or event.kind in kinds]
        self.events = [event for event in self.events if event not in taken]
        return taken

    # --- Devices ----------------------------------------------------------------------------------

    def file_ops(
        self, leg: int | None = None, device: int | None = None, kind: OpKind | None = None
    ) -> list[PendingOp]:
        """Pending operations of devices that are files, in order of submission."""
        wanted = None
        if leg is not None:
            devices = self.legs[leg].devices
            wanted = {d.fd for d in (devices if device is None else [devices[device]])}
        return [
            op
            for op in self.engine.pending()
            if op.fd in self.files
            and (wanted is None or op.fd in wanted)
            and (kind is None or op.kind is kind)
        ]

    def op(self, leg: int, device: int = 0, kind: OpKind | None = None) -> PendingOp:
        """The one operation that is pending there."""
        (op,) = self.file_ops(leg, device, kind)
        return op

    def carry_out(self, op: PendingOp, length: int | None = None) -> None:
        """Do what the operation says, or the first ``length`` bytes of it, and complete it."""
        medium = self.files[op.fd].medium
        length = op.length if length is None else length
        data = b""
        result = length
        match op.kind:
            case OpKind.READ:
                data = medium.read(op.offset, length)
            case OpKind.WRITE:
                # RWF_DSYNC is the only flag of a write.
                medium.write(op.offset, self.engine.data(op.number)[:length], durable=op.flags != 0)
            case OpKind.ALLOCATE:
                medium.write(op.offset, bytes(length))
                result = 0
            case OpKind.SYNC:
                medium.persist(medium.flush_begin())
                result = 0
            case _:
                raise AssertionError(op)
        self.engine.complete(op.number, result, data)

    def carry_out_all(self, leg: int, device: int | None = None, kind: OpKind | None = None) -> None:
        """Carry out what is pending there now, and run the engine."""
        for op in self.file_ops(leg, device, kind):
            self.carry_out(op)
        self.pump()

    def fail(self, op: PendingOp, error_number: int = errno.EIO, data: bytes = b"") -> None:
        """Complete an operation with an error; ``data`` is what a failed read left in its buffer."""
        self.engine.complete(op.number, -error_number, data)

    def counts(self, *, of: Callable[[PendingOp], object] = lambda op: op.kind) -> Counter[object]:
        """How many operations of files are pending, by kind."""
        return Counter(of(op) for op in self.file_ops())


#: Of a length that no block is a multiple of, so that every block of a pattern is different.
_PATTERN = bytes((place * 11 + (place >> 8)) % 251 + 1 for place in range(65521))


def pattern(length: int, seed: int = 1) -> bytes:
    """Bytes that differ between seeds (below 100) and between places, and are never all zero."""
    begin = seed * 641
    return (_PATTERN[begin:] + _PATTERN * (length // len(_PATTERN) + 1))[:length]
