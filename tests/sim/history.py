"""What clients asked for and were told, and whether one honest disk could have told them the same.

This is the checker. It knows nothing of the engine, of legs or of failovers: only which requests clients
made, when, and what came back. A disk is divided into *cells*, three to a sector and of odd lengths, and
every write puts its own number into every cell it covers, so that a cell tells who wrote it last.

For each cell the requests that touched it must have an order in time that explains every answer: each
request took effect at one moment between being asked and being answered, and a read returned what the last
write before it wrote (linearizability of a register). A write that was answered with an error, or not at
all, may have taken effect or not, but in either case before its fate was settled. A trim may have zeroed or
not. ``check`` decides that by the *zones* of Gibbons and Korach:

    A value that some client was told of was there from some moment to some other: at the latest it had come
    when the first request that proves it was over (``proved``), and at the earliest it was gone when the last
    one that proves it began (``needed``). If it was proved before it was last needed, the cell held it all that
    time, and

    * no other value can have been held in a part of that time ("two values at once"), and
    * nothing else that certainly happened can have happened wholly within it ("overwritten, yet read").

That is the whole of it for values that are written once. Zeroes are written by many, so they are held to the
second rule as events, and a read of zeroes must find somebody who can have put them there.

When all that holds what was written and not flushed has lost its power at once, that may be lost, as with any
disk, and some of it kept. A new history begins then (``power_lost``), in which each cell holds first one value
that no flush has covered over; which one, the first read tells.

Two rules more: no sector is a mixture of two writes that both cover all of the mixed parts (no torn
sectors), and no cell holds anything that nobody wrote.

Source: P. B. Gibbons and E. Korach, "Testing Shared Memories", SIAM J. Comput. 26 (1997), 4.2.
"""

import itertools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from tests.sim.medium import SECTOR

#: Where the cells of a sector begin: odd places, so that requests of cells are unaligned in every way.
CELL_STARTS = (0, 37, 300)
CELLS_PER_SECTOR = len(CELL_STARTS)
_CELL_LENGTHS = (37, 263, 212)
_MARK = struct.Struct("<QQ")
_NOTHING = bytes(SECTOR)

#: What a cell holds that nobody wrote to, or somebody zeroed.
ZEROES = 0


class Violation(Exception):  # noqa: N818 (it is a finding, not a failure of the program)
    """A promise was broken; the text says which and how."""


class Kind(Enum):
    """What a request does to the cells it touches."""

    READ = "read"
    WRITE = "write"
    ZERO = "zero"
    TRIM = "trim"
    FLUSH = "flush"


def cell_offset(cell: int) -> int:
    """The first byte of a cell; with the number of cells of a disk, the end of the disk."""
    return cell // CELLS_PER_SECTOR * SECTOR + CELL_STARTS[cell % CELLS_PER_SECTOR]


def cell_content(value: int, cell: int) -> bytes:
    """What a cell holds after the write of this number."""
    length = _CELL_LENGTHS[cell % CELLS_PER_SECTOR]
    if value == ZEROES:
        return _NOTHING[:length]
    return (_MARK.pack(value, cell) * 17)[:length]


@dataclass(slots=True, eq=False)
class Operation:
    """One request of one client; moments are numbers that only ever grow.

    Attributes:
        number: unique and positive; the value that a WRITE writes.
        first, last: the cells it covers, ``last`` not included.
        asked: when all of it had reached the server.
        settled: when it had taken effect, or it was certain that it never will; infinite until then.
        certain: it was answered with success.
    """

    number: int
    kind: Kind
    disk: int
    first: int
    last: int
    durable: bool = False
    asked: float = math.inf
    settled: float = math.inf
    certain: bool = False

    @property
    def offset(self) -> int:
        return cell_offset(self.first)

    @property
    def length(self) -> int:
        return cell_offset(self.last) - self.offset

    @property
    def value(self) -> int:
        """What its cells hold afterwards."""
        return self.number if self.kind is Kind.WRITE else ZEROES

    def content(self) -> bytes:
        """What its cells hold afterwards: what a WRITE sends, or zeroes."""
        return b"".join(cell_content(self.value, cell) for cell in range(self.first, self.last))

    def __str__(self) -> str:
        fate = "certain" if self.certain else "uncertain"
        return (
            f"{self.kind.value} {self.number} of disk {self.disk} bytes {self.offset}+{self.length} "
            f"[{self.asked}, {self.settled}] {fate}"
        )


@dataclass(slots=True)
class Observation:
    """One read of one cell."""

    value: int
    asked: float
    answered: float


@dataclass(slots=True)
class Cell:
    """The history of one cell.

    ``floor``: the latest beginning of a write that is certain: nothing that was over before may be there.
    ``since``: when its history began, and ``first`` what it may have held then; ``zeroed`` when what had
    zeroed it before was over.
    """

    writes: list[Operation] = field(default_factory=list)
    reads: list[Observation] = field(default_factory=list)
    floor: float = -1
    since: float = -1
    first: frozenset[int] = frozenset({ZEROES})
    zeroed: float = -1


class History:
    """All that clients asked and were told, on all disks.

    Args:
        cells: how many cells each disk has, by its number.

    Attributes:
        flushed: of cells that a flush has made durable: nothing that was over before this moment may be left
            on any leg that is up to date.
    """

    def __init__(self, cells: dict[int, int]) -> None:
        self.moment = 0
        self.operations: dict[int, Operation] = {}
        self.cells = {disk: [Cell() for _ in range(count)] for disk, count in cells.items()}
        self.flushed: dict[tuple[int, int], float] = {}
        self._unflushed: dict[tuple[int, int], float] = {}
        self._flush_covers: dict[int, dict[tuple[int, int], float]] = {}

    def tick(self) -> int:
        """A new moment, later than all before."""
        self.moment += 1
        return self.moment

    # --- Disks and power --------------------------------------------------------------------------

    def add_cells(self, disk: int, cells: int) -> None:
        """A disk has so many cells more, which read as zeroes."""
        self.cells.setdefault(disk, []).extend(Cell() for _ in range(cells))

    def power_lost(self) -> None:
        """All that was written and not flushed may be lost: a new history begins. Raises Violation."""
        self.check()
        self.tick()
        for disk, cells in self.cells.items():
            for place, cell in enumerate(cells):
                self._begin_anew(disk, place, cell)
        self._unflushed.clear()
        for number in self._flush_covers:
            self._flush_covers[number] = {}

    def wipe(self, disk: int, first: int, last: int) -> None:
        """What was written to these cells, ``last`` not included, is gone: they are zeroes. Raises Violation."""
        self.check()
        self.tick()
        gone = {(disk, place) for place in range(first, last)}
        for _, place in gone:
            cell = self.cells[disk][place]
            cell.writes = [write for write in cell.writes if write.settled == math.inf]
            cell.reads = []
            cell.floor = -1
            cell.since = cell.zeroed = self.moment
            cell.first = frozenset({ZEROES})
        for floors in (self.flushed, self._unflushed, *self._flush_covers.values()):
            for key in gone & floors.keys():
                del floors[key]

    def _begin_anew(self, disk: int, place: int, cell: Cell) -> None:
        floor = self.flushed.get((disk, place), -1)
        over = [write for write in cell.writes if write.settled != math.inf]
        values = {write.number for write in over if write.kind is Kind.WRITE and write.settled >= floor}
        values |= {value for value in cell.first if value and self.operations[value].settled >= floor}
        zeroed = max([cell.zeroed, *(write.settled for write in over if write.value == ZEROES)])
        # Before the first flush there may still be what was there at the very beginning.
        if zeroed >= floor if floor >= 0 else ZEROES in cell.first or zeroed >= 0:
            values.add(ZEROES)
        cell.writes = [write for write in cell.writes if write.settled == math.inf]
        cell.reads = []
        cell.floor = floor
        cell.since = self.moment
        cell.first = frozenset(values)
        cell.zeroed = zeroed

    # --- What happens -----------------------------------------------------------------------------

    def new(self, kind: Kind, disk: int, first: int, last: int, *, durable: bool = False) -> Operation:
        """A request that a client is about to make."""
        operation = Operation(len(self.operations) + 1, kind, disk, first, last, durable)
        self.operations[operation.number] = operation
        return operation

    def ask(self, operation: Operation) -> None:
        """All of the request has reached the server."""
        operation.asked = self.tick()
        if operation.kind in (Kind.WRITE, Kind.ZERO, Kind.TRIM):
            for cell in self._touched(operation):
                cell.writes.append(operation)
        elif operation.kind is Kind.FLUSH:
            self._flush_covers[operation.number] = dict(self._unflushed)

    def settle(self, operation: Operation) -> None:
        """It was answered with an error, or never will be: from now on it changes nothing any more."""
        if operation.settled == math.inf:
            operation.settled = self.tick()

    def answer(self, operation: Operation, data: bytes = b"") -> None:
        """It was answered with success; ``data`` is what a READ returned. Raises Violation."""
        operation.settled = self.tick()
        operation.certain = True
        if operation.kind is Kind.READ:
            values = self._values(operation, data)
            self._check_sectors(operation, values)
            for cell, value in zip(self._touched(operation), values, strict=True):
                if operation.asked >= cell.since:  # else it may have seen what was there before
                    cell.reads.append(Observation(value, operation.asked, operation.settled))
        elif operation.kind in (Kind.WRITE, Kind.ZERO):
            for place, cell in enumerate(self._touched(operation), operation.first):
                cell.floor = max(cell.floor, operation.asked)
                self._unflushed[operation.disk, place] = cell.floor
                if operation.durable:
                    self.flushed[operation.disk, place] = operation.asked

    def _touched(self, operation: Operation) -> Sequence[Cell]:
        return self.cells[operation.disk][operation.first : operation.last]

    def floors(self) -> dict[tuple[int, int], float]:
        """Of each cell with an acknowledged write: nothing that was over before this moment may be left."""
        return {
            (disk, place): cell.floor
            for disk, cells in self.cells.items()
            for place, cell in enumerate(cells)
            if cell.floor >= 0
        }

    def busy(self) -> set[tuple[int, int]]:
        """The cells, by disk, that a request may still change."""
        return {
            (operation.disk, cell)
            for operation in self.operations.values()
            if operation.kind in (Kind.WRITE, Kind.ZERO, Kind.TRIM)
            and operation.asked < math.inf
            and operation.settled == math.inf
            for cell in range(operation.first, operation.last)
        }

    # --- What a device holds ----------------------------------------------------------------------

    def value_of(self, disk: int, cell: int, content: bytes) -> int:
        """Who wrote what a cell holds. Raises Violation: nobody did."""
        if content == _NOTHING[: len(content)]:
            return ZEROES
        number = int.from_bytes(content[:8], "little")
        operation = self.operations.get(number)
        if (
            operation is None
            or operation.kind is not Kind.WRITE
            or operation.disk != disk
            or operation.asked == math.inf
            or not operation.first <= cell < operation.last
            or content != cell_content(number, cell)
        ):
            raise Violation(
                f"disk {disk} byte {cell_offset(cell)}: {content[:20].hex()}… is what nobody wrote there"
            )
        return number

    def is_current(self, disk: int, cell: int, value: int, floor: float) -> bool:
        """Whether ``value`` is not older than a write that began at ``floor``."""
        if value != ZEROES:
            return self.operations[value].settled >= floor
        found = self.cells[disk][cell]
        return (
            floor < 0
            or found.zeroed >= floor
            or any(write.value == ZEROES and write.settled >= floor for write in found.writes)
        )

    def shown(self, read: Operation, data: bytes) -> dict[tuple[int, int], float]:
        """The floors of the cells in which a read found what somebody wrote."""
        return {
            (read.disk, cell): self.operations[value].asked
            for cell, value in enumerate(self._values(read, data), read.first)
            if value != ZEROES
        }

    def flush_covers(self, flush: Operation) -> dict[tuple[int, int], float]:
        """The floors of the cells that a flush had to make durable; those are clean from now on."""
        covers = self._flush_covers.pop(flush.number)
        self.flushed.update(covers)
        for place, floor in covers.items():
            if self._unflushed.get(place) == floor:
                del self._unflushed[place]
        return covers

    # --- Judgement --------------------------------------------------------------------------------

    def _values(self, read: Operation, data: bytes) -> list[int]:
        assert len(data) == read.length, (len(data), read)
        values = []
        for cell in range(read.first, read.last):
            begin = cell_offset(cell) - read.offset
            content = data[begin : begin + _CELL_LENGTHS[cell % CELLS_PER_SECTOR]]
            values.append(self.value_of(read.disk, cell, content))
        return values

    def _check_sectors(self, read: Operation, values: list[int]) -> None:
        for place in range(1, len(values)):
            cell = read.first + place
            for back in range(1, cell % CELLS_PER_SECTOR + 1):
                if back > place:
                    break
                one, other = values[place], values[place - back]
                if (
                    one != other
                    and ZEROES not in (one, other)
                    and self._covers(one, cell - back)
                    and self._covers(other, cell)
                ):
                    raise Violation(
                        f"torn sector: {read} found parts of {self.operations[one]} and of "
                        f"{self.operations[other]} at byte {cell_offset(cell)}"
                    )

    def _covers(self, number: int, cell: int) -> bool:
        return self.operations[number].first <= cell < self.operations[number].last

    def check(self) -> None:
        """Raise Violation unless every answer can be explained, cell by cell."""
        for disk, cells in self.cells.items():
            for place, cell in enumerate(cells):
                try:
                    self._check_cell(cell)
                except Violation as violation:
                    raise Violation(
                        f"disk {disk}, cell {place} at byte {cell_offset(place)}: {violation}"
                    ) from None

    def _check_cell(self, cell: Cell) -> None:
        zones, events = self._zones(cell)
        held = sorted(zone for zone in zones if zone.proved < zone.needed)
        for one, other in itertools.pairwise(held):
            if other.proved < one.needed:
                raise Violation(f"two values at once: {self._tell(one)} and {self._tell(other)}")
        for event in (*events, *(zone for zone in zones if zone.proved >= zone.needed)):
            for zone in held:
                if event.value != zone.value and zone.proved < event.needed and event.proved < zone.needed:
                    raise Violation(
                        f"overwritten, yet read: {self._tell(zone)}; within that time {self._tell(event)}"
                    )
        self._check_zeroes(cell)

    def _zones(self, cell: Cell) -> "tuple[list[Zone], list[Zone]]":
        """Of each value written once its zone; and what concerns zeroes, one event each."""
        zones: dict[int, Zone] = {}
        events: list[Zone] = []
        read_values = {read.value for read in cell.reads}
        for write in cell.writes:
            if write.kind is Kind.WRITE and (write.certain or write.number in read_values):
                zones[write.number] = Zone(write.settled, write.asked, write.number)
            elif write.kind is Kind.ZERO and write.certain:
                events.append(Zone(write.settled, write.asked, ZEROES))
        for read in cell.reads:
            if read.value == ZEROES:
                events.append(Zone(read.answered, read.asked, ZEROES))
                continue
            zone = zones.get(read.value)
            if zone is None:
                if read.value not in cell.first:
                    raise Violation(f"read after a flush had covered it: {self.operations[read.value]}")
                zone = zones[read.value] = Zone(cell.since, cell.since, read.value)
            if self.operations[read.value].asked > read.answered:
                raise Violation(f"read before it was written: {self.operations[read.value]}")
            zone.proved = min(zone.proved, read.answered)
            zone.needed = max(zone.needed, read.asked)
        return list(zones.values()), events

    def _check_zeroes(self, cell: Cell) -> None:
        """A read of zeroes must find somebody who can have put them there."""
        for read in cell.reads:
            if read.value != ZEROES:
                continue
            floor = max(
                (
                    w.asked
                    for w in cell.writes
                    if w.kind is Kind.WRITE and w.certain and w.settled < read.asked
                ),
                default=-1,
            )
            if (floor >= 0 or ZEROES not in cell.first) and not any(
                write.value == ZEROES and write.settled >= floor and write.asked < read.answered
                for write in cell.writes
            ):
                raise Violation(
                    f"zeroes read at [{read.asked}, {read.answered}] after a write that began at {floor}"
                )

    def _tell(self, zone: "Zone") -> str:
        what = str(self.operations[zone.value]) if zone.value else "zeroes"
        return f"{what} (proved at {zone.proved}, needed at {zone.needed})"


@dataclass(slots=True, order=True)
class Zone:
    """When a value was there: at the latest from ``proved``, at the earliest until ``needed``."""

    proved: float
    needed: float
    value: int
