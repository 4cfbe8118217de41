"""A simulated manager's process: the service, supervisor, session and store that ship.

Simulated are the process, which can be killed at any moment and around every contact it has with the world (a
transaction, a message), the host on which it finds and starts domain servers, and the disk under its store, which
may be full. The store is SQLite in memory; while it commits, the rest of the world goes on.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol
from uuid import UUID

import trio

from proxy.errors import StandfastError, StoreError
from proxy.manager.link import Link
from proxy.manager.service import Service
from proxy.manager.settings import Settings
from proxy.manager.supervisor import Host
from proxy.model import DomainId, Group, GroupId
from proxy.store import Change, DomainRecord, NewEvent
from proxy.store.sqlite import SqliteStore
from tests.sim.agenda import MILLISECOND_NS, Agenda
from tests.sim.channel import End, connection
from tests.sim.server import DomainServer, Surroundings

DOMAIN = "vol"
RUN = Path("/run/simulated")

#: Times that go with those of simulated devices, and regions small enough for a domain to have several.
SETTINGS = Settings(
    deadline_ms=200,
    probe_interval_s=0.3,
    quarantine_s=0.35,
    reopen_interval_s=0.04,
    bitmap_region_kib=16,
    backlog_kib=64,
    catch_up_s=0.2,
)


class Killed(BaseException):
    """The process that this runs in is dead; it does nothing any more."""


class SimulatedStore(SqliteStore):
    """The store that ships, on a disk that may be full, under managers that die.

    Attributes:
        is_full: it refuses every change.
        contact: called before and after every change; raises ``Killed``.
    """

    def __init__(
        self,
        agenda: Agenda,
        *,
        block: Callable[[int], None],
        changed: Callable[[DomainRecord, DomainRecord], None],
    ) -> None:
        super().__init__(Path(":memory:"))
        self.is_full = False
        self.contact: Callable[[], None] = lambda: None
        self._agenda = agenda
        self._block = block
        self._changed = changed
        self._domains_by_name: dict[str, DomainRecord] = {}
        self._groups: list[Group] = []

    # What is read often, and parsed anew each time, is kept until the next change.

    def groups(self) -> list[Group]:
        """See ``Store.groups``."""
        if not self._domains_by_name:  # groups are made before the domain, and never after
            self._groups = super().groups()
        return self._groups[:]

    def domain(self, name: str) -> DomainRecord:
        """See ``Store.domain``."""
        if name not in self._domains_by_name:
            self._domains_by_name[name] = super().domain(name)
        return self._domains_by_name[name]

    def change(self, domain: DomainId, change: Change, at: float) -> None:
        """See ``Store.change``."""
        before = self.domain(DOMAIN)
        self._count(change.events)

        def commit() -> None:
            super(SimulatedStore, self).change(domain, change, at)
            self._domains_by_name.clear()
            after = self.domain(DOMAIN)
            self._agenda.say(f"durable: {after.record} disks {[disk.number for disk in after.disks]}")
            self._changed(before, after)

        self._write(commit)

    def add_events(self, events: Sequence[NewEvent], at: float) -> None:
        """See ``Store.add_events``."""
        self._count(events)
        self._write(lambda: super(SimulatedStore, self).add_events(events, at))

    def set_label_generations(self, group: GroupId, labelled: int, generation: int) -> None:
        """See ``Store.set_label_generations``."""
        self._write(lambda: super(SimulatedStore, self).set_label_generations(group, labelled, generation))

    def settle_failover(self, domain: DomainId, generation: int, stall_ms: float, replayed: int) -> None:
        """See ``Store.settle_failover``."""

        def commit() -> None:
            super(SimulatedStore, self).settle_failover(domain, generation, stall_ms, replayed)
            self._domains_by_name.clear()

        self._write(commit)

    def _count(self, events: Sequence[NewEvent]) -> None:
        for event in events:
            self._agenda.count(f"told: {event.kind}")

    def _write(self, commit: Callable[[], None]) -> None:
        self.contact()
        self._block(self._agenda.random.randrange(2 * MILLISECOND_NS))
        self.contact()
        if self.is_full:
            self._agenda.count("refused by the store")
            raise StoreError("the disk under the store is full")
        commit()
        try:
            self.contact()
            self._block(self._agenda.random.randrange(MILLISECOND_NS))
            self.contact()
        except Killed:
            self._agenda.count("died after the commit")
            raise


class Place(Surroundings, Protocol):
    """What is around a manager: the world."""

    server: DomainServer | None
    read_repairs_max: int

    def start_server(self, name: str, directory: Path, deadline_ms: int, probe_ms: int) -> DomainServer:
        """Start a domain server."""

    def manager_died(self) -> None:
        """The manager has ended by a kill."""

    def fail(self, error: BaseException) -> None:
        """Something is wrong: the simulation ends here."""


class SimulatedService(Service):
    """The service that ships, on a host without directories."""

    def _drop_orphans(self) -> None:
        """There is one domain, and it is never removed."""


class Manager:
    """One manager's process, from its start to its end.

    Attributes:
        dies_in: so many contacts with the world from now; None: it does not.
        orders: of operators that are under way.
    """

    def __init__(self, place: Place, store: SimulatedStore) -> None:
        self.is_alive = True
        self.dies_in: int | None = None
        self.orders: set[str] = set()
        self._place = place
        self._agenda = place.agenda
        self._channels: list[End] = []
        self._nursery: trio.Nursery | None = None
        self._scope = trio.CancelScope()
        host = Host(self._find, self._start, lambda directory: "", self._connect)
        settings = replace(SETTINGS, read_repairs_max=place.read_repairs_max)
        self.service = SimulatedService(store, settings, RUN, RUN, host)
        store.contact = self.contact

    async def run(self) -> None:
        """Live until it is killed or ended."""
        try:
            with self._scope:
                async with self.service.running(keep_domains=True), trio.open_nursery() as self._nursery:
                    await trio.sleep_forever()
        except* Killed:
            pass

    # --- Death ------------------------------------------------------------------------------------

    def contact(self) -> None:
        """Something of the world is touched. Raises ``Killed`` when that is, or was, its last."""
        if self.is_alive and self.dies_in is not None:
            self.dies_in -= 1
            if self.dies_in < 0:
                self.kill()
        if not self.is_alive:
            raise Killed

    def kill(self) -> None:
        """End it as by kill -9."""
        if self.is_alive:
            self._agenda.say("the manager dies")
            self._agenda.count("manager crashes")
            self.end()
            self._place.manager_died()

    def end(self) -> None:
        """End it at once, whatever it does; what it has sent still arrives."""
        self.is_alive = False
        for channel in self._channels:
            channel.close()
        self._scope.cancel()

    # --- Its host ---------------------------------------------------------------------------------

    def _find(self, directory: Path, uuid: UUID) -> DomainServer | None:
        self.contact()
        server = self._place.server
        return None if server is None or server.gone.is_set() else server

    def _start(
        self, name: str, uuid: UUID, directory: Path, *, deadline_ms: int, probe_ms: int
    ) -> DomainServer:
        self.contact()
        server = self._place.start_server(name, directory, deadline_ms, probe_ms)
        self.contact()
        return server

    async def _connect(self, path: Path) -> Link:
        await trio.lowlevel.checkpoint()
        self.contact()
        server = self._place.server
        if server is None or not server.is_up:
            raise FileNotFoundError(path)
        ours, theirs = connection(self._agenda, self.contact, server.contact)
        self._channels.append(ours)
        server.connect(theirs)
        return Link(ours)

    # --- Orders of operators ----------------------------------------------------------------------

    def order(self, what: str, work: Callable[[Service], Awaitable[object]]) -> None:
        """Have an operator give an order, unless one of this name is under way."""
        if not self.is_alive or self._nursery is None or what in self.orders:
            return

        async def carry_out() -> None:
            self._agenda.say(f"order: {what}")
            try:
                await work(self.service)
            except StandfastError as error:
                self._agenda.say(f"order refused: {what}: {error}")
                self._agenda.count(f"refused: {what}")
            except Exception as error:
                self._place.fail(error)
            else:
                self._agenda.say(f"order done: {what}")
                self._agenda.count(f"done: {what}")
            finally:
                self.orders.discard(what)

        self.orders.add(what)
        self._nursery.start_soon(carry_out)
