"""What the processes of a server have used. Source: proc(5), /proc/PID/stat."""

import os
from dataclasses import dataclass
from pathlib import Path

from bench.errors import BenchError

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """Of one process: its parent, and the time used by all its threads and by children already waited for.

    The workers that io_uring makes are threads of the process, and threads that have ended still count.
    """

    parent: int
    ticks: int
    has_ended: bool = False


def parse_stat(text: str) -> ProcessStat:
    """Read a line of /proc/PID/stat. The name in it may have spaces and parentheses of its own."""
    fields = text[text.rindex(")") + 2 :].split()
    # Fields 4 (ppid) and 14 to 17 (utime, stime, cutime, cstime) of the manual page; this begins with field 3.
    return ProcessStat(
        parent=int(fields[1]), ticks=sum(map(int, fields[11:15])), has_ended=fields[0] in ("Z", "X")
    )


def family(pid: int) -> dict[int, ProcessStat]:
    """A process and all below it, as they stand now; empty when it has ended."""
    stats = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            stats[int(directory.name)] = parse_stat((directory / "stat").read_text())
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended in this very moment
    return {member: stats[member] for member in members(stats, pid)}


def members(stats: dict[int, ProcessStat], pid: int) -> list[int]:
    """``pid`` and its descendants among ``stats``."""
    found = [pid] if pid in stats else []
    for member in found:  # grows while it is gone through
        found.extend(child for child, stat in stats.items() if stat.parent == member)
    return found


def used_s(pid: int) -> float:
    """Seconds of processor time that a process and all below it have used so far.

    Raises:
        BenchError: it has ended, and what was below it is not to be found any more.
    """
    found = family(pid)
    if pid not in found or found[pid].has_ended:
        raise BenchError(f"the server (process {pid}) has ended by itself")
    return sum(stat.ticks for stat in found.values()) / _TICKS_PER_S
