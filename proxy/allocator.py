"""Which space a domain gets on a group, and a disk in its domain. Pure and stateless.

What is taken goes in, what to take comes out; the caller makes it durable. The same input gives the
same answer always.

Space is in multiples of ``ALLOCATION_UNIT``, which a device's or domain's own bounds are rounded
inward to. A domain's size is best made such a multiple (``round_up``) when it is created: else its
last, partial unit serves no disk. A disk keeps the exact size it was asked for, in space rounded up.

One rule picks among free pieces, for domains and disks: the first that holds all that is asked; if
none does, as few pieces as can hold it, in order.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from math import lcm
from typing import TypeVar

from proxy.errors import RefusedError
from proxy.extentmap import EXTENTS_MAX, ExtentMap, Range, Run
from proxy.model import ALLOCATION_UNIT, Device, Group, LayoutKind
from proxy.sizes import format_size


def round_up(size: int, unit: int = ALLOCATION_UNIT) -> int:
    """``size`` bytes as the multiple of ``unit`` that holds them."""
    return -(-size // unit) * unit


def free_runs(device: Device, taken: Iterable[Run]) -> tuple[Run, ...]:
    """The free space of one device, sorted and as few runs as there are gaps.

    Args:
        device: whose ``[data_offset, size)`` serves domains.
        taken: the runs of every domain on this device, in any order.

    Raises:
        ValueError: a taken run is on another device, overlaps another, or is not whole allocation
            units of this device's space.
    """
    runs = list(taken)
    if any(run.device != device.position for run in runs):
        raise ValueError(f"a run taken from device {device.position} lies on another device")
    gaps = _gaps(device.data_offset, device.size, ((run.device_offset, run.length) for run in runs))
    return tuple(Run(device.position, offset, length) for offset, length in gaps)


def free_ranges(domain_size: int, taken: Iterable[Range]) -> tuple[Range, ...]:
    """The free space inside a domain, sorted and as few ranges as there are gaps.

    Args:
        domain_size: in bytes.
        taken: the ranges of every disk of the domain, in any order.

    Raises:
        ValueError: taken ranges overlap, or are not whole allocation units of the domain.
    """
    return tuple(Range(offset, length) for offset, length in _gaps(0, domain_size, taken))


def free_size(group: Group, taken: Iterable[Run]) -> int:
    """How many bytes the largest domain may have that fits ``group`` with ``taken`` gone from it.

    Raises:
        ValueError: as ``free_runs``, or a run is on a device that the group has not.
    """
    return _free_size(group, _free_by_device(group, taken))


def allot(group: Group, taken: Iterable[Run], size: int) -> tuple[Run, ...]:
    """Space on ``group`` for a domain of ``size`` bytes, as ``extentmap.group_map`` wants it.

    Linear: runs in the order of the devices, ``size`` rounded up to the allocation unit in all.
    Striped: stripe sets, each one run on every device in order, all equally long and whole numbers
    of both chunk and allocation unit; in all ``size`` rounded up to one such unit on every device.

    Args:
        group: the devices and the layout.
        taken: the runs of every domain on the group, in any order.
        size: in bytes, larger than zero.

    Raises:
        RefusedError: it does not fit, or its map would have too many extents.
        ValueError: as ``free_size``, or ``size`` is not larger than zero.
    """
    if size <= 0:
        raise ValueError(f"a domain of {size} bytes")
    free_by_device = _free_by_device(group, taken)
    striped = group.layout.kind is LayoutKind.STRIPED
    needed = round_up(size, _step(group) * (len(group.devices) if striped else 1))
    free = _free_size(group, free_by_device)
    if needed > free:
        each = ", ".join(
            f"device {device.position} {format_size(sum(run.length for run in runs))}"
            for device, runs in zip(group.devices, free_by_device, strict=True)
        )
        raise RefusedError(
            f"group {group.name} ({group.layout}) has {format_size(free)} free"
            f"{' in equal parts of its devices' if striped else ''} for a domain that needs "
            f"{format_size(needed)}, {format_size(needed - free)} short (free: {each}); "
            "ask for less, remove a domain or use a larger group"
        )
    if not striped:
        return tuple(_pick([run for runs in free_by_device for run in runs], needed))
    chunk_count = needed // group.layout.chunk
    if chunk_count > EXTENTS_MAX:
        raise RefusedError(
            f"a domain of {format_size(needed)} on group {group.name} ({group.layout}) has {chunk_count} "
            f"chunks and can have {EXTENTS_MAX}; use a group with a larger chunk"
        )
    share = needed // len(group.devices)
    return tuple(_stripe_sets([_pick(runs, share) for runs in free_by_device]))


def allot_ranges(domain_size: int, taken: Iterable[Range], size: int) -> tuple[Range, ...]:
    """Space in a domain for a new disk of ``size`` bytes, rounded up to the allocation unit.

    Args:
        domain_size: in bytes.
        taken: the ranges of every disk of the domain, in any order.
        size: in bytes, larger than zero; the caller keeps it as the disk's exact size.

    Raises:
        RefusedError: it does not fit.
        ValueError: as ``free_ranges``, or ``size`` is not larger than zero.
    """
    if size <= 0:
        raise ValueError(f"a disk of {size} bytes")
    return grow_ranges(domain_size, taken, (), size)


def grow_ranges(
    domain_size: int, taken: Iterable[Range], held: Sequence[Range], size: int
) -> tuple[Range, ...]:
    """All the space of a disk that grows to ``size`` bytes; what it holds stays where it is.

    The answer begins with ``held``, whose last range may have become longer, and takes the place of
    ``held``. It is ``held`` unchanged when that is large enough.

    Args:
        domain_size: in bytes.
        taken: the ranges of every *other* disk of the domain, in any order.
        held: the ranges of the disk, in its order.
        size: what the disk is to have in all, in bytes.

    Raises:
        RefusedError: it does not fit.
        ValueError: as ``free_ranges``, of ``taken`` and ``held`` together.
    """
    free = free_ranges(domain_size, [*taken, *held])
    needed = round_up(size) - sum(piece.length for piece in held)
    if needed <= 0:
        return tuple(held)
    available = sum(piece.length for piece in free)
    if needed > available:
        raise RefusedError(
            f"the domain of {format_size(domain_size)} has {format_size(available)} free and the disk needs "
            f"{format_size(needed)}{' more' if held else ''}, {format_size(needed - available)} short; "
            "ask for less, remove a disk or use a larger domain"
        )
    ranges = list(held)
    if held:
        # Growing in place first: the disk's map stays as short as it was.
        offset, length = held[-1]
        adjoining = next((piece for piece in free if piece.offset == offset + length), Range(0, 0))
        growth = min(adjoining.length, needed)
        ranges[-1] = Range(offset, length + growth)
        needed -= growth
        free = tuple(piece for piece in free if piece != adjoining)
    if needed:
        ranges += _pick(free, needed)
    return tuple(ranges)


def shrink_ranges(held: Sequence[Range], size: int) -> tuple[Range, ...]:
    """The first of the space of a disk, as much as ``size`` bytes need; ``held`` has at least that."""
    needed = round_up(size)
    ranges = []
    for offset, length in held:
        if needed:
            ranges.append(Range(offset, min(length, needed)))
            needed -= ranges[-1].length
    assert not needed, (held, size)
    return tuple(ranges)


def _step(group: Group) -> int:
    """What a run on one device of ``group`` is a multiple of."""
    if group.layout.kind is LayoutKind.STRIPED:
        return lcm(group.layout.chunk, ALLOCATION_UNIT)
    return ALLOCATION_UNIT


def _free_by_device(group: Group, taken: Iterable[Run]) -> list[list[Run]]:
    """What each device of ``group`` has to give in whole steps, in the order of the devices."""
    taken_by_device: defaultdict[int, list[Run]] = defaultdict(list)
    for run in taken:
        taken_by_device[run.device].append(run)
    step = _step(group)
    free_by_device = [
        [
            run._replace(length=run.length // step * step)
            for run in free_runs(device, taken_by_device.pop(device.position, ()))
            if run.length >= step
        ]
        for device in group.devices
    ]
    if taken_by_device:
        raise ValueError(
            f"space is taken on devices {sorted(taken_by_device)}, which group {group.name} lacks"
        )
    return free_by_device


def _free_size(group: Group, free_by_device: list[list[Run]]) -> int:
    sizes = [sum(run.length for run in runs) for runs in free_by_device]
    return len(sizes) * min(sizes) if group.layout.kind is LayoutKind.STRIPED else sum(sizes)


def _gaps(begin: int, size: int, taken: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Offset and length of what ``taken`` leaves of ``[begin, size)``, in whole allocation units."""
    begin = round_up(begin)
    end = size // ALLOCATION_UNIT * ALLOCATION_UNIT
    for offset, length in sorted(taken):
        if offset % ALLOCATION_UNIT or length % ALLOCATION_UNIT or length <= 0:
            raise ValueError(f"{length} bytes taken at {offset} are not whole allocation units")
        if offset < begin or offset + length > end:
            raise ValueError(f"{length} bytes taken at {offset} overlap others or lie outside of the space")
        if offset > begin:
            yield begin, offset - begin
        begin = offset + length
    if begin < end:
        yield begin, end - begin


_Piece = TypeVar("_Piece", Run, Range)


def _pick(free: Sequence[_Piece], size: int) -> list[_Piece]:
    """The first piece that holds ``size``, else as few pieces as can, in order; the last one is cut.

    ``free`` is in order and has ``size`` bytes, larger than zero, in all.
    """
    chosen: set[_Piece] = set()
    rest = size
    for piece in sorted(free, key=lambda piece: -piece.length):
        if piece.length >= rest:
            break
        chosen.add(piece)
        rest -= piece.length
    chosen.add(next(piece for piece in free if piece.length >= rest and piece not in chosen))
    picked = []
    for piece in free:
        if piece in chosen:
            length = min(piece.length, size)
            picked.append(piece._replace(length=length))
            size -= length
    return picked


def _stripe_sets(lanes: list[list[Run]]) -> Iterator[Run]:
    """``lanes``, equally much of each device, cut so that each set has one run as long of each."""
    maps = [ExtentMap.linear(lane) for lane in lanes]
    cuts = sorted({offset for lane in maps for offset in lane.offsets})
    for begin, end in pairwise(cuts):
        for lane in maps:
            piece = lane.lookup(begin)
            yield Run(piece.device, piece.device_offset + begin - piece.offset, end - begin)
