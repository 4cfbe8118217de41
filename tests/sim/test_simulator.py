"""A bounded number of simulations, and that they do meet what they are for."""

from collections import Counter

import pytest

from tests.sim.world import World

SEEDS = 300
STEPS = 150

#: What must have happened at least once, or the simulations have become too tame to prove anything.
MUST_HAPPEN = (
    "client disconnect",
    "client half close",
    "client reset",
    "device errors",
    "died after the commit",
    "errors told",
    "evidence: deadline",
    "evidence: error",
    "evidence: lost",
    "failovers",
    "flushes",
    "fua",
    "garbled",
    "interrupted",
    "late",
    "late after a crash",
    "manager crashes",
    "orders",
    "orders refused",
    "parked",
    "phase: held",
    "phase: unrecorded",
    "quarantined",
    "rejections",
    "replayed",
    "resyncs",
    "returned",
    "server crashes",
    "short",
    "spoilt",
    "store full",
    "torn",
    "trims",
    "unaligned",
    "unproven",
    "waited",
    "zeroes",
)


@pytest.mark.slow
def test_simulator_over_many_seeds_finds_no_promise_broken() -> None:
    coverage: Counter[str] = Counter()
    for seed in range(SEEDS):
        try:
            coverage += World(seed, steps=STEPS).run()
        except Exception as error:
            raise AssertionError(f"seed {seed} of {STEPS} steps: {error}") from error
    assert [what for what in MUST_HAPPEN if not coverage[what]] == []


def test_simulator_over_a_few_seeds_finds_no_promise_broken() -> None:
    for seed in range(SEEDS, SEEDS + 30):
        World(seed, steps=STEPS).run()


def test_simulator_given_a_seed_twice_does_the_same_twice() -> None:
    traces: list[list[str]] = [[], []]
    for trace in traces:
        World(7, steps=STEPS, trace=trace.append).run()
    assert traces[0] == traces[1]
    assert len(traces[0]) > 100
