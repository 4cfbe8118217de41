"""A deadline much shorter than the default: what hangs is found by it, and what does not hang is left alone."""

import os
import shutil
import signal
from contextlib import suppress

import pytest

from tests.integration.site import Site, site
from tests.integration.test_failover import answers, witnessed

pytestmark = [
    pytest.mark.skipif(shutil.which("nbdkit") is None, reason="nbdkit is not installed"),
    pytest.mark.slow,
]

DEADLINE_MS = 80
#: Long past the deadline, and short of the default one.
STALL_MAX_MS = 2000
#: Some seconds of work: hundreds of deadlines' worth of chances for a false alarm.
ANSWERS_UNHARMED = 20_000


def favour_devices(made: Site) -> None:
    """Let no other process keep a device from answering: that it was only starved would be evidence too."""
    for device in made.devices.values():
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, device.pid, -10)


async def test_short_deadline_stopped_device_is_failed_over_and_a_healthy_one_never() -> None:
    async with site(settings=f"deadline_ms = {DEADLINE_MS}\nreopen_interval_s = 0.1\n") as made:
        await made.make()
        favour_devices(made)
        before = await made.show()
        told = len(await made.events())
        async with witnessed(made) as witness:
            await answers(witness, ANSWERS_UNHARMED)
            healthy = await made.show()
            assert healthy["map_generation"] == before["map_generation"]
            assert (await made.events())[told:] == []

            await made.stop_device("alpha1")
            after = await made.wait_active("vol1", "beta")
            assert "did not answer in time" in after["last_failover"]["reason"]
            assert after["legs"][0]["devices"][0]["url"] in after["last_failover"]["reason"]
            after = await made.wait("vol1", lambda shown: shown["last_failover"]["stall_ms"] is not None)
            assert DEADLINE_MS <= after["last_failover"]["stall_ms"] < STALL_MAX_MS
            assert after["last_failover"]["replayed"] > 0
            await answers(witness, 500)
            await answers(witness, ANSWERS_UNHARMED // 2)
            assert (await made.show())["map_generation"] == after["map_generation"]
            made.devices["alpha1"].send_signal(signal.SIGCONT)
