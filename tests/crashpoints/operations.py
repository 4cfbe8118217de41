"""The operations whose crash points are tried, each as an operator gives it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from tests.integration.site import Site

#: The domain with the client, which operations on others must not touch.
DOMAIN = "vol1"
OTHER = "vol2"
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation.

    Attributes:
        prepare: brings the site to where it can be given.
        give: gives it, and returns when all that follows from it is over.
        again: gives it to a site that died in it and did not do it.
        tidy: brings the site from there to where all of it can be removed.
    """

    name: str
    prepare: Callable[[Site], Awaitable[None]]
    give: Callable[[Site], Awaitable[None]]
    again: Callable[[Site], Awaitable[None]]
    tidy: Callable[[Site], Awaitable[None]]


def device_url(made: Site, name: str, size: int) -> str:
    """A file as a device, made when absent."""
    return f"file://{made.images}/{name}?size={size}"


async def make_base(made: Site) -> None:
    """Two groups, a domain over both, a disk in it, synced."""
    alpha = [device_url(made, "alpha1", 30 * MIB), device_url(made, "alpha2", 30 * MIB)]
    await made.order("POST", "/groups", name="alpha", devices=alpha, layout="striped:64K")
    await made.order("POST", "/groups", name="beta", devices=[device_url(made, "beta1", 60 * MIB)])
    await made.order("POST", "/domains", name=DOMAIN, size="16M", active="alpha", backups=["beta"])
    await made.order("POST", f"/domains/{DOMAIN}/disks", name="disk1", size="4M")
    await wait_rest(made, DOMAIN)


async def wait_rest(made: Site, domain: str) -> Any:
    """Return when a domain serves and nothing is being copied; what is shown of it."""
    return await made.wait(domain, is_at_rest)


def is_at_rest(shown: Any) -> bool:
    """Whether a domain serves and nothing of it is being copied."""
    return shown["state"] in ("online", "degraded") and all(
        leg["state"] in ("uptodate", "outdated") for leg in shown["legs"]
    )


async def _nothing(made: Site) -> None:
    pass


# --- Groups -----------------------------------------------------------------------------------------


async def _create_group(made: Site, *, force: bool = False) -> None:
    urls = [device_url(made, f"gamma{number}", 10 * MIB) for number in (1, 2)]
    await made.order("POST", "/groups", name="gamma", devices=urls, force=force)


async def _create_group_again(made: Site) -> None:
    answer = await made.http.post(
        "/groups",
        json={
            "name": "gamma",
            "devices": [device_url(made, f"gamma{number}", 10 * MIB) for number in (1, 2)],
        },
    )
    if not answer.is_success:
        # A label was written and the group was not recorded: only the operator knows that nobody needs it.
        assert "which this manager does not know; say --force" in answer.json()["error"], answer.text
        await _create_group(made, force=True)


async def _remove_group(made: Site) -> None:
    assert await made.order("DELETE", "/groups/gamma") == {"unreached": []}


# --- Domains ----------------------------------------------------------------------------------------


async def _create_domain(made: Site) -> None:
    await made.order("POST", "/domains", name=OTHER, size="8M", active="beta", backups=["alpha"])
    await wait_rest(made, OTHER)


async def _create_domain_with_disk(made: Site) -> None:
    await _create_domain(made)
    await made.order("POST", f"/domains/{OTHER}/disks", name="disk1", size="1M")


async def _remove_domain(made: Site) -> None:
    await made.order("DELETE", f"/domains/{OTHER}")


async def _stop_domain(made: Site) -> None:
    await made.order("POST", f"/domains/{OTHER}/stop")


async def _start_domain(made: Site) -> None:
    await made.order("POST", f"/domains/{OTHER}/start")
    await wait_rest(made, OTHER)


async def _prepare_start(made: Site) -> None:
    await _create_domain_with_disk(made)
    await _stop_domain(made)


# --- Disks ------------------------------------------------------------------------------------------


async def _create_disk(made: Site) -> None:
    await made.order("POST", f"/domains/{DOMAIN}/disks", name="disk2", size="2M")


async def _resize_disk(made: Site) -> None:
    await made.order("POST", f"/domains/{DOMAIN}/disks/disk2/resize", size="5M")


async def _remove_disk(made: Site) -> None:
    await made.order("DELETE", f"/domains/{DOMAIN}/disks/disk2")


# --- Legs -------------------------------------------------------------------------------------------


async def _fail_over(made: Site) -> None:
    await made.order("POST", f"/domains/{DOMAIN}/failover", to="beta")
    await wait_rest(made, DOMAIN)


async def _lose_beta(made: Site) -> None:
    """Let the domain be started without its backup, which is there again afterwards."""
    image, away = made.images / "beta1", made.images / "away"
    await made.order("POST", f"/domains/{DOMAIN}/stop?force=true")
    image.rename(away)
    await made.order("POST", f"/domains/{DOMAIN}/start")
    away.rename(image)
    await wait_rest(made, DOMAIN)


async def _fail_back(made: Site) -> None:
    await made.order("POST", f"/domains/{DOMAIN}/failback")
    await wait_rest(made, DOMAIN)


async def _resync(made: Site) -> None:
    await made.order("POST", f"/domains/{DOMAIN}/resync")
    await made.wait(DOMAIN, lambda shown: shown["state"] == "online")


async def _migrate(made: Site) -> None:
    await made.order("POST", f"/domains/{DOMAIN}/migrate", to="gamma")
    await _wait_legs(made, "gamma", "beta")


async def _migrate_again(made: Site) -> None:
    answer = await made.http.post(f"/domains/{DOMAIN}/migrate", json={"to": "gamma"})
    if not answer.is_success:
        # It was recorded, and goes on by itself.
        assert "is a leg of domain" in answer.text or "moves" in answer.text, answer.text
    await _wait_legs(made, "gamma", "beta")


async def _add_leg(made: Site) -> None:
    await _create_group(made)
    await made.order("POST", f"/domains/{DOMAIN}/legs", group="gamma")
    await _wait_legs(made, "alpha", "beta", "gamma")


async def _remove_leg(made: Site) -> None:
    await made.order("DELETE", f"/domains/{DOMAIN}/legs/gamma")
    await _wait_legs(made, "alpha", "beta")


async def _remove_leg_again(made: Site) -> None:
    answer = await made.http.delete(f"/domains/{DOMAIN}/legs/gamma")
    if not answer.is_success:
        assert "leaves" in answer.text or "has no leg" in answer.text, answer.text
    await _wait_legs(made, "alpha", "beta")


async def _wait_legs(made: Site, *groups: str) -> None:
    """Return when these are the legs of the domain, and all of them are up to date."""
    await made.wait(
        DOMAIN,
        lambda shown: (
            [leg["group"] for leg in shown["legs"]] == list(groups)
            and shown["state"] == "online"
            and shown["migration"] is None
        ),
    )


# --- Holds and losses --------------------------------------------------------------------------------


async def _hold(made: Site) -> None:
    await made.order("POST", f"/domains/{OTHER}/hold")


async def _release(made: Site) -> None:
    await made.order("POST", f"/domains/{OTHER}/release")


async def _prepare_release(made: Site) -> None:
    await _create_domain_with_disk(made)
    await _hold(made)


async def _lose_all_but_outdated(made: Site) -> None:
    """Leave a domain without its active leg, and with a backup that lacks what was done without it."""
    for group in ("near", "far"):
        await made.order("POST", "/groups", name=group, devices=[device_url(made, group, 10 * MIB)])
    await made.order("POST", "/domains", name=OTHER, size="4M", active="near", backups=["far"])
    await wait_rest(made, OTHER)
    for group in ("far", "near"):
        await _stop_domain(made)
        for name in ("near", "far"):
            _move_away(made, name, is_away=name == group)
        if group == "far":
            await made.order("POST", f"/domains/{OTHER}/start")
            await made.order("POST", f"/domains/{OTHER}/disks", name="disk1", size="1M")
    assert "does not serve" in await made.refused("POST", f"/domains/{OTHER}/start")
    await made.wait(OTHER, lambda shown: shown["state"] == "held")


async def _accept_loss(made: Site) -> None:
    await made.order("POST", f"/domains/{OTHER}/failover", accept_loss=True)
    assert await made.order("GET", f"/domains/{OTHER}/losses")


async def _bring_back(made: Site) -> None:
    assert (await made.show(OTHER))["last_failover"]["lost_bytes"] == MIB
    for name in ("near", "far"):
        _move_away(made, name, is_away=False)


def _move_away(made: Site, name: str, *, is_away: bool) -> None:
    image, away = made.images / name, made.images / f"{name}.away"
    if is_away != away.exists():
        image.rename(away) if is_away else away.rename(image)


def _operations(*found: Operation) -> dict[str, Operation]:
    return {one.name: one for one in found}


OPERATIONS = _operations(
    Operation("group-create", _nothing, _create_group, _create_group_again, _nothing),
    Operation("group-remove", _create_group, _remove_group, _remove_group, _nothing),
    Operation("domain-create", _nothing, _create_domain, _create_domain, _nothing),
    Operation("domain-remove", _create_domain_with_disk, _remove_domain, _remove_domain, _nothing),
    Operation("domain-stop", _create_domain_with_disk, _stop_domain, _stop_domain, _nothing),
    Operation("domain-start", _prepare_start, _start_domain, _start_domain, _nothing),
    Operation("disk-create", _nothing, _create_disk, _create_disk, _nothing),
    Operation("disk-resize", _create_disk, _resize_disk, _resize_disk, _nothing),
    Operation("disk-remove", _create_disk, _remove_disk, _remove_disk, _nothing),
    Operation("failover", _nothing, _fail_over, _fail_over, _nothing),
    Operation("failback", _fail_over, _fail_back, _fail_back, _nothing),
    Operation("resync", _lose_beta, _resync, _resync, _nothing),
    Operation("migrate", _create_group, _migrate, _migrate_again, _nothing),
    Operation("leg-remove", _add_leg, _remove_leg, _remove_leg_again, _nothing),
    Operation("hold", _create_domain_with_disk, _hold, _hold, _release),
    Operation("release", _prepare_release, _release, _release, _nothing),
    Operation("accept-loss", _lose_all_but_outdated, _accept_loss, _accept_loss, _bring_back),
)
