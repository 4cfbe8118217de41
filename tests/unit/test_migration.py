"""Which step of a move to another group is next, whatever has become of its legs meanwhile."""

import pytest

from proxy.failover import LegRecord, Record
from proxy.migration import Migration, Step, next_step
from proxy.model import LegState

UPTODATE, SYNCING, OUTDATED = LegState.UPTODATE, LegState.SYNCING, LegState.OUTDATED


def record(active: str, **states: LegState) -> Record:
    return Record(5, active, tuple(LegRecord(group, state) for group, state in states.items()))


@pytest.mark.parametrize(
    ("found", "step"),
    [
        (record("a", a=UPTODATE, c=OUTDATED, b=UPTODATE), Step.CONNECT),
        (record("a", a=UPTODATE, c=SYNCING, b=UPTODATE), Step.SYNC),
        (record("a", a=UPTODATE, c=UPTODATE, b=UPTODATE), Step.SWITCH),
        (record("c", a=UPTODATE, c=UPTODATE, b=UPTODATE), Step.DISMISS),
        (record("c", a=OUTDATED, c=UPTODATE, b=UPTODATE), Step.FREE),
        # The source was lost while it was copied from: where clients went, they stay.
        (record("b", a=OUTDATED, c=SYNCING, b=UPTODATE), Step.SYNC),
        (record("b", a=OUTDATED, c=UPTODATE, b=UPTODATE), Step.FREE),
        (record("b", a=SYNCING, c=UPTODATE, b=UPTODATE), Step.DISMISS),
        # The target was lost after the switch: it has to come back before the source may go.
        (record("b", a=UPTODATE, c=OUTDATED, b=UPTODATE), Step.CONNECT),
    ],
)
def test_step_follows_from_the_record(found: Record, step: Step) -> None:
    assert next_step(found, Migration("a", "c", 1.0)) is step


@pytest.mark.parametrize(
    ("found", "step"),
    [
        (record("a", a=UPTODATE, b=UPTODATE), Step.DISMISS),
        (record("a", a=UPTODATE, b=SYNCING), Step.DISMISS),
        (record("a", a=UPTODATE, b=OUTDATED), Step.FREE),
        (record("b", a=OUTDATED, b=UPTODATE), Step.GIVE_UP),
    ],
)
def test_leg_that_leaves_for_none_goes_unless_it_had_to_take_over(found: Record, step: Step) -> None:
    assert next_step(found, Migration("b", None, 1.0)) is step
