"""Bringing legs back: those an operator wants back, and in an asynchronous domain whichever fell out of step."""

import logging
from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from proxy.errors import RefusedError, StoreError
from proxy.failover import Change, Phase
from proxy.manager import maps
from proxy.manager.orders import Order, nothing
from proxy.model import LegState, Severity
from proxy.sizes import format_size
from proxy.store import Change as StoreChange
from proxy.store import NewEvent

if TYPE_CHECKING:
    from proxy.manager.session import Session

log = logging.getLogger("standfast.resyncs")


class Resyncs:
    """The resyncs of one session."""

    def __init__(self, session: "Session") -> None:
        self._session = session
        self._orders: dict[str, Order] = {}
        self._catch_up_at: dict[str, float] = {}  # when to try to bring an outdated leg back, on trio's clock

    def is_waiting(self) -> bool:
        """Whether there is something to be looked at again although nobody will tell."""
        legs = self._session.legs.open
        return (
            bool(self._orders)
            or bool(self._catch_up_at)
            or any(leg.copied for leg in legs.values())
            or any(
                leg.state is LegState.SYNCING and not legs[leg.group].copying
                for leg in self._session.machine.record.legs
                if leg.group in legs
            )
        )

    def close(self, error: Exception) -> None:
        """The server is gone: what is under way fails with ``error``."""
        for order in self._orders.values():
            order.finish(error)

    def is_due(self, group: str) -> bool:
        """Whether a leg is about to be synced."""
        return group in self._orders

    def withdraw(self, group: str, error: Exception) -> None:
        """Sync a leg no more, if that has not begun yet."""
        if group in self._orders:
            self._orders.pop(group).finish(error)

    def put_off_copies(self) -> None:
        """What was copied is no copy any more of what the active leg is now."""
        for leg in self._session.legs.open.values():
            leg.copied = False

    def begin(self, group: str) -> Order:
        """Bring an outdated leg back; the answer is done when its copy is about to begin.

        Raises:
            RefusedError: it is not outdated, or the domain is held.
        """
        self._session.need_serving()
        if group not in {leg.group for leg in self._session.machine.record.legs}:
            raise RefusedError(f"group {group} is no leg of domain {self._session.name} any more")
        state = self._session.machine.record.leg(group).state
        if state is not LegState.OUTDATED:
            raise RefusedError(
                f"group {group} is {state} in domain {self._session.name}; only an outdated leg is synced"
            )
        migration = self._session.domain.migration
        if migration is not None and group == migration.source:
            raise RefusedError(f"group {group} is about to leave domain {self._session.name}")
        if group in self._orders:
            raise RefusedError(f"group {group} is about to be synced already")
        self._orders[group] = Order(nothing)
        return self._orders[group]

    async def advance(self) -> None:
        """Take the next step of each."""
        if self._session.machine.phase is Phase.SERVING:
            self._catch_up()
            await self._advance_orders()
        if self._session.machine.phase is Phase.SERVING:
            await self._advance_copies()

    def _catch_up(self) -> None:
        """Bring back, by and by, whichever leg of an asynchronous domain fell out of step: nobody else will."""
        outdated = [leg.group for leg in self._session.machine.record.legs if leg.state is LegState.OUTDATED]
        if not self._session.machine.asynchronous or not outdated:
            self._catch_up_at.clear()
            return
        now = trio.current_time()
        before = self._catch_up_at
        self._catch_up_at = {
            group: before.get(group, now + self._session.settings.catch_up_s) for group in outdated
        }
        for group, due in self._catch_up_at.items():
            if now >= due and group not in self._orders:
                self._catch_up_at[group] = now + self._session.settings.catch_up_s
                with suppress(RefusedError):  # it is about to leave
                    self.begin(group)

    async def _advance_orders(self) -> None:
        for group, order in list(self._orders.items()):
            leg = self._session.legs.open.get(group)
            if leg is None:
                await self._session.legs.abandon(self._session.groups()[group])
                self._session.begin_open(group)
            elif self._session.legs.trusted(leg):
                del self._orders[group]
                leg.fresh_at = None
                try:
                    await self._session.change(
                        Change({group: LegState.SYNCING}, f"resync of {group}"), StoreChange()
                    )
                except (StoreError, RefusedError) as error:
                    order.finish(error)
                except BaseException:
                    order.finish(self._session.ended())
                    raise
                else:
                    order.finish()
                return

    async def _advance_copies(self) -> None:
        for record in self._session.machine.record.legs:
            leg = self._session.legs.open.get(record.group)
            if record.state is not LegState.SYNCING or leg is None or leg.copying:
                continue
            if not leg.copied:
                disks = self._session.domain.disks
                await self._session.link.call("copy", leg=leg.number, ranges=maps.copy_ranges(disks))
                leg.copying = True
                continue
            leg.copied = False
            amount = (
                f"domain {self._session.name}: {format_size(leg.copied_bytes)} were copied to {record.group}"
            )
            copied = NewEvent(Severity.INFO, "copied", amount, self._session.name)
            try:
                await self._session.change(
                    Change({record.group: LegState.UPTODATE}, f"{record.group} is synced"),
                    StoreChange(events=[copied]),
                )
            except StoreError as error:
                leg.copied = True  # tried again when the clock says so
                log.warning("domain %s: %s", self._session.name, error)
            return
