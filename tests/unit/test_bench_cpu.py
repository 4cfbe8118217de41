"""What a server's processes have used, read from /proc."""

import os
import subprocess

import pytest

from bench.cpu import ProcessStat, members, parse_stat, used_s
from bench.errors import BenchError

#: Fields 3 to 17 of proc(5): state, ppid, five more, flags, four faults, utime, stime, cutime, cstime.
_REST = "S 40 1 1 0 -1 4194560 9 8 7 6 300 200 30 2 20 0 5 0 100"


@pytest.mark.parametrize("name", ["nbdkit", "a b", "tricky) S 1 1", "(("])
def test_parse_stat_whatever_the_name_finds_parent_and_times_of_children_too(name: str) -> None:
    assert parse_stat(f"41 ({name}) {_REST}\n") == ProcessStat(parent=40, ticks=532)


def test_used_s_process_that_ended_is_refused_rather_than_taken_for_idle() -> None:
    with subprocess.Popen(["true"]) as ended:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(BenchError, match="has ended"):
            used_s(ended.pid)
    with pytest.raises(BenchError, match="has ended"):
        used_s(ended.pid)


def test_members_are_the_whole_tree_below_and_no_stranger() -> None:
    parents = {1: 0, 10: 1, 11: 10, 12: 10, 13: 12, 20: 1, 21: 20}
    stats = {pid: ProcessStat(parent, 0) for pid, parent in parents.items()}
    assert sorted(members(stats, 10)) == [10, 11, 12, 13]
    assert members(stats, 99) == []
