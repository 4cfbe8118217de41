"""What a session makes of a domain server that a manager before it had; the server is a script."""

import errno
import math
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import pytest
import trio
import trio.testing

from proxy.errors import RefusedError
from proxy.extentmap import Run
from proxy.failover import EvidenceKind, LegRecord, Phase, Record
from proxy.manager.labels import Labels
from proxy.manager.legs import Numbers
from proxy.manager.link import Link
from proxy.manager.session import Item, Session
from proxy.manager.settings import Settings
from proxy.model import Layout, LayoutKind, LegState, Replication
from proxy.store import NewDevice
from proxy.store.sqlite import SqliteStore


class ScriptedLink:
    """A link to a server that says hello as told, and takes every other command."""

    def __init__(self, hello: dict[str, Any]) -> None:
        self.gone = trio.Event()
        self.calls: list[str] = []
        self._hello = hello

    async def call(self, operation: str, **arguments: Any) -> Any:
        await trio.lowlevel.checkpoint()
        self.calls.append(operation)
        if operation == "hello":
            return self._hello
        if operation == "status":
            return {"legs": {number: {"copy": None} for number in self._hello["legs"]}, "verify": None}
        return 1


def a_store() -> SqliteStore:
    """A domain with its one leg on another server."""
    store = SqliteStore(Path(":memory:"))
    device = NewDevice(UUID(int=1), 1 << 20, 65536, "nbd://there/x")
    store.add_group("alpha", UUID(int=2), Layout(LayoutKind.LINEAR), [device], 0.0)
    record = Record(4, "alpha", (LegRecord("alpha", LegState.UPTODATE),))
    runs = {"alpha": [Run(0, 65536, 65536)]}
    store.add_domain("vol", UUID(int=3), 65536, Replication.SYNC, "", record, runs, 0.0)
    return store


def found(**differences: Any) -> dict[str, Any]:
    """A leg in a domain server's hello."""
    plain = {"group": "alpha", "mapped": True, "fenced": False, "copied": False}
    return plain | {"drained": False, "unproven": 0, "against": None} | differences


async def adopted(
    leg: dict[str, Any], nursery: trio.Nursery, *, held: bool = True, bitmap_error: int = 0
) -> Session:
    """A session that has adopted a server which has this leg open as number 9, and perhaps holds."""
    hello = {"generation": 4, "held": held, "last_leg": 9, "verified": None, "legs": {"9": leg}}
    hello["bitmap_error"] = bitmap_error
    post, queue = trio.open_memory_channel[Item](math.inf)
    store = a_store()
    session = Session(
        "vol",
        store=store,
        settings=Settings(),
        link=cast(Link, ScriptedLink(hello)),
        nursery=nursery,
        post=post,
        queue=queue,
        numbers=Numbers(),
        labels=Labels(store),
        bitmap=Path("bitmap"),
        making=set(),
        changed=lambda: None,
    )
    await session.adopt()
    return session


async def test_adopt_of_a_leg_in_use_goes_on_with_it(nursery: trio.Nursery) -> None:
    session = await adopted(found(), nursery)
    assert not session.machine.lost
    assert session.legs.trusted(session.legs.open["alpha"])


async def test_adopt_of_a_leg_opened_and_never_used_holds_until_it_can_be_trusted(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    session = await adopted(found(mapped=False), nursery)
    assert session.machine.phase is Phase.HELD
    assert session.machine.lost["alpha"].kind is EvidenceKind.UNREACHABLE
    leg = session.legs.open["alpha"]
    assert not session.legs.trusted(leg)
    await trio.sleep(Settings().quarantine_s)
    assert session.legs.trusted(leg)


async def test_adopt_of_a_leg_never_used_and_failed_lets_go_of_it(nursery: trio.Nursery) -> None:
    against = {"kind": "DEVICE_LOST", "device": 0, "code": 104}
    session = await adopted(found(mapped=False, against=against), nursery)
    assert not session.legs.open
    assert "close-leg" in cast(ScriptedLink, session.link).calls


async def test_adopt_while_the_bitmap_cannot_be_written_is_told(nursery: trio.Nursery) -> None:
    session = await adopted(found(), nursery, held=False, bitmap_error=errno.ENOSPC)
    told = [event.message for event in session.store.events(0, 100)]
    assert any("the dirty bitmap bitmap cannot be written (No space left on device)" in one for one in told)


async def test_resync_of_a_leg_that_has_left_since_it_was_ordered_is_refused(nursery: trio.Nursery) -> None:
    session = await adopted(found(), nursery, held=False)
    with pytest.raises(RefusedError, match="no leg"):
        session.resyncs.begin("beta")
