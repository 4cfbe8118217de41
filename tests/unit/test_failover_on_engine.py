"""The machine that decides and the engine that carries out, together: what one takes the other's word for."""

import errno
from dataclasses import dataclass, field

from proxy.engine import EventKind, LegRole, OpKind
from proxy.failover import (
    Adopted,
    Drained,
    Evidence,
    EvidenceKind,
    Failover,
    Fence,
    Hold,
    Input,
    Install,
    Installed,
    LegLost,
    LegRecord,
    LegReturned,
    MakeDurable,
    Phase,
    Record,
    Recorded,
    RejectParked,
    Release,
    Started,
)
from proxy.model import LegState
from tests.sim.rig import DEADLINE_NS, Rig, new_engine, pattern

BLOCK = 4096
SIZE = 64 * 1024
PROBE_S = 0.5
DEADLINE_S = DEADLINE_NS / 1e9
LOOK_NS = 60_000_000
EVIDENCE = {
    EventKind.DEVICE_ERROR: EvidenceKind.ERROR,
    EventKind.DEADLINE_MISSED: EvidenceKind.DEADLINE,
    EventKind.DEVICE_LOST: EvidenceKind.LOST,
    EventKind.LEG_BEHIND: EvidenceKind.BEHIND,
}


@dataclass(slots=True)
class Driver:
    """What the session does, with a store that takes everything; ``numbers`` are the engine's of the legs."""

    machine: Failover
    numbers: dict[str, int]
    backlog: int = 0
    rig: Rig = field(default_factory=lambda: Rig(new_engine(probe_ns=round(PROBE_S * 1e9))))
    hold: int = -1

    def serve(self) -> None:
        """Add the legs, all of one content, and begin to serve."""
        for number in self.numbers.values():
            self.rig.add_leg(number, (SIZE,)).fill(pattern(SIZE))
        if self.backlog:
            self.rig.open_bitmap(SIZE)
        self.feed(Started({}, unclean=False))
        self.pump()

    def feed(self, event: Input) -> None:
        inputs = [event]
        while inputs:
            for effect in self.machine.receive(inputs.pop(0)):
                match effect:
                    case Hold(catch_up):
                        self.hold = self.rig.engine.hold([self.numbers[group] for group in catch_up])
                    case Fence(group):
                        self.rig.engine.fence_leg(self.numbers[group])
                    case MakeDurable():
                        inputs.append(Recorded())
                    case Install(record):
                        self._install(record)
                        inputs.append(Installed())
                    case Release():
                        self.rig.engine.release()
                    case RejectParked():
                        self.rig.engine.fail_parked()

    def _install(self, record: Record) -> None:
        legs = []
        for group in sorted(record.attached(), key=lambda group: group != record.active):
            syncing = record.leg(group).state is LegState.SYNCING
            backup = LegRole.SYNCING if syncing else LegRole.BACKUP
            legs.append((self.numbers[group], LegRole.ACTIVE if group == record.active else backup))
        self.rig.install(*legs, backlog=self.backlog)

    def pump(self) -> None:
        """Run until only devices are left to act, and have the machine told of what the engine tells."""
        groups = {number: group for group, number in self.numbers.items()}
        while True:
            self.rig.pump()
            events = self.rig.take_events(EventKind.DRAINED, *EVIDENCE)
            if not events:
                return
            for event in events:
                if event.kind is EventKind.DRAINED:
                    if event.a == self.hold:
                        self.feed(Drained())
                elif groups[event.leg] in self.machine.record.attached():
                    evidence = Evidence(EVIDENCE[event.kind], error_number=event.code)
                    self.feed(LegLost(groups[event.leg], evidence))

    def pass_time(self, seconds: float) -> None:
        end_ns = self.rig.engine.now_ns + round(seconds * 1e9)
        while self.rig.engine.now_ns < end_ns:
            self.rig.engine.now_ns += LOOK_NS
            self.pump()

    def acknowledge(self, data: bytes) -> None:
        """A client's write is done on the leg numbered 1, and answered."""
        client = self.rig.connect()
        cookie = client.write(0, data)
        assert self.rig.bitmap is not None
        self.rig.pump()
        while ops := [*self.rig.file_ops(1), *self.rig.bitmap_ops()]:
            for op in ops:
                self.rig.carry_out(op)
            self.rig.pump()
        assert client.error(cookie) == 0


def driver(states: dict[str, LegState], *, backlog: int = 0) -> Driver:
    legs = tuple(LegRecord(group, state) for group, state in states.items())
    machine = Failover(Record(1, next(iter(states)), legs), asynchronous=backlog > 0)
    made = Driver(machine, {group: number for number, group in enumerate(states, 1)}, backlog)
    made.serve()
    return made


def test_idle_domain_whose_only_leg_hangs_is_held_once_until_that_answers() -> None:
    made = driver({"a": LegState.UPTODATE})
    before = made.machine.record.generation
    made.pass_time(PROBE_S + DEADLINE_S + 10)
    assert (made.machine.phase, made.machine.record.generation) == (Phase.HELD, before)
    made.rig.run()
    made.pump()
    assert made.machine.phase is Phase.SERVING


def test_leg_known_to_hang_does_not_take_over_while_the_other_can_return() -> None:
    made = driver({"a": LegState.UPTODATE, "b": LegState.UPTODATE})
    made.pass_time(PROBE_S + 0.1)
    made.pass_time(DEADLINE_S + 0.2)
    assert (made.machine.phase, made.machine.record.active) == (Phase.HELD, "a")
    assert made.rig.file_ops(2), "b does not answer"


def test_leg_whose_backlog_hangs_is_not_taken_for_one_that_was_merely_late() -> None:
    made = driver({"a": LegState.UPTODATE, "b": LegState.UPTODATE}, backlog=SIZE)
    made.acknowledge(pattern(BLOCK, 5))
    made.rig.connect().read(0, BLOCK)
    made.rig.pump()
    for _ in range(10):  # nobody listens, and both hang
        made.rig.pass_time(DEADLINE_S / 4)
    assert {event.leg for event in made.rig.take_events(EventKind.DEADLINE_MISSED)} == {1, 2}
    made.machine = Failover(made.machine.record, asynchronous=True)
    late = {group: Evidence(EvidenceKind.DEADLINE) for group in "ab"}
    made.feed(Adopted(late, frozenset("ab"), False, made.machine.record.generation))
    made.pump()
    for op in made.rig.file_ops(1):
        made.rig.fail(op, errno.ENODEV)
    made.feed(LegLost("a", Evidence(EvidenceKind.LOST)))
    made.pass_time(30)
    assert made.machine.phase is Phase.HELD  # where a is opened again, which lacks nothing
    assert "b" in made.machine.lost


def test_leg_that_is_copied_to_equals_the_active_one_that_came_back_with_less() -> None:
    made = driver({"a": LegState.UPTODATE, "c": LegState.SYNCING}, backlog=SIZE)
    rig = made.rig
    made.acknowledge(pattern(BLOCK, 5))
    (ship,) = [op for op in rig.file_ops(2) if op.kind is OpKind.WRITE]
    made.feed(LegLost("a", Evidence(EvidenceKind.LOST)))
    made.pump()
    assert made.machine.phase is Phase.HELD
    rig.engine.close_leg(1)
    rig.pump()
    rig.add_leg(3, (SIZE,)).fill(pattern(SIZE))  # a, which has lost what it had not flushed
    made.numbers["a"] = 3
    made.feed(LegReturned("a"))
    made.pump()
    assert made.machine.is_held  # what is on its way to c is of the a before
    rig.carry_out(ship)
    made.pump()
    assert not made.machine.is_held
    rig.engine.copy_leg(2, [(0, 0, SIZE)])
    rig.run()
    (copied,) = rig.take_events(EventKind.COPIED)
    assert copied.code == 0
    assert rig.legs[2].read(0, SIZE) == rig.legs[3].read(0, SIZE)
