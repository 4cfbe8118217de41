"""A whole site for a test: a manager, real nbdkit servers as devices, and a witness of what clients see.

Everything is started by this and ended by this, by pid. Paths are short, since a socket's path may have
only 107 bytes.
"""

import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import trio

from backends.nbdnegotiation import ClientNegotiation

BLOCK = 4096


class Site:
    """One manager with its own directories.

    Args:
        settings: lines of its config file.
        state: another place for its store.
    """

    def __init__(self, *, settings: str = "", state: Path | None = None) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="sf"))
        self.images = Path(tempfile.mkdtemp(prefix="sf", dir="/dev/shm"))
        self.run = self.directory / "run"
        self.state = state or self.directory / "state"
        self.devices: dict[str, subprocess.Popen[bytes]] = {}
        self.filters: dict[str, list[str]] = {}  # arguments of nbdkit, by device
        self.manager: subprocess.Popen[bytes] | None = None
        self.command = [sys.executable, "-m", "proxy.cli.main"]
        (self.directory / "config.toml").write_text(settings)
        transport = httpx.AsyncHTTPTransport(uds=str(self.run / "control.sock"))
        self.http = httpx.AsyncClient(transport=transport, base_url="http://standfast", timeout=60)

    # --- Processes --------------------------------------------------------------------------------

    async def start_manager(self) -> None:
        """Start the manager, and wait until it is ready."""
        with (self.directory / "serve.log").open("ab") as log:
            self.manager = subprocess.Popen(
                [
                    *(*self.command, "serve", "--keep-domains"),
                    *("--state", str(self.state), "--run", str(self.run)),
                    *("--config", str(self.directory / "config.toml")),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        with trio.fail_after(30):
            while True:
                try:
                    (await self.http.get("/status")).raise_for_status()
                    return
                except httpx.TransportError:
                    assert self.manager.poll() is None, (self.directory / "serve.log").read_text()
                    await trio.sleep(0.02)

    def kill_manager(self) -> None:
        """End the manager as a crash would."""
        assert self.manager is not None
        self.manager.kill()
        self.manager.wait()

    def kill_server(self, domain: str) -> None:
        """End a domain server as a crash would."""
        os.kill(self.server_pid(domain), signal.SIGKILL)

    def server_pid(self, domain: str) -> int:
        """The process that serves a domain."""
        return int((self.run / domain / "lock").read_text().split()[0])

    async def device(self, name: str, megabytes: int, *, server: str = "nbdkit") -> str:
        """Start a server (nbdkit, qemu-nbd) of an image, made when absent; its URL."""
        image = self.images / name
        if not image.exists():
            with image.open("wb") as file:
                file.truncate(megabytes << 20)
        socket = self.directory / f"{name}.sock"
        socket.unlink(missing_ok=True)
        commands = {
            "nbdkit": ["nbdkit", "-f", "-U", str(socket), "file", str(image), *self.filters.get(name, [])],
            "qemu-nbd": ["qemu-nbd", "-t", "-e", "8", "-f", "raw", "-k", str(socket), str(image)],
        }
        self.devices[name] = subprocess.Popen(
            commands[server], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        with trio.fail_after(20):
            while True:
                try:
                    await (await trio.open_unix_socket(socket)).aclose()
                    return f"nbd+unix:///?socket={socket}"
                except OSError:
                    await trio.sleep(0.01)

    def fail_reads(self, name: str) -> Path:
        """Have a device, not started yet, fail every read for as long as the file that is returned exists."""
        trigger = self.directory / f"{name}.bad"
        self.filters[name] = ["--filter=error", "error-pread=EIO", "error-pread-rate=100%"]
        self.filters[name].append(f"error-pread-file={trigger}")
        return trigger

    def kill_device(self, name: str) -> None:
        """End a device as a crash would."""
        self.devices[name].kill()
        self.devices[name].wait()

    async def stop_device(self, name: str) -> None:
        """Have a device hang; returns once none of its threads can answer anything any more."""
        process = self.devices[name]
        process.send_signal(signal.SIGSTOP)
        with trio.fail_after(20):
            # The signal is taken by one thread, which stops the others as soon as it is its turn.
            while any(
                stat.read_text().rpartition(")")[2].split()[0] != "T"
                for stat in Path(f"/proc/{process.pid}/task").glob("*/stat")
            ):
                await trio.sleep(0.001)

    # --- Orders -----------------------------------------------------------------------------------

    async def order(self, method: str, path: str, **body: Any) -> Any:
        """Give an order that succeeds; its answer."""
        answer = await self.http.request(method, path, json=body if method == "POST" else None)
        assert answer.is_success, answer.text
        return answer.json()

    async def refused(self, method: str, path: str, **body: Any) -> str:
        """Give an order that is refused; the line that says why."""
        answer = await self.http.request(method, path, json=body if method == "POST" else None)
        assert answer.is_client_error, answer.text
        error: str = answer.json()["error"]
        assert "\n" not in error
        return error

    async def make(
        self,
        domain: str = "vol1",
        *,
        server: str | None = "nbdkit",
        disk_size: str = "140M",
        replication: str = "sync",
    ) -> None:
        """Groups alpha (3 of 50 MB) and beta (2 of 75 MB), a domain over both, a disk ``disk1`` in it, synced.

        ``server``: of the devices; None: they are files.
        """
        for group, count, megabytes in (("alpha", 3, 50), ("beta", 2, 75)):
            names = [f"{group}{number}" for number in range(1, count + 1)]
            urls = [
                await self.device(name, megabytes, server=server)
                if server is not None
                else f"file://{self.images}/{name}?size={megabytes}M"
                for name in names
            ]
            await self.order("POST", "/groups", name=group, devices=urls)
        legs = {"active": "alpha", "backups": ["beta"]}
        await self.order("POST", "/domains", name=domain, size="140M", replication=replication, **legs)
        await self.order("POST", f"/domains/{domain}/disks", name="disk1", size=disk_size)
        await self.wait(domain, lambda shown: shown["state"] == "online")

    async def stop(self, domain: str = "vol1") -> None:
        """Stop a domain in order, once the domain server has noticed that clients have left."""
        await self.wait(domain, lambda shown: shown["clients"] == 0)
        await self.order("POST", f"/domains/{domain}/stop")

    async def show(self, domain: str = "vol1") -> Any:
        """What the manager shows of a domain."""
        return await self.order("GET", f"/domains/{domain}")

    async def wait(self, domain: str, condition: Callable[[Any], bool], timeout_s: float = 30) -> Any:
        """Return what is shown of a domain as soon as ``condition`` holds of it."""
        version = 0
        shown: Any = None
        with trio.move_on_after(timeout_s):
            while True:
                answer = await self.http.get(
                    f"/domains/{domain}", params={"version": version, "wait_s": 1 if shown else 0}
                )
                shown = answer.json()
                if condition(shown):
                    return shown
                version = shown["version"]
        raise AssertionError(f"never came to be: {shown}; events: {await self.events()}")

    async def wait_active(self, domain: str, group: str) -> Any:
        """Return when a group is the domain's active leg; what is shown of the domain then."""
        return await self.wait(domain, lambda shown: shown["active"] == group)

    async def wait_new_server(self, domain: str, before: int) -> None:
        """Return when a domain is served by another process than ``before``."""
        with trio.fail_after(30):
            while self.server_pid(domain) == before:
                await trio.sleep(0.01)

    async def events(self) -> list[str]:
        """Messages of all events, oldest first."""
        return [event["message"] for event in await self.order("GET", "/events")]

    def socket(self, domain: str = "vol1") -> Path:
        """The stable address."""
        return self.run / domain / "nbd.sock"

    def uri(self, domain: str = "vol1", disk: str = "disk1") -> str:
        """The stable address as clients want it."""
        return f"nbd+unix:///{disk}?socket={self.socket(domain)}"

    async def close(self) -> None:
        """End everything, remove everything."""
        await self.http.aclose()
        if self.manager is not None:
            self.manager.kill()
            self.manager.wait()
        for lock in self.run.glob("*/lock"):
            try:
                server = os.pidfd_open(int(lock.read_text().split()[0]))
            except (OSError, ValueError):
                continue
            signal.pidfd_send_signal(server, signal.SIGKILL)
            with trio.move_on_after(5, shield=True):
                await trio.lowlevel.wait_readable(server)
            os.close(server)
        for process in self.devices.values():
            process.kill()
            process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.rmtree(self.images, ignore_errors=True)


@asynccontextmanager
async def site(*, settings: str = "", state: Path | None = None) -> AsyncIterator[Site]:
    """A site with its manager running."""
    made = Site(settings=settings, state=state)
    try:
        await made.start_manager()
        yield made
    finally:
        with trio.CancelScope(shield=True):
            await made.close()


def domain_servers(made: Site) -> set[int]:
    """Every process that serves a domain of this site, or is about to."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_text(errors="replace").split("\0")
            if "proxy.domainserver" in words and any(word.startswith(f"{made.run}/") for word in words):
                found.add(int(path.parent.name))
    return found


class WitnessError(AssertionError):
    """The disk did not keep its promise."""


class Witness:
    """A client that remembers: every block has a version, and what is read is held against what was promised.

    A write that was answered is never lost; a block that was read at a version is never read at an
    older one; no block is torn. A write whose connection broke may or may not have happened.

    Args:
        socket: the stable address.
        disk: the export.
        blocks: how many blocks of 4 KiB it works on.
        depth: requests in flight.
        seed: of its choices.
    """

    def __init__(
        self, socket: Path, *, disk: str = "disk1", blocks: int = 2000, depth: int = 32, seed: int = 1
    ):
        self._socket = socket
        self._disk = disk
        self._blocks = blocks
        self._depth = depth
        self._random = random.Random(seed)
        self._floor = [0] * blocks  # the oldest version that may be read
        self._issued = [0] * blocks
        self._busy: set[int] = set()
        self.answered = 0
        self.connections = 0
        self.longest_s = 0.0

    async def run(self, *, reconnect: bool = False) -> None:
        """Read and write until cancelled. Raises WitnessError, or OSError unless it may reconnect."""
        while True:
            try:
                await self._converse()
            except (OSError, trio.BrokenResourceError):
                if not reconnect:
                    raise WitnessError("the connection broke") from None
                self._busy.clear()
                await trio.sleep(0.05)

    async def check_all(self) -> None:
        """Read every block once and hold it against what was promised."""
        stream = await self.connect()
        async with stream:
            for block in range(self._blocks):
                floor = self._floor[block]
                await stream.send_all(_request(0, block, block * BLOCK, BLOCK))
                header = await _receive(stream, 16)
                if struct.unpack(">IIQ", header)[1]:
                    raise WitnessError(f"block {block} cannot be read")
                self._check(block, floor, await _receive(stream, BLOCK))

    async def connect(self) -> trio.SocketStream:
        """A connection to the disk, in the transmission phase."""
        stream = await trio.open_unix_socket(self._socket)
        negotiation = ClientNegotiation(self._disk, device="witness")
        while negotiation.remote is None:
            await stream.send_all(negotiation.receive(await stream.receive_some(65536)))
        self.connections += 1
        return stream

    async def _converse(self) -> None:
        stream = await self.connect()
        pending: dict[int, tuple[str, int, int, float]] = {}
        room = trio.Semaphore(self._depth)

        async def ask(nursery: trio.Nursery) -> None:
            cookie = 0
            while True:
                await room.acquire()
                block = self._random.randrange(self._blocks)
                if block in self._busy:
                    room.release()
                    await trio.lowlevel.checkpoint()
                    continue
                self._busy.add(block)
                cookie += 1
                if self._random.random() < 0.5:
                    self._issued[block] += 1
                    version = self._issued[block]
                    pending[cookie] = ("write", block, version, trio.current_time())
                    await stream.send_all(
                        _request(1, cookie, block * BLOCK, BLOCK) + _content(block, version)
                    )
                else:
                    pending[cookie] = ("read", block, self._floor[block], trio.current_time())
                    await stream.send_all(_request(0, cookie, block * BLOCK, BLOCK))

        broken: Exception | None = None
        async with stream, trio.open_nursery() as nursery:
            nursery.start_soon(_ignore_breaks, ask, nursery)
            try:
                while True:
                    magic, error, cookie = struct.unpack(">IIQ", await _receive(stream, 16))
                    kind, block, version, began = pending.pop(cookie)
                    if magic != 0x67446698 or error:
                        raise WitnessError(f"{kind} of block {block} was answered with error {error}")
                    if kind == "read":
                        self._check(block, version, await _receive(stream, BLOCK))
                    else:
                        self._floor[block] = version
                    self._busy.discard(block)
                    self.answered += 1
                    self.longest_s = max(self.longest_s, trio.current_time() - began)
                    room.release()
            except (OSError, EOFError, trio.BrokenResourceError) as failure:
                broken = failure
                nursery.cancel_scope.cancel()
        if broken is not None:
            raise ConnectionError("the connection broke") from broken

    def _check(self, block: int, floor: int, data: bytes) -> None:
        found, version = struct.unpack_from("<QQ", data)
        if version == 0 and data == bytes(BLOCK):
            found = block
        elif data != _content(block, version):
            raise WitnessError(f"block {block} is torn or foreign: says block {found} version {version}")
        if found != block or not floor <= version <= self._issued[block]:
            raise WitnessError(
                f"block {block} has version {version}; it must be {floor} to {self._issued[block]}"
            )
        self._floor[block] = max(self._floor[block], version)


async def _ignore_breaks(work: Callable[[trio.Nursery], Any], nursery: trio.Nursery) -> None:
    # Whoever reads the answers sees the break too, and says so.
    with suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError):
        await work(nursery)


def _request(command: int, cookie: int, offset: int, length: int) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, 0, command, cookie, offset, length)


def _content(block: int, version: int) -> bytes:
    return struct.pack("<QQ", block, version) * (BLOCK // 16)


async def _receive(stream: trio.SocketStream, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = await stream.receive_some(length - len(data))
        if not more:
            raise EOFError
        data += more
    return data
