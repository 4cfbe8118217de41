"""A simulated domain server: the shipping engine, the far ends of all it has open, and what it remembers.

What it remembers for a manager that comes later is what ``proxy.domainserver.control`` does.
"""

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from proxy.engine import Event, EventKind, LegRole, OpKind, RequestKind, SimulatedEngine
from proxy.errors import NBD_ERROR_BY_ERRNO
from proxy.extentmap import ExtentMap, Range
from proxy.failover import MEDIUM_ERRORS, Evidence, EvidenceKind, Record
from proxy.model import LegState
from tests.sim.agenda import MILLISECOND_NS, Agenda
from tests.sim.clients import Client, ClientStream
from tests.sim.devices import Device, FileHandle, ServerStream
from tests.sim.history import Violation
from tests.sim.rig import new_descriptor

DEADLINE_NS = 200 * MILLISECOND_NS
TICK_NS = 60 * MILLISECOND_NS

_EVIDENCE = {
    EventKind.DEVICE_ERROR: EvidenceKind.ERROR,
    EventKind.DEVICE_LOST: EvidenceKind.LOST,
    EventKind.DEADLINE_MISSED: EvidenceKind.DEADLINE,
}


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk of the domain: its number, its size, and the bytes of the domain it is made of."""

    number: int
    size: int
    offset: int
    allotted: int


@dataclass(frozen=True, slots=True)
class Group:
    """A group of devices, and where each byte of the domain lies on them."""

    name: str
    devices: tuple[Device, ...]
    map: ExtentMap

    @property
    def is_remote(self) -> bool:
        """Whether a late write may land on it that no lock of ours would show."""
        return any(device.remote for device in self.devices)

    @property
    def is_quiet(self) -> bool:
        """Whether no write of the past can still land on it."""
        return all(device.is_quiet for device in self.devices)

    @property
    def is_up(self) -> bool:
        return all(device.is_up for device in self.devices)

    def content(self, offset: int, length: int, *, durable: bool = False) -> bytes:
        """What lies at these bytes of the domain, or what of it would survive a loss of power."""
        parts = []
        for piece in self.map.pieces(offset, length):
            medium = self.devices[piece.device].medium
            data = medium.durable if durable else medium.content
            parts.append(bytes(data[piece.device_offset : piece.device_offset + piece.length]))
        return b"".join(parts)

    def spoil(self) -> None:
        """Put other content in the place of the domain's: what is outdated must not be relied on."""
        for piece in self.map:
            data = b"\xdb" * piece.length
            self.devices[piece.device].medium.write(piece.device_offset, data, durable=True)


@dataclass(slots=True)
class LegNote:
    """What the server knows of a leg that is open in its engine."""

    group: Group
    fenced: bool = False
    copied: bool = False
    drained: bool = False
    unproven: int = 0
    against: Evidence | None = None
    in_map: bool = False  # some map has named it: it is in use
    overdue: bool = False  # a device should have been told of at the last look
    ends: dict[int, FileHandle | ServerStream] = field(default_factory=dict)


class Server:
    """One engine from its start to its end.

    Args:
        tell: called with each event a manager is to be told.
        record: what the store says now, for checks.
    """

    def __init__(
        self, agenda: Agenda, *, tell: Callable[[Event], None], record: Callable[[], Record]
    ) -> None:
        self.agenda = agenda
        self.engine = SimulatedEngine(
            nbd_errors=dict(NBD_ERROR_BY_ERRNO), deadline_ns=DEADLINE_NS, medium_errors=MEDIUM_ERRORS
        )
        self.engine.now_ns = agenda.now_ns
        self.legs: dict[int, LegNote] = {}
        self.held = True
        self.generation = 0
        self.streams: list[ClientStream] = []
        self._ends: dict[int, FileHandle | ServerStream | ClientStream] = {}
        self._legs_by_fd: dict[int, LegNote] = {}
        self._seen = 0
        self._erred: set[str] = set()  # groups whose legs met errors under this map, and were fenced
        self._hold_number = -1
        self._drained = False
        self._tell = tell
        self._record = record

    # --- Batches ----------------------------------------------------------------------------------

    def turn(self) -> None:
        """Run one batch of the engine."""
        engine = self.engine
        engine.now_ns = self.agenda.now_ns
        engine.step()
        for descriptor in engine.take_shut():
            self._ends[descriptor].shut()
        self.take_events()
        self.collect()

    @property
    def is_busy(self) -> bool:
        """Whether requests of clients are under way."""
        return any(stream.waiting for stream in self.streams)

    def collect(self) -> None:
        """Give what the engine wants done to whom it concerns."""
        for op in self.engine.pending(self._seen):
            self._seen = op.number
            note = self._legs_by_fd.get(op.fd)
            if note is not None and op.kind is not OpKind.RECEIVE:
                self._check_leg(note, op.number, op.kind)
            end = self._ends.get(op.fd)
            if end is None:
                raise Violation(f"a {op.kind.name} goes to a descriptor that was given back")
            end.begin(op)
            if op.kind is OpKind.SEND and isinstance(end, ClientStream) and self.agenda.chance(0.3):
                self._finish_late_reads()

    def _finish_late_reads(self) -> None:
        """An answer is on its way to a client: the worst moment for one that nobody waits for any more."""
        for note in self.legs.values():
            if note.fenced:
                for end in note.ends.values():
                    if isinstance(end, FileHandle):
                        end.finish_reads()

    def _check_leg(self, note: LegNote, number: int, kind: OpKind) -> None:
        name = note.group.name
        if note.fenced:
            raise Violation(f"a {kind.name} goes to group {name} after it was fenced")
        if self._drained:
            raise Violation(f"a {kind.name} goes to group {name} while the domain holds and nothing runs")
        record = self._record()
        if name not in record.attached():
            raise Violation(f"a {kind.name} goes to group {name}, which takes no part by the record")
        if kind is OpKind.READ:
            self.check_read(name)

    def check_read(self, name: str) -> None:
        """Raise Violation unless reads from this group are allowed."""
        record = self._record()
        if record.leg(name).state is not LegState.UPTODATE:
            raise Violation(f"a read goes to group {name}, which is {record.leg(name).state}")
        if name != record.active:
            # A backup stands in for the active leg only where that has answered with an error, or is compared with it.
            others = {
                note.group.name for leg_id, note in self.legs.items() if self._errors(leg_id)
            } | self._erred
            if not self._is_verifying() and not others - {name}:
                raise Violation(f"a read goes to group {name}; active is {record.active}")
            self.agenda.count("reads from a backup")

    def _errors(self, leg_id: int) -> int:
        return sum(device.errors for device in self.engine.device_statistics(leg_id))

    def take_events(self) -> None:
        """Take in what the engine has told, and pass it on."""
        for event in self.engine.events():
            note = self.legs.get(event.leg)
            if event.kind is EventKind.CONNECTION_CLOSED:
                (stream,) = [stream for stream in self.streams if stream.number == event.a]
                self.streams.remove(stream)
                self._forget(stream)
                stream.closed()
                if stream.client.stream is stream:
                    stream.client.stream = None
            elif note is not None and event.kind in _EVIDENCE:
                evidence = Evidence(_EVIDENCE[event.kind], note.group.devices[event.device].name, event.code)
                note.against = note.against or evidence
                note.overdue = False
                self.agenda.count(f"evidence: {evidence.kind.value}")
            elif note is not None and event.kind is EventKind.COPIED:
                note.copied = event.code == 0
            elif note is not None and event.kind is EventKind.LEG_DRAINED:
                note.drained, note.unproven = True, event.a
            elif note is not None and event.kind is EventKind.LEG_CLOSED:
                for end in note.ends.values():
                    self._forget(end)
                del self.legs[event.leg]
            elif event.kind is EventKind.VERIFIED:
                self._check_verified()
            elif event.kind is EventKind.DRAINED:
                self._drained = self.held and event.a == self._hold_number
            elif event.kind is EventKind.REPLAYED:
                self.agenda.count("replayed", event.a)
            self._tell(event)

    def _forget(self, end: FileHandle | ServerStream | ClientStream) -> None:
        for descriptor in [fd for fd, known in self._ends.items() if known is end]:
            del self._ends[descriptor]
            self._legs_by_fd.pop(descriptor, None)

    def check_patience(self) -> None:
        """Raise Violation when a device has not answered for too long at two looks, and nobody was told."""
        for note in self.legs.values():
            if note.fenced or note.against is not None:
                continue
            late = any(end.is_late(DEADLINE_NS + 2 * TICK_NS) for end in note.ends.values())
            if late and note.overdue:
                raise Violation(f"group {note.group.name} does not answer in time, and nobody is told")
            note.overdue = late

    # --- Commands of a manager --------------------------------------------------------------------

    def open_leg(self, leg_id: int, group: Group) -> None:
        """Open all devices of a group, which are up."""
        note = LegNote(group)
        specs = []
        for device in group.devices:
            descriptor = new_descriptor()
            end = (
                ServerStream(device, self.engine, lambda: self.check_read(group.name))
                if device.remote
                else FileHandle(device, self.engine)
            )
            note.ends[descriptor] = self._ends[descriptor] = end
            self._legs_by_fd[descriptor] = note
            specs.append(device.spec(descriptor))
        self.engine.add_leg(leg_id, specs)
        self.legs[leg_id] = note

    def hold(self) -> int:
        self.held, self._drained = True, False
        self._hold_number = self.engine.hold()
        return self._hold_number

    def flush(self) -> int:
        """Flush all legs for the control thread, also while the domain holds; the token."""
        self._drained = False
        return self.engine.submit(RequestKind.FLUSH)

    def release(self) -> None:
        self.held = self._drained = False
        self.engine.release()

    def fence(self, leg_id: int) -> None:
        self._set_fenced(leg_id)
        self.engine.fence_leg(leg_id)

    def _set_fenced(self, leg_id: int) -> None:
        self.collect()
        self.legs[leg_id].fenced = True
        if self._errors(leg_id):
            self._erred.add(self.legs[leg_id].group.name)
        for end in self.legs[leg_id].ends.values():
            end.is_fenced = True

    def close_leg(self, leg_id: int) -> None:
        if leg_id not in self.legs:
            return  # a manager before has seen to it
        self._set_fenced(leg_id)
        self.engine.close_leg(leg_id)

    def install(self, record: Record, legs: Sequence[int], disks: Sequence[Disk]) -> None:
        """Install the map of a record; ``legs`` are those open for its attached groups, in their order."""
        roles = []
        for leg_id, group in zip(legs, record.attached(), strict=True):
            if group == record.active:
                roles.append((leg_id, LegRole.ACTIVE))
            elif record.leg(group).state is LegState.SYNCING:
                roles.append((leg_id, LegRole.SYNCING))
            else:
                roles.append((leg_id, LegRole.BACKUP))
        self.engine.install(
            record.generation,
            roles,
            [
                (disk.number, disk.size, [disk_map(self.legs[leg_id].group, disk) for leg_id in legs])
                for disk in disks
            ],
        )
        self.generation = record.generation
        self._erred.clear()
        for leg_id in legs:
            note = self.legs[leg_id]
            if not note.in_map and not note.group.is_quiet:
                raise Violation(
                    f"group {note.group.name} is in use again, and an old write can still land on it"
                )
            note.in_map = True
        self._clear_evidence()

    def fail_parked(self) -> None:
        self.engine.fail_parked()
        self._clear_evidence()

    def _clear_evidence(self) -> None:
        for note in self.legs.values():
            if note.against is not None and note.against.kind is not EvidenceKind.LOST:
                note.against = None
                note.overdue = False

    def connect(self, client: Client) -> None:
        """Take in a client."""
        stream = ClientStream(client, self.engine)
        descriptor = new_descriptor()
        self._ends[descriptor] = stream
        stream.number = self.engine.add_connection(descriptor, client.disk, obeys_block_size=False)
        self.streams.append(stream)
        client.connected(stream)

    def verify(self, disks: Sequence[Disk], *, rate: int, repair: bool) -> None:
        """Compare the legs of all disks, if there is anything to compare."""
        record = self._record()
        backups = [
            leg for leg in record.legs if leg.group != record.active and leg.state is LegState.UPTODATE
        ]
        if not self.generation or not backups or self._is_verifying():
            return
        try:
            self.engine.verify([(disk.number, 0, disk.allotted) for disk in disks], rate=rate, repair=repair)
        except OSError:
            return  # the backups are on their way out of the map
        self.agenda.count("verifies")

    def _is_verifying(self) -> bool:
        report = self.engine.verify_report()
        return report is not None and report.running

    def _check_verified(self) -> None:
        report = self.engine.verify_report()
        assert report is not None and not report.running
        if report.mismatched:
            raise Violation(f"a verify of equal legs finds differences: {report}")
        self.agenda.count(f"verified: {errno.errorcode.get(report.error_number, 'whole')}")

    # --- The end ----------------------------------------------------------------------------------

    def crash(self) -> None:
        """End as by kill -9: what is in flight lands or does not; nothing is answered."""
        self.count()
        for end in self._ends.values():
            end.crash()
        for stream in self.streams:
            if stream.client.stream is stream:
                stream.client.stream = None
        self.dispose()

    def count(self) -> None:
        """Add this engine's counters to those of the simulation."""
        statistics = self.engine.statistics()
        for name in (
            "parked",
            "waited",
            "late",
            "writes",
            "reads",
            "flushes",
            "zeroes",
            "trims",
            "errors",
            "read_repairs",
        ):
            self.agenda.count(name, getattr(statistics, name))

    def dispose(self) -> None:
        """Let the engine free everything: all that is pending ends, none of it reaching anybody."""
        engine = self.engine
        engine.hold()
        for leg_id in self.legs:
            engine.close_leg(leg_id)
        for stream in self.streams:
            engine.end_connection(stream.number)
        for _ in range(1000):
            engine.step()
            engine.take_shut()
            engine.events()
            pending = engine.pending()
            if not pending:
                return
            for op in pending:
                engine.complete(op.number, 0 if op.kind is OpKind.RECEIVE else -5)
        raise AssertionError("the engine does not come to an end")


def disk_map(group: Group, disk: Disk) -> ExtentMap:
    """The extent map of a disk on a group."""
    return group.map.compose([Range(disk.offset, disk.allotted)])
