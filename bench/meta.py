"""The circumstances of a measurement: no figure without them."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_PROGRAMS = ("fio", "nbdkit", "qemu-nbd", "qemu-storage-daemon")
_CHECKOUT = Path(__file__).resolve().parent.parent


def circumstances() -> dict[str, Any]:
    """Date, command, machine, versions and commit."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "cpu": _cpu_model(),
        "load_average": os.getloadavg(),
        "versions": {"python": platform.python_version(), **{one: _version(one) for one in _PROGRAMS}},
        "commit": _output("git", "-C", str(_CHECKOUT), "describe", "--always", "--dirty", "--abbrev=40"),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(program: str) -> str:
    return _output(program, "--version")


def _output(*command: str) -> str:
    """The first line a command prints; empty when there is no such command or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.partition("\n")[0]
