"""The legs of one domain as they stand in its domain server: opened, trusted, on their way out."""

import math
import os
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import trio

from proxy.errors import StoreError, StoreOutdatedError
from proxy.extentmap import Run
from proxy.failover import Evidence, EvidenceKind
from proxy.manager import messages
from proxy.manager.labels import GroupLabels, LabelOrder
from proxy.manager.link import CommandError, Link, ServerGoneError
from proxy.manager.settings import Settings
from proxy.model import Group

#: For all devices of a leg to be opened and locked; a predecessor's lock may take most of it.
OPEN_TIMEOUT_S = 60

_EVIDENCE = {
    "DEVICE_ERROR": EvidenceKind.ERROR,
    "DEVICE_LOST": EvidenceKind.LOST,
    "DEADLINE_MISSED": EvidenceKind.DEADLINE,
    "LEG_BEHIND": EvidenceKind.BEHIND,
}


@dataclass(slots=True)
class Leg:
    """A leg opened in the domain server; ``number`` is its id there.

    ``stale``: what of it was older than the store said, a line each, so that all of it is to be copied.
    ``fresh_at``: when it was opened again after a loss, on trio's clock; None once it is in use.
    ``repaired_at``: when reads of it were repaired, on the same clock, as far back as counts.
    ``left_at``: when it was fenced or given up.
    """

    group: Group
    number: int
    fresh_at: float | None = None
    copying: bool = False
    copied: bool = False
    copied_bytes: int = 0
    stale: list[str] = field(default_factory=list)
    closing: bool = False
    repaired_at: deque[float] = field(default_factory=deque)
    left_at: float = -math.inf


class Numbers:
    """Numbers for legs, each given out once."""

    def __init__(self) -> None:
        self._next = 1

    def take(self) -> int:
        """One that nobody has had."""
        self._next += 1
        return self._next - 1

    def skip(self, number: int) -> None:
        """Somebody before us gave out ``number`` at most."""
        self._next = max(self._next, number + 1)


class Legs:
    """Every opening has a number of its own, so that what is told of an old one is never taken for a new one.

    Args:
        link: to the domain server.
        settings: the manager's.
        numbers: of the domain, never given out twice by one manager, whichever domain server it is for.
    """

    def __init__(self, link: Link, settings: Settings, numbers: "Numbers") -> None:
        self.open: dict[str, Leg] = {}
        self._link = link
        self._settings = settings
        self._leaving: dict[int, Leg] = {}
        self._opening: set[str] = set()
        self._tried_at: dict[str, float] = {}
        self._suspect: set[str] = set()
        self._numbers = numbers
        self._closed_at: dict[str, float] = {}  # when a leg of a group was last let go of
        self._began_at = trio.current_time()

    # --- Opening ----------------------------------------------------------------------------------

    async def connect(
        self, group: Group, runs: tuple[Run, ...], labels: GroupLabels, *, fresh: bool, stale_welcome: bool
    ) -> Leg | Evidence:
        """Open a leg in the domain server and have it labelled anew; or what speaks against it.

        Args:
            labels: of the group.
            fresh: it was lost, and is opened again.
            stale_welcome: it may be older than the store says: all of it will be copied then.

        Raises:
            StoreOutdatedError: a device knows of more than the store does.
        """
        leg = Leg(group, self._numbers.take())
        try:
            async with labels.begun(stale_welcome=stale_welcome) as order:
                return await self._connect(leg, runs, order, fresh=fresh)
        except StoreOutdatedError:
            raise
        except StoreError as error:
            return Evidence(EvidenceKind.UNREACHABLE, f"group {group.name}", detail=str(error))

    async def _connect(
        self, leg: Leg, runs: tuple[Run, ...], labels: LabelOrder, *, fresh: bool
    ) -> Leg | Evidence:
        group = leg.group
        try:
            with trio.move_on_after(OPEN_TIMEOUT_S) as patience:
                leg.stale = await self._link.call(
                    "open-leg",
                    limit_s=math.inf,
                    leg=leg.number,
                    group=group.name,
                    uuid=str(group.uuid),
                    devices=messages.device_orders(group, runs, labels.generation),
                    labels=labels.allowed,
                    timeout_s=self._settings.deadline_ms / 1000,
                )
                try:
                    labels.written()
                except StoreError:
                    await self._link.call("close-leg", leg=leg.number)  # nobody else knows that it is open
                    raise
            if patience.cancelled_caught:
                await self._link.call("close-leg", leg=leg.number)
                detail = f"could not be opened within {OPEN_TIMEOUT_S} s"
                return Evidence(EvidenceKind.UNREACHABLE, f"group {group.name}", detail=detail)
        except CommandError as error:
            if error.details.get("is_newer"):
                raise StoreOutdatedError(error.details["text"]) from error
            position = error.details.get("position")
            device = f"group {group.name}" if position is None else group.devices[position].url
            detail = error.details["text"].removeprefix(f"{device}: ")
            return Evidence(EvidenceKind.UNREACHABLE, device, error.details.get("errno", 0), detail)
        except ServerGoneError as error:
            return Evidence(EvidenceKind.UNREACHABLE, f"group {group.name}", detail=str(error))
        if fresh:
            leg.fresh_at = trio.current_time()
        return leg

    def may_open(self, group: str) -> bool:
        """Whether it is time to try and open this group again; if so, it counts as tried."""
        now = trio.current_time()
        if (
            group in self._opening
            or group in self.open
            or any(leg.group.name == group for leg in self._leaving.values())
            or now - self._tried_at.get(group, -math.inf) < self._settings.reopen_interval_s
        ):
            return False
        self._tried_at[group] = now
        self._opening.add(group)
        return True

    def opened(self, group: str, result: Leg | Evidence) -> None:
        """An attempt that ``may_open`` allowed has ended."""
        self._opening.discard(group)
        if isinstance(result, Leg):
            self.open[group] = result

    def adopt(self, number: int, group: Group, found: Mapping[str, Any]) -> Leg:
        """Take over a leg that the domain server had before this manager came."""
        # That a copy has ended was for the manager before to hear: by now it may be no copy any more.
        leg = Leg(group, number)
        if found["fenced"]:
            self._leaving[number] = leg
        else:
            self.open[group.name] = leg
        return leg

    # --- Trust ------------------------------------------------------------------------------------

    def suspect(self, group: Group) -> None:
        """A write of unknown fate may still land on this group, if its devices are other servers'.

        On files and block devices of this host none can: the domain server's locks there outlive
        every write of its own.
        """
        if is_remote(group):
            self._suspect.add(group.name)

    def trust(self, group: str) -> None:
        """Time enough has passed for such writes to have landed."""
        self._suspect.discard(group)

    def trusted(self, leg: Leg) -> bool:
        """Whether no old write can land on this leg any more."""
        if leg.group.name in self._suspect and leg.fresh_at is not None:
            if trio.current_time() - leg.fresh_at < self._settings.quarantine_s:
                return False
            self.trust(leg.group.name)
        return True

    # --- Leaving ----------------------------------------------------------------------------------

    async def fence(self, group: str) -> None:
        """Close the gate to a leg for good, if it is open at all. It stays until its last answer is in."""
        leg = self.open.pop(group, None)
        if leg is not None:
            leg.left_at = trio.current_time()
            self._leaving[leg.number] = leg
            await self._link.call("fence", leg=leg.number)

    async def discard(self, leg: Leg) -> None:
        """Let go of a leg without waiting for answers."""
        del self.open[leg.group.name]
        leg.left_at = trio.current_time()
        self._leaving[leg.number] = leg
        await self._close(leg)

    async def _close(self, leg: Leg) -> None:
        if not leg.closing:
            leg.closing = True
            await self._link.call("close-leg", leg=leg.number)

    async def drained(self, number: int, unproven: int) -> None:
        """A fenced leg has nothing in flight; ``unproven`` writes of it have an unknown fate."""
        leg = self._leaving.get(number)
        if leg is not None:
            if unproven:
                self.suspect(leg.group)
            await self._close(leg)

    async def abandon(self, group: Group) -> None:
        """Wait no longer for the last answers of a fenced leg of this group: their fate stays unknown."""
        for leg in list(self._leaving.values()):
            if leg.group.name == group.name and not leg.closing:
                self.suspect(group)
                await self._close(leg)

    def closed(self, number: int) -> None:
        """The domain server knows a leg no more."""
        leg = self._leaving.pop(number, None)
        if leg is not None:
            self._closed_at[leg.group.name] = trio.current_time()

    async def is_gone(self, group: Group) -> bool:
        """Whether nothing of a leg that takes part no more is open, and no write to it can still land."""
        name = group.name
        if name in self._opening:
            return False
        if name in self.open:
            await self.discard(self.open[name])
        leaving = [leg for leg in self._leaving.values() if leg.group.name == name]
        now = trio.current_time()
        if leaving:
            if now - max(leg.left_at for leg in leaving) >= self._settings.quarantine_s:
                await self.abandon(group)
            return False
        since = self._closed_at.get(name, self._began_at)
        return name not in self._suspect or now - since >= self._settings.quarantine_s

    # --- What the server says of them -------------------------------------------------------------

    def by_number(self, number: int) -> Leg | None:
        """The open leg of this number."""
        return next((leg for leg in self.open.values() if leg.number == number), None)


def evidence_of(leg: Leg, event: Mapping[str, Any]) -> Evidence:
    """What an event of the domain server says against a leg."""
    code = event["code"]
    if event["kind"] == "LEG_BEHIND":
        slow = "it takes writes more slowly than clients make them"
        return Evidence(EvidenceKind.BEHIND, leg.group.name, detail=slow)
    return Evidence(_EVIDENCE[event["kind"]], leg.group.devices[event["device"]].url, code, os.strerror(code))


def is_evidence(event: Mapping[str, Any]) -> bool:
    """Whether an event of the domain server speaks against a leg."""
    return event["kind"] in _EVIDENCE


def is_remote(group: Group) -> bool:
    """Whether some device of a group is another server's, whose late writes no lock of ours can see."""
    return any(device.url.startswith(("nbd:", "nbd+unix:")) for device in group.devices)
