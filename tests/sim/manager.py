"""A simulated manager: the shipping state machine, and a driver that does what ``manager.session`` does.

Its effects are carried out one after the other with a pause before each, so that a crash, or word of another
loss, can come between any two of them; its store takes time, and sometimes refuses.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from proxy.engine import Event, EventKind
from proxy.errors import RefusedError
from proxy.failover import (
    Adopted,
    Change,
    Drained,
    Effect,
    Evidence,
    EvidenceKind,
    Failover,
    Fence,
    Hold,
    HoldOrdered,
    Input,
    Install,
    Installed,
    LegDismissed,
    LegLost,
    LegReturned,
    MakeDurable,
    Ordered,
    Phase,
    Record,
    Recorded,
    RecordFailed,
    RejectParked,
    Release,
    ReleaseOrdered,
    RetryRecord,
    Started,
    Stuck,
    Transition,
)
from proxy.migration import Migration, Step, next_step
from proxy.model import LegState
from tests.sim.agenda import MILLISECOND_NS, Agenda
from tests.sim.history import Violation
from tests.sim.server import Disk, Group, Server

REOPEN_INTERVAL_NS = 40 * MILLISECOND_NS

_EVIDENCE = {
    EventKind.DEVICE_ERROR: EvidenceKind.ERROR,
    EventKind.DEVICE_LOST: EvidenceKind.LOST,
    EventKind.DEADLINE_MISSED: EvidenceKind.DEADLINE,
}


class Store:
    """What survives managers: one record, changed whole or not at all.

    Attributes:
        is_full: it refuses every change.
        session_open: a domain server was started and has not ended cleanly.
        hold: the operator has clients held.
        migration: under way.
    """

    def __init__(self, record: Record, agenda: Agenda, *, changed: Callable[[Transition], None]) -> None:
        self.record = record
        self.is_full = False
        self.session_open = False
        self.hold = False
        self.migration: Migration | None = None
        self._agenda = agenda
        self._changed = changed
        self._pending: tuple[Transition, Callable[[], None]] | None = None

    @property
    def is_writing(self) -> bool:
        """Whether a change is under way."""
        return self._pending is not None

    def write(self, transition: Transition, done: Callable[[bool], None], also: Callable[[], None]) -> None:
        """Make a transition durable after a while, and what ``also`` sets; ``done`` is told whether it is."""
        pending = self._pending = (transition, also)

        def commit() -> None:
            if self._pending is pending:
                self._pending = None
                if not self.is_full:
                    self._commit(*pending)
                done(not self.is_full)

        self._agenda.soon(commit, 3 * MILLISECOND_NS)

    def writer_died(self) -> None:
        """Whoever wrote is gone: what it was writing is durable, or never will be."""
        pending, self._pending = self._pending, None
        if pending is not None and not self.is_full and self._agenda.chance(0.5):
            self._agenda.count("died after the commit")
            self._commit(*pending)

    def _commit(self, transition: Transition, also: Callable[[], None]) -> None:
        assert transition.before == self.record, "a record was written over one it does not follow"
        assert transition.after.generation > self.record.generation
        self._agenda.say(f"durable: {transition.after}")
        self.record = transition.after
        self.session_open = True
        also()
        self._changed(transition)


@dataclass(slots=True, eq=False)
class Leg:
    """A leg opened in the domain server, as ``proxy.manager.legs.Leg``."""

    group: Group
    number: int
    fresh: bool = False
    copying: bool = False
    copied: bool = False
    closing: bool = False
    read_repairs: int = 0


class Manager:
    """One manager from its start to its crash, with the domain server it has.

    Args:
        held: called when the machine has decided, before the domain holds.
        rejected: called when clients are about to be told of an error.
        flushed: called when an operator's hold has been reached, and all is flushed.
        died: called when it has crashed in the middle of its work.
    """

    def __init__(
        self,
        agenda: Agenda,
        store: Store,
        server: Server,
        groups: dict[str, Group],
        disks: list[Disk],
        *,
        held: Callable[[], None],
        rejected: Callable[[], None],
        flushed: Callable[[], None],
        next_number: Callable[[], int],
        died: Callable[[], None],
    ) -> None:
        self.agenda = agenda
        self.store = store
        self.server = server
        self.groups = groups
        self.disks = disks
        self.machine = Failover(store.record, operator_hold=store.hold)
        self.open: dict[str, Leg] = {}
        self.resyncs: set[str] = set()
        self.alive = True
        self.dies_in: int | None = None  # so many steps from now
        self._held = held
        self._rejected = rejected
        self._flushed = flushed
        self._flush_token: int | None = None
        self._flushed_generation = 0
        self._next_number = next_number
        self._died = died
        self._leaving: dict[int, Leg] = {}
        self._suspect: dict[str, None] = {}
        self._told: deque[Event] = deque()
        self._inputs: deque[Input] = deque()
        self._effects: deque[Effect] = deque()
        self._busy = False
        self._with_record: Callable[[], None] = _nothing
        self._hold_number = -1
        self._read_repairs_max = agenda.random.choice((0, 2, 16))
        self._patient = agenda.chance(0.5)  # takes no word while it has something to carry out

    # --- The beginning and the end ----------------------------------------------------------------

    def start(self) -> None:
        """Give a blank domain server its legs and its first map."""
        lost: dict[str, Evidence] = {}
        for name in self.store.record.attached():
            group = self.groups[name]
            assert group.is_quiet, "a domain server was started too early"
            if group.is_up:
                self._open_leg(group)
            else:
                lost[name] = Evidence(EvidenceKind.UNREACHABLE, name)
        unclean = self.store.session_open
        for leg in self.store.record.legs:
            if unclean:
                self._suspect[leg.group] = None
        self._give(Started(lost, unclean))
        self._tick()

    def adopt(self) -> None:
        """Take over a domain server that a manager before had."""
        lost: dict[str, Evidence] = {}
        present = []
        for record in self.store.record.legs:
            self._suspect[record.group] = None  # how it was lost, if it was, is not known to us
        for number, note in list(self.server.legs.items()):
            name = note.group.name
            leg = Leg(note.group, number, copied=note.copied)
            leg.copying = self.server.engine.copy_progress(number) is not None
            if note.fenced:
                self._leaving[number] = leg
                if note.drained:
                    self._drained(number, note.unproven)
                continue
            self.open[name] = leg
            if note.in_map:
                present.append(name)
                del self._suspect[name]
                if note.against is not None:
                    lost[name] = note.against
            elif note.against is not None:
                self._discard(leg)
            else:
                # Opened again and not in use: whether an old write can still land is not known to us.
                leg.fresh = True
                if name in self.store.record.attached():
                    lost[name] = Evidence(EvidenceKind.UNREACHABLE, name, detail="not in use yet")
        self._give(Adopted(lost, frozenset(present), self.server.held, self.server.generation))
        self._tick()

    def crash(self) -> None:
        """Forget everything."""
        self.alive = False
        self.store.writer_died()

    # --- One thing after the other ----------------------------------------------------------------

    def tell(self, event: Event) -> None:
        """The domain server says something; it is heard a little later, in order."""
        self._told.append(event)
        self.agenda.soon(self._hear, MILLISECOND_NS)

    def _hear(self) -> None:
        if self.alive and self._told and not (self._patient and self._busy):
            self._take_event(self._told.popleft())
            self._reconcile()

    def _tick(self) -> None:
        if self.alive:
            if self.machine.phase is Phase.UNRECORDED and not self._busy:
                self._give(RetryRecord())
            while self._told and not (self._patient and self._busy):
                self._take_event(self._told.popleft())
            self._reconcile()
            self.agenda.after(REOPEN_INTERVAL_NS, self._tick)

    def _give(self, event: Input) -> None:
        """Give the machine an input; what follows is carried out by and by."""
        self.agenda.say(f"in: {event} at {self.machine.phase.value}")
        before = self.machine.phase
        self._effects += self.machine.receive(event)
        if self.machine.phase is not before:
            self.agenda.count(f"phase: {self.machine.phase.value}")
        self._go_on()

    def _go_on(self) -> None:
        if self._effects and not self._busy:
            self._busy = True
            self.agenda.soon(self._carry_out_next)

    def _carry_out_next(self) -> None:
        if not self.alive:
            return
        if self.dies_in is not None:
            self.dies_in -= 1
            if self.dies_in < 0:
                if not isinstance(self._effects[0], MakeDurable):
                    self._died()
                    return
                self.agenda.soon(self._died, 3 * MILLISECOND_NS)  # while the store is at it
        effect = self._effects.popleft()
        self.agenda.say(f"out: {effect}")
        answer = self._carry_out(effect)
        if isinstance(effect, MakeDurable):
            return  # the store will answer
        self._done(answer)

    def _done(self, answer: Input | None) -> None:
        if not self.alive:
            return
        self._busy = False
        if answer is not None:
            self._give(answer)
        self._go_on()
        self._reconcile()

    def _carry_out(self, effect: Effect) -> Input | None:
        match effect:
            case Hold():
                self._held()
                self._hold_number = self.server.hold()
            case Fence(group):
                self._fence(group)
            case MakeDurable(transition):
                also, self._with_record = self._with_record, _nothing
                self.store.write(
                    transition,
                    lambda durable: self._done(Recorded() if durable else RecordFailed("full")),
                    also,
                )
            case Install(record):
                legs = [self.open[group].number for group in record.attached()]
                self.server.install(record, legs, self.disks)
                return Installed()
            case Release():
                self.server.release()
            case RejectParked():
                self._rejected()
                self.server.fail_parked()
            case Stuck():
                self.agenda.count("stuck")
        return None

    # --- What the domain server tells -------------------------------------------------------------

    def _take_event(self, event: Event) -> None:
        leg = next((leg for leg in self.open.values() if leg.number == event.leg), None)
        if event.kind in _EVIDENCE:
            if leg is not None:
                self._take_evidence(leg, Evidence(_EVIDENCE[event.kind], leg.group.name, event.code))
        elif event.kind is EventKind.DRAINED:
            # Only the last hold counts, and none that is still to be given.
            if event.a == self._hold_number and not any(isinstance(effect, Hold) for effect in self._effects):
                self._give(Drained())
        elif event.kind is EventKind.LEG_DRAINED:
            self._drained(event.leg, event.a)
        elif event.kind is EventKind.LEG_CLOSED:
            self._leaving.pop(event.leg, None)
        elif event.kind is EventKind.READ_REPAIRED and leg is not None:
            self._take_repair(leg, event.code)
        elif event.kind is EventKind.COPIED and leg is not None:
            leg.copying, leg.copied = False, event.code == 0
        elif event.kind is EventKind.DONE and event.a == self._flush_token:
            self._flush_token = None
            if event.code == 0:
                self._flushed_generation = self.machine.record.generation
                self._flushed()

    def _take_evidence(self, leg: Leg, evidence: Evidence) -> None:
        name = leg.group.name
        in_use = name in self.machine.record.attached() and name not in self.machine.lost
        if leg.fresh and not in_use:
            self._discard(leg)
        else:
            self._give(LegLost(name, evidence))

    def _take_repair(self, leg: Leg, error: int) -> None:
        leg.read_repairs += 1
        if leg.read_repairs > self._read_repairs_max and self.machine.successor() is not None:
            leg.read_repairs = 0
            self.agenda.count("repaired too often")
            self._give(LegLost(leg.group.name, Evidence(EvidenceKind.ERROR, leg.group.name, error)))

    # --- Legs -------------------------------------------------------------------------------------

    def _open_leg(self, group: Group, *, fresh: bool = False) -> None:
        leg = Leg(group, self._next_number(), fresh)
        self.server.open_leg(leg.number, group)
        self.open[group.name] = leg

    def _fence(self, name: str) -> None:
        leg = self.open.pop(name, None)
        if leg is not None:
            self._leaving[leg.number] = leg
            self.server.fence(leg.number)

    def _discard(self, leg: Leg) -> None:
        del self.open[leg.group.name]
        self._leaving[leg.number] = leg
        self._close(leg)

    def _close(self, leg: Leg) -> None:
        if not leg.closing:
            leg.closing = True
            self.server.close_leg(leg.number)

    def _drained(self, number: int, unproven: int) -> None:
        leg = self._leaving.get(number)
        if leg is None:
            return
        if unproven:
            self.agenda.count("unproven")
            self._suspect[leg.group.name] = None
        elif not leg.group.is_quiet and leg.group.name not in self._suspect:
            raise Violation(f"group {leg.group.name} is said to be drained, and a write can still land on it")
        self._close(leg)

    def _trusted(self, leg: Leg) -> bool:
        """Whether no old write can land on a leg any more: those of unknown fate are waited for."""
        if leg.group.name in self._suspect:
            if not leg.group.is_quiet:
                self.agenda.count("quarantined")
                return False
            del self._suspect[leg.group.name]
        return True

    # --- What should be, and is not yet -----------------------------------------------------------

    def _reconcile(self) -> None:
        """Bring lost legs back to a held domain, and sync what is to be synced."""
        if not self.alive or self._busy or self._effects:
            return
        if self.machine.phase is not Phase.PAUSED:
            self._flush_token = None
        if self.machine.phase is Phase.HELD:
            self._reopen_lost()
        elif self.machine.phase is Phase.PAUSED:
            if self._flush_token is None and self._flushed_generation != self.machine.record.generation:
                self._flush_token = self.server.flush()
        elif self.machine.phase is Phase.SERVING:
            self._advance_migration()
            if self.machine.phase is Phase.SERVING:
                self._advance_resyncs()
            if self.machine.phase is Phase.SERVING:
                self._advance_copies()

    def _begin_open(self, name: str, *, spoil: bool) -> None:
        group = self.groups[name]
        if any(leg.group is group for leg in self._leaving.values()) or not group.is_up:
            return
        if not group.is_remote and not group.is_quiet:
            return  # locks of the past are still there
        if spoil and group.is_quiet and self.agenda.chance(0.5):
            self.agenda.say(f"{name} is spoilt")
            self.agenda.count("spoilt")
            group.spoil()
        self._open_leg(group, fresh=True)

    def _reopen_lost(self) -> None:
        for name, evidence in list(self.machine.lost.items()):
            leg = self.open.get(name)
            if leg is None:
                self._begin_open(name, spoil=False)
            elif not leg.fresh:
                if evidence.kind is not EvidenceKind.DEADLINE:
                    self._discard(leg)
            elif self._trusted(leg):
                leg.fresh = False
                self.agenda.count("returned")
                self._give(LegReturned(name))
                return

    def _advance_migration(self) -> None:
        migration = self.store.migration
        if migration is None:
            return
        source, target = migration.source, migration.target
        step = next_step(self.machine.record, migration)
        try:
            match step:
                case Step.CONNECT:
                    assert target is not None
                    self.resyncs.add(target)
                case Step.SWITCH:
                    assert target is not None
                    self._give(Ordered(target))
                case Step.DISMISS:
                    self._give(LegDismissed(source))
                case Step.FREE:
                    self.resyncs.discard(source)
                    if self._is_gone(source):
                        legs = tuple(leg.group for leg in self.machine.record.legs if leg.group != source)
                        self._change_legs(legs, f"{source} has left", None)
                case Step.GIVE_UP if not self.store.is_full:
                    self.store.migration = None
        except RefusedError:
            self.agenda.count("steps refused")
            return
        self.agenda.count(f"migration: {step}")

    def _is_gone(self, name: str) -> bool:
        if name in self.open:
            self._discard(self.open[name])
        if any(leg.group.name == name for leg in self._leaving.values()):
            return False
        return name not in self._suspect or self.groups[name].is_quiet

    def _change_legs(self, legs: tuple[str, ...], reason: str, migration: Migration | None) -> None:
        def also() -> None:
            self.store.migration = migration

        self._with_record = also
        self._give(Change({}, reason, legs))

    def _advance_resyncs(self) -> None:
        for name in sorted(self.resyncs & {leg.group for leg in self.machine.record.legs}):
            leg = self.open.get(name)
            if leg is None:
                self._begin_open(name, spoil=True)
            elif self._trusted(leg):
                self.resyncs.discard(name)
                leg.fresh = False
                self._give(Change({name: LegState.SYNCING}, f"resync of {name}"))
                return

    def _advance_copies(self) -> None:
        for record in self.machine.record.legs:
            leg = self.open.get(record.group)
            if record.state is not LegState.SYNCING or leg is None or leg.copying:
                continue
            if leg.copied:
                leg.copied = False
                self.agenda.count("resyncs")
                self._give(Change({record.group: LegState.UPTODATE}, f"{record.group} is synced"))
                return
            self.server.legs[leg.number].copied = False
            self.server.engine.copy_leg(leg.number, self._copy_ranges())
            leg.copying = True

    def _copy_ranges(self) -> list[tuple[int, int, int]]:
        """All that is allotted, in pieces, so that a copy has several in flight on disks this small."""
        ranges = []
        for disk in self.disks:
            step = self.agenda.random.choice((4096, 16384, 1 << 20))
            for offset in range(0, disk.allotted, step):
                ranges.append((disk.number, offset, min(step, disk.allotted - offset)))
        return ranges

    # --- Orders of an operator --------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether an order can be taken now."""
        return (
            self.alive
            and not self._busy
            and not self._effects
            and self.machine.phase in (Phase.SERVING, Phase.HELD, Phase.PAUSED)
        )

    def order_failover(self, target: str) -> None:
        """Have another leg be active."""
        if self.is_idle and not self.machine.operator_hold:
            try:
                self._give(Ordered(target))
            except RefusedError:
                self.agenda.count("orders refused")
            else:
                self.agenda.count("orders")

    def order_move(self, source: str, target: str | None) -> None:
        """Have a leg leave, for another group or for none."""
        record = self.machine.record
        legs = [leg.group for leg in record.legs]
        if not self.is_idle or self.machine.phase is not Phase.SERVING or source not in legs:
            return
        if self.store.migration is not None or target in legs:
            # Given up, sometimes, which is the only order that is taken now.
            target = self.store.migration.target if self.store.migration is not None else None
            if target is not None and target != record.active and not self.store.is_full:
                self.store.migration = Migration(target, None, 0.0)
            return
        self.agenda.count("orders to move")
        if target is not None:
            self.resyncs.discard(source)
            legs.insert(legs.index(source) + 1, target)
            self._change_legs(tuple(legs), f"{target} joins", Migration(source, target, 0.0))
        elif source != record.active and not self.store.is_full:
            self.resyncs.discard(source)
            self.store.migration = Migration(source, None, 0.0)

    def order_hold(self) -> None:
        """Have clients held at one point of the order of writes."""
        if self.is_idle and self.machine.phase is Phase.SERVING and not self.store.is_full:
            self.agenda.count("operator's holds")
            self.store.hold = True
            if not self.agenda.chance(0.1):
                self._give(HoldOrdered())
            else:
                self._died()  # between the one and the other

    def order_release(self) -> None:
        """Let clients go on."""
        if self.is_idle and self.machine.operator_hold and not self.store.is_full:
            self.store.hold = False
            self._flush_token = None
            self._flushed_generation = 0
            if not self.agenda.chance(0.1):
                self._give(ReleaseOrdered())
            else:
                self._died()

    def order_resync(self, name: str) -> None:
        """Have an outdated leg brought back."""
        leaves = self.store.migration is not None and self.store.migration.source == name
        if (
            self.machine.record.leg(name).state is LegState.OUTDATED
            and self.machine.phase is Phase.SERVING
            and not leaves
        ):
            self.resyncs.add(name)


def _nothing() -> None:
    """What goes into the store with most records."""
