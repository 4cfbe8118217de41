"""A run: periods of trouble, each of which ends with all healed and everything compared."""

import random
import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import trio

from proxy.manager.maps import domain_map
from proxy.store.sqlite import SqliteStore
from tests.integration.site import Site
from tests.sim.history import CELLS_PER_SECTOR, Violation
from tests.sim.medium import SECTOR
from tests.soak.chaos import DOMAIN, Chaos
from tests.soak.clients import Client, Refusal, Servers, read_all
from tests.soak.devices import Device
from tests.soak.record import LongHistory

#: As in production, only the patience is shorter.
SETTINGS = "deadline_ms = 500\nquarantine_s = 1.0\nreopen_interval_s = 0.1\n"
MIB = 1 << 20
CLIENTS = 4
#: Disks have numbers in the order they are made.
DISK_SIZES = {1: 5 * MIB, 2: 1 * MIB}
DOMAIN_SIZE = 7 * MIB
#: Of trouble at a time: long enough for troubles to meet, short enough for its history to be checked soon.
PERIOD_S = 15.0
#: For all requests to be answered, and all legs to be up to date, once nothing is wrong any more.
REST_S = 60.0
#: Between an answer and what the manager shows, on a machine that is busy.
SHOWN_LATE_S = 1.0
#: Of each log, to look into a violation: the last seconds of trouble.
LOG_LINES = 120


class Soak:
    """One site and its trouble.

    Args:
        seed: of all choices.

    Attributes:
        history: what clients were told, and how often what happened.
        logs: when it has failed, the last lines of the manager and the domain server.
    """

    def __init__(self, seed: int) -> None:
        self.logs: dict[str, list[str]] = {}
        self._choices = random.Random(seed)
        self.history = LongHistory(
            {disk: size // SECTOR * CELLS_PER_SECTOR for disk, size in DISK_SIZES.items()}
        )
        self._servers = Servers(self.history)
        self._made = Site(settings=SETTINGS)
        self._groups: dict[str, list[Device]] = {}
        self._legs_shown: list[tuple[float, int]] = []

    async def run(self, seconds: float) -> None:
        """Make trouble for so long, and look what came of it. Raises Violation."""
        try:
            await self._build()
            until = trio.current_time() + seconds
            while (left_s := until - trio.current_time()) > 0:
                await self._period(min(PERIOD_S, left_s))
        except BaseException:
            self._keep_logs()
            raise
        finally:
            with trio.CancelScope(shield=True):
                for device in self._devices():
                    device.kill()
                await self._made.close()

    def _keep_logs(self) -> None:
        """For whoever looks into a violation."""
        for path in (self._made.directory / "serve.log", self._made.run / DOMAIN / "server.log"):
            if path.exists():
                self.logs[path.name] = path.read_text(errors="replace").splitlines()[-LOG_LINES:]

    def _devices(self) -> list[Device]:
        return [device for devices in self._groups.values() for device in devices]

    async def _build(self) -> None:
        choices = self._choices
        shapes = [("striped:64K", 2, 5 * MIB), ("linear", 3, 3 * MIB), ("linear", 1, 9 * MIB)]
        choices.shuffle(shapes)
        await self._made.start_manager()
        for name, (layout, count, size) in zip(("alpha", "beta", "gamma"), shapes, strict=True):
            self._groups[name] = [
                Device(f"{name}{number}", self._made.images, self._made.directory, size)
                for number in range(1, count + 1)
            ]
            for device in self._groups[name]:
                await device.start()
            urls = [device.url for device in self._groups[name]]
            await self._made.order("POST", "/groups", name=name, devices=urls, layout=layout)
            if len(self._groups) == 2 and choices.random() < 0.4:
                break
        active, *backups = self._groups
        order = {"name": DOMAIN, "size": str(DOMAIN_SIZE), "active": active, "backups": backups}
        await self._made.order("POST", "/domains", **order)
        for disk, disk_size in DISK_SIZES.items():
            await self._made.order(
                "POST", f"/domains/{DOMAIN}/disks", name=f"disk{disk}", size=str(disk_size)
            )
        await self._made.wait(DOMAIN, _are_uptodate)

    # --- A period ---------------------------------------------------------------------------------

    async def _period(self, seconds: float) -> None:
        clients = [
            Client(
                self._made.socket(DOMAIN),
                self._choices.choice((1, 1, 2)),
                self._servers,
                self.history,
                random.Random(self._choices.random()),
            )
            for _ in range(CLIENTS)
        ]
        chaos = Chaos(
            self._made, self._groups, self._servers, self.history, random.Random(self._choices.random())
        )
        async with trio.open_nursery() as watching:
            for device in self._devices():
                watching.start_soon(device.watch)
            watching.start_soon(self._watch_legs)
            async with trio.open_nursery() as working:
                for client in clients:
                    working.start_soon(client.run)
                with trio.move_on_after(seconds):
                    await chaos.run()
                await self._heal()
                for client in clients:
                    client.finish()
                working.cancel_scope.deadline = trio.current_time() + REST_S
            if working.cancel_scope.cancelled_caught:
                raise Violation(f"requests are not answered although nothing is wrong: {await self._show()}")
            for client in clients:
                for refusal in client.refusals:
                    self._check_refusal(refusal, chaos.errors_at)
            await self._rest()
            watching.cancel_scope.cancel()
        await self._compare()
        self.history.happened["periods"] += 1

    async def _heal(self) -> None:
        """End all trouble, whatever was being made."""
        assert self._made.manager is not None
        self._made.kill_manager()
        for device in self._devices():
            await device.heal()
        await self._made.start_manager()

    async def _show(self) -> Any:
        try:
            return (await self._made.http.get(f"/domains/{DOMAIN}", timeout=5)).json()
        except (httpx.TransportError, ValueError):
            return None

    async def _watch_legs(self) -> None:
        """Remember how many legs could serve, as far as the manager showed it."""
        while True:
            shown = await self._show()
            able = (
                sum(leg["state"] == "uptodate" for leg in shown["legs"]) if shown and "legs" in shown else 0
            )
            self._legs_shown.append((trio.current_time(), able))
            await trio.sleep(0.05)

    def _check_refusal(self, refusal: Refusal, errors_at: float) -> None:
        """Raise Violation unless a client had to be told of an error."""
        begin, end = refusal.asked_at - SHOWN_LATE_S, refusal.told_at + SHOWN_LATE_S
        if errors_at < begin:
            raise Violation(f"no device had errors, and yet {refusal}")
        able = [count for at, count in self._legs_shown if begin <= at <= end]
        if able and min(able) > 1:
            raise Violation(f"another leg could have served, and yet {refusal}")

    async def _rest(self) -> None:
        """Return when every leg is up to date and nothing is under way. Raises Violation when that never comes."""
        self._legs_shown.clear()
        shown: Any = None
        with trio.move_on_after(REST_S):
            while True:
                shown = await self._show()
                if shown and _are_uptodate(shown) and _is_idle(shown):
                    self._servers.settle_all()
                    return
                if shown and any(leg["state"] == "outdated" for leg in shown.get("legs", ())):
                    await self._made.http.post(f"/domains/{DOMAIN}/resync", json={})
                await trio.sleep(0.05)
        raise Violation(f"the domain does not come to rest although nothing is wrong: {shown}")

    # --- What came of it --------------------------------------------------------------------------

    async def _compare(self) -> None:
        """Read everything, and hold it against the histories and against what each leg has on its devices."""
        copy = self._made.directory / "copy.db"
        with (
            closing(sqlite3.connect(self._made.state / "standfast.db")) as source,
            closing(sqlite3.connect(copy)) as target,
        ):
            source.backup(target)
        with closing(SqliteStore(copy)) as store:
            domain = store.domain(DOMAIN)
            groups = {group.name: group for group in store.groups()}
        for disk in DISK_SIZES:
            found = await read_all(self._made.socket(DOMAIN), disk, self._servers, self.history)
            ranges = next(one.ranges for one in domain.disks if one.name == f"disk{disk}")
            for name, devices in self._groups.items():
                images = [device.image for device in devices]
                held = _content(images, domain_map(domain, groups[name]).compose(ranges))[: len(found)]
                if held != found:
                    place = next(at for at in range(len(found)) if held[at] != found[at])
                    raise Violation(
                        f"disk {disk} on leg {name} differs from what was read, first at byte {place}"
                    )
        await trio.to_thread.run_sync(partial(self.history.check))
        self.history.forget()


def _content(images: list[Path], extents: Any) -> bytes:
    parts = []
    for extent in extents:
        with images[extent.device].open("rb") as file:
            file.seek(extent.device_offset)
            parts.append(file.read(extent.length))
    return b"".join(parts)


def _are_uptodate(shown: Any) -> bool:
    return shown.get("state") == "online" and all(leg["state"] == "uptodate" for leg in shown["legs"])


def _is_idle(shown: Any) -> bool:
    statistics = shown["statistics"]
    return shown["clients"] == 0 and statistics is not None and statistics["running"] == 0
