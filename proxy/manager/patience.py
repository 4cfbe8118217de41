"""How long clients of a held domain wait for a leg before they are told errors."""

from typing import TYPE_CHECKING

import trio

from proxy.failover import EvidenceKind, PatienceEnded, Phase

if TYPE_CHECKING:
    from proxy.manager.session import Session


class Patience:
    """That of one session's clients; the domain's policy says how much they have.

    An operator's hold is no part of it, nor is a store that cannot be written: both end without a leg's help. A leg
    that is only late has one more deadline to answer in.
    """

    def __init__(self, session: "Session") -> None:
        self._session = session
        self._held_since: float | None = None  # on trio's clock

    async def advance(self) -> None:
        """Have clients told errors, if they have waited for long enough."""
        machine = self._session.machine
        if machine.phase is not Phase.HELD or machine.operator_hold:
            self._held_since = None
            return
        now = trio.current_time()
        if self._held_since is None:
            self._held_since = now
        after_s = self._session.domain.domain.no_leg.after_s
        if after_s is None or machine.failing:
            return
        if all(evidence.kind is EvidenceKind.DEADLINE for evidence in machine.lost.values()):
            # Errors would cost a leg that is only late what it is about to answer; it may need longer every time.
            after_s = max(after_s, self._session.settings.deadline_ms / 1000)
        if now < self._held_since + after_s:
            return
        # With nobody to be told, the legs keep what they are about to answer.
        status = await self._session.link.call("status")
        if status["statistics"]["waited_for"]:
            await self._session.feed(PatienceEnded())
