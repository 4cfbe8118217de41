"""Run simulations; see the package."""

import argparse
import os
import subprocess
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from tests.sim.world import World

#: Requests of clients in one simulation: enough for some failovers, few enough for a trace to be read.
STEPS = 150


def commit() -> str:
    """The commit that is checked out, and whether anything was changed since."""
    here = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def run_seed(seed: int, *, steps: int) -> tuple[int, Counter[str], str]:
    """Run one simulation: its seed, what happened how often, and how it failed, or nothing."""
    try:
        return seed, World(seed, steps=steps).run(), ""
    except Exception:
        return seed, Counter(), traceback.format_exc()


def main() -> int:
    """Run seeds until all are done or one fails; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description="Run simulations of a domain.")
    parser.add_argument("--seeds", type=int, default=100, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="the first (default: %(default)s)")
    parser.add_argument(
        "--steps",
        type=int,
        default=STEPS,
        metavar="K",
        help="requests of clients in each (default: %(default)s)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="J",
        help="how many at once (default: one for each core)",
    )
    parser.add_argument("--keep-going", action="store_true", help="run all seeds, whatever fails")
    parser.add_argument("-v", "--verbose", action="store_true", help="tell everything that happens")
    options = parser.parse_args()
    seeds = range(options.seed, options.seed + options.seeds)
    if options.verbose:
        for seed in seeds:
            World(seed, steps=options.steps, trace=print).run()
        return 0
    coverage: Counter[str] = Counter()
    failed = []
    began = time.monotonic()
    # A process that dies, of the engine say, has to be noticed: multiprocessing's own pool would wait for ever.
    with ProcessPoolExecutor(options.jobs) as pool:
        run = partial(run_seed, steps=options.steps)
        for seed, counts, failure in pool.map(run, seeds, chunksize=4):
            coverage += counts
            if failure:
                failed.append(seed)
                print(f"{failure}\nseed {seed} at commit {commit()}; to see it again:")
                print(f"  python -m tests.sim --seeds 1 --seed {seed} --steps {options.steps} -v", flush=True)
                if not options.keep_going:
                    pool.shutdown(cancel_futures=True)
                    return 1
    for what, times in sorted(coverage.items()):
        print(f"{times:10} {what}")
    took = (
        f"{options.seeds} seeds from {options.seed} at commit {commit()} in {time.monotonic() - began:.1f} s"
    )
    print(f"{took}: {f'{len(failed)} failed: {sorted(failed)}' if failed else 'no promise broken'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
