"""The shapes of the manager's answers, as far as the command line looks into them. Sizes are in bytes."""

from typing import Any, NotRequired, TypedDict


class DeviceObject(TypedDict):
    """A device of a group or of a leg; counters only of a leg that is open."""

    position: int
    url: str
    size: int
    errors: NotRequired[int]
    read_repairs: NotRequired[int]
    in_flight: NotRequired[int]
    lost: NotRequired[bool]


class GroupObject(TypedDict):
    """A group; ``free`` is what domains have not taken of ``size``."""

    name: str
    uuid: str
    layout: str
    size: int
    free: int
    domains: list[str]
    devices: list[DeviceObject]


class ExtentObject(TypedDict):
    """A run of domain bytes and where it lies; ``device`` is a position in the group."""

    offset: int
    length: int
    device: int
    device_offset: int


class SyncObject(TypedDict):
    """How far a leg's sync has come; ``rate`` in bytes a second, None before it has begun."""

    copied: int
    total: int
    rate: int | None
    seconds_left: float | None


class LagObject(TypedDict):
    """What at most would be lost if a backup had to take over as it is; ``seconds`` is None where nobody knows."""

    bytes: int
    seconds: float | None


class LegSummary(TypedDict):
    """A leg in a list of domains."""

    group: str
    role: str
    state: str
    blocked: bool


class LegObject(LegSummary):
    """A leg; ``extents`` are the first of ``extent_count``."""

    reason: str | None
    dirty_bytes: int
    lag: LagObject | None
    sync: SyncObject | None
    devices: list[DeviceObject]
    extent_count: int
    extents: list[ExtentObject]


# By calls, because ``from`` is a keyword.
FailoverObject = TypedDict(
    "FailoverObject",
    {
        "at": str,
        "reason": str,
        "planned": bool,
        "stall_ms": float | None,
        "from": str,
        "to": str,
        "replayed": int | None,
        "generation": int,
        "lost_bytes": int,
    },
)
MigrationObject = TypedDict(
    "MigrationObject",
    {"at": str, "from": str, "to": str | None, "step": str, "sync": SyncObject | None, "trouble": str},
)
PlanObject = TypedDict(
    "PlanObject", {"domain": str, "from": str, "to": str, "before": LegObject, "after": LegObject}
)


class HoldObject(TypedDict):
    """Since when the operator has clients held, and until when."""

    at: str
    until: str | None


class LossObject(TypedDict):
    """Bytes of a disk that may be older than what clients were told is written."""

    disk: str
    offset: int
    length: int


class DiskObject(TypedDict):
    """A disk and the addresses it is reached at."""

    domain: str
    name: str
    size: int
    clients: int
    nbd_uri: str
    nbd_tcp_uri: str | None
    path: NotRequired[str]


class DomainSummary(TypedDict):
    """A domain in a list; ``disks`` is their number."""

    name: str
    state: str
    size: int
    map_generation: int
    active: str
    legs: list[LegSummary]
    disks: int


class VerifyObject(TypedDict):
    """How far a verify has come; ``rate`` in bytes a second, None before it has begun."""

    repair: bool
    total: int
    compared: int
    mismatched: int
    repaired: int
    unreadable: int
    seconds: float
    rate: int | None
    seconds_left: float | None


class MismatchObject(TypedDict):
    """Bytes of a disk in which the leg on ``group`` differed from the active one."""

    group: str
    disk: str
    offset: int
    length: int


class LastVerifyObject(TypedDict):
    """What the last verify found; ``mismatches`` are what was listed, the bytes of others are ``unlisted``."""

    at: str
    outcome: str
    seconds: float
    repair: bool
    total: int
    compared: int
    mismatched: int
    repaired: int
    unreadable: int
    unlisted: int
    mismatches: list[MismatchObject]


class DomainObject(TypedDict):
    """A domain; ``version`` is what a long poll for its next change begins from."""

    name: str
    uuid: str
    state: str
    size: int
    map_generation: int
    active: str
    replication: str
    failback: str
    accept_loss: str
    no_leg: str
    hold: HoldObject | None
    migration: MigrationObject | None
    address: str
    listen: str | None
    trouble: str
    legs: list[LegObject]
    rpo: LagObject | None
    clients: int
    disks: list[DiskObject]
    statistics: dict[str, Any] | None
    marked_bytes: int | None
    last_failover: FailoverObject | None
    verify: VerifyObject | None
    last_verify: LastVerifyObject | None
    version: NotRequired[int]


class StatusObject(TypedDict):
    """The manager and its domains."""

    ready: bool
    pid: int
    run: str
    domains: list[DomainSummary]
    last_event: int


class EventObject(TypedDict):
    """Something that happened."""

    id: int
    at: str
    severity: str
    domain: str | None
    kind: str
    message: str
