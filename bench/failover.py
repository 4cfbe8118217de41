"""``python -m bench failover``: how long clients are stalled when a device's server dies under load.

Two legs, three devices and two, each device an nbdkit of its own, as if on other machines. In each round one
server of the active leg fails under load, by default by kill -9, which takes its connection with it (``faults``);
then it is well again and its leg resynced, so that the next round fails over in the other direction.

The stall is measured twice: Standfast's own ``last_failover.stall_ms``, and the slowest request that the
client saw in the whole round, which cannot be less.
"""

import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench import faults, fio, report
from bench.errors import BenchError
from bench.faults import Fault, Victim
from bench.grounds import Grounds, grounds
from bench.meta import circumstances
from bench.results import percentile
from bench.server import Server, free_port
from bench.site import SYNC_TIMEOUT_S, Site, is_whole, running_site
from bench.workloads import FAILOVER, FILL
from proxy.sizes import MIB

#: As the sizes of the devices of a group can differ from those of its backup.
LEGS = {"alpha": (3, 50 * MIB), "beta": (2, 75 * MIB)}
DISK_SIZE = 128 * MIB
#: What a client may feel, at the 99th percentile; beyond the deadline of a device that says nothing.
TARGET_MS = 100.0

#: The load is taken to be running after this many requests.
_WARM_OPS = 1000
#: Deadlines of a device after which nobody is going to fail over any more.
_PATIENCE = 6
_POLL_S = 0.05
#: Fixed, so that every run kills the same devices in the same order.
_SEED = 2


class Backend(StrEnum):
    """How devices are reached; the words are the schemes of their URLs."""

    NBD = "nbd"
    NBD_UNIX = "nbd+unix"


@dataclass(frozen=True, slots=True)
class Round:
    """One failover: what Standfast says of it, and what the client saw."""

    failed: str
    source: str
    target: str
    reason: str
    stall_ms: float
    replayed: int
    client_max_ms: float
    client_errors: int
    client_ops: int


@dataclass(frozen=True, slots=True)
class _Device:
    url: str
    victim: Victim


@dataclass(frozen=True, slots=True)
class Plan:
    """What each round is like; ``seconds``: that the load lasts, ``deadline_ms``: of a device."""

    seconds: float
    backend: Backend
    fault: Fault
    deadline_ms: int

    def __post_init__(self) -> None:
        if self.fault.needs_tcp and self.backend is not Backend.NBD:
            raise BenchError(f"{self.fault} is done to packets: it takes --backend {Backend.NBD}")

    @property
    def target_ms(self) -> float:
        """What a client may feel."""
        return TARGET_MS + (self.deadline_ms if self.fault.is_silent else 0)


def failover(console: Console, out: Path, plan: Plan, *, rounds: int) -> bool:
    """Measure, write ``failover.json`` and print the distribution.

    Returns:
        Whether no client saw an error.

    Raises:
        BenchError: something did not work; there are no results then.
    """
    meta = circumstances()
    size = sum(width * share for width, share in LEGS.values())
    done = []
    with grounds(size) as place, ExitStack() as running:
        legs = {
            group: [_device(running, place, plan, f"{group}{number}", share) for number in range(width)]
            for group, (width, share) in LEGS.items()
        }
        settings = f"deadline_ms = {plan.deadline_ms}\n"
        site = running.enter_context(running_site(place.run / "site", settings))
        for group, devices in legs.items():
            site.create_group(group, [device.url for device in devices])
        site.create_domain("bench", DISK_SIZE, *_active_and_backups())
        uri = site.create_disk("bench", "disk", DISK_SIZE)
        fio.run(FILL, uri, None, place.run)
        pick = random.Random(_SEED)
        with Progress(console=console, transient=True) as progress:
            for _ in progress.track(range(rounds), description="failovers"):
                done.append(_round(site, uri, legs, pick, plan, place))
    summary = summarise(done, plan.target_ms)
    written = report.write(
        out,
        "failover.json",
        {
            "meta": {
                **meta,
                **asdict(plan),
                "client": " ".join(fio.command(FAILOVER, "URI", plan.seconds)),
                "device": " ".join(legs["alpha"][0].victim.server.command),
            },
            "summary": summary,
            "rounds": [asdict(one) for one in done],
        },
    )
    report.show(console, [_table(summary)], written)
    return not any(one.client_errors for one in done)


def _active_and_backups() -> tuple[str, Sequence[str]]:
    active, *backups = LEGS
    return active, backups


def _device(running: ExitStack, place: Grounds, plan: Plan, name: str, size: int) -> _Device:
    image = place.memory / name
    with open(image, "xb") as file:
        file.truncate(size)
    trigger = place.run / f"{name}.fails"
    address: Path | int
    port = None
    if plan.backend is Backend.NBD:
        address = port = free_port()
        url, door = f"nbd://127.0.0.1:{address}/", ["--ipaddr=127.0.0.1", f"--port={address}"]
    else:
        address = place.run / f"{name}.sock"
        url, door = f"nbd+unix:///?socket={address}", [f"--unix={address}"]
    command = ["nbdkit", "--foreground", *door, "file", f"file={image}", *faults.filters(plan.fault, trigger)]
    server = running.enter_context(Server(command, address, place.run))
    return _Device(url, Victim(server, port, trigger))


def _round(
    site: Site,
    uri: str,
    legs: dict[str, list[_Device]],
    pick: random.Random,
    plan: Plan,
    place: Grounds,
) -> Round:
    before = site.wait_domain("bench", is_whole, SYNC_TIMEOUT_S)
    device = pick.choice(legs[before["active"]])

    def is_over(view: dict[str, Any]) -> bool:
        receipt = view["last_failover"]
        return (
            receipt is not None
            and receipt["generation"] > before["map_generation"]
            and receipt["stall_ms"] is not None
        )

    with fio.Client(FAILOVER, uri, plan.seconds, place.run) as client:
        _wait_load(site, client, before["statistics"])
        with faults.injected(plan.fault, device.victim):
            patience_s = _PATIENCE * plan.deadline_ms / 1000
            receipt = site.wait_domain("bench", is_over, patience_s)["last_failover"]
            outcome = client.wait_outcome()
    site.call("POST", "/domains/bench/resync", {"group": before["active"]})
    return Round(
        failed=device.url,
        source=receipt["from"],
        target=receipt["to"],
        reason=receipt["reason"],
        stall_ms=receipt["stall_ms"],
        replayed=receipt["replayed"],
        client_max_ms=outcome.max_us / 1e3,
        client_errors=outcome.errors,
        client_ops=outcome.ops,
    )


def _wait_load(site: Site, client: fio.Client, before: dict[str, int]) -> None:
    while True:
        now = site.domain("bench")["statistics"]
        if sum(now[kind] - before[kind] for kind in ("reads", "writes")) >= _WARM_OPS:
            return
        if client.has_ended():
            raise BenchError("the load ended before a device could fail; give it more --seconds")
        time.sleep(_POLL_S)  # nothing tells how far a client is


def summarise(rounds: Sequence[Round], target_ms: float) -> dict[str, Any]:
    """The distribution over at least one round. Pure."""
    stalls = [one.stall_ms for one in rounds]
    seen = [one.client_max_ms for one in rounds]
    return {
        "rounds": len(rounds),
        **{
            name: {"p50": percentile(values, 50), "p99": percentile(values, 99), "max": max(values)}
            for name, values in (("stall_ms", stalls), ("client_max_ms", seen))
        },
        "replayed": sum(one.replayed for one in rounds),
        "client_errors": sum(one.client_errors for one in rounds),
        "target_ms": target_ms,
        "is_met": percentile(seen, 99) < target_ms,
    }


def _table(summary: dict[str, Any]) -> Table:
    count = summary["rounds"]
    table = Table("", "p50 ms", "p99 ms", "max ms", title=f"Stall of {count} failovers", title_justify="left")
    for label, name in (
        ("told by Standfast", "stall_ms"),
        ("slowest request of the client", "client_max_ms"),
    ):
        table.add_row(label, *(f"{summary[name][key]:.1f}" for key in ("p50", "p99", "max")))
    mark = "[green]ok[/green]" if summary["is_met"] else "[red]short[/red]"
    table.add_section()
    table.add_row(f"client's p99 < {summary['target_ms']:.0f} ms", mark)
    table.add_row("errors", str(summary["client_errors"]))
    table.add_row("requests replayed", str(summary["replayed"]))
    return table
