"""Deliberate breaches of what is promised, which the simulator must find.

``scripts/hunt [NAME ...]`` shows after how many seeds each is found, and as what; ``tests/sim/test_mutants.py``
holds all of them to a bound. A mutant that is not found is a weakness of the simulator, not of the mutant.

A mutant of the *engine* is a condition in the place where the rule lives, ``sf_mutant(NAME)``, and a number in
``proxy/engine/mutants.pxi``. Only a test build (``scripts/engine-variant mutants -DSF_MUTANTS``) has them; there the
number of the one that is committed is set through a symbol of the library, which the build that ships has not.
Those of the *machine* and of the *manager* are patches, applied in a process that does nothing else.

To add one
    To the engine: a number in ``mutants.pxi``, the shortest condition that breaks the rule, in the place of the rule
    (it must not touch memory that is not its own: a crash proves nothing), and a line in ``ENGINE`` below.
    To Python: a function that patches what ships, and a line in ``_PATCHES``.
    Then hunt it. If it is not found, ask whether any client could ever tell, and if so, what the simulator does too
    rarely or does not look at.
"""

import argparse
import ctypes
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import proxy.failover
from proxy.engine import _engine
from proxy.failover import (
    Effect,
    FailClients,
    Failover,
    Fence,
    Hold,
    Input,
    Install,
    Installed,
    LegLost,
    LegRecord,
    MakeDurable,
    PatienceEnded,
    Phase,
    Recorded,
    RejectParked,
    Release,
    Started,
)
from proxy.manager import maps
from proxy.manager.legs import Legs
from proxy.model import LegState
from tests.sim.history import Violation
from tests.sim.world import World

STEPS = 150

#: Mutants of the engine, by their name in mutants.pxi, and what they make untrue.
ENGINE: Mapping[str, str] = MappingProxyType(
    {
        "FENCE_GATE_OPEN": "nothing is sent to a leg once it is fenced",
        "FENCE_UNAWAITED": "a leg is drained only when all that was ever sent to it has completed",
        "UNPROVEN_UNCOUNTED": "what a broken stream leaves of unknown fate is told of",
        "ACKNOWLEDGED_WHILE_HELD": "nothing is acknowledged between a decision and its durable record",
        "ADMITTED_WHILE_HELD": "a domain that holds lets no request in",
        "DRAIN_UNAWAITED": "a hold is drained only when nothing runs",
        "SWAPPED_MID_REQUEST": "a request runs under one map from its beginning to its end",
        "PARKED_ANSWERED": "what a leg failed is done again before it is answered",
        "PARKED_UNCLAIMED": "what waits to be done again keeps its place before later requests",
        "REPLAYED_IN_PART": "what a leg failed is done again whole",
        "EDGES_NOT_READ_AGAIN": "an unaligned write that is done again reads its neighbours again",
        "LATE_ANSWER_SCRIBBLES": "a late answer is written into no buffer that is in use",
        "FIRST_LEG_SUFFICES": "a write is acknowledged when every leg has it",
        "BACKUP_ERROR_IGNORED": "a write that failed on a backup is not acknowledged before that is recorded",
        "BACKUP_NOT_ZEROED": "TRIM and WRITE_ZEROES go to every leg",
        "BACKUP_NOT_FLUSHED": "FLUSH goes to every leg",
        "BACKUP_WITHOUT_FUA": "a FUA write is durable on every leg",
        "READ_FROM_LAST_LEG": "reads come from the active leg",
        "WRITE_UNCLAIMED": "overlapping writes reach all legs in one order",
        "READ_UNCLAIMED": "no read shows what a failover could take back",
        "SHORT_WRITE_TAKEN": "a write that the device cut short is finished",
        "DEADLINE_UNREPORTED": "a device that does not answer in time is told of",
        "COPY_UNCLAIMED": "a copy never crosses a client's write to the same range",
        "COPY_MISSES_RANGE": "a copy brings over all it was asked for",
        "COPY_UNFLUSHED": "a leg that was copied to holds all of it durably",
        "COPIED_EARLY": "a leg is said to be copied to when it is",
        "VERIFY_UNCLAIMED": "a write in flight is no difference between legs",
        "REPAIR_UNCLAIMED": "a repair never crosses a client's write to the same range",
        "MARK_UNAWAITED": "nothing is written to a region before that is marked, durably",
        "MARK_FORGOTTEN": "every region that is written to is marked",
        "CLEARED_UNFLUSHED": "a mark is cleared when every leg has durably what it stands for",
        "AWAY_NOT_TOLD": "a mark is cleared when legs that are away have taken it over",
        "SHIPPED_OUT_OF_ORDER": "a lagging leg gets overlapping writes in their order",
        "LAG_UNAWAITED": "nobody takes over before it has all that was answered",
        "BEHIND_UNTOLD": "a leg that will not get all of the backlog counts no more",
    }
)


@dataclass(frozen=True, slots=True)
class Mutant:
    """One breach: ``apply`` commits it, in this process and for good; ``promise`` is what it makes untrue."""

    name: str
    promise: str
    apply: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Find:
    """The first seed that shows something, and what."""

    seed: int
    told: str


# --- The machine and the manager ------------------------------------------------------------------


#: What a machine does with an input.
_Receive = Callable[[Input], list[Effect]]


def _replace(owner: object, name: str, function: Callable[..., object]) -> None:
    setattr(owner, name, function)


def _change_receive(change: Callable[[Failover, Input, _Receive], list[Effect]]) -> None:
    """Put ``change(machine, event, receive)`` in the place of the machine's ``receive``."""
    receive = Failover.receive

    def changed(machine: Failover, event: Input) -> list[Effect]:
        return change(machine, event, lambda event: receive(machine, event))

    _replace(Failover, "receive", changed)


def _choose_syncing() -> None:
    def usable(machine: Failover, leg: LegRecord) -> bool:
        return leg.state is not LegState.OUTDATED and not leg.blocked and leg.group not in machine.lost

    _replace(Failover, "_usable", usable)


def _choose_outdated() -> None:
    def usable(machine: Failover, leg: LegRecord) -> bool:
        return leg.group not in machine.lost

    _replace(Failover, "_usable", usable)


def _release_before_durable() -> None:
    def change(machine: Failover, event: Input, receive: _Receive) -> list[Effect]:
        if isinstance(event, Installed) and machine.phase is Phase.RECORDING:
            return []  # too early for the machine to be told
        effects: list[Effect] = []
        for effect in receive(event):
            if isinstance(effect, MakeDurable):
                effects.append(Install(effect.transition.after))
                if machine.is_held:
                    effects.append(Release())
            effects.append(effect)
        if isinstance(event, Recorded) and effects == [Install(machine.record)]:
            return receive(Installed())
        return effects

    _change_receive(change)


def _start_without_resync() -> None:
    _change_receive(
        lambda machine, event, receive: receive(
            replace(event, unclean=False) if isinstance(event, Started) else event
        )
    )


def _lose_without_fence() -> None:
    _change_receive(
        lambda machine, event, receive: [effect for effect in receive(event) if not isinstance(effect, Fence)]
    )


def _reject_with_syncing_legs() -> None:
    def on_lost(machine: Failover, event: LegLost) -> list[Effect]:
        if event.group not in machine.record.attached():
            return []
        machine.lost[event.group] = event.evidence
        if machine._plan() is None and all(evidence.is_medium for evidence in machine.lost.values()):
            machine.lost = {}
            return [RejectParked()]
        return machine._begin()

    table = dict(proxy.failover._TABLE)
    table[Phase.SERVING, LegLost] = on_lost
    proxy.failover._TABLE = MappingProxyType(table)


def _return_lagging() -> None:
    _replace(Failover, "can_return", lambda machine, group: True)


def _choose_lagging() -> None:
    def usable(machine: Failover, leg: LegRecord) -> bool:
        return leg.state is LegState.UPTODATE and not leg.blocked and leg.group not in machine.lost

    _replace(Failover, "_usable", usable)


def _catch_up_nobody() -> None:
    _replace(Failover, "_hold", lambda machine: Hold())


def _fail_in_part() -> None:
    def on_patience_ended(machine: Failover, event: Input) -> list[Effect]:
        if machine.failing or machine.operator_hold:
            return []
        machine.failing = True
        return [FailClients("")]

    table = dict(proxy.failover._TABLE)
    table[Phase.HELD, PatienceEnded] = on_patience_ended
    proxy.failover._TABLE = MappingProxyType(table)


def _lose_untold() -> None:
    _replace(maps, "lost_ranges", lambda disks, lacking: [])


def _trust_always() -> None:
    _replace(Legs, "trusted", lambda legs, leg: True)


#: Mutants of the machine and of the manager, by name: what they make untrue, and how to commit them.
_PATCHES: Mapping[str, tuple[str, Callable[[], None]]] = MappingProxyType(
    {
        "SYNCING_LEG_CHOSEN": ("only a leg that is up to date can become active", _choose_syncing),
        "OUTDATED_LEG_CHOSEN": ("a leg that missed writes cannot become active", _choose_outdated),
        "RELEASED_BEFORE_DURABLE": ("a record is durable before it is acted upon", _release_before_durable),
        "STARTED_WITHOUT_RESYNC": ("after an unclean end legs are made equal again", _start_without_resync),
        "LOST_WITHOUT_FENCE": ("a leg that is dropped is fenced", _lose_without_fence),
        "SYNCING_LEG_KEPT": (
            "legs have no write that clients are told has failed",
            _reject_with_syncing_legs,
        ),
        "LAGGING_LEG_RETURNED": ("a leg that lags and was lost lacks something", _return_lagging),
        "LAGGING_LEG_CHOSEN": ("after a crash a leg that lags lacks something", _choose_lagging),
        "LAGGING_LEG_NOT_AWAITED": ("who takes over has all of the backlog", _catch_up_nobody),
        "FAILED_IN_PART": (
            "what clients are told has failed is on all legs in the end, or on none",
            _fail_in_part,
        ),
        "LOSS_UNTOLD": ("all that a failover loses is recorded", _lose_untold),
        "RETURNED_UNPROVEN": ("a leg comes back only when no old write can land on it", _trust_always),
    }
)


# --- The list ----------------------------------------------------------------------------------------


def _commit_in_engine(name: str) -> Callable[[], None]:
    def commit() -> None:
        chosen_in_engine().value = numbers()[name]

    return commit


MUTANTS: Mapping[str, Mutant] = MappingProxyType(
    {name: Mutant(name, promise, _commit_in_engine(name)) for name, promise in ENGINE.items()}
    | {name: Mutant(name, promise, patch) for name, (promise, patch) in _PATCHES.items()}
)


def numbers() -> dict[str, int]:
    """The engine's mutants, by name, as its source has them."""
    source = Path(_engine.__file__).with_name("mutants.pxi").read_text()
    return {
        name: int(number) for name, number in re.findall(r"^    ([A-Z_]+) = (\d+)$", source, re.MULTILINE)
    }


def chosen_in_engine() -> ctypes.c_int:
    """The number of the mutant that the engine commits, 0 for none.

    Raises:
        ValueError: this engine is not a test build.
    """
    return ctypes.c_int.in_dll(ctypes.CDLL(_engine.__file__), "sf_mutant_chosen")


# --- The hunt ----------------------------------------------------------------------------------------


#: Names of what this process commits.
_committed: list[str] = []


def _commit(name: str | None) -> None:
    if name is not None:
        _committed.append(name)
        MUTANTS[name].apply()


def _look(seed: int) -> Find | None:
    try:
        World(seed, steps=STEPS).run()
    except (Violation, AssertionError) as found:
        return Find(seed, f"{type(found).__name__}: {found}")
    except Exception:
        # What breaks the simulated driver before any client could tell proves nothing.
        if not _committed:
            raise
    return None


def hunt(name: str | None, *, seeds: int, jobs: int) -> Find | None:
    """Run seeds from 0 on with a mutant, or with none, until one shows something.

    Args:
        seeds: how many at most.
        jobs: how many processes.
    """
    with ProcessPoolExecutor(jobs, initializer=_commit, initargs=(name,)) as pool:
        left = iter(range(seeds))
        running: set[Future[Find | None]] = set()
        while True:
            while len(running) < 2 * jobs and (seed := next(left, None)) is not None:
                running.add(pool.submit(_look, seed))
            if not running:
                return None
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                if (find := future.result()) is not None:
                    for late in running:
                        late.cancel()
                    return find


def main() -> int:
    """Hunt mutants, all of them or those that are named; 0 when each was found."""
    parser = argparse.ArgumentParser(prog="scripts/hunt", description="Have the simulator find mutants.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="which (default: all)")
    parser.add_argument("--seeds", type=int, default=1000, metavar="N", help="of each (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="J", help="processes")
    parser.add_argument("--none", action="store_true", help="none at all; 0 when nothing was found")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in MUTANTS]:
        parser.error(f"there is no mutant {', '.join(unknown)}; there are {', '.join(MUTANTS)}")
    if options.none:
        find = hunt(None, seeds=options.seeds, jobs=options.jobs)
        print(f"no mutant: {'nothing' if find is None else f'seed {find.seed}: {find.told}'}")
        return find is not None
    missed = 0
    for name in options.names or MUTANTS:
        began = time.monotonic()
        find = hunt(name, seeds=options.seeds, jobs=options.jobs)
        took = f"{time.monotonic() - began:.1f} s"
        if find is None:
            missed += 1
            print(f"{name}: not found in {options.seeds} seeds, {took}", flush=True)
        else:
            print(f"{name}: seed {find.seed}, {took}: {find.told}", flush=True)
    return missed > 0


if __name__ == "__main__":
    sys.exit(main())
