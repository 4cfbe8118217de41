"""``python -m bench resync``: what a resync costs a client that asks for one thing at a time, and how fast it is.

Two legs of one nbdkit each. The backup's is ended, the disk is written from end to end, and it comes back: all of it is
to be copied. A client at depth 1 reads all the while in one run and with no resync in another; its 99th
percentile may at most double. Then the client ends, and the rest is copied as fast as the devices give.
"""

import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench import fio, report
from bench.errors import BenchError
from bench.grounds import grounds
from bench.meta import circumstances
from bench.results import Spread, spread
from bench.server import Server
from bench.site import SYNC_TIMEOUT_S, Site, is_whole, running_site
from bench.workloads import FILL, Pattern, Workload
from proxy.sizes import GIB, KIB, MIB

DISK_SIZE = GIB
#: Against the same client without a resync.
P99_RATIO_MOST = 2.0

_READS = Workload(Pattern.RANDOM_READ, 4 * KIB, 1)


def resync(console: Console, out: Path, *, rounds: int, seconds: float) -> None:
    """Measure, write ``resync.json`` and print it.

    Raises:
        BenchError: something did not work; there are no results then.
    """
    meta = circumstances()
    p99: dict[str, list[float]] = {"alone": [], "beside a resync": []}
    rates: dict[str, list[float]] = {"client at work": [], "nobody else": []}
    with grounds(2 * DISK_SIZE + 64 * MIB) as place, ExitStack() as running:
        servers = {}
        site = running.enter_context(running_site(place.run / "site"))
        for leg in ("alpha", "beta"):
            image, socket = place.memory / leg, place.run / f"{leg}.sock"
            with image.open("xb") as file:
                file.truncate(DISK_SIZE + 2 * MIB)
            command = ["nbdkit", "--foreground", f"--unix={socket}", "file", f"file={image}"]
            servers[leg] = running.enter_context(Server(command, socket, place.run))
            site.create_group(leg, [f"nbd+unix:///?socket={socket}"])
        site.create_domain("bench", DISK_SIZE, "alpha", ["beta"])
        uri = site.create_disk("bench", "disk", DISK_SIZE)
        with Progress(console=console, transient=True) as progress:
            for _ in progress.track(range(rounds), description="resyncs"):
                site.wait_domain("bench", is_whole, SYNC_TIMEOUT_S)
                servers["beta"].kill()
                site.wait_domain("bench", lambda view: view["legs"][1]["state"] == "outdated", SYNC_TIMEOUT_S)
                fio.run(FILL, uri, None, place.run)
                p99["alone"].append(fio.run(_READS, uri, seconds, place.run).p99_us)
                servers["beta"].start()
                with fio.Client(_READS, uri, seconds + 1, place.run) as client:
                    site.call("POST", "/domains/bench/resync", {"group": "beta"})
                    first = _wait_copy(site)
                    began = time.monotonic()
                    outcome = client.wait_outcome()
                    copied = _copy(site)
                    rates["client at work"].append(
                        (copied["copied"] - first["copied"]) / (time.monotonic() - began)
                    )
                if outcome.errors:
                    raise BenchError("the client had errors")
                p99["beside a resync"].append(outcome.p99_us)
                began = time.monotonic()
                left = copied["total"] - copied["copied"]
                site.wait_domain("bench", is_whole, SYNC_TIMEOUT_S)
                rates["nobody else"].append(left / (time.monotonic() - began))
    ratio = spread(b / a for a, b in zip(*p99.values(), strict=True))
    written = report.write(
        out,
        "resync.json",
        {
            "meta": {
                **meta,
                "rounds": rounds,
                "seconds": seconds,
                "size": DISK_SIZE,
                "client": " ".join(fio.command(_READS, "URI", seconds)),
            },
            "p99_us": {name: asdict(spread(values)) for name, values in p99.items()},
            "p99_ratio": asdict(ratio),
            "p99_ratio_most": P99_RATIO_MOST,
            "rate": {name: asdict(spread(values)) for name, values in rates.items()},
        },
    )
    report.show(console, [_table(p99, ratio, rates)], written)


def _copy(site: Site) -> dict[str, Any]:
    """The copy that goes on."""
    found: dict[str, Any] | None = site.domain("bench")["legs"][1]["sync"]
    if found is None:
        raise BenchError("the resync was over before the client; give it less --seconds")
    return found


def _wait_copy(site: Site) -> dict[str, Any]:
    """The copy, once it has begun."""
    deadline = time.monotonic() + SYNC_TIMEOUT_S
    while time.monotonic() < deadline:
        found: dict[str, Any] | None = site.domain("bench")["legs"][1]["sync"]
        if found is not None and found["copied"]:
            return found
        time.sleep(0.01)  # nothing tells how far a copy is
    raise BenchError("the resync did not begin")


def _table(p99: dict[str, list[float]], ratio: Spread, rates: dict[str, list[float]]) -> Table:
    table = Table("", "median", "min to max", "target", "", title="A resync", title_justify="left")
    for name, values in p99.items():
        one = spread(values)
        table.add_row(f"client's p99 {name}, µs", f"{one.median:,.0f}", f"{one.low:,.0f} to {one.high:,.0f}")
    mark = "[green]ok[/green]" if ratio.median <= P99_RATIO_MOST else "[red]short[/red]"
    table.add_row(
        "ratio",
        f"{ratio.median:.2f}",
        f"{ratio.low:.2f} to {ratio.high:.2f}",
        f"≤ {P99_RATIO_MOST:.0f}",
        mark,
    )
    for name, values in rates.items():
        one = spread(value / MIB for value in values)
        table.add_row(
            f"copied with {name}, MiB/s", f"{one.median:,.0f}", f"{one.low:,.0f} to {one.high:,.0f}"
        )
    return table
