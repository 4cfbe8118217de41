"""``memory:NAME?size=50M``: memory of this process as a device, for tests.

Each name is a memfd that lives as long as the process: opening the name again gives the same content.
"""

import errno
import os
import re
from dataclasses import dataclass
from typing import ClassVar

import trio

from backends.base import Location
from backends.descriptor import DescriptorDevice
from backends.errors import DeviceUnavailableError
from backends.file import file_info
from backends.sizes import format_size
from backends.url import DeviceUrl

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")

#: Name to memfd, for the life of the process.
_memory: dict[str, int] = {}


@dataclass(frozen=True, slots=True)
class MemoryLocation(Location):
    """A named piece of this process's memory; other processes cannot reach it."""

    shareable: ClassVar[bool] = False

    url: str
    name: str
    size: int | None

    async def open(self, *, create: bool) -> DescriptorDevice:
        """See ``Location.open``."""
        await trio.lowlevel.checkpoint()
        if self.name not in _memory:
            if not create or self.size is None:
                raise DeviceUnavailableError(
                    f"{self.url}: there is no memory of that name; give it a size (?size=50M) when the "
                    "group is created to have it made",
                    error_number=errno.ENOENT,
                )
            _memory[self.name] = _create(self)
        # Opened anew and not duplicated, since locks are between open file descriptions.
        descriptor = os.open(f"/proc/self/fd/{_memory[self.name]}", os.O_RDWR | os.O_CLOEXEC)
        device = DescriptorDevice(self.url, descriptor, file_info(descriptor, block_size=1), local_path=None)
        if self.size is not None and device.info.size < self.size:
            await device.aclose()
            raise DeviceUnavailableError(
                f"{self.url}: the memory has {device.info.size} bytes ({format_size(device.info.size)}), "
                f"the URL says {self.size} ({format_size(self.size)}); correct the URL",
                error_number=errno.ENOSPC,
            )
        return device


def parse(url: DeviceUrl) -> MemoryLocation:
    """Understand a ``memory:`` URL. Raises DeviceUrlError."""
    url.expect_parameters(("size",))
    if url.authority or _NAME.fullmatch(url.path) is None:
        raise url.refusal("needs a name of 1 to 63 letters, digits, dots, dashes or underscores, memory:NAME")
    return MemoryLocation(url=url.text, name=url.path, size=url.size())


def _create(location: MemoryLocation) -> int:
    assert location.size is not None
    descriptor = os.memfd_create(location.name, os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, location.size)
    except OSError as error:
        os.close(descriptor)
        raise DeviceUnavailableError(
            f"{location.url}: cannot be made: {error.strerror}", error_number=error.errno or errno.EIO
        ) from error
    return descriptor
