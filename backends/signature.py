"""Recognising what somebody else keeps on a device, before it is overwritten.

The knowledge is libblkid's, by way of ``blkid``. It reads the device itself where other programs can
reach it, and else a sparse copy of the areas it looks at.

Source: blkid(8), "EXIT STATUS" and ``-o export``; the magic tables of libblkid's probers.
"""

import os
import shutil
from collections.abc import Iterator, Mapping

import trio

from backends.base import OpenDevice
from backends.errors import DeviceError
from backends.sizes import KIB, MIB

#: What libblkid looks at in the beginning: the farthest is LUKS2's last copy of its header, at 4 MiB.
HEAD_LENGTH = 5 * MIB

#: And in the end: the farthest is bcachefs' last superblock, 1 MiB before it (RAID's are nearer).
TAIL_LENGTH = 2 * MIB

#: How much is copied at a time, for a device that is slow.
_COPY_LENGTH = 256 * KIB

#: The last two bytes of the first sector of whatever a PC can boot from.
_BOOT_MARK = b"\x55\xaa"
_BOOT_MARK_OFFSET = 510

#: What a disk image begins with, which blkid has no eye for. Source: qemu's docs/interop/qcow2.txt; VMware's
#: "Virtual Disk Format 5.0"; MS-VHDX 2.2.1, "File Type Identifier".
_IMAGES: Mapping[bytes, str] = {
    b"QFI\xfb": "qcow2 disk image",
    b"KDMV": "VMDK disk image",
    b"vhdxfile": "VHDX disk image",
}

_FOUND, _NOTHING_FOUND, _AMBIVALENT = 0, 2, 8

#: blkid's USAGE to the noun that follows TYPE.
_USAGES: Mapping[str, str] = {
    "filesystem": "file system",
    "raid": "RAID or volume member",
    "crypto": "encrypted volume",
}


async def foreign_signature(device: OpenDevice) -> str | None:
    """What is recognised on the device: a file system, partition table, RAID or LVM member, disk image.

    Returns:
        A description for an operator, such as ``ext4 file system 'backup' (UUID …)``; None when
        nothing is recognised.

    Raises:
        DeviceError: the device cannot be read, or blkid is missing or failed.
    """
    found = await _probe(device)
    if found is not None:
        return found
    head = await device.read(0, min(device.info.size, 8))
    for magic, image in _IMAGES.items():
        if head.startswith(magic):
            return image
    # blkid follows NTFS' and BitLocker's pointers into the volume and, where the copy has nothing,
    # takes neither for one; it reads a partition table by the sector size it believes in, which a
    # copy does not tell. All of them begin with a boot sector.
    if device.info.size >= _BOOT_MARK_OFFSET + len(_BOOT_MARK):
        mark = await device.read(_BOOT_MARK_OFFSET, len(_BOOT_MARK))
        if mark == _BOOT_MARK:
            return "boot sector of a kind that is not recognised"
    return None


async def _probe(device: OpenDevice) -> str | None:
    if device.local_path is not None:
        return await _run_blkid(device.url, device.local_path)
    # A memfd and not a temporary file, whose file system might not allow the device's size.
    copy = os.memfd_create("signature", os.MFD_CLOEXEC)
    try:
        os.ftruncate(copy, device.info.size)
        for start, stop in _probed_areas(device.info.size):
            for offset in range(start, stop, _COPY_LENGTH):
                data = await device.read(offset, min(_COPY_LENGTH, stop - offset))
                # Zeroes are there already.
                if data.count(0) != len(data):
                    os.pwrite(copy, data, offset)
        return await _run_blkid(device.url, f"/proc/{os.getpid()}/fd/{copy}")
    finally:
        os.close(copy)


def _probed_areas(size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of what libblkid looks at on a device of ``size`` bytes."""
    head_stop = min(size, HEAD_LENGTH)
    yield 0, head_stop
    tail_start = max(head_stop, size - TAIL_LENGTH)
    if tail_start < size:
        yield tail_start, size


async def _run_blkid(url: str, path: str) -> str | None:
    program = shutil.which("blkid", path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin")))
    if program is None:
        raise DeviceError(
            f"{url}: cannot be checked for foreign content: blkid is missing; install util-linux"
        )
    # -p: look at the device and never at a cache.
    result = await trio.run_process(
        [program, "-p", "-o", "export", path], capture_stdout=True, capture_stderr=True, check=False
    )
    if result.returncode == _AMBIVALENT:
        return "content of more than one kind (see wipefs -n)"
    if result.returncode not in (_FOUND, _NOTHING_FOUND):
        words = result.stderr.decode(errors="replace").strip() or "no reason given"
        raise DeviceError(f"{url}: blkid failed with exit status {result.returncode}: {words}")
    return describe(result.stdout.decode(errors="replace"))


def describe(export: str) -> str | None:
    """What blkid's output (``NAME=value`` lines) says in words; None when it recognised nothing.

    Not every output is a find: of an empty partition blkid tells the entry in the table around it.
    """
    tags = dict(line.split("=", 1) for line in export.splitlines() if "=" in line)
    if "TYPE" in tags:
        words = f"{tags['TYPE']} {_USAGES.get(tags.get('USAGE', ''), 'signature')}"
    elif "PTTYPE" in tags:
        words = f"{tags['PTTYPE']} partition table"
    else:
        return None
    if "LABEL" in tags:
        words += f" {tags['LABEL']!r}"
    identity = tags.get("UUID") or tags.get("PTUUID")
    return f"{words} (UUID {identity})" if identity else words
