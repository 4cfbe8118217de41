"""The operator's hold: clients stopped at one point of the order of writes, all of it durable on every leg."""

import logging
import time
from typing import TYPE_CHECKING, Any

from proxy.errors import RefusedError, StoreError
from proxy.failover import HoldOrdered, Phase, ReleaseOrdered
from proxy.manager.orders import Order, nothing
from proxy.model import OperatorHold, Severity
from proxy.store import Change as StoreChange
from proxy.store import NewEvent

if TYPE_CHECKING:
    from proxy.manager.session import Session

log = logging.getLogger("standfast.holds")


class Holds:
    """The operator's holds of one session's domain."""

    def __init__(self, session: "Session") -> None:
        self._session = session
        self._order: Order | None = None  # done when the hold has been reached
        self._flush_token: int | None = None  # of the flush that a hold ends with
        self._flushed_generation = 0  # of the map under which it has

    def close(self, error: Exception) -> None:
        """The server is gone: what is under way fails with ``error``."""
        if self._order is not None:
            self._order.finish(error)

    async def begin(self, timeout_s: float | None) -> Order:
        """Hold all clients until ``release``, or for ``timeout_s``.

        The answer is done when all of theirs is drained, at one point of the order of writes, and flushed.

        Raises:
            RefusedError: the domain is held already, by the operator or for want of a leg.
            StoreError: it could not be recorded, and nobody is held.
        """
        self._session.need_serving()
        at = time.time()
        hold = OperatorHold(at, None if timeout_s is None else at + timeout_s)
        event = NewEvent(
            Severity.INFO, "hold", f"domain {self._session.name} is held by the operator", self._session.name
        )
        domain = self._session.domain.domain
        # Recorded first: a hold that the operator relies on must outlive us all.
        self._session.store.change(domain.id, StoreChange(hold=hold, events=[event]), at)
        order = self._order = Order(nothing)
        await self._session.feed(HoldOrdered())
        return order

    async def release(self, why: str) -> None:
        """End the operator's hold; clients go on unless they are held for another reason too.

        Raises:
            RefusedError: there is none.
            StoreError: it could not be recorded, and goes on.
        """
        if not self._session.machine.operator_hold:
            because = f"; it is held: {self._session.stuck}" if self._session.machine.is_held else ""
            raise RefusedError(f"domain {self._session.name} is not held by the operator{because}")
        self._session.write(release_change(self._session.name, why))
        if self._order is not None:
            self._order.finish(RefusedError(f"domain {self._session.name} was released meanwhile"))
            self._order = None
        self._flush_token = None
        self._flushed_generation = 0
        await self._session.feed(ReleaseOrdered())

    async def advance(self) -> None:
        """Make durable what was drained, under each map anew; let clients go on when the hold's time is over."""
        hold = self._session.domain.hold
        if hold is not None and hold.until is not None and time.time() >= hold.until:
            if self._session.machine.phase in (Phase.PAUSED, Phase.HELD):
                try:
                    await self.release("its time is over")
                except StoreError as error:
                    log.warning("domain %s: %s", self._session.name, error)
            return
        if self._session.machine.phase is not Phase.PAUSED:
            self._flush_token = None
        elif (
            self._flushed_generation != self._session.machine.record.generation and self._flush_token is None
        ):
            self._flush_token = await self._session.link.call("flush")

    def flushed(self, event: dict[str, Any]) -> None:
        """A flush has ended, perhaps the one that a hold waits for."""
        if event["token"] != self._flush_token:
            return  # of a hold or a map that is over
        self._flush_token = None
        if event["code"] == 0:
            self._flushed_generation = self._session.machine.record.generation
            if self._order is not None:
                self._order.finish()
                self._order = None


def release_change(name: str, why: str) -> StoreChange:
    """What the end of an operator's hold changes in the store."""
    event = NewEvent(Severity.INFO, "release", f"domain {name} is released: {why}", name)
    return StoreChange(release=True, events=[event])
