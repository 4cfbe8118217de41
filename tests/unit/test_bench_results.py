"""The arithmetic of the benchmarks: medians, ratios within rounds, targets."""

import pytest

from bench.failover import Round, summarise
from bench.results import Sample, Spread, percentile, ratio, ratios, rows, spread
from bench.targets import verdicts


def sample(
    system: str, turn: int, iops: float, *, workload: str = "randread-4k-32", cpu: float = 10.0
) -> Sample:
    return Sample(
        workload=workload,
        system=system,
        round=turn,
        iops=iops,
        mbps=iops * 4096 / 1e6,
        p50_us=100.0,
        p99_us=200.0,
        server_cpu_us_per_op=cpu,
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3.0], Spread(3, 3, 3)), ([5, 1, 3], Spread(3, 1, 5)), ([4, 1, 2, 9], Spread(3, 1, 9))],
)
def test_spread_is_middle_and_ends(values: list[float], expected: Spread) -> None:
    assert spread(values) == expected


@pytest.mark.parametrize(("percent", "expected"), [(0, 1), (50, 15), (90, 27), (99, 30), (100, 30)])
def test_percentile_of_thirty_is_one_of_them_by_nearest_rank(percent: float, expected: float) -> None:
    assert percentile(reversed(range(1, 31)), percent) == expected


def test_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    # The medians alone, 80 and 100, would have the faster one lose.
    rounds = {"a": [200.0, 50.0, 80.0], "b": [100.0, 100.0, 40.0]}
    samples = [
        sample(system, turn, iops) for system, all_ in rounds.items() for turn, iops in enumerate(all_)
    ]
    assert ratio(samples, "randread-4k-32", "a", "b", "iops") == Spread(2.0, 0.5, 2.0)


def test_ratio_round_that_only_one_has_is_left_out() -> None:
    samples = [sample("a", 0, 300), sample("a", 1, 900), sample("b", 0, 100)]
    assert ratio(samples, "randread-4k-32", "a", "b", "iops") == Spread(3, 3, 3)
    assert ratio(samples, "randread-4k-32", "a", "c", "iops") is None


def test_ratio_peer_that_used_no_measurable_time_has_none() -> None:
    samples = [sample("a", 0, 1, cpu=5.0), sample("b", 0, 1, cpu=0.0)]
    assert ratio(samples, "randread-4k-32", "a", "b", "server_cpu_us_per_op") is None
    assert ratios(samples, [("a", "b")])[0]["server_cpu_us_per_op"] is None


def test_rows_have_medians_under_the_names_of_the_metrics_and_their_spread() -> None:
    samples = [sample("a", turn, iops) for turn, iops in enumerate([10.0, 30.0, 20.0])]
    [row] = rows(samples)
    assert (row["workload"], row["system"]) == ("randread-4k-32", "a")
    assert row["iops"] == 20.0
    assert row["spread"]["iops"] == [10.0, 30.0]
    assert set(row) - {"workload", "system", "spread"} == set(row["spread"])


def test_verdicts_of_bounds_both_ways_are_met_up_to_the_bound() -> None:
    samples = [sample("standfast", 0, 140, cpu=6.0), sample("nbdkit-file", 0, 100, cpu=10.0)]
    made = {verdict.target.metric: verdict for verdict in verdicts(samples, ["nbdkit-file"])}
    assert made["iops"].measured.median == pytest.approx(1.4)
    assert made["iops"].is_met
    assert made["server_cpu_us_per_op"].is_met
    worse = [sample("standfast", 0, 139, cpu=6.1), sample("nbdkit-file", 0, 100, cpu=10.0)]
    assert not any(verdict.is_met for verdict in verdicts(worse, ["nbdkit-file"]))


def test_verdicts_best_peer_is_the_fastest_of_those_that_count() -> None:
    speeds = {"standfast": 100.0, "slow": 50.0, "fast": 80.0, "standfast-mirror": 90.0}
    samples = [sample(system, 0, iops, workload="read-1m-8") for system, iops in speeds.items()]
    [verdict] = verdicts(samples, ["slow", "fast"])
    assert (verdict.peer, verdict.measured.median, verdict.is_met) == ("fast", 1.25, False)


def test_verdicts_without_peers_are_none() -> None:
    assert verdicts([sample("standfast", 0, 1), sample("standfast", 0, 1, workload="read-1m-8")], []) == []


@pytest.mark.parametrize(("slowest_ms", "met"), [(99.9, True), (100.0, False)])
def test_summarise_failovers_judges_what_the_client_saw(slowest_ms: float, met: bool) -> None:
    rounds = [
        Round("nbd://a/", "alpha", "beta", "lost", 10.0, 32, client_max_ms, errors, 1000)
        for client_max_ms, errors in [(12.0, 0), (slowest_ms, 2), (11.0, 0)]
    ]
    summary = summarise(rounds, 100.0)
    assert summary["client_max_ms"] == {"p50": 12.0, "p99": slowest_ms, "max": slowest_ms}
    assert (summary["replayed"], summary["client_errors"], summary["is_met"]) == (96, 2, met)
