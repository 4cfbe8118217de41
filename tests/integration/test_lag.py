"""Backups that lag: asynchronous replication, and what is lost when a leg has to serve that lacks something."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.integration.site import Site, site
from tests.integration.test_failover import QUICK, answers, witnessed
from tests.integration.test_resync import is_online, made_and_quiet
from tests.integration.test_verify import verified

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(shutil.which(one) for one in ("nbdkit", "qemu-io")),
        reason="nbdkit or qemu-io is not installed",
    ),
]

MIB = 1 << 20
#: A leg that fell out of step is brought back before a test is tired of waiting.
LAGGING = QUICK + "catch_up_s = 0.5\n"
#: One that falls behind stays so for long enough to be looked at.
SMALL_BACKLOG = QUICK + "catch_up_s = 3.0\nbacklog_kib = 64\nresync_floor_mib_s = 1000\n"


def slow(made: Site, milliseconds: int) -> None:
    """Have beta's devices, not started yet, take that long for a write."""
    for name in ("beta1", "beta2"):
        made.filters[name] = ["--filter=delay", f"wdelay={milliseconds}ms"]


def leg_of(shown: Any, group: str) -> Any:
    """A leg of a domain, as shown."""
    return next(leg for leg in shown["legs"] if leg["group"] == group)


async def qemu_io(made: Site, *commands: str) -> None:
    """Have a client of the disk do something; it succeeds."""
    arguments = [part for command in commands for part in ("-c", command)]
    done = await trio.run_process(["qemu-io", "-f", "raw", *arguments, made.uri()], capture_stdout=True)
    assert b"failed" not in done.stdout, done.stdout


async def kept(made: Site, path: Path) -> bytes:
    """The whole content of the disk, as a client sees it."""
    await trio.run_process(["qemu-img", "convert", "-f", "raw", "-O", "raw", made.uri(), str(path)])
    return path.read_bytes()


async def test_async_writes_do_not_wait_for_a_slow_backup_and_a_failover_loses_nothing() -> None:
    async with site(settings=LAGGING) as made:
        slow(made, 50)
        await made.make(replication="async")
        lagged = False
        async with witnessed(made) as witness:
            began = trio.current_time()
            await answers(witness, 3000)
            # 32 at a time of 50 ms each make 640 a second.
            assert trio.current_time() - began < 3000 / 640
            shown = await made.show()
            lagged = shown["rpo"]["bytes"] > 0 and shown["rpo"]["seconds"] > 0
            made.kill_device("alpha2")
            await made.wait_active("vol1", "beta")
            await answers(witness, 100)
        assert lagged
        assert witness.connections == 1 + 1


@pytest.mark.parametrize("lost", ["alpha2", "beta1"])
async def test_async_nobody_waits_for_a_backup_that_lags_while_another_leg_is_lost(lost: str) -> None:
    async with site(settings=LAGGING.replace("deadline_ms = 400", "deadline_ms = 5000")) as made:
        await made.make(replication="async")
        made.filters["gamma1"] = ["--filter=delay", "wdelay=60ms"]
        await made.order("POST", "/groups", name="gamma", devices=[await made.device("gamma1", 200)])
        await made.order("POST", "/domains/vol1/legs", group="gamma")

        await made.wait("vol1", lambda shown: leg_of(shown, "gamma")["state"] == "uptodate", 60)
        async with witnessed(made) as witness:
            # Some 250 writes a second arrive there: this takes it four seconds.
            await made.wait("vol1", lambda shown: leg_of(shown, "gamma")["lag"]["bytes"] > 4 * MIB)
            witness.longest_s = 0.0
            made.kill_device(lost)
            group = lost[:-1]
            after = await made.wait("vol1", lambda shown: leg_of(shown, group)["state"] == "outdated")
            await answers(witness, 500)
            assert witness.longest_s < 2
            assert after["active"] == ("beta" if group == "alpha" else "alpha")
            far = leg_of(after, "gamma")
            assert far["state"] == "uptodate" and far["lag"]["bytes"] > 0
        assert witness.connections == 1 + 1


async def test_async_failover_ordered_under_load_switches_there_and_back() -> None:
    async with site(settings=LAGGING) as made:
        await made.make(server=None, replication="async")
        async with witnessed(made) as witness:
            for target in ("beta", "alpha", "beta", "alpha"):
                await answers(witness, 500)
                await made.order("POST", "/domains/vol1/failover", to=target)
                shown = await made.show()
                assert [leg["state"] for leg in shown["legs"]] == ["uptodate", "uptodate"]
            found = await verified(made)
            assert (found["outcome"], found["mismatched"]) == ("complete", 0)


async def test_async_backup_that_falls_behind_is_caught_up_by_itself() -> None:
    async with site(settings=SMALL_BACKLOG) as made:
        slow(made, 20)
        await made.make(replication="async", disk_size="8M")
        async with witnessed(made) as witness:
            shown = await made.wait("vol1", lambda shown: shown["state"] == "degraded")
            await answers(witness, 500)
            shown = await made.show()
            assert shown["rpo"]["bytes"] > 0
            assert "uptodate leg can" in await made.refused("POST", "/domains/vol1/failover", to="beta")
        shown = await made.wait(
            "vol1", lambda shown: shown["state"] == "online" and shown["rpo"]["bytes"] == 0, 60
        )
        assert (await verified(made))["mismatched"] == 0
        assert any("fell behind" in event for event in await made.events())
        await made.order("POST", "/domains/vol1/failover", to="beta")
        await witness.check_all()


async def test_async_domain_stopped_and_crashed_under_load_comes_back_equal() -> None:
    async with site(settings=LAGGING) as made:
        await made.make(replication="async")
        async with witnessed(made, reconnect=True) as witness:
            await answers(witness, 1000)
            pid = made.server_pid("vol1")
            made.kill_server("vol1")
            await made.wait_new_server("vol1", pid)
            await answers(witness, 500)
            made.kill_manager()
            await answers(witness, 500)
            await made.start_manager()
        # With nobody at work, however slow this machine is.
        await is_online(made)
        await made.order("POST", "/domains/vol1/failover", to="beta")
        await witness.check_all()
        await made.stop()
        await made.order("POST", "/domains/vol1/start")
        await is_online(made)
        assert (await verified(made))["mismatched"] == 0
        await witness.check_all()


async def degraded_and_held(made: Site) -> bytes:
    """A domain that lost its backup, was written to, and lost its active leg; the content its backup has."""
    await made_and_quiet(made)
    await qemu_io(made, "write -P 1 0 2M", "flush")
    before = await kept(made, made.directory / "before")
    made.kill_device("beta1")
    await made.wait("vol1", lambda shown: shown["state"] == "degraded")
    await qemu_io(made, "write -P 2 5M 1M", "write -P 3 100M 64k", "flush")
    made.kill_device("alpha1")
    async with trio.open_nursery() as nursery:
        # Somebody has to notice: a read that is held until the context ends.
        nursery.start_soon(trio.run_process, ["qemu-io", "-f", "raw", "-c", "read 0 4k", made.uri()])
        await made.wait("vol1", lambda shown: shown["state"] == "held")
        nursery.cancel_scope.cancel()
    return before


async def test_loss_is_refused_without_need() -> None:
    async with site(settings=QUICK) as made:
        await made.make()
        accept = {"to": "beta", "accept_loss": True}
        said = await made.refused("POST", "/domains/vol1/failover", **accept)
        assert "nothing has to be lost: alpha is active" in said
        made.kill_device("beta1")
        await made.wait("vol1", lambda shown: shown["state"] == "degraded")
        assert "nothing has to be lost" in await made.refused("POST", "/domains/vol1/failover", **accept)
        assert (await made.show())["active"] == "alpha"


async def test_loss_accepted_serves_from_the_leg_that_is_left_and_lists_what_it_lacks() -> None:
    async with site(settings=QUICK) as made:
        before = await degraded_and_held(made)
        assert "cannot take over" in await made.refused("POST", "/domains/vol1/failover", to="beta")
        accept = {"to": "beta", "accept_loss": True}
        assert "beta cannot serve" in await made.refused("POST", "/domains/vol1/failover", **accept)
        await made.device("beta1", 75)
        shown = await made.order("POST", "/domains/vol1/failover", **accept)
        assert shown["active"] == "beta"
        losses = await made.order("GET", "/domains/vol1/losses")
        assert shown["last_failover"]["lost_bytes"] == sum(one["length"] for one in losses)
        lost = {
            place
            for one in losses
            for place in range(one["offset"] >> 18, one["offset"] + one["length"] >> 18)
        }
        written = {*range(5 * 4, 6 * 4), 100 * 4}
        assert {one["disk"] for one in losses} == {"disk1"} and written <= lost
        # And what was written just before the backup was lost; some regions are marked ahead of writes in a row.
        assert len(lost) <= len(written) + 2 * 4 + 3 * 16
        assert await kept(made, made.directory / "after") == before
        # The old active leg comes back, and is given all in which it differs.
        await qemu_io(made, "write -P 4 30M 1M", "flush")
        await made.device("alpha1", 50)
        await made.order("POST", "/domains/vol1/resync")
        await is_online(made)
        assert (await verified(made))["mismatched"] == 0
        assert any("older now than what clients were told" in event for event in await made.events())


async def test_loss_is_accepted_by_policy_and_by_the_next_manager_too() -> None:
    async with site(settings=QUICK) as made:
        before = await degraded_and_held(made)
        await made.device("beta1", 75)
        made.kill_manager()
        await made.start_manager()
        await made.wait("vol1", lambda shown: shown["state"] == "held")
        await made.order("POST", "/domains/vol1/set", accept_loss="0.5")
        await made.wait_active("vol1", "beta")
        assert await kept(made, made.directory / "after") == before


async def test_loss_accepted_after_a_crash_of_the_domain_server() -> None:
    async with site(settings=QUICK) as made:
        await made.make(replication="async")
        await qemu_io(made, "write -P 1 0 1M", "flush")
        await made.wait("vol1", lambda shown: shown["rpo"]["bytes"] == 0)
        made.kill_manager()  # before it can fail over
        made.kill_device("alpha1")
        made.kill_server("vol1")
        await made.start_manager()
        await made.wait("vol1", lambda shown: shown["state"] == "held")
        shown = await made.order("POST", "/domains/vol1/failover", accept_loss=True)
        assert shown["active"] == "beta"
        await qemu_io(made, "read -P 1 0 1M")
        await made.device("alpha1", 50)
        await made.order("POST", "/domains/vol1/resync")
        await is_online(made)
        assert (await verified(made))["mismatched"] == 0
