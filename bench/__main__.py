"""The command line of the benchmarks; each prints its tables and writes JSON into ``--out``."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from bench.bitmap import bitmap
from bench.calm import calm
from bench.compare import compare
from bench.errors import BenchError
from bench.extents import extents
from bench.failover import Backend, Plan, failover
from bench.faults import Fault
from bench.grounds import tidy
from bench.resync import resync
from proxy.errors import InvalidError
from proxy.sizes import parse_size

#: Of what is read later, in a file: the widest table.
PAGE_WIDTH = 150


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except InvalidError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError("is not between 0.1 and 3600 seconds")
    return value


def _rounds(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("is not at least 1")
    return value


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Side-by-side benchmarks.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, summary: str, *, rounds: int, seconds: float) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=summary, description=summary)
        made.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the JSON goes")
        made.add_argument(
            "--seconds",
            type=_seconds,
            default=seconds,
            metavar="N",
            help="length of each run of fio (default %(default)s)",
        )
        made.add_argument("--rounds", type=_rounds, default=rounds, metavar="R", help="default %(default)s")
        return made

    comparing = command("compare", "Standfast beside its peers.", rounds=3, seconds=3.0)
    comparing.add_argument(
        "--size", type=_size, default="192M", help="of each system's disk (default %(default)s)"
    )
    comparing.add_argument(
        "--only",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="systems and workloads by name; of a sort that is not named, all",
    )
    command("bitmap", "What the dirty bitmap costs writes, and a crash.", rounds=3, seconds=10.0)
    command("resync", "What a resync costs a client, and how fast it is.", rounds=5, seconds=4.0)
    failing = command("failover", "The stall of failovers when a device fails.", rounds=30, seconds=2.0)
    failing.add_argument(
        "--backend",
        type=Backend,
        choices=list(Backend),
        default=Backend.NBD,
        help="how devices are reached (default %(default)s)",
    )
    failing.add_argument(
        "--fault", type=Fault, choices=list(Fault), default=Fault.KILL, help="how (default %(default)s)"
    )
    failing.add_argument(
        "--deadline-ms", type=int, default=5000, metavar="N", help="of a device (default %(default)s)"
    )
    command("calm", "Whether anything fails over for nothing on a busy machine.", rounds=1, seconds=600.0)
    command("extents", "Look-up in a map of a million extents against one of three.", rounds=7, seconds=3.0)
    return parser.parse_args()


def _carry_out(arguments: argparse.Namespace, console: Console) -> int:
    common = {"rounds": arguments.rounds, "seconds": arguments.seconds}
    if arguments.command == "compare":
        compare(console, arguments.out, **common, size=arguments.size, only=arguments.only)
    elif arguments.command == "failover":
        plan = Plan(arguments.seconds, arguments.backend, arguments.fault, arguments.deadline_ms)
        return 0 if failover(console, arguments.out, plan, rounds=arguments.rounds) else 1
    elif arguments.command == "calm":
        return 0 if calm(console, arguments.out, **common) else 1
    else:
        {"bitmap": bitmap, "extents": extents, "resync": resync}[arguments.command](
            console, arguments.out, **common
        )
    return 0


def main() -> int:
    """Run one benchmark; its exit status: 1 when it did not come about, or clients saw errors."""
    arguments = _arguments()
    console = Console()
    if not console.is_terminal:
        console = Console(width=PAGE_WIDTH)
    try:
        with tidy():
            return _carry_out(arguments, console)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
