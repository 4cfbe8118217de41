"""What every backend offers: a location understood from a URL, and the open device behind it.

A device has two lives. On the *control path* it is an ``OpenDevice``: Python reads and writes its
label and probes it for foreign content, at any offset and length, with no hurry. Then it is
``detach``ed: the bare descriptor goes to the native engine, which drives the *data path* by what
``DeviceInfo`` says and never calls back here.
"""

import errno
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import ClassVar, Self

from backends.errors import DeviceError

#: Disks and clients count in blocks of at most this; a device with larger ones is refused.
BLOCK_SIZE_MAX = 4096


class DataPath(Enum):
    """How the native engine drives the descriptor."""

    FILE = "file"
    NBD = "nbd"


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What the engine has to know of a device.

    Attributes:
        size: bytes, rounded down to a multiple of ``block_size``.
        block_size: every transfer on the data path must be a multiple of it, in offset and in
            length; 1 when any will do.
        transfer_max: bytes of the largest single transfer, a multiple of ``block_size``.
        path: how the descriptor is driven.
        in_memory: the file system is memory (tmpfs, ramfs, hugetlbfs, a memfd). The engine then
            does I/O inline, since the kernel refuses ``RWF_NOWAIT`` there.
        can_flush: what was written can be made durable on request.
        can_fua: one write can be made durable by itself (``RWF_DSYNC``, ``NBD_CMD_FLAG_FUA``).
        can_zero: zeroes can be written without sending them: ``NBD_CMD_WRITE_ZEROES``; on a regular file
            ``FALLOC_FL_PUNCH_HOLE``, since not every file system has ``FALLOC_FL_ZERO_RANGE``; on a
            block device ``FALLOC_FL_ZERO_RANGE``, since not every disk can discard.
        can_trim: space can be given back (``FALLOC_FL_PUNCH_HOLE``, ``NBD_CMD_TRIM``).
        rotational: seeking costs.
    """

    size: int
    block_size: int
    transfer_max: int
    path: DataPath
    in_memory: bool
    can_flush: bool
    can_fua: bool
    can_zero: bool
    can_trim: bool
    rotational: bool

    def __post_init__(self) -> None:
        assert self.size % self.block_size == 0, (self.size, self.block_size)
        assert self.transfer_max % self.block_size == 0, (self.transfer_max, self.block_size)


class OpenDevice(ABC):
    """A device on the control path, before the engine takes over; an async context manager.

    One task at a time uses it. It is finished after ``detach`` or ``aclose``; any other call then
    raises ``trio.ClosedResourceError``.

    Attributes:
        url: the device URL, for messages.
        info: what the engine has to know.
        local_path: where other programs of this machine find the same content; None when they
            cannot reach it.
    """

    def __init__(self, url: str, info: DeviceInfo, *, local_path: str | None = None) -> None:
        self.url = url
        self.info = info
        self.local_path = local_path

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes at ``offset``; neither needs any alignment.

        Raises:
            DeviceError: the range is not inside the device, or the device failed.
        """
        self._check_range(offset, length, error_number=errno.EINVAL)
        start, stop = self._blocks_around(offset, length)
        blocks = await self._read_blocks(start, stop - start)
        return blocks[offset - start : offset - start + length]

    async def write(self, offset: int, data: bytes) -> None:
        """Write all of ``data`` at ``offset``; neither needs any alignment. Durable after ``flush``.

        Raises:
            DeviceError: the range is not inside the device, or the device failed; how much was
                written is then not known.
        """
        # A write past the end is out of space: so NBD proto.md wants a client told.
        self._check_range(offset, len(data), error_number=errno.ENOSPC)
        start, stop = self._blocks_around(offset, len(data))
        if stop - start != len(data):
            blocks = await self._read_blocks(start, stop - start)
            data = blocks[: offset - start] + data + blocks[offset - start + len(data) :]
        await self._write_blocks(start, data)

    @abstractmethod
    async def flush(self) -> None:
        """Make every finished write durable.

        Raises:
            DeviceError: the device failed; what is durable is then not known.
        """

    @abstractmethod
    async def lock(self, ranges: Sequence[tuple[int, int]], *, timeout_s: float) -> None:
        """Hold ``ranges`` ((offset, length) in bytes, disjoint) to the exclusion of other openers.

        All or none. The lock goes with the descriptor: ``detach`` keeps it, closing ends it.

        Raises:
            DeviceBusyError: another process holds one of them and did not let go in ``timeout_s``.
            DeviceError: the device cannot be locked.
        """

    @abstractmethod
    def detach(self) -> int:
        """Hand the descriptor over: the caller owns it from now on, and this object is finished.

        The descriptor is in blocking mode and closes on exec. Its flags and its locks stay.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Close the device, at once even when cancelled; does nothing when it is finished already."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @abstractmethod
    async def _read_blocks(self, offset: int, length: int) -> bytes:
        """Read whole blocks inside the device, of any total length. Raises DeviceError."""

    @abstractmethod
    async def _write_blocks(self, offset: int, data: bytes) -> None:
        """Write whole blocks inside the device, of any total length. Raises DeviceError."""

    def _blocks_around(self, offset: int, length: int) -> tuple[int, int]:
        """Where the blocks begin and end that hold the range."""
        block_size = self.info.block_size
        end = offset + length
        return offset - offset % block_size, end + -end % block_size

    def _check_range(self, offset: int, length: int, *, error_number: int) -> None:
        """Raise DeviceError (with ``error_number``) unless the range lies inside the device."""
        if offset < 0 or length < 0 or offset + length > self.info.size:
            raise DeviceError(
                f"{self.url}: {length} bytes at offset {offset} are not inside its {self.info.size} bytes",
                error_number=error_number,
            )


class Location(ABC):
    """Where a device is: its URL understood, and nothing touched yet.

    Attributes:
        url: the device URL as it was given.
        shareable: other processes of this machine reach the same content by the same URL. A group
            needs that, since each of its domains is a process of its own.
    """

    __slots__ = ()

    url: str
    shareable: ClassVar[bool] = True

    @abstractmethod
    async def open(self, *, create: bool) -> OpenDevice:
        """Open the device for reading and writing.

        Args:
            create: make it when it is absent, if its kind can be made and the URL gives a size.

        Raises:
            DeviceUnavailableError: it is missing, out of reach, of another kind, or too small.
            DeviceError: it was reached and misbehaved.
        """
