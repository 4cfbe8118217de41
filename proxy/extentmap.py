"""The extent map: where every byte of a domain, or of a disk, lies on the devices of one leg.

Two levels of space, hence two kinds of row in the store, and one kind of map for both::

    disk bytes    0 ......................... size      Ranges: domain bytes allotted to the disk
                  |          |
    domain bytes  0 ......................... size      Runs: device bytes allotted to the domain
                  |    |    |     |    |
    devices       (device 0, offset) (device 1, offset) ...

``group_map`` turns a domain's runs on one group into the domain's map; ``ExtentMap.compose`` then
flattens a disk's ranges through it, so that the engine does a single look-up from disk to device.

A map is a million extents as easily as three: it is kept in three packed columns, and everything
that touches all of them goes through ``map``, ``itertools`` and ``operator`` instead of a loop.
"""

import struct
import sys
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, compress, islice, repeat
from operator import add, and_, eq, gt, itemgetter, lshift, mod, not_, or_, sub
from typing import NamedTuple, Self

from proxy.model import Layout, LayoutKind
from proxy.sizes import SIZE_MAX, format_size

#: At 20 bytes an extent, a map of 320 MiB; a striped domain that would need more wants larger chunks.
EXTENTS_MAX = 1 << 24

_HEADER = struct.Struct("<Q")


class Run(NamedTuple):
    """A piece of space on one device of a group; ``device`` is the position in the group."""

    device: int
    device_offset: int
    length: int


class Range(NamedTuple):
    """A piece of a domain's space, as allotted to a disk; both in bytes."""

    offset: int
    length: int


class Extent(NamedTuple):
    """A run of bytes, ``[offset, offset + length)`` of the map, and where on which device it lies."""

    offset: int
    length: int
    device: int
    device_offset: int


@dataclass(frozen=True, slots=True, repr=False)
class ExtentMap:
    """Every byte of ``[0, size)``, each mapped exactly once; immutable.

    With ``n = len(map)``, extent ``i`` is the bytes ``[offsets[i], offsets[i + 1])``, and they lie on
    device ``devices[i]`` from byte ``device_offsets[i]``. An extent that merely continues the one before
    it on the same device is made part of it, so two maps are equal exactly when they map every byte
    alike.

    The engine reads these three buffers as they are, so their types and meaning are a contract:

    Attributes:
        offsets: ``array("Q")``, ``n + 1`` entries, strictly ascending from 0; the last is the size.
        devices: ``array("I")``, ``n`` entries: the device's position in the group.
        device_offsets: ``array("Q")``, ``n`` entries, in bytes.

    The map owns its arrays: whoever passes them in, or reads them, never writes them afterwards.

    Raises:
        ValueError: the arrays do not describe such a map, or an extent ends past ``SIZE_MAX``.
    """

    offsets: "array[int]"
    devices: "array[int]"
    device_offsets: "array[int]"

    def __post_init__(self) -> None:
        offsets, devices, device_offsets = self.offsets, self.devices, self.device_offsets
        types = (offsets.typecode, devices.typecode, device_offsets.typecode)
        if types != ("Q", "I", "Q"):
            raise ValueError(f"extent map columns have types {types}, not ('Q', 'I', 'Q')")
        counts = (len(offsets) - 1, len(devices), len(device_offsets))
        if len(set(counts)) != 1:
            raise ValueError(f"extent map columns are for {counts} extents")
        if offsets[0] != 0:
            raise ValueError(f"extent map begins at {offsets[0]}, not at 0")
        # A length below zero, or an end past 64 bits, does not fit the column.
        lengths = _column("Q", map(sub, islice(offsets, 1, None), offsets))
        if not all(lengths):
            raise ValueError("extent map has an extent without bytes")
        ends = _column("Q", map(add, device_offsets, lengths))
        if max(offsets[-1], max(ends, default=0)) > SIZE_MAX:
            raise ValueError(f"extent map reaches past the largest offset, {SIZE_MAX}")
        adjoins = map(eq, ends, islice(device_offsets, 1, None))
        same_device = map(eq, devices, islice(devices, 1, None))
        joined = bytes(map(and_, adjoins, same_device))
        if any(joined):
            # Neither the first extent nor the size at the end can be a continuation.
            begins = b"\x01" + bytes(map(not_, joined))
            object.__setattr__(self, "offsets", array("Q", compress(offsets, begins + b"\x01")))
            object.__setattr__(self, "devices", array("I", compress(devices, begins)))
            object.__setattr__(self, "device_offsets", array("Q", compress(device_offsets, begins)))

    @classmethod
    def linear(cls, runs: Sequence[Run]) -> Self:
        """The map that lays ``runs`` end to end, in the order given.

        Raises:
            ValueError: a run has no length or a negative number, or two of them overlap.
        """
        devices, device_offsets, lengths = _run_columns(runs)
        return cls(_column("Q", accumulate(lengths, initial=0)), devices, device_offsets)

    @classmethod
    def striped(cls, runs: Sequence[Run], width: int, chunk: int) -> Self:
        """The map that interleaves ``runs`` by ``chunk`` bytes, in stripe sets of ``width`` runs.

        Each ``width`` consecutive runs are one stripe set: one run on each of the devices 0 to
        ``width - 1``, in that order, equally long and a whole number of chunks each. Inside a set the
        chunks go round robin over the devices; the next set begins where the set before it ends.

        Raises:
            ValueError: the runs do not make such sets, they overlap, or they are more than
                ``EXTENTS_MAX`` chunks.
        """
        run_devices, run_offsets, lengths = _run_columns(runs)
        if width < 1 or chunk < 1 or len(runs) % width:
            raise ValueError(
                f"{len(runs)} runs cannot be stripe sets of {width} runs and {chunk}-byte chunks"
            )
        if run_devices != array("I", range(width)) * (len(runs) // width):
            raise ValueError(f"a stripe set has not one run on each of {width} devices, in order")
        set_lengths = lengths[::width]
        if any(lengths[lane::width] != set_lengths for lane in range(1, width)):
            raise ValueError("runs of one stripe set differ in length")
        if any(map(mod, set_lengths, repeat(chunk))):
            raise ValueError(f"a striped run is not a whole number of {chunk}-byte chunks")
        stripe_count = sum(set_lengths) // chunk
        extent_count = stripe_count * width
        if extent_count > EXTENTS_MAX:
            raise ValueError(f"{extent_count} chunks of {chunk} bytes are more extents than {EXTENTS_MAX}")
        offsets = array("Q", range(0, extent_count * chunk + 1, chunk))
        devices = array("I", range(width)) * stripe_count
        device_offsets = array("Q", [0]) * extent_count
        for lane in range(width):
            begins = run_offsets[lane::width]
            chunks = map(range, begins, map(add, begins, set_lengths), repeat(chunk))
            device_offsets[lane::width] = array("Q", chain.from_iterable(chunks))
        return cls(offsets, devices, device_offsets)

    @property
    def size(self) -> int:
        """How many bytes are mapped."""
        return self.offsets[-1]

    def __len__(self) -> int:
        return len(self.devices)

    def __getitem__(self, index: int) -> Extent:
        # The device columns first: they know a negative or too large index for what it is.
        device, device_offset = self.devices[index], self.device_offsets[index]
        position = index % len(self)
        offset = self.offsets[position]
        return Extent(offset, self.offsets[position + 1] - offset, device, device_offset)

    def __iter__(self) -> Iterator[Extent]:
        lengths = map(sub, islice(self.offsets, 1, None), self.offsets)
        return map(Extent, self.offsets, lengths, self.devices, self.device_offsets)

    def __repr__(self) -> str:
        return f"<ExtentMap of {format_size(self.size)} in {len(self)} extents>"

    def lookup(self, offset: int) -> Extent:
        """The extent that holds byte ``offset``.

        Raises:
            ValueError: the map has no such byte.
        """
        if not 0 <= offset < self.size:
            raise ValueError(f"byte {offset} is outside of {self!r}")
        return self[bisect_right(self.offsets, offset) - 1]

    def pieces(self, offset: int, length: int) -> Iterator[Extent]:
        """The extents of ``[offset, offset + length)`` in order, the outer two clipped to it.

        Raises:
            ValueError: those bytes are not all in the map.
        """
        end = offset + length
        if not 0 <= offset <= end <= self.size:
            raise ValueError(f"bytes {offset} to {end} are not all in {self!r}")
        return self._clipped(offset, end)

    def _clipped(self, offset: int, end: int) -> Iterator[Extent]:
        index = bisect_right(self.offsets, offset) - 1
        while offset < end:
            extent_end = min(self.offsets[index + 1], end)
            device_offset = self.device_offsets[index] + offset - self.offsets[index]
            yield Extent(offset, extent_end - offset, self.devices[index], device_offset)
            offset, index = extent_end, index + 1

    def compose(self, ranges: Sequence[Range]) -> Self:
        """The map of a disk that has ``ranges`` of this map's bytes, in the order given.

        The disk's size is the sum of the ranges. A single ``Range(0, size)`` cuts a map to a size:
        a striped group may have allotted more than was asked.

        Raises:
            ValueError: a range has no length, reaches outside of the map, or overlaps another.
        """
        begins = _column("Q", map(itemgetter(0), ranges))
        lengths = _column("Q", map(itemgetter(1), ranges))
        _check_disjoint(begins, lengths)
        if max(map(add, begins, lengths), default=0) > self.size:
            raise ValueError(f"a range reaches past the end of {self!r}")
        offsets, devices, device_offsets = array("Q", [0]), array("I"), array("Q")
        size = 0
        for begin, length in zip(begins, lengths, strict=True):
            end = begin + length
            first = bisect_right(self.offsets, begin) - 1
            devices.append(self.devices[first])
            device_offsets.append(self.device_offsets[first] + begin - self.offsets[first])
            if self.offsets[first + 1] < end:
                last = bisect_left(self.offsets, end, first)
                offsets.extend(map(add, self.offsets[first + 1 : last], repeat(size - begin)))
                devices += self.devices[first + 1 : last]
                device_offsets += self.device_offsets[first + 1 : last]
            size += length
            offsets.append(size)
        return type(self)(offsets, devices, device_offsets)

    def to_bytes(self) -> bytes:
        """The map for a control channel, little-endian: u64 ``n``, then the three columns.

        The columns follow in the order offsets (``n + 1`` u64), device offsets (``n`` u64), devices
        (``n`` u32), so that each is aligned to its entries.
        """
        columns = (self.offsets, self.device_offsets, self.devices)
        return _HEADER.pack(len(self)) + b"".join(_little_endian(column).tobytes() for column in columns)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The map that ``to_bytes`` wrote.

        Raises:
            ValueError: ``data`` is not exactly one such message, or what it says is no map.
        """
        if len(data) < _HEADER.size:
            raise ValueError(f"extent map message of {len(data)} bytes ends inside its header")
        (count,) = _HEADER.unpack_from(data)
        device_offsets_begin = _HEADER.size + 8 * (count + 1)
        devices_begin = device_offsets_begin + 8 * count
        end = devices_begin + 4 * count
        if len(data) != end:
            raise ValueError(f"extent map message of {count} extents has {len(data)} bytes, not {end}")
        offsets = array("Q", data[_HEADER.size : device_offsets_begin])
        device_offsets = array("Q", data[device_offsets_begin:devices_begin])
        devices = array("I", data[devices_begin:])
        return cls(_little_endian(offsets), _little_endian(devices), _little_endian(device_offsets))


def group_map(layout: Layout, device_count: int, runs: Sequence[Run]) -> ExtentMap:
    """The map of a domain on a group, from the domain's runs there in their stored order.

    Linear: the runs lie end to end. Striped: each ``device_count`` consecutive runs are one stripe
    set, one run on each device in the order of the group (see ``ExtentMap.striped``). The map covers all
    the space of the runs, which for striping may be more than the domain's size.

    Raises:
        ValueError: the runs overlap, are on a device the group has not, or do not suit the layout.
    """
    match layout.kind:
        case LayoutKind.LINEAR:
            if max(map(itemgetter(0), runs), default=-1) >= device_count:
                raise ValueError(f"a run is on a device past the {device_count} of its group")
            return ExtentMap.linear(runs)
        case LayoutKind.STRIPED:
            return ExtentMap.striped(runs, device_count, layout.chunk)


def _column(typecode: str, values: Iterable[int]) -> "array[int]":
    """``values`` packed; one that the type cannot hold is a broken invariant of the caller."""
    try:
        return array(typecode, values)
    except OverflowError as error:
        raise ValueError(f"a number of an extent map is out of range: {error}") from error


def _run_columns(runs: Sequence[Run]) -> "tuple[array[int], array[int], array[int]]":
    """Devices, device offsets and lengths of ``runs``, checked to be disjoint and within ``SIZE_MAX``."""
    devices = _column("I", map(itemgetter(0), runs))
    device_offsets = _column("Q", map(itemgetter(1), runs))
    lengths = _column("Q", map(itemgetter(2), runs))
    if max(map(add, device_offsets, lengths), default=0) > SIZE_MAX:
        raise ValueError(f"a run reaches past the largest offset, {SIZE_MAX}")
    # (device, offset) as one integer sorts several times faster than as a tuple.
    _check_disjoint(map(or_, map(lshift, devices, repeat(64)), device_offsets), lengths)
    return devices, device_offsets, lengths


def _check_disjoint(starts: Iterable[int], lengths: "array[int]") -> None:
    """Refuse pieces without bytes, and pieces that share a byte.

    Raises:
        ValueError: there is one.
    """
    if not all(lengths):
        raise ValueError("a piece of space has no bytes")
    # Pieces are disjoint exactly when, their beginnings and their ends each put in order, no end
    # passes the next beginning.
    begins = list(starts)
    ends = sorted(map(add, begins, lengths))
    begins.sort()
    if any(map(gt, ends, islice(begins, 1, None))):
        raise ValueError("two pieces of space overlap")


def _little_endian(column: "array[int]") -> "array[int]":
    """``column`` between this machine's byte order and little-endian, whichever way."""
    if sys.byteorder == "little":
        return column
    swapped = column[:]
    swapped.byteswap()
    return swapped
