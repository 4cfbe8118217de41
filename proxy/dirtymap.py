"""The file of a domain's dirty bitmap: which regions may differ between its legs. Pure.

::

    sector 0                 header
    sectors 1 to n           plane 0, the intent: regions with writes that some leg may not have durably
    sectors 1+n to 2n        plane 1: regions that the leg of plane 1 lacks
    ...                      and so on, PLANES in all

The header::

    offset length
       0      4   checksum of the rest of the sector
       4      4   0: the number of the sector
       8      8   identity: the first 8 bytes of the domain's uuid
      16      8   magic
      24      4   version
      28      4   size of a region, as a power of 2
      32     16   uuid of the domain
      48      8   size of the domain in bytes
      56      8   session: counts the domain servers that had the domain
      64    4*16  uuid of the group whose leg has plane 1, 2, 3, 4; zero: nobody
     128      4   1: the store knows of the session; before that nothing is written under it
     132    380   zero

Every other sector::

       0      4   checksum of the rest of the sector
       4      4   number of the sector
       8      8   identity
      16    496   bits, 3,968 regions

Integers are little-endian, and bits are numbered from the least significant of the first byte. A sector is what
disks write whole or not at all, so a loss of power leaves each as it was or as it was to be; the checksum
(CRC-32) is against decay, misplaced writes and files of another domain.

Each session writes the file anew, beside the old one, and takes its place (``renewed`` says what of the old one
it takes over); from then on the engine writes single sectors.
"""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

SECTOR = 512
#: The intent, and one for each leg of a domain. The engine's dirty.pxi has the same.
PLANES = 5
INTENT = 0

VERSION = 1

_MAGIC = b"STFDIRTY"
_SECTOR_HEAD = struct.Struct("<II8s")
_SECTOR_BYTES = SECTOR - _SECTOR_HEAD.size
_HEADER = struct.Struct("<8sII16sQQ64sI")
_NOBODY = bytes(16)

#: Of a region's size, as a power of 2, unless told otherwise: ``bench bitmap`` shows what is traded.
REGION_SHIFT_DEFAULT = 18
#: An allocation unit, so that no region is of two disks, and what even a slow disk reads in a second.
REGION_SHIFTS = range(16, 27)
#: Of a plane, so that what is looked through in each round stays small: 512 KiB.
_REGIONS_MAX = 1 << 22


class DirtyMapError(Exception):
    """The file cannot be trusted; the message says why."""


@dataclass(frozen=True, slots=True)
class DirtyMap:
    """What the file holds.

    ``size`` of the domain is in bytes; ``groups[i]`` has plane ``i + 1``; every plane has
    ``plane_size(size, region_shift)`` bytes. ``is_recorded``: the store knows of the session.
    """

    domain: UUID
    size: int
    region_shift: int
    session: int
    groups: tuple[UUID | None, ...]
    planes: tuple[bytes, ...]
    is_recorded: bool = False

    @property
    def regions(self) -> int:
        return _regions(self.size, self.region_shift)

    @property
    def identity(self) -> int:
        """What each sector carries, as the engine takes it."""
        return int.from_bytes(self.domain.bytes[:8], "little")

    def plane_of(self, group: UUID) -> int | None:
        """The plane of this group's leg; None: it has none."""
        return self.groups.index(group) + 1 if group in self.groups else None

    def plane(self, group: UUID) -> bytes | None:
        """What this group's leg lacks; None: it is not known."""
        number = self.plane_of(group)
        return None if number is None else self.planes[number]

    def header(self) -> bytes:
        """The first sector."""
        uuids = b"".join(_NOBODY if group is None else group.bytes for group in self.groups)
        return _sector(
            0,
            self.domain,
            _HEADER.pack(
                _MAGIC,
                VERSION,
                self.region_shift,
                self.domain.bytes,
                self.size,
                self.session,
                uuids,
                self.is_recorded,
            ),
        )

    def encode(self) -> bytes:
        """The whole file."""
        sectors = [self.header()]
        for plane in self.planes:
            for offset in range(0, len(plane), _SECTOR_BYTES):
                sectors.append(_sector(len(sectors), self.domain, plane[offset : offset + _SECTOR_BYTES]))
        return b"".join(sectors)

    @classmethod
    def decode(cls, data: bytes, *, domain: UUID, size: int) -> "DirtyMap":
        """The map in a file's bytes.

        Args:
            domain: whose it has to be.
            size: the domain's, in bytes.

        Raises:
            DirtyMapError: it is damaged, of another domain, or of a version not known here.
        """
        body = _body(data, 0)
        magic, version, shift, uuid, found_size, session, groups, is_recorded = _HEADER.unpack_from(body)
        if magic != _MAGIC:
            raise DirtyMapError(f"it begins with {magic!r} instead of {_MAGIC!r}")
        if version != VERSION:
            raise DirtyMapError(f"it has version {version}, and {VERSION} is known here")
        if uuid != domain.bytes or found_size != size:
            raise DirtyMapError(f"it is of domain {UUID(bytes=uuid)} with {found_size} bytes")
        length = plane_size(size, shift)
        count = length // _SECTOR_BYTES
        if len(data) != SECTOR * (1 + PLANES * count):
            raise DirtyMapError(f"it has {len(data)} bytes instead of {SECTOR * (1 + PLANES * count)}")
        planes = []
        for plane in range(PLANES):
            first = 1 + plane * count
            planes.append(b"".join(_body(data, number) for number in range(first, first + count)))
        uuids = [groups[at : at + 16] for at in range(0, len(groups), 16)]
        found = tuple(None if one == _NOBODY else UUID(bytes=one) for one in uuids)
        return cls(domain, size, shift, session, found, tuple(planes), bool(is_recorded))


@dataclass(frozen=True, slots=True)
class LegContent:
    """What the store says of a leg's content: ``uptodate``, or else it lacks something."""

    group: UUID
    uptodate: bool


def renewed(
    before: DirtyMap | None,
    domain: UUID,
    size: int,
    session: int,
    legs: Sequence[LegContent],
    *,
    clean: bool,
    least_shift: int = REGION_SHIFT_DEFAULT,
) -> DirtyMap:
    """The map that a new session begins with.

    Args:
        before: the last session's, trusted; None: there is none that can be. Its regions are kept.
        least_shift: of the regions, as a power of 2; a large domain's are larger.
        legs: all of the domain.
        clean: the last session ended with every leg that took part equal to the others.

    Nothing is marked in its intent: what was is now in the planes. A leg of which nothing is known
    lacks everything.
    """
    shift = region_shift(size, least_shift) if before is None else before.region_shift
    blank = bytes(plane_size(size, shift))
    groups: list[UUID | None] = [None] * (PLANES - 1)
    planes = [blank] * PLANES
    for index, leg in enumerate(legs):
        groups[index] = leg.group
        if clean and leg.uptodate:
            continue
        known = None if before is None else before.plane(leg.group)
        if before is None or known is None:
            planes[index + 1] = full_plane(size, shift)
        else:
            planes[index + 1] = _union(known, before.planes[INTENT])
    return DirtyMap(domain, size, shift, session, tuple(groups), tuple(planes))


def region_shift(size: int, least_shift: int = REGION_SHIFT_DEFAULT) -> int:
    """The size of a region, as a power of 2, for a domain of ``size`` bytes."""
    shift = least_shift
    while _regions(size, shift) > _REGIONS_MAX:
        shift += 1
    return shift


def plane_size(size: int, shift: int) -> int:
    """Bytes of one plane: whole sectors."""
    per_sector = _SECTOR_BYTES * 8
    return -(-_regions(size, shift) // per_sector) * _SECTOR_BYTES


def full_plane(size: int, shift: int) -> bytes:
    """The plane of a leg that lacks everything."""
    return ((1 << _regions(size, shift)) - 1).to_bytes(plane_size(size, shift), "little")


def marked_ranges(plane: bytes, shift: int, size: int) -> list[tuple[int, int]]:
    """The marked regions of a plane as (offset, length) in bytes of the domain, adjacent ones joined."""
    ranges: list[tuple[int, int]] = []
    for index, byte in enumerate(plane):
        for bit in range(8) if byte else ():
            if not byte >> bit & 1:
                continue
            offset = (index * 8 + bit) << shift
            length = min(1 << shift, size - offset)
            if ranges and sum(ranges[-1]) == offset:
                ranges[-1] = (ranges[-1][0], ranges[-1][1] + length)
            else:
                ranges.append((offset, length))
    return ranges


def _regions(size: int, shift: int) -> int:
    return -(-size >> shift)


def _union(one: bytes, other: bytes) -> bytes:
    joined = int.from_bytes(one, "little") | int.from_bytes(other, "little")
    return joined.to_bytes(len(one), "little")


def _sector(number: int, domain: UUID, body: bytes) -> bytes:
    rest = struct.pack("<I8s", number, domain.bytes[:8]) + body.ljust(_SECTOR_BYTES, b"\0")
    return struct.pack("<I", zlib.crc32(rest)) + rest


def _body(data: bytes, number: int) -> bytes:
    """The body of one sector, checked."""
    sector = data[number * SECTOR : (number + 1) * SECTOR]
    if len(sector) < SECTOR:
        raise DirtyMapError(f"it ends within sector {number}")
    checksum, found, identity = _SECTOR_HEAD.unpack_from(sector)
    if checksum != zlib.crc32(sector[4:]):
        raise DirtyMapError(f"sector {number} is damaged")
    if found != number or (number and identity != data[8:16]):
        raise DirtyMapError(f"sector {number} is another one's")
    return sector[_SECTOR_HEAD.size :]
