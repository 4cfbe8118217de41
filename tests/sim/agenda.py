"""Simulated time: what is to happen, and when. The only source of order and of chance in a simulation."""

import heapq
import math
import random
from collections import Counter
from collections.abc import Callable

MICROSECOND_NS = 1_000
MILLISECOND_NS = 1_000_000
SECOND_NS = 1_000_000_000


class Agenda:
    """A clock that jumps from one thing to the next.

    Attributes:
        now_ns: the time.
        random: the one source of chance, seeded.
        counts: how often what happened; see ``Coverage``.
    """

    def __init__(self, seed: int, trace: Callable[[str], None] | None = None) -> None:
        self.now_ns = SECOND_NS
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self._trace = trace
        self._things: list[tuple[int, int, Callable[[], None]]] = []
        self._number = 0

    def after(self, delay_ns: int, action: Callable[[], None]) -> None:
        """Have ``action`` happen so much later; of things at one time the first comes first."""
        self._number += 1
        heapq.heappush(self._things, (self.now_ns + delay_ns, self._number, action))

    def soon(self, action: Callable[[], None], most_ns: int = 200 * MICROSECOND_NS) -> None:
        """Have ``action`` happen after a random short while."""
        self.after(self.random.randrange(most_ns), action)

    def next(self) -> None:
        """Let the next thing happen."""
        self.now_ns, _, action = heapq.heappop(self._things)
        action()

    @property
    def next_ns(self) -> float:
        """When the next thing happens; infinite when there is none."""
        return self._things[0][0] if self._things else math.inf

    def pass_until(self, time_ns: int) -> None:
        """Let time pass in which nothing happens."""
        assert time_ns <= self.next_ns
        self.now_ns = max(self.now_ns, time_ns)

    def chance(self, probability: float) -> bool:
        """True so often."""
        return self.random.random() < probability

    def count(self, what: str, times: int = 1) -> None:
        """Remember that something happened."""
        self.counts[what] += times

    def say(self, what: str) -> None:
        """Put a line into the trace, if there is one."""
        if self._trace is not None:
            self._trace(f"{(self.now_ns - SECOND_NS) / 1e6:10.3f} ms  {what}")

    @property
    def is_traced(self) -> bool:
        return self._trace is not None
