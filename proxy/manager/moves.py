"""Legs that join a domain and leave it, and its moves from one group to another, step by step."""

import logging
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import trio

from proxy.errors import RefusedError, StoreError
from proxy.extentmap import Run
from proxy.failover import Change, LegDismissed
from proxy.manager.orders import Order
from proxy.migration import Migration, Step, next_step
from proxy.model import Severity
from proxy.store import Change as StoreChange
from proxy.store import NewEvent

if TYPE_CHECKING:
    from proxy.manager.session import Session

log = logging.getLogger("standfast.moves")


class Moves:
    """The moves of one session's domain. One that is recorded goes on by itself, across restarts.

    Attributes:
        is_waiting: one is under way.
    """

    def __init__(self, session: "Session") -> None:
        self._session = session
        self.is_waiting = False
        self._not_before = -math.inf  # no step before this, on trio's clock
        self._sync: Order | None = None  # the last attempt to reach where it goes

    def trouble(self) -> str:
        """Why a move to another group does not go on; empty when it does."""
        attempt = self._sync
        return str(attempt.error) if attempt is not None and attempt.error is not None else ""

    async def add_leg(self, group: str, runs: Sequence[Run], *, replaces: str | None) -> None:
        """Have a leg join, outdated; to take another one's place if that is named, else as the last in preference.

        Raises:
            RefusedError: the domain is held.
            StoreError: it could not be recorded; nothing has changed.
        """
        legs = [leg.group for leg in self._session.machine.record.legs]
        legs.insert(len(legs) if replaces is None else legs.index(replaces) + 1, group)
        message = f"domain {self._session.name}: {group} joins" + (
            f" in the place of {replaces}" if replaces else ""
        )
        migration = None if replaces is None else Migration(replaces, group, time.time())
        event = NewEvent(Severity.INFO, "leg-added", message, self._session.name)
        self._not_before, self._sync = -math.inf, None
        if replaces is not None:
            self._session.resyncs.withdraw(
                replaces, RefusedError(f"{replaces} leaves domain {self._session.name}")
            )
        await self._session.change(
            Change({}, f"{group} joins", tuple(legs)),
            StoreChange(runs={group: runs}, migration=migration, events=[event]),
        )

    def remove_leg(self, group: str) -> None:
        """Have a backup leave; that goes on by itself, across restarts. A move to it is given up.

        Raises:
            RefusedError: it is active, or the domain is held.
            StoreError: it could not be recorded; nothing has changed.
        """
        self._session.need_serving()
        if group == self._session.machine.record.active:
            raise RefusedError(
                f"group {group} is active in domain {self._session.name}; make another leg active first: "
                f"standfast failover {self._session.name}"
            )
        self._session.resyncs.withdraw(group, RefusedError(f"{group} leaves domain {self._session.name}"))
        change = StoreChange(migration=Migration(group, None, time.time()))
        self._session.write(change)
        self._not_before, self._sync = -math.inf, None

    async def advance(self) -> None:
        """Take the next step of a move to another group; what cannot be done now is tried again."""
        domain = self._session.domain
        migration = domain.migration
        self.is_waiting = migration is not None
        if migration is None or trio.current_time() < self._not_before:
            return
        try:
            await self._take_step(migration, next_step(self._session.machine.record, migration))
        except (RefusedError, StoreError) as error:
            self._not_before = trio.current_time() + self._session.settings.reopen_interval_s
            log.warning("domain %s: %s", self._session.name, error)

    async def _take_step(self, migration: Migration, step: Step) -> None:
        source, target = migration.source, migration.target
        match step:
            case Step.CONNECT:
                assert target is not None
                if not self._session.resyncs.is_due(target):
                    self._not_before = trio.current_time() + self._session.settings.reopen_interval_s
                    self._sync = self._session.resyncs.begin(target)
            case Step.SYNC:
                self._sync = None
            case Step.SWITCH:
                assert target is not None
                await self._session.fail_over(target, f"the domain moves from {source} to {target}")
            case Step.DISMISS:
                # As for a failover: clients are not held for a store that takes nothing.
                event = NewEvent(
                    Severity.INFO,
                    "leg-leaves",
                    f"domain {self._session.name}: {source} leaves",
                    self._session.name,
                )
                self._session.store.add_events([event], time.time())
                await self._session.feed(LegDismissed(source))
            case Step.FREE:
                if await self._session.legs.is_gone(self._session.groups()[source]):
                    await self._free(source)
            case Step.GIVE_UP:
                message = f"domain {self._session.name}: {source} stays, because it had to take over"
                event = NewEvent(Severity.WARNING, "leg-stays", message, self._session.name)
                change = StoreChange(end_migration=True, events=[event])
                self._session.write(change)

    async def _free(self, source: str) -> None:
        legs = tuple(leg.group for leg in self._session.machine.record.legs if leg.group != source)
        event = NewEvent(
            Severity.INFO,
            "leg-removed",
            f"domain {self._session.name} has left {source}, whose space is free",
            self._session.name,
        )
        await self._session.change(
            Change({}, f"{source} has left", legs), StoreChange(end_migration=True, events=[event])
        )
        self._session.legs.trust(source)
        self.is_waiting = False
