"""Who serves a domain, and what happens when a leg fails: a table, and nothing else. Pure.

The machine is told what has happened (inputs) and says what to do (effects). Its driver, the manager's
supervisor or the simulator, carries effects out in order and tells it when they are done. It never
waits, never fails half-way, and an input that a phase does not know raises and changes nothing.

One failover, in the order that keeps the promise (fence before ack)::

    SERVING --LegLost / Ordered--> DRAINING      Hold, Fence(lost legs)
    DRAINING --Drained-----------> RECORDING     Fence(old active leg), Record
    RECORDING --Recorded---------> INSTALLING    Install
    INSTALLING --Installed-------> SERVING       Release

Losing a backup, a leg that is synced, a new disk: the same path, so there is one to prove right; those
that cannot lose a write skip the hold. When no leg is left to go to, the machine is HELD: clients
wait, nothing is acknowledged, and the active leg of the record stays the one whose content counts.

An operator, or a policy of his, may accept a loss then: a leg that lacks some of what was acknowledged takes over by
the same steps, and every other leg becomes outdated, the old active one too, whose content counts no more.

In an *asynchronous* domain a backup is complete only when all is drained to it, so the Hold of a switch names who is
to have it all; if another one is to take over after all, it is held again for that one. A backup that was lost since,
or whose domain server ended without saying so, lacks what it had yet to get: it is as good as outdated, whatever the
record says, and that it can be reached again changes nothing. That is also why losing a backup, or dismissing it, holds
nobody there: no acknowledgement has ever waited for it.

Nobody need wait for ever: clients may be told errors instead, in HELD, by the domain's policy. What they wrote may be
on any leg then, on some and not on others; so first every leg is fenced, and the one that returns first is the only one
that is not brought up to date again from the dirty bitmap.

An operator's hold takes the same steps too, and ends in PAUSED instead of SERVING: nothing is released until he
says so. What is lost meanwhile is dealt with as ever, but for the release.

A planned switch (Ordered, with nothing against the old active leg when it is recorded) takes the same steps
and fences nothing: the old active leg becomes a backup and stays up to date. That is right because

* it has every write that was ever acknowledged: it was the active leg while they were;
* Drained says that nothing runs. A request that has ended well has ended on every attached leg, so what it
  wrote is on both, and what a read has shown too, since reads wait for the writes they overlap;
* a request that has not ended well is parked, with its claim, and done again whole on all legs of the next
  map before anything that overlaps it; until then nobody can see how far it had come on which leg;
* what parks a request is told as LegLost *before* Drained: the engine puts the evidence, or we had the leg
  fenced, into the same queue before it counts the request as over. Evidence against the old active leg
  makes the switch an unplanned failover, however late it comes before the record; after that it is the
  loss of a backup. (A device whose evidence has been told is silent until the next map is installed or the
  parked requests are rejected; in between the machine has it in ``lost`` or has nothing to switch to.)
"""

import errno
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from types import MappingProxyType

from proxy.errors import RefusedError
from proxy.model import LegState

GroupName = str


class IllegalTransitionError(Exception):
    """An input that the machine's phase does not know: a bug of the driver. Nothing was changed."""


class EvidenceKind(StrEnum):
    """What speaks against a leg."""

    ERROR = "error"  # a device answered with an error
    LOST = "lost"  # the connection to a device is gone
    DEADLINE = "deadline"  # a device has not answered in time
    UNREACHABLE = "unreachable"  # a device could not be opened, or is not the one expected
    BEHIND = "behind"  # it lags by more than is kept for it
    OPERATOR = "operator"


#: Errors of a device that is there and answers: without another leg the client is told, as by any disk.
MEDIUM_ERRORS = frozenset(
    {errno.EIO, errno.EREMOTEIO, errno.EILSEQ, errno.ENODATA, errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
)


@dataclass(frozen=True, slots=True)
class Evidence:
    """One observation against a leg; ``error_number`` is a positive errno or 0, ``device`` a text."""

    kind: EvidenceKind
    device: str = ""
    error_number: int = 0
    detail: str = ""

    @property
    def is_medium(self) -> bool:
        """Whether the device is there and answers, only not with what was asked for."""
        return self.kind is EvidenceKind.ERROR and self.error_number in MEDIUM_ERRORS

    def __str__(self) -> str:
        what = {
            EvidenceKind.ERROR: "answered with an error",
            EvidenceKind.LOST: "lost its connection",
            EvidenceKind.DEADLINE: "did not answer in time",
            EvidenceKind.UNREACHABLE: "cannot be used",
            EvidenceKind.BEHIND: "fell behind",
            EvidenceKind.OPERATOR: "ordered by the operator",
        }[self.kind]
        cause = self.detail or (f"errno {self.error_number}" if self.error_number else "")
        return f"{self.device} {what}".strip() + (f" ({cause})" if cause else "")


@dataclass(frozen=True, slots=True)
class LegRecord:
    """What the store says of one leg. ``blocked``: the domain may not touch it."""

    group: GroupName
    state: LegState
    blocked: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """A domain's connection details: what a failover changes, all of it in one transaction.

    ``legs`` are in order of preference.
    """

    generation: int
    active: GroupName
    legs: tuple[LegRecord, ...]

    def leg(self, group: GroupName) -> LegRecord:
        """The leg on this group; KeyError when there is none."""
        for leg in self.legs:
            if leg.group == group:
                return leg
        raise KeyError(group)

    @property
    def preferred(self) -> GroupName:
        """The leg that is active when all is well: a failback goes there."""
        return self.legs[0].group

    def attached(self) -> tuple[GroupName, ...]:
        """Legs that take part: the active one, backups, and those being copied to."""
        states = (LegState.UPTODATE, LegState.SYNCING)
        return tuple(leg.group for leg in self.legs if leg.state in states and not leg.blocked)


@dataclass(frozen=True, slots=True)
class Transition:
    """From one record to the next. ``is_failover``: the active leg changes."""

    before: Record
    after: Record
    reason: str

    @property
    def is_failover(self) -> bool:
        return self.before.active != self.after.active

    @property
    def is_planned(self) -> bool:
        """Whether the active leg changes although nothing was wrong with it."""
        return self.is_failover and any(
            leg.group == self.before.active and leg.state is LegState.UPTODATE for leg in self.after.legs
        )


class Phase(Enum):
    """Where a domain stands between two records."""

    SERVING = "serving"
    DRAINING = "draining"
    RECORDING = "recording"
    UNRECORDED = "unrecorded"  # the store refused; tried again, and held until it takes
    INSTALLING = "installing"
    HELD = "held"
    PAUSED = "paused"  # as SERVING, but that the operator has clients held


# --- Inputs ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    """A new domain server holds, with the legs that could be opened attached.

    ``unclean``: the one before it ended without saying so; what was in flight then may be on some
    legs and not on others.
    """

    lost: Mapping[GroupName, Evidence]
    unclean: bool


@dataclass(frozen=True, slots=True)
class Adopted:
    """A running domain server was found by a new manager.

    ``present``: legs it has attached; ``generation``: of the map it runs under.
    """

    lost: Mapping[GroupName, Evidence]
    present: frozenset[GroupName]
    held: bool
    generation: int


@dataclass(frozen=True, slots=True)
class LegLost:
    """Something speaks against a leg."""

    group: GroupName
    evidence: Evidence


@dataclass(frozen=True, slots=True)
class LegReturned:
    """A lost leg was opened again, its label is right, and no old write can reach it any more."""

    group: GroupName


@dataclass(frozen=True, slots=True)
class Ordered:
    """Another leg is to be active: the operator, or a policy of his, wants it so."""

    target: GroupName
    reason: str = "ordered by the operator"


@dataclass(frozen=True, slots=True)
class LossAccepted:
    """A leg that lacks something is to be active, because none is left that does not."""

    target: GroupName
    reason: str


@dataclass(frozen=True, slots=True)
class LegDismissed:
    """A backup is to take part no more, although nothing speaks against it."""

    group: GroupName


@dataclass(frozen=True, slots=True)
class PatienceEnded:
    """Clients have waited for a leg for as long as the domain's policy wants them to."""


@dataclass(frozen=True, slots=True)
class HoldOrdered:
    """The operator wants clients held, and all of theirs done: it is reached in phase PAUSED."""


@dataclass(frozen=True, slots=True)
class ReleaseOrdered:
    """The operator has no more reason to have clients held."""


@dataclass(frozen=True, slots=True)
class Change:
    """Leg states to set without a failover; empty when only the disks change.

    Only the two steps of a sync are heeded: outdated to syncing, and syncing to uptodate. A leg
    that was lost meanwhile keeps the state that gave it.

    ``legs``, if given, is the legs there are to be, in order of preference. New ones join outdated; one
    that is left out goes only if it is outdated.
    """

    states: Mapping[GroupName, LegState]
    reason: str
    legs: tuple[GroupName, ...] | None = None


@dataclass(frozen=True, slots=True)
class Drained:
    """After the last Hold: nothing runs any more, and who was to catch up has."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """The transition is durable."""


@dataclass(frozen=True, slots=True)
class RecordFailed:
    """The transition could not be made durable; the store is as before."""

    reason: str


@dataclass(frozen=True, slots=True)
class RetryRecord:
    """It is time to try the store again."""


@dataclass(frozen=True, slots=True)
class Installed:
    """The map of the record's generation is installed."""


Input = (
    Started
    | Adopted
    | LegLost
    | LegReturned
    | Ordered
    | LossAccepted
    | LegDismissed
    | PatienceEnded
    | HoldOrdered
    | ReleaseOrdered
    | Change
    | Drained
    | Recorded
    | RecordFailed
    | RetryRecord
    | Installed
)


# --- Effects --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hold:
    """Admit no request to the devices. Answered by Drained, once those that are to ``catch_up`` owe nothing more."""

    catch_up: tuple[GroupName, ...] = ()


@dataclass(frozen=True, slots=True)
class Fence:
    """Close the gate to a leg for good."""

    group: GroupName


@dataclass(frozen=True, slots=True)
class MakeDurable:
    """Write the transition to the store, in one transaction. Answered by Recorded or RecordFailed."""

    transition: Transition


@dataclass(frozen=True, slots=True)
class Install:
    """Install the map of this record. Answered by Installed."""

    record: Record


@dataclass(frozen=True, slots=True)
class Release:
    """Replay what failed, let in what was held."""


@dataclass(frozen=True, slots=True)
class RejectParked:
    """Tell clients the error that their requests met: no leg can do better."""


@dataclass(frozen=True, slots=True)
class FailClients:
    """Tell clients errors, all that they wait for and all that they ask for, until the next Hold or Release."""

    reason: str


@dataclass(frozen=True, slots=True)
class Stuck:
    """No leg is left to go to, or the store cannot be written: the domain waits."""

    reason: str


Effect = Hold | Fence | MakeDurable | Install | Release | RejectParked | FailClients | Stuck


@dataclass(slots=True)
class Failover:
    """The machine of one domain.

    Args:
        record: as it is in the store.
        asynchronous: backups lag.
        operator_hold: the operator has clients held.
    """

    record: Record
    asynchronous: bool = False
    operator_hold: bool = False
    phase: Phase = Phase.HELD
    lost: dict[GroupName, Evidence] = field(default_factory=dict)
    target: GroupName | None = None
    order_reason: str = ""
    dismissed: GroupName | None = None
    accepted: GroupName | None = None
    failing: bool = False
    fenced: set[GroupName] = field(default_factory=set)
    _held: bool = True
    _transition: Transition | None = None
    _change: Change | None = None
    _resync: bool = False
    _has_served: bool = False
    # Nobody is served from the record's active leg: that a leg was late can be over when it owes nothing any more, and
    # what others have yet to get may be more than what the active leg still has when it returns.
    _awaits_all: bool = True

    def receive(self, event: Input) -> list[Effect]:
        """What to do, in order, now that ``event`` has happened.

        Raises:
            RefusedError: an operator's order that cannot be carried out as things stand.
            IllegalTransitionError: this phase does not know such an input.
        """
        handler = _TABLE.get((self.phase, type(event)))
        if handler is None:
            raise IllegalTransitionError(f"{type(event).__name__} in phase {self.phase.value}")
        return handler(self, event)

    @property
    def is_held(self) -> bool:
        """Whether clients' requests wait."""
        return self._held

    # --- What to aim for --------------------------------------------------------------------------

    def successor(self) -> GroupName | None:
        """The leg that would become active if the present one were lost now; None when none can."""
        for leg in self.record.legs:
            if leg.group != self.record.active and self._usable(leg):
                return leg.group
        return None

    def can_take_over(self, group: GroupName) -> bool:
        """Whether this leg could become active now; KeyError when there is none."""
        return self._usable(self.record.leg(group))

    def _usable(self, leg: LegRecord) -> bool:
        if self.lacks(leg.group):
            return False
        return leg.state is LegState.UPTODATE and not leg.blocked and leg.group not in self.lost

    def _plan(self) -> Transition | None:
        """The next record, given what is lost and what was ordered; None when no leg can be active."""
        before = self.record
        active = before.active
        if self.accepted is not None:
            if self.accepted in self.lost:
                return None
            active = self.accepted
        elif self.target is not None and self._usable(before.leg(self.target)):
            active = self.target
        elif active in self.lost:
            successor = self.successor()
            if successor is None:
                return None
            active = successor
        legs = tuple(self._next_leg(leg, active) for leg in self._wanted_legs())
        return Transition(before, Record(before.generation + 1, active, legs), self._reason(active))

    def _wanted_legs(self) -> tuple[LegRecord, ...]:
        legs = self.record.legs
        wanted = self._change.legs if self._change else None
        if wanted is None:
            return legs
        known = {leg.group: leg for leg in legs}
        kept = [leg for leg in legs if leg.group not in wanted and leg.state is not LegState.OUTDATED]
        joined = [known.get(group, LegRecord(group, LegState.OUTDATED, blocked=True)) for group in wanted]
        return (*joined, *kept)

    def _next_leg(self, leg: LegRecord, active: GroupName) -> LegRecord:
        if leg.group == active:
            return LegRecord(leg.group, LegState.UPTODATE)
        if self.accepted is not None:
            return LegRecord(leg.group, LegState.OUTDATED, blocked=True)
        if leg.state is not LegState.OUTDATED and leg.group in (*self.lost, self.dismissed):
            # It misses, or will miss, what is acknowledged from now on.
            return LegRecord(leg.group, LegState.OUTDATED, blocked=True)
        if self._resync and leg.state is LegState.UPTODATE:
            return LegRecord(leg.group, LegState.SYNCING)
        # One that joins with this change is not there yet.
        wanted = self._change.states.get(leg.group) if self._change and leg in self.record.legs else None
        if wanted is not None and leg.group not in self.lost and (leg.state, wanted) in _SYNC_STEPS:
            return LegRecord(leg.group, wanted)
        return leg

    def _reason(self, active: GroupName) -> str:
        if self.accepted is not None or (active == self.target and self.record.active not in self.lost):
            return self.order_reason
        if self.lost:
            named = self.lost.get(self.record.active)
            return str(named if named is not None else next(iter(self.lost.values())))
        return self._change.reason if self._change else "start"

    # --- Steps ------------------------------------------------------------------------------------

    def _begin(self) -> list[Effect]:
        """Leave for the next record: hold, and fence what is lost; or hold and wait for a leg."""
        self._held = True
        self.failing = False
        transition = self._plan()
        if self.phase is Phase.HELD or transition is None:
            self._awaits_all = True
        if transition is None:
            self.accepted = None
            self.phase = Phase.HELD
            return [self._hold(), Stuck(self._stuck_reason())]
        self.phase = Phase.DRAINING
        # A leg that is dismissed stays open until what is in flight on it is done, so that nothing of it is of
        # unknown fate; and is still there should it have to take over.
        return [
            self._hold(),
            *self._fence(group for group in self._dropped(transition) if group in self.lost),
        ]

    def _leave_behind(self) -> list[Effect]:
        """Leave for a record without what is lost or dismissed, holding if an acknowledgement may depend on it."""
        depends = self._held or not self.asynchronous or self.record.active in self.lost
        return self._begin() if depends else self._record()

    def _begin_again(self) -> list[Effect]:
        """Held and drained, but another leg than was held for may be the next active one by now."""
        return self._begin() if self.asynchronous else self._record()

    def _hold(self) -> Hold:
        if self.operator_hold or self._awaits_all:
            return Hold(self.record.attached())
        transition = self._plan()
        return Hold((transition.after.active,) if transition is not None and transition.is_failover else ())

    def _dropped(self, transition: Transition) -> list[GroupName]:
        attached = transition.after.attached()
        return [group for group in transition.before.attached() if group not in attached]

    def _fence(self, groups: Iterable[GroupName]) -> list[Effect]:
        fresh = [group for group in groups if group not in self.fenced]
        self.fenced.update(fresh)
        return [Fence(group) for group in fresh]

    def _record(self) -> list[Effect]:
        """Nothing runs: what is in flight from here on is only what was never acknowledged."""
        transition = self._plan()
        if transition is None:
            self.accepted = None
            self.phase = Phase.HELD
            return [Stuck(self._stuck_reason())]
        self.phase = Phase.RECORDING
        self._transition = transition
        dropped = self._dropped(transition)
        for group in dropped:
            # Fenced, it is lost to us even if this record should never be durable.
            self.lost.setdefault(group, Evidence(EvidenceKind.OPERATOR))
        return [*self._fence(dropped), MakeDurable(transition)]

    def _stuck_reason(self) -> str:
        return f"no up-to-date leg is left to serve from: {'; '.join(map(str, self.lost.values()))}"

    def _lost_matters(self) -> bool:
        return any(group in self.record.attached() for group in self.lost)

    # --- The table's rows -------------------------------------------------------------------------

    def _on_started(self, event: Started) -> list[Effect]:
        attached = self.record.attached()
        self.lost = {group: evidence for group, evidence in event.lost.items() if group in attached}
        self._resync = event.unclean
        return self._record()

    def _on_adopted(self, event: Adopted) -> list[Effect]:
        self._has_served = True
        attached = self.record.attached()
        self.lost = {group: evidence for group, evidence in event.lost.items() if group in attached}
        missing = [group for group in attached if group not in event.present and group not in self.lost]
        for group in missing:
            self.lost[group] = Evidence(EvidenceKind.UNREACHABLE, group, detail="not attached")
        stale = self._fence(sorted(event.present - set(attached)))
        is_as_recorded = not stale and not self.lost and event.generation == self.record.generation
        if is_as_recorded and not event.held and not self.operator_hold:
            self.phase = Phase.SERVING
            self._held = self._awaits_all = False
            return []
        effects = self._begin()
        return [effects[0], *stale, *effects[1:]]

    def _on_lost_serving(self, event: LegLost) -> list[Effect]:
        if event.group not in self.record.attached():
            return []
        self.lost[event.group] = event.evidence
        if self._plan() is None and all(evidence.is_medium for evidence in self.lost.values()):
            # A write that clients are told has failed may be on legs that are being copied to, behind the
            # copy: they are dropped before anybody is told.
            syncing = [group for group in self.record.attached() if group != self.record.active]
            self.lost = dict.fromkeys(syncing, event.evidence)
            return self._begin() if syncing else [RejectParked()]
        return self._leave_behind()

    def _on_lost_draining(self, event: LegLost) -> list[Effect]:
        if event.group not in (*self.record.attached(), self.accepted) or event.group in self.lost:
            return []
        self.lost[event.group] = event.evidence
        if self._plan() is None:
            self.accepted = None
            self.phase = Phase.HELD
            return [Stuck(self._stuck_reason())]
        # Whom it held for may have been this one.
        return (
            [self._hold(), *self._fence([event.group])] if self.asynchronous else self._fence([event.group])
        )

    def _on_lost_later(self, event: LegLost) -> list[Effect]:
        # A transaction or an install is under way; it is taken up when that is done.
        if event.group in (*self.record.attached(), self.accepted) and event.group not in self.lost:
            self.lost[event.group] = event.evidence
        return []

    def _on_lost_held(self, event: LegLost) -> list[Effect]:
        known = self.lost.get(event.group)
        # Only a leg that was merely late can still get worse.
        if event.group in self.record.attached() and (known is None or known.kind is EvidenceKind.DEADLINE):
            self.lost[event.group] = event.evidence
        return []

    def lacks(self, group: GroupName) -> bool:
        """Whether a leg that the record calls up to date is not, for all that is known."""
        if not self.asynchronous or group == self.record.active:
            return False
        return self._resync or (self._has_served and group in self.lost)

    def can_return(self, group: GroupName) -> bool:
        """Whether it makes a difference that this lost leg can be reached again."""
        return group == self.record.active or not (self.asynchronous and self._has_served)

    def _on_returned(self, event: LegReturned) -> list[Effect]:
        if not self.can_return(event.group):
            return []
        self.lost.pop(event.group, None)
        self.fenced.discard(event.group)
        return [] if self._plan() is None else self._begin()

    def _on_ordered_serving(self, event: Ordered) -> list[Effect]:
        self._check_order(event.target)
        self.target = event.target
        self.order_reason = event.reason
        return self._begin()

    def _on_ordered_held(self, event: Ordered) -> list[Effect]:
        return self._on_ordered_serving(event)

    def _on_loss_accepted(self, event: LossAccepted) -> list[Effect]:
        self.check_loss(event.target)
        self.accepted = event.target
        self.order_reason = event.reason
        self.lost.pop(event.target, None)  # its driver has opened it anew
        self.fenced.discard(event.target)
        return self._begin()

    def check_loss(self, target: GroupName) -> None:
        """Raise RefusedError unless only a loss of data can have this leg, or any, serve."""
        active = self.record.active
        if self.phase is not Phase.HELD or self._plan() is not None:
            raise RefusedError(f"nothing has to be lost: {active} is active, and clients are served from it")
        if target not in {leg.group for leg in self.record.legs}:
            raise RefusedError(f"group {target} is no leg of this domain")
        if target == active:
            raise RefusedError(f"group {target} is active already, and lacks nothing: bring its devices back")

    def _check_order(self, target: GroupName) -> None:
        try:
            leg = self.record.leg(target)
        except KeyError:
            raise RefusedError(f"group {target} is no leg of this domain") from None
        if target == self.record.active:
            raise RefusedError(f"group {target} is active already")
        if target in self.lost:
            raise RefusedError(f"group {target} cannot take over: {self.lost[target]}")
        if not self._usable(leg):
            state = f"{leg.state} and blocked" if leg.blocked else str(leg.state)
            raise RefusedError(f"group {target} cannot take over: it is {state}; only an uptodate leg can")

    def _on_dismissed(self, event: LegDismissed) -> list[Effect]:
        if event.group == self.record.active:
            raise RefusedError(f"group {event.group} is active; make another leg active first")
        if event.group not in self.record.attached():
            return []
        self.dismissed = event.group
        return self._leave_behind()

    def _on_hold_ordered(self, event: HoldOrdered) -> list[Effect]:
        self.operator_hold = True
        return self._begin()

    def _on_patience_ended(self, event: PatienceEnded) -> list[Effect]:
        if self.failing or self.operator_hold:
            return []
        self.failing = True
        attached = self.record.attached()
        for group in attached:
            known = self.lost.get(group)
            # One that is being copied to may have what clients are told has failed, behind the copy; and whose answers
            # are awaited no more is lost whatever comes.
            if known is None or known.kind is EvidenceKind.DEADLINE:
                detail = "clients were told errors" if known is None else "it did not answer in time"
                self.lost[group] = Evidence(
                    EvidenceKind.UNREACHABLE, known.device if known else group, detail=detail
                )
        return [*self._fence(attached), FailClients(self._stuck_reason())]

    def _on_release_ordered(self, event: ReleaseOrdered) -> list[Effect]:
        self.operator_hold = False
        if self.phase is Phase.HELD:
            return []  # for another reason too
        self.phase = Phase.SERVING
        self._held = False
        return [Release()]

    def _on_lost_paused(self, event: LegLost) -> list[Effect]:
        # A medium error is no exception: nobody is waiting for an answer, and what was parked before may be done.
        if event.group not in self.record.attached():
            return []
        self.lost[event.group] = event.evidence
        return self._begin()

    def _on_change(self, event: Change) -> list[Effect]:
        self._change = event
        return self._record()

    def _on_drained(self, event: Drained) -> list[Effect]:
        return self._record()

    def _on_drained_held(self, event: Drained) -> list[Effect]:
        # What was late has answered after all: legs that were only late are as good as their word again.
        late = [
            group
            for group, evidence in self.lost.items()
            if evidence.kind is EvidenceKind.DEADLINE and group not in self.fenced
        ]
        for group in late:
            del self.lost[group]
        return self._begin() if late and self._plan() is not None else []

    def _on_recorded(self, event: Recorded) -> list[Effect]:
        assert self._transition is not None
        self.record = self._transition.after
        self._transition = None
        self._change = None
        self._resync = False
        self.target = None
        self.dismissed = None
        self.accepted = None
        attached = self.record.attached()
        self.lost = {group: evidence for group, evidence in self.lost.items() if group in attached}
        self.fenced &= set(attached)
        if self._held and self.lost:
            return self._begin_again()
        self.phase = Phase.INSTALLING
        return [Install(self.record)]

    def _on_record_failed(self, event: RecordFailed) -> list[Effect]:
        self._transition = None
        self._change = None
        if self._held:
            self.phase = Phase.UNRECORDED
            return [Stuck(f"the store cannot be written: {event.reason}")]
        # Nothing depended on it but the change itself: the domain goes on under its old record.
        self.phase = Phase.SERVING
        return self._begin() if self._lost_matters() else []

    def _on_retry(self, event: RetryRecord) -> list[Effect]:
        return self._begin_again()

    def _on_installed(self, event: Installed) -> list[Effect]:
        self._has_served = True
        self._awaits_all = False
        if self._lost_matters():
            return self._leave_behind()
        if self.operator_hold:
            self.phase = Phase.PAUSED
            return []
        self.phase = Phase.SERVING
        if not self._held:
            return []
        self._held = False
        return [Release()]

    def _nothing(self, event: Input) -> list[Effect]:
        return []


#: Which states a Change may take a leg from and to.
_SYNC_STEPS = frozenset({(LegState.OUTDATED, LegState.SYNCING), (LegState.SYNCING, LegState.UPTODATE)})

_Handler = Callable[..., list[Effect]]

# Rule: everything that moves the machine is a row of this table.
_TABLE: Mapping[tuple[Phase, type[Input]], _Handler] = MappingProxyType(
    {
        (Phase.SERVING, LegLost): Failover._on_lost_serving,
        (Phase.SERVING, Ordered): Failover._on_ordered_serving,
        (Phase.SERVING, LegDismissed): Failover._on_dismissed,
        (Phase.SERVING, HoldOrdered): Failover._on_hold_ordered,
        (Phase.SERVING, Change): Failover._on_change,
        (Phase.SERVING, Drained): Failover._nothing,
        (Phase.DRAINING, LegLost): Failover._on_lost_draining,
        (Phase.DRAINING, Drained): Failover._on_drained,
        (Phase.RECORDING, LegLost): Failover._on_lost_later,
        (Phase.RECORDING, Recorded): Failover._on_recorded,
        (Phase.RECORDING, RecordFailed): Failover._on_record_failed,
        (Phase.RECORDING, Drained): Failover._nothing,
        (Phase.UNRECORDED, LegLost): Failover._on_lost_later,
        (Phase.UNRECORDED, RetryRecord): Failover._on_retry,
        (Phase.UNRECORDED, Drained): Failover._nothing,
        (Phase.INSTALLING, LegLost): Failover._on_lost_later,
        (Phase.INSTALLING, Installed): Failover._on_installed,
        (Phase.INSTALLING, Drained): Failover._nothing,
        (Phase.HELD, Started): Failover._on_started,
        (Phase.HELD, Adopted): Failover._on_adopted,
        (Phase.HELD, LegLost): Failover._on_lost_held,
        (Phase.HELD, LegReturned): Failover._on_returned,
        (Phase.HELD, Ordered): Failover._on_ordered_held,
        (Phase.HELD, LossAccepted): Failover._on_loss_accepted,
        (Phase.HELD, PatienceEnded): Failover._on_patience_ended,
        (Phase.HELD, ReleaseOrdered): Failover._on_release_ordered,
        (Phase.HELD, Drained): Failover._on_drained_held,
        (Phase.PAUSED, LegLost): Failover._on_lost_paused,
        (Phase.PAUSED, ReleaseOrdered): Failover._on_release_ordered,
        (Phase.PAUSED, Drained): Failover._nothing,
    }
)


def legal_inputs(phase: Phase) -> Sequence[type[Input]]:
    """What may happen in a phase; for drivers and tests."""
    return [kind for at, kind in _TABLE if at is phase]
