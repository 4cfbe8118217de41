"""Opening legs in a domain server that does as told; the server and the store are scripts."""

from typing import Any, cast
from uuid import UUID

import trio

from proxy.errors import StoreError
from proxy.failover import Evidence
from proxy.manager.labels import GroupLabels
from proxy.manager.legs import Legs, Numbers
from proxy.manager.link import Link
from proxy.manager.settings import Settings
from proxy.model import Group, GroupId, Layout, LayoutKind
from proxy.store import Store


class ObedientLink:
    """A link to a server that does whatever it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    async def call(self, operation: str, **arguments: Any) -> list[str]:
        await trio.lowlevel.checkpoint()
        self.calls.append((operation, arguments["leg"]))
        return []


class FillingStore:
    """A store whose disk is full once a label is about to be written."""

    def __init__(self) -> None:
        self.is_full = False

    def label_generations(self, group: GroupId) -> tuple[int, int]:
        return 1, 1

    def set_label_generations(self, group: GroupId, labelled: int, generation: int) -> None:
        if self.is_full:
            raise StoreError("the disk under the store is full")
        self.is_full = True


async def test_connect_of_a_leg_whose_labels_cannot_be_recorded_closes_it_again() -> None:
    link = ObedientLink()
    group = Group(GroupId(1), UUID(int=1), "alpha", Layout(LayoutKind.LINEAR), ())
    legs = Legs(cast(Link, link), Settings(), Numbers())
    labels = GroupLabels(cast(Store, FillingStore()), group.id)
    result = await legs.connect(group, (), labels, fresh=True, stale_welcome=False)
    assert isinstance(result, Evidence)
    assert link.calls == [("open-leg", 1), ("close-leg", 1)]
