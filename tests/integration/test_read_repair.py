"""Read repair on real devices: an nbdkit that cannot read, and a client that notices nothing."""

import shutil
from typing import Any

import pytest

from tests.integration.site import site
from tests.integration.test_failover import QUICK, answers, witnessed

pytestmark = pytest.mark.skipif(shutil.which("nbdkit") is None, reason="nbdkit is not installed")


def repairs(shown: Any) -> int:
    """How many reads of the active leg were repaired."""
    leg = next(leg for leg in shown["legs"] if leg["group"] == shown["active"])
    return sum(device["read_repairs"] for device in leg["devices"])


async def test_reads_that_fail_are_answered_from_the_backup_and_counted() -> None:
    async with site(settings=QUICK + "read_repairs_max = 1000\n") as made:
        trigger = made.fail_reads("alpha1")
        await made.make()
        async with witnessed(made) as witness:
            trigger.touch()
            shown = await made.wait("vol1", lambda shown: repairs(shown) > 0)
            await answers(witness, 200)
            trigger.unlink()
        assert witness.connections == 1 + 1
        assert (shown["active"], shown["state"]) == ("alpha", "online")
        assert shown["statistics"]["read_repairs"] > 0
        told = [message for message in await made.events() if "a backup answered" in message]
        assert "alpha1.sock could not read at offset" in told[0]
        after = await made.show()
        assert (after["active"], after["map_generation"]) == ("alpha", shown["map_generation"])


@pytest.mark.parametrize("most", [0, 5])
async def test_leg_that_needs_too_many_repairs_fails_over(most: int) -> None:
    async with site(settings=QUICK + f"read_repairs_max = {most}\n") as made:
        trigger = made.fail_reads("alpha1")
        await made.make()
        async with witnessed(made) as witness:
            trigger.touch()
            shown = await made.wait_active("vol1", "beta")
            await answers(witness, 200)
        assert witness.connections == 1 + 1
        assert f"{most + 1} reads had to be repaired" in shown["last_failover"]["reason"]
