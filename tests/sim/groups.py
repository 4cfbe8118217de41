"""A simulated group of devices: what the store says of it, and what lies on it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from uuid import UUID

from proxy.extentmap import ExtentMap, Range, Run, group_map
from proxy.label import label_of
from proxy.model import ALLOCATION_UNIT, Layout, LayoutKind
from proxy.model import Group as StoredGroup
from proxy.store import NewDevice, Store
from tests.sim.agenda import Agenda
from tests.sim.devices import Device, Faults

#: What lies where no disk has been yet; nothing may rely on it.
RUBBISH = b"\xdb"


@dataclass(slots=True, eq=False)
class Group:
    """A group of devices, with the space of the one domain on it.

    Args:
        runs: where the domain lies, in any order and of odd lengths; empty: the manager's allocator decides.
    """

    name: str
    devices: tuple[Device, ...]
    layout: Layout
    runs: tuple[Run, ...]
    map: ExtentMap = field(init=False)
    uuid: UUID = field(init=False)
    has_lost_power: bool = False  # since it was last synced
    _maps: dict[tuple[Range, ...], ExtentMap] = field(default_factory=dict)

    @classmethod
    def draw(cls, name: str, size: int, faults: Faults, agenda: Agenda) -> "Group":
        """One at random, with room for a domain of ``size`` bytes."""
        rng = agenda.random
        count = rng.choice((1, 2, 3))
        striped = rng.random() < 0.5
        chunk = rng.choice((4096, 8192)) if striped else 0
        layout = Layout(LayoutKind.STRIPED, chunk) if striped else Layout(LayoutKind.LINEAR)
        is_odd = rng.random() < 0.25
        unit = chunk or 4096 if is_odd else ALLOCATION_UNIT
        if striped:
            lengths = [-(-size // (count * unit)) * unit] * count
        else:
            borders = [0, *sorted(rng.sample(range(1, size // unit), count - 1)), size // unit]
            lengths = [(end - begin) * unit for begin, end in pairwise(borders)]
        devices = tuple(
            Device(
                f"{name}/{index}",
                agenda,
                faults,
                size=length,
                remote=rng.random() < 0.5,
                offset=rng.choice((4096, 12288)) if is_odd else ALLOCATION_UNIT,
            )
            for index, length in enumerate(lengths)
        )
        runs = [Run(index, device.offset, lengths[index]) for index, device in enumerate(devices)]
        if not striped:
            rng.shuffle(runs)
        return cls(name, devices, layout, tuple(runs) if is_odd else ())

    def add_to(self, store: Store, rng: random.Random) -> StoredGroup:
        """Record it, and label its devices."""
        stored = store.add_group(
            self.name,
            uuid_of(rng),
            self.layout,
            [NewDevice(uuid_of(rng), device.size, device.offset, device.url) for device in self.devices],
            0.0,
        )
        for device, record in zip(self.devices, stored.devices, strict=True):
            device.medium.write(0, label_of(stored, record, map_generation=0).encode(), durable=True)
        self.uuid = stored.uuid
        return stored

    def place(self, runs: Sequence[Run], size: int) -> None:
        """From now on a domain of ``size`` bytes lies here, in the place of rubbish."""
        self.map = group_map(self.layout, len(self.devices), runs).compose([Range(0, size)])
        self._maps.clear()
        self.has_lost_power = False
        self.spoil()

    @property
    def is_remote(self) -> bool:
        """Whether some device is another server's."""
        return any(device.remote for device in self.devices)

    @property
    def is_local(self) -> bool:
        """Whether some device is of the host that the domain server runs on."""
        return not all(device.remote for device in self.devices)

    @property
    def is_quiet(self) -> bool:
        """Whether no write of the past can still land on it."""
        return all(device.is_quiet for device in self.devices)

    @property
    def is_safe_to_give(self) -> bool:
        """Whether no write of the past can land in its space once somebody else has it.

        Whoever has it next locks it first, and on a device of this host that waits for such writes.
        """
        return all(device.is_quiet or (device.is_locked and not device.remote) for device in self.devices)

    @property
    def is_up(self) -> bool:
        """Whether all its devices can be reached."""
        return all(device.is_up for device in self.devices)

    @property
    def is_open(self) -> bool:
        """Whether somebody has one of its devices open."""
        return any(device.streams or device.is_locked for device in self.devices)

    def content(self, ranges: tuple[Range, ...], offset: int, length: int, *, durable: bool = False) -> bytes:
        """What lies at these bytes of a disk in ``ranges`` of the domain, or what a loss of power would leave."""
        if ranges not in self._maps:
            self._maps[ranges] = self.map.compose(ranges)
        parts = []
        for piece in self._maps[ranges].pieces(offset, length):
            medium = self.devices[piece.device].medium
            data = medium.durable if durable else medium.content
            parts.append(bytes(data[piece.device_offset : piece.device_offset + piece.length]))
        return b"".join(parts)

    def wipe(self, space: Range) -> None:
        """Put zeroes on all of a part of the domain, past everybody, durably."""
        for piece in self.map.pieces(space.offset, space.length):
            device = self.devices[piece.device]
            device.medium.write(piece.device_offset, bytes(piece.length), durable=True)

    def spoil(self, space: Range | None = None) -> None:
        """Put rubbish in the place of what the domain has here, all or in this space of its."""
        for piece in self.map if space is None else self.map.pieces(space.offset, space.length):
            self.devices[piece.device].medium.write(piece.device_offset, RUBBISH * piece.length, durable=True)


def uuid_of(rng: random.Random) -> UUID:
    """One at random."""
    return UUID(int=rng.getrandbits(128), version=4)


def space_of(ranges: Sequence[Range]) -> int:
    """Bytes in these ranges."""
    return sum(part.length for part in ranges)
