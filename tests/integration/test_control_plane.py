"""The control plane at its worst moments: a manager or a domain server that dies or hangs between two steps.

Real processes are killed and stopped where a step has begun and not ended; that it has is seen from
outside, in what the manager shows, in a socket, or in the list of processes.
"""

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from backends import open_device
from proxy.manager.supervisor import STATUS_PATIENCE_S, STOP_PATIENCE_S
from tests.integration.site import BLOCK, Site, Witness, domain_servers
from tests.integration.test_failover import QUICK

pytestmark = [
    pytest.mark.skipif(shutil.which("nbdkit") is None, reason="nbdkit is not installed"),
    pytest.mark.slow,
]

#: For what comes to be in a moment, on a machine that is busy.
PATIENCE_S = 15
#: What a process takes to end besides what it waits for.
ENDING_S = 8

# --- Parts ------------------------------------------------------------------------------------------


@asynccontextmanager
async def started(settings: str, *, keep_domains: bool = True) -> AsyncIterator[Site]:
    """A site of which nothing is left afterwards, not even domain servers that nobody knows of.

    ``keep_domains``: those of its manager go on when it is told to end.
    """
    made = Site(settings=settings)
    try:
        if keep_domains:
            await made.start_manager()
        else:
            await start_manager_that_ends_domains(made)
        yield made
    finally:
        with trio.CancelScope(shield=True):
            if made.manager is not None:
                made.kill_manager()  # first, since it would start them anew
            for server in domain_servers(made):
                with suppress(ProcessLookupError):
                    os.kill(server, signal.SIGKILL)
            await made.close()


async def wait_another_server(made: Site, before: Iterable[int] = ()) -> None:
    """Return when the process of a domain server exists besides those ``before``."""
    with trio.fail_after(PATIENCE_S):
        while not domain_servers(made) - set(before):
            await trio.sleep(0.005)


def launch(made: Site) -> None:
    """Start a manager that ends its domains with it; it is not ready yet."""
    with (made.directory / "serve.log").open("ab") as log:
        made.manager = subprocess.Popen(
            [
                *(sys.executable, "-m", "proxy.cli.main", "serve"),
                *("--state", str(made.state), "--run", str(made.run)),
                *("--config", str(made.directory / "config.toml")),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


async def start_manager_that_ends_domains(made: Site) -> None:
    """Start such a manager, and wait until it is ready."""
    launch(made)
    with trio.fail_after(PATIENCE_S):
        while True:
            with suppress(httpx.TransportError):
                await made.order("GET", "/status")
                return
            await trio.sleep(0.02)


async def end_manager(made: Site, limit_s: float = ENDING_S) -> int:
    """Tell the manager to end; its exit status."""
    assert made.manager is not None
    made.manager.send_signal(signal.SIGTERM)
    return await trio.to_thread.run_sync(made.manager.wait, limit_s)


async def make_small(made: Site, **more: Any) -> None:
    """Group alpha, a file, a domain on it alone, and a disk ``disk1``."""
    url = f"file://{made.images}/alpha1?size=50M"
    await made.order("POST", "/groups", name="alpha", devices=[url])
    await made.order("POST", "/domains", name="vol1", size="40M", active="alpha", **more)
    await made.order("POST", "/domains/vol1/disks", name="disk1", size="10M")


async def slow_device(made: Site, name: str, megabytes: int, *, write_ms: int) -> str:
    """Start a device that takes its time for every write; its URL."""
    image, path = made.images / name, made.directory / f"{name}.sock"
    image.touch()
    os.truncate(image, megabytes << 20)
    command = ["nbdkit", "-f", "-U", str(path), "--filter=delay", "file", str(image)]
    made.devices[name] = subprocess.Popen(
        [*command, f"wdelay={write_ms}ms"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    with trio.fail_after(PATIENCE_S):
        while True:
            with suppress(OSError):
                await (await trio.open_unix_socket(path)).aclose()
                return f"nbd+unix:///?socket={path}"
            await trio.sleep(0.01)


@asynccontextmanager
async def silent(made: Site, name: str) -> AsyncIterator[trio.socket.SocketType]:
    """In place of a device, a listener that never says a word to whom it accepts."""
    made.kill_device(name)
    path = made.directory / f"{name}.sock"
    path.unlink()
    with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM) as listener:
        await listener.bind(str(path))
        listener.listen()
        yield listener


async def attempt(made: Site, path: str, **body: str) -> None:
    """Give an order, whatever comes of it."""
    with suppress(httpx.TransportError):
        await made.http.post(path, json=body)


async def wait_in_flight(made: Site, **counts: int) -> None:
    """Return when so many requests, by group, are at devices of ``vol1`` that have not answered."""
    with trio.fail_after(PATIENCE_S):
        while True:
            legs = {leg["group"]: leg["devices"] for leg in (await made.show())["legs"]}
            found = {group: sum(one.get("in_flight", 0) for one in legs[group]) for group in counts}
            if found == counts:
                return
            await trio.sleep(0.01)


async def wait_event(made: Site, text: str) -> None:
    """Return when the newest event says ``text``."""
    with trio.fail_after(PATIENCE_S):
        while text not in (await made.events())[-1]:
            await trio.sleep(0.01)


async def write(made: Site, data: bytes) -> None:
    """Write the first block of the disk."""
    async with await open_device(made.uri()) as client:
        await client.write(0, data)


async def read(made: Site) -> bytes:
    """The first block of the disk."""
    async with await open_device(made.uri()) as client:
        return await client.read(0, BLOCK)


def copy_store(source: Path, target: Path) -> None:
    """Make ``target`` the same database as ``source``, whose manager may be running."""
    with closing(sqlite3.connect(source)) as copied, closing(sqlite3.connect(target)) as copy:
        copied.backup(copy)


def are_uptodate(shown: Any) -> bool:
    """Whether all legs of a domain are."""
    return all(leg["state"] == "uptodate" for leg in shown["legs"])


def letter(text: str) -> bytes:
    """A block full of one letter."""
    return text.encode() * BLOCK


# --- What may never be read -------------------------------------------------------------------------


async def test_manager_killed_while_an_unclean_domain_waits_to_start_the_next_resyncs_it() -> None:
    async with started("deadline_ms = 20000\nquarantine_s = 0.6\n") as made:
        await made.make(disk_size="10M")
        await write(made, letter("A"))
        await made.stop_device("beta1")
        before = made.server_pid("vol1")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, made, letter("B"))
            await wait_in_flight(made, alpha=0, beta=1)  # alpha has it, beta never will
            nursery.cancel_scope.cancel()
        made.kill_server("vol1")
        made.kill_device("beta1")
        await made.device("beta1", 75)
        await made.wait_new_server("vol1", before)
        await wait_event(made, "did not end cleanly")
        told = len(await made.events())
        made.kill_manager()
        await made.start_manager()
        await made.wait("vol1", lambda shown: shown["state"] == "online")
        assert "domain vol1: beta is being synced" in (await made.events())[told:]
        found = await read(made)
        await made.order("POST", "/domains/vol1/failover")
        assert await read(made) == found


async def test_disk_removed_with_a_write_in_flight_a_new_disk_in_its_place_never_shows_it() -> None:
    async with started("deadline_ms = 5000\n") as made:
        url = await slow_device(made, "alpha1", 50, write_ms=300)
        await made.order("POST", "/groups", name="alpha", devices=[url])
        await made.order("POST", "/domains", name="vol1", size="40M", active="alpha")
        await made.order("POST", "/domains/vol1/disks", name="disk1", size="10M")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, made, letter("X"))
            await wait_in_flight(made, alpha=1)
            nursery.cancel_scope.cancel()
        await made.order("DELETE", "/domains/vol1/disks/disk1?force=true")
        await made.order("POST", "/domains/vol1/disks", name="disk2", size="10M")
        async with await open_device(made.uri(disk="disk2")) as client:
            assert await client.read(0, BLOCK) == bytes(BLOCK)
            await client.write(BLOCK, letter("Y"))  # sent later, so by its answer the old one has landed
            assert await client.read(0, BLOCK) == bytes(BLOCK)


async def test_quarantine_outlasts_a_stop_and_start_of_the_domain() -> None:
    quarantine_s = 0.6
    async with started(f"deadline_ms = 300\nquarantine_s = {quarantine_s}\n") as made:
        await made.make(disk_size="10M")
        await made.stop_device("alpha1")
        await write(made, letter("Z"))
        assert (await made.show())["active"] == "beta"
        await made.stop()
        await made.order("POST", "/domains/vol1/start")
        made.kill_device("alpha1")
        await made.device("alpha1", 50)
        began = trio.current_time()
        await made.order("POST", "/domains/vol1/resync")
        assert trio.current_time() - began >= quarantine_s
        await made.wait("vol1", lambda shown: shown["state"] == "online")


async def test_resync_of_two_legs_domain_server_killed_in_it_never_mixes_them_up() -> None:
    reopen_interval_s = 0.1
    async with started(f"quarantine_s = 0\nreopen_interval_s = {reopen_interval_s}\n") as made:
        for group in ("alpha", "beta", "gamma"):
            url = f"file://{made.images}/{group}1?size=50M"
            await made.order("POST", "/groups", name=group, devices=[url])
        await made.order(
            "POST", "/domains", name="vol1", size="40M", active="alpha", backups=["beta", "gamma"]
        )
        await made.order("POST", "/domains/vol1/disks", name="disk1", size="10M")
        await made.wait("vol1", are_uptodate)
        witness = Witness(made.socket())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(witness.run, reconnect=True))
            for delay_s in (0.02, 0.05, 0.1):
                await trio.sleep(reopen_interval_s)  # no leg is opened anew sooner than this
                await made.order("POST", "/domains/vol1/failover")
                outdated = await lose_backups(made)
                assert len(outdated) == 2
                await kill_server_between_opening_and_use(made, outdated, delay_s)
                await made.wait("vol1", lambda shown: shown["state"] in ("online", "degraded"))
                for leg in (await made.show())["legs"]:
                    if leg["state"] == "outdated":
                        await made.order("POST", "/domains/vol1/resync", group=leg["group"])
                await made.wait("vol1", are_uptodate)
            nursery.cancel_scope.cancel()
        assert not [event for event in await made.events() if "obey" in event]
        for _ in range(2):
            await witness.check_all()
            await made.order("POST", "/domains/vol1/failover")
        await witness.check_all()


async def lose_backups(made: Site) -> list[str]:
    """Have the domain start anew while the files of its backups are not there; the legs that are outdated then."""
    shown = await made.show()
    images = [made.images / f"{leg['group']}1" for leg in shown["legs"] if leg["role"] == "backup"]
    for image in images:
        image.rename(image.with_suffix(".aside"))
    before = made.server_pid("vol1")
    made.kill_server("vol1")
    await made.wait_new_server("vol1", before)
    shown = await made.wait("vol1", lambda shown: shown["state"] == "degraded")
    for image in images:
        image.with_suffix(".aside").rename(image)
    return [leg["group"] for leg in shown["legs"] if leg["state"] == "outdated"]


async def kill_server_between_opening_and_use(made: Site, outdated: list[str], delay_s: float) -> None:
    """Resync these legs; the manager learns that they were opened and that the domain server died at once."""
    assert made.manager is not None
    server = made.server_pid("vol1")
    images = [made.images / f"{group}1" for group in outdated]
    await wait_open(server, images, count=0)
    await made.show()  # asks the domain server, so the manager has heard that it let go of them
    os.kill(server, signal.SIGSTOP)
    is_one_refused = trio.Event()

    async def resync() -> None:
        await attempt(made, "/domains/vol1/resync")
        is_one_refused.set()

    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(resync)
        with trio.fail_after(PATIENCE_S):
            await is_one_refused.wait()  # so the other has begun
        made.manager.send_signal(signal.SIGSTOP)
        os.kill(server, signal.SIGCONT)
        await wait_open(server, images, count=len(images))
        await trio.sleep(delay_s)  # nothing shows when it has said so; each time it dies at another moment
        os.kill(server, signal.SIGKILL)
        made.manager.send_signal(signal.SIGCONT)
    await made.wait_new_server("vol1", server)


async def wait_open(process: int, files: Iterable[Path], *, count: int) -> None:
    """Return when a process has so many of these files open."""
    with trio.fail_after(PATIENCE_S):
        while sum(is_open(process, file) for file in files) != count:
            await trio.sleep(0.005)


def is_open(process: int, file: Path) -> bool:
    """Whether a process has a file open."""
    for descriptor in Path(f"/proc/{process}/fd").iterdir():
        with suppress(OSError):
            if descriptor.samefile(file):
                return True
    return False


# --- What hangs keeps nothing else waiting ----------------------------------------------------------


async def test_failover_while_another_leg_hangs_in_its_opening_is_not_kept_waiting() -> None:
    async with started("deadline_ms = 5000\nquarantine_s = 0.3\n") as made:
        for group in ("alpha", "beta", "gamma"):
            await made.order("POST", "/groups", name=group, devices=[await made.device(f"{group}1", 50)])
        await made.order(
            "POST", "/domains", name="vol1", size="40M", active="alpha", backups=["beta", "gamma"]
        )
        await made.order("POST", "/domains/vol1/disks", name="disk1", size="10M")
        await made.wait("vol1", are_uptodate)
        async with (
            silent(made, "gamma1") as listener,
            await open_device(made.uri()) as client,
            trio.open_nursery() as nursery,
        ):
            await made.wait("vol1", lambda shown: shown["legs"][2]["state"] == "outdated")
            nursery.start_soon(attempt, made, "/domains/vol1/resync")
            opening, _ = await listener.accept()
            with opening:
                began = trio.current_time()
                made.kill_device("alpha1")
                await client.write(0, letter("A"))
                assert trio.current_time() - began < 1
            nursery.cancel_scope.cancel()
        assert (await made.show())["active"] == "beta"


async def test_resync_device_that_does_not_answer_is_refused_and_can_be_tried_again() -> None:
    async with started(QUICK) as made:
        await made.make(disk_size="10M")
        await made.stop_device("alpha1")
        await write(made, letter("A"))
        for _ in range(2):
            assert "alpha cannot be synced" in await made.refused("POST", "/domains/vol1/resync")
        made.devices["alpha1"].send_signal(signal.SIGCONT)
        await made.order("POST", "/domains/vol1/resync")
        await made.wait("vol1", lambda shown: shown["state"] == "online")


async def test_start_and_stop_of_a_domain_at_once_both_return() -> None:
    async with started("deadline_ms = 5000\nquarantine_s = 0.3\n") as made:
        await made.order("POST", "/groups", name="beta", devices=[await made.device("beta1", 50)])
        await make_small(made, backups=["beta"])
        await made.order("POST", "/domains/vol1/stop")
        with trio.fail_after(PATIENCE_S):
            async with silent(made, "beta1") as listener, trio.open_nursery() as nursery:
                nursery.start_soon(attempt, made, "/domains/vol1/start")
                opening, _ = await listener.accept()
                with opening:
                    await made.order("POST", "/domains/vol1/stop")
        assert (await made.show())["state"] == "maintenance"


async def test_domain_server_stopped_is_shown_all_the_same_and_ends_with_the_manager() -> None:
    async with started(QUICK, keep_domains=False) as made:
        await make_small(made)
        os.kill(made.server_pid("vol1"), signal.SIGSTOP)
        with trio.fail_after(STATUS_PATIENCE_S + 3):
            await made.order("GET", "/status")
            assert (await made.show())["statistics"] is None
        assert await end_manager(made, STOP_PATIENCE_S + ENDING_S) == 0
        assert not domain_servers(made)


# --- Nobody serves whom nobody knows ----------------------------------------------------------------


async def test_sigterm_while_a_domain_server_is_started_anew_leaves_none() -> None:
    async with started(QUICK, keep_domains=False) as made:
        await make_small(made)
        before = domain_servers(made)
        made.kill_server("vol1")
        await wait_another_server(made, before)
        assert await end_manager(made) == 0
        assert not domain_servers(made)


async def test_domain_removed_while_its_server_is_started_anew_leaves_none() -> None:
    async with started(QUICK) as made:
        await make_small(made)
        before = domain_servers(made)
        made.kill_server("vol1")
        await wait_another_server(made, before)
        await made.order("DELETE", "/domains/vol1?force=true")
        assert not domain_servers(made)
        assert not (made.run / "vol1").exists()


async def test_sigterm_while_a_domain_is_made_leaves_no_domain_server() -> None:
    async with started(QUICK, keep_domains=False) as made:
        url = f"file://{made.images}/alpha1?size=50M"
        await made.order("POST", "/groups", name="alpha", devices=[url])
        async with trio.open_nursery() as nursery:
            body = {"name": "vol1", "size": "40M", "active": "alpha"}
            nursery.start_soon(partial(attempt, made, "/domains", **body))
            await wait_another_server(made)
            assert await end_manager(made) == 0
        assert not domain_servers(made)


async def test_manager_died_while_it_started_a_domain_the_next_opens_the_tcp_door() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    async with started(QUICK) as made:
        await make_small(made, listen=f"127.0.0.1:{port}")
        before = domain_servers(made)
        made.kill_manager()
        made.kill_server("vol1")
        launch(made)
        await wait_another_server(made, before)
        made.kill_manager()
        await made.start_manager()
        await made.wait("vol1", lambda shown: shown["state"] == "online")
        async with await open_device(f"nbd://127.0.0.1:{port}/disk1") as client:
            assert await client.read(0, BLOCK) == bytes(BLOCK)


async def test_manager_with_another_store_on_the_same_run_directory_touches_no_foreign_server() -> None:
    async with started(QUICK) as made:
        await make_small(made)
        server = made.server_pid("vol1")
        async with await open_device(made.uri()) as client:
            await client.write(0, letter("A"))
            made.kill_manager()
            made.state = made.directory / "state2"
            await made.start_manager()
            url = f"file://{made.images}/new?size=50M"
            await made.order("POST", "/groups", name="alpha", devices=[url])
            order = {"name": "vol1", "size": "40M", "active": "alpha"}
            refusal = await made.refused("POST", "/domains", **order)
            assert f"pid {server}" in refusal and "another --run directory" in refusal
            assert await made.order("GET", "/domains") == []
            await client.write(0, letter("B"))
            assert await client.read(0, BLOCK) == letter("B")
        assert made.server_pid("vol1") == server
        assert await read(made) == letter("B")


async def test_store_older_than_the_running_domain_server_is_not_believed() -> None:
    async with started(QUICK) as made:
        await made.make(server=None, disk_size="10M")
        server = made.server_pid("vol1")
        kept = made.directory / "kept.db"
        copy_store(made.state / "standfast.db", kept)
        older = (await made.show())["map_generation"]
        newer = (await made.order("POST", "/domains/vol1/failover"))["map_generation"]
        async with await open_device(made.uri()) as client:
            made.kill_manager()
            copy_store(kept, made.state / "standfast.db")
            await made.start_manager()
            shown = await made.wait("vol1", lambda shown: "older" in shown["trouble"])
            assert f"generation {older}" in shown["trouble"] and f"({newer})" in shown["trouble"]
            await client.write(0, letter("A"))
        assert domain_servers(made) == {made.server_pid("vol1")} == {server}


# --- Orders are refused rather than half done -------------------------------------------------------


async def test_group_two_urls_of_one_export_is_refused_and_the_device_left_as_it_was() -> None:
    async with started(QUICK) as made:
        image = made.images / "one"
        head = bytes(range(256)) * 256
        image.write_bytes(head)
        os.truncate(image, 50 << 20)
        url = await made.device("one", 50)
        other = made.directory / "other.sock"
        other.symlink_to(made.directory / "one.sock")
        for urls in ([url, f"nbd+unix:///?socket={other}"], [f"file://{image}", url]):
            await made.refused("POST", "/groups", name="twice", devices=urls)
            with image.open("rb") as file:
                assert file.read(len(head)) == head
        assert await made.order("GET", "/groups") == []


async def test_failover_ordered_to_a_leg_lost_on_the_way_is_refused() -> None:
    async with started("deadline_ms = 1000\nquarantine_s = 0.3\n") as made:
        await made.make(disk_size="10M")
        await made.stop_device("beta1")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, made, letter("A"))
            await wait_in_flight(made, alpha=0, beta=1)
            answer = await made.http.post("/domains/vol1/failover", json={"to": "beta"})
        assert answer.status_code == 409
        assert "lost on the way" in answer.json()["error"]
        assert (await made.show())["active"] == "alpha"
        assert await read(made) == letter("A")
