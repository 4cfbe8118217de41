"""``block:///dev/disk/by-id/…``: a block device of this machine, always accessed directly."""

import errno
import fcntl
import os
import stat
import struct
from dataclasses import dataclass

import trio

from backends import linux
from backends.base import BLOCK_SIZE_MAX, DataPath, DeviceInfo, Location
from backends.descriptor import DescriptorDevice
from backends.errors import DeviceError, DeviceUnavailableError
from backends.url import DeviceUrl

_BLKSSZGET = 0x1268  # logical block size, an int. Source: linux/fs.h
_INT = struct.Struct("@i")


@dataclass(frozen=True, slots=True)
class BlockLocation(Location):
    """A block device by its node or a link to it."""

    url: str
    path: str

    async def open(self, *, create: bool) -> DescriptorDevice:
        """See ``Location.open``; a block device is never created."""
        return await trio.to_thread.run_sync(_open, self)


def parse(url: DeviceUrl) -> BlockLocation:
    """Understand a ``block:`` URL. Raises DeviceUrlError."""
    url.expect_parameters(())
    return BlockLocation(url=url.text, path=url.local_path("block:///dev/disk/by-id/NAME"))


def _open(location: BlockLocation) -> DescriptorDevice:
    try:
        mode = os.stat(location.path).st_mode
        if stat.S_ISREG(mode):
            raise DeviceUnavailableError(f"{location.url}: is a regular file; write file://{location.path}")
        if not stat.S_ISBLK(mode):
            raise DeviceUnavailableError(f"{location.url}: is not a block device")
        descriptor = os.open(location.path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        raise DeviceUnavailableError(
            f"{location.url}: cannot be opened for reading and writing: {error.strerror}",
            error_number=error.errno or errno.EIO,
        ) from error
    try:
        info = _block_info(location, descriptor)
    except OSError as error:
        os.close(descriptor)
        raise DeviceError(
            f"{location.url}: does not tell its size: {error.strerror}", error_number=error.errno or errno.EIO
        ) from error
    except BaseException:
        os.close(descriptor)
        raise
    return DescriptorDevice(location.url, descriptor, info, local_path=location.path)


def _block_info(location: BlockLocation, descriptor: int) -> DeviceInfo:
    (block_size,) = _INT.unpack(fcntl.ioctl(descriptor, _BLKSSZGET, bytes(_INT.size)))
    if block_size > BLOCK_SIZE_MAX:
        raise DeviceUnavailableError(
            f"{location.url}: has blocks of {block_size} bytes; at most {BLOCK_SIZE_MAX} can be used"
        )
    size = os.lseek(descriptor, 0, os.SEEK_END)
    return DeviceInfo(
        size=size - size % block_size,
        block_size=block_size,
        transfer_max=linux.TRANSFER_MAX,
        path=DataPath.FILE,
        in_memory=False,
        can_flush=True,
        can_fua=True,
        # The kernel writes the zeroes itself where the disk has no command for it; a trim that the
        # disk cannot do is refused then, and is only advice.
        can_zero=True,
        can_trim=True,
        rotational=linux.is_rotational(os.fstat(descriptor).st_rdev),
    )
