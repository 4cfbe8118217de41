"""One simulation: a domain with its legs, its clients, its manager and all that befalls them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from proxy.engine import Event
from proxy.extentmap import ExtentMap, Run
from proxy.failover import LegRecord, Phase, Record, Transition
from proxy.model import LegState
from tests.sim.agenda import MILLISECOND_NS, SECOND_NS, Agenda
from tests.sim.clients import Client, Workload
from tests.sim.devices import Device, Faults
from tests.sim.history import CELLS_PER_SECTOR, History, Kind, Operation, Violation, cell_content, cell_offset
from tests.sim.manager import Manager, Store
from tests.sim.medium import SECTOR
from tests.sim.server import TICK_NS, Disk, Group, Server
from tests.sim.wire import Reply

#: Multiples of three devices by two chunks of the largest size, so that every layout fits.
DOMAIN_SIZES = (49152, 98304)
#: What may befall a domain, one by one.
KINDS = (
    "stall",
    "sick",
    "break",
    "down",
    "lose active",
    "manager crash",
    "server crash",
    "store full",
    "failover",
    "hold",
    "move",
)
#: With every fault off, this is more than enough to come to rest.
REST_NS = 60 * SECOND_NS


@dataclass(frozen=True, slots=True)
class Chaos:
    """What befalls a domain, by how likely each is among all, and the mean pause between two."""

    weights: dict[str, int]
    pause_ns: int

    @classmethod
    def draw(cls, agenda: Agenda, duration_ns: int) -> "Chaos":
        """A few kinds of trouble at random, some ten times in what clients may take."""
        random = agenda.random
        weights = {"resync": random.choice((1, 4, 8)), "verify": random.choice((0, 3, 12))}
        theme = random.choice(
            (
                "anything",
                "anything",
                "active leg",
                "backups",
                "processes",
                "crashes",
                "store",
                "hangs",
                "medium",
                "orders",
            )
        )
        if theme == "anything":
            weights |= {kind: random.choice((1, 2, 4)) for kind in KINDS if agenda.chance(0.6)}
        elif theme == "active leg":
            weights |= {"lose active": 4, "server crash": random.choice((0, 1)), "failover": 1, "resync": 6}
        elif theme == "backups":
            weights |= {"break": 2, "sick": 2, "down": 1, "stall": 1, "lose active": 1, "resync": 6}
        elif theme == "crashes":
            weights |= {"server crash": 6, "lose active": 1, "break": 1}
        elif theme == "hangs":
            weights |= {"hang": 6, "stall": 1, "manager crash": random.choice((0, 1)), "resync": 6}
        elif theme == "medium":
            weights |= {"lose active": 2, "sick active": 3, "sick source": 6, "resync": 5}
        elif theme == "orders":
            weights |= {"failover": 8, "hold": 4, "move": 8, "break": random.choice((0, 1)), "resync": 8}
            weights |= {"manager crash": 1, "server crash": random.choice((0, 1))}
        elif theme == "store":
            weights |= {"store full": 3, "failover": 3, "break": 2, "lose active": 1, "resync": 6}
        else:
            weights |= {"manager crash": 3, "server crash": 1, "failover": 2, "lose active": 2, "resync": 4}
        return cls(weights, max(duration_ns // random.choice((10, 20, 40)), 3 * MILLISECOND_NS))


class World:
    """Everything there is in one simulation.

    Args:
        seed: everything follows from it.
        steps: how many requests clients make.
        trace: called with a line for everything of note; None: nobody listens.
    """

    def __init__(self, seed: int, *, steps: int, trace: Callable[[str], None] | None = None) -> None:
        self.agenda = agenda = Agenda(seed, trace)
        random = agenda.random
        faults = Faults(
            error=random.choice((0.0, 0.0, 0.003, 0.02)),
            unreadable=random.choice((0.0, 0.0, 0.02, 0.2)),
            short=random.choice((0.0, 0.1)),
            interrupted=random.choice((0.0, 0.03)),
            torn=random.choice((0.0, 0.3)),
            slow=random.choice((0.0, 0.05)),
            garbled=random.choice((0.0, 0.0, 0.002)),
            fatal=random.choice((0.0, 0.0, 0.01)),
        )
        size = random.choice(DOMAIN_SIZES)
        self.groups = {
            name: self._make_group(name, size, faults)
            for name in ("alpha", "beta", "gamma")[: random.choice((1, 2, 2, 3, 3, 3, 3))]
        }
        self.disks = self._make_disks(size)
        self.history = History({disk.number: disk.size // SECTOR * CELLS_PER_SECTOR for disk in self.disks})
        names = list(self.groups)[: random.choice((1, 2, 2, 3, 3, 3))]
        legs = tuple(LegRecord(name, LegState.UPTODATE) for name in names)
        self.store = Store(Record(1, names[0], legs), agenda, changed=self._record_changed)
        self.server: Server | None = None
        self.manager: Manager | None = None
        self.calm = False
        self._steps = steps
        self._workload = Workload.draw(agenda)
        client_count = random.choice((1, 2, 3))
        request_ns = self._workload.think_ns // 2 + 3 * MILLISECOND_NS
        duration_ns = steps * request_ns // (client_count * self._workload.depth)
        self.chaos = Chaos.draw(agenda, duration_ns)
        self._trouble_ns = 4 * duration_ns + 300 * MILLISECOND_NS
        self._flushes_checked = 0
        self._undecided = False  # a failover is decided, is not durable yet, and is watched
        self._rejected_at = -1
        self._snapshot: dict[tuple[str, int], bytes] = {}  # of an operator's hold, by group and disk
        self._leg_number = 0
        self._server_due = False
        self.clients = [
            Client(
                agenda,
                self.history,
                self._workload,
                self.disks[number % len(self.disks)].number,
                answered=self._answered,
                more=self._more,
            )
            for number in range(client_count)
        ]

    # --- What there is ----------------------------------------------------------------------------

    def _make_group(self, name: str, size: int, faults: Faults) -> Group:
        random = self.agenda.random
        count = random.choice((1, 2, 3))
        remote = [random.random() < 0.5 for _ in range(count)]
        if random.random() < 0.5:
            chunk = random.choice((4096, 8192))
            devices = self._make_devices(name, [size // count] * count, remote, faults)
            runs = [Run(index, device.offset, size // count) for index, device in enumerate(devices)]
            return Group(name, devices, ExtentMap.striped(runs, count, chunk))
        borders = [0, *sorted(random.sample(range(1, size // 4096), count - 1)), size // 4096]
        lengths = [(end - begin) * 4096 for begin, end in pairwise(borders)]
        devices = self._make_devices(name, lengths, remote, faults)
        runs = [Run(index, device.offset, lengths[index]) for index, device in enumerate(devices)]
        random.shuffle(runs)
        return Group(name, devices, ExtentMap.linear(runs))

    def _make_devices(
        self, name: str, lengths: list[int], remote: list[bool], faults: Faults
    ) -> tuple[Device, ...]:
        return tuple(
            Device(f"{name}/{index}", self.agenda, faults, size=length, remote=remote[index])
            for index, length in enumerate(lengths)
        )

    def _make_disks(self, size: int) -> list[Disk]:
        random = self.agenda.random
        if self.agenda.chance(0.6):
            return [Disk(0, size - random.choice((0, 0, SECTOR, 5 * SECTOR)), 0, size)]
        border = random.randrange(1, size // 4096) * 4096
        return [
            Disk(2, border - random.choice((0, SECTOR)), 0, border),
            Disk(5, size - border, border, size - border),
        ]

    # --- Life -------------------------------------------------------------------------------------

    def run(self) -> Counter[str]:
        """Live through it all; what happened how often. Raises Violation."""
        agenda = self.agenda
        self._start_server()
        agenda.after(TICK_NS, self._tick)
        agenda.after(self.chaos.pause_ns, self._befall)
        limit_ns = agenda.now_ns + self._trouble_ns
        while self._steps > 0 and agenda.now_ns < limit_ns:
            self._next()
        self._calm_down()
        limit_ns = agenda.now_ns + REST_NS
        while not self._is_at_rest():
            self._next()
            if agenda.now_ns > limit_ns:
                raise Violation(f"the domain does not come to rest: {self._state()}")
        self._check_at_rest()
        self.history.check()
        assert self.server is not None
        self.server.count()
        self.server.dispose()
        return agenda.counts

    def _next(self) -> None:
        self.agenda.next()
        if self.server is not None and not self.agenda.chance(0.2):
            self.server.turn()
            self._connect_clients()

    def _tick(self) -> None:
        # A batch for the sake of the clock: deadlines are looked at.
        if self.server is not None:
            self.server.turn()
            self.server.check_patience()
        self.agenda.after(TICK_NS, self._tick)

    def _more(self) -> bool:
        if self._steps <= 0:
            return False
        self._steps -= 1
        return True

    # --- Processes --------------------------------------------------------------------------------

    def _start_server(self) -> None:
        """Start a domain server, as soon as nothing of the one before can land any more."""
        if self.manager is not None and self.manager.alive:
            return
        if self.store.is_writing or not all(group.is_quiet for group in self.groups.values()):
            # Locks tell that of files, quarantine of what is remote.
            self.agenda.after(5 * MILLISECOND_NS, self._start_server)
            return
        self._server_due = False
        for operation in self.history.operations.values():
            # Whatever clients of the old one were not told is decided now.
            if operation.settled > self.history.moment and operation.asked <= self.history.moment:
                self.history.settle(operation)
        self.server = Server(self.agenda, tell=self._tell, record=lambda: self.store.record)
        self.manager = self._new_manager(self.server)
        self.manager.start()

    def _new_manager(self, server: Server) -> Manager:
        return Manager(
            self.agenda,
            self.store,
            server,
            self.groups,
            self.disks,
            held=self._decided,
            rejected=self._reject,
            flushed=self._held_by_operator,
            next_number=self._next_leg_number,
            died=self._crash_manager,
        )

    def _next_leg_number(self) -> int:
        self._leg_number += 1
        return self._leg_number

    def _tell(self, event: Event) -> None:
        self.agenda.say(f"event: {event}")
        if self.manager is not None and self.manager.alive:
            self.manager.tell(event)

    def _crash_server(self) -> None:
        if self.server is None:
            return
        self.agenda.say("the domain server crashes")
        self.agenda.count("server crashes")
        self.server.turn()
        self.server.crash()
        self.server = None
        if self.manager is not None:
            self.manager.alive = False
        self._undecided = False
        self._server_due = True
        self.agenda.soon(self._start_server, 50 * MILLISECOND_NS)

    def _crash_manager(self) -> None:
        if self.server is None or self.manager is None or not self.manager.alive:
            return
        self.agenda.say("the manager crashes")
        self.agenda.count("manager crashes")
        self.server.turn()
        self.manager.crash()
        server = self.server

        def adopt() -> None:
            if self.server is server:
                self.manager = self._new_manager(server)
                self.manager.adopt()

        self.agenda.soon(adopt, 50 * MILLISECOND_NS)

    def _connect_clients(self) -> None:
        if self.server is not None and self.server.generation:
            for client in self.clients:
                if client.stream is None and len(self.server.streams) < 20:
                    self.server.connect(client)

    # --- What befalls it --------------------------------------------------------------------------

    def _befall(self) -> None:
        if self.calm:
            return
        random = self.agenda.random
        kind = random.choices(list(self.chaos.weights), list(self.chaos.weights.values()))[0]
        # What befalls the active leg matters most.
        name = self.store.record.active if self.agenda.chance(0.5) else random.choice(list(self.groups))
        device = random.choice(self.groups[name].devices)
        self.agenda.say(f"trouble: {kind} ({device.name})")
        # Shorter than a deadline, about as long, and much longer.
        duration_ns = int(random.choice((5, 100, 1000)) * random.random() * MILLISECOND_NS)
        match kind:
            case "stall":
                device.stall(duration_ns)
            case "hang":
                # What they have in common stops, such as a switch; they come back one by one, or nearly at once.
                least_ms, spread_ms = random.choice(((200, 700), (random.randrange(220, 700), 6)))
                for group in self.groups.values():
                    for device in group.devices:
                        device.stall(int((least_ms + random.random() * spread_ms) * MILLISECOND_NS))
            case "sick":
                device.sicken(random.randrange(1, 60) * MILLISECOND_NS)
            case "sick source":
                # While a leg is copied from it, which takes a while to begin.
                self._order_resyncs()
                for device in self.groups[self.store.record.active].devices:
                    duration_ns = random.randrange(1, 60) * MILLISECOND_NS
                    self.agenda.soon(partial(device.sicken, duration_ns), 80 * MILLISECOND_NS)
            case "sick active":
                for device in self.groups[self.store.record.active].devices:
                    device.sicken(random.randrange(1, 60) * MILLISECOND_NS)
            case "break":
                device.break_streams()
            case "down":
                device.go_down(duration_ns)
            case "lose active":
                for device in self.groups[self.store.record.active].devices:
                    device.go_down(random.randrange(1, 40) * MILLISECOND_NS)
            case "manager crash":
                if self.manager is not None and self.agenda.chance(0.7):
                    self.manager.dies_in = random.randrange(8)
                else:
                    self._crash_manager()
            case "server crash":
                # Only one that has something to lose, mostly.
                if self.server is not None and (self.server.is_busy or self.agenda.chance(0.1)):
                    self._crash_server()
            case "store full":
                self.store.is_full = True
                self.agenda.count("store full")
                self.agenda.after(duration_ns, self._empty_store)
            case "failover":
                if self.manager is not None:
                    self.manager.order_failover(random.choice(list(self.groups)))
            case "verify":
                if self.server is not None:
                    rate = random.choice((0, 0, 1 << 20))
                    self.server.verify(self.disks, rate=rate, repair=self.agenda.chance(0.3))
            case "hold":
                if self.manager is not None:
                    self.manager.order_hold()
                    self.agenda.after(duration_ns, self._release)
            case "move":
                if self.manager is not None:
                    legs = [leg.group for leg in self.store.record.legs]
                    outside = [group for group in self.groups if group not in legs]
                    target = random.choice(outside) if outside and self.agenda.chance(0.8) else None
                    # A leg just lost is the one whose writes may still land when its space is given back.
                    lost = [leg.group for leg in self.store.record.legs if leg.state is LegState.OUTDATED]
                    source = random.choice([name, self.store.record.active, *lost])
                    self.manager.order_move(source, target)
            case "resync":
                self._order_resyncs()
        self.agenda.after(int(random.expovariate(1 / self.chaos.pause_ns)), self._befall)

    def _empty_store(self) -> None:
        self.store.is_full = False

    def _order_resyncs(self) -> None:
        if self.manager is not None and self.manager.alive:
            for leg in self.store.record.legs:
                self.manager.order_resync(leg.group)

    def _calm_down(self) -> None:
        """No more trouble: everything that can come back does."""
        self.agenda.say("calm")
        self.calm = True
        self.store.is_full = False
        for group in self.groups.values():
            for device in group.devices:
                device.recover()
        self.agenda.after(0, self._repair)

    def _release(self) -> None:
        if self.manager is not None and self.manager.alive:
            self._check_snapshot()
            self.manager.order_release()

    def _repair(self) -> None:
        self._release()
        self._order_resyncs()
        self.agenda.after(20 * MILLISECOND_NS, self._repair)

    def _is_at_rest(self) -> bool:
        manager, server = self.manager, self.server
        if server is None or manager is None or not manager.is_idle or self._steps > 0:
            return False
        return (
            manager.machine.phase is Phase.SERVING
            and self.store.migration is None
            and all(leg.state is LegState.UPTODATE for leg in self.store.record.legs)
            and not any(stream.waiting for stream in server.streams)
            and all(client.stream is not None for client in self.clients)
            and server.engine.statistics().running == 0
            and all(group.is_quiet for group in self.groups.values())
        )

    # --- Checks -----------------------------------------------------------------------------------

    def _decided(self) -> None:
        """A failover was decided: from now on nothing is acknowledged until that is durable."""
        server = self.server
        assert server is not None
        # What was acknowledged before may still be on its way to the client. To see what is not, everything is
        # let through first; not always, since that is not how sockets are.
        if self.agenda.chance(0.5):
            server.turn()
            while any(stream.is_sending for stream in server.streams):
                for stream in server.streams:
                    stream.take_all()
                server.turn()
            self._undecided = True

    def _record_changed(self, transition: Transition) -> None:
        self._undecided = False
        if self.server is not None:
            self.server.collect()
        if transition.is_failover:
            self.agenda.count("planned switches" if transition.is_planned else "failovers")
        if transition.is_planned and transition.before.attached() == transition.after.attached():
            # Nothing was wrong with any leg, so nothing may be under way on any, nor missing from any.
            after = transition.after
            uptodate = [leg.group for leg in after.legs if leg.state is LegState.UPTODATE]
            self._check_equal(uptodate, f"at the switch from {transition.before.active} to {after.active} ")
        kept = {leg.group for leg in transition.after.legs}
        for leg in transition.before.legs:
            if leg.group not in kept and not self.groups[leg.group].is_quiet:
                raise Violation(f"the space of {leg.group} is given back, and a write can still land there")
        fresh = self.server is not None and self.server.generation == 0
        for leg in transition.after.legs:
            if fresh and leg.state is LegState.UPTODATE:
                # What was in flight when the server before ended may be on some legs and not on others.
                self._check_synced(leg.group, transition.after.active)
            if leg.state is LegState.UPTODATE and (
                transition.is_planned or transition.before.leg(leg.group).state is not leg.state
            ):
                self._check_leg(leg.group, f"{leg.group} was recorded up to date", self.history.floors())
                self._check_leg(
                    leg.group, f"{leg.group} was recorded up to date", self.history.flushed, durable=True
                )
                self._check_synced(leg.group, transition.after.active)

    def _held_by_operator(self) -> None:
        """An operator's hold was reached: a snapshot of any leg has to be what clients were promised."""
        self.agenda.count("snapshots")
        for leg in self.store.record.legs:
            if leg.state is LegState.UPTODATE:
                self._check_leg(leg.group, "clients were held", self.history.floors(), durable=True)
        self._snapshot = {
            (leg.group, disk.number): self.groups[leg.group].content(disk.offset, disk.allotted)
            for leg in self.store.record.legs
            for disk in self.disks
            if leg.state is LegState.UPTODATE
        }

    def _check_snapshot(self) -> None:
        """Nothing may have changed on the legs that serve for as long as clients were held."""
        manager = self.manager
        if self._snapshot and manager is not None and manager.is_idle and manager.machine.operator_hold:
            for leg in self.store.record.legs:
                for disk in self.disks:
                    before = self._snapshot.get((leg.group, disk.number))
                    now = self.groups[leg.group].content(disk.offset, disk.allotted)
                    if leg.state is LegState.UPTODATE and before not in (None, now):
                        raise Violation(f"{leg.group} has changed while clients were held")
        self._snapshot = {}

    def _reject(self) -> None:
        self.agenda.count("rejections")
        self._rejected_at = self.history.tick()

    def _answered(self, operation: Operation, reply: Reply) -> None:
        if self.agenda.is_traced:
            self.agenda.say(f"answer {reply.error} to {operation}")
        if reply.error:
            if self._rejected_at < operation.asked:
                raise Violation(f"a client is told of error {reply.error}: {operation}")
            self.agenda.count("errors told")
            self.history.settle(operation)
            return
        if operation.kind is not Kind.READ and self._undecided:
            raise Violation(f"acknowledged between a decision and its record: {operation}")
        self.history.answer(operation, reply.payload)
        if operation.kind is Kind.READ:
            self._check_shown(operation, reply.payload)
        if operation.kind in (Kind.WRITE, Kind.ZERO):
            self._check_acknowledged(operation)
            if operation.durable:
                self.agenda.count("fua")
            if operation.offset % SECTOR or operation.length % SECTOR:
                self.agenda.count("unaligned")
        elif operation.kind is Kind.FLUSH:
            self._check_legs(operation, self.history.flush_covers(operation), durable=True)

    def _check_shown(self, read: Operation, data: bytes) -> None:
        """Every up-to-date leg must have what a client was shown: no failover may take it back."""
        (disk,) = [disk for disk in self.disks if disk.number == read.disk]
        for leg in self.store.record.legs:
            if leg.state is LegState.UPTODATE:
                content = self.groups[leg.group].content(disk.offset + read.offset, read.length)
                if content != data:
                    # It may have been overwritten already; then it has to be looked at closely.
                    self._check_leg(leg.group, f"{read} was answered", self.history.shown(read, data))

    def _check_acknowledged(self, operation: Operation) -> None:
        """Every up-to-date leg must have what was acknowledged."""
        (disk,) = [disk for disk in self.disks if disk.number == operation.disk]
        expected = operation.content()
        floors = {(disk.number, cell): operation.asked for cell in range(operation.first, operation.last)}
        for durable in (False, True) if operation.durable else (False,):
            if any(
                self.groups[leg.group].content(
                    disk.offset + operation.offset, operation.length, durable=durable
                )
                != expected
                for leg in self.store.record.legs
                if leg.state is LegState.UPTODATE
            ):
                # It may have been overwritten already; then it has to be looked at closely.
                self._check_legs(operation, floors, durable=durable)

    def _check_legs(
        self, operation: Operation, floors: dict[tuple[int, int], float], *, durable: bool
    ) -> None:
        for leg in self.store.record.legs:
            if leg.state is LegState.UPTODATE:
                self._check_leg(leg.group, f"{operation} was acknowledged", floors, durable=durable)

    def _check_leg(
        self, name: str, occasion: str, floors: dict[tuple[int, int], float], *, durable: bool = False
    ) -> None:
        """Nothing that was over before its cell's floor may be left on a leg, or durably left."""
        for disk in self.disks:
            content = self.groups[name].content(disk.offset, disk.allotted, durable=durable)
            for (number, cell), floor in floors.items():
                if number != disk.number:
                    continue
                found = content[cell_offset(cell) :][: len(cell_content(0, cell))]
                value = self.history.value_of(disk.number, cell, found)
                if not self.history.is_current(disk.number, cell, value, floor):
                    raise Violation(
                        f"{occasion}, but {name} has {'durably ' if durable else ''}only "
                        f"{self.history.operations.get(value, 'zeroes')} at byte {cell_offset(cell)}"
                    )

    def _check_synced(self, name: str, active: str) -> None:
        """An up-to-date leg holds what the active one does, but where writes are under way."""
        busy = self.history.busy()
        for disk in self.disks:
            contents = [self.groups[group].content(disk.offset, disk.size) for group in (name, active)]
            if contents[0] == contents[1]:
                continue
            for cell in range(len(self.history.cells[disk.number])):
                span = slice(cell_offset(cell), cell_offset(cell + 1))
                if contents[0][span] != contents[1][span] and (disk.number, cell) not in busy:
                    raise Violation(
                        f"{name} was recorded up to date, but differs from {active} at byte {span.start} "
                        f"of disk {disk.number}"
                    )

    def _check_at_rest(self) -> None:
        assert self.server is not None
        self._check_equal([leg.group for leg in self.store.record.legs], "")
        self._read_everything()
        memory_bytes = self.server.engine.statistics().memory_bytes
        if memory_bytes:
            raise Violation(f"{memory_bytes} bytes of memory are still taken")

    def _check_equal(self, names: list[str], occasion: str) -> None:
        for disk in self.disks:
            contents = [self.groups[name].content(disk.offset, disk.allotted) for name in names]
            for name, content in zip(names, contents, strict=True):
                if content != contents[0]:
                    place = next(
                        i for i, (a, b) in enumerate(zip(content, contents[0], strict=True)) if a != b
                    )
                    raise Violation(
                        f"{occasion}{name} differs from {names[0]} at byte {place} of disk {disk.number}"
                    )

    def _read_everything(self) -> None:
        """A last look at all disks by all clients."""
        assert self.server is not None
        for client in self.clients:
            client.read_all()
        limit_ns = self.agenda.now_ns + SECOND_NS
        while any(stream.waiting for stream in self.server.streams) or self.agenda.now_ns < limit_ns:
            self._next()

    def _state(self) -> str:
        if self.manager is None or self.server is None:
            return "there is no domain server"
        waiting = [str(op) for stream in self.server.streams for op in stream.waiting.values()]
        return (
            f"phase {self.manager.machine.phase.value}, record {self.store.record}, "
            f"lost {self.manager.machine.lost}, {self.server.engine.statistics()}, waiting {waiting[:3]}"
        )
