"""The simulated disk of the host's own, on which a domain's dirty bitmap is kept."""

import errno
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import trio

from proxy.dirtymap import DirtyMap, DirtyMapError
from proxy.domainserver.bitmap import Disk
from tests.sim.agenda import MILLISECOND_NS, Agenda
from tests.sim.devices import Device, Faults
from tests.sim.medium import SECTOR
from tests.sim.rig import new_descriptor


class BitmapDisk:
    """What survives domain servers: the file in place now. Whoever still writes an older one does no harm.

    Attributes:
        is_full: no file can be made.
    """

    def __init__(self, agenda: Agenda, faults: Faults) -> None:
        self.agenda = agenda
        self.is_full = False
        self._faults = faults
        self._file: Device | None = None

    def put(self, data: bytes) -> Device:
        """Put a new file in the place of the old one."""
        self._file = Device("bitmap", self.agenda, self._faults, size=len(data), remote=False, offset=0)
        self._file.block_size = SECTOR  # as the engine writes it
        self._file.medium.write(0, data, durable=True)
        return self._file

    @property
    def file(self) -> Device | None:
        """The file in place, if there is one."""
        return self._file

    def lose_power(self, duration_ns: int) -> None:
        """Lose what is not durable; be back after a while."""
        if self._file is not None:
            self._file.lose_power(duration_ns)

    def recover(self) -> None:
        """Be well from now on."""
        self.is_full = False
        self._faults = Faults()
        if self._file is not None:
            self._file.recover()

    def damage(self) -> None:
        """Have the file decay, or be lost."""
        if self._file is not None:
            self.agenda.count("bitmaps damaged")
            if self.agenda.chance(0.3):
                self._file = None
            else:
                place = self.agenda.random.randrange(len(self._file.medium.content))
                flipped = bytes([self._file.medium.content[place] ^ 0x10])
                self._file.medium.write(place, flipped, durable=True)

    def content(self, domain: UUID, size: int) -> DirtyMap | None:
        """What the file holds, of a domain of ``size`` bytes; None: nothing that is of use."""
        if self._file is None:
            return None
        try:
            return DirtyMap.decode(bytes(self._file.medium.durable), domain=domain, size=size)
        except DirtyMapError:
            return None


class OpenedBitmapDisk(Disk):
    """The disk as one domain server has it.

    Args:
        taken: called with the descriptor that the engine gets, and the file it is of.
    """

    def __init__(self, disk: BitmapDisk, taken: Callable[[int, Device], None]) -> None:
        self._disk = disk
        self._taken = taken

    async def _wait(self) -> None:
        await trio.sleep(self._disk.agenda.random.randrange(2 * MILLISECOND_NS) / 1e9)

    async def read(self, path: Path) -> bytes:
        """See ``Disk.read``."""
        await self._wait()
        if self._disk.file is None:
            raise FileNotFoundError(path)
        return bytes(self._disk.file.medium.content)

    async def replace(self, path: Path, data: bytes) -> int:
        """See ``Disk.replace``."""
        await self._wait()
        if self._disk.is_full:
            raise OSError(errno.ENOSPC, "the disk is full")
        file = self._disk.put(data)
        await self._wait()
        descriptor = new_descriptor()
        self._taken(descriptor, file)
        return descriptor

    async def overwrite(self, path: Path, data: bytes) -> None:
        """See ``Disk.overwrite``."""
        await self._wait()
        assert self._disk.file is not None
        self._disk.file.medium.write(0, data, durable=True)
        await self._wait()
