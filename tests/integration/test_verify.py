"""Verify on real parts: a difference planted behind our back is found, one of a write in flight is not."""

import os
import sys
from typing import Any

import pytest
import trio

from tests.integration.site import BLOCK, Site, site
from tests.integration.test_failover import QUICK, answers, witnessed

pytestmark = pytest.mark.slow

#: A verify goes on at its full pace also while clients are at work.
UNHINDERED = QUICK + "resync_floor_mib_s = 1000\n"


def plant(made: Site, shown: Any, group: str, offset: int) -> None:
    """Overwrite a block of the domain on the device of one leg, past everybody."""
    leg = next(leg for leg in shown["legs"] if leg["group"] == group)
    extent = next(one for one in leg["extents"] if one["offset"] <= offset < one["offset"] + one["length"])
    image = made.images / f"{group}{extent['device'] + 1}"
    with image.open("r+b") as file:
        file.seek(extent["device_offset"] + offset - extent["offset"])
        file.write(b"\xa5" * BLOCK)


async def verified(made: Site, **options: Any) -> Any:
    """What a verify finds that is begun now."""
    before = (await made.show())["last_verify"]
    await made.order("POST", "/domains/vol1/verify", **options)
    shown = await made.wait("vol1", lambda shown: shown["last_verify"] not in (None, before), 60)
    assert shown["verify"] is None
    return shown["last_verify"]


async def test_verify_under_load_finds_what_was_planted_and_nothing_else() -> None:
    async with site(settings=UNHINDERED) as made:
        await made.make()
        async with witnessed(made) as witness:
            clean = await verified(made)
            assert (clean["outcome"], clean["mismatched"], clean["mismatches"]) == ("complete", 0, [])
            assert clean["compared"] == clean["total"] == 140 << 20
            # The witness works on the first 2000 blocks; what it writes over would be no difference any more.
            for offset in (50 << 20, (50 << 20) + BLOCK, 100 << 20):
                plant(made, await made.show(), "beta", offset)
            found = await verified(made)
            assert [
                (one["group"], one["disk"], one["offset"], one["length"]) for one in found["mismatches"]
            ] == [
                ("beta", "disk1", 50 << 20, 2 * BLOCK),
                ("beta", "disk1", 100 << 20, BLOCK),
            ]
            assert (found["mismatched"], found["repaired"]) == (3 * BLOCK, 0)
            repaired = await verified(made, repair=True)
            assert (repaired["mismatched"], repaired["repaired"]) == (3 * BLOCK, 3 * BLOCK)
            assert (await verified(made))["mismatched"] == 0
            await answers(witness, 200)
            await made.order("POST", "/domains/vol1/failover")
        assert witness.connections == 1 + 1
        events = await made.events()
        assert any("12K differ on beta" in message and "repaired" not in message for message in events)
        assert any("12K differ on beta, 12K repaired" in message for message in events)


async def test_failover_in_the_middle_interrupts_it() -> None:
    async with site(settings=QUICK) as made:
        await made.make(server=None)
        await made.order("POST", "/domains/vol1/verify", rate="4M/s")
        assert "is being verified already" in await made.refused("POST", "/domains/vol1/verify")
        shown = await made.wait("vol1", lambda shown: shown["verify"] and shown["verify"]["compared"] > 0)
        assert shown["verify"]["seconds_left"] > 5
        await made.order("POST", "/domains/vol1/failover")
        shown = await made.wait("vol1", lambda shown: shown["last_verify"] is not None)
        assert (shown["last_verify"]["outcome"], shown["last_verify"]["mismatched"]) == ("interrupted", 0)
        again = await verified(made)
        assert (again["outcome"], again["mismatched"]) == ("complete", 0)
        await made.order("DELETE", "/domains/vol1/legs/alpha")
        assert "no uptodate backup" in await made.refused("POST", "/domains/vol1/verify")


async def test_verify_outlives_a_manager_and_its_result_is_kept() -> None:
    async with site(settings=QUICK) as made:
        await made.make(server=None)
        plant(made, await made.show(), "beta", 0)
        await made.order("POST", "/domains/vol1/verify", rate="50M/s")
        made.kill_manager()
        log = made.run / "vol1" / "server.log"
        with trio.fail_after(30):
            while "the verify has ended" not in log.read_text():
                await trio.sleep(0.05)
        await made.start_manager()
        shown = await made.wait("vol1", lambda shown: shown["last_verify"] is not None)
        assert [one["offset"] for one in shown["last_verify"]["mismatches"]] == [0]
        made.kill_manager()
        await made.start_manager()
        await made.wait("vol1", lambda shown: shown["state"] == "online")
        assert (await made.show())["last_verify"] == shown["last_verify"]
        assert sum("differ on beta" in message for message in await made.events()) == 1


async def standfast(made: Site, *arguments: str) -> tuple[int, str, str]:
    """The status of a command, what it prints and what it says on stderr."""
    done = await trio.run_process(
        [sys.executable, "-m", "proxy.cli.main", *arguments],
        env={**os.environ, "STANDFAST_RUN": str(made.run)},
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


async def test_command_lists_differences_and_its_status_tells_them() -> None:
    async with site(settings=QUICK) as made:
        await made.make(server=None)
        status, printed, said = await standfast(made, "verify", "vol1")
        assert (status, said) == (0, "")
        assert "140M of 140M compared: no difference" in printed
        plant(made, await made.show(), "beta", 4 << 20)
        status, printed, said = await standfast(made, "verify", "vol1")
        assert status == 1
        assert ["disk1", str(4 << 20), str(BLOCK), "beta"] in [line.split() for line in printed.splitlines()]
        assert "standfast verify vol1 --repair" in said
        status, printed, said = await standfast(made, "verify", "vol1", "--repair")
        assert (status, said) == (0, "")
        assert "4K differ, 4K repaired" in printed
        status, printed, said = await standfast(made, "domain", "show", "vol1")
        assert "complete, 140M compared, 4K differ, 4K repaired" in printed


async def test_stop_ends_it_with_a_result() -> None:
    async with site(settings=QUICK) as made:
        await made.make(server=None)
        assert (await standfast(made, "verify", "vol1", "--stop"))[0] == 1
        outcome: list[tuple[int, str, str]] = []
        async with trio.open_nursery() as nursery:

            async def verify() -> None:
                outcome.append(await standfast(made, "verify", "vol1", "--rate", "4M/s"))

            nursery.start_soon(verify)
            await made.wait("vol1", lambda shown: shown["verify"] and shown["verify"]["compared"] > 0)
            assert (await standfast(made, "verify", "vol1", "--stop"))[0] == 0
        ((status, printed, said),) = outcome
        assert status == 1
        assert "verifying, " in printed
        assert "is not complete: it was stopped" in said
