"""The label: the first 4096 bytes of every device, saying whose it is and where its data begins. Pure.

::

    offset length
       0      8   magic
       8      4   version
      12     16   checksum of all 4096 bytes, these 16 taken as zero
      28     16   device uuid
      44     16   group uuid
      60     64   group name, UTF-8, zero-filled
     124      4   position in the group
     128      4   number of devices of the group
     132      8   size of the device in bytes
     140      8   data offset in bytes
     148      8   map generation of the writer
     156   3940   zero

Integers are little-endian. Magic, version and checksum stand where they do in every version, so that a
label of a later one is known to be sound before it is refused as too new.

The checksum is BLAKE2b cut to 128 bits: a label is read once for each opening, so its speed does not
matter, and a damaged label that passes is impossible rather than, with 32 bits, unlikely.
"""

import struct
from dataclasses import dataclass
from hashlib import blake2b
from uuid import UUID

from proxy.errors import LabelError, RefusedError
from proxy.model import ALLOCATION_UNIT, Device, Group
from proxy.sizes import GIB, KIB, MIB, format_size

#: One block of the largest kind of device: written and read whole.
LABEL_SIZE = 4096

VERSION = 1

_MAGIC = b"STANDFST"
_CHECKSUM_OFFSET = 12
_CHECKSUM_SIZE = 16
_NAME_SIZE = 64
_LAYOUT = struct.Struct(f"<8sI{_CHECKSUM_SIZE}s16s16s{_NAME_SIZE}sIIQQQ")

#: From this size on a device's data begins at the larger offset.
_LARGE_DEVICE_SIZE = GIB
#: A multiple of what flash erases and RAID stripes by, and of what disks are partitioned by.
_LARGE_DATA_OFFSET = MIB
#: On a small device a whole MiB would be waste; this keeps the allocator's unit aligned.
_SMALL_DATA_OFFSET = 64 * KIB


class LabelMissingError(LabelError):
    """The device does not begin with a label; what it begins with instead is not known."""


class LabelDamagedError(LabelError):
    """The device begins with a label that was torn, overwritten in part, or decayed."""


class LabelVersionError(LabelError):
    """The label is sound and of a version that this software does not know."""


class LabelMismatchError(LabelError):
    """The label is sound and not the one expected there."""


class LabelNewerError(LabelMismatchError):
    """The label is newer than the store can know of: the store is not the newest."""


class LabelStaleError(LabelError):
    """The label is the one expected there, and older than the store says: so is all else on the device."""


@dataclass(frozen=True, slots=True)
class Label:
    """What a device says of itself.

    ``device_size`` and ``data_offset`` are in bytes; ``map_generation`` counts how often a domain has begun to
    use its map onto the group: the label is written anew each time.
    """

    device_uuid: UUID
    group_uuid: UUID
    group_name: str
    position: int
    device_count: int
    device_size: int
    data_offset: int
    map_generation: int

    def encode(self) -> bytes:
        """The ``LABEL_SIZE`` bytes to write at the device's beginning."""
        blank = self._pack(bytes(_CHECKSUM_SIZE))
        return self._pack(_checksum(blank))

    @classmethod
    def decode(cls, block: bytes, *, url: str) -> "Label":
        """The label in ``block``, the first ``LABEL_SIZE`` bytes of the device ``url``.

        Raises:
            LabelMissingError: there is none.
            LabelDamagedError: there is one and its checksum is wrong.
            LabelVersionError: it is of a later version of this software.
        """
        assert len(block) == LABEL_SIZE, len(block)
        magic, version, checksum, device_uuid, group_uuid, name, *numbers = _LAYOUT.unpack_from(block)
        if magic != _MAGIC:
            raise LabelMissingError(
                f"{url}: has no label: expected {_MAGIC!r} at its beginning, found {magic!r}; "
                "it is not a device of any group, or was overwritten"
            )
        expected = _checksum(block)
        if checksum != expected:
            raise LabelDamagedError(
                f"{url}: its label is damaged: expected checksum {expected.hex()}, found {checksum.hex()}; "
                "replace the device, or give it to a new group with --force, which loses its data"
            )
        if version != VERSION:
            raise LabelVersionError(
                f"{url}: its label has version {version}, this software knows version {VERSION}; "
                "use the version of this software that wrote it, or a later one"
            )
        # The name is for messages only; a device is told by its uuids.
        group_name = name.rstrip(b"\0").decode(errors="replace")
        return cls(UUID(bytes=device_uuid), UUID(bytes=group_uuid), group_name, *numbers)

    def _pack(self, checksum: bytes) -> bytes:
        name = self.group_name.encode()
        assert len(name) <= _NAME_SIZE, name
        packed = _LAYOUT.pack(
            _MAGIC,
            VERSION,
            checksum,
            self.device_uuid.bytes,
            self.group_uuid.bytes,
            name,
            self.position,
            self.device_count,
            self.device_size,
            self.data_offset,
            self.map_generation,
        )
        return packed.ljust(LABEL_SIZE, b"\0")


def label_of(group: Group, device: Device, *, map_generation: int) -> Label:
    """The label ``device`` has to carry as one of ``group``."""
    return Label(
        device_uuid=device.uuid,
        group_uuid=group.uuid,
        group_name=group.name,
        position=device.position,
        device_count=len(group.devices),
        device_size=device.size,
        data_offset=device.data_offset,
        map_generation=map_generation,
    )


def check_label(found: Label, expected: Label, *, least_generation: int, url: str, size: int) -> None:
    """Make sure that the device is the one the store means.

    Args:
        found: what the device's label says.
        expected: what the store says; its ``map_generation`` is the highest that may have been written.
        least_generation: the highest that certainly was.
        url: the device, for messages.
        size: bytes the device has now; more than the label says does no harm.

    Raises:
        LabelMismatchError: it is another device, or has shrunk.
        LabelNewerError: it is the right device and ahead of the store.
        LabelStaleError: it is the right device and behind the store.
    """
    if found.group_uuid != expected.group_uuid:
        raise _mismatch(url, _membership(expected), _membership(found), "check which device the URL leads to")
    if found.device_uuid != expected.device_uuid or found.position != expected.position:
        raise _mismatch(url, _place(expected), _place(found), "two devices' URLs may be swapped")
    if found.device_count != expected.device_count:
        raise _mismatch(
            url,
            f"a group of {expected.device_count} devices",
            f"one of {found.device_count}",
            "the store and the device are of different times; was one restored from a backup?",
        )
    if (found.device_size, found.data_offset) != (expected.device_size, expected.data_offset):
        raise _mismatch(
            url,
            f"{expected.device_size} bytes with data from {expected.data_offset} on",
            f"{found.device_size} bytes with data from {found.data_offset} on",
            "the store and the device are of different times; was one restored from a backup?",
        )
    if size < found.device_size:
        raise _mismatch(
            url,
            f"a device of {found.device_size} bytes ({format_size(found.device_size)})",
            f"{size} bytes ({format_size(size)})",
            "it has shrunk; enlarge it again",
        )
    if found.map_generation > expected.map_generation:
        raise LabelNewerError(
            f"{url}: expected map generation {expected.map_generation} at most, found {found.map_generation}; the "
            "store is older than the device; bring back the newer store, or, if it is lost, say standfast group "
            f"accept {expected.group_name} once you know which group has the newest data"
        )
    if found.map_generation < least_generation:
        raise LabelStaleError(
            f"{url}: expected map generation {least_generation} at least, found {found.map_generation}; the device is "
            "older than the store, as after a restore from a backup, and so is what it holds"
        )


def data_offset_for(device_size: int, *, url: str) -> int:
    """Where the data of a device of ``device_size`` bytes begins: 1 MiB from 1 GiB on, else 64 KiB.

    Raises:
        RefusedError: after that offset there is not room for even one allocation unit.
    """
    offset = _LARGE_DATA_OFFSET if device_size >= _LARGE_DEVICE_SIZE else _SMALL_DATA_OFFSET
    least = offset + ALLOCATION_UNIT
    if device_size < least:
        raise RefusedError(
            f"{url}: a device of {device_size} bytes ({format_size(device_size)}) is too small: "
            f"{format_size(offset)} for the label and {format_size(ALLOCATION_UNIT)} for data "
            f"make {format_size(least)}"
        )
    return offset


def _checksum(block: bytes) -> bytes:
    """The checksum of a label, whatever stands in the checksum's own place."""
    digest = blake2b(block[:_CHECKSUM_OFFSET], digest_size=_CHECKSUM_SIZE)
    digest.update(bytes(_CHECKSUM_SIZE))
    digest.update(block[_CHECKSUM_OFFSET + _CHECKSUM_SIZE :])
    return digest.digest()


def _membership(label: Label) -> str:
    return f"a device of group {label.group_name!r} ({label.group_uuid})"


def _place(label: Label) -> str:
    return f"device {label.device_uuid} at position {label.position} of group {label.group_name!r}"


def _mismatch(url: str, expected: str, found: str, advice: str) -> LabelMismatchError:
    return LabelMismatchError(f"{url}: expected {expected}, found {found}; {advice}")
