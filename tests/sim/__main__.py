"""Run simulations; see the package."""

import argparse
import subprocess
import sys
import time
import traceback
from collections import Counter
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


def main() -> int:
    """Run seeds one after the other, until all are done or one fails; the exit status."""
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
    parser.add_argument("-v", "--verbose", action="store_true", help="tell everything that happens")
    options = parser.parse_args()
    coverage: Counter[str] = Counter()
    began = time.monotonic()
    for seed in range(options.seed, options.seed + options.seeds):
        try:
            coverage += World(seed, steps=options.steps, trace=print if options.verbose else None).run()
        except Exception:
            traceback.print_exc()
            print(f"\nseed {seed} at commit {commit()}; to see it again:")
            print(f"  python -m tests.sim --seeds 1 --seed {seed} --steps {options.steps} -v")
            return 1
    for what, times in sorted(coverage.items()):
        print(f"{times:10} {what}")
    print(f"{options.seeds} seeds in {time.monotonic() - began:.1f} s: no promise broken")
    return 0


if __name__ == "__main__":
    sys.exit(main())
