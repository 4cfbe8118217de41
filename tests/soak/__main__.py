"""Run the soak; see the package."""

import argparse
import random
import sys
import traceback
from collections import Counter

import trio

from tests.sim.__main__ import commit
from tests.soak.run import Soak


def main() -> int:
    """Run until the time is over or a promise is broken; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Trouble real processes.")
    parser.add_argument(
        "--minutes", type=float, default=5, metavar="N", help="how long (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="of all choices (default: any)")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.randrange(1 << 32)
    print(f"seed {seed} at commit {commit()}", flush=True)
    soak = Soak(seed)
    try:
        trio.run(soak.run, options.minutes * 60)
    except Exception:
        for name, lines in soak.logs.items():
            print(f"--- {name}", *lines, sep="\n")
        traceback.print_exc(file=sys.stdout)
        tell(soak.history.happened)
        print(f"\nseed {seed} at commit {commit()} broke a promise; its choices again:")
        print(f"  python -m tests.soak --minutes {options.minutes} --seed {seed}")
        return 1
    tell(soak.history.happened)
    print(f"seed {seed}, {options.minutes} minutes: no promise broken")
    return 0


def tell(happened: Counter[str]) -> None:
    """Print how often what happened."""
    for what, times in sorted(happened.items()):
        print(f"{times:10} {what}")


if __name__ == "__main__":
    sys.exit(main())
