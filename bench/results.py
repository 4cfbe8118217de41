"""From samples to medians, spreads and ratios. Pure."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of one workload on one system, in round ``round``."""

    workload: str
    system: str
    round: int
    iops: float
    mbps: float
    p50_us: float
    p99_us: float
    server_cpu_us_per_op: float


METRICS = ("iops", "mbps", "p50_us", "p99_us", "server_cpu_us_per_op")


@dataclass(frozen=True, slots=True)
class Spread:
    """The middle and the ends of what the rounds gave."""

    median: float
    low: float
    high: float


def spread(values: Iterable[float]) -> Spread:
    """The spread of at least one value."""
    ordered = sorted(values)
    return Spread(median(ordered), ordered[0], ordered[-1])


def percentile(values: Iterable[float], percent: float) -> float:
    """The smallest of the values that ``percent`` of them do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def by_round(samples: Iterable[Sample], workload: str, system: str, metric: str) -> dict[int, float]:
    """One figure of each round of a workload on a system."""
    return {
        sample.round: getattr(sample, metric)
        for sample in samples
        if sample.workload == workload and sample.system == system
    }


def ratio(samples: Sequence[Sample], workload: str, system: str, peer: str, metric: str) -> Spread | None:
    """The spread of the rounds' own ratios of system to peer; None when no round has both.

    What slows a machine down for a while slows neighbours in a round alike, and so is not in their ratio.
    """
    ours = by_round(samples, workload, system, metric)
    theirs = by_round(samples, workload, peer, metric)
    ratios = [value / theirs[turn] for turn, value in ours.items() if theirs.get(turn)]
    return spread(ratios) if ratios else None


def distinct(names: Iterable[str]) -> list[str]:
    """Each name once, in the order of first appearance."""
    return list(dict.fromkeys(names))


def rows(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """For each workload and system the medians, under the metrics' names, and ``spread``: [low, high] of each."""
    made = []
    for workload in distinct(sample.workload for sample in samples):
        for system in distinct(sample.system for sample in samples if sample.workload == workload):
            spreads = {
                metric: spread(by_round(samples, workload, system, metric).values()) for metric in METRICS
            }
            made.append(
                {
                    "workload": workload,
                    "system": system,
                    **{metric: one.median for metric, one in spreads.items()},
                    "spread": {metric: [one.low, one.high] for metric, one in spreads.items()},
                }
            )
    return made


def ratios(samples: Sequence[Sample], pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """For each workload and pair (system, peer) the ratio of their requests a second, and of processor time."""
    made = []
    for workload in distinct(sample.workload for sample in samples):
        for system, peer in pairs:
            iops = ratio(samples, workload, system, peer, "iops")
            cpu = ratio(samples, workload, system, peer, "server_cpu_us_per_op")
            if iops is not None:
                made.append(
                    {
                        "workload": workload,
                        "system": system,
                        "peer": peer,
                        "iops": asdict(iops),
                        "server_cpu_us_per_op": None if cpu is None else asdict(cpu),
                    }
                )
    return made
