"""Devices: nbdkit servers of images in memory, that can be made to fail in every way a server can."""

import os
import signal
import subprocess
from enum import Enum
from pathlib import Path

import trio

#: Short of the deadline, and short enough that what is queued at a slow device is worked off in a quarantine.
SLOW_MS = 25
#: Of requests, while a device has errors.
ERROR_RATE = "10%"
START_PATIENCE_S = 20


class Condition(Enum):
    """How a device is."""

    WELL = "well"
    DEAD = "dead"
    STOPPED = "stopped"
    FAILING = "failing"


class Device:
    """One nbdkit server of one image, which outlives it.

    Args:
        name: of the device; its group's and a number.
        images: directory of its image.
        sockets: directory of its socket.
        size: of its image, in bytes.
    """

    def __init__(self, name: str, images: Path, sockets: Path, size: int) -> None:
        self.name = name
        self.image = images / name
        self.condition = Condition.DEAD
        self.ended_by_itself = 0
        self._trigger = sockets / f"{name}.errors"
        self._socket = sockets / f"{name}.sock"
        self._process: subprocess.Popen[bytes] | None = None
        with self.image.open("wb") as file:
            file.truncate(size)

    @property
    def url(self) -> str:
        """What a group is made of."""
        return f"nbd+unix:///?socket={self._socket}"

    async def start(self, *, slow: bool = False) -> None:
        """Start it; returns when it can be reached."""
        self._socket.unlink(missing_ok=True)
        delays = [f"rdelay={SLOW_MS}ms", f"wdelay={SLOW_MS}ms"] if slow else []
        self._process = subprocess.Popen(
            [
                *(
                    "nbdkit",
                    "-f",
                    "-U",
                    str(self._socket),
                    "--filter=error",
                    *(["--filter=delay"] if slow else []),
                ),
                *("file", str(self.image), "error=EIO", f"error-rate={ERROR_RATE}"),
                *(f"error-file={self._trigger}", *delays),
            ],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        with trio.fail_after(START_PATIENCE_S):
            while True:
                try:
                    await (await trio.open_unix_socket(self._socket)).aclose()
                    break
                except OSError:
                    await trio.sleep(0.01)
        self.condition = Condition.WELL

    async def watch(self) -> None:
        """Start it again whenever it ends by itself: nbdkit 1.32 does when its client vanishes at a bad moment."""
        while True:
            if self.condition is not Condition.DEAD and self._is_gone():
                self.ended_by_itself += 1
                await self.start()
            await trio.sleep(0.05)

    def _is_gone(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def kill(self) -> None:
        """End it as a crash would."""
        self.condition = Condition.DEAD
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        """Make it hang."""
        self.condition = Condition.STOPPED
        self._signal(signal.SIGSTOP)

    def fail(self) -> None:
        """Make it answer with errors, now and then."""
        self.condition = Condition.FAILING
        self._trigger.touch()

    async def heal(self) -> None:
        """Make it well again, whatever it had."""
        self._trigger.unlink(missing_ok=True)
        if self.condition is Condition.STOPPED:
            self._signal(signal.SIGCONT)
        if self.condition is Condition.DEAD or self._is_gone():
            await self.start()
        self.condition = Condition.WELL

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        if self._process.poll() is None:
            os.kill(self._process.pid, number)
