"""fio as the benchmarks run it: its command line, and its report."""

import json
from typing import Any

import pytest

from bench.errors import BenchError
from bench.fio import command, parse
from bench.workloads import COMPARED, Pattern, Workload
from proxy.sizes import KIB


def report(**changes: Any) -> str:
    """A report of fio 3.33, cut to what matters."""
    job = {
        "jobname": "bench",
        "error": 0,
        "mixed": {
            "bw_bytes": 351_565_846,
            "iops": 85831.5,
            "total_ios": 86089,
            "lat_ns": {
                "max": 25_687_336,
                "percentile": {"50.000000": 337_920, "99.000000": 7_045_120},
            },
        },
    }
    return json.dumps({"fio version": "fio-3.33", "jobs": [job | changes]}, indent=2)


def test_parse_report_converts_to_the_units_of_the_results() -> None:
    outcome = parse(report())
    assert (outcome.ops, outcome.errors, outcome.iops) == (86089, 0, 85831.5)
    assert outcome.mbps == pytest.approx(351.565846)
    assert (outcome.p50_us, outcome.p99_us) == (337.92, 7045.12)
    assert outcome.max_us == pytest.approx(25687.336)


def test_parse_report_behind_warnings_finds_the_report() -> None:
    assert parse("fio: {a warning}\nnote: another\n" + report()) == parse(report())


@pytest.mark.parametrize(("changes", "errors"), [({"error": 5}, 1), ({"error": 5, "total_err": 7}, 7)])
def test_parse_failed_requests_are_counted(changes: dict[str, int], errors: int) -> None:
    assert parse(report(**changes)).errors == errors


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fio: nbd_connect_uri: Connection refused\n",
        "{\n}",
        '{\n "jobs": []}',
        report(mixed={"iops": 0.0}),
    ],
    ids=["empty", "complaint", "no jobs", "empty jobs", "no requests"],
)
def test_parse_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(BenchError, match="report is not understood"):
        parse(text)


def test_command_with_seconds_runs_by_the_clock_and_without_once_over_the_disk() -> None:
    workload = Workload(Pattern.RANDOM_READ, 4 * KIB, 32)
    timed, whole = command(workload, "nbd+unix:///d?socket=/s", 0.5), command(workload, "nbd://h/", None)
    assert {"--time_based", "--runtime=500ms", "--uri=nbd+unix:///d?socket=/s"} <= set(timed)
    assert not any(option.startswith(("--time_based", "--runtime")) for option in whole)


def test_workload_names_are_distinct_and_tell_clients_from_depth() -> None:
    names = [workload.name for workload in COMPARED]
    assert len(set(names)) == len(names) == 10
    assert {"randread-4k-32", "randread-4k-4x16", "write-1m-8"} <= set(names)
