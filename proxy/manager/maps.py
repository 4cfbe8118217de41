"""From records to what the engine is given: the flattened maps of a domain's disks on its legs. Pure."""

from collections.abc import Sequence
from typing import Any

from proxy.allocator import round_up
from proxy.engine.types import LegRole
from proxy.extentmap import ExtentMap, Range, Run, group_map
from proxy.failover import Record
from proxy.model import BLOCK_SIZE_MAX, Group, LegState, LostRange
from proxy.store import DiskRecord, DomainRecord


def domain_map(domain: DomainRecord, group: Group) -> ExtentMap:
    """Where a domain lies on one of its groups; striping may have allotted a little more than its size."""
    allotted = group_map(group.layout, len(group.devices), domain.runs[group.name])
    return allotted.compose([Range(0, domain.domain.size)])


def leg_role(record: Record, group: str) -> LegRole:
    """What an attached leg is to the engine."""
    if group == record.active:
        return LegRole.ACTIVE
    return LegRole.BACKUP if record.leg(group).state is LegState.UPTODATE else LegRole.SYNCING


def disk_messages(disks: Sequence[DiskRecord]) -> list[dict[str, Any]]:
    """The disks of a domain for an ``install`` or ``exports`` command, by number."""
    return [
        {"number": disk.number, "name": disk.name, "size": disk.size, "ready": disk.ready}
        for disk in sorted(disks, key=lambda disk: disk.number)
    ]


def disk_maps(domain: DomainRecord, groups: Sequence[Group]) -> list[bytes]:
    """The flattened map of each disk on each group, disks by number, encoded for the channel."""
    whole = [domain_map(domain, group) for group in groups]
    return [
        on_group.compose(disk.ranges).to_bytes()
        for disk in sorted(domain.disks, key=lambda disk: disk.number)
        for on_group in whole
    ]


def disk_places(disks: Sequence[DiskRecord]) -> list[bytes]:
    """Where each disk lies in the domain (as a map whose device 0 is the domain), by number, encoded."""
    return [
        ExtentMap.linear([Run(0, part.offset, part.length) for part in disk.ranges]).to_bytes()
        for disk in sorted(disks, key=lambda disk: disk.number)
    ]


def device_ranges(group: Group, runs: Sequence[Run]) -> list[list[tuple[int, int]]]:
    """For each device of a group, the (offset, length) ranges that ``runs`` have on it."""
    return [
        [(run.device_offset, run.length) for run in runs if run.device == device.position]
        for device in group.devices
    ]


def verify_ranges(disks: Sequence[DiskRecord]) -> list[tuple[int, int, int]]:
    """What legs must have in common: (disk number, offset, length) of all that clients can see, in whole blocks.

    What is allotted beyond, or to a disk not ready yet, may not have been zeroed on every leg.
    """
    return [(disk.number, 0, round_up(disk.size, BLOCK_SIZE_MAX)) for disk in disks if disk.ready]


def lost_ranges(disks: Sequence[DiskRecord], lacking: Sequence[Sequence[int]]) -> list[LostRange]:
    """What of which disk lies in ranges (offset, length) of the domain, ascending; by disk and offset."""
    lost = []
    for disk in disks:
        start = 0  # of a part, on the disk
        for part in disk.ranges if disk.ready else ():
            end = min(part.length, disk.size - start)
            for offset, length in lacking:
                first = max(offset - part.offset, 0)
                last = min(offset + length - part.offset, end)
                if first < last:
                    lost.append(LostRange(disk.name, start + first, last - first))
            start += part.length
    return lost


def copy_ranges(disks: Sequence[DiskRecord]) -> list[tuple[int, int, int]]:
    """What a leg must be given to equal another: (disk number, offset, length) of all that is allotted."""
    return [(disk.number, 0, sum(part.length for part in disk.ranges)) for disk in disks]
