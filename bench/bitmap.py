"""``python -m bench bitmap``: what the dirty bitmap costs writes, and what a crash costs, by the size of a region.

A disk of 1 GiB on two legs of files in memory, written to everywhere before, so that every page of theirs is there;
4 KiB random writes at depth 32 all over it; the bitmap is on the disk that ``/tmp`` is on. *Cold*, no region is
marked when the writes begin, so that each has to be marked once in their course; *warm*, all are. Which of the two
is first takes turns. The loss is what cold has less than warm. What a crash costs is what is marked after writes to
a few hot places: it is copied to each backup.
"""

import time
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench import fio, report
from bench.errors import BenchError
from bench.grounds import Grounds, grounds
from bench.meta import circumstances
from bench.results import Spread, spread
from bench.site import Site, running_site
from bench.workloads import Pattern, Workload
from proxy.dirtymap import REGION_SHIFT_DEFAULT
from proxy.sizes import GIB, KIB, MIB, format_size

DISK_SIZE = GIB
REGIONS = (64 * KIB, 256 * KIB, MIB, 4 * MIB)
#: Of the throughput, with regions of the default size.
LOSS_MOST = 0.05

_FILL = Workload(Pattern.SEQUENTIAL_WRITE, MIB, 8)
_WRITES = Workload(Pattern.RANDOM_WRITE, 4 * KIB, 32)
#: Ten hot places, each a hundredth of the disk.
_HOT = replace(_WRITES, distribution="zoned:" + ":".join(["10/1", "0/9"] * 10))
#: Marks are cleared in rounds of seconds; longer than a few of them something is wrong.
_QUIET_TIMEOUT_S = 60.0


def bitmap(console: Console, out: Path, *, rounds: int, seconds: float) -> None:
    """Measure, write ``bitmap.json`` and print the trade.

    Raises:
        BenchError: something did not work; there are no results then.
    """
    meta = circumstances()
    cold: dict[int, list[float]] = {region: [] for region in REGIONS}
    warm: dict[int, list[float]] = {region: [] for region in REGIONS}
    hot: dict[int, list[float]] = {region: [] for region in REGIONS}
    with grounds(2 * DISK_SIZE + 64 * MIB) as place, Progress(console=console, transient=True) as progress:
        for turn in progress.track(range(rounds * len(REGIONS)), description="writes"):
            region = REGIONS[turn % len(REGIONS)]
            settings = f"bitmap_region_kib = {region // KIB}\n"
            with running_site(place.run / f"site{turn}", settings) as site:
                uri = _domain(site, place)
                fio.run(_FILL, uri, None, place.run)
                if turn // len(REGIONS) % 2:
                    warm[region].append(fio.run(_WRITES, uri, seconds, place.run).iops)
                _wait_quiet(site)
                cold[region].append(fio.run(_WRITES, uri, seconds, place.run).iops)
                if len(warm[region]) < len(cold[region]):
                    warm[region].append(fio.run(_WRITES, uri, seconds, place.run).iops)
                _wait_quiet(site)
                fio.run(_HOT, uri, min(seconds, 3.0), place.run)
                hot[region].append(site.domain("bench")["marked_bytes"])
                site.call("DELETE", "/domains/bench")
                for leg in ("alpha", "beta"):
                    site.call("DELETE", f"/groups/{leg}")
    loss = {
        region: spread(1 - c / w for c, w in zip(cold[region], warm[region], strict=True))
        for region in REGIONS
    }
    written = report.write(
        out,
        "bitmap.json",
        {
            "meta": {
                **meta,
                "rounds": rounds,
                "seconds": seconds,
                "size": DISK_SIZE,
                "default_region": 1 << REGION_SHIFT_DEFAULT,
                "client": " ".join(fio.command(_WRITES, "URI", seconds)),
                "hot_client": " ".join(fio.command(_HOT, "URI", seconds)),
            },
            "loss_most": LOSS_MOST,
            "regions": [
                {
                    "region": region,
                    "cold_iops": asdict(spread(cold[region])),
                    "warm_iops": asdict(spread(warm[region])),
                    "loss": asdict(loss[region]),
                    "hot_marked_bytes": asdict(spread(hot[region])),
                }
                for region in REGIONS
            ],
        },
    )
    report.show(console, [_table(cold, warm, loss, hot)], written)


def _domain(site: Site, place: Grounds) -> str:
    """A domain of two legs with one disk; the disk's address."""
    for leg in ("alpha", "beta"):
        site.create_group(leg, [f"file://{place.memory}/{leg}?size={DISK_SIZE + 2 * MIB}"])
    site.create_domain("bench", DISK_SIZE, "alpha", ["beta"])
    return site.create_disk("bench", "disk", DISK_SIZE)


def _wait_quiet(site: Site) -> None:
    """Wait until nothing is marked."""
    deadline = time.monotonic() + _QUIET_TIMEOUT_S
    while site.domain("bench")["marked_bytes"]:
        if time.monotonic() > deadline:
            raise BenchError(f"after {_QUIET_TIMEOUT_S:.0f} s without a write something is marked still")
        time.sleep(0.1)  # nothing tells when a round is over


def _table(
    cold: dict[int, list[float]],
    warm: dict[int, list[float]],
    loss: dict[int, Spread],
    hot: dict[int, list[float]],
) -> Table:
    table = Table(
        "region",
        "cold IOPS",
        "warm IOPS",
        "loss",
        "a crash copies",
        "",
        title="The dirty bitmap",
        title_justify="left",
    )
    for region in REGIONS:
        is_default = region == 1 << REGION_SHIFT_DEFAULT
        met = "[green]ok[/green]" if loss[region].median <= LOSS_MOST else "[red]short[/red]"
        table.add_row(
            format_size(region) + (", the default" if is_default else ""),
            f"{spread(cold[region]).median:,.0f}",
            f"{spread(warm[region]).median:,.0f}",
            f"{loss[region].median:.1%} ({loss[region].low:.1%} to {loss[region].high:.1%})",
            format_size(int(spread(hot[region]).median)),
            met if is_default else "",
        )
    return table
