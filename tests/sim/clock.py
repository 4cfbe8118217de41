"""Simulated time for trio: when no task can go on, the world does, until one can.

Everything that ships and is simulated here runs in tasks of trio, which has one thread. Whenever all of them
wait, trio asks its clock how long it may sleep; this clock lets the next things of the agenda happen
instead, and answers "not at all" as soon as a task can go on or a deadline has come. So the shipping code
runs unchanged, and the order of all that happens follows from the seed alone.
"""

import math
from collections.abc import Callable, Coroutine
from typing import Any

import trio
from trio._core import _run as trio_run

from tests.sim.agenda import SECOND_NS, Agenda


class Clock(trio.abc.Clock, trio.abc.Instrument):
    """Trio's clock in a simulation, and the instrument that tells it that a task can go on.

    Args:
        agenda: has the time.
        step: lets the next thing of the agenda happen.
    """

    def __init__(self, agenda: Agenda, step: Callable[[], None]) -> None:
        self._agenda = agenda
        self._step = step
        self._is_due = False
        self._is_poked = False
        self._is_over = False

    # --- For trio ---------------------------------------------------------------------------------

    def start_clock(self) -> None:
        """Begin; the time is the agenda's."""

    def current_time(self) -> float:
        """The time in seconds."""
        return self._agenda.now_ns / SECOND_NS

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """No task can go on: let time pass until one can. Never sleeps."""
        deadline_ns = math.inf if deadline == math.inf else math.ceil(deadline * SECOND_NS) + 1
        self._is_due = self._is_over
        while not self._is_due and not self._is_poked:
            if deadline_ns <= self._agenda.next_ns:
                self._agenda.pass_until(int(deadline_ns))
                break
            self._step()
        self._is_poked = False
        return 0

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        """A task can go on."""
        self._is_due = True

    # --- For the world ----------------------------------------------------------------------------

    def poke(self) -> None:
        """A descriptor that a task waits for may have become readable: trio has to look."""
        self._is_poked = True

    def stop(self) -> None:
        """The simulation is over: nothing happens any more but what tasks still have to do."""
        self._is_over = True


def run(main: Callable[[], Coroutine[Any, Any, None]], clock: Clock, seed: int) -> None:
    """Run ``main`` and all it starts in simulated time, in an order that follows from the seed alone."""
    trio_run._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]
    trio_run._r.seed(seed)
    trio.run(main, clock=clock, instruments=[clock])
