"""A simulated domain server's process: the server and the engine that ship, and the far ends of all they have open.

What runs is ``proxy.domainserver.control.Server`` with its commands and events, ``open_leg``, and the engine but
for its submission layer. Simulated are the process itself, which can be killed at any moment, its devices
(``devices``, ``opened``), its doors, through which clients come without negotiation, and the way to the manager
(``channel``). ``WatchedEngine`` sees every command on its way into the engine and checks what comes out of it.
"""

import errno
import os
import select
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import trio

from proxy.domainserver.control import Server
from proxy.domainserver.doors import Doors
from proxy.engine import (
    DeviceSpec,
    Event,
    EventKind,
    LegRole,
    OpKind,
    RequestKind,
    SimulatedEngine,
    Tracking,
)
from proxy.engine.types import PackedMap
from proxy.errors import NBD_ERROR_BY_ERRNO
from proxy.failover import MEDIUM_ERRORS, Record
from proxy.label import LABEL_SIZE
from proxy.model import LegState
from tests.sim.agenda import MILLISECOND_NS, Agenda
from tests.sim.bitmapdisk import BitmapDisk, OpenedBitmapDisk
from tests.sim.channel import End
from tests.sim.clients import Client, ClientStream
from tests.sim.clock import Clock
from tests.sim.devices import Device, FileHandle, ServerStream
from tests.sim.groups import Group
from tests.sim.history import Operation, Violation
from tests.sim.opened import OpenedDevice, reach
from tests.sim.rig import new_descriptor
from tests.sim.wire import Command

TICK_NS = 60 * MILLISECOND_NS

_EVIDENCE = {
    EventKind.DEVICE_ERROR: "error",
    EventKind.DEVICE_LOST: "lost",
    EventKind.DEADLINE_MISSED: "deadline",
    EventKind.LEG_BEHIND: "behind",
}

End_ = FileHandle | ServerStream | ClientStream


class Surroundings(Protocol):
    """What is around a domain server: the world."""

    agenda: Agenda
    clock: Clock
    bitmap_disk: BitmapDisk

    def record(self) -> Record:
        """What the store says now."""

    def device(self, url: str) -> tuple[Group, Device]:
        """The device of this URL."""

    def opening(self, group: Group) -> None:
        """A device of this group is about to be opened."""

    def held(self) -> None:
        """The engine is about to be held."""

    def failing(self, *, is_over: bool) -> None:
        """Clients are told errors, whatever they ask for, from now on; or no longer."""

    def rejected(self) -> None:
        """Clients are about to be told of errors that no leg can do without."""

    def installing(self, generation: int, groups: Sequence[Group]) -> None:
        """A map is about to be installed; these groups were in none of this engine's before."""

    def ended(self, server: "DomainServer", unanswered: list[Operation]) -> None:
        """The process is gone; what clients had asked it and not been told."""


@dataclass(slots=True)
class LegNote:
    """A leg that is open in the engine, with its ends by descriptor."""

    group: Group
    ends: dict[int, FileHandle | ServerStream] = field(default_factory=dict)
    fenced: bool = False
    mapped: bool = False
    lags: bool = False  # under this map
    caught_up: bool = True  # when the domain is drained
    told: bool = False  # something was said against it under this map
    overdue: bool = False  # a device should have been told of at the last look


class SimulatedDoors(Doors):
    """Doors without sockets: whoever comes in has negotiated already."""

    is_open = False

    async def serve_unix(
        self, path: Path, task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED
    ) -> None:
        """See ``Doors.serve_unix``."""
        self.is_open = True
        task_status.started()
        await trio.sleep_forever()

    def close(self) -> None:
        """See ``Doors.close``."""
        self.is_open = False


class WatchedEngine(SimulatedEngine):
    """The engine as its server has it; every command and every event is seen by the simulation first."""

    process: "DomainServer"

    @property
    def event_fd(self) -> int:
        """Readable a little after there is an event: a control thread does not always get its turn at once."""
        return self.process.told_fd

    def events(self) -> list[Event]:
        """See ``Engine.events``."""
        return self.process.observe(super().events())

    def add_leg(self, leg_id: int, devices: Sequence[DeviceSpec]) -> None:
        """See ``Engine.add_leg``."""
        super().add_leg(leg_id, devices)
        self.process.leg_added(leg_id, devices)

    def fence_leg(self, leg_id: int) -> None:
        """See ``Engine.fence_leg``."""
        self.process.leg_fenced(leg_id)
        super().fence_leg(leg_id)

    def close_leg(self, leg_id: int) -> None:
        """See ``Engine.close_leg``."""
        self.process.leg_fenced(leg_id)
        super().close_leg(leg_id)

    def install(
        self,
        generation: int,
        legs: Sequence[tuple[int, LegRole]],
        disks: Sequence[tuple[int, int, Sequence[PackedMap]]],
        *,
        tracking: Tracking | None = None,
        backlog: int = 0,
    ) -> None:
        """See ``Engine.install``."""
        self.process.check_install(generation, legs, lag=backlog > 0)
        super().install(generation, legs, disks, tracking=tracking, backlog=backlog)

    def hold(self, legs: Iterable[int] = ()) -> int:
        """See ``Engine.hold``."""
        legs = frozenset(legs)
        self.process.around.held()
        self.process.around.failing(is_over=True)
        self.process.is_drained = False
        self.process.hold_number = super().hold(legs)
        for leg_id, note in self.process._legs.items():
            note.caught_up = not note.lags or leg_id in legs
        return self.process.hold_number

    def release(self) -> None:
        """See ``Engine.release``."""
        self.process.is_drained = False
        super().release()

    def submit(self, kind: RequestKind, disk: int = 0, offset: int = 0, length: int = 0) -> int:
        """See ``Engine.submit``. A flush runs also while the domain holds."""
        self.process.is_drained = False
        token = super().submit(kind, disk, offset, length)
        if kind is RequestKind.FLUSH:
            self.process.flushes.add(token)
        return token

    def fail_clients(self) -> None:
        """See ``Engine.fail_clients``."""
        self.process.around.failing(is_over=False)
        super().fail_clients()

    def fail_parked(self) -> None:
        """See ``Engine.fail_parked``."""
        self.process.around.rejected()
        self.process.clear_evidence()
        super().fail_parked()

    def copy_leg(self, leg_id: int, ranges: Sequence[tuple[int, int, int]]) -> None:
        """See ``Engine.copy_leg``. In small steps, so that several are in flight on disks this small."""
        step = self.process.agenda.random.choice((8192, 32768, 1 << 20))
        super().copy_leg(
            leg_id,
            [
                (disk, place, min(step, offset + length - place))
                for disk, offset, length in ranges
                for place in range(offset, offset + length, step)
            ],
        )


class DomainServer:
    """One domain server's process, from its start to its end; what the manager has of it, too.

    Args:
        name, directory, deadline_ms, probe_ms: as on its command line.
        nursery: for its tasks.
    """

    def __init__(
        self,
        around: Surroundings,
        name: str,
        directory: Path,
        *,
        deadline_ms: int,
        probe_ms: int,
        nursery: trio.Nursery,
    ) -> None:
        self.around = around
        self.agenda = around.agenda
        self.engine = WatchedEngine(
            nbd_errors={number: int(value) for number, value in NBD_ERROR_BY_ERRNO.items()},
            deadline_ns=deadline_ms * MILLISECOND_NS,
            medium_errors=MEDIUM_ERRORS,
            probe_ns=probe_ms * MILLISECOND_NS,
        )
        self.engine.process = self
        self.engine.now_ns = self.agenda.now_ns
        # In some simulations often enough for marks to be cleared while clients still write.
        self.engine.round_every_ns = self.agenda.random.choice((40, 120, 4000)) * MILLISECOND_NS
        self.told_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.doors = SimulatedDoors(self.engine, name)
        self.server = Server(
            name,
            directory,
            engine=self.engine,
            doors=self.doors,
            open_device=self._open_device,
            disk=OpenedBitmapDisk(around.bitmap_disk, self._take_bitmap),
        )
        self.is_up = False  # it can be connected to
        self.is_dying = False
        self._is_running = False
        self.has_map = False
        self.hold_number = -1
        self.is_drained = False  # the domain holds, and has said that nothing runs
        self.flushes: set[int] = set()  # of the server's own, under way
        self._erred: set[str] = set()  # groups whose legs met errors under this map, and were fenced
        self._deadline_ns = deadline_ms * MILLISECOND_NS
        self._bitmap: FileHandle | None = None
        self._is_stopped = False  # its engine takes no turn any more
        self.gone = trio.Event()
        self.streams: list[ClientStream] = []
        self.channels: list[End] = []
        self._legs: dict[int, LegNote] = {}
        self._ends: dict[int, End_] = {}
        self._notes_by_fd: dict[int, LegNote] = {}
        self._is_told = False
        self._poll = select.poll()
        self._poll.register(SimulatedEngine.event_fd.__get__(self.engine), select.POLLIN)
        self._seen = 0
        self._nursery = nursery
        self._scope = trio.CancelScope()
        self.agenda.soon(self._come_up, 30 * MILLISECOND_NS)

    # --- Life -------------------------------------------------------------------------------------

    def _come_up(self) -> None:
        if not self.is_dying:
            self._is_running = True
            self._nursery.start_soon(self._run)

    async def _run(self) -> None:
        with self._scope:
            async with trio.open_nursery() as nursery:
                self._tasks = nursery
                nursery.start_soon(self.server.watch_engine, nursery)
                self.is_up = True
                await self.server.stopped.wait()
                self.kill()
        self._is_running = False

    def connect(self, end: End) -> None:
        """A manager connects."""
        self.channels.append(end)
        self._tasks.start_soon(self.server.serve_manager, end)

    def contact(self) -> None:
        """Nothing; a domain server dies when it is killed, and its tasks with it."""

    def kill(self, *, at_once: bool = False) -> None:
        """End it as by kill -9. It is gone when its tasks have ended, which takes no time.

        Args:
            at_once: its engine does not even take another turn.
        """
        self._is_stopped = self._is_stopped or at_once
        if not self.is_dying:
            self.is_dying = True
            self.is_up = False
            self._scope.cancel()
            self.agenda.after(1, self._end)

    def _end(self) -> None:
        """What is in flight lands or does not; nothing is answered."""
        if self._is_running:
            self.agenda.soon(self._end)  # its tasks have not seen yet that they are cancelled
            return
        self.turn()
        self._is_stopped = True
        self.count()
        for end in self._ends.values():
            end.crash()
        unanswered = []
        for stream in self.streams:
            unanswered += list(stream.waiting.values())
            if stream.client.stream is stream:
                stream.client.stream = None
        for channel in self.channels:
            channel.close()
        self._dispose()
        self.gone.set()
        self.around.ended(self, unanswered)

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

    def _dispose(self) -> None:
        """Let the engine free everything: all that is pending ends, none of it reaching anybody."""
        engine = self.engine
        SimulatedEngine.hold(engine)
        for leg_id in self._legs:
            SimulatedEngine.close_leg(engine, leg_id)
        for stream in self.streams:
            engine.end_connection(stream.number)
        os.close(self.told_fd)
        for _ in range(1000):
            engine.step()
            engine.take_shut()
            SimulatedEngine.events(engine)
            pending = engine.pending()
            if not pending:
                return
            for op in pending:
                engine.complete(op.number, 0 if op.kind is OpKind.RECEIVE else -5)
        raise AssertionError("the engine does not come to an end")

    # --- Batches ----------------------------------------------------------------------------------

    def turn(self) -> None:
        """Run one batch of the engine."""
        if self._is_stopped:
            return
        engine = self.engine
        engine.now_ns = self.agenda.now_ns
        engine.step()
        for descriptor in engine.take_shut():
            self._ends[descriptor].shut()
        self._tell()
        self._collect()

    @property
    def is_busy(self) -> bool:
        """Whether requests of clients are under way."""
        return any(stream.waiting for stream in self.streams)

    @property
    def is_serving(self) -> bool:
        """Whether requests of clients are under way, and not held."""
        return self.is_up and self.is_busy and not self.engine.statistics().held

    @property
    def is_idle(self) -> bool:
        """Whether it is up, and nothing runs in its engine."""
        statistics = self.engine.statistics()
        return self.is_up and not (statistics.running or statistics.backlog or statistics.behind)

    def _collect(self) -> None:
        """Give what the engine wants done to whom it concerns."""
        for op in self.engine.pending(self._seen):
            self._seen = op.number
            note = self._notes_by_fd.get(op.fd)
            if note is not None and op.kind is not OpKind.RECEIVE:
                self._check_leg(note, op.kind)
                if op.kind is not OpKind.SEND:
                    self._check_operation(note, op.offset, is_read=op.kind is OpKind.READ)
            end = self._ends.get(op.fd)
            if end is None:
                raise Violation(f"a {op.kind.name} goes to a descriptor that was given back")
            end.begin(op)
            if op.kind is OpKind.SEND and isinstance(end, ClientStream) and self.agenda.chance(0.3):
                self._finish_late_reads()

    def _finish_late_reads(self) -> None:
        """An answer is on its way to a client: the worst moment for one that nobody waits for any more."""
        for note in self._legs.values():
            if note.fenced:
                for end in note.ends.values():
                    if isinstance(end, FileHandle):
                        end.finish_reads()

    def check_patience(self) -> None:
        """Raise Violation when a device has not answered for too long at two looks, and nobody was told."""
        for note in self._legs.values():
            if note.fenced or note.told:
                continue
            late = any(end.is_late(self._deadline_ns + 2 * TICK_NS) for end in note.ends.values())
            if late and note.overdue:
                raise Violation(f"group {note.group.name} does not answer in time, and nobody is told")
            note.overdue = late

    def clear_evidence(self) -> None:
        """What still is so will be told again."""
        for note in self._legs.values():
            if not any(isinstance(end, ServerStream) and end.is_dead for end in note.ends.values()):
                note.told = note.overdue = False

    def _check_leg(self, note: LegNote, kind: OpKind) -> None:
        name = note.group.name
        if note.fenced:
            raise Violation(f"a {kind.name} goes to group {name} after it was fenced")
        if name not in self.around.record().attached():
            raise Violation(f"a {kind.name} goes to group {name}, which takes no part by the record")

    def _check_command(self, descriptor: int, command: int, offset: int) -> None:
        self._check_operation(self._notes_by_fd[descriptor], offset, is_read=command == Command.READ)

    def _check_operation(self, note: LegNote, offset: int, *, is_read: bool) -> None:
        name = note.group.name
        if is_read and offset < LABEL_SIZE:
            self.agenda.count("probes")
            return
        if self.is_drained and (note.caught_up or is_read):
            raise Violation(f"group {name} is asked for something while the domain holds and nothing runs")
        if not is_read:
            return
        record = self.around.record()
        if record.leg(name).state is not LegState.UPTODATE:
            raise Violation(f"a read goes to group {name}, which is {record.leg(name).state}")
        if name != record.active:
            # A backup stands in for the active leg only where that answered with an error, or is compared with it.
            others = {note.group.name for leg_id, note in self._legs.items() if self._errors(leg_id)}
            if not self._is_verifying() and not (others | self._erred) - {name}:
                raise Violation(f"a read goes to group {name}; active is {record.active}")
            self.agenda.count("reads from a backup")

    def _errors(self, leg_id: int) -> int:
        return sum(device.errors for device in self.engine.device_statistics(leg_id))

    def _is_verifying(self) -> bool:
        report = self.engine.verify_report()
        return report is not None and report.running

    def _check_verified(self) -> None:
        report = self.engine.verify_report()
        assert report is not None and not report.running
        if report.mismatched:
            raise Violation(f"a verify of equal legs finds differences: {report}")
        self.agenda.count(f"verified: {errno.errorcode.get(report.error_number, 'whole')}")

    # --- What the engine tells --------------------------------------------------------------------

    def observe(self, events: list[Event]) -> list[Event]:
        """Look at what the engine tells its server."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.told_fd)
        self._is_told = False
        for event in events:
            self.agenda.say(f"event: {event}")
            self._observe_one(event, self._legs.get(event.leg))
        return events

    def _tell(self) -> None:
        """If the engine has something to tell, have its server hear of it a little later."""
        if not self._is_told and self._poll.poll(0):
            self._is_told = True
            self.agenda.soon(self._notify, MILLISECOND_NS)

    def _notify(self) -> None:
        if not self.gone.is_set():
            os.eventfd_write(self.told_fd, 1)
            self.around.clock.poke()

    def _observe_one(self, event: Event, note: LegNote | None) -> None:
        if event.kind is EventKind.CONNECTION_CLOSED:
            (stream,) = [stream for stream in self.streams if stream.number == event.a]
            self.streams.remove(stream)
            self._forget(stream)
            stream.closed()
            if stream.client.stream is stream:
                stream.client.stream = None
        elif event.kind is EventKind.VERIFIED:
            self._check_verified()
        elif event.kind is EventKind.DRAINED:
            is_last = self.engine.statistics().held and event.a == self.hold_number
            self.is_drained = is_last and not self.flushes
        elif event.kind is EventKind.DONE:
            self.flushes.discard(event.a)
        elif event.kind is EventKind.REPLAYED:
            self.agenda.count("replayed", event.a)
        elif note is None:
            return
        elif event.kind in _EVIDENCE:
            note.told = True
            note.overdue = False
            self.agenda.count(f"evidence: {_EVIDENCE[event.kind]}")
        elif event.kind is EventKind.LEG_DRAINED:
            if event.a:
                self.agenda.count("unproven")
            elif any(end.device.has_unlanded(end) for end in note.ends.values()):
                raise Violation(f"{note.group.name} is said to be drained, and a write can still land on it")
        elif event.kind is EventKind.LEG_CLOSED:
            for end in note.ends.values():
                if isinstance(end, FileHandle):
                    end.is_closed = True
                self._forget(end)
            del self._legs[event.leg]

    def _forget(self, end: End_) -> None:
        for descriptor in [fd for fd, known in self._ends.items() if known is end]:
            del self._ends[descriptor]
            self._notes_by_fd.pop(descriptor, None)

    # --- What its server tells the engine ---------------------------------------------------------

    async def _open_device(self, url: str) -> OpenedDevice:
        group, device = self.around.device(url)
        await reach(url, device)
        self.around.opening(group)

        def taken(descriptor: int, device: Device) -> None:
            if device.remote:
                self._ends[descriptor] = ServerStream(
                    device, self.engine, partial(self._check_command, descriptor)
                )
            else:
                self._ends[descriptor] = device.lock = FileHandle(device, self.engine)

        return OpenedDevice(url, device, taken)

    def _take_bitmap(self, descriptor: int, file: Device) -> None:
        self._bitmap = FileHandle(file, self.engine)
        self._ends[descriptor] = self._bitmap

    @property
    def has_written_bitmap(self) -> bool:
        """Whether the dirty bitmap on the disk is as the engine has it."""
        self.turn()
        return self._bitmap is not None and self._bitmap.is_idle

    def leg_added(self, leg_id: int, devices: Sequence[DeviceSpec]) -> None:
        """A leg is open: its devices were taken by ``_open_device``."""
        ends = {spec.fd: self._ends[spec.fd] for spec in devices}
        found: dict[int, FileHandle | ServerStream] = {
            fd: end for fd, end in ends.items() if not isinstance(end, ClientStream)
        }
        group, _ = self.around.device(next(iter(found.values())).device.url)
        self._legs[leg_id] = note = LegNote(group, found)
        self._notes_by_fd.update(dict.fromkeys(found, note))

    def leg_fenced(self, leg_id: int) -> None:
        """From now on nothing may go to this leg."""
        note = self._legs.get(leg_id)
        if note is None:
            return
        self._collect()
        note.fenced = True
        if self._errors(leg_id):
            self._erred.add(note.group.name)
        for end in note.ends.values():
            end.is_fenced = True

    def check_install(self, generation: int, legs: Sequence[tuple[int, LegRole]], *, lag: bool) -> None:
        """Raise Violation unless these legs may be written to by what the store says and what is under way."""
        record = self.around.record()
        if generation != record.generation:
            raise Violation(f"map {generation} is installed, and {record.generation} is durable")
        fresh = []
        for leg_id, role in legs:
            note = self._legs[leg_id]
            note.lags = lag and role is not LegRole.ACTIVE
            if not note.mapped:
                note.mapped = True
                fresh.append(note.group)
                if not note.group.is_quiet:
                    raise Violation(f"{note.group.name} is admitted, and an old write can still land on it")
        self._erred.clear()
        self.clear_evidence()
        self.around.installing(generation, fresh)
        self.has_map = True

    # --- Clients ----------------------------------------------------------------------------------

    def admit(self, client: Client, disk_name: str) -> None:
        """Take in a client of a disk."""
        disk = self.doors.numbers[disk_name]
        stream = ClientStream(client, self.engine)
        descriptor = new_descriptor()
        self._ends[descriptor] = stream
        stream.number = self.engine.add_connection(descriptor, disk, obeys_block_size=False)
        self.doors.clients[stream.number] = disk_name
        self.streams.append(stream)
        client.connected(stream, disk, self.doors.exports[disk_name].size)

    # --- As the manager has it --------------------------------------------------------------------

    async def wait_gone(self) -> None:
        """See ``process.Process``."""
        await self.gone.wait()

    def has_ended(self) -> bool:
        """See ``process.Process``."""
        return self.gone.is_set()

    def close(self) -> None:
        """See ``process.Process``."""
