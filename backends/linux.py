"""What Linux says of an open file and the standard library does not pass on. Synchronous.

Nothing here changes a file's content; a descriptor stays the caller's. ``OSError`` is what the kernel says.
"""

import ctypes
import fcntl
import os
import struct
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)

#: ``f_type`` of the file systems whose pages are the storage. Source: statfs(2).
_MEMORY_FILE_SYSTEMS = frozenset(
    {
        0x01021994,  # tmpfs, and the memfd
        0x858458F6,  # ramfs
        0x958458F6,  # hugetlbfs
    }
)
_STATFS_SIZE = 256  # of struct statfs, generously
_STATFS_TYPE = struct.Struct("@l")  # f_type is its first member

_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_STATX_SIZE = 256
_STATX_MASK = struct.Struct("=I")  # stx_mask is its first member
_STATX_DIO_ALIGNMENTS = struct.Struct("=II")  # stx_dio_mem_align, stx_dio_offset_align
_STATX_DIO_OFFSET = 152

_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02

#: The kernel truncates any single read or write to this. Source: read(2), NOTES (MAX_RW_COUNT).
TRANSFER_MAX = 0x7FFFF000


def is_in_memory(descriptor: int) -> bool:
    """Whether the file's storage is memory itself. Source: fstatfs(2)."""
    buffer = ctypes.create_string_buffer(_STATFS_SIZE)
    _check(_libc.fstatfs(descriptor, buffer))
    (kind,) = _STATFS_TYPE.unpack_from(buffer)
    return kind in _MEMORY_FILE_SYSTEMS


def direct_alignment(descriptor: int) -> int | None:
    """What O_DIRECT transfers must be multiples of, in offset, length and memory.

    Returns:
        A power of two; 0 when the file cannot be accessed directly; None when the file system does
        not say (``STATX_DIOALIGN`` is of Linux 6.1, and not every file system fills it in).

    Source: statx(2).
    """
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    _check(_libc.statx(descriptor, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer))
    (mask,) = _STATX_MASK.unpack_from(buffer)
    if not mask & _STATX_DIOALIGN:
        return None
    memory, offset = _STATX_DIO_ALIGNMENTS.unpack_from(buffer, _STATX_DIO_OFFSET)
    return max(memory, offset) if offset else 0


def set_direct(descriptor: int) -> None:
    """Turn O_DIRECT on. Source: fcntl(2), F_SETFL."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)


def can_punch_hole(descriptor: int, size: int) -> bool:
    """Whether the file system can free a range of the file, which then reads as zeroes.

    Asked by punching behind ``size``, the file's end, where nothing is. Source: fallocate(2).
    """
    arguments = (ctypes.c_int64(size), ctypes.c_int64(4096))
    mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
    return bool(_libc.fallocate(descriptor, mode, *arguments) == 0)


def is_rotational(device: int) -> bool:
    """Whether block device ``device`` (``st_dev`` or ``st_rdev``) turns; False when unknown.

    Source: the kernel's Documentation/ABI/stable/sysfs-block, queue/rotational.
    """
    node = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    # A partition has no queue of its own; its disk is the directory above.
    for directory in (node, node.parent):
        try:
            return (directory / "queue" / "rotational").read_text().strip() == "1"
        except OSError:
            continue
    return False


def _check(result: int) -> None:
    if result != 0:
        error_number = ctypes.get_errno()
        raise OSError(error_number, os.strerror(error_number))
