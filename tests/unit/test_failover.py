"""The state machine: every row of its table, and what must hold whatever happens in whatever order."""

import errno

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.errors import RefusedError
from proxy.failover import (
    Adopted,
    Change,
    Drained,
    Effect,
    Evidence,
    EvidenceKind,
    FailClients,
    Failover,
    Fence,
    Hold,
    HoldOrdered,
    IllegalTransitionError,
    Input,
    Install,
    Installed,
    LegDismissed,
    LegLost,
    LegRecord,
    LegReturned,
    LossAccepted,
    MakeDurable,
    Ordered,
    PatienceEnded,
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
    legal_inputs,
)
from proxy.model import LegState

UPTODATE, SYNCING, OUTDATED = LegState.UPTODATE, LegState.SYNCING, LegState.OUTDATED
GONE = Evidence(EvidenceKind.LOST, "nbd://one", errno.ECONNRESET)
BEHIND = Evidence(EvidenceKind.BEHIND, "b")
LATE = Evidence(EvidenceKind.DEADLINE, "nbd://one", errno.ETIMEDOUT)
BAD_SECTOR = Evidence(EvidenceKind.ERROR, "nbd://one", errno.EIO)
NOT_MEDIUM = Evidence(EvidenceKind.ERROR, "nbd://one", errno.ENODEV)


def record(active: str = "a", generation: int = 5, **states: LegState) -> Record:
    legs = states or {"a": UPTODATE, "b": UPTODATE}
    return Record(
        generation,
        active,
        tuple(LegRecord(group, state, blocked=state is OUTDATED) for group, state in legs.items()),
    )


def serving(start: Record | None = None) -> Failover:
    """A machine that serves, under the record after ``start``."""
    machine = Failover(start or record())
    machine.receive(Started({}, unclean=False))
    machine.receive(Recorded())
    assert machine.receive(Installed()) == [Release()]
    return machine


def after(machine: Failover, *events: Input) -> list[Effect]:
    """The effects of the last of ``events``."""
    effects: list[Effect] = []
    for event in events:
        effects = machine.receive(event)
    return effects


def states(of: Record) -> dict[str, LegState]:
    return {leg.group: leg.state for leg in of.legs}


def durable(effects: list[Effect]) -> Record:
    """What is to be made durable."""
    (effect,) = [effect for effect in effects if isinstance(effect, MakeDurable)]
    return effect.transition.after


# --- One failover ---------------------------------------------------------------------------------


def test_lost_active_leg_is_held_fenced_recorded_installed_and_released_in_this_order() -> None:
    machine = serving()
    assert machine.receive(LegLost("a", GONE)) == [Hold(("b",)), Fence("a")]
    assert machine.phase is Phase.DRAINING
    effects = machine.receive(Drained())
    assert durable(effects) == record("b", 7, a=OUTDATED, b=UPTODATE)
    assert [type(effect) for effect in effects] == [MakeDurable]
    assert machine.record.generation == 6
    assert machine.receive(Recorded()) == [Install(record("b", 7, a=OUTDATED, b=UPTODATE))]
    assert machine.receive(Installed()) == [Release()]
    assert (machine.phase, machine.is_held) == (Phase.SERVING, False)


def test_ordered_switch_fences_nothing_and_keeps_the_old_leg_as_an_up_to_date_backup() -> None:
    machine = serving()
    assert machine.receive(Ordered("b")) == [Hold(("b",))]
    (effect,) = machine.receive(Drained())
    assert isinstance(effect, MakeDurable)
    assert effect.transition.after == record("b", 7)
    assert effect.transition.reason == "ordered by the operator"
    assert effect.transition.is_planned
    assert after(machine, Recorded(), Installed()) == [Release()]
    assert machine.successor() == "a"


def test_ordered_switch_drops_the_old_leg_when_evidence_comes_before_drained() -> None:
    machine = serving()
    machine.receive(Ordered("b"))
    assert machine.receive(LegLost("a", LATE)) == [Fence("a")]
    (effect,) = machine.receive(Drained())
    assert isinstance(effect, MakeDurable)
    assert effect.transition.after == record("b", 7, a=OUTDATED, b=UPTODATE)
    assert (effect.transition.is_failover, effect.transition.is_planned) == (True, False)
    assert "nbd://one did not answer in time" in effect.transition.reason


def test_ordered_switch_drops_the_old_leg_when_evidence_comes_while_it_is_recorded() -> None:
    machine = serving()
    after(machine, Ordered("b"), Drained(), LegLost("a", GONE))
    effects = machine.receive(Recorded())
    assert effects[0] == Fence("a")
    assert durable(effects) == record("b", 8, a=OUTDATED, b=UPTODATE)


def test_ordered_switch_drops_a_third_leg_lost_on_the_way_and_keeps_the_old_one() -> None:
    machine = serving(record(a=UPTODATE, b=UPTODATE, c=UPTODATE))
    machine.receive(Ordered("b"))
    assert machine.receive(LegLost("c", GONE)) == [Fence("c")]
    assert durable(machine.receive(Drained())) == record("b", 7, a=UPTODATE, b=UPTODATE, c=OUTDATED)


def test_lost_backup_is_dropped_and_the_active_leg_stays() -> None:
    machine = serving()
    assert machine.receive(LegLost("b", GONE)) == [Hold(), Fence("b")]
    effects = machine.receive(Drained())
    assert durable(effects) == record("a", 7, a=UPTODATE, b=OUTDATED)
    (transition,) = [effect.transition for effect in effects if isinstance(effect, MakeDurable)]
    assert not transition.is_failover
    assert "nbd://one lost its connection" in transition.reason


def test_first_leg_in_order_of_preference_takes_over() -> None:
    machine = serving(record(a=UPTODATE, b=OUTDATED, c=SYNCING, d=UPTODATE, e=UPTODATE))
    assert machine.successor() == "d"
    assert durable(after(machine, LegLost("a", GONE), Drained())).active == "d"


def test_second_loss_while_draining_is_part_of_the_same_transition() -> None:
    machine = serving(record(a=UPTODATE, b=UPTODATE, c=UPTODATE))
    machine.receive(LegLost("a", GONE))
    assert machine.receive(LegLost("b", GONE)) == [Fence("b")]
    assert durable(machine.receive(Drained())) == record("c", 7, a=OUTDATED, b=OUTDATED, c=UPTODATE)


def test_same_loss_told_twice_changes_nothing() -> None:
    machine = serving()
    machine.receive(LegLost("a", GONE))
    assert machine.receive(LegLost("a", LATE)) == []
    assert machine.lost == {"a": GONE}


@pytest.mark.parametrize("lost_in", [Phase.RECORDING, Phase.INSTALLING])
def test_loss_of_the_new_active_leg_is_taken_up_before_anything_is_released(lost_in: Phase) -> None:
    machine = serving(record(a=UPTODATE, b=UPTODATE, c=UPTODATE))
    after(machine, LegLost("a", GONE), Drained())
    if lost_in is Phase.RECORDING:
        assert machine.receive(LegLost("b", GONE)) == []
        effects = machine.receive(Recorded())
    else:
        machine.receive(Recorded())
        assert machine.receive(LegLost("b", GONE)) == []
        assert machine.receive(Installed()) == [Hold(("c",)), Fence("b")]
        effects = machine.receive(Drained())
    assert durable(effects) == record("c", 8, a=OUTDATED, b=OUTDATED, c=UPTODATE)
    assert not any(isinstance(effect, Release) for effect in effects)


# --- The store ------------------------------------------------------------------------------------


def test_store_that_refuses_keeps_the_domain_held_until_it_takes() -> None:
    machine = serving()
    after(machine, LegLost("a", GONE), Drained())
    effects = machine.receive(RecordFailed("no space"))
    assert effects == [Stuck("the store cannot be written: no space")]
    assert (machine.phase, machine.is_held) == (Phase.UNRECORDED, True)
    assert durable(machine.receive(RetryRecord())) == record("b", 7, a=OUTDATED, b=UPTODATE)
    assert after(machine, Recorded(), Installed()) == [Release()]


def test_change_that_the_store_refuses_leaves_the_domain_serving_as_before() -> None:
    machine = serving(record(a=UPTODATE, b=OUTDATED))
    machine.receive(Change({"b": SYNCING}, "resync"))
    assert machine.receive(RecordFailed("no space")) == []
    assert (machine.phase, machine.is_held) == (Phase.SERVING, False)
    assert machine.record.generation == 6


def test_leg_fenced_for_a_failover_that_was_never_recorded_is_not_served_from() -> None:
    machine = serving()
    assert machine.receive(LegLost("a", GONE)) == [Hold(("b",)), Fence("a")]
    after(machine, Drained(), RecordFailed("no space"))
    machine.receive(LegLost("b", GONE))
    # The record still says that a is active; but nothing can reach it any more.
    effects = machine.receive(RetryRecord())
    assert [type(effect) for effect in effects] == [Stuck]
    assert machine.phase is Phase.HELD
    assert set(machine.lost) == {"a", "b"}
    assert machine.receive(LegReturned("a"))[0] == Hold(("a", "b"))
    assert durable(machine.receive(Drained())) == record("a", 7, a=UPTODATE, b=OUTDATED)


# --- Nobody left ----------------------------------------------------------------------------------


def test_last_leg_lost_is_held_and_the_record_keeps_it_active() -> None:
    machine = serving(record(a=UPTODATE, b=OUTDATED))
    effects = machine.receive(LegLost("a", GONE))
    assert [type(effect) for effect in effects] == [Hold, Stuck]
    assert machine.phase is Phase.HELD
    assert machine.receive(LegReturned("a")) == [Hold(("a",))]
    assert durable(machine.receive(Drained())) == record("a", 7, a=UPTODATE, b=OUTDATED)


def test_leg_that_is_not_up_to_date_never_takes_over() -> None:
    machine = serving(record(a=UPTODATE, b=SYNCING, c=OUTDATED))
    assert [type(effect) for effect in machine.receive(LegLost("a", GONE))] == [Hold, Stuck]
    assert machine.successor() is None


@pytest.mark.parametrize("returned", ["a", "b"])
def test_whichever_of_two_lost_legs_returns_first_serves(returned: str) -> None:
    machine = serving()
    after(machine, LegLost("a", GONE), LegLost("b", GONE))
    assert machine.phase is Phase.HELD
    machine.receive(LegReturned(returned))
    after_record = durable(machine.receive(Drained()))
    assert after_record.active == returned
    assert sorted(states(after_record).values()) == [OUTDATED, UPTODATE]


def test_late_answer_of_the_only_leg_ends_the_hold() -> None:
    machine = serving(record(a=UPTODATE))
    assert [type(effect) for effect in machine.receive(LegLost("a", LATE))] == [Hold, Stuck]
    assert machine.receive(Drained()) == [Hold(("a",))]
    assert durable(machine.receive(Drained())) == record("a", 7, a=UPTODATE)


def test_late_answer_of_a_leg_that_was_lost_since_ends_nothing() -> None:
    machine = serving(record(a=UPTODATE))
    machine.receive(LegLost("a", LATE))
    machine.receive(LegLost("a", GONE))
    assert machine.receive(Drained()) == []
    assert machine.phase is Phase.HELD


def test_leg_that_was_lost_is_not_taken_for_merely_late() -> None:
    machine = serving(record(a=UPTODATE))
    machine.receive(LegLost("a", GONE))
    machine.receive(LegLost("a", LATE))
    assert machine.receive(Drained()) == []
    assert machine.lost == {"a": GONE}


def test_late_answer_of_a_backup_lets_it_take_over_from_an_active_leg_that_is_gone() -> None:
    machine = serving()
    assert machine.receive(LegLost("a", GONE)) == [Hold(("b",)), Fence("a")]
    assert [type(effect) for effect in machine.receive(LegLost("b", LATE))] == [Stuck]
    assert machine.receive(Drained()) == [Hold(("a", "b"))]
    assert durable(machine.receive(Drained())) == record("b", 7, a=OUTDATED, b=UPTODATE)


# --- Medium errors --------------------------------------------------------------------------------


def test_medium_error_without_another_leg_is_told_to_the_client() -> None:
    machine = serving(record(a=UPTODATE, b=OUTDATED))
    assert machine.receive(LegLost("a", BAD_SECTOR)) == [RejectParked()]
    assert (machine.phase, machine.lost) == (Phase.SERVING, {})


def test_medium_error_with_another_leg_is_a_failover() -> None:
    assert serving().receive(LegLost("a", BAD_SECTOR)) == [Hold(("b",)), Fence("a")]


def test_error_that_is_not_the_mediums_is_never_told_to_the_client() -> None:
    machine = serving(record(a=UPTODATE))
    assert [type(effect) for effect in machine.receive(LegLost("a", NOT_MEDIUM))] == [Hold, Stuck]


def test_medium_error_drops_legs_being_copied_to_before_any_client_is_told() -> None:
    machine = serving(record(a=UPTODATE, b=SYNCING))
    # What is about to be told as failed may have reached b, which would then differ from a for ever.
    assert machine.receive(LegLost("a", BAD_SECTOR)) == [Hold(), Fence("b")]
    assert durable(machine.receive(Drained())) == record("a", 7, a=UPTODATE, b=OUTDATED)
    assert after(machine, Recorded(), Installed()) == [Release()]
    assert machine.receive(LegLost("a", BAD_SECTOR)) == [RejectParked()]


# --- Syncing --------------------------------------------------------------------------------------


def test_sync_goes_by_two_changes_without_a_hold() -> None:
    machine = serving(record(a=UPTODATE, b=OUTDATED))
    effects = machine.receive(Change({"b": SYNCING}, "resync of b"))
    assert effects == [effect for effect in effects if isinstance(effect, MakeDurable)]
    assert durable(effects) == record("a", 7, a=UPTODATE, b=SYNCING)
    assert after(machine, Recorded(), Installed()) == []
    assert durable(machine.receive(Change({"b": UPTODATE}, "b is synced"))) == record("a", 8)
    assert after(machine, Recorded(), Installed()) == []
    assert machine.successor() == "b"


@pytest.mark.parametrize(
    ("before", "wanted"),
    [(OUTDATED, UPTODATE), (UPTODATE, SYNCING), (UPTODATE, OUTDATED), (SYNCING, OUTDATED)],
)
def test_change_heeds_only_the_two_steps_of_a_sync(before: LegState, wanted: LegState) -> None:
    machine = serving(record(a=UPTODATE, b=before))
    assert states(durable(machine.receive(Change({"b": wanted}, "?"))))["b"] is before


def test_leg_lost_while_it_becomes_up_to_date_does_not_take_over() -> None:
    machine = serving(record(a=UPTODATE, b=SYNCING))
    after(machine, Change({"b": UPTODATE}, "b is synced"), LegLost("b", GONE), Recorded())
    assert machine.receive(Installed()) == [Hold(), Fence("b")]
    assert durable(machine.receive(Drained())) == record("a", 8, a=UPTODATE, b=OUTDATED)


def test_failover_while_a_leg_is_syncing_keeps_it_syncing() -> None:
    machine = serving(record(a=UPTODATE, b=UPTODATE, c=SYNCING))
    assert durable(after(machine, LegLost("a", GONE), Drained())) == record(
        "b", 7, a=OUTDATED, b=UPTODATE, c=SYNCING
    )


# --- Orders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "why"),
    [("a", "active already"), ("b", "it is outdated"), ("c", "it is syncing"), ("z", "no leg")],
)
def test_order_that_cannot_be_carried_out_is_refused_and_changes_nothing(target: str, why: str) -> None:
    machine = serving(record(a=UPTODATE, b=OUTDATED, c=SYNCING))
    with pytest.raises(RefusedError, match=why):
        machine.receive(Ordered(target))
    assert (machine.phase, machine.target) == (Phase.SERVING, None)


def test_order_whose_target_is_lost_meanwhile_leaves_the_old_leg_active() -> None:
    machine = serving()
    machine.receive(Ordered("b"))
    assert machine.receive(LegLost("b", GONE)) == [Fence("b")]
    effects = machine.receive(Drained())
    assert durable(effects) == record("a", 7, a=UPTODATE, b=OUTDATED)
    assert Fence("a") not in effects


# --- Starting and adopting ------------------------------------------------------------------------


def test_clean_start_takes_the_record_as_it_is() -> None:
    machine = Failover(record())
    assert durable(machine.receive(Started({}, unclean=False))) == record("a", 6)


def test_unclean_start_syncs_every_backup_again() -> None:
    machine = Failover(record(a=UPTODATE, b=UPTODATE, c=SYNCING, d=OUTDATED))
    after_record = durable(machine.receive(Started({}, unclean=True)))
    assert states(after_record) == {"a": UPTODATE, "b": SYNCING, "c": SYNCING, "d": OUTDATED}


def test_unclean_start_without_the_active_leg_serves_from_one_and_syncs_the_rest() -> None:
    machine = Failover(record(a=UPTODATE, b=UPTODATE, c=UPTODATE))
    effects = machine.receive(Started({"a": GONE}, unclean=True))
    assert durable(effects) == record("b", 6, a=OUTDATED, b=UPTODATE, c=SYNCING)


def test_start_without_any_leg_holds_until_one_returns() -> None:
    machine = Failover(record())
    effects = machine.receive(Started({"a": GONE, "b": GONE}, unclean=True))
    assert [type(effect) for effect in effects] == [Stuck]
    machine.receive(LegReturned("b"))
    assert durable(machine.receive(Drained())) == record("b", 6, a=OUTDATED, b=UPTODATE)


def test_adoption_of_a_server_that_serves_as_recorded_does_nothing() -> None:
    machine = Failover(record())
    assert machine.receive(Adopted({}, frozenset("ab"), held=False, generation=5)) == []
    assert (machine.phase, machine.is_held) == (Phase.SERVING, False)


@pytest.mark.parametrize(
    "found",
    [
        pytest.param(Adopted({}, frozenset("ab"), held=True, generation=5), id="held"),
        pytest.param(Adopted({}, frozenset("ab"), held=False, generation=4), id="older map"),
    ],
)
def test_adoption_of_a_server_in_the_middle_of_something_begins_anew(found: Adopted) -> None:
    machine = Failover(record())
    assert machine.receive(found) == [Hold(("a", "b"))]
    assert durable(machine.receive(Drained())) == record("a", 6)


def test_adoption_fences_what_the_record_does_not_attach() -> None:
    machine = Failover(record("b", a=OUTDATED, b=UPTODATE))
    effects = machine.receive(Adopted({}, frozenset("ab"), held=True, generation=4))
    assert effects == [Hold(("b",)), Fence("a")]


def test_adoption_takes_a_leg_that_is_not_there_for_lost() -> None:
    machine = Failover(record())
    machine.receive(Adopted({}, frozenset("b"), held=True, generation=5))
    assert durable(machine.receive(Drained())) == record("b", 6, a=OUTDATED, b=UPTODATE)


def test_adoption_heeds_what_speaks_against_a_leg() -> None:
    machine = Failover(record())
    assert machine.receive(Adopted({"a": GONE}, frozenset("ab"), held=False, generation=5)) == [
        Hold(("a", "b")),
        Fence("a"),
    ]


# --- Legs that join and leave ---------------------------------------------------------------------


def test_new_leg_joins_outdated_in_its_place_and_the_rest_stays() -> None:
    machine = serving()
    effects = machine.receive(Change({}, "c joins", ("a", "c", "b")))
    assert durable(effects) == record("a", 7, a=UPTODATE, c=OUTDATED, b=UPTODATE)
    assert after(machine, Recorded(), Installed()) == []
    assert machine.record.preferred == "a"


def test_leg_that_is_outdated_can_be_left_out_and_no_other() -> None:
    machine = serving(record(a=UPTODATE, b=OUTDATED, c=SYNCING, d=UPTODATE))
    assert durable(machine.receive(Change({}, "all leave", ("d",)))) == record(
        "a", 7, d=UPTODATE, a=UPTODATE, c=SYNCING
    )


def test_dismissed_leg_is_fenced_when_nothing_runs_on_it_and_recorded_as_outdated() -> None:
    machine = serving()
    assert machine.receive(LegDismissed("b")) == [Hold()]
    effects = machine.receive(Drained())
    assert effects[0] == Fence("b")
    assert durable(effects) == record("a", 7, a=UPTODATE, b=OUTDATED)
    assert after(machine, Recorded(), Installed()) == [Release()]
    assert machine.receive(LegDismissed("b")) == []


def test_dismissed_leg_takes_over_when_the_active_one_is_lost_before_it_is_gone() -> None:
    machine = serving()
    machine.receive(LegDismissed("b"))
    assert machine.receive(LegLost("a", GONE)) == [Fence("a")]
    assert durable(machine.receive(Drained())) == record("b", 7, a=OUTDATED, b=UPTODATE)
    assert after(machine, Recorded(), Installed()) == [Release()]
    assert machine.dismissed is None


def test_dismissed_leg_that_was_fenced_is_not_served_from_though_the_store_refused() -> None:
    machine = serving()
    after(machine, LegDismissed("b"), Drained(), RecordFailed("no space"), LegLost("a", GONE))
    assert [type(effect) for effect in machine.receive(RetryRecord())] == [Stuck]


def test_active_leg_cannot_be_dismissed() -> None:
    machine = serving()
    with pytest.raises(RefusedError, match="a is active"):
        machine.receive(LegDismissed("a"))
    assert (machine.phase, machine.dismissed) == (Phase.SERVING, None)


# --- The operator's hold --------------------------------------------------------------------------


def paused(start: Record | None = None) -> Failover:
    """A machine whose clients the operator has held, under the second record after ``start``."""
    machine = serving(start)
    assert machine.receive(HoldOrdered()) == [Hold(machine.record.attached())]
    assert after(machine, Drained(), Recorded(), Installed()) == []
    assert (machine.phase, machine.is_held) == (Phase.PAUSED, True)
    return machine


def test_operators_hold_ends_with_his_release_only() -> None:
    machine = paused()
    assert machine.receive(ReleaseOrdered()) == [Release()]
    assert (machine.phase, machine.is_held, machine.operator_hold) == (Phase.SERVING, False, False)


def test_leg_lost_in_an_operators_hold_is_failed_over_from_and_nothing_released() -> None:
    machine = paused()
    assert machine.receive(LegLost("a", GONE)) == [Hold(("a", "b")), Fence("a")]
    assert durable(machine.receive(Drained())) == record("b", 8, a=OUTDATED, b=UPTODATE)
    assert after(machine, Recorded(), Installed()) == []
    assert machine.phase is Phase.PAUSED
    assert machine.receive(ReleaseOrdered()) == [Release()]


def test_medium_error_in_an_operators_hold_is_told_to_nobody() -> None:
    # What was parked before the hold may be done well under another map.
    assert [type(effect) for effect in paused(record(a=UPTODATE)).receive(LegLost("a", BAD_SECTOR))] == [
        Hold,
        Stuck,
    ]


def test_release_ordered_while_no_leg_is_left_takes_effect_when_one_returns() -> None:
    machine = paused(record(a=UPTODATE))
    machine.receive(LegLost("a", GONE))
    assert machine.receive(ReleaseOrdered()) == []
    assert machine.phase is Phase.HELD
    assert after(machine, LegReturned("a"), Drained(), Recorded(), Installed()) == [Release()]


@pytest.mark.parametrize(
    "first",
    [
        Started({}, unclean=False),
        Adopted({}, frozenset("ab"), held=False, generation=5),
        Adopted({}, frozenset("ab"), held=True, generation=5),
    ],
)
def test_operators_hold_outlives_manager_and_domain_server(first: Input) -> None:
    machine = Failover(record(), operator_hold=True)
    effects = machine.receive(first)
    if not isinstance(first, Started):
        assert effects == [Hold(("a", "b"))]
        machine.receive(Drained())
    assert after(machine, Recorded(), Installed()) == []
    assert machine.phase is Phase.PAUSED


# --- The table ------------------------------------------------------------------------------------

EVENTS: dict[type[Input], Input] = {
    Started: Started({}, unclean=False),
    Adopted: Adopted({}, frozenset("ab"), held=True, generation=5),
    LegLost: LegLost("a", GONE),
    LegReturned: LegReturned("a"),
    Ordered: Ordered("b"),
    LegDismissed: LegDismissed("b"),
    PatienceEnded: PatienceEnded(),
    HoldOrdered: HoldOrdered(),
    ReleaseOrdered: ReleaseOrdered(),
    Change: Change({}, "disks"),
    Drained: Drained(),
    Recorded: Recorded(),
    RecordFailed: RecordFailed("no space"),
    RetryRecord: RetryRecord(),
    Installed: Installed(),
    LossAccepted: LossAccepted("b", "it has to be"),
}


def in_phase(phase: Phase) -> Failover:
    machine = serving() if phase is not Phase.HELD else Failover(record())
    path: dict[Phase, tuple[Input, ...]] = {
        Phase.SERVING: (),
        Phase.HELD: (),
        Phase.DRAINING: (LegLost("b", GONE),),
        Phase.RECORDING: (LegLost("b", GONE), Drained()),
        Phase.UNRECORDED: (LegLost("b", GONE), Drained(), RecordFailed("no space")),
        Phase.INSTALLING: (LegLost("b", GONE), Drained(), Recorded()),
        Phase.PAUSED: (HoldOrdered(), Drained(), Recorded(), Installed()),
    }
    for event in path[phase]:
        machine.receive(event)
    assert machine.phase is phase
    return machine


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("kind", EVENTS)
def test_input_that_a_phase_does_not_know_raises_and_changes_nothing(phase: Phase, kind: type[Input]) -> None:
    if kind in legal_inputs(phase):
        return
    machine = in_phase(phase)
    before = (machine.record, machine.phase, dict(machine.lost), machine.target, set(machine.fenced))
    with pytest.raises(IllegalTransitionError):
        machine.receive(EVENTS[kind])
    assert before == (machine.record, machine.phase, machine.lost, machine.target, machine.fenced)


@pytest.mark.parametrize("phase", Phase)
def test_every_phase_knows_what_may_come_at_any_time(phase: Phase) -> None:
    assert {LegLost, Drained} <= set(legal_inputs(phase))


def test_evidence_says_what_happened_to_which_device() -> None:
    assert str(GONE).startswith("nbd://one lost its connection (")
    assert str(Evidence(EvidenceKind.UNREACHABLE, "file:///x", detail="no such file")) == (
        "file:///x cannot be used (no such file)"
    )
    assert (BAD_SECTOR.is_medium, NOT_MEDIUM.is_medium, LATE.is_medium) == (True, False, False)


# --- Legs that lag, and losses ---------------------------------------------------------------------


def lagging(*events: Input) -> Failover:
    """An asynchronous domain on a, with b and c as its backups, serving, after these events."""
    machine = Failover(record(a=UPTODATE, b=UPTODATE, c=OUTDATED), asynchronous=True)
    for event in (Started({}, unclean=False), Recorded(), Installed(), *events):
        machine.receive(event)
    return machine


def test_asynchronous_backup_takes_over_when_all_is_drained_to_it() -> None:
    machine = lagging(LegLost("a", GONE), Drained())
    assert machine.phase is Phase.RECORDING
    machine.receive(Recorded())
    assert (machine.record.active, states(machine.record)["a"]) == ("b", OUTDATED)


def test_asynchronous_backup_is_dropped_without_a_hold() -> None:
    for event in (LegLost("b", BEHIND), LegDismissed("b")):
        machine = lagging()
        fence, durable = machine.receive(event)
        assert fence == Fence("b")
        assert isinstance(durable, MakeDurable)
        assert states(durable.transition.after)["b"] is OUTDATED
        machine.receive(Recorded())
        assert not machine.is_held
        assert (machine.receive(Installed()), machine.phase) == ([], Phase.SERVING)


def test_asynchronous_backup_dropped_as_the_active_leg_is_lost_is_not_gone_to() -> None:
    machine = lagging(LegLost("b", BEHIND), LegLost("a", GONE), Recorded())
    hold, stuck = machine.receive(Installed())
    assert (hold, type(stuck), machine.phase) == (Hold(("a",)), Stuck, Phase.HELD)
    assert machine.is_held


def test_asynchronous_backup_that_cannot_be_recorded_as_dropped_holds_the_domain() -> None:
    machine = lagging(LegLost("b", BEHIND))
    assert machine.receive(RecordFailed("disk full")) == [Hold()]
    machine.receive(Drained())
    assert isinstance(machine.receive(RecordFailed("disk full"))[0], Stuck)
    machine.receive(RetryRecord())
    machine.receive(Drained())
    machine.receive(Recorded())
    assert machine.receive(Installed()) == [Release()]


def three_lagging(*events: Input) -> Failover:
    machine = Failover(record(a=UPTODATE, b=UPTODATE, c=UPTODATE), asynchronous=True)
    for event in (Started({}, unclean=False), Recorded(), Installed(), *events):
        machine.receive(event)
    return machine


def test_hold_is_for_the_leg_that_takes_over_to_catch_up() -> None:
    assert three_lagging().receive(LegLost("a", GONE)) == [Hold(("b",)), Fence("a")]
    assert three_lagging().receive(Ordered("c")) == [Hold(("c",))]
    assert three_lagging().receive(HoldOrdered()) == [Hold(("a", "b", "c"))]


def test_another_leg_that_takes_over_after_all_is_to_catch_up_first() -> None:
    again = [Hold(("c",)), Fence("b")]
    assert three_lagging(LegLost("a", GONE)).receive(LegLost("b", GONE)) == again
    machine = three_lagging(LegLost("a", GONE), Drained(), LegLost("b", GONE))
    assert machine.receive(Recorded()) == again
    machine = three_lagging(LegLost("a", GONE), Drained(), RecordFailed("disk full"), LegLost("b", GONE))
    assert machine.receive(RetryRecord()) == again


def test_asynchronous_backup_that_was_lost_is_not_gone_to_though_it_returns() -> None:
    machine = lagging(LegLost("a", GONE), LegLost("b", BEHIND))
    assert machine.phase is Phase.HELD
    assert machine.receive(LegReturned("b")) == []
    assert machine.phase is Phase.HELD
    machine.receive(LegReturned("a"))
    machine.receive(Drained())
    machine.receive(Recorded())
    assert (machine.record.active, states(machine.record)["b"]) == ("a", OUTDATED)


def test_asynchronous_backup_is_not_gone_to_after_a_crash() -> None:
    machine = Failover(record(a=UPTODATE, b=UPTODATE), asynchronous=True)
    machine.receive(Started({"a": GONE}, unclean=True))
    assert machine.phase is Phase.HELD
    machine = Failover(record(a=UPTODATE, b=UPTODATE), asynchronous=True)
    machine.receive(Started({"a": GONE}, unclean=False))
    assert machine.phase is Phase.RECORDING


def test_loss_is_accepted_only_where_nothing_else_is_left() -> None:
    machine = lagging()
    with pytest.raises(RefusedError, match="nothing has to be lost: a is active"):
        machine.check_loss("b")
    machine.receive(LegLost("a", GONE))
    machine.receive(LegLost("b", BEHIND))
    with pytest.raises(RefusedError, match="is no leg"):
        machine.receive(LossAccepted("nobody", "it has to be"))
    with pytest.raises(RefusedError, match="lacks nothing: bring its devices back"):
        machine.receive(LossAccepted("a", "it has to be"))
    machine.receive(LossAccepted("b", "it has to be"))
    assert [type(effect) for effect in machine.receive(Drained())] == [MakeDurable]
    machine.receive(Recorded())
    assert (machine.record.active, states(machine.record)["a"]) == ("b", OUTDATED)
    assert machine.receive(Installed()) == [Release()]


def test_leg_that_a_loss_is_accepted_for_is_lost_itself() -> None:
    machine = lagging(LegLost("a", GONE), LegLost("b", BEHIND), LossAccepted("b", "it has to be"))
    machine.receive(LegLost("b", GONE))
    assert machine.phase is Phase.HELD
    assert machine.record.active == "a"
    machine.receive(LegReturned("a"))
    machine.receive(Drained())
    machine.receive(Recorded())
    assert machine.record.active == "a"


# --- Clients that are told errors -----------------------------------------------------------------------


def held(*events: Input) -> Failover:
    """A domain on a with b as its backup, both lost, after these events."""
    machine = serving()
    for event in (LegLost("a", GONE), LegLost("b", LATE), *events):
        machine.receive(event)
    assert machine.phase is Phase.HELD
    return machine


def test_patience_that_ends_fences_every_leg_before_clients_are_told_errors() -> None:
    machine = held()
    *fences, fail = machine.receive(PatienceEnded())
    assert fences == [Fence("b")]  # a was when it was lost
    assert isinstance(fail, FailClients) and "lost its connection" in fail.reason
    assert machine.failing
    assert machine.receive(PatienceEnded()) == []


def test_leg_that_was_late_when_clients_were_told_errors_is_not_trusted_because_it_answers() -> None:
    machine = held(PatienceEnded())
    assert machine.receive(Drained()) == []
    assert machine.phase is Phase.HELD


@pytest.mark.parametrize("returned", ["a", "b"])
def test_only_the_leg_that_returns_first_counts_after_clients_were_told_errors(returned: str) -> None:
    machine = held(PatienceEnded())
    assert isinstance(machine.receive(LegReturned(returned))[0], Hold)
    assert not machine.failing
    machine.receive(Drained())
    machine.receive(Recorded())
    other = "b" if returned == "a" else "a"
    assert (machine.record.active, states(machine.record)) == (
        returned,
        {returned: UPTODATE, other: OUTDATED},
    )
    assert machine.receive(Installed()) == [Release()]


def test_leg_being_copied_to_is_copied_to_again_after_clients_were_told_errors() -> None:
    machine = serving(record(a=UPTODATE, b=SYNCING))
    machine.receive(LegLost("a", GONE))
    *fences, _ = machine.receive(PatienceEnded())
    assert fences == [Fence("a"), Fence("b")]
    machine.receive(LegReturned("a"))
    machine.receive(Drained())
    machine.receive(Recorded())
    assert states(machine.record) == {"a": UPTODATE, "b": OUTDATED}


def test_operators_hold_has_no_end_of_patience() -> None:
    machine = serving()
    for event in (HoldOrdered(), Drained(), Recorded(), Installed(), LegLost("a", GONE), LegLost("b", GONE)):
        machine.receive(event)
    assert machine.phase is Phase.HELD
    assert machine.receive(PatienceEnded()) == []


# --- Whatever happens -----------------------------------------------------------------------------


class World:
    """The little a driver knows, to check every effect against."""

    def __init__(self, start: Record, first: Input, present: set[str], *, asynchronous: bool) -> None:
        self.machine = Failover(start, asynchronous=asynchronous)
        self.store = start
        self.accepted = ""  # for this group a loss is
        self.lacking: set[str] = (
            set()
        )  # backups that have not all that was acknowledged, whatever the store says
        if isinstance(first, Started) and first.unclean and asynchronous:
            self.lacking = set(GROUPS) - {start.active}
        self.pending: MakeDurable | None = None
        self.open = present
        self.installed = 0
        self.held = True
        self.decided = False  # held, and not recorded since
        self.caught_up = set(GROUPS)  # by the time it is drained
        self.give(first)
        if self.machine.phase is Phase.SERVING:
            self.held, self.installed = False, start.generation  # adopted as it was

    def give(self, event: Input) -> None:
        if (
            isinstance(event, LegLost)
            and event.evidence.kind is not EvidenceKind.DEADLINE
            and self.machine.asynchronous
            and self.installed
            and event.group != self.store.active
        ):
            self.lacking.add(event.group)
        for effect in self.machine.receive(event):
            match effect:
                case Hold(catch_up):
                    self.held = self.decided = True
                    self.caught_up = set(catch_up)
                case Fence(group):
                    self.open.discard(group)
                case MakeDurable(transition):
                    after_record = transition.after
                    assert transition.before == self.store
                    assert after_record.generation == self.store.generation + 1
                    assert after_record.leg(after_record.active).state is UPTODATE
                    if after_record.active == self.accepted:
                        others = {leg.state for leg in after_record.legs if leg.group != self.accepted}
                        assert others <= {OUTDATED}, "a leg that differs is not recorded to"
                    else:
                        assert self.store.leg(after_record.active).state is UPTODATE
                        assert not self.store.leg(after_record.active).blocked
                        assert after_record.active not in self.lacking, (
                            "a leg that lacks something becomes active"
                        )
                        if self.machine.asynchronous and transition.is_failover:
                            assert after_record.active in self.caught_up, "a leg that lags becomes active"
                    assert after_record.active in self.open, "a leg that is fenced becomes active"
                    for group in self.store.attached():
                        if group not in after_record.attached():
                            assert group not in self.open, "recorded as dropped before it was fenced"
                    if effect.transition.is_planned:
                        assert self.store.active in self.open, "a leg that is fenced stays up to date"
                    kept = {leg.group for leg in after_record.legs}
                    assert kept >= set(self.store.attached()), "a leg that takes part is forgotten"
                    for leg in after_record.legs:
                        if leg.group not in states(self.store):
                            assert (leg.state, leg.blocked) == (OUTDATED, True)
                        elif leg.group != after_record.active and leg.state is UPTODATE:
                            assert leg.group not in self.lacking or leg.group not in self.machine.lost
                            assert self.store.leg(leg.group).state in (UPTODATE, SYNCING)
                    self.pending = effect
                case Install(record=wanted):
                    assert wanted == self.store, "installed what is not durable"
                    assert set(wanted.attached()) <= self.open, "installed a leg that is fenced"
                    self.installed = wanted.generation
                case Release():
                    assert not self.decided, "released before it was durable"
                    assert not self.machine.operator_hold, "released although the operator holds"
                    assert self.installed == self.store.generation
                    self.held = False
                case RejectParked():
                    assert not self.held
                case FailClients():
                    assert self.held and not self.machine.operator_hold
                    assert not self.open & set(self.store.attached()), "a leg may still be written to"

    def answer(self, durable: bool) -> None:
        """The store has answered."""
        assert self.pending is not None
        if durable:
            self.store = self.pending.transition.after
            self.decided = False
            self.pending = None
            self.accepted = ""
            self.lacking &= {leg.group for leg in self.store.legs if leg.state is UPTODATE} - {
                self.store.active
            }
            self.give(Recorded())
        else:
            self.pending = None
            self.give(RecordFailed("no space"))


GROUPS = ("a", "b", "c")
leg_states = st.sampled_from([UPTODATE, UPTODATE, SYNCING, OUTDATED])
evidence = st.sampled_from([GONE, LATE, BAD_SECTOR, NOT_MEDIUM])


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_machine_never_breaks_its_promises(data: st.DataObject) -> None:
    start = record(a=UPTODATE, b=data.draw(leg_states), c=data.draw(leg_states))
    attached = set(start.attached())
    lost = {group: GONE for group in sorted(attached) if data.draw(st.booleans())}
    asynchronous = data.draw(st.booleans())
    if data.draw(st.booleans()):
        first = Started(lost, data.draw(st.booleans()))
        world = World(start, first, attached - set(lost), asynchronous=asynchronous)
    else:
        world = World(
            start,
            Adopted(
                {}, frozenset(attached - set(lost)), data.draw(st.booleans()), data.draw(st.integers(4, 5))
            ),
            attached - set(lost),
            asynchronous=asynchronous,
        )
    for _ in range(data.draw(st.integers(0, 25))):
        machine = world.machine
        assert machine.phase is not Phase.SERVING or machine.is_held == world.held
        kinds = [kind for kind in legal_inputs(machine.phase) if kind not in (Started, Adopted)]
        kind = data.draw(st.sampled_from(kinds))
        group = data.draw(st.sampled_from(GROUPS))
        if kind is LegLost:
            world.give(LegLost(group, data.draw(evidence)))
        elif kind is LegReturned:
            if group in machine.lost and machine.can_return(group):
                world.open.add(group)
                world.give(LegReturned(group))
        elif kind is Ordered:
            try:
                world.give(Ordered(group))
            except RefusedError:
                continue
        elif kind is LossAccepted:
            try:
                machine.check_loss(group)
            except RefusedError:
                continue
            world.open.add(group)
            world.accepted = group
            world.give(LossAccepted(group, "it has to be"))
        elif kind is Change:
            wanted = data.draw(leg_states)
            legs = data.draw(st.none() | st.lists(st.sampled_from(GROUPS), unique=True).map(tuple))
            if wanted is SYNCING and states(machine.record).get(group) is OUTDATED:
                world.open.add(group)
            world.give(Change({group: wanted}, "sync", legs))
        elif kind is LegDismissed:
            try:
                world.give(LegDismissed(group))
            except RefusedError:
                continue
        elif kind in (Recorded, RecordFailed):
            world.answer(kind is Recorded)
        else:
            world.give(EVENTS[kind])
