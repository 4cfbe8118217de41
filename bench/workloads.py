"""The work that is measured. Pure.

The client is light, and the same for everybody: it keeps no map of blocks already visited
(``norandommap``) and its jobs are threads. Each job has a connection of its own. On two processors one client
is still what limits the fastest servers, which makes their ratios smaller than they are.
"""

from dataclasses import dataclass
from enum import StrEnum

from proxy.sizes import KIB, MIB, format_size


class Pattern(StrEnum):
    """What a client does; fio's words."""

    RANDOM_READ = "randread"
    RANDOM_WRITE = "randwrite"
    RANDOM_MIXED = "randrw"
    SEQUENTIAL_READ = "read"
    SEQUENTIAL_WRITE = "write"


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests of ``block_size`` bytes, ``depth`` in flight on each of ``jobs`` connections.

    ``distribution``: where on the disk random ones go, in fio's words; empty: everywhere alike.
    """

    pattern: Pattern
    block_size: int
    depth: int
    jobs: int = 1
    distribution: str = ""

    @property
    def name(self) -> str:
        """Such as ``randread-4k-32``; with several clients ``randread-4k-4x16``."""
        width = f"{self.jobs}x{self.depth}" if self.jobs > 1 else str(self.depth)
        return f"{self.pattern}-{format_size(self.block_size).lower()}-{width}"

    def options(self) -> list[str]:
        """fio's options for it."""
        return [
            f"--rw={self.pattern}",
            f"--bs={self.block_size}",
            f"--iodepth={self.depth}",
            f"--numjobs={self.jobs}",
            "--thread",
            "--norandommap",
            "--randrepeat=0",
            *([f"--random_distribution={self.distribution}"] if self.distribution else []),
        ]


#: 4 KiB one at a time and as many as a busy guest has; then enough to be limited by copying.
COMPARED = (
    Workload(Pattern.RANDOM_READ, 4 * KIB, 1),
    Workload(Pattern.RANDOM_WRITE, 4 * KIB, 1),
    Workload(Pattern.RANDOM_READ, 4 * KIB, 32),
    Workload(Pattern.RANDOM_WRITE, 4 * KIB, 32),
    Workload(Pattern.RANDOM_READ, 4 * KIB, 16, jobs=4),
    Workload(Pattern.RANDOM_WRITE, 4 * KIB, 16, jobs=4),
    Workload(Pattern.SEQUENTIAL_READ, 64 * KIB, 16),
    Workload(Pattern.SEQUENTIAL_WRITE, 64 * KIB, 16),
    Workload(Pattern.SEQUENTIAL_READ, MIB, 8),
    Workload(Pattern.SEQUENTIAL_WRITE, MIB, 8),
)

#: Every system is filled with it through its own door: no block is a hole, and all caches are equally warm.
FILL = Workload(Pattern.SEQUENTIAL_WRITE, MIB, 8)

#: What a failover is measured under.
FAILOVER = Workload(Pattern.RANDOM_MIXED, 4 * KIB, 32)
