"""How a domain moves from one group to another while clients write: which step is next. Pure.

What is recorded of a migration is from which group to which; how far it has come follows from the domain's
record. So whoever finds one, after a crash of anybody at any point, goes on with it by the same function::

    the target joins as an outdated leg          the first record: its space is allotted
    CONNECT   it is opened and begins to sync    SYNC    it is copied to
    SWITCH    it becomes active, if the source is: a planned switch, which keeps the source as a backup
    DISMISS   the source takes part no more      FREE    it is forgotten, and its space free

A migration without a target is a leg that leaves.
"""

from dataclasses import dataclass
from enum import StrEnum

from proxy.failover import Record
from proxy.model import LegState


@dataclass(frozen=True, slots=True)
class Migration:
    """From the leg on one group to another, or to none; ``at`` is when it began, in seconds since the epoch."""

    source: str
    target: str | None
    at: float


class Step(StrEnum):
    """What is to be done, or waited for."""

    CONNECT = "connecting"
    SYNC = "syncing"
    SWITCH = "switching"
    DISMISS = "dropping"
    FREE = "freeing"
    GIVE_UP = "giving up"  # the leg that is to leave had to take over


def next_step(record: Record, migration: Migration) -> Step:
    """The step that follows from how things stand. Whichever group is a leg may have changed its state since."""
    source, target = migration.source, migration.target
    if target is not None:
        state = record.leg(target).state
        if state is not LegState.UPTODATE:
            return Step.SYNC if state is LegState.SYNCING else Step.CONNECT
        if source == record.active:
            return Step.SWITCH
    elif source == record.active:
        return Step.GIVE_UP
    return Step.DISMISS if source in record.attached() else Step.FREE
