"""The vocabulary as types: one word, one meaning. Pure and immutable.

``Domain`` holds what never changes in a failover (name, size, address); ``Connection details``
of the patent (who is active, each leg's state, the map generation) are ``Attachment``, so that
a failover touches the second and never the first.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import NewType
from uuid import UUID

from proxy.errors import InvalidError

GroupId = NewType("GroupId", int)
DeviceId = NewType("DeviceId", int)
DomainId = NewType("DomainId", int)

#: One active leg and three backups: each further leg costs every write once more.
LEGS_MAX = 4

#: What every device's I/O is rounded to at most; a device with larger sectors is refused.
BLOCK_SIZE_MAX = 4096

#: Space is allotted in multiples of this, so that no extent ever splits a block of any device.
ALLOCATION_UNIT = 64 * 1024

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
        from proxy.sizes import format_size

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
