"""What an operator orders of a domain under load: holds, and moves to other groups. Real processes, killed too."""

import shutil
import signal
from typing import Any

import pytest
import trio

from backends import open_device
from proxy.label import LABEL_SIZE
from tests.integration.site import BLOCK, Site, Witness, site
from tests.integration.test_failover import QUICK, answers, witnessed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nbdkit") is None, reason="nbdkit is not installed"),
]


# --- Holds ----------------------------------------------------------------------------------------


def images(made: Site) -> dict[str, bytes]:
    """All that is on the devices."""
    return {path.name: path.read_bytes()[LABEL_SIZE:] for path in made.images.iterdir()}


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


# --- Moves to another group -----------------------------------------------------------------------


async def add_gamma(made: Site, *, server: str | None = None) -> None:
    """A third group, gamma, of four devices, striped."""
    names = [f"gamma{number}" for number in range(1, 5)]
    urls = [
        f"file://{made.images}/{name}?size=40M"
        if server is None
        else await made.device(name, 40, server=server)
        for name in names
    ]
    await made.order("POST", "/groups", name="gamma", devices=urls, layout="striped:64K")


def has_moved(shown: Any) -> bool:
    """Whether no move is under way, and every leg is up to date."""
    return shown["migration"] is None and all(leg["state"] == "uptodate" for leg in shown["legs"])


async def free_bytes(made: Site, group: str) -> tuple[int, int]:
    """What is free of a group, and what there is."""
    shown = await made.order("GET", f"/groups/{group}")
    return shown["free"], shown["size"]


@pytest.mark.parametrize("server", [None, "nbdkit"])
async def test_migrate_under_load_moves_to_another_geometry_and_frees_the_old_group(
    server: str | None,
) -> None:
    async with site(settings=QUICK) as made:
        await made.make(server=server, disk_size="40M")
        await add_gamma(made, server=server)
        async with witnessed(made) as witness:
            shown = await made.order("POST", "/domains/vol1/migrate", to="gamma")
            assert (shown["migration"]["from"], shown["migration"]["to"]) == ("alpha", "gamma")
            shown = await made.wait("vol1", has_moved)
            assert shown["active"] == "gamma"
            assert [leg["group"] for leg in shown["legs"]] == ["gamma", "beta"]
            await answers(witness, 500)
        free, size = await free_bytes(made, "alpha")
        assert free == size
        await made.order("DELETE", "/groups/alpha")
        assert witness.connections == 1 + 1  # the second is the final check's


@pytest.mark.slow
async def test_migrate_of_a_backup_leaves_the_active_leg_alone() -> None:
    async with site(settings=QUICK) as made:
        await made.make(server=None, disk_size="40M")
        await add_gamma(made)
        async with witnessed(made):
            await made.order("POST", "/domains/vol1/migrate", to="gamma", replace="beta")
            shown = await made.wait("vol1", has_moved)
        assert shown["active"] == "alpha"
        assert [leg["group"] for leg in shown["legs"]] == ["alpha", "gamma"]
        assert shown["last_failover"] is None


#: Where a step has begun and not ended, seen in what is shown of the domain.
MOMENTS = {
    "begun": lambda shown: True,
    "syncing": lambda shown: shown["migration"] is None or shown["migration"]["step"] == "syncing",
    "copied": lambda shown: (
        shown["migration"] is None or shown["migration"]["step"] not in ("connecting", "syncing")
    ),
    "switched": lambda shown: shown["active"] == "gamma",
    "dropped": lambda shown: (
        [leg["state"] for leg in shown["legs"] if leg["group"] == "alpha"] != ["uptodate"]
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("killed", ["manager", "server"])
async def test_migrate_goes_on_after_a_crash_in_any_step(moment: str, killed: str) -> None:
    async with site(settings=QUICK) as made:
        await made.make(server=None, disk_size="100M")
        await add_gamma(made)
        async with witnessed(made, reconnect=killed == "server") as witness:
            await made.order("POST", "/domains/vol1/migrate", to="gamma")
            await made.wait("vol1", MOMENTS[moment])
            if killed == "manager":
                made.kill_manager()
                await made.start_manager()
            else:
                made.kill_server("vol1")
            await answers(witness, 500)
            shown = await made.wait("vol1", has_moved)
            assert [leg["group"] for leg in shown["legs"]] == ["gamma", "beta"]
            await answers(witness, 500)
        free, size = await free_bytes(made, "alpha")
        assert free == size
        for _ in range(2):
            await made.order("POST", "/domains/vol1/failover")
            await witness.check_all()


@pytest.mark.slow
async def test_migrate_source_lost_meanwhile_goes_on_and_clients_stay_where_they_went() -> None:
    async with site(settings=QUICK) as made:
        await made.make(disk_size="40M")
        await add_gamma(made, server="nbdkit")
        await made.stop_device("gamma1")
        async with witnessed(made):
            await made.order("POST", "/domains/vol1/migrate", to="gamma")
            made.kill_device("alpha1")
            await made.wait_active("vol1", "beta")
            made.devices["gamma1"].send_signal(signal.SIGCONT)
            shown = await made.wait("vol1", has_moved)
        assert shown["active"] == "beta"
        assert [leg["group"] for leg in shown["legs"]] == ["gamma", "beta"]


@pytest.mark.slow
async def test_migrate_target_out_of_reach_says_so_and_can_be_given_up() -> None:
    async with site(settings=QUICK) as made:
        await made.make(server=None, disk_size="40M")
        await add_gamma(made)
        (made.images / "gamma2").rename(made.images / "aside")
        async with witnessed(made):
            await made.order("POST", "/domains/vol1/migrate", to="gamma")
            shown = await made.wait("vol1", lambda shown: shown["migration"]["trouble"] != "")
            assert "gamma2" in shown["migration"]["trouble"]
            assert "just moving from alpha to gamma" in await made.refused(
                "POST", "/domains/vol1/migrate", to="gamma"
            )
            await made.order("DELETE", "/domains/vol1/legs/gamma")
            shown = await made.wait("vol1", has_moved)
        assert [leg["group"] for leg in shown["legs"]] == ["alpha", "beta"]
        free, size = await free_bytes(made, "gamma")
        assert free == size


async def test_legs_are_added_and_removed_and_what_cannot_be_is_refused() -> None:
    async with site(settings=QUICK) as made:
        await made.make(server=None, disk_size="10M")
        await add_gamma(made)
        url = f"file://{made.images}/small?size=20M"
        await made.order("POST", "/groups", name="small", devices=[url])
        for path in ("migrate", "legs"):
            body = {"to" if path == "migrate" else "group": "beta"}
            assert "a leg of domain vol1 already" in await made.refused(
                "POST", f"/domains/vol1/{path}", **body
            )
            body = {"to" if path == "migrate" else "group": "nope"}
            assert "there is no group nope" in await made.refused("POST", f"/domains/vol1/{path}", **body)
            body = {"to" if path == "migrate" else "group": "small"}
            assert "small" in await made.refused("POST", f"/domains/vol1/{path}", **body)
        assert "no leg on a group small" in await made.refused(
            "POST", "/domains/vol1/migrate", to="gamma", replace="small"
        )
        assert "alpha is active" in await made.refused("DELETE", "/domains/vol1/legs/alpha")
        assert "no leg on a group gamma" in await made.refused("DELETE", "/domains/vol1/legs/gamma")
        await made.order("POST", "/domains/vol1/legs", group="gamma")
        shown = await made.wait("vol1", has_moved)
        assert [leg["group"] for leg in shown["legs"]] == ["alpha", "beta", "gamma"]
        await made.order("DELETE", "/domains/vol1/legs/beta")
        shown = await made.wait("vol1", has_moved)
        assert [leg["group"] for leg in shown["legs"]] == ["alpha", "gamma"]
        assert shown["state"] == "online"
