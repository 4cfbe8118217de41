"""``python -m bench extents``: what look-up costs in a map of a million extents.

Two domains of 64 GiB on files of the same size: one linear on three devices, three extents; one striped over
three by 64K, 1,048,576 extents. The files are sparse and stay so: reading a hole of a tmpfs file allots
nothing, and makes reading as cheap as it can be, so that what look-up costs weighs the most. Reads are random
over the whole disk, so that searching the map finds none of it in a cache that it would not find there in use.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench import fio, report
from bench.errors import BenchError
from bench.grounds import Grounds, allocated, grounds
from bench.meta import circumstances
from bench.results import Spread, spread
from bench.site import Site, running_site
from bench.workloads import Pattern, Workload
from proxy.extentmap import Range, Run, group_map
from proxy.model import parse_layout
from proxy.sizes import GIB, KIB, MIB

DISK_SIZE = 64 * GIB
DEVICE_COUNT = 3
#: The last third of three, and room for a label and for a stripe that the disk's size cuts short.
DEVICE_SIZE = 22 * GIB
LAYOUTS = {"three": "linear", "million": "striped:64K"}
EXTENT_COUNTS = {"three": 3, "million": DISK_SIZE // (64 * KIB)}

#: Against three extents.
RATIO_LEAST = 0.95
BUILD_MOST_S = 2.0

#: Labels, and what a file system keeps of a file's shape; reading allots none of the 64 GiB.
_ALLOCATED_MAX = 64 * MIB

_WORKLOAD = Workload(Pattern.RANDOM_READ, 4 * KIB, 32)


def extents(console: Console, out: Path, *, rounds: int, seconds: float) -> None:
    """Measure, write ``extents.json`` and print the ratio.

    Raises:
        BenchError: something did not work; there are no results then.
    """
    meta = circumstances()
    with console.status("building the map"):
        build = spread(_build_s() for _ in range(rounds))
    with grounds(_ALLOCATED_MAX) as place, running_site(place.run / "site") as site:
        with console.status("making the domains"):
            uris = {name: _domain(site, place, name, layout) for name, layout in LAYOUTS.items()}
        iops: dict[str, list[float]] = {name: [] for name in LAYOUTS}
        with Progress(console=console, transient=True) as progress:
            for turn in progress.track(range(rounds), description="look-ups"):
                for name in list(LAYOUTS) if turn % 2 else reversed(LAYOUTS):
                    iops[name].append(fio.run(_WORKLOAD, uris[name], seconds, place.run).iops)
        taken = allocated(place.memory)
    if taken > _ALLOCATED_MAX:
        raise BenchError(
            f"the sparse files came to hold {taken} bytes: it was not only look-up that was measured"
        )
    ratio = spread(many / few for many, few in zip(iops["million"], iops["three"], strict=True))
    written = report.write(
        out,
        "extents.json",
        {
            "meta": {
                **meta,
                "rounds": rounds,
                "seconds": seconds,
                "size": DISK_SIZE,
                "layouts": LAYOUTS,
                "client": " ".join(fio.command(_WORKLOAD, "URI", seconds)),
            },
            "iops": {name: asdict(spread(values)) for name, values in iops.items()},
            "ratio": asdict(ratio),
            "ratio_least": RATIO_LEAST,
            "build_s": asdict(build),
            "build_most_s": BUILD_MOST_S,
            "samples": iops,
        },
    )
    report.show(console, [_table(iops, ratio, build)], written)


def _build_s() -> float:
    """Seconds it takes to make the map of the large disk from the runs in the store."""
    layout = parse_layout(LAYOUTS["million"])
    run_length = -(-DISK_SIZE // DEVICE_COUNT // layout.chunk) * layout.chunk
    runs = [Run(device, MIB, run_length) for device in range(DEVICE_COUNT)]
    began = time.perf_counter()
    group_map(layout, DEVICE_COUNT, runs).compose([Range(0, DISK_SIZE)])
    return time.perf_counter() - began


def _domain(site: Site, place: Grounds, name: str, layout: str) -> str:
    """A domain of one leg with one disk; the disk's address."""
    urls = [f"file://{place.memory}/{name}{number}?size={DEVICE_SIZE}" for number in range(DEVICE_COUNT)]
    site.create_group(name, urls, layout)
    site.create_domain(name, DISK_SIZE, name)
    uri = site.create_disk(name, "disk", DISK_SIZE)
    found = site.domain(name)["legs"][0]["extent_count"]
    if found != EXTENT_COUNTS[name]:
        raise BenchError(f"the map has {found} extents and not the {EXTENT_COUNTS[name]} to be measured")
    return uri


def _table(iops: dict[str, Sequence[float]] | dict[str, list[float]], ratio: Spread, build: Spread) -> Table:
    table = Table("", "median", "min to max", "target", "", title="Look-up in a map", title_justify="left")
    for name, values in iops.items():
        one = spread(values)
        table.add_row(
            f"IOPS, {EXTENT_COUNTS[name]:,} extents",
            f"{one.median:,.0f}",
            f"{one.low:,.0f} to {one.high:,.0f}",
        )
    for label, one, target, met in (
        ("ratio", ratio, f"≥ {RATIO_LEAST}", ratio.median >= RATIO_LEAST),
        ("building the map, s", build, f"< {BUILD_MOST_S:.0f}", build.median < BUILD_MOST_S),
    ):
        mark = "[green]ok[/green]" if met else "[red]short[/red]"
        table.add_row(label, f"{one.median:.3f}", f"{one.low:.3f} to {one.high:.3f}", target, mark)
    return table
