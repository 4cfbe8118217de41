"""What ``scripts/demo`` shows; it prints every command it gives, so that the reader can give it too."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

STANDFAST = Path(sys.executable).with_name("standfast")
LOAD_S = 10
#: The kill comes in the middle of the load.
KILL_AFTER_S = 4


class DemoError(Exception):
    """Something did not hold."""


@dataclass
class Devices:
    """nbdkit servers that stand in for devices on other machines."""

    directory: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)

    def start(self, name: str, size: str) -> str:
        """Start a device; its URL."""
        image = self.directory / f"{name}.img"
        with image.open("wb") as file:
            file.truncate(int(size.removesuffix("M")) << 20)
        port = free_port()
        command = ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "file", str(image)]
        show(command)
        self.processes[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        self.ports[name] = port
        wait_for(lambda: can_connect(port), f"nbdkit for {name}")
        return f"nbd://127.0.0.1:{port}/"

    def kill(self, name: str) -> None:
        """End a device as a crash would."""
        print(f"\n$ kill -9 {self.processes[name].pid}    # the nbdkit of {name}", flush=True)
        self.processes[name].kill()

    def close(self) -> None:
        """End all of them."""
        for process in self.processes.values():
            process.kill()
            process.wait()


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def can_connect(port: int) -> bool:
    """Whether somebody listens on a port of this machine."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition: Any, what: str, timeout_s: float = 20) -> None:
    """Return when ``condition`` holds. Raises DemoError when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise DemoError(f"{what} did not come up")
        time.sleep(0.02)


def show(command: list[str]) -> None:
    """Print a command as one would type it."""
    shown = ["standfast" if part == str(STANDFAST) else part for part in command]
    print(f"$ {shlex.join(shown)}", flush=True)


def standfast(*arguments: str) -> None:
    """Give a command, and let its output be seen."""
    command = [str(STANDFAST), *arguments]
    show(command)
    if subprocess.run(command).returncode:
        raise DemoError(f"standfast {arguments[0]} failed")


def ask(*arguments: str) -> Any:
    """The JSON answer of a command."""
    output = subprocess.run([str(STANDFAST), *arguments, "--json"], check=True, capture_output=True).stdout
    return json.loads(output)


def say(text: str) -> None:
    """A heading."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


def show_map(title: str, leg: dict[str, Any]) -> None:
    """The extent map of a leg, to scale."""
    print(f"{title}: {leg['group']}, {leg['extent_count']} extents")
    for extent in leg["extents"]:
        bar = "█" * max(1, round(extent["length"] / (4 << 20)))
        begin, end = extent["offset"] / (1 << 20), (extent["offset"] + extent["length"]) / (1 << 20)
        print(f"   {begin:7.2f} to {end:7.2f} MiB  →  device {extent['device'] + 1}  {bar}")


def client_sockets(pid: int) -> set[str]:
    """The sockets a process has open, by inode."""
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(entry)
        except OSError:
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


def leg_of(domain: dict[str, Any], group: str) -> dict[str, Any]:
    """One leg of a domain's description."""
    leg: dict[str, Any] = next(leg for leg in domain["legs"] if leg["group"] == group)
    return leg


def start_manager(directory: Path) -> subprocess.Popen[bytes]:
    """Start a manager of our own, away from any that runs on this machine."""
    run = directory / "run"
    os.environ["STANDFAST_RUN"] = str(run)
    command = [str(STANDFAST), "serve", "--state", str(directory / "state"), "--run", str(run)]
    show([*command, "&"])
    with (directory / "serve.log").open("wb") as log:
        manager = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    ready = [str(STANDFAST), "status"]
    wait_for(lambda: subprocess.run(ready, capture_output=True).returncode == 0, "the manager")
    return manager


def start_load(directory: Path, uri: str) -> subprocess.Popen[bytes]:
    """fio: 32 verified requests in flight on the disk's address."""
    command = [
        "fio", "--name=load", "--thread", "--ioengine=nbd", f"--uri={uri}", "--rw=randrw", "--bs=4k", "--iodepth=32",
        "--size=140m", "--time_based", f"--runtime={LOAD_S}", "--verify=crc32c", "--verify_backlog=1024",
        "--verify_fatal=1", "--verify_state_save=0", "--output-format=json", f"--output={directory / 'fio.json'}",
    ]  # fmt: skip
    show(command)
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, cwd=directory)


def demonstrate(cleanup: ExitStack) -> None:
    """The whole story. Raises DemoError when something does not hold."""
    directory = Path(tempfile.mkdtemp(prefix="standfast-"))
    cleanup.callback(shutil.rmtree, directory, ignore_errors=True)
    devices = Devices(directory)
    cleanup.callback(devices.close)

    say("Five devices on “other machines”")
    alpha = [devices.start(f"alpha{number}", "50M") for number in (1, 2, 3)]
    beta = [devices.start(f"beta{number}", "75M") for number in (1, 2)]

    say("A manager, two groups of different geometry, a domain over both, a disk in it")
    cleanup.callback(end, start_manager(directory))
    standfast("group", "create", "alpha", *(part for url in alpha for part in ("--device", url)))
    standfast("group", "create", "beta", *(part for url in beta for part in ("--device", url)))
    standfast(
        "domain", "create", "vol1", "--size", "140M", "--active", "alpha", "--backup", "beta",
        "--replication", "sync",
    )  # fmt: skip
    standfast("disk", "create", "vol1/disk1", "--size", "140M")
    standfast("domain", "wait", "vol1", "--timeout", "60")

    before = ask("domain", "show", "vol1")
    uri = ask("disk", "show", "vol1/disk1")["nbd_uri"]
    show_map("The map before", leg_of(before, before["active"]))
    print(f"The disk's address: {uri}")

    say("A verified load on that address, and in the middle of it one of alpha's devices dies")
    load = start_load(directory, uri)
    cleanup.callback(end, load)
    time.sleep(KILL_AFTER_S)
    sockets = client_sockets(load.pid)
    devices.kill("alpha2")
    time.sleep(1)
    kept = sockets & client_sockets(load.pid)
    status = load.wait(LOAD_S * 4)

    say("What became of it")
    after = ask("domain", "show", "vol1")
    report = (directory / "fio.json").read_text()
    result = json.loads(report[report.find("{") :])["jobs"][0]  # fio puts a greeting before it
    done = result["read"]["total_ios"] + result["write"]["total_ios"]
    failover = after["last_failover"] or {}
    standfast("domain", "show", "vol1")
    standfast("events")
    print()
    show_map("The map before", leg_of(before, "alpha"))
    show_map("The map after", leg_of(after, "beta"))
    print()
    checks = {
        f"the address is unchanged: {uri}": ask("disk", "show", "vol1/disk1")["nbd_uri"] == uri,
        "the client's connection is unchanged": bool(sockets) and kept == sockets,
        f"fio finished {done} requests with no error and no verify failure": status == 0
        and result["error"] == 0
        and done > 0,
        f"active was {before['active']} and is now {after['active']}": (before["active"], after["active"])
        == ("alpha", "beta"),
        "the map had 3 extents and has 2 now": (
            leg_of(before, "alpha")["extent_count"],
            leg_of(after, "beta")["extent_count"],
        )
        == (3, 2),
        f"the client waited {failover.get('stall_ms') or float('nan'):.1f} ms at most": failover.get(
            "stall_ms"
        )
        is not None,
    }
    for text, held in checks.items():
        print(f"  {'✔' if held else '✘'} {text}")
    if not all(checks.values()):
        raise DemoError("not everything held")


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process in order, or else at once."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def interrupted(number: int, frame: FrameType | None) -> None:
    """End as on ^C, whatever signal asks for it."""
    raise KeyboardInterrupt


def main() -> int:
    """Run the demonstration; 0 only if all of it held."""
    signal.signal(signal.SIGTERM, interrupted)
    signal.signal(signal.SIGINT, interrupted)
    with ExitStack() as cleanup:
        try:
            demonstrate(cleanup)
        except (DemoError, OSError, ValueError, subprocess.SubprocessError) as error:
            print(f"\ndemo: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\ndemo: interrupted; cleaning up", file=sys.stderr)
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
