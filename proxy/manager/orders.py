"""Operators' orders to the session of a domain: carried out in their turn, and waited for."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import trio

if TYPE_CHECKING:
    from proxy.manager.session import Session


@dataclass(slots=True)
class Order:
    """An operator's order, carried out in its turn. ``work`` runs with nothing else under way."""

    work: Callable[["Session"], Awaitable[Any]]
    begun: bool = False
    done: trio.Event = field(default_factory=trio.Event)
    result: Any = None
    error: Exception | None = None

    def finish(self, error: Exception | None = None) -> None:
        """Tell whoever waits for it."""
        self.error = error
        self.done.set()

    async def outcome(self) -> None:
        """Return when it is done; raise what it failed with."""
        await self.done.wait()
        if self.error is not None:
            raise self.error


async def nothing(session: "Session") -> None:
    """The work of an order that something else finishes."""
