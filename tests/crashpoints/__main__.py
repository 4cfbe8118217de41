"""Show what a restart does after each crash; see the package."""

import argparse
import sys

import trio

from tests.crashpoints.operations import OPERATIONS
from tests.crashpoints.run import try_all


def main() -> int:
    """Try operations one after the other, until all are done or a restart left what it must not; the status."""
    parser = argparse.ArgumentParser(prog="python -m tests.crashpoints", description="Kill the manager.")
    parser.add_argument("operation", nargs="*", help=f"of {', '.join(OPERATIONS)} (default: all)")
    parser.add_argument(
        "--commands", action="store_true", help="die at commands to domain servers too, not at commits only"
    )
    options = parser.parse_args()
    unknown = sorted({*options.operation} - {*OPERATIONS})
    if unknown:
        parser.error(f"there is no operation {', '.join(unknown)}")
    for name in options.operation or OPERATIONS:
        kinds = "all" if options.commands else "commits"

        async def run(operation: str = name, kinds: str = kinds) -> int:
            return await try_all(
                OPERATIONS[operation], kinds=kinds, tell=lambda outcome: print(outcome, flush=True)
            )

        print(f"{name}: {trio.run(run)} steps", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
