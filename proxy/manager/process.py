"""Domain server processes: starting one, finding one that runs, knowing when it is gone."""

import fcntl
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import trio

from proxy.errors import StandfastError

#: What a Python process with its imports may take on a busy machine.
START_TIMEOUT_S = 30


class StartError(StandfastError):
    """A domain server could not be started."""


class StartingError(StartError):
    """One is just coming up or going down; look again."""


@dataclass(slots=True)
class Process:
    """A domain server, a child of ours or of a manager before us."""

    pid: int
    pidfd: int
    child: subprocess.Popen[bytes] | None = None

    async def wait_gone(self) -> None:
        """Return when the process has ended."""
        await trio.lowlevel.wait_readable(self.pidfd)
        if self.child is not None:
            self.child.wait()

    def has_ended(self) -> bool:
        """Whether the process has ended."""
        return bool(select.select([self.pidfd], [], [], 0)[0])

    def kill(self) -> None:
        """End it at once; does nothing when it has ended."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Let go of the handle; the process goes on."""
        os.close(self.pidfd)


def find(directory: Path, uuid: UUID) -> Process | None:
    """The domain server of domain ``uuid`` that serves from ``directory`` now, or None.

    Raises:
        StartingError: one is just coming up or going down.
        StartError: another domain's server is there, or the directory is no good.
    """
    try:
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StartError(f"its directory {directory} cannot be used: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        # Who holds the lock has written its pid and whose server it is into it.
        identity = os.pread(lock, 64, 0).decode(errors="replace").split()
    finally:
        os.close(lock)
    try:
        pid, owner = int(identity[0]), UUID(identity[1])
        if owner != uuid:
            raise StartError(
                f"the domain server of another domain (pid {pid}, uuid {owner}), which this manager does not know, "
                f"serves from {directory}; end it first, or use another --run directory"
            )
        return Process(pid, os.pidfd_open(pid))
    except (OSError, ValueError, IndexError):
        raise StartingError("another process of this domain is just starting or ending") from None


def start(name: str, uuid: UUID, directory: Path, *, deadline_ms: int, probe_ms: int) -> Process:
    """Start the domain server of ``name``, in a session of its own so that it outlives us.

    Raises:
        StartError: it cannot be started.
    """
    command = [sys.executable, "-m", "proxy.domainserver", name, str(uuid)]
    command += ["--directory", str(directory), "--deadline-ms", str(deadline_ms)]
    command += ["--probe-ms", str(probe_ms)]
    try:
        directory.mkdir(mode=0o755, exist_ok=True)
        with open(directory / "server.log", "ab") as output:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
    except OSError as error:
        raise StartError(f"its domain server cannot be started: {error}") from error
    return Process(child.pid, os.pidfd_open(child.pid), child)


def last_words(directory: Path) -> str:
    """The last line of a domain server's log, for the message that it has ended."""
    try:
        lines = (directory / "server.log").read_text(errors="replace").splitlines()
    except OSError:
        return "it left no log"
    return lines[-1] if lines else "it said nothing"
