"""A domain server's commands, given over a real link; no devices and no clients."""

from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import trio
import trio.testing

from proxy.domainserver.control import Server
from proxy.domainserver.doors import Doors
from proxy.engine import LegRole, SimulatedEngine
from proxy.errors import NBD_ERROR_BY_ERRNO
from proxy.label import Label
from proxy.manager.link import CommandError, Link
from tests.sim.rig import Client, Rig, pattern

KIB = 1024
LABEL = Label(UUID(int=1), UUID(int=2), "alpha", 0, 1, 1 << 20, 65536, 0).encode()


@asynccontextmanager
async def a_manager(server: Server) -> AsyncIterator[Link]:
    """A manager's link to the server."""
    ours, theirs = trio.testing.memory_stream_pair()
    link = Link(ours)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_manager, theirs)
        nursery.start_soon(link.run)
        yield link
        nursery.cancel_scope.cancel()


def a_server(directory: Path) -> Server:
    engine = SimulatedEngine(nbd_errors=dict(NBD_ERROR_BY_ERRNO), deadline_ns=1_000_000_000)
    return Server("vol", directory, engine=engine, doors=Doors(engine, "vol"))


async def test_close_leg_of_a_leg_that_is_gone_does_nothing(tmp_path: Path) -> None:
    async with a_manager(a_server(tmp_path)) as link:
        assert await link.call("close-leg", leg=3) is None


async def test_hello_to_a_later_manager_tells_the_largest_number_that_a_leg_has_had(tmp_path: Path) -> None:
    server = a_server(tmp_path)
    async with a_manager(server) as link:
        device = {"url": "memory:absent", "label": b64encode(LABEL).decode(), "ranges": []}
        for number in (7, 5):
            with pytest.raises(CommandError, match="no memory of that name"):
                await link.call(
                    "open-leg",
                    leg=number,
                    group="alpha",
                    uuid=str(UUID(int=2)),
                    devices=[device],
                    labels={"least": 0, "most": 0, "stale_welcome": False},
                    timeout_s=1,
                )
    async with a_manager(server) as link:
        assert (await link.call("hello"))["last_leg"] == 7


async def test_verify_before_the_end_of_another_is_taken_in_is_refused(tmp_path: Path) -> None:
    rig = Rig()
    legs = [rig.add_leg(number, [65536]) for number in (1, 2)]
    server = Server("vol", tmp_path, engine=rig.engine, doors=Doors(rig.engine, "vol"))
    rig.engine.install(1, [(1, LegRole.ACTIVE), (2, LegRole.BACKUP)], [(0, 65536, [leg.map for leg in legs])])
    rig.engine.release()
    async with a_manager(server) as link:
        order: dict[str, Any] = {"ranges": [(0, 0, 65536)], "rate": 0, "repair": False}
        await link.call("verify", **order)
        while (report := rig.engine.verify_report()) is None or report.running:
            rig.engine.step()
            for op in rig.engine.pending():
                rig.engine.complete(op.number, op.length, bytes(op.length))
        with pytest.raises(CommandError, match="is being verified already"):
            await link.call("verify", **order)
        await link.call("verify", **order)  # by now it is


async def test_stop_with_a_write_that_some_leg_has_not_is_not_clean(tmp_path: Path) -> None:
    rig = Rig()
    for number in (1, 2):
        rig.add_leg(number, [65536])
    server = Server("vol", tmp_path, engine=rig.engine, doors=Doors(rig.engine, "vol"))
    client = rig.start(1, 2)
    server._held, server._generation = False, 1
    client.write(0, bytes(range(1, 5)) * 1024)
    rig.pump()
    rig.carry_out_all(1)
    rig.fail(rig.op(2))
    rig.pump()
    await server.stop()
    assert not server.clean


@asynccontextmanager
async def at_work(rig: Rig, server: Server) -> AsyncIterator[None]:
    """The engine's devices act, and what it tells is taken in by the server, for as long as the context lasts."""

    async def act() -> None:
        while True:
            rig.engine.step()
            for op in rig.file_ops():
                rig.carry_out(op)
            await server._pass_events()
            await trio.sleep(0.001)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(act)
        yield
        nursery.cancel_scope.cancel()


def lagging(directory: Path) -> tuple[Rig, Client, Server]:
    """An asynchronous domain of two legs, the second of which has yet to get a write."""
    rig = Rig()
    for number in (1, 2):
        rig.add_leg(number, [64 * KIB])
    rig.open_bitmap(64 * KIB)
    rig.install(1, 2, backlog=64 * KIB)
    rig.engine.release()
    server = Server("vol", directory, engine=rig.engine, doors=Doors(rig.engine, "vol"))
    server._held, server._generation = False, 1
    client = rig.connect()
    cookie = client.write(0, pattern(4 * KIB))
    rig.pump()
    rig.carry_out(rig.bitmap_ops()[0])
    rig.pump()
    rig.carry_out_all(1)
    assert client.error(cookie) == 0
    return rig, client, server


async def test_stop_waits_for_what_a_leg_has_yet_to_get(tmp_path: Path) -> None:
    rig, _, server = lagging(tmp_path)
    async with at_work(rig, server):
        await server.stop()
    assert server.clean
    assert rig.legs[2].read(0, 4 * KIB) == pattern(4 * KIB)


async def test_stop_while_a_round_of_the_bitmap_waits_for_a_leg_is_clean_all_the_same(tmp_path: Path) -> None:
    rig, _, server = lagging(tmp_path)
    for _ in range(3):
        rig.engine.now_ns += rig.engine.round_every_ns
        rig.engine.step()
    async with at_work(rig, server):
        await server.stop()
    assert server.clean


async def test_stop_with_a_leg_that_fell_behind_is_not_clean(tmp_path: Path) -> None:
    rig, _, server = lagging(tmp_path)
    rig.fail(rig.op(2))
    rig.pump()
    async with at_work(rig, server):
        await server.stop()
    assert not server.clean


async def test_new_disk_is_zeroed_again_on_a_leg_that_came_to_serve_meanwhile(tmp_path: Path) -> None:
    rig, _, server = lagging(tmp_path)
    rig.add_leg(3, [64 * KIB]).fill(pattern(64 * KIB))
    server._active = 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server._zero_range, 0, 0, 64 * KIB)
        async with at_work(rig, server):
            while rig.legs[1].read(0, 64 * KIB) != bytes(64 * KIB):
                await trio.sleep(0)
            rig.engine.hold()
            rig.engine.fence_leg(1)
            rig.engine.fence_leg(2)
            rig.install(3, away=(1, 2), backlog=64 * KIB)
            server._active = 3
            rig.engine.release()
            with trio.fail_after(5):
                while rig.legs[3].read(0, 64 * KIB) != bytes(64 * KIB):
                    await trio.sleep(0)
                while nursery.child_tasks:
                    await trio.sleep(0)
