"""The vocabulary as types: one word, one meaning. Pure and immutable.

``Domain`` holds what never changes in a failover: name, size, address. Who is active, each leg's
state and the map generation are ``proxy.failover.Record``; a failover touches that alone.
"""

import math
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import NewType
from uuid import UUID

from proxy.errors import InvalidError
from proxy.sizes import MIB, format_size, parse_size

GroupId = NewType("GroupId", int)
DeviceId = NewType("DeviceId", int)
DomainId = NewType("DomainId", int)

#: One active leg and three backups: each further leg costs every write once more.
LEGS_MAX = 4

#: What every device's I/O is rounded to at most; a device with larger sectors is refused.
BLOCK_SIZE_MAX = 4096

#: Space is allotted in multiples of this, so that no extent ever splits a block of any device.
ALLOCATION_UNIT = 64 * 1024

#: 30 days: whoever would wait longer than that for something says ``manual``.
DELAY_MAX_S = 30 * 24 * 3600

#: Of a striped group that names none: large enough that most requests touch one device.
CHUNK_DEFAULT = MIB

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class LayoutKind(StrEnum):
    """How a group spreads a domain over its devices."""

    LINEAR = "linear"
    STRIPED = "striped"


class Replication(StrEnum):
    """Whether a write's acknowledgement waits for the backups."""

    SYNC = "sync"
    ASYNC = "async"


class Role(StrEnum):
    """What a leg is for: never both."""

    ACTIVE = "active"
    BACKUP = "backup"


class LegState(StrEnum):
    """How much a leg's content can be trusted. ``FAILED`` is about reach, the others about content."""

    UPTODATE = "uptodate"
    SYNCING = "syncing"
    OUTDATED = "outdated"
    FAILED = "failed"


class DomainState(StrEnum):
    """What an operator sees of a domain as a whole."""

    UNATTACHED = "unattached"
    MAINTENANCE = "maintenance"
    LOCKED = "locked"
    ONLINE = "online"
    DEGRADED = "degraded"
    HELD = "held"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Layout:
    """A group's layout; ``chunk`` is in bytes and only striping has one (0 otherwise)."""

    kind: LayoutKind
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind}:{format_size(self.chunk)}" if self.chunk else str(self.kind)


@dataclass(frozen=True, slots=True)
class Device:
    """One physical backing store of a group, as the store knows it.

    ``size`` is the whole device in bytes; domains live in ``[data_offset, size)``.
    """

    id: DeviceId
    uuid: UUID
    position: int
    size: int
    data_offset: int
    url: str


@dataclass(frozen=True, slots=True)
class Group:
    """An ordered set of devices plus a layout."""

    id: GroupId
    uuid: UUID
    name: str
    layout: Layout
    devices: tuple[Device, ...]


def check_name(kind: str, name: str) -> str:
    """``name`` unchanged, if it can be a file name, an NBD export and a URL segment at once.

    Raises:
        InvalidError: it is empty, longer than 63 characters, or has characters other than
            letters, digits, dot, dash and underscore, or begins with a dot, dash or underscore.
    """
    if _NAME.fullmatch(name) is None:
        raise InvalidError(
            f"{kind} name {name!r} must be 1 to 63 letters, digits, dots, dashes or underscores, "
            "and begin with a letter or a digit"
        )
    return name


class Desired(StrEnum):
    """What the operator wants a domain to be doing."""

    ONLINE = "online"
    MAINTENANCE = "maintenance"


@dataclass(frozen=True, slots=True)
class Delay:
    """After how long of being possible something is done that an operator can order; None: only when he does."""

    after_s: float | None = None

    def __str__(self) -> str:
        if self.after_s is None:
            return "manual"
        return f"{self.after_s:g}" if self.after_s else "immediate"


MANUAL = Delay()


@dataclass(frozen=True, slots=True)
class OperatorHold:
    """Clients are held because the operator wants it so.

    ``at`` is since when, ``until`` when that ends by itself, None for never; in seconds since the epoch.
    """

    at: float
    until: float | None


@dataclass(frozen=True, slots=True)
class Domain:
    """A logical storage domain: what a failover never changes.

    ``size`` is in bytes; ``listen`` is ``host:port`` of its TCP door, or empty. ``failback``: to the preferred
    leg, once that is up to date. ``accept_loss``: have a leg serve that lacks something, when none is left that
    does not. ``no_leg``: how long clients wait then before they are told errors.
    """

    id: DomainId
    uuid: UUID
    name: str
    size: int
    replication: Replication
    listen: str
    failback: Delay = MANUAL
    accept_loss: Delay = MANUAL
    no_leg: Delay = MANUAL


@dataclass(frozen=True, slots=True)
class LostRange:
    """Bytes of a disk that may be older than what clients were told is written."""

    disk: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class FailoverReceipt:
    """One change of the active leg, as it was recorded.

    ``at`` is in seconds since the epoch. ``planned``: nothing was wrong with the leg that was left.
    ``stall_ms`` is the longest any client's request took across it, ``replayed`` how many were held or
    done again; both are None until the last of them is answered. ``lost_bytes``: of what was acknowledged the
    new leg lacked so much at most; nothing unless a loss was accepted.
    """

    generation: int
    at: float
    reason: str
    source: str
    target: str
    planned: bool = False
    stall_ms: float | None = None
    replayed: int | None = None
    lost_bytes: int = 0


class VerifyOutcome(StrEnum):
    """How a verify ended."""

    COMPLETE = "complete"
    INTERRUPTED = "interrupted"  # the legs changed in the middle
    STOPPED = "stopped"  # by the operator
    FAILED = "failed"  # it met an error


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Bytes of a disk in which the leg on ``group`` differed from the active one."""

    group: str
    disk: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class VerifyReceipt:
    """What a verify has found; ``at`` is its end, in seconds since the epoch, all sizes are in bytes.

    ``unreadable``: the active leg could not read it, so nothing was compared. ``mismatches`` are as
    many as were listed, the bytes of the others are ``unlisted``.
    """

    at: float
    outcome: VerifyOutcome
    seconds: float
    repair: bool
    total: int
    compared: int
    mismatched: int
    repaired: int
    unreadable: int
    unlisted: int
    mismatches: tuple[Mismatch, ...]


class Severity(StrEnum):
    """How much an event matters to an operator."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, in the order of ``id``; ``at`` in seconds since the epoch."""

    id: int
    at: float
    severity: Severity
    domain: str
    kind: str
    message: str


def parse_delay(what: str, text: str) -> Delay:
    """The delay meant by ``manual``, ``immediate`` or a number of seconds; ``what`` it is for.

    Raises:
        InvalidError: it is none of them, or not from 0 to 30 days.
    """
    if text == "manual":
        return MANUAL
    try:
        after_s = 0.0 if text == "immediate" else float(text)
    except ValueError:
        after_s = math.nan
    if not 0 <= after_s <= DELAY_MAX_S:
        raise InvalidError(
            f"{what} {text!r} is neither manual, immediate, nor a number of seconds up to {DELAY_MAX_S}"
        )
    return Delay(after_s)


def parse_patience(text: str) -> Delay:
    """The delay meant by ``hold`` (never), ``fail`` (none) or ``hold:SECONDS``. Raises InvalidError."""
    if text == "hold":
        return MANUAL
    if text == "fail":
        return Delay(0.0)
    seconds = text.removeprefix("hold:")
    if seconds == text or seconds in ("manual", "immediate"):
        raise InvalidError(f"no-leg {text!r} is neither hold, fail, nor hold:SECONDS")
    return parse_delay("no-leg hold:", seconds)


def format_patience(delay: Delay) -> str:
    """The text that ``parse_patience`` takes."""
    if delay.after_s is None:
        return "hold"
    return f"hold:{delay.after_s:g}" if delay.after_s else "fail"


def parse_replication(text: str) -> Replication:
    """``sync`` or ``async``; InvalidError when it is neither."""
    try:
        return Replication(text)
    except ValueError:
        raise InvalidError(f"replication {text!r} is neither sync nor async") from None


def parse_layout(text: str) -> Layout:
    """The layout meant by ``linear`` or ``striped[:CHUNK]``.

    Raises:
        InvalidError: it is neither, or the chunk is not a power of two of at least 64K.
    """
    kind, _, chunk_text = text.partition(":")
    if kind == LayoutKind.LINEAR and not chunk_text:
        return Layout(LayoutKind.LINEAR)
    if kind != LayoutKind.STRIPED:
        raise InvalidError(f"layout {text!r} is neither linear nor striped[:CHUNK], such as striped:1M")
    chunk = parse_size(chunk_text) if chunk_text else CHUNK_DEFAULT
    if chunk < ALLOCATION_UNIT or chunk & (chunk - 1):
        raise InvalidError(
            f"layout {text!r}: a chunk is a power of two of at least {format_size(ALLOCATION_UNIT)}"
        )
    return Layout(LayoutKind.STRIPED, chunk)
