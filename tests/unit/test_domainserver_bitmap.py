"""The dirty bitmap's file across sessions: which one is trusted, and who has which plane."""

from pathlib import Path
from uuid import UUID

import pytest

from proxy.dirtymap import LegContent
from proxy.domainserver.bitmap import Bitmap, Disk, open_bitmap
from tests.sim.rig import new_engine

DOMAIN = UUID(int=7 << 64)
ALPHA, BETA, GAMMA, DELTA, EPSILON = (UUID(int=number) for number in range(1, 6))
SIZE = 64 << 20


class FullDisk(Disk):
    """A disk on which no file can be written over."""

    async def overwrite(self, path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")


async def session_of(
    path: Path, session: int, *groups: UUID, clean: bool = True, disk: Disk | None = None
) -> tuple[Bitmap, str]:
    legs = [LegContent(group, True) for group in groups]
    return await open_bitmap(
        new_engine(), disk or Disk(), path, DOMAIN, SIZE, session, legs, clean=clean, least_shift=18
    )


async def test_session_that_the_store_never_heard_of_is_trusted_again(tmp_path: Path) -> None:
    path = tmp_path / "bitmap"
    assert (await session_of(path, 0, ALPHA, BETA))[1] == ""
    assert (await session_of(path, 0, ALPHA, BETA))[1] == ""


async def test_session_that_the_store_has_forgotten_is_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "bitmap"
    bitmap, _ = await session_of(path, 0, ALPHA, BETA)
    await bitmap.assign(new_engine(), [ALPHA, BETA])
    assert (await session_of(path, 1, ALPHA, BETA))[1] == ""
    bitmap, _ = await session_of(path, 1, ALPHA, BETA)
    await bitmap.assign(new_engine(), [ALPHA, BETA])
    _, distrust = await session_of(path, 1, ALPHA, BETA, clean=False)
    assert "one of them is older than the other" in distrust


async def test_group_that_leaves_is_named_no_more_and_its_plane_is_free(tmp_path: Path) -> None:
    bitmap, _ = await session_of(tmp_path / "bitmap", 0, ALPHA, BETA)
    await bitmap.assign(new_engine(), [ALPHA])
    again, _ = await session_of(tmp_path / "bitmap", 1, ALPHA)
    assert bitmap.named[1] is None
    assert again.content.plane_of(BETA) is None


async def test_plane_that_cannot_be_freed_is_given_to_nobody_else(tmp_path: Path) -> None:
    bitmap, _ = await session_of(tmp_path / "bitmap", 0, ALPHA, BETA, GAMMA, DELTA)
    await bitmap.assign(new_engine(), [ALPHA, BETA, GAMMA, DELTA])
    bitmap.disk = FullDisk()
    await bitmap.assign(new_engine(), [ALPHA, GAMMA, DELTA])
    with pytest.raises(OSError, match="no plane is free"):
        await bitmap.assign(new_engine(), [ALPHA, GAMMA, DELTA, EPSILON])
