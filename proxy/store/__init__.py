"""What survives: groups, domains, disks, who is active, and what happened.

The manager alone writes it. Every change of a map generation is one transaction, durable when the
call returns; a call that raises has changed nothing. Calls block for as long as the disk takes, a few
milliseconds, on purpose: what a caller reads and writes between two awaits cannot be interleaved
with another operator's, and a failover waits for its record in any case.

``Store`` is the contract, ``sqlite.SqliteStore`` the implementation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol
from uuid import UUID

from proxy.extentmap import Range, Run
from proxy.failover import Record
from proxy.migration import Migration
from proxy.model import (
    MANUAL,
    Delay,
    Desired,
    Domain,
    DomainId,
    Event,
    FailoverReceipt,
    Group,
    GroupId,
    Layout,
    LostRange,
    OperatorHold,
    Replication,
    Severity,
    VerifyReceipt,
)


@dataclass(frozen=True, slots=True)
class NewDevice:
    """A device of a group about to be made; sizes in bytes."""

    uuid: UUID
    size: int
    data_offset: int
    url: str


@dataclass(frozen=True, slots=True)
class DiskRecord:
    """A disk: ``size`` bytes as asked for, in ``ranges`` of the domain that hold at least as many.

    ``number`` names it to the engine and is never used again within the domain. A disk is not
    ``ready``, and shown to nobody, until its space reads as zeroes on every leg.
    """

    number: int
    name: str
    size: int
    ranges: tuple[Range, ...]
    ready: bool


@dataclass(frozen=True, slots=True)
class DomainRecord:
    """Everything the store knows of one domain.

    ``session_open``: a domain server was started and has not ended cleanly, so the legs may differ
    in what was in flight when it ended. ``session`` is the number of that server; 0: there was none yet.
    """

    domain: Domain
    desired: Desired
    session_open: bool
    session: int
    record: Record
    runs: Mapping[str, tuple[Run, ...]]  # by group
    disks: tuple[DiskRecord, ...]
    last_failover: FailoverReceipt | None
    last_verify: VerifyReceipt | None
    hold: OperatorHold | None = None
    migration: Migration | None = None


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event about to be recorded."""

    severity: Severity
    kind: str
    message: str
    domain: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """A domain's next state, recorded in one transaction; what is None stays as it is.

    ``runs``: the space of legs that are in ``record`` and were not before. A leg that is not in it any
    more has lost its space.
    """

    record: Record | None = None
    runs: Mapping[str, Sequence[Run]] = field(default_factory=dict)
    migration: Migration | None = None
    end_migration: bool = False
    session_open: bool | None = None
    session: int | None = None
    desired: Desired | None = None
    failback: Delay | None = None
    accept_loss: Delay | None = None
    no_leg: Delay | None = None
    hold: OperatorHold | None = None
    release: bool = False  # end the operator's hold
    failover: FailoverReceipt | None = None
    lost: Sequence[LostRange] = ()  # by that failover
    verify: VerifyReceipt | None = None
    add_disk: DiskRecord | None = None
    ready_disk: int | None = None
    resize_disk: DiskRecord | None = None
    remove_disk: int | None = None
    events: Sequence[NewEvent] = field(default=())


class Store(Protocol):
    """The contract. Every method raises StoreError when the disk does not do its part."""

    def groups(self) -> list[Group]:
        """All groups, by name."""
        ...

    def group(self, name: str) -> Group:
        """One group; NotFoundError."""
        ...

    def add_group(
        self, name: str, uuid: UUID, layout: Layout, devices: Sequence[NewDevice], at: float
    ) -> Group:
        """Record a group; RefusedError when the name is taken."""
        ...

    def label_generations(self, group: GroupId) -> tuple[int, int]:
        """Of the labels of a group's devices: the newest that certainly is there, and the newest that may be."""
        ...

    def set_label_generations(self, group: GroupId, labelled: int, generation: int) -> None:
        """Record the two, durably."""
        ...

    def remove_group(self, name: str, at: float) -> None:
        """Forget a group; RefusedError while a domain has a leg on it."""
        ...

    def taken(self, group: str) -> list[Run]:
        """The space of a group that domains have."""
        ...

    def domains(self) -> list[DomainRecord]:
        """All domains, by name."""
        ...

    def domain(self, name: str) -> DomainRecord:
        """One domain; NotFoundError."""
        ...

    def add_domain(
        self,
        name: str,
        uuid: UUID,
        size: int,
        replication: Replication,
        listen: str,
        record: Record,
        runs: Mapping[str, Sequence[Run]],
        at: float,
        *,
        failback: Delay = MANUAL,
        accept_loss: Delay = MANUAL,
        no_leg: Delay = MANUAL,
    ) -> DomainRecord:
        """Record a domain with its space on every leg; RefusedError when the name is taken."""
        ...

    def remove_domain(self, name: str, at: float) -> None:
        """Forget a domain and free its space."""
        ...

    def change(self, domain: DomainId, change: Change, at: float) -> None:
        """Apply a change, whole, durably."""
        ...

    def settle_failover(self, domain: DomainId, generation: int, stall_ms: float, replayed: int) -> None:
        """Add to a failover's receipt what clients felt of it."""
        ...

    def losses(self, domain: DomainId) -> list[LostRange]:
        """What the last failover that has lost anything has lost, by disk and offset."""
        ...

    def next_disk_number(self, domain: DomainId) -> int:
        """A number no disk of the domain has or ever had."""
        ...

    def add_events(self, events: Sequence[NewEvent], at: float) -> None:
        """Record events that go with no other change."""
        ...

    def events(self, after: int, limit: int) -> list[Event]:
        """Up to ``limit`` events with ids above ``after``, oldest first."""
        ...

    def last_event_id(self) -> int:
        """The id of the newest event; 0 when there is none."""
        ...

    def close(self) -> None:
        """Let go of the files."""
        ...
