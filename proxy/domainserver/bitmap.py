"""The dirty bitmap's file: renewed at the start of each session, then the engine's."""

import errno
import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import UUID

import trio

from proxy.dirtymap import DirtyMap, DirtyMapError, LegContent, renewed
from proxy.engine import Engine


class Disk:
    """Where the file is kept; a class so that the simulator can have its own. What returns is durable.

    Every method raises OSError.
    """

    async def read(self, path: Path) -> bytes:
        """All of a file."""
        return await trio.to_thread.run_sync(path.read_bytes)

    async def replace(self, path: Path, data: bytes) -> int:
        """Put a new file in the place of the old one; a descriptor of it.

        Whoever may still write the old one does no harm.
        """
        return await trio.to_thread.run_sync(_replace, path, data)

    async def overwrite(self, path: Path, data: bytes) -> None:
        """Write over a file's beginning."""
        await trio.to_thread.run_sync(_overwrite, path, data)


def _replace(path: Path, data: bytes) -> int:
    fresh = path.with_name(path.name + ".new")
    descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
        os.replace(fresh, path)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except BaseException:
        os.close(descriptor)
        with suppress(OSError):
            fresh.unlink()
        raise
    return descriptor


def _overwrite(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(descriptor, data, 0)
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(slots=True)
class Bitmap:
    """The file in use. ``content.groups`` has who has which plane; the planes are the engine's by now.

    ``named``: the groups that the file's header names. Who is new in a session has a plane and is not named
    before the next session, which then takes it to lack everything: a header that named it could be on
    the disk before its plane.
    """

    disk: Disk
    path: Path
    content: DirtyMap
    named: tuple[UUID | None, ...]

    async def assign(self, engine: Engine, groups: Collection[UUID]) -> None:
        """Have a plane for each of ``groups``, which the store knows of; who is new lacks everything.

        Raises:
            OSError: the header has to be written and cannot be; nothing has changed.
        """
        kept = tuple(group if group in groups else None for group in self.named)
        if not self.content.is_recorded:
            await self._name(kept, is_recorded=True)
        elif kept != self.named:
            # A plane that cannot be freed is not given to anybody else: that is all there is to it.
            with suppress(OSError):
                await self._name(kept, is_recorded=True)
        used = {*groups, *(one for one in self.named if one is not None)}
        assigned: list[UUID | None] = [one if one in used else None for one in self.content.groups]
        for group in groups:
            if group not in assigned:
                if None not in assigned:
                    raise OSError(errno.ENOSPC, "no plane is free: one that was given up could not be freed")
                plane = assigned.index(None)
                assigned[plane] = group
                engine.fill_plane(plane + 1)
        self.content = replace(self.content, groups=tuple(assigned))

    async def _name(self, named: tuple[UUID | None, ...], *, is_recorded: bool) -> None:
        """Write the header anew."""
        fresh = replace(self.content, groups=named, is_recorded=is_recorded)
        await self.disk.overwrite(self.path, fresh.header())
        self.named = named
        self.content = replace(self.content, is_recorded=is_recorded)

    async def distrust(self, engine: Engine, group: UUID) -> None:
        """Take a group to lack everything, durably. Raises OSError, and then nothing has changed."""
        named = tuple(None if one == group else one for one in self.named)
        await self._name(named, is_recorded=self.content.is_recorded)
        plane = self.content.plane_of(group)
        if plane is not None:
            engine.fill_plane(plane)

    def plane_of(self, group: UUID) -> int:
        """The plane of a group that has one."""
        plane = self.content.plane_of(group)
        assert plane is not None, group
        return plane


async def open_bitmap(
    engine: Engine,
    disk: Disk,
    path: Path,
    domain: UUID,
    size: int,
    session: int,
    legs: Sequence[LegContent],
    *,
    clean: bool,
    least_shift: int,
) -> tuple[Bitmap, str]:
    """Renew the file for a session and give it to the engine.

    Args:
        size: of the domain in bytes.
        session: the number of the last session by the store; 0: there was none.
        legs: all of the domain, as the store says.
        clean: the last session ended with every leg that took part equal to the others.
        least_shift: of a region's size, as a power of 2, where there is no file to keep to.

    Returns:
        The file, and why the one before could not be relied on; empty when it could, or there was none to be.

    Raises:
        OSError: it cannot be written.
    """
    before, distrust = await _load(disk, path, domain, size, session)
    content = renewed(before, domain, size, session + 1, legs, clean=clean, least_shift=least_shift)
    descriptor = await disk.replace(path, content.encode())
    engine.open_bitmap(
        descriptor,
        shift=content.region_shift,
        regions=content.regions,
        identity=content.identity,
        planes=content.planes,
    )
    return Bitmap(disk, path, content, content.groups), distrust


async def _load(disk: Disk, path: Path, domain: UUID, size: int, session: int) -> tuple[DirtyMap | None, str]:
    """The last session's map if it can be relied on, or else why not."""
    try:
        data = await disk.read(path)
    except FileNotFoundError:
        return None, f"{path} is not there" if session else ""
    except OSError as error:
        return None, f"{path} cannot be read: {error.strerror}"
    try:
        found = DirtyMap.decode(data, domain=domain, size=size)
    except DirtyMapError as error:
        return None, f"{path}: {error}"
    # A session writes its number here first, then into the store, and then here that the store has it.
    if found.session != session and (found.session != session + 1 or found.is_recorded):
        return None, (
            f"{path} is of session {found.session} and the store of session {session}: one of them is older than "
            "the other"
        )
    return found, ""
