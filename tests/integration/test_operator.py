"""What an operator orders of a domain under load: holds, and moves to other groups. Real processes, killed too."""

import shutil

import pytest
import trio

from backends import open_device
from tests.integration.site import BLOCK, Site, Witness, site
from tests.integration.test_failover import QUICK, answers, witnessed

pytestmark = pytest.mark.skipif(shutil.which("nbdkit") is None, reason="nbdkit is not installed")


# --- Holds ----------------------------------------------------------------------------------------


def images(made: Site) -> dict[str, bytes]:
    """All that is on the devices."""
    return {path.name: path.read_bytes() for path in made.images.iterdir()}


async def stands_still(made: Site, witness: Witness) -> None:
    """Make sure that no client is answered and nothing on the devices changes, for a while."""
    before, answered = images(made), witness.answered
    await trio.sleep(0.3)
    assert witness.answered == answered
    assert images(made) == before


async def test_hold_stops_all_clients_until_the_release_and_is_refused_twice() -> None:
    async with site(settings=QUICK) as made:
        await made.make(disk_size="20M")
        assert "not held by the operator" in await made.refused("POST", "/domains/vol1/release")
        async with witnessed(made) as witness:
            shown = await made.order("POST", "/domains/vol1/hold")
            assert shown["state"] == "held"
            assert shown["trouble"].startswith("held by the operator")
            assert shown["hold"]["until"] is None
            await stands_still(made, witness)
            said = (
                "domain vol1 is held by the operator; let clients go on with: standfast domain release vol1"
            )
            for order in ("hold", "failover", "failback", "resync"):
                refusal = await made.refused("POST", f"/domains/vol1/{order}")
                assert refusal == said or order in ("failback", "resync"), refusal
            assert await made.refused("POST", "/domains/vol1/disks", name="disk2", size="1M") == said
            shown = await made.order("POST", "/domains/vol1/release")
            assert (shown["state"], shown["trouble"], shown["hold"]) == ("online", "", None)
            await answers(witness, 500)


@pytest.mark.slow
async def test_hold_with_a_timeout_ends_by_itself() -> None:
    async with site(settings=QUICK) as made:
        await made.make(disk_size="20M")
        async with witnessed(made) as witness:
            shown = await made.order("POST", "/domains/vol1/hold", timeout_s=0.5)
            assert shown["hold"]["until"] is not None
            await made.wait("vol1", lambda shown: shown["state"] == "online")
            await answers(witness, 500)
            assert "domain vol1 is released: its time is over" in await made.events()


@pytest.mark.slow
async def test_hold_outlives_manager_and_domain_server() -> None:
    async with site(settings=QUICK) as made:
        await made.make(server=None, disk_size="20M")
        async with witnessed(made, reconnect=True) as witness:
            await made.order("POST", "/domains/vol1/hold")
            made.kill_manager()
            await stands_still(made, witness)
            await made.start_manager()
            await made.wait("vol1", lambda shown: shown["trouble"].startswith("held by the operator"))
            await stands_still(made, witness)
            before = made.server_pid("vol1")
            made.kill_server("vol1")
            await made.wait_new_server("vol1", before)
            await made.wait("vol1", lambda shown: shown["trouble"].startswith("held by the operator"))
            await stands_still(made, witness)
            await made.order("POST", "/domains/vol1/release")
            await answers(witness, 500)


@pytest.mark.slow
async def test_device_lost_in_a_hold_is_failed_over_from_and_clients_wait_for_the_release() -> None:
    async with site(settings=QUICK) as made:
        await made.make(disk_size="20M")
        async with witnessed(made) as witness:
            await made.order("POST", "/domains/vol1/hold")
            made.kill_device("alpha1")
            shown = await made.wait_active("vol1", "beta")
            assert shown["state"] == "held"
            await made.wait("vol1", lambda shown: shown["trouble"].startswith("held by the operator"))
            await stands_still(made, witness)
            shown = await made.order("POST", "/domains/vol1/release")
            assert (shown["state"], shown["active"]) == ("degraded", "beta")
            await answers(witness, 500)


@pytest.mark.slow
async def test_release_of_a_stopped_domain_lets_it_serve_when_it_is_started() -> None:
    async with site(settings=QUICK) as made:
        await made.make(server=None, disk_size="20M")
        await made.order("POST", "/domains/vol1/hold")
        await made.order("POST", "/domains/vol1/stop")
        await made.order("POST", "/domains/vol1/release")
        await made.order("POST", "/domains/vol1/start")
        async with await open_device(made.uri()) as client:
            assert await client.read(0, BLOCK) == bytes(BLOCK)
