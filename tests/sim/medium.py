"""What a simulated device stores: the content as written, and what of it is durable."""

from collections.abc import Callable
from dataclasses import dataclass

SECTOR = 512


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a flush has to make durable: of each sector its content, and which of its versions that was."""

    sectors: dict[int, tuple[int, bytes]]


class Medium:
    """Bytes of one device.

    Attributes:
        content: as written; what a read returns.
        durable: what a loss of power would leave.
    """

    def __init__(self, size: int) -> None:
        assert size % SECTOR == 0, size
        self.content = bytearray(size)
        self.durable = bytearray(size)
        self._version = 0
        self._versions: dict[int, int] = {}  # of sectors not durable in their present version
        self._durable_versions: dict[int, int] = {}

    def read(self, offset: int, length: int) -> bytes:
        """The content of a range that lies on the medium."""
        self._check(offset, length)
        return bytes(self.content[offset : offset + length])

    def write(self, offset: int, data: bytes, *, durable: bool = False) -> None:
        """Put ``data`` at ``offset``; it is volatile until a flush unless it is ``durable`` at once."""
        self._check(offset, len(data))
        self.content[offset : offset + len(data)] = data
        self._version += 1
        sectors = range(offset // SECTOR, (offset + len(data) + SECTOR - 1) // SECTOR)
        self._versions.update(dict.fromkeys(sectors, self._version))
        if durable:
            self.persist(Snapshot({sector: self._present(sector) for sector in sectors}))

    def flush_begin(self) -> Snapshot:
        """What a flush that begins now has to make durable."""
        return Snapshot({sector: self._present(sector) for sector in self._versions})

    def persist(self, snapshot: Snapshot) -> None:
        """Make a snapshot durable, and no more; what is durable in a later version already stays so."""
        for sector, (version, data) in snapshot.sectors.items():
            if version > self._durable_versions.get(sector, 0):
                self._durable_versions[sector] = version
                self.durable[sector * SECTOR : (sector + 1) * SECTOR] = data
            if self._versions.get(sector) == version:
                del self._versions[sector]

    def lose_power(self, keeps: Callable[[], bool]) -> None:
        """Forget, sector by sector, what is not durable, unless it ``keeps`` that one after all."""
        for sector in list(self._versions):
            if keeps():
                self.persist(Snapshot({sector: self._present(sector)}))
            else:
                begin, end = sector * SECTOR, (sector + 1) * SECTOR
                self.content[begin:end] = self.durable[begin:end]
        self._versions.clear()

    def _present(self, sector: int) -> tuple[int, bytes]:
        data = bytes(self.content[sector * SECTOR : (sector + 1) * SECTOR])
        return self._versions[sector], data

    def _check(self, offset: int, length: int) -> None:
        assert 0 <= offset <= offset + length <= len(self.content), (offset, length, len(self.content))
