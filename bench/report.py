"""Results as tables for people and JSON for programs."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.errors import BenchError
from bench.results import Sample, Spread, distinct, rows
from bench.targets import Verdict


def write(directory: Path, name: str, content: dict[str, Any]) -> Path:
    """Write ``content`` to a file in ``directory``, which is made if need be. Raises BenchError."""
    path = directory / name
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise BenchError(f"{path} cannot be written: {error.strerror}") from error
    return path


def absolute_table(samples: Sequence[Sample]) -> Table:
    """Medians of everything measured."""
    table = Table("workload", "system", title="Medians", title_justify="left")
    for heading in ("IOPS (min to max)", "MB/s", "p50 µs", "p99 µs", "server CPU µs/op"):
        table.add_column(heading, justify="right")
    previous = ""
    for row in rows(samples):
        if previous and row["workload"] != previous:
            table.add_section()
        low, high = row["spread"]["iops"]
        table.add_row(
            row["workload"] if row["workload"] != previous else "",
            row["system"],
            f"{row['iops']:,.0f}" + (f" ({low:,.0f} to {high:,.0f})" if low != high else ""),
            f"{row['mbps']:,.0f}",
            f"{row['p50_us']:,.0f}",
            f"{row['p99_us']:,.0f}",
            f"{row['server_cpu_us_per_op']:,.1f}",
        )
        previous = row["workload"]
    return table


def ratio_table(ratios: Sequence[dict[str, Any]], metric: str, title: str) -> Table:
    """For each pair a column of its ratios of ``metric``."""
    pairs = distinct(f"{one['system']} /\n{one['peer']}" for one in ratios)
    table = Table("workload", title=title, title_justify="left")
    for pair in pairs:
        table.add_column(pair, justify="right")
    for workload in distinct(one["workload"] for one in ratios):
        cells = {
            f"{one['system']} /\n{one['peer']}": _of(Spread(**one[metric]))
            for one in ratios
            if one["workload"] == workload and one[metric] is not None
        }
        table.add_row(workload, *(cells.get(pair, "") for pair in pairs))
    return table


def target_table(verdicts: Iterable[Verdict]) -> Table:
    """The figures to reach."""
    table = Table("work", "against", title="Figures to reach", title_justify="left")
    for heading in ("target", "measured"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for verdict in verdicts:
        target = verdict.target
        against = verdict.peer if verdict.peer == target.peer else f"{target.peer}: {verdict.peer}"
        mark = "[green]ok[/green]" if verdict.is_met else "[red]short[/red]"
        table.add_row(target.work, against, str(target), _of(verdict.measured), mark)
    return table


def _of(spread: Spread) -> str:
    if spread.low == spread.high:
        return f"{spread.median:.2f}"
    return f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})"


def show(console: Console, tables: Iterable[Table], written: Path) -> None:
    """Print tables and where the figures are."""
    for table in tables:
        console.print(table, "", sep="\n")
    console.print(f"written: {written}", soft_wrap=True)
