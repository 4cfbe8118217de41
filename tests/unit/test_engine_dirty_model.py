"""The dirty bitmap against a model, at random: whatever a leg may lack is named where a crash leaves it.

One engine after another serves a domain of three legs as a manager would have it: legs are lost, come back, are
copied to and take over; disks are made, grown and removed; clients write. Operations land whole or in part, in
any order, before they complete or never. Now and then the host loses its power, and with it what was not
flushed, or not; the next session begins with what the bitmap's file then holds.

Whenever anything has landed: where a leg differs from the active one, or might after a crash at this moment, is
marked on the bitmap's disk, in the leg's plane or in the intent. And a leg that is said to be equal is equal.
"""

import errno
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from random import Random
from uuid import UUID

import pytest

from proxy.dirtymap import INTENT, DirtyMap, LegContent, plane_size, renewed
from proxy.engine import EventKind, LegRole, OpKind, PendingOp, RequestKind, Tracking
from proxy.extentmap import ExtentMap, Range, Run
from proxy.model import LegState
from tests.sim.medium import SECTOR, Medium, Snapshot
from tests.sim.rig import DEVICE_BASE, Client, Rig, pattern

KIB = 1024
UNIT = 64 * KIB
SIZE = 8 * UNIT
DOMAIN = UUID(int=7)
#: The lengths of each group's devices, in their order.
GROUPS = {1: (SIZE,), 2: (SIZE // 2, SIZE // 2), 3: (SIZE,)}
#: From planes of several sectors to regions that two disks share.
SHIFTS = (8, 12, 14, 16, 17)
STEPS = 250
WRITES_MAX = 10
UPTODATE, SYNCING, OUTDATED = LegState.UPTODATE, LegState.SYNCING, LegState.OUTDATED


@dataclass(slots=True)
class Disk:
    """``zeroed``: how much of it clients may use; ``born``: the first map with all of it; ``token``: its ZERO's."""

    number: int
    ranges: list[Range]
    zeroed: int = 0
    born: int = 0
    token: int | None = None
    client: Client | None = None

    @property
    def space(self) -> int:
        return sum(part.length for part in self.ranges)

    def places(self, offset: int, end: int) -> Iterator[Range]:
        """Where this part of it lies in the domain."""
        begin = 0
        for part in self.ranges:
            first, last = max(offset, begin), min(end, begin + part.length)
            if first < last:
                yield Range(part.offset + first - begin, last - first)
            begin += part.length


@dataclass(frozen=True, slots=True)
class Write:
    """A request of a client that is not answered yet."""

    client: Client
    cookie: int
    places: tuple[Range, ...]


def overlap(one: Range, other: Range) -> Range:
    """What is in both; of no length when nothing is."""
    begin = max(one.offset, other.offset)
    return Range(begin, max(0, min(one.offset + one.length, other.offset + other.length) - begin))


def differences(views: tuple[bytes, ...], part: Range, step: int) -> Iterator[Range]:
    """Where in a part some views of a domain are not the same, in pieces of ``step`` bytes at most."""
    first = views[0][part.offset : part.offset + part.length]
    if all(one[part.offset : part.offset + part.length] == first for one in views):
        return
    if part.length <= step:
        yield part
        return
    half = max(step, part.length // 2 // step * step)
    yield from differences(views, Range(part.offset, half), step)
    yield from differences(views, Range(part.offset + half, part.length - half), step)


@dataclass(slots=True)
class Host:
    """A domain with its media and its bitmap, and what a manager knows of it."""

    random: Random
    rig: Rig = field(default_factory=Rig)
    media: dict[int, list[Medium]] = field(default_factory=dict)
    states: dict[int, LegState] = field(default_factory=lambda: dict.fromkeys(GROUPS, UPTODATE))
    active: int = 1
    disks: list[Disk] = field(default_factory=list)
    session: int = 1
    opened: dict[int, int] = field(default_factory=dict)  # of a group: its number in the engine
    groups: dict[int, int] = field(default_factory=dict)  # of a number: the group, until it is closed
    last_leg: int = 0
    dead: set[int] = field(default_factory=set)  # groups whose devices have lost their power
    copying: set[int] = field(default_factory=set)
    copied: set[int] = field(default_factory=set)
    maps: set[int] = field(default_factory=set)  # that requests still run under
    writes: list[Write] = field(default_factory=list)
    snapshots: dict[int, Snapshot] = field(default_factory=dict)  # of flushes under way
    bitmap_hangs: bool = False
    last_number: int = 1
    log: list[str] = field(default_factory=list)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    # --- Sessions ---------------------------------------------------------------------------------

    def begin(self) -> None:
        """A new domain: its legs are equal, and one disk has half of it."""
        for group, lengths in GROUPS.items():
            self.media[group] = [Medium(DEVICE_BASE + length) for length in lengths]
        shift = self.random.choice(SHIFTS)
        fresh = renewed(None, DOMAIN, SIZE, self.session, self.contents(), clean=True)
        planes = (bytes(plane_size(SIZE, shift)),) * len(fresh.planes)
        self.disks = [Disk(1, [Range(0, SIZE // 2)], zeroed=SIZE // 2)]
        self.start(replace(fresh, region_shift=shift, planes=planes))

    def start(self, content: DirtyMap) -> None:
        """A blank domain server is given the bitmap, legs, and a map."""
        self.rig = Rig()
        for known in (self.opened, self.groups, self.snapshots, self.writes):
            known.clear()
        for some in (self.dead, self.copying, self.copied, self.maps):
            some.clear()
        self.rig.open_bitmap(SIZE, content)
        # Slowed down, a copy takes steps that may be smaller than a region.
        self.rig.engine.pace_copies(rate=0, floor=self.random.choice((0, KIB * KIB)))
        for group in self.attached():
            self.open_leg(group)
        self.install()
        self.rig.engine.release()
        for disk in self.disks:
            disk.client = self.rig.connect(disk.number)
        self.pump()

    def contents(self) -> list[LegContent]:
        return [LegContent(UUID(int=group), self.states[group] is UPTODATE) for group in GROUPS]

    def bitmap(self) -> DirtyMap:
        """What the bitmap's disk holds."""
        assert self.rig.bitmap is not None
        return DirtyMap.decode(bytes(self.rig.bitmap.medium.durable), domain=DOMAIN, size=SIZE)

    def crash(self) -> None:
        """The host loses its power at this moment, and comes back."""
        self.log.append("crash")
        for op in self.rig.file_ops():
            if self.chance(0.5):
                self.land_part(op)
        self.session += 1
        content = renewed(self.bitmap(), DOMAIN, SIZE, self.session, self.contents(), clean=False)
        media = {group: [self.without_power(one) for one in media] for group, media in self.media.items()}
        self.rig.run()  # seen by nobody; an engine with nothing under way can be let go
        self.media = media
        others = [group for group in self.equals() if self.chance(0.5)]
        if others:  # the active leg cannot be reached, and another one is as good
            self.states[self.active] = OUTDATED
            self.active = others[0]
        for group in self.equals():
            self.states[group] = SYNCING
        self.disks = [disk for disk in self.disks if disk.zeroed]
        for disk in self.disks:
            disk.token, disk.born = None, 0
        self.start(content)

    def stop(self) -> None:
        """A clean end, and the next session."""
        self.log.append("stop")
        if self.dead:
            return
        for disk in self.disks:
            if disk.client is not None:
                self.rig.engine.end_connection(disk.client.number)
        self.settle()
        token = self.rig.engine.submit(RequestKind.FLUSH)
        self.settle()
        (done,) = [event for event in self.rig.take_events(EventKind.DONE) if event.a == token]
        assert done.code == 0
        self.session += 1
        content = renewed(self.bitmap(), DOMAIN, SIZE, self.session, self.contents(), clean=True)
        self.media = {
            group: [self.without_power(one) for one in media] for group, media in self.media.items()
        }
        self.disks = [disk for disk in self.disks if disk.zeroed]
        for disk in self.disks:
            disk.token, disk.born = None, 0
        self.start(content)

    def without_power(self, medium: Medium) -> Medium:
        """A medium after its power was cut: of each sector either what was durable or what was written since."""
        after = Medium(len(medium.content))
        content = bytearray(medium.durable)
        kept = self.random.choice((0.0, 0.5, 1.0))
        for offset in range(0, len(content), SECTOR):
            if self.chance(kept):
                content[offset : offset + SECTOR] = medium.content[offset : offset + SECTOR]
        after.write(0, bytes(content), durable=True)
        return after

    # --- What a manager does ----------------------------------------------------------------------

    def attached(self) -> list[int]:
        """The groups of the record's map, the active one first."""
        others = [group for group in GROUPS if group != self.active and self.states[group] is not OUTDATED]
        return [self.active, *others]

    def equals(self) -> list[int]:
        return [group for group in GROUPS if group != self.active and self.states[group] is UPTODATE]

    def open_leg(self, group: int) -> None:
        self.last_leg = number = self.last_leg + 1
        leg = self.rig.add_leg(number, GROUPS[group])
        for device, medium in zip(leg.devices, self.media[group], strict=True):
            device.medium = medium
        self.opened[group] = number
        self.groups[number] = group

    def role(self, group: int) -> LegRole:
        if group == self.active:
            return LegRole.ACTIVE
        return LegRole.BACKUP if self.states[group] is UPTODATE else LegRole.SYNCING

    def install(self) -> None:
        """The record's map."""
        attached = self.attached()
        self.rig.generation += 1
        legs = [self.rig.legs[self.opened[group]] for group in attached]
        self.rig.engine.install(
            self.rig.generation,
            [(leg.id, self.role(group)) for leg, group in zip(legs, attached, strict=True)],
            [
                (disk.number, disk.zeroed, [leg.map.compose(disk.ranges) for leg in legs])
                for disk in self.disks
            ],
            tracking=Tracking(
                attached,
                [group for group in GROUPS if group not in attached],
                [
                    ExtentMap.linear([Run(0, part.offset, part.length) for part in disk.ranges])
                    for disk in self.disks
                ],
            ),
        )
        self.maps.add(self.rig.generation)

    def hold(self) -> None:
        """Hold, and wait until nothing runs any more."""
        number = self.rig.engine.hold()
        self.pump()
        while not any(event.a == number for event in self.rig.take_events(EventKind.DRAINED)):
            self.complete_some(1)

    def lose(self, group: int) -> None:
        """A leg goes; if it was the active one, another takes its place, or it comes back itself."""
        successors = [one for one in self.equals() if one not in self.dead]
        self.log.append(f"lose {group} active {self.active}")
        number = self.opened[group]
        self.copying.discard(group)
        self.copied.discard(group)
        self.rig.engine.hold()
        if group == self.active and not successors:
            self.copied.clear()  # they were equal to what it had not flushed, perhaps
            self.rig.engine.close_leg(number)
            del self.opened[group]
            self.hold()
            while not self.may_open(group):
                self.complete_some(1)
            self.open_again(group)
        else:
            self.rig.engine.fence_leg(number)
            self.hold()
            if group == self.active:
                self.active = successors[0]
            del self.opened[group]
            self.states[group] = OUTDATED
        self.check()
        self.complete_some(self.random.randrange(3))
        self.install()
        self.rig.engine.release()
        self.pump()

    def may_open(self, group: int) -> bool:
        """Whether no late write can land on it any more."""
        fds = {
            device.fd
            for number, one in self.groups.items()
            if one == group and number != self.opened.get(group)
            for device in self.rig.legs[number].devices
        }
        return not any(op.fd in fds for op in self.rig.engine.pending())

    def open_again(self, group: int) -> None:
        if group in self.dead:
            self.media[group] = [self.without_power(medium) for medium in self.media[group]]
            self.dead.discard(group)
        for number, one in self.groups.items():
            if one == group:
                self.rig.engine.close_leg(number)
        self.pump()
        self.open_leg(group)

    def bring_back(self, group: int) -> None:
        self.log.append(f"bring back {group}")
        self.open_again(group)
        self.states[group] = SYNCING
        self.install()
        self.pump()

    def fail_over(self, group: int) -> None:
        """As ordered by an operator."""
        self.log.append(f"fail over to {group}")
        self.hold()
        before, self.active = self.active, group
        self.rig.engine.fence_leg(self.opened.pop(before))
        self.states[before] = OUTDATED
        self.check()
        self.install()
        self.rig.engine.release()
        self.pump()

    def promote(self, group: int) -> None:
        self.log.append(f"{group} is up to date")
        self.copied.discard(group)
        self.check_equal(group)
        self.states[group] = UPTODATE
        self.install()
        self.pump()

    def make_disk(self) -> None:
        space = self.free_space()
        if space is None:
            return
        self.last_number += 1
        self.log.append(f"disk {self.last_number} at {space}")
        self.disks.append(Disk(self.last_number, [space]))
        self.install()
        self.disks[-1].born = self.rig.generation
        self.pump()

    def grow_disk(self, disk: Disk) -> None:
        space = self.free_space()
        if space is None or disk.space != disk.zeroed:
            return
        self.log.append(f"disk {disk.number} grows by {space}")
        disk.ranges.append(space)
        self.install()
        disk.born = self.rig.generation
        self.pump()

    def remove_disk(self, disk: Disk) -> None:
        if disk.space != disk.zeroed:
            return
        self.log.append(f"disk {disk.number} is removed")
        self.disks.remove(disk)
        self.install()
        if disk.client is not None and disk.client.closed is None:
            self.rig.engine.end_connection(disk.client.number)
        self.pump()

    def free_space(self) -> Range | None:
        taken = {
            offset // UNIT
            for disk in self.disks
            for part in disk.ranges
            for offset in range(part.offset, part.offset + part.length, UNIT)
        }
        free = [unit for unit in range(SIZE // UNIT) if unit not in taken]
        return Range(self.random.choice(free) * UNIT, UNIT) if free else None

    def see_to_disks(self) -> None:
        """Zero what is new once no request of an older map runs; then clients may use it."""
        for disk in self.disks:
            if disk.space == disk.zeroed:
                continue
            if disk.token is None and disk.born and min(self.maps, default=disk.born) >= disk.born:
                rest = disk.space - disk.zeroed
                disk.token = self.rig.engine.submit(RequestKind.ZERO, disk.number, disk.zeroed, rest)
            for event in self.rig.take_events(EventKind.DONE):
                (other,) = [one for one in self.disks if one.token == event.a]
                assert event.code == 0
                other.token, other.zeroed = None, other.space
                self.install()
                if other.client is None:
                    other.client = self.rig.connect(other.number)
        self.pump()

    def see_to_copies(self) -> None:
        for event in self.rig.take_events(EventKind.COPIED):
            group = self.groups.get(event.leg, 0)
            if self.opened.get(group) == event.leg:
                self.copying.discard(group)
                if event.code == 0:
                    self.log.append(f"{group} is copied, {event.a} bytes")
                    self.copied.add(group)
        for group in list(self.copying | self.copied):
            if self.states[group] is not SYNCING:
                self.copying.discard(group)
                self.copied.discard(group)
        for group in self.attached():
            if self.states[group] is SYNCING and group not in self.copying | self.copied:
                ranges = [(disk.number, 0, disk.space) for disk in self.disks]
                self.rig.engine.copy_leg(self.opened[group], ranges)
                self.copying.add(group)
        self.pump()

    # --- What clients do --------------------------------------------------------------------------

    def write(self) -> None:
        self.forget_answered()
        usable = [disk for disk in self.disks if disk.client is not None and disk.zeroed]
        if len(self.writes) >= WRITES_MAX or not usable:
            return
        disk = self.random.choice(usable)
        assert disk.client is not None
        length = SECTOR * self.random.choice((1, 3, 8, 8, 8, 16, 24, 128, 200))
        length = min(length, disk.zeroed)
        # Mostly in few places, so that marks are cleared and set again.
        places = disk.zeroed - length
        offset = self.random.randrange(places // SECTOR + 1) * SECTOR
        if self.chance(0.5):
            offset = min(offset // (32 * KIB) * (32 * KIB), places)
        if self.chance(0.2):
            cookie = disk.client.zero(offset, length)
        else:
            cookie = disk.client.write(offset, pattern(length, self.random.randrange(1, 90)))
        self.writes.append(Write(disk.client, cookie, tuple(disk.places(offset, offset + length))))
        self.pump()

    def forget_answered(self) -> None:
        self.writes = [
            one for one in self.writes if one.client.error(one.cookie) is None and one.client.closed is None
        ]

    def flush(self) -> None:
        disk = self.random.choice(self.disks or [Disk(0, [])])
        if disk.client is not None:
            disk.client.flush()
            self.pump()

    # --- What devices do --------------------------------------------------------------------------

    def pump(self) -> None:
        """Run the engine; what a flush covers is settled when it is issued."""
        self.rig.pump()
        for event in self.rig.take_events(EventKind.MAP_RETIRED):
            self.maps.discard(event.generation)
        for event in self.rig.take_events(EventKind.LEG_CLOSED):
            del self.groups[event.leg]  # its descriptors may be somebody else's now
        for op in self.rig.file_ops(kind=OpKind.SYNC):
            if op.number not in self.snapshots:
                self.snapshots[op.number] = self.rig.files[op.fd].medium.flush_begin()
        for op in self.rig.file_ops():
            if self.group_of(op) in self.dead:
                self.rig.fail(op)
                return self.pump()
        return None

    def group_of(self, op: PendingOp) -> int:
        """The group of an operation's device; 0: it is the bitmap's."""
        for number, group in self.groups.items():
            if any(device.fd == op.fd for device in self.rig.legs[number].devices):
                return group
        return 0

    def complete_some(self, count: int) -> None:
        """Have some operations done, whichever."""
        for _ in range(count):
            ops = [op for op in self.rig.file_ops() if self.group_of(op) or not self.bitmap_hangs]
            if not ops:
                self.bitmap_hangs = False
                self.rig.pass_time(0.1)
                self.pump()
                return
            op = self.random.choice(ops)
            if not self.group_of(op) and self.chance(0.1):
                self.land_part(op)
                self.rig.fail(op, self.random.choice((errno.EIO, errno.ENOSPC)))
            elif op.kind is OpKind.SYNC:
                self.rig.files[op.fd].medium.persist(self.snapshots.pop(op.number))
                self.rig.engine.complete(op.number, 0)
            else:
                self.rig.carry_out(op)
            self.check()
            self.pump()
            self.check()

    def settle(self) -> None:
        """Have everything done that is under way."""
        self.bitmap_hangs = False
        self.pump()
        while self.rig.file_ops():
            self.complete_some(1)
        self.rig.pass_time(1.0)
        self.pump()
        while self.rig.file_ops():
            self.complete_some(1)

    def land_part(self, op: PendingOp) -> None:
        """Put some sectors of a write on its medium; it does not complete by that."""
        medium = self.rig.files[op.fd].medium
        if op.kind not in (OpKind.WRITE, OpKind.ALLOCATE):
            return
        data = self.data_of(op)
        share = self.random.choice((0.5, 1.0))
        for begin in range(0, len(data), SECTOR):
            if self.chance(share):
                medium.write(op.offset + begin, data[begin : begin + SECTOR], durable=not self.group_of(op))

    # --- What must hold ---------------------------------------------------------------------------

    def content(self, group: int, *, durable: bool) -> bytes:
        """A leg's content of the domain, as it reads or as a loss of power would leave it."""
        media = self.media[group]
        return b"".join(bytes((one.durable if durable else one.content)[DEVICE_BASE:]) for one in media)

    def in_use(self) -> Iterator[Range]:
        """What of the domain clients may have seen."""
        for disk in self.disks:
            yield from disk.places(0, disk.zeroed)

    def pending_places(self, group: int) -> Iterator[Range]:
        """Where an operation may still change a leg."""
        base = 0
        for index, length in enumerate(GROUPS[group]):
            medium = self.media[group][index]
            fds = {
                self.rig.legs[number].devices[index].fd for number, one in self.groups.items() if one == group
            }
            for op in self.rig.file_ops():
                if op.fd in fds and op.kind in (OpKind.WRITE, OpKind.ALLOCATE):
                    place = slice(op.offset, op.offset + op.length)
                    views = (self.data_of(op), bytes(medium.content[place]), bytes(medium.durable[place]))
                    for part in differences(views, Range(0, op.length), SECTOR):
                        yield Range(base + op.offset - DEVICE_BASE + part.offset, part.length)
            base += length

    def data_of(self, op: PendingOp) -> bytes:
        return self.rig.engine.data(op.number) if op.kind is OpKind.WRITE else bytes(op.length)

    def check(self) -> None:
        """After a crash now, everything that a leg lacks is known."""
        bitmap = self.bitmap()
        views = {
            group: (self.content(group, durable=False), self.content(group, durable=True)) for group in GROUPS
        }
        for group in GROUPS:
            if group == self.active:
                continue
            plane = bitmap.plane(UUID(int=group))
            assert plane is not None
            marks = int.from_bytes(plane, "little") | int.from_bytes(bitmap.planes[INTENT], "little")
            pending = [*self.pending_places(self.active), *self.pending_places(group)]
            for part in self.in_use():
                lacking = [*differences((*views[self.active], *views[group]), part, 1 << bitmap.region_shift)]
                lacking += [both for place in pending if (both := overlap(place, part)).length > 0]
                for place in lacking:
                    first = place.offset >> bitmap.region_shift
                    last = (place.offset + place.length - 1) >> bitmap.region_shift
                    for region in range(first, last + 1):
                        assert marks >> region & 1, (
                            f"group {group} may lack {place}, and region {region} is not marked; {self.log}"
                        )

    def check_equal(self, group: int) -> None:
        """A leg that is said to be equal differs only where something is being written."""
        self.forget_answered()
        mine = bytearray(self.content(group, durable=False))
        truth = bytearray(self.content(self.active, durable=False))
        for write in self.writes:
            for place in write.places:
                # Requests are carried out in whole blocks of clients' sectors.
                mine[place.offset : place.offset + place.length] = bytes(place.length)
                truth[place.offset : place.offset + place.length] = bytes(place.length)
        for part in self.in_use():
            end = part.offset + part.length
            assert mine[part.offset : end] == truth[part.offset : end], f"{group} differs; {self.log}"

    # --- At random --------------------------------------------------------------------------------

    def step(self) -> None:
        """One thing happens."""
        self.see_to_disks()
        self.see_to_copies()
        backups = [group for group in self.attached() if group != self.active]
        dying = [group for group in self.dead if group in self.attached()]
        if dying and self.chance(0.3):
            self.lose(dying[0])
        draw = self.random.random()
        if draw < 0.3:
            self.write()
        elif draw < 0.65:
            self.complete_some(self.random.choice((1, 2, 5, 20)))
        elif draw < 0.72:
            self.settle()
        elif draw < 0.84:
            self.rig.pass_time(self.random.choice((0.01, 0.3, 4.1, 4.1)))
            self.pump()
        elif draw < 0.86:
            self.bitmap_hangs = not self.bitmap_hangs
        elif draw < 0.88:
            self.flush()
        elif draw < 0.90 and backups and not dying:
            self.lose(self.random.choice(backups))
        elif draw < 0.91 and not dying:
            self.dead.add(self.random.choice(self.attached()))
            self.pump()
        elif draw < 0.95:
            away = [group for group in GROUPS if group not in self.attached() and self.may_open(group)]
            if away:
                self.bring_back(self.random.choice(away))
        elif draw < 0.96 and self.equals() and not dying:
            self.fail_over(self.random.choice(self.equals()))
        elif draw < 0.97:
            if self.copied and not dying:
                self.promote(self.random.choice(sorted(self.copied)))
        elif draw < 0.99:
            change = self.random.choice(("make", "grow", "remove"))
            if change == "make" or not self.disks:
                self.make_disk()
            elif change == "grow":
                self.grow_disk(self.random.choice(self.disks))
            else:
                self.remove_disk(self.random.choice(self.disks))
        elif self.chance(0.7):
            self.crash()
        else:
            self.stop()
        self.check()

    def finish(self) -> None:
        """Have every leg up to date in the end."""
        for _ in range(40):
            self.settle()
            self.see_to_disks()
            self.see_to_copies()
            for group in [one for one in self.attached() if one in self.dead]:
                self.lose(group)
            for group in GROUPS:
                if group not in self.attached():
                    self.bring_back(group)
                elif group in self.copied:
                    self.promote(group)
            self.check()
            if set(self.states.values()) == {UPTODATE} and not self.writes:
                break
        self.settle()
        assert set(self.states.values()) == {UPTODATE}, (self.states, self.log)
        for group in GROUPS:
            self.check_equal(group)


@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 15))]
)
def test_whatever_a_leg_lacks_is_marked_at_every_moment(seed: int) -> None:
    host = Host(Random(seed))
    host.begin()
    for _ in range(STEPS):
        host.step()
    host.finish()
