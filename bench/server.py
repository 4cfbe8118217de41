"""Processes that listen: started, awaited, killed, ended, and never left behind."""

import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from select import select

from bench import cpu
from bench.errors import BenchError

log = logging.getLogger("bench")

START_TIMEOUT_S = 30.0
END_TIMEOUT_S = 10.0
#: Nothing tells when a stranger's socket comes to be.
POLL_S = 0.01

#: Of a unix socket, or of a TCP port on this host.
Address = Path | int


class Server:
    """A server process of ours, which can be started again after it was killed. Use as a context.

    Args:
        command: what to run; it stays in the foreground.
        address: where it listens once it is ready.
        directory: where its log goes, which is named after the address.
    """

    def __init__(self, command: Sequence[str], address: Address, directory: Path) -> None:
        self.command = tuple(command)
        self._address = address
        self._log = directory / f"{address.stem if isinstance(address, Path) else address}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    @property
    def pid(self) -> int:
        """Of the process, which runs."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Run it and wait until it listens. Raises BenchError."""
        if isinstance(self._address, Path):
            self._address.unlink(missing_ok=True)  # a killed server's; others refuse to bind over it
        with open(self._log, "ab") as output:
            # In a session of its own, so that ^C in a terminal reaches it through us, in order.
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            self._wait_listening(self._process)
        except BaseException:
            self.end()
            raise

    def _wait_listening(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _listens(self._address):
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"{self.command[0]} did not start: {self._last_words()}")
            time.sleep(POLL_S)

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        return lines[-1] if lines else "it said nothing"

    def kill(self) -> None:
        """End it as a crash would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        """End it in order; by force, and with a warning, what is then left of it and of all below it."""
        process, self._process = self._process, None
        if process is None:
            return
        with ExitStack() as handles:
            # Handles, because the number of a process that has ended may be another's.
            below = [handles.enter_context(_Handle(pid)) for pid in cpu.family(process.pid)]
            process.terminate()
            deadline = time.monotonic() + END_TIMEOUT_S
            try:
                for handle in below:
                    handle.wait_ended(deadline)
            finally:
                # Also when a signal has cut the wait short.
                left = [handle for handle in below if not handle.wait_ended(deadline=0.0)]
                for handle in left:
                    handle.kill()
                process.wait()
        if left:
            log.warning(
                "%s did not end within %.0f s of SIGTERM: killed %s",
                self.command[0],
                END_TIMEOUT_S,
                ", ".join(str(handle.pid) for handle in left),
            )


class _Handle:
    """A process, for certain: a pidfd. Use as a context. Source: pidfd_open(2)."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._descriptor: int | None = os.pidfd_open(pid)
        except ProcessLookupError:
            self._descriptor = None

    def __enter__(self) -> "_Handle":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def wait_ended(self, deadline: float) -> bool:
        """Whether it has ended, by ``deadline`` on the monotonic clock."""
        patience_s = max(0.0, deadline - time.monotonic())
        return self._descriptor is None or bool(select([self._descriptor], [], [], patience_s)[0])

    def kill(self) -> None:
        if self._descriptor is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)


def _listens(address: Address) -> bool:
    is_unix = isinstance(address, Path)
    with socket.socket(socket.AF_UNIX if is_unix else socket.AF_INET) as probe:
        try:
            probe.connect(str(address) if is_unix else ("127.0.0.1", address))
        except OSError:
            return False
        return True


def free_port() -> int:
    """A TCP port of this host that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
