"""One simulation: a domain with its legs, its clients, its manager and all that befalls them."""

import logging
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from proxy.allocator import allot
from proxy.dirtymap import INTENT
from proxy.extentmap import Range, Run
from proxy.failover import LegRecord, Record, Transition
from proxy.manager.service import Service
from proxy.model import ALLOCATION_UNIT, Delay, DomainState, LegState, Replication
from proxy.store import DiskRecord, DomainRecord
from tests.sim import clock
from tests.sim.agenda import MILLISECOND_NS, SECOND_NS, Agenda
from tests.sim.bitmapdisk import BitmapDisk
from tests.sim.clients import Client, Workload
from tests.sim.devices import Device, Faults
from tests.sim.groups import Group, space_of, uuid_of
from tests.sim.history import CELLS_PER_SECTOR, History, Kind, Operation, Violation, cell_content, cell_offset
from tests.sim.manager import DOMAIN, Manager, SimulatedStore
from tests.sim.medium import SECTOR
from tests.sim.server import TICK_NS, DomainServer
from tests.sim.wire import Reply

DOMAIN_SIZES = (3 * ALLOCATION_UNIT, 4 * ALLOCATION_UNIT)
DISKS_MAX = 3
#: How long trouble waits for a write to be under way.
LURK_NS = 50 * MILLISECOND_NS
CONNECTIONS_MAX = 20
#: What may befall a domain, one by one.
KINDS = (
    "stall",
    "sick",
    "break",
    "down",
    "lose active",
    "manager crash",
    "server crash",
    "host crash",
    "power",
    "store full",
    "failover",
    "failback",
    "accept loss",
    "hold",
    "move",
    "maintenance",
    "create disk",
    "grow disk",
    "remove disk",
)
#: With every fault off, this is more than enough to come to rest.
REST_NS = 300 * SECOND_NS


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
                "losses",
                "orders",
                "verifies",
                "store",
                "hangs",
                "medium",
                "power",
                "disks",
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
            weights |= {"accept loss": random.choice((0, 4))}
        elif theme == "losses":
            weights |= {"break": 2, "lose active": 3, "accept loss": 8, "resync": 2}
            weights |= {"server crash": random.choice((0, 1)), "manager crash": random.choice((0, 1))}
        elif theme == "orders":
            weights |= {"failover": 4, "failback": 2, "hold": 4, "move": 8, "resync": 8, "manager crash": 1}
            weights |= {"break": random.choice((0, 1)), "server crash": random.choice((0, 1))}
        elif theme == "verifies":
            weights |= {"verify": 20, "break": 1, "resync": 4}
        elif theme == "hangs":
            weights |= {"hang": 4, "stall": 4, "manager crash": random.choice((0, 1)), "resync": 6}
        elif theme == "medium":
            weights |= {"lose active": 2, "sick active": 3, "sick source": 6, "resync": 5}
        elif theme == "store":
            weights |= {"store full": 3, "failover": 3, "break": 2, "lose active": 1, "resync": 6}
        elif theme == "power":
            weights |= {"power": 4, "host crash": 2, "failover": 1, "server crash": 1, "resync": 6}
        elif theme == "disks":
            weights |= {"create disk": 3, "grow disk": 3, "remove disk": 2, "lose active": 2, "break": 1}
            weights |= {
                "manager crash": random.choice((0, 2)),
                "host crash": random.choice((0, 1)),
                "resync": 4,
            }
        else:
            weights |= {
                "manager crash": 3,
                "server crash": 1,
                "maintenance": 1,
                "failover": 2,
                "lose active": 2,
            }
            weights |= {"resync": 4}
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
            name: Group.draw(name, size, faults, agenda)
            for name in ("alpha", "beta", "gamma")[: random.choice((1, 2, 2, 3, 3, 3, 3))]
        }
        self.clock = clock.Clock(agenda, self._step)
        self.history = History({})
        self.bitmap_disk = BitmapDisk(agenda, faults)
        self.store = SimulatedStore(agenda, block=self._block, changed=self._record_changed)
        self._fill_store(size)
        self.server: DomainServer | None = None
        self.manager: Manager | None = None
        self.calm = False
        self._seed = seed
        self._steps = steps
        self._workload = Workload.draw(agenda)
        client_count = random.choice((1, 2, 3))
        request_ns = self._workload.think_ns // 2 + 3 * MILLISECOND_NS
        duration_ns = steps * request_ns // (client_count * self._workload.depth)
        self.chaos = Chaos.draw(agenda, duration_ns)
        self._trouble_ns = 8 * duration_ns + 10 * SECOND_NS
        self._is_fond_of_the_first = agenda.chance(0.5)  # its operator fails back when all trouble is over
        self.read_repairs_max = random.choice((0, 2, 16))
        self._undecided = False  # a failover is decided, is not durable yet, and is watched
        self._rejected_at = -1
        self._is_failing = False  # clients are told errors
        self._lurks_until_ns = 0  # trouble is about to strike
        self._snapshot: dict[tuple[str, int], bytes] = {}  # of an operator's hold, by group and disk
        self._unanswered: list[Operation] = []  # by domain servers that are gone
        self._devices = {
            device.url: (group, device) for group in self.groups.values() for device in group.devices
        }
        self._nursery: trio.Nursery
        self._wanted: Callable[[], bool] = lambda: False
        self._reached = trio.Event()
        self._failure: BaseException | None = None
        self.clients = [
            Client(
                agenda,
                self.history,
                self._workload,
                answered=self._answered,
                more=self._more,
                think_ns=self._think_ns,
            )
            for _ in range(client_count)
        ]

    def _fill_store(self, size: int) -> None:
        """Groups with labels, and a domain that is about to be served for the first time."""
        random = self.agenda.random
        names = list(self.groups)[: random.choice((1, 2, 2, 3, 3, 3))]
        runs: dict[str, Sequence[Run]] = {}
        for group in self.groups.values():
            stored = group.add_to(self.store, random)
            if group.name in names:
                runs[group.name] = group.runs or allot(stored, [], size)
                group.place(runs[group.name], size)
        legs = [
            LegRecord(names[0], LegState.UPTODATE),
            *(LegRecord(name, LegState.SYNCING) for name in names[1:]),
        ]
        record = Record(1, names[0], tuple(legs))
        failback = Delay(random.choice((None, None, 0.0, 0.3)))
        replication = random.choice((Replication.SYNC, Replication.SYNC, Replication.ASYNC))
        self._is_asynchronous = replication is Replication.ASYNC
        # Shorter, and a device that is always slower than this would never get anything done.
        no_leg = Delay(random.choice((None, 2.0)))
        self.store.add_domain(
            DOMAIN,
            uuid_of(random),
            size,
            replication,
            "",
            record,
            runs,
            0.0,
            failback=failback,
            no_leg=no_leg,
        )

    # --- Life -------------------------------------------------------------------------------------

    def run(self) -> Counter[str]:
        """Live through it all; what happened how often. Raises Violation."""
        logger = logging.getLogger("standfast")
        handler = _Listener(self)
        level, propagate = logger.level, logger.propagate
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG if self.agenda.is_traced else logging.ERROR)
        logger.propagate = False
        try:
            clock.run(self._main, self.clock, self._seed)
        except ExceptionGroup as group:
            self.fail(group)  # found in a task of what ships
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate
            self.store.close()
        if self._failure is not None:
            raise self._failure
        return self.agenda.counts

    async def _main(self) -> None:
        async with trio.open_nursery() as self._nursery:
            try:
                await self._live()
            except Exception as error:
                self.fail(error)
            finally:
                self.clock.stop()
            self._nursery.cancel_scope.cancel()

    async def _live(self) -> None:
        agenda = self.agenda
        self._start_manager()
        agenda.after(TICK_NS, self._tick)
        agenda.after(0, self._make_first_disk)
        await self._until(lambda: bool(self.history.cells), "gets its first disk")
        agenda.after(self.chaos.pause_ns, self._befall)
        limit_ns = agenda.now_ns + self._trouble_ns
        await self._until(lambda: self._steps <= 0 or agenda.now_ns >= limit_ns, "gets through its trouble")
        self._calm_down()
        await self._until(self._is_at_rest, "comes to rest")
        for group in self.groups.values():
            group.has_lost_power = False  # whatever it has lost, it was synced since
        self._check_equal([leg.group for leg in self.record().legs], "")
        for client in self.clients:
            client.read_all()
        limit_ns = agenda.now_ns + SECOND_NS
        server = self.server
        assert server is not None
        await self._until(lambda: agenda.now_ns >= limit_ns and not server.is_busy, "answers")
        await self._until(lambda: not server.engine.statistics().memory_bytes, "gives its memory back")
        self.history.check()
        assert self.manager is not None
        self.manager.end()
        server.kill()
        await server.gone.wait()

    async def _until(self, wanted: Callable[[], bool], what: str) -> None:
        """Return when it is so, or raise what is wrong; it has to be so before long."""
        limit_ns = self.agenda.now_ns + REST_NS
        self._wanted = lambda: wanted() or self.agenda.now_ns > limit_ns
        while self._failure is None and not wanted():  # it may have been so, and be otherwise by now
            if self.agenda.now_ns > limit_ns:
                raise Violation(f"the domain never {what}: {self._state()}")
            self._reached = trio.Event()
            await self._reached.wait()
        if self._failure is not None:
            raise self._failure

    def fail(self, error: BaseException) -> None:
        """Something is wrong: the simulation ends here."""
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if self._failure is None:
            self._failure = error
            self._reached.set()
            self.clock.stop()

    def _step(self) -> None:
        """Let the next thing happen."""
        if self._failure is not None:
            return
        try:
            self.agenda.next()
            self._lurk()
            if self.server is not None and not self.agenda.chance(0.2):
                self.server.turn()
                self._connect_clients()
            if not self._reached.is_set() and self._wanted():
                self._reached.set()
        except Exception as error:
            self.fail(error)

    def _block(self, duration_ns: int) -> None:
        """Let time pass in the middle of what a task does: the world does not wait for it."""
        end_ns = self.agenda.now_ns + duration_ns
        while self._failure is None and self.agenda.next_ns <= end_ns:
            self._step()
        if self._failure is None:
            self.agenda.pass_until(end_ns)

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

    def _start_manager(self) -> None:
        if self.manager is None or not self.manager.is_alive:
            self.manager = Manager(self, self.store)
            self._nursery.start_soon(self.manager.run)

    def manager_died(self) -> None:
        """See ``manager.Place``."""
        self.agenda.soon(self._start_manager, 50 * MILLISECOND_NS)

    def start_server(self, name: str, directory: Path, deadline_ms: int, probe_ms: int) -> DomainServer:
        """See ``manager.Place``."""
        assert self.server is None, "two domain servers of one domain"
        self.agenda.say("a domain server is started")
        self.failing(is_over=True)
        self.server = DomainServer(
            self, name, directory, deadline_ms=deadline_ms, probe_ms=probe_ms, nursery=self._nursery
        )
        return self.server

    def ended(self, server: DomainServer, unanswered: list[Operation]) -> None:
        """See ``server.Surroundings``."""
        self.agenda.say("the domain server has ended")
        assert self.server is server
        self.server = None
        self._undecided = False
        self._unanswered += [operation for operation in unanswered if operation.asked != math.inf]

    def _connect_clients(self) -> None:
        server = self.server
        if server is None or not server.is_up or not server.doors.is_open:
            return
        names = [name for name, number in server.doors.numbers.items() if number in self.history.cells]
        if names:
            for client in self.clients:
                if client.stream is None and len(server.streams) < CONNECTIONS_MAX:
                    server.admit(client, self.agenda.random.choice(names))

    # --- What domain server and manager ask the world ---------------------------------------------

    def record(self) -> Record:
        """See ``server.Surroundings``."""
        return self.store.domain(DOMAIN).record

    def device(self, url: str) -> tuple[Group, Device]:
        """See ``server.Surroundings``."""
        return self._devices[url]

    def opening(self, group: Group) -> None:
        """See ``server.Surroundings``. What is not up to date may be anything by now."""
        state = self.record().leg(group.name).state
        if group.is_remote and not group.is_quiet:
            self.agenda.count("opened before it is quiet")
            if not self.calm and self.agenda.chance(0.15):
                # Whoever comes next does not know what this leg still has to be waited for.
                victim = self.manager if self.agenda.chance(0.7) else self.server
                if victim is not None:
                    self.agenda.soon(victim.kill, 100 * MILLISECOND_NS)
        if (
            state is not LegState.UPTODATE
            and group.is_quiet
            and not group.is_open
            and self.agenda.chance(0.5)
        ):
            self._spoil(group)

    def _spoil(self, group: Group) -> None:
        """Put rubbish where the dirty bitmap says that a leg lacks something."""
        domain = self.store.domain(DOMAIN)
        found = self.bitmap_disk.content(domain.domain.uuid, domain.domain.size)
        if found is None or self.server is None or not self.server.has_written_bitmap:
            return
        plane = found.plane(group.uuid)
        if plane is None:
            return
        self.agenda.say(f"{group.name} is spoilt")
        self.agenda.count("spoilt")
        lacks = int.from_bytes(plane, "little") | int.from_bytes(found.planes[INTENT], "little")
        for region in range(found.regions):
            if lacks >> region & 1:
                offset = region << found.region_shift
                length = min(1 << found.region_shift, domain.domain.size - offset)
                group.spoil(Range(offset, length))

    def held(self) -> None:
        """See ``server.Surroundings``. From now on nothing is acknowledged until a record is durable."""
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

    def failing(self, *, is_over: bool) -> None:
        """See ``server.Surroundings``."""
        if not is_over:
            self.agenda.count("failings")
        if self._is_failing:
            self._rejected_at = self.history.tick()
        self._is_failing = not is_over

    def rejected(self) -> None:
        """See ``server.Surroundings``."""
        self.agenda.count("rejections")
        self._rejected_at = self.history.tick()

    def installing(self, generation: int, groups: Sequence[Group]) -> None:
        """See ``server.Surroundings``."""
        for operation in self._unanswered:
            self.history.settle(operation)  # nothing of it can land any more on what is served from
        self._unanswered.clear()
        record = self.record()
        for group in groups:
            state = record.leg(group.name).state
            if group.name == record.active and self.server is not None and self.server.has_map:
                self.agenda.count("returned")
            if not group.has_lost_power or state is not LegState.UPTODATE:
                continue
            if group.name == record.active:
                self.agenda.say(f"{group.name} is active, and has lost its power")
                self.agenda.count("served after a loss of power")
                self.history.power_lost()
                for other in self.groups.values():
                    other.has_lost_power = False
            elif not self._is_asynchronous:
                self._check_leg(group.name, f"{group.name} is a backup", self.history.floors())

    # --- What befalls it --------------------------------------------------------------------------

    def _befall(self) -> None:
        if self.calm:
            return
        # It may have trouble already, for as long as many pauses; an operator sees to it.
        is_whole = self._is_whole()
        pause_ns = self.chaos.pause_ns * (1 if is_whole else 10)
        self.agenda.after(int(self.agenda.random.expovariate(1 / pause_ns)), self._befall)
        if "accept loss" in self.chaos.weights and self._is_stuck() and self.agenda.chance(0.5):
            self._order("accept loss")
            return
        if not is_whole and self.agenda.chance(0.6):
            self._order("resync")
            return
        if self.agenda.chance(0.7):
            self._lurks_until_ns = self.agenda.now_ns + LURK_NS
        else:
            self._strike()

    def _lurk(self) -> None:
        """Strike when a write is under way, which is when it hurts."""
        if self._lurks_until_ns and (
            self.agenda.now_ns >= self._lurks_until_ns
            or any(not group.is_quiet for group in self.groups.values())
        ):
            self._lurks_until_ns = 0
            if not self.calm:
                self._strike()

    def _strike(self) -> None:
        random = self.agenda.random
        kind = random.choices(list(self.chaos.weights), list(self.chaos.weights.values()))[0]
        # What befalls the active leg matters most.
        active = self.groups[self.record().active]
        groups = [self.groups[leg.group] for leg in self.record().legs]
        group = active if self.agenda.chance(0.5) else random.choice(groups)
        device = random.choice(group.devices)
        # And a device with a write under way.
        busy = [(group, device) for group in groups for device in group.devices if not device.is_quiet]
        if busy and self.agenda.chance(0.7):
            group, device = random.choice(busy)
        self.agenda.say(f"trouble: {kind} ({device.name})")
        # Shorter than a deadline, about as long, and much longer.
        duration_ns = int(random.choice((5, 100, 1000)) * random.random() * MILLISECOND_NS)
        match kind:
            case "stall":
                # Mostly for longer than a deadline, so that something is given up that still is under way.
                if self.agenda.chance(0.6):
                    duration_ns = random.randrange(200, 900) * MILLISECOND_NS
                device.stall(duration_ns)
            case "hang":
                # What they have in common stops, such as a switch; they come back one by one, or nearly at once.
                least_ms, spread_ms = random.choice(((200, 700), (random.randrange(220, 700), 6)))
                for each in groups:
                    for device in each.devices:
                        device.stall(int((least_ms + random.random() * spread_ms) * MILLISECOND_NS))
            case "sick":
                device.sicken(random.randrange(1, 60) * MILLISECOND_NS)
            case "sick source":
                # While a leg is copied from it, which takes a while to begin.
                self._order("resync")
                for device in active.devices:
                    sick_ns = random.randrange(1, 60) * MILLISECOND_NS
                    self.agenda.soon(partial(device.sicken, sick_ns), 80 * MILLISECOND_NS)
            case "sick active":
                for device in active.devices:
                    device.sicken(random.randrange(1, 60) * MILLISECOND_NS)
            case "break":
                device.break_streams()
            case "down":
                device.go_down(duration_ns)
            case "lose active":
                for device in active.devices:
                    device.go_down(random.randrange(1, 40) * MILLISECOND_NS)
            case "manager crash":
                if self.manager is not None and self.agenda.chance(0.7):
                    self.manager.dies_in = random.randrange(30)
                elif self.manager is not None:
                    self.manager.kill()
            case "server crash":
                if self.server is not None:
                    self.agenda.count("server crashes")
                    self.server.kill()
            case "host crash":
                self._crash_host(duration_ns)
            case "power":
                self._cut_power(group, duration_ns)
            case "store full":
                self.store.is_full = self.bitmap_disk.is_full = True
                self.agenda.count("store full")
                self.agenda.after(duration_ns, self._empty_store)
            case _:
                self._order(kind)

    def _is_whole(self) -> bool:
        """Whether clients are being served, from legs that are all up to date."""
        return (
            self.server is not None
            and self.server.is_serving
            and all(leg.state is LegState.UPTODATE for leg in self.record().legs)
        )

    def _is_stuck(self) -> bool:
        """Whether clients wait because no leg is left."""
        if self.manager is None or not self.manager.is_alive:
            return False
        supervisor = self.manager.service.supervisors.get(DOMAIN)
        return supervisor is not None and supervisor.state() is DomainState.HELD

    def _think_ns(self) -> int:
        """How long clients think; longer while a leg is missing, so that most of what they do meets all."""
        return self._workload.think_ns * (1 if self.calm or self._is_whole() else 20)

    def _empty_store(self) -> None:
        self.store.is_full = self.bitmap_disk.is_full = False

    def _crash_host(self, duration_ns: int) -> None:
        """The host of manager and domain server loses its power, and so do the devices it has."""
        self.agenda.count("host crashes")
        if self.server is not None:
            self.server.kill(at_once=True)
        if self.manager is not None and self.manager.is_alive:
            self.manager.end()
            self.agenda.after(duration_ns + MILLISECOND_NS, self._start_manager)
        self.bitmap_disk.lose_power(duration_ns)
        if self.agenda.chance(0.1):
            self.bitmap_disk.damage()
        for group in self.groups.values():
            for device in group.devices:
                if not device.remote:
                    device.lose_power(duration_ns)
                    group.has_lost_power = True

    def _cut_power(self, group: Group, duration_ns: int) -> None:
        """Another server of a group loses its power; never that of the last good leg, which is not promised."""
        legs = {leg.group: leg.state for leg in self.record().legs}
        others = [other for other in self.groups.values() if other is not group and other.is_up]
        remote = [device for device in group.devices if device.remote]
        if remote and (
            legs.get(group.name) is not LegState.UPTODATE
            or any(legs.get(o.name) is LegState.UPTODATE and not o.has_lost_power for o in others)
        ):
            self.agenda.random.choice(remote).lose_power(duration_ns)
            group.has_lost_power = True

    def _calm_down(self) -> None:
        """No more trouble: everything that can come back does."""
        self.agenda.say("calm")
        self.calm = True
        self.store.is_full = False
        self.bitmap_disk.recover()
        if self.manager is not None:
            self.manager.dies_in = None
        for group in self.groups.values():
            for device in group.devices:
                device.recover()
        self.agenda.after(0, self._repair)

    # --- Orders of operators ----------------------------------------------------------------------

    def _make_first_disk(self) -> None:
        if not self.history.cells:
            self._order("create disk")
            self.agenda.after(20 * MILLISECOND_NS, self._make_first_disk)

    def _repair(self) -> None:
        """What an operator does when all trouble is over."""
        if DOMAIN not in self._supervised():
            self._give("start", lambda service: service.start_domain(DOMAIN))
        if self.store.domain(DOMAIN).hold is not None:
            self._order("release")
        if any(leg.state is LegState.OUTDATED for leg in self.record().legs):
            self._order("resync")
        elif self._is_fond_of_the_first and self.record().preferred != self.record().active:
            self._order("failback")
        if not any(disk.ready for disk in self.store.domain(DOMAIN).disks):
            self._order("create disk")
        self.agenda.after(20 * MILLISECOND_NS, self._repair)

    def _supervised(self) -> Sequence[str]:
        return [] if self.manager is None else list(self.manager.service.supervisors)

    def _give(self, what: str, work: Callable[[Service], Awaitable[object]]) -> None:
        if self.manager is not None:
            self.manager.order(what, work)

    def _order(self, kind: str) -> None:
        """Have an operator order something."""
        random = self.agenda.random
        disks = [disk for disk in self.store.domain(DOMAIN).disks if disk.ready]
        name = random.choice(disks).name if disks else "none"
        match kind:
            case "failover":
                target = random.choice(list(self.groups))
                self._give(kind, lambda service: service.fail_over(DOMAIN, target))
            case "accept loss":
                target = random.choice([leg.group for leg in self.record().legs])
                self._give(kind, lambda service: service.fail_over(DOMAIN, target, accept_loss=True))
            case "failback":
                self._give(kind, lambda service: service.fail_back(DOMAIN))
            case "hold":
                self._give(kind, self._hold)
            case "release":
                self._give(kind, self._release)
            case "move":
                self._order_move()
            case "resync":
                self._give(kind, lambda service: service.resync(DOMAIN, None, None))
            case "verify":
                rate = random.choice((None, None, "1M"))
                repair = self.agenda.chance(0.3)
                self._give(kind, lambda service: service.verify(DOMAIN, rate, repair=repair))
            case "create disk":
                if len(disks) < DISKS_MAX:
                    new = f"disk{random.randrange(1000)}"
                    size = random.choice((24, 64, 65, 128)) * 1024 - random.choice((0, 0, 1, 5)) * SECTOR
                    self._give(kind, lambda service: service.create_disk(DOMAIN, new, str(size)))
            case "grow disk":
                size = random.randrange(1, 4 * ALLOCATION_UNIT // SECTOR) * SECTOR
                self._give(kind, lambda service: service.resize_disk(DOMAIN, name, str(size)))
            case "remove disk":
                if len(disks) > 1:
                    self._give(kind, lambda service: service.remove_disk(DOMAIN, name, force=True))
            case "maintenance":
                self._give(kind, self._maintain)
            case _:
                raise AssertionError(kind)

    def _order_move(self) -> None:
        """Have a leg leave, for another group or for none, or another join."""
        random = self.agenda.random
        legs = [leg.group for leg in self.record().legs]
        outside = [name for name in self.groups if name not in legs]
        # A leg just lost is the one whose writes may still land when its space is given back.
        lost = [leg.group for leg in self.record().legs if leg.state is LegState.OUTDATED]
        source = random.choice([self.record().active, *legs, *lost])
        if outside and self.agenda.chance(0.8):
            target = random.choice(outside)
            if self.agenda.chance(0.3):
                self._give("add leg", lambda service: service.add_leg(DOMAIN, target))
            else:
                self._give("move", lambda service: service.migrate(DOMAIN, target, source))
        else:
            self._give("remove leg", lambda service: service.remove_leg(DOMAIN, source))

    async def _hold(self, service: Service) -> None:
        """Hold clients for a while: a snapshot of any leg has to be what clients were promised."""
        await service.hold_domain(DOMAIN, None)
        self.agenda.count("snapshots")
        for group in self._up_to_date():
            self._check_leg(group.name, "clients were held", self.history.floors(), durable=True)
        self._snapshot = {
            (group.name, disk.number): group.content(disk.ranges, 0, space_of(disk.ranges))
            for group in self._up_to_date()
            for disk in self.store.domain(DOMAIN).disks
        }
        self.agenda.after(self.agenda.random.randrange(300) * MILLISECOND_NS, lambda: self._order("release"))

    async def _release(self, service: Service) -> None:
        """Let clients go on. Nothing may have changed on the legs that serve for as long as they were held."""
        if self.store.domain(DOMAIN).hold is not None:
            for group in self._up_to_date():
                for disk in self.store.domain(DOMAIN).disks:
                    before = self._snapshot.get((group.name, disk.number))
                    if before not in (None, group.content(disk.ranges, 0, space_of(disk.ranges))):
                        raise Violation(f"{group.name} has changed while clients were held")
        self._snapshot = {}
        await service.release_domain(DOMAIN)

    async def _maintain(self, service: Service) -> None:
        """Take the domain offline for a while."""
        await service.stop_domain(DOMAIN, force=True)
        await trio.sleep(self.agenda.random.random() / 10)
        await service.start_domain(DOMAIN)

    # --- Rest -------------------------------------------------------------------------------------

    def _is_at_rest(self) -> bool:
        manager, server = self.manager, self.server
        if server is None or manager is None or not manager.is_alive or manager.orders or self._steps > 0:
            return False
        supervisor = manager.service.supervisors.get(DOMAIN)
        domain = self.store.domain(DOMAIN)
        return (
            supervisor is not None
            and supervisor.state() is DomainState.ONLINE
            and domain.migration is None
            and domain.hold is None
            and all(leg.state is LegState.UPTODATE for leg in domain.record.legs)
            and all(disk.ready for disk in domain.disks)
            and not server.is_busy
            and all(client.stream is not None for client in self.clients)
            and server.is_idle
            and all(group.is_quiet for group in self.groups.values())
        )

    # --- Checks -----------------------------------------------------------------------------------

    def _record_changed(self, before: DomainRecord, after: DomainRecord) -> None:
        """A change of the store is durable. Whoever made it goes on, whatever is found."""
        try:
            self._check_change(before, after)
        except Exception as error:
            self.fail(error)

    def _check_change(self, before: DomainRecord, after: DomainRecord) -> None:
        if after.record != before.record:
            self._undecided = False
        if after.record != before.record:
            self._check_transition(before, after)
        if after.hold is None:
            self._snapshot = {}
        if before.session_open and not after.session_open:
            for leg in after.record.legs:
                if leg.state is LegState.UPTODATE:
                    occasion = "the domain was recorded to have ended cleanly"
                    self._check_leg(leg.group, occasion, self.history.floors(), durable=True)
        known = {disk.number: disk for disk in before.disks if disk.ready}
        for disk in after.disks:
            if disk.ready:
                self._check_new_space(disk, known[disk.number].size if disk.number in known else 0)

    def _check_transition(self, before: DomainRecord, after: DomainRecord) -> None:
        """A new record is durable."""
        transition = Transition(before.record, after.record, "")
        if transition.is_failover:
            self.agenda.count("planned switches" if transition.is_planned else "failovers")
            self._wipe_lost(after)
        if transition.is_planned and before.record.attached() == after.record.attached():
            # Nothing was wrong with any leg, so nothing may be under way on any, nor missing from any.
            names = [leg.group for leg in after.record.legs if leg.state is LegState.UPTODATE]
            if self._is_asynchronous:
                names = [before.record.active, after.record.active]
            occasion = f"at the switch from {before.record.active} to {after.record.active} "
            self._check_equal(names, occasion, seen_only=True)
        states = {leg.group: leg.state for leg in before.record.legs}
        kept = {leg.group for leg in after.record.legs}
        for name in states:
            if name not in kept:
                self.agenda.count("legs left")
                if not self.groups[name].is_safe_to_give:
                    raise Violation(f"the space of {name} is given back, and a write can still land there")
        fresh = self.server is not None and not self.server.has_map
        for leg in after.record.legs:
            if leg.group not in states:
                self.agenda.count("legs joined")
                self.groups[leg.group].place(after.runs[leg.group], after.domain.size)
            is_new = states.get(leg.group) is not leg.state
            if leg.state is LegState.OUTDATED and is_new and self.agenda.chance(0.5):
                # An operator who is quick wants it back while old writes can still land there.
                self.agenda.soon(partial(self._order, "resync"), 100 * MILLISECOND_NS)
            if leg.state is not LegState.UPTODATE:
                continue
            if fresh:
                # What was in flight when the server before ended may be on some legs and not on others.
                self._check_synced(leg.group, after.record.active)
            due = transition.is_planned or is_new
            if self._is_asynchronous:
                # One that lags has all there is when it takes over; until then it has what it has.
                due = transition.is_failover and leg.group in (before.record.active, after.record.active)
            if due:
                occasion = f"{leg.group} was recorded up to date"
                self._check_leg(leg.group, occasion, self.history.floors())
                self._check_leg(leg.group, occasion, self.history.flushed, durable=True)
                self._check_synced(leg.group, after.record.active)
            if is_new:
                self.agenda.count("resyncs")
                self.groups[leg.group].has_lost_power = False

    def _wipe_lost(self, domain: DomainRecord) -> None:
        """Put zeroes over all that a failover is said to have lost: whatever was there, nobody relies on it."""
        receipt = domain.last_failover
        if receipt is None or receipt.generation != domain.record.generation or not receipt.lost_bytes:
            return
        self.agenda.count("losses accepted")
        lost = self.store.losses(domain.domain.id)
        disks = {disk.name: disk for disk in domain.disks}
        for one in lost:
            disk = disks[one.disk]
            first, last = one.offset // SECTOR, (one.offset + one.length) // SECTOR
            self.history.wipe(disk.number, first * CELLS_PER_SECTOR, last * CELLS_PER_SECTOR)
            start = 0
            for part in disk.ranges:
                begin, end = max(one.offset, start), min(one.offset + one.length, start + part.length)
                if begin < end:
                    space = Range(part.offset + begin - start, end - begin)
                    self.groups[domain.record.active].wipe(space)
                start += part.length

    def _check_synced(self, name: str, active: str) -> None:
        """An up-to-date leg holds what the active one does, but where writes are under way."""
        if self.groups[name].has_lost_power or self.groups[active].has_lost_power:
            return  # and nobody may have heard of it yet
        busy = self.history.busy()
        for disk in self.store.domain(DOMAIN).disks:
            if not disk.ready:
                continue
            contents = [self.groups[one].content(disk.ranges, 0, disk.size) for one in (name, active)]
            if contents[0] == contents[1]:
                continue
            for cell in range(len(self.history.cells[disk.number])):
                span = slice(cell_offset(cell), cell_offset(cell + 1))
                if contents[0][span] != contents[1][span] and (disk.number, cell) not in busy:
                    raise Violation(
                        f"{name} was recorded up to date, but differs from {active} at byte {span.start} "
                        f"of disk {disk.number}"
                    )

    def _check_equal(self, names: Sequence[str], occasion: str, *, seen_only: bool = False) -> None:
        """These legs hold the same; ``seen_only``: but for what no client can see, which may not be zeroed yet."""
        if any(self.groups[name].has_lost_power for name in names):
            return
        for disk in self.store.domain(DOMAIN).disks:
            if seen_only and not disk.ready:
                continue
            length = disk.size if seen_only else space_of(disk.ranges)
            contents = [self.groups[name].content(disk.ranges, 0, length) for name in names]
            for name, content in zip(names, contents, strict=True):
                if content != contents[0]:
                    place = next(
                        i for i, (a, b) in enumerate(zip(content, contents[0], strict=True)) if a != b
                    )
                    raise Violation(
                        f"{occasion}{name} differs from {names[0]} at byte {place} of disk {disk.number}"
                    )

    def _check_new_space(self, disk: DiskRecord, old_size: int) -> None:
        """What a disk has more from now on must read as zeroes on every leg, also after a loss of power."""
        if disk.size == old_size:
            return
        self.agenda.count("disks grown" if old_size else "disks made")
        for group in self._up_to_date():
            if any(group.content(disk.ranges, old_size, disk.size - old_size, durable=True)):
                raise Violation(f"disk {disk.number} does not durably begin with zeroes on {group.name}")
        self.history.add_cells(disk.number, (disk.size - old_size) // SECTOR * CELLS_PER_SECTOR)

    def _disk(self, number: int) -> DiskRecord | None:
        for disk in self.store.domain(DOMAIN).disks:
            if disk.number == number:
                return disk
        return None

    def _up_to_date(self) -> list[Group]:
        return [self.groups[leg.group] for leg in self.record().legs if leg.state is LegState.UPTODATE]

    def _promised(self) -> list[Group]:
        """Legs that have to have what clients are told at the moment when they are told."""
        return [self.groups[self.record().active]] if self._is_asynchronous else self._up_to_date()

    def _answered(self, operation: Operation, reply: Reply) -> None:
        if self.agenda.is_traced:
            self.agenda.say(f"answer {reply.error} to {operation}")
        disk = self._disk(operation.disk)
        if reply.error:
            if self._rejected_at < operation.asked and disk is not None and not self._is_failing:
                raise Violation(f"a client is told of error {reply.error}: {operation}")
            self.agenda.count("errors told")
            self.history.settle(operation)
            return
        if operation.kind is not Kind.READ and self._undecided:
            raise Violation(f"acknowledged between a decision and its record: {operation}")
        self.history.answer(operation, reply.payload)
        if operation.kind is Kind.FLUSH:
            self._check_legs(operation, self.history.flush_covers(operation), durable=True)
        elif disk is None:
            return  # removed since
        elif operation.kind is Kind.READ:
            self._check_shown(disk, operation, reply.payload)
        elif operation.kind in (Kind.WRITE, Kind.ZERO):
            self._check_acknowledged(disk, operation)
            if operation.durable:
                self.agenda.count("fua")
            if operation.offset % SECTOR or operation.length % SECTOR:
                self.agenda.count("unaligned")

    def _check_shown(self, disk: DiskRecord, read: Operation, data: bytes) -> None:
        """Every leg that is promised to must have what a client was shown: no failover may take it back."""
        for group in self._promised():
            if group.content(disk.ranges, read.offset, read.length) != data:
                # It may have been overwritten already; then it has to be looked at closely.
                self._check_leg(group.name, f"{read} was answered", self.history.shown(read, data))

    def _check_acknowledged(self, disk: DiskRecord, operation: Operation) -> None:
        """Every leg that is promised to must have what was acknowledged."""
        expected = operation.content()
        floors = {
            (disk.number, cell): float(operation.asked) for cell in range(operation.first, operation.last)
        }
        for durable in (False, True) if operation.durable else (False,):
            if any(
                group.content(disk.ranges, operation.offset, operation.length, durable=durable) != expected
                for group in self._promised()
            ):
                # It may have been overwritten already; then it has to be looked at closely.
                self._check_legs(operation, floors, durable=durable)

    def _check_legs(
        self, operation: Operation, floors: dict[tuple[int, int], float], *, durable: bool
    ) -> None:
        for group in self._promised():
            self._check_leg(group.name, f"{operation} was acknowledged", floors, durable=durable)

    def _check_leg(
        self, name: str, occasion: str, floors: dict[tuple[int, int], float], *, durable: bool = False
    ) -> None:
        """Nothing that was over before its cell's floor may be left on a leg, or durably left."""
        if self.groups[name].has_lost_power and not durable:
            return  # and nobody may have heard of it yet
        contents = {
            disk.number: self.groups[name].content(disk.ranges, 0, space_of(disk.ranges), durable=durable)
            for disk in self.store.domain(DOMAIN).disks
            if disk.ready
        }
        for (number, cell), floor in floors.items():
            if number not in contents:
                continue  # removed
            found = contents[number][cell_offset(cell) :][: len(cell_content(0, cell))]
            value = self.history.value_of(number, cell, found)
            if not self.history.is_current(number, cell, value, floor):
                raise Violation(
                    f"{occasion}, but {name} has {'durably ' if durable else ''}only "
                    f"{self.history.operations.get(value, 'zeroes')} at byte {cell_offset(cell)}"
                )

    def _state(self) -> str:
        supervisor = self.manager.service.supervisors.get(DOMAIN) if self.manager is not None else None
        if supervisor is None:
            return "nobody supervises it"
        waiting = (
            [] if self.server is None else [op for s in self.server.streams for op in s.waiting.values()]
        )
        statistics = None if self.server is None else self.server.engine.statistics()
        return (
            f"{supervisor.state()} ({supervisor.trouble()}), {self.record()}, lost {supervisor.lost()}, "
            f"{statistics}, waiting {[str(op) for op in waiting[:3]]}"
        )


class _Listener(logging.Handler):
    """Puts what the shipping code logs into the trace; an exception that it had to catch is a finding."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        """See ``logging.Handler``."""
        self._world.agenda.say(f"{record.name}: {record.getMessage()}")
        if record.exc_info is not None and record.exc_info[1] is not None:
            self._world.fail(record.exc_info[1])
