"""Where the files and sockets of a benchmark are, and that nothing of them stays."""

import ctypes
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from bench import cpu
from bench.errors import BenchError
from proxy.sizes import format_size

_MEMORY = Path("/dev/shm")
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, slots=True)
class Grounds:
    """Two directories of a benchmark's own: RAM-backed files, and sockets (its path is short) and logs."""

    memory: Path
    run: Path


@contextmanager
def grounds(needed: int) -> Iterator[Grounds]:
    """Both directories, for as long as the context lasts.

    Args:
        needed: bytes that will be written to memory.

    Raises:
        BenchError: there is not as much.
    """
    try:
        free = shutil.disk_usage(_MEMORY).free
    except OSError as error:
        raise BenchError(f"{_MEMORY}, where RAM-backed files go, cannot be used: {error.strerror}") from error
    if free < needed:
        raise BenchError(
            f"{_MEMORY} has {format_size(free)} left and this takes {format_size(needed)}; choose a smaller --size "
            "or fewer systems with --only"
        )
    with (
        tempfile.TemporaryDirectory(prefix="standfast-bench-", dir=_MEMORY) as memory,
        # Not where TMPDIR says, which may be too long for a socket: unix(7) allows 107 bytes.
        tempfile.TemporaryDirectory(prefix="sfb-", dir="/tmp") as run,
    ):
        yield Grounds(Path(memory), Path(run))


@contextmanager
def tidy() -> Iterator[None]:
    """Nothing we started outlives the context, whatever ends it; SIGINT and SIGTERM end it in order, once.

    Domain servers are meant to outlive a manager that crashes: so that they come back to us and not to
    init, we adopt them. Source: prctl(2), PR_SET_CHILD_SUBREAPER.
    """
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def unwind(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(128 + number)

    signal.signal(signal.SIGINT, unwind)
    signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        for pid in set(cpu.family(os.getpid())) - {os.getpid()}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def allocated(directory: Path) -> int:
    """Bytes that the files of a directory really take."""
    return sum(os.stat(path).st_blocks * 512 for path in directory.rglob("*"))
