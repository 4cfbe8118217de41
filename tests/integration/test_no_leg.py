"""What clients get when no leg is left: they wait, or are told errors, as the domain's policy says."""

import shutil
import subprocess

import pytest
import trio

from tests.integration.site import Site, site
from tests.integration.test_failover import QUICK

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(shutil.which(one) for one in ("nbdkit", "qemu-io")),
        reason="nbdkit or qemu-io is not installed",
    ),
]


async def qemu_io(made: Site, command: str) -> str:
    """What qemu-io says of one command to the disk, errors and all."""
    done = await trio.run_process(
        ["qemu-io", "-f", "raw", "-c", command, made.uri()],
        capture_stdout=True,
        stderr=subprocess.STDOUT,
        check=False,
    )
    return done.stdout.decode()


async def lose_all(made: Site) -> None:
    for name in ("alpha1", "beta1"):
        made.kill_device(name)


async def test_clients_are_told_errors_when_their_patience_is_over_and_served_when_a_leg_returns() -> None:
    async with site(settings=QUICK) as made:
        await made.make()
        await made.order("POST", "/domains/vol1/set", no_leg="hold:1")
        assert "failed" not in await qemu_io(made, "write -P 1 0 1M")
        await lose_all(made)
        with trio.fail_after(20):
            assert "Input/output error" in await qemu_io(made, "write -P 2 0 1M")
        shown = await made.wait("vol1", lambda shown: shown["state"] == "failed")
        assert (shown["no_leg"], shown["trouble"].startswith("clients are told errors")) == ("hold:1", True)
        assert "Input/output error" in await qemu_io(made, "read 0 4k")
        await made.device("beta1", 75)
        shown = await made.wait("vol1", lambda shown: shown["state"] == "degraded")
        assert (shown["active"], shown["trouble"]) == ("beta", "")
        assert "failed" not in await qemu_io(made, "write -P 3 0 1M")
        await made.device("alpha1", 50)
        await made.order("POST", "/domains/vol1/resync")
        await made.wait("vol1", lambda shown: shown["state"] == "online")
        await made.order("POST", "/domains/vol1/failover", to="alpha")
        assert "failed" not in await qemu_io(made, "read -P 3 0 1M")
        assert any("vol1 has failed: clients are told errors" in one for one in await made.events())


async def test_clients_wait_by_default_for_as_long_as_it_takes() -> None:
    async with site(settings=QUICK) as made:
        await made.make()
        await lose_all(made)
        async with trio.open_nursery() as nursery:
            answered = trio.Event()

            async def write() -> None:
                assert "failed" not in await qemu_io(made, "write -P 1 0 1M")
                answered.set()

            nursery.start_soon(write)
            await made.wait("vol1", lambda shown: shown["state"] == "held")
            with trio.move_on_after(
                3
            ) as patience:  # some times the deadline and the interval between two tries
                await answered.wait()
            assert patience.cancelled_caught
            await made.device("beta1", 75)  # active by now, or the first that can be
            await made.wait("vol1", lambda shown: shown["state"] == "degraded")


async def test_policy_that_is_none_is_refused() -> None:
    async with site(settings=QUICK) as made:
        await made.make(server=None)
        for text in ("hold:", "hold:soon", "30", "hold:-1", "hold:immediate"):
            assert "no-leg" in await made.refused("POST", "/domains/vol1/set", no_leg=text)
        assert (await made.show())["no_leg"] == "hold"
