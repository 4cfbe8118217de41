"""That the simulator finds every deliberate breach of the promises, soon, and nothing where there is none."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from proxy.engine import _engine
from tests.sim import mutants

ROOT = Path(__file__).parents[2]

#: Most are found within ten, all but a few within fifty: whatever is drawn otherwise, this is enough.
SEEDS = 1000


def why_no_test_build() -> str | None:
    """What is missing for a build of the engine with mutants; None: nothing."""
    if not (ROOT / "scripts" / "engine-variant").exists():
        return "this is a copy of the package without its scripts"
    missing = [tool for tool in ("bash", "gcc") if shutil.which(tool) is None]
    if not (Path(sys.executable).parent / "cython").exists():
        missing.append("cython")
    return f"an engine with mutants cannot be built here without {' and '.join(missing)}" if missing else None


@pytest.fixture(scope="module")
def tree() -> str:
    """A copy of the package with an engine that can commit mutants."""
    if (reason := why_no_test_build()) is not None:
        pytest.skip(reason)
    done = subprocess.run(
        ["scripts/engine-variant", "mutants", "-DSF_MUTANTS"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def hunt(tree: str, *arguments: str) -> str:
    """What ``scripts/hunt`` says; fails unless it is satisfied."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.sim.mutants", *arguments],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": tree},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


#: Found more rarely than once in 60 seeds, or only as a domain that never comes to rest: too long for every run.
RARE_SEEDS = 2000
RARE = (
    "BEHIND_UNTOLD",
    "CLEARED_UNFLUSHED",
    "FAILED_IN_PART",
    "LAGGING_LEG_CHOSEN",
    "LAGGING_LEG_RETURNED",
    "LATE_ANSWER_SCRIBBLES",
    "LOSS_UNTOLD",
    "LOST_WITHOUT_FENCE",
    "MARK_UNAWAITED",
    "SHIPPED_OUT_OF_ORDER",
    "SWAPPED_MID_REQUEST",
    "SYNCING_LEG_KEPT",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in RARE else name for name in mutants.MUTANTS]
)
def test_simulator_with_a_mutant_finds_it(tree: str, name: str) -> None:
    print(hunt(tree, name, "--seeds", str(RARE_SEEDS if name in RARE else SEEDS)))


@pytest.mark.slow
def test_simulator_on_the_test_build_without_a_mutant_finds_nothing(tree: str) -> None:
    hunt(tree, "--none", "--seeds", "40")


def test_mutants_of_the_engine_are_those_of_its_source() -> None:
    assert set(mutants.numbers()) == set(mutants.ENGINE)
    assert len(set(mutants.numbers().values())) == len(mutants.ENGINE)


def test_engine_that_ships_has_no_mutants() -> None:
    with pytest.raises(ValueError, match="sf_mutant_chosen"):
        ctypes.c_int.in_dll(ctypes.CDLL(_engine.__file__), "sf_mutant_chosen")
