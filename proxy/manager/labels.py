"""Which generation the labels of a group have: written anew at each opening, so that a restored device shows.

A device brought back from a backup has an older label than the store says, and a store brought back from one
knows of fewer labels than there are. The store is told before labels are written (they may be there) and after
(they are); what a crash leaves is somewhere between the two.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from proxy.model import Group, GroupId
from proxy.store import Store


@dataclass(frozen=True, slots=True)
class LabelOrder:
    """What a domain server needs to label a group's devices.

    ``generation`` is to be written, ``allowed`` says what may be found; ``written`` is to be called when all
    are, and raises StoreError.
    """

    generation: int
    allowed: dict[str, int | bool]
    written: Callable[[], None]


class GroupLabels:
    """The labels of one group, whichever domains use it: one writer at a time.

    Args:
        store: the manager's.
        group: whose.
    """

    def __init__(self, store: Store, group: GroupId) -> None:
        self._store = store
        self._group = group
        self._lock = trio.Lock()

    @asynccontextmanager
    async def begun(self, *, stale_welcome: bool) -> AsyncIterator[LabelOrder]:
        """Labels are written for as long as the context lasts. Raises StoreError."""
        async with self._lock:
            least, most = self._store.label_generations(self._group)
            fresh = most + 1
            self._store.set_label_generations(self._group, least, fresh)
            yield LabelOrder(
                fresh,
                {"least": least, "most": most, "stale_welcome": stale_welcome},
                lambda: self._store.set_label_generations(self._group, fresh, fresh),
            )


class Labels:
    """The labels of all groups of a manager."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._groups: dict[GroupId, GroupLabels] = {}

    def of(self, group: Group) -> GroupLabels:
        """Those of one group."""
        return self._groups.setdefault(group.id, GroupLabels(self._store, group.id))
