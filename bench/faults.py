"""What is done to a device's server in the middle of a load, and undone after it."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from bench.errors import BenchError
from bench.server import Server

#: Of nftables, for the time of one fault.
_TABLE = "standfast_bench"


class Fault(StrEnum):
    """How a device fails."""

    KILL = "kill"  # kill -9 of its server
    HANG = "hang"  # its server is stopped, and its connection stays
    RESET = "reset"  # its connection is torn down, and its server lives
    DROP = "drop"  # its packets are dropped, both ways
    EIO = "eio"  # it answers everything with an error

    @property
    def is_silent(self) -> bool:
        """Whether only time tells of it."""
        return self in (Fault.HANG, Fault.DROP)

    @property
    def needs_tcp(self) -> bool:
        """Whether it is done to packets."""
        return self in (Fault.RESET, Fault.DROP)


@dataclass(frozen=True, slots=True)
class Victim:
    """A device's server, an nbdkit; ``port``: that it listens on, if any; ``trigger``: of its error filter."""

    server: Server
    port: int | None
    trigger: Path


def filters(fault: Fault, trigger: Path) -> list[str]:
    """What nbdkit must be started with, so that the fault can be brought about."""
    if fault is not Fault.EIO:
        return []
    return ["--filter=error", "error=EIO", "error-rate=100%", f"error-file={trigger}"]


@contextmanager
def injected(fault: Fault, victim: Victim) -> Iterator[None]:
    """The fault lasts as long as the context; afterwards the server answers again. Raises BenchError."""
    with _lasting(fault, victim):
        yield
    # Whatever it was: nbdkit does not always survive a client that is gone with writes under way.
    victim.server.kill()
    victim.server.start()


@contextmanager
def _lasting(fault: Fault, victim: Victim) -> Iterator[None]:
    match fault:
        case Fault.KILL:
            victim.server.kill()
            yield
        case Fault.HANG:
            os.kill(victim.server.pid, signal.SIGSTOP)
            yield
        case Fault.RESET:
            _run("ss", "--kill", "--no-header", "--tcp", f"( sport = :{victim.port} )")
            yield
        case Fault.DROP:
            rules = "".join(f"tcp {end} {victim.port} drop\n" for end in ("sport", "dport"))
            hook = "type filter hook input priority 0"
            _run("nft", f"table inet {_TABLE} {{\nchain input {{\n{hook}\n{rules}}}\n}}")
            try:
                yield
            finally:
                _run("nft", "delete", "table", "inet", _TABLE)
        case Fault.EIO:
            victim.trigger.touch()
            try:
                yield
            finally:
                victim.trigger.unlink()


def _run(*command: str) -> None:
    if shutil.which(command[0]) is None:
        raise BenchError(f"{command[0]} is not installed")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{command[0]} failed: {done.stderr.strip()}")
