"""Devices and stores brought back from a backup: what is older than it should be is noticed, and never served."""

import shutil

import pytest
import trio

from tests.integration.site import Site, Witness, site
from tests.integration.test_failover import QUICK, answers, witnessed
from tests.integration.test_resync import copied_bytes, is_online, made_and_quiet

pytestmark = pytest.mark.slow

MIB = 1 << 20


async def work(made: Site, witness: Witness) -> None:
    """Have a client work for a while; what it remembers is for the next time."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(witness.run)
        await answers(witness, 500)
        nursery.cancel_scope.cancel()


async def restart(made: Site) -> None:
    """Stop the domain in order, and start it again."""
    await made.stop()
    await made.order("POST", "/domains/vol1/start")


async def test_backup_whose_device_is_restored_is_dropped_and_copied_whole() -> None:
    async with site(settings=QUICK) as made:
        await made_and_quiet(made, server=None)
        old = made.images / "old"
        shutil.copyfile(made.images / "beta1", old)
        witness = Witness(made.socket())
        await work(made, witness)
        await restart(made)
        await made.stop()
        shutil.copyfile(old, made.images / "beta1")
        await made.order("POST", "/domains/vol1/start")
        shown = await made.show()
        assert [leg["state"] for leg in shown["legs"]] == ["uptodate", "outdated"]
        await made.order("POST", "/domains/vol1/resync")
        await is_online(made)
        await work(made, witness)
        await made.order("POST", "/domains/vol1/failover", to="beta")
        await witness.check_all()
        events = await made.events()
        assert copied_bytes(events)[-1] == 140 * MIB
        assert any("beta is copied whole" in event and "older than the store" in event for event in events)


async def test_active_leg_whose_device_is_restored_is_not_served_while_a_backup_is_up_to_date() -> None:
    async with site(settings=QUICK) as made:
        await made_and_quiet(made, server=None)
        old = made.images / "old"
        shutil.copyfile(made.images / "alpha1", old)
        witness = Witness(made.socket())
        await work(made, witness)
        await restart(made)
        await made.stop()
        shutil.copyfile(old, made.images / "alpha1")
        await made.order("POST", "/domains/vol1/start")
        shown = await made.show()
        assert shown["active"] == "beta"
        await work(made, witness)
        await witness.check_all()


async def test_only_leg_whose_device_is_restored_is_held_until_the_operator_accepts_it() -> None:
    async with site(settings=QUICK) as made:
        url = f"file://{made.images}/alpha1?size=50M"
        await made.order("POST", "/groups", name="alpha", devices=[url])
        await made.order("POST", "/domains", name="vol1", size="40M", active="alpha")
        await made.order("POST", "/domains/vol1/disks", name="disk1", size="40M")
        old = made.images / "old"
        shutil.copyfile(made.images / "alpha1", old)
        await restart(made)
        await made.stop()
        shutil.copyfile(old, made.images / "alpha1")
        why = await made.refused("POST", "/domains/vol1/start")
        assert "older than the store" in why
        await made.order("POST", "/groups/alpha/accept")
        await is_online(made)


async def test_store_restored_from_before_a_failover_does_not_serve_the_leg_of_then() -> None:
    async with site(settings=QUICK) as made:
        await made_and_quiet(made, server=None)
        await restart(made)
        made.kill_manager()
        old = made.directory / "old"
        shutil.copytree(made.state, old)
        await made.start_manager()
        async with witnessed(made):
            await made.order("POST", "/domains/vol1/failover", to="beta")
        made.kill_manager()
        made.kill_server("vol1")
        shutil.rmtree(made.state)
        shutil.copytree(old, made.state)
        await made.start_manager()
        shown = await made.wait("vol1", lambda shown: "older than the device" in shown["trouble"])
        assert shown["state"] == "failed"
