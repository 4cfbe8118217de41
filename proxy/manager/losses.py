"""Serving from a leg that lacks something, when none is left that does not and somebody accepts the loss."""

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from proxy.errors import RefusedError, StoreError
from proxy.failover import Evidence, EvidenceKind, LegLost, LossAccepted, Phase
from proxy.manager import maps
from proxy.manager.legs import Leg
from proxy.manager.link import CommandError
from proxy.manager.orders import Order, nothing
from proxy.model import LostRange

if TYPE_CHECKING:
    from proxy.manager.session import Session


@dataclass(frozen=True, slots=True)
class Acceptance:
    """A loss is accepted for the leg on ``group``; ``order`` is done when that is about to serve.

    ``by_policy``: of the domain, which has nobody to look at how much it is: not if it is everything.
    """

    group: str
    why: str
    by_policy: bool
    order: Order


class Losses:
    """The losses that are accepted in one session.

    Attributes:
        lost: by the failover to the last leg that was to serve in spite of it.
    """

    def __init__(self, session: "Session") -> None:
        self._session = session
        self.lost: list[LostRange] = []
        self._accepting: Acceptance | None = None
        self._held_since: float | None = None  # for want of a leg, on trio's clock
        self._accept_from = -math.inf  # no loss is accepted by policy before this, on the same clock
        self._accept_turn = -1

    def is_wanted(self, group: str) -> bool:
        """Whether this leg is to serve although it lacks something."""
        return self._accepting is not None and self._accepting.group == group

    def close(self, error: Exception) -> None:
        """The server is gone: what is under way fails with ``error``."""
        self._end(error)

    def withdraw(self, group: str, error: Exception) -> None:
        """This leg cannot serve."""
        if self.is_wanted(group):
            self._end(error)

    def accept(self, group: str, why: str, *, by_policy: bool = False) -> Order:
        """Have a leg serve that lacks something, since none is left that does not; done when that has begun.

        Raises:
            RefusedError: nothing has to be lost; or it is no leg, or the one that lacks nothing.
        """
        self._session.machine.check_loss(group)
        if self._accepting is not None:
            raise RefusedError(
                f"domain {self._session.name} is about to be served from {self._accepting.group} already"
            )
        self._accepting = Acceptance(group, why, by_policy, Order(nothing))
        return self._accepting.order

    async def advance(self) -> None:
        """Have the leg serve that a loss is accepted for; or accept one, if that is the domain's policy and time."""
        if self._session.machine.phase is not Phase.HELD:
            self._held_since = None
            self._end(RefusedError(f"domain {self._session.name} needs to lose nothing any more"))
            return
        if self._accepting is None:
            self._accept_by_policy()
            return
        accepting = self._accepting
        group = accepting.group
        leg = self._session.legs.open.get(group)
        if leg is None:
            await self._session.legs.abandon(self._session.groups()[group])
            self._session.begin_open(group)
            return
        if group in self._session.machine.lost and leg.fresh_at is None:
            # Should it only be late, nobody waits for its answers any more.
            await self._session.feed(LegLost(group, Evidence(EvidenceKind.OPERATOR, f"group {group}")))
            await self._session.legs.discard(leg)
            return
        if not self._session.legs.trusted(leg):
            return
        try:
            lost = await self._give_up_to(leg)
            if accepting.by_policy and sum(one.length for one in lost) == self._used_bytes():
                raise RefusedError(f"{group} cannot serve: it lacks everything, as far as is known")
        except (RefusedError, StoreError) as error:
            self._end(error)
            return
        self.lost = lost
        try:
            await self._session.feed(LossAccepted(group, accepting.why))
        except RefusedError as error:
            self._end(error)
        else:
            leg.fresh_at = None
            self._accepting = None
            accepting.order.finish()

    def _accept_by_policy(self) -> None:
        after_s = self._session.domain.domain.accept_loss.after_s
        now = trio.current_time()
        if self._held_since is None:
            self._held_since = now
        if after_s is None or now < max(self._held_since + after_s, self._accept_from):
            return
        record = self._session.machine.record
        late = {
            group
            for group, evidence in self._session.machine.lost.items()
            if evidence.kind is EvidenceKind.DEADLINE
        }
        others = [leg.group for leg in record.legs if leg.group not in (record.active, *late)]
        self._accept_from = now + self._session.settings.reopen_interval_s
        if others:
            # One that could not serve when it was its turn has another after the others.
            self._accept_turn += 1
            group = others[self._accept_turn % len(others)]
            with suppress(RefusedError):
                self.accept(group, "the domain's policy accepts a loss", by_policy=True)

    async def _give_up_to(self, leg: Leg) -> list[LostRange]:
        """What would be lost if this leg served; every other leg is to be given it from then on."""
        timeout_s = self._session.settings.deadline_ms / 1000
        try:
            lacking = await self._session.link.call("give-up", uuid=str(leg.group.uuid), timeout_s=timeout_s)
        except CommandError as error:
            raise RefusedError(f"{leg.group.name} cannot serve: {error}") from error
        return maps.lost_ranges(self._session.domain.disks, lacking)

    def _end(self, error: Exception) -> None:
        if self._accepting is not None:
            self._accepting.order.finish(error)
            self._accepting = None

    def _used_bytes(self) -> int:
        return sum(disk.size for disk in self._session.domain.disks if disk.ready)
