"""``python -m bench calm``: whether anything fails over that should not, on a machine that is far too busy.

Two legs of files on a real disk, under load, while twice as many processes as there are processors compute and
others write to the same disk and flush. Nothing is wrong with any device, so whatever is dropped or failed over
to is a false alarm.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import fio, report
from bench.grounds import grounds
from bench.meta import circumstances
from bench.site import is_whole, running_site
from bench.workloads import FAILOVER, FILL
from proxy.sizes import MIB

LEGS = {"alpha": 3, "beta": 2}
DISK_SIZE = 128 * MIB
_SPIN = "while True: pass"
_WRITERS = 2


@dataclass(frozen=True, slots=True)
class Round:
    """What came of one run of the load: changes of the map, each of them for nothing, and what the client saw."""

    alarms: int
    client_p99_ms: float
    client_max_ms: float
    client_errors: int
    client_ops: int


def calm(console: Console, out: Path, *, rounds: int, seconds: float) -> bool:
    """Measure, write ``calm.json`` and print what came of it.

    Returns:
        Whether nothing failed over and no client saw an error.

    Raises:
        BenchError: something did not work; there are no results then.
    """
    meta = circumstances()
    done = []
    with grounds(0) as place, ExitStack() as running:
        site = running.enter_context(running_site(place.run / "site"))
        for group, width in LEGS.items():
            share = 2 * DISK_SIZE // width
            urls = [f"file://{place.run}/{group}{number}?size={share}" for number in range(width)]
            site.create_group(group, urls)
        active, *backups = LEGS
        site.create_domain("bench", DISK_SIZE, active, backups)
        uri = site.create_disk("bench", "disk", DISK_SIZE)
        fio.run(FILL, uri, None, place.run)
        for _ in range(rounds):
            before = site.domain("bench")
            with _noise(place.run), fio.Client(FAILOVER, uri, seconds, place.run) as client:
                outcome = client.wait_outcome()
            after = site.domain("bench")
            alarms = after["map_generation"] - before["map_generation"] + (not is_whole(after))
            done.append(
                Round(alarms, outcome.p99_us / 1e3, outcome.max_us / 1e3, outcome.errors, outcome.ops)
            )
    written = report.write(
        out,
        "calm.json",
        {"meta": {**meta, "seconds": seconds}, "rounds": [asdict(one) for one in done]},
    )
    report.show(console, [_table(done, seconds)], written)
    return not any(one.alarms or one.client_errors for one in done)


@contextmanager
def _noise(directory: Path) -> Iterator[None]:
    """All processors busy, and the disk."""
    writing = ["fio", "--name=noise", f"--directory={directory}", "--rw=randwrite", "--bs=64k", "--size=128M"]
    writing += ["--fsync=8", f"--numjobs={_WRITERS}", "--time_based", "--runtime=1d", "--eta=never"]
    commands: list[list[str]] = [[sys.executable, "-c", _SPIN]] * (2 * (os.cpu_count() or 1))
    running: list[subprocess.Popen[Any]] = []
    try:
        for command in [*commands, writing]:
            running.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )
        yield
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def _table(rounds: list[Round], seconds: float) -> Table:
    title = f"{len(rounds)} x {seconds:.0f} s on a busy machine"
    table = Table("", "", title=title, title_justify="left")
    table.add_row("false alarms", str(sum(one.alarms for one in rounds)))
    table.add_row("errors", str(sum(one.client_errors for one in rounds)))
    table.add_row("requests", f"{sum(one.client_ops for one in rounds):,}")
    table.add_row("client's p99 ms", f"{max(one.client_p99_ms for one in rounds):.0f}")
    table.add_row("client's slowest ms", f"{max(one.client_max_ms for one in rounds):.0f}")
    return table
