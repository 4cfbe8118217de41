"""The figures to reach, and whether they were. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.results import Sample, Spread, distinct, ratio, spread
from bench.systems import NBDKIT, QEMU_NBD, QSD_QUORUM, STANDFAST, STANDFAST_MIRROR

#: In place of a peer's name: whichever did best in the workload.
BEST_PEER = "best peer"


@dataclass(frozen=True, slots=True)
class Target:
    """A bound for the ratio of ``system`` to ``peer``; ``at_most`` turns it from a least into a most."""

    work: str
    workload: str
    peer: str
    bound: float
    system: str = STANDFAST
    metric: str = "iops"
    at_most: bool = False

    def __str__(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.bound:g}"


TARGETS = (
    Target("4 KiB random read, depth 32", "randread-4k-32", NBDKIT, 1.4),
    Target("4 KiB random read, depth 32", "randread-4k-32", QEMU_NBD, 2.5),
    Target("4 KiB random write, depth 32", "randwrite-4k-32", NBDKIT, 1.1),
    Target("4 KiB random write, depth 32", "randwrite-4k-32", QEMU_NBD, 2.2),
    Target("4 KiB random read, 4 clients of depth 16", "randread-4k-4x16", NBDKIT, 2.0),
    Target(
        "4 KiB random write, depth 32, two legs", "randwrite-4k-32", QSD_QUORUM, 2.0, system=STANDFAST_MIRROR
    ),
    Target("1 MiB sequential read", "read-1m-8", BEST_PEER, 1.3),
    Target("1 MiB sequential write", "write-1m-8", BEST_PEER, 1.0),
    Target("4 KiB random read, depth 1", "randread-4k-1", BEST_PEER, 0.95),
    Target(
        "server CPU per 4 KiB read, depth 32",
        "randread-4k-32",
        NBDKIT,
        0.6,
        metric="server_cpu_us_per_op",
        at_most=True,
    ),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a target; ``peer`` is the one it was measured against."""

    target: Target
    peer: str
    measured: Spread

    @property
    def is_met(self) -> bool:
        """Whether the median is within the bound."""
        if self.target.at_most:
            return self.measured.median <= self.target.bound
        return self.measured.median >= self.target.bound


def verdicts(samples: Sequence[Sample], peers: Sequence[str]) -> list[Verdict]:
    """Of every target that the samples have something to say about.

    Args:
        peers: who can be the best peer.
    """
    made = []
    for target in TARGETS:
        peer = best(samples, target, peers) if target.peer == BEST_PEER else target.peer
        measured = ratio(samples, target.workload, target.system, peer, target.metric) if peer else None
        if peer and measured is not None:
            made.append(Verdict(target, peer, measured))
    return made


def best(samples: Sequence[Sample], target: Target, peers: Sequence[str]) -> str | None:
    """The peer with the highest median in the target's workload, if any took part."""
    medians = {
        system: spread(
            getattr(sample, target.metric)
            for sample in samples
            if sample.system == system and sample.workload == target.workload
        ).median
        for system in distinct(sample.system for sample in samples if sample.workload == target.workload)
        if system in peers
    }
    return max(medians, key=lambda system: medians[system], default=None)
