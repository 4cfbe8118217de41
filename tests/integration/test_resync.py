"""Resync by the dirty bitmap, on real processes: a leg is given what it lacks, and what is not known is not trusted."""

import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.integration.site import Site, site
from tests.integration.test_failover import QUICK, answers, witnessed

pytestmark = pytest.mark.skipif(shutil.which("nbdkit") is None, reason="nbdkit is not installed")

MIB = 1 << 20
#: What the witness works on, in whole regions, with room for a change of the region's size.
WORKED_ON = 16 * MIB


def copied_bytes(events: list[str], group: str = "beta") -> list[int]:
    """What was copied to a group, by its syncs."""
    units = {"K": 1024, "M": MIB, "": 1}
    found = [re.search(rf"([\d.]+)([KM]?) were copied to {group}$", event) for event in events]
    return [int(float(one[1]) * units[one[2]]) for one in found if one]


def bitmap_of(made: Site) -> Path:
    (path,) = (made.state / "bitmaps").iterdir()
    return path


async def is_online(made: Site) -> None:
    await made.wait("vol1", lambda shown: shown["state"] == "online")


async def made_and_quiet(made: Site, *, server: str | None = "nbdkit") -> None:
    """A site whose disk, which was zeroed a moment ago, is the same on both legs for certain."""
    await made.make(server=server)
    # A stop in order unmarks all at once; the domain server itself does so after some seconds.
    await made.stop()
    await made.order("POST", "/domains/vol1/start")
    await is_online(made)
    assert (await made.show())["marked_bytes"] == 0


@asynccontextmanager
async def crashed(made: Site) -> AsyncIterator[None]:
    """Manager and domain server end as in a crash; when the context ends the manager is started again."""
    pid = made.server_pid("vol1")
    made.kill_manager()
    made.kill_server("vol1")
    yield
    await made.start_manager()
    await made.wait_new_server("vol1", pid)
    await made.wait("vol1", lambda shown: shown["state"] in ("online", "degraded"))


async def test_resync_after_a_lost_device_copies_what_was_written_meanwhile() -> None:
    async with site(settings=QUICK) as made:
        await made_and_quiet(made)
        async with witnessed(made) as witness:
            made.kill_device("alpha1")
            await made.wait_active("vol1", "beta")
            await answers(witness, 500)
            degraded = await made.show()
            assert 0 < degraded["legs"][0]["dirty_bytes"] <= WORKED_ON
            await made.device("alpha1", 50)
            await made.order("POST", "/domains/vol1/resync")
            await is_online(made)
            await answers(witness, 500)
            (amount,) = copied_bytes(await made.events(), "alpha")
            assert 0 < amount <= WORKED_ON
            made.kill_device("beta1")
            await made.wait_active("vol1", "alpha")


@pytest.mark.slow
async def test_crash_of_the_domain_server_copies_what_was_being_written_and_no_more() -> None:
    async with site(settings=QUICK) as made:
        await made_and_quiet(made, server=None)
        async with witnessed(made, reconnect=True) as witness:
            for _ in range(3):
                pid = made.server_pid("vol1")
                await answers(witness, 300)
                made.kill_server("vol1")
                await made.wait_new_server("vol1", pid)
                await is_online(made)
            await made.order("POST", "/domains/vol1/failover", to="beta")
        amounts = copied_bytes(await made.events())[1:]  # the first was the first sync
        assert len(amounts) == 3 and all(0 < amount <= WORKED_ON for amount in amounts)


@pytest.mark.slow
async def test_clean_stop_and_start_copies_nothing() -> None:
    async with site(settings=QUICK) as made:
        await made.make(server=None)
        async with witnessed(made):
            pass
        await made.stop()
        await made.order("POST", "/domains/vol1/start")
        await is_online(made)
        assert len(copied_bytes(await made.events())) == 1


@pytest.mark.slow
async def test_bitmap_that_is_damaged_is_not_trusted_and_the_leg_is_copied_whole() -> None:
    async with site(settings=QUICK) as made:
        await made.make(server=None)
        async with witnessed(made, reconnect=True), crashed(made):
            path = bitmap_of(made)
            data = bytearray(path.read_bytes())
            data[700] ^= 1
            path.write_bytes(data)
        await is_online(made)
        events = await made.events()
        assert copied_bytes(events)[-1] == 140 * MIB
        assert any("sector 1 is damaged" in event for event in events)


@pytest.mark.slow
async def test_bitmap_of_an_earlier_session_is_not_trusted() -> None:
    async with site(settings=QUICK) as made:
        await made.make(server=None)
        old = bitmap_of(made).read_bytes()
        for _ in range(2):
            await made.stop()
            await made.order("POST", "/domains/vol1/start")
        async with witnessed(made, reconnect=True), crashed(made):
            bitmap_of(made).write_bytes(old)
        await is_online(made)
        events = await made.events()
        assert copied_bytes(events)[-1] == 140 * MIB
        assert any("one of them is older than the other" in event for event in events)


@pytest.mark.slow
async def test_bitmap_that_is_gone_is_made_anew_and_the_leg_is_copied_whole() -> None:
    async with site(settings=QUICK) as made:
        await made.make(server=None)
        async with witnessed(made, reconnect=True), crashed(made):
            bitmap_of(made).unlink()
        await is_online(made)
        events = await made.events()
        assert copied_bytes(events)[-1] == 140 * MIB
        assert any("is not there" in event for event in events)


@pytest.mark.slow
async def test_resync_that_is_cut_short_by_crashes_and_a_failover_ends_equal() -> None:
    async with site(settings=QUICK) as made:
        await made.make(server=None)
        async with witnessed(made, reconnect=True) as witness:
            await made.order("POST", "/domains/vol1/failover", to="beta")
            async with crashed(made):
                pass
            await answers(witness, 300)
            shown = await made.show()
            if shown["legs"][0]["state"] == "outdated":
                await made.order("POST", "/domains/vol1/resync", rate="1M")
                await made.wait("vol1", lambda shown: shown["legs"][0]["state"] == "syncing")
            async with crashed(made):
                pass
            await answers(witness, 300)
            await is_online(made)
            await made.order("POST", "/domains/vol1/failover", to="alpha")
            await answers(witness, 300)


@pytest.mark.slow
async def test_resync_shows_its_rate_and_the_time_left_and_keeps_to_a_limit() -> None:
    async with site(settings=QUICK) as made:
        await made_and_quiet(made)
        made.kill_device("alpha1")
        await made.wait_active("vol1", "beta")
        async with witnessed(made):
            pass
        await made.device("alpha1", 50)
        await made.order("POST", "/domains/vol1/resync", rate="2M")
        began = trio.current_time()
        shown = await made.wait("vol1", lambda shown: bool((shown["legs"][0]["sync"] or {}).get("rate")))
        sync = shown["legs"][0]["sync"]
        assert sync["total"] <= WORKED_ON and sync["seconds_left"] > 0
        assert shown["legs"][0]["dirty_bytes"] <= WORKED_ON
        await is_online(made)
        # Four steps of half a MiB are out at once before the limit is felt.
        assert trio.current_time() - began > (sync["total"] / MIB - 2) / 2 * 0.8
