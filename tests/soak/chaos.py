"""Everything that goes wrong, at random moments, until it is told to stop."""

import os
import random
import signal
from collections.abc import Awaitable, Callable
from functools import partial

import httpx
import trio

from backends import DeviceError, open_device
from tests.integration.site import Site
from tests.sim.history import Violation
from tests.soak.clients import Servers, is_alive
from tests.soak.devices import Condition, Device
from tests.soak.record import LongHistory

DOMAIN = "vol1"
#: Between the healing of a device and its next trouble: a server that is reached works off what it had
#: received before, and the promise is not for one that does so only much later.
RECOVERY_S = 0.5
EXTRA_SIZES_KIB = (64, 100, 192, 500)


class Chaos:
    """See the module.

    Args:
        made: the site.
        groups: devices of each group.
        servers: told of what is killed.
        history: told of how often.
        choices: of what is done.
    """

    def __init__(
        self,
        made: Site,
        groups: dict[str, list[Device]],
        servers: Servers,
        history: LongHistory,
        choices: random.Random,
    ) -> None:
        self.errors_at = -1.0  # when a device was last failing, on trio's clock
        self._made = made
        self._groups = groups
        self._servers = servers
        self._happened = history.happened
        self._choices = choices

    async def run(self) -> None:
        """Make trouble until cancelled. Raises Violation."""
        async with trio.open_nursery() as nursery:
            for devices in self._groups.values():
                nursery.start_soon(self._trouble_group, devices)
            nursery.start_soon(self._order)
            nursery.start_soon(self._change_disks)
            nursery.start_soon(self._trouble_processes)

    async def _pause(self, low_s: float, high_s: float) -> None:
        await trio.sleep(self._choices.uniform(low_s, high_s))

    # --- Devices ----------------------------------------------------------------------------------

    async def _trouble_group(self, devices: list[Device]) -> None:
        while True:
            await self._pause(0.5, 5)
            device = self._choices.choice(devices)
            kind = self._choices.choice((Condition.DEAD, Condition.STOPPED, Condition.FAILING))
            self._happened[f"device {kind.value}"] += 1
            slow = False
            if kind is Condition.DEAD:
                device.kill()
                slow = self._choices.random() < 0.3
                await self._pause(0, 2)
            elif kind is Condition.STOPPED:
                device.stop()
                await self._pause(0.05, 2)
            else:
                device.fail()
                until = trio.current_time() + self._choices.uniform(0.1, 0.8)
                while trio.current_time() < until:
                    self.errors_at = trio.current_time()
                    await trio.sleep(0.05)
            if slow and device.condition is Condition.DEAD:
                self._happened["device slow"] += 1
                await device.start(slow=True)
            else:
                await device.heal()
            await trio.sleep(RECOVERY_S)

    # --- Processes --------------------------------------------------------------------------------

    async def _trouble_processes(self) -> None:
        while True:
            await self._pause(1, 6)
            trouble = self._choices.choice(
                (
                    self._kill_manager,
                    self._kill_manager,
                    self._stop_manager,
                    self._kill_server,
                    self._kill_both,
                )
            )
            await trouble()

    async def _kill_manager(self) -> None:
        self._happened["manager killed"] += 1
        self._made.kill_manager()
        await self._pause(0, 2)
        await self._made.start_manager()

    async def _stop_manager(self) -> None:
        self._happened["manager stopped"] += 1
        assert self._made.manager is not None
        self._made.manager.send_signal(signal.SIGSTOP)
        await self._pause(0, 1.5)
        self._made.manager.send_signal(signal.SIGCONT)

    async def _kill_server(self) -> None:
        try:
            server = self._made.server_pid(DOMAIN)
        except (OSError, IndexError, ValueError):
            return  # one is just being started
        if is_alive(server):
            self._happened["domain server killed"] += 1
            self._servers.killed.add(server)
            os.kill(server, signal.SIGKILL)

    async def _kill_both(self) -> None:
        await self._kill_server()
        await self._kill_manager()

    # --- Orders -----------------------------------------------------------------------------------

    async def _give(self, method: str, path: str, **body: object) -> bool:
        """Give an order that may be refused, or that nobody is there to take; whether it was carried out."""
        try:
            answer = await self._made.http.request(method, path, json=body if method == "POST" else None)
        except httpx.TransportError:
            return False
        name = f"{method} {path.rpartition('/')[2] if method == 'POST' else 'disk'}"
        self._happened[f"{name} {'done' if answer.is_success else 'refused'}"] += 1
        if answer.is_server_error or "failed inside" in answer.text:
            raise Violation(f"{method} {path} {body}: {answer.text}")
        return answer.is_success

    async def _order(self) -> None:
        orders: list[Callable[[], Awaitable[bool]]] = [
            *[partial(self._give, "POST", f"/domains/{DOMAIN}/resync")] * 6,
            partial(self._give, "POST", f"/domains/{DOMAIN}/failover"),
            *(partial(self._give, "POST", f"/domains/{DOMAIN}/failover", to=group) for group in self._groups),
        ]
        while True:
            await self._pause(0, 0.6)
            await self._choices.choice(orders)()

    async def _change_disks(self) -> None:
        """Make, grow and remove a disk, whose space has to read as zeroes."""
        path = f"/domains/{DOMAIN}/disks"
        while True:
            await self._pause(0.2, 2)
            small, large = sorted(self._choices.sample(EXTRA_SIZES_KIB, 2))
            if await self._give("POST", path, name="extra", size=f"{small}K"):
                await self._use_extra(0, small << 10)
                if await self._give("POST", f"{path}/extra/resize", size=f"{large}K"):
                    await self._use_extra(small << 10, large << 10)
            await self._pause(0, 1)
            await self._give("DELETE", f"{path}/extra?force=true")

    async def _use_extra(self, begin: int, end: int) -> None:
        """Read what is new of the disk, and write over it so that nobody after it may find that."""
        try:
            async with await open_device(self._made.uri(DOMAIN, "extra")) as client:
                if await client.read(begin, end - begin) != bytes(end - begin):
                    raise Violation(f"bytes {begin} to {end} of a new disk are not zeroes")
                await client.write(begin, b"extra" * ((end - begin) // 5))
        except DeviceError:
            self._happened["extra disk out of reach"] += 1
