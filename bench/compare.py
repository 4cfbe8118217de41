"""``python -m bench compare``: Standfast beside its peers."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from bench import cpu, fio, report
from bench.errors import BenchError
from bench.grounds import Grounds, grounds
from bench.meta import circumstances
from bench.results import Sample, ratios, rows
from bench.systems import KINDS, STANDFAST, STANDFAST_MIRROR, Kind, Place, System
from bench.targets import verdicts
from bench.workloads import COMPARED, FILL, Workload

#: Of everything, in a system that mirrors.
_COPIES_MAX = 2

#: Whose ratios are shown, and whether against mirrored peers.
_OURS = ((STANDFAST, False), (STANDFAST_MIRROR, True))


def choose(only: Sequence[str]) -> tuple[list[Kind], list[Workload]]:
    """The systems and workloads that ``only`` names; all of a sort when it names none of it.

    Raises:
        BenchError: a name is neither, or a system is not installed that was asked for.
    """
    kinds = {kind.name: kind for kind in KINDS}
    workloads = {workload.name: workload for workload in COMPARED}
    for name in only:
        if name not in kinds and name not in workloads:
            raise BenchError(f"--only {name}: is none of {', '.join([*kinds, *workloads])}")
        if name in kinds and not kinds[name].is_installed():
            raise BenchError(f"--only {name}: there is no {kinds[name].program} on this machine")
    return (
        [kinds[name] for name in only if name in kinds] or [kind for kind in KINDS if kind.is_installed()],
        [workloads[name] for name in only if name in workloads] or list(COMPARED),
    )


def compare(
    console: Console, out: Path, *, seconds: float, rounds: int, size: int, only: Sequence[str]
) -> None:
    """Measure, write ``results.json`` and print the tables.

    Args:
        seconds: of one fio run; there is one for each system, workload and round.
        size: bytes of each system's disk.

    Raises:
        BenchError: something did not work; there are no results then.
    """
    kinds, workloads = choose(only)
    absent = [kind.name for kind in KINDS if not kind.is_installed()]
    if absent:
        console.print(f"not on this machine: {', '.join(absent)}")
    meta = circumstances()
    with grounds(size * _COPIES_MAX * len(kinds)) as place, ExitStack() as running:
        systems = []
        with console.status("starting the systems and filling their disks"):
            for kind in kinds:
                systems.append(_start(running, kind, place, size))
        samples = _measure(console, systems, workloads, rounds, seconds, place)
    pairs = [(ours, peer.name) for ours, mirrored in _OURS for peer in kinds if _is_peer(peer, mirrored)]
    pairs = [(ours, peer) for ours, peer in pairs if ours in {kind.name for kind in kinds}]
    compared = ratios(samples, pairs)
    reached = verdicts(samples, [kind.name for kind in kinds if _is_peer(kind, mirrored=False)])
    written = report.write(
        out,
        "results.json",
        {
            "meta": {
                **meta,
                "seconds": seconds,
                "rounds": rounds,
                "size": size,
                "absent": absent,
                "systems": {system.name: system.setup for system in systems},
                "client": {one.name: " ".join(fio.command(one, "URI", seconds)) for one in workloads},
            },
            "rows": rows(samples),
            "ratios": compared,
            "targets": [
                {
                    **asdict(verdict.target),
                    "peer": verdict.peer,
                    "measured": asdict(verdict.measured),
                    "is_met": verdict.is_met,
                }
                for verdict in reached
            ],
            "samples": [asdict(sample) for sample in samples],
        },
    )
    tables = [report.absolute_table(samples)]
    if compared:
        tables += [
            report.ratio_table(compared, "iops", "Requests a second: ratio"),
            report.ratio_table(compared, "server_cpu_us_per_op", "Server CPU for each request: ratio"),
        ]
    if reached:
        tables.append(report.target_table(reached))
    report.show(console, tables, written)


def _is_peer(kind: Kind, mirrored: bool) -> bool:
    return kind.mirrored is mirrored and kind.name not in (STANDFAST, STANDFAST_MIRROR)


def _start(running: ExitStack, kind: Kind, place: Grounds, size: int) -> System:
    """A system of ``kind``, filled; it ends with ``running``."""
    own = Place(place.memory / kind.name, place.run / kind.name, size)
    own.memory.mkdir()
    own.run.mkdir()
    try:
        system = running.enter_context(kind.running(kind.name, own))
        fio.run(FILL, system.uri, None, place.run)
    except BenchError as error:
        raise BenchError(f"{kind.name}: {error}") from error
    return system


def _measure(
    console: Console,
    systems: Sequence[System],
    workloads: Sequence[Workload],
    rounds: int,
    seconds: float,
    place: Grounds,
) -> list[Sample]:
    samples = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(workloads) * rounds * len(systems))
        for workload in workloads:
            for turn in range(rounds):
                first = turn % len(systems)
                for system in [*systems[first:], *systems[:first]]:
                    progress.update(task, description=f"{workload.name}, round {turn + 1}: {system.name}")
                    samples.append(_sample(system, workload, turn, seconds, place))
                    progress.advance(task)
    return samples


def _sample(system: System, workload: Workload, turn: int, seconds: float, place: Grounds) -> Sample:
    try:
        before_s = cpu.used_s(system.pid)
        outcome = fio.run(workload, system.uri, seconds, place.run)
        used_s = cpu.used_s(system.pid) - before_s
    except BenchError as error:
        raise BenchError(f"{system.name}: {error}") from error
    return Sample(
        workload=workload.name,
        system=system.name,
        round=turn,
        iops=outcome.iops,
        mbps=outcome.mbps,
        p50_us=outcome.p50_us,
        p99_us=outcome.p99_us,
        server_cpu_us_per_op=used_s * 1e6 / outcome.ops,
    )
