"""What crosses the boundary between the engine and Python, as Python sees it."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol


class DeviceKind(IntEnum):
    """How the engine drives a device's descriptor."""

    FILE = 0
    NBD = 1


class LegRole(IntEnum):
    """What a leg is for under one map."""

    ACTIVE = 0
    BACKUP = 1
    SYNCING = 2


class RequestKind(IntEnum):
    """Requests that the control thread may have carried out for itself. Values: NBD commands."""

    FLUSH = 3
    ZERO = 6


class EventKind(IntEnum):
    """What the engine tells the control thread; the fields each kind uses are listed with it."""

    DEVICE_ERROR = 1  # leg, device, code: errno, generation, a: kind of operation, b: device offset
    DEVICE_LOST = 2  # leg, device, code: errno, generation, a: operations of unknown fate
    DEADLINE_MISSED = 3  # leg, device, code: errno, generation, a: age in ns
    LEG_DRAINED = 4  # leg, a: operations of unknown fate (0: every one ever sent has completed)
    DRAINED = 5  # generation, a: number of the hold; nothing runs but errands to legs that it is not for
    REPLAYED = 6  # generation, a: requests that were held or parked, b: the longest of them, ns
    COPIED = 7  # leg, code: 0 when it equals the active one now, generation, a: bytes copied
    DONE = 8  # a: token, code: errno
    CONNECTION_CLOSED = 9  # a: connection, code: errno, 0 when the client left
    MAP_RETIRED = 10  # generation
    LEG_CLOSED = 11  # leg; its descriptors are closed
    LEG_FORGOTTEN = 12  # leg; its id is free again
    BITMAP_FAILED = 13  # code: errno, new regions cannot be written to; 0: they can again
    READ_REPAIRED = 14  # leg, device, code: errno, generation, a: device offset, b: bytes put back
    VERIFIED = 15  # code: errno (ESTALE: legs changed, ECANCELED: stopped), generation, a: compared, b: bad
    LEG_BEHIND = 16  # leg, code: errno, generation, a: bytes of the backlog that it will not be sent


class Event(NamedTuple):
    """One event. ``leg`` is the id given to add_leg(); unused fields are 0."""

    kind: EventKind
    leg: int
    device: int
    code: int
    generation: int
    a: int
    b: int


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """A connected device, handed to the engine with its descriptor.

    The descriptor belongs to the engine from then on; a socket must be in blocking mode (the ring
    would otherwise answer EAGAIN instead of waiting). Sizes are in bytes.
    """

    fd: int
    kind: DeviceKind
    block_size: int
    transfer_max: int
    in_memory: bool
    can_flush: bool
    can_fua: bool
    can_zero: bool


@dataclass(frozen=True, slots=True)
class Tracking:
    """What a map needs for writes to be marked in the dirty bitmap.

    ``planes`` are those of its legs, in their order, ``away`` those of legs that take no part; ``maps``,
    one for each disk, say where its bytes lie in the domain (device 0 is the domain).
    """

    planes: Sequence[int]
    away: Sequence[int]
    maps: Sequence["PackedMap"]


class PackedMap(Protocol):
    """The three columns of proxy.extentmap.ExtentMap."""

    @property
    def offsets(self) -> "array[int]": ...
    @property
    def devices(self) -> "array[int]": ...
    @property
    def device_offsets(self) -> "array[int]": ...


class DeviceStatistics(NamedTuple):
    """Counters of one device since it was added."""

    reads: int
    writes: int
    flushes: int
    read_bytes: int
    written_bytes: int
    errors: int
    in_flight: int
    late: int
    unproven: int
    latency_max_ns: int
    error_number: int
    lost: bool
    read_repairs: int


class Statistics(NamedTuple):
    """Counters of the engine since it began.

    ``running`` requests are clients' and its own; ``backlog`` is how many writes lagging legs have yet to get, and
    ``behind`` how many legs of the map will not get all of it; clients wait for ``waited_for`` requests, of any state.
    """

    reads: int
    writes: int
    flushes: int
    trims: int
    zeroes: int
    read_bytes: int
    written_bytes: int
    errors: int
    refused: int
    waited: int
    parked: int
    replayed: int
    late: int
    connections: int
    running: int
    held: bool
    generation: int
    memory_bytes: int
    read_repairs: int
    backlog: int
    behind: int
    waited_for: int


class Mismatch(NamedTuple):
    """Bytes of a disk, in whole blocks, in which a backup differs from the active leg."""

    leg: int
    disk: int
    offset: int
    length: int


class VerifyReport(NamedTuple):
    """What a verify has found so far, in bytes; those of all backups are added up.

    ``error_number``: ESTALE when the legs changed in the middle, ECANCELED when it was stopped.
    ``unreadable``: the active leg met a bad block there, so nothing was compared. ``mismatches``
    are as many as fit; the bytes of the others are ``unlisted``.
    """

    running: bool
    error_number: int
    repair: bool
    total: int
    compared: int
    mismatched: int
    repaired: int
    unreadable: int
    unlisted: int
    mismatches: tuple[Mismatch, ...]


class PendingOp(NamedTuple):
    """An operation the simulator has been given and not yet completed."""

    number: int
    kind: "OpKind"
    fd: int
    offset: int
    length: int
    flags: int


class OpKind(IntEnum):
    """Kinds of operations of the submission layer."""

    READ = 1
    WRITE = 2
    SYNC = 3
    ALLOCATE = 4
    RECEIVE = 5
    SEND = 6
