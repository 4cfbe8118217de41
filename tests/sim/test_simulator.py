"""A bounded number of simulations, and that they do meet what they are for."""

import os
import subprocess
import sys
from collections import Counter

import pytest

from tests.sim.__main__ import run_seed
from tests.sim.world import World

SEEDS = 150
STEPS = 150

#: What must have happened at least once, or the simulations have become too tame to prove anything.
MUST_HAPPEN = (
    "bitmaps damaged",
    "client disconnect",
    "client half close",
    "client reset",
    "device errors",
    "died after the commit",
    "disks grown",
    "disks made",
    "done: accept loss",
    "done: failback",
    "done: failover",
    "done: hold",
    "done: maintenance",
    "done: move",
    "done: release",
    "done: remove disk",
    "done: resync",
    "done: verify",
    "errors told",
    "evidence: behind",
    "evidence: deadline",
    "evidence: error",
    "evidence: lost",
    "failovers",
    "flushes",
    "fua",
    "host crashes",
    "interrupted",
    "late",
    "late after a crash",
    "legs joined",
    "legs left",
    "losses accepted",
    "manager crashes",
    "opened before it is quiet",
    "parked",
    "planned switches",
    "power losses",
    "reads from a backup",
    "refused by the store",
    "refused: failover",
    "rejections",
    "replayed",
    "resyncs",
    "returned",
    "served after a loss of power",
    "server crashes",
    "short",
    "spoilt",
    "told: adopted",
    "told: bitmap-distrusted",
    "told: data-lost",
    "told: failover",
    "told: held",
    "told: leg-dropped",
    "told: unclean",
    "torn",
    "trims",
    "unaligned",
    "unproven",
    "verified: whole",
    "waited",
    "zeroes",
)


@pytest.mark.slow
def test_simulator_over_many_seeds_finds_no_promise_broken() -> None:
    coverage: Counter[str] = Counter()
    for seed in range(SEEDS):
        _, counts, failure = run_seed(seed, steps=STEPS)
        assert not failure, f"seed {seed} of {STEPS} steps: {failure}"
        coverage += counts
    assert [what for what in MUST_HAPPEN if not coverage[what]] == []


def test_simulator_over_a_few_seeds_finds_no_promise_broken() -> None:
    for seed in range(SEEDS, SEEDS + 20):
        World(seed, steps=STEPS).run()


def test_simulator_given_a_seed_twice_does_the_same_twice() -> None:
    traces: list[list[str]] = [[], []]
    for trace in traces:
        World(7, steps=STEPS, trace=trace.append).run()
    assert traces[0] == traces[1]
    assert len(traces[0]) > 100


@pytest.mark.parametrize("seed", [3, 11])
def test_simulator_given_a_seed_in_another_process_does_the_same(seed: int) -> None:
    command = [sys.executable, "-m", "tests.sim", "--seeds", "1", "--seed", str(seed), "-v"]
    traces = [
        subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": hash_seed}, capture_output=True, check=True
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert traces[0] == traces[1]
