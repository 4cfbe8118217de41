"""``file:///path?size=50M[&cache=direct|buffered]``: a regular file as a device.

The page cache is bypassed (O_DIRECT) where the file system can, so that a flush has little to do and
memory is left to the machine's guests; ``cache=buffered`` keeps to the page cache and
``cache=direct`` refuses a file system that cannot do without it.
"""

import errno
import os
import stat
from dataclasses import dataclass
from enum import Enum

import trio

from backends import linux
from backends.base import BLOCK_SIZE_MAX, DataPath, DeviceInfo, Location
from backends.descriptor import DescriptorDevice
from backends.errors import DeviceError, DeviceUnavailableError
from backends.sizes import format_size
from backends.url import DeviceUrl

#: A created file holds the data of virtual machines: nobody else's business.
_CREATE_MODE = 0o600


class Cache(Enum):
    """Whether transfers go by the page cache. ``AUTO`` is direct where the file system can."""

    AUTO = "auto"
    DIRECT = "direct"
    BUFFERED = "buffered"


@dataclass(frozen=True, slots=True)
class FileLocation(Location):
    """A regular file; ``size`` is what it is created with and must at least have."""

    url: str
    path: str
    size: int | None
    cache: Cache

    async def open(self, *, create: bool) -> DescriptorDevice:
        """See ``Location.open``."""
        return await trio.to_thread.run_sync(_open, self, create)


def parse(url: DeviceUrl) -> FileLocation:
    """Understand a ``file:`` URL. Raises DeviceUrlError."""
    url.expect_parameters(("size", "cache"))
    path = url.local_path("file:///srv/device.img")
    choice = url.parameters.get("cache")
    if choice not in (None, Cache.DIRECT.value, Cache.BUFFERED.value):
        raise url.refusal(f"asks for cache {choice!r}; it can be direct or buffered")
    return FileLocation(url=url.text, path=path, size=url.size(), cache=Cache(choice or Cache.AUTO.value))


def file_info(descriptor: int, *, block_size: int) -> DeviceInfo:
    """What the engine has to know of an open regular file. Raises OSError."""
    status = os.fstat(descriptor)
    can_punch = linux.can_punch_hole(descriptor, status.st_size)
    return DeviceInfo(
        size=status.st_size - status.st_size % block_size,
        block_size=block_size,
        transfer_max=linux.TRANSFER_MAX,
        path=DataPath.FILE,
        in_memory=linux.is_in_memory(descriptor),
        can_flush=True,
        can_fua=True,
        can_zero=can_punch,
        can_trim=can_punch,
        rotational=linux.is_rotational(status.st_dev),
    )


def _open(location: FileLocation, create: bool) -> DescriptorDevice:
    try:
        descriptor = _open_or_create(location, create)
    except OSError as error:
        raise DeviceUnavailableError(
            f"{location.url}: cannot be opened for reading and writing: {error.strerror}",
            error_number=error.errno or errno.EIO,
        ) from error
    try:
        _check_size(location, os.fstat(descriptor).st_size)
        info = file_info(descriptor, block_size=_choose_cache(location, descriptor))
    except OSError as error:
        os.close(descriptor)
        raise DeviceError(
            f"{location.url}: its file system does not answer as it should: {error.strerror}",
            error_number=error.errno or errno.EIO,
        ) from error
    except BaseException:
        os.close(descriptor)
        raise
    return DescriptorDevice(location.url, descriptor, info, local_path=location.path)


def _open_or_create(location: FileLocation, create: bool) -> int:
    """An open descriptor of the regular file, made first when it is absent and may be."""
    try:
        # Asked before opening: to open a tape, a terminal or a pipe would already do something.
        mode = os.stat(location.path).st_mode
    except FileNotFoundError:
        if not create or location.size is None:
            raise DeviceUnavailableError(
                f"{location.url}: there is no such file; check the path, or give it a size "
                "(?size=50M) when the group is created to have it made",
                error_number=errno.ENOENT,
            ) from None
        return _create(location, location.size)
    if stat.S_ISBLK(mode):
        raise DeviceUnavailableError(f"{location.url}: is a block device; write block://{location.path}")
    if not stat.S_ISREG(mode):
        raise DeviceUnavailableError(f"{location.url}: is not a regular file")
    return os.open(location.path, os.O_RDWR | os.O_CLOEXEC)


def _create(location: FileLocation, size: int) -> int:
    """A new sparse file, durable together with its name; nothing is left behind when that fails."""
    try:
        descriptor = os.open(location.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _CREATE_MODE)
        try:
            os.ftruncate(descriptor, size)
            os.fsync(descriptor)
            _sync_directory(os.path.dirname(location.path))
        except BaseException:
            os.unlink(location.path)
            os.close(descriptor)
            raise
    except FileNotFoundError as error:
        raise DeviceUnavailableError(
            f"{location.url}: cannot be created: there is no directory {os.path.dirname(location.path)}",
            error_number=errno.ENOENT,
        ) from error
    except OSError as error:
        raise DeviceUnavailableError(
            f"{location.url}: cannot be created with {size} bytes: {error.strerror}",
            error_number=error.errno or errno.EIO,
        ) from error
    return descriptor


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_size(location: FileLocation, size: int) -> None:
    if location.size is not None and size < location.size:
        raise DeviceUnavailableError(
            f"{location.url}: the file has {size} bytes ({format_size(size)}), the URL says "
            f"{location.size} ({format_size(location.size)}); correct the URL or enlarge the file",
            error_number=errno.ENOSPC,
        )


def _choose_cache(location: FileLocation, descriptor: int) -> int:
    """Set the descriptor to direct or buffered, and return the block size that follows from it."""
    # Where pages are the storage there is no cache to go around.
    if location.cache is Cache.BUFFERED or linux.is_in_memory(descriptor):
        return 1
    block_size = _try_direct(descriptor)
    if block_size is not None:
        return block_size
    if location.cache is Cache.DIRECT:
        raise DeviceUnavailableError(
            f"{location.url}: its file system cannot go around the page cache; leave cache=direct out",
            error_number=errno.EINVAL,
        )
    return 1


def _try_direct(descriptor: int) -> int | None:
    """The block size of direct transfers, which are then switched on; None when there can be none.

    Not found by trying ever larger reads: a hole in a sparse file is read at any alignment.
    """
    alignment = linux.direct_alignment(descriptor)
    if alignment is None:
        # Where the file system does not say, the most that any in use asks for.
        alignment = BLOCK_SIZE_MAX
    if not 0 < alignment <= BLOCK_SIZE_MAX:
        return None
    try:
        linux.set_direct(descriptor)
    except OSError:
        return None
    return alignment
