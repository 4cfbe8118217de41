"""One task for one domain: there is a domain server for as long as there should be, and it is dealt with.

``run`` starts a server or adopts the one that runs, has a ``session`` with it, and begins again when it is
gone. Orders of operators come in by ``do`` and are carried out in the session's turn.
"""

import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar
from uuid import UUID

import trio

from proxy.errors import RefusedError, StandfastError, StoreError
from proxy.manager import process
from proxy.manager.labels import Labels
from proxy.manager.legs import Numbers
from proxy.manager.link import CommandError, Link, ServerGoneError
from proxy.manager.orders import Order, nothing
from proxy.manager.session import Item, Session, Told
from proxy.manager.settings import Settings
from proxy.model import DomainState, LegState, Severity
from proxy.store import Change, NewEvent, Store

log = logging.getLogger("standfast.supervisor")

#: Between two starts of a domain server that ends by itself: doubled each time, up to the last.
RESTART_FIRST_S = 0.1
RESTART_LAST_S = 10.0
#: A server that has lived this long is not ending in a loop.
RESTART_FORGET_S = 60.0
#: How long an order waits for its turn.
ORDER_PATIENCE_S = 20.0
#: How long somebody who only looks waits for the domain server's own word.
STATUS_PATIENCE_S = 2.0
#: A server that is told to stop gives its clients 5 s and its devices as long; then it has to be gone.
STOP_PATIENCE_S = 15.0

T = TypeVar("T")


class Running(Protocol):
    """A domain server that was started or found; ``process.Process``."""

    async def wait_gone(self) -> None: ...

    def has_ended(self) -> bool: ...

    def kill(self) -> None: ...

    def close(self) -> None: ...


class Start(Protocol):
    """``process.start``."""

    def __call__(
        self, name: str, uuid: UUID, directory: Path, *, deadline_ms: int, probe_ms: int
    ) -> Running: ...


@dataclass(frozen=True, slots=True)
class Host:
    """How domain servers are found, started and spoken to: this host, or a simulated one."""

    find: Callable[[Path, UUID], Running | None] = process.find
    start: Start = process.start
    last_words: Callable[[Path], str] = process.last_words
    connect: Callable[[Path], Awaitable[Link]] = Link.connect


class Supervisor:
    """The supervisor of one domain.

    Args:
        name: of the domain, which is in the store.
        store, settings: the manager's.
        directory: where the domain server has its sockets.
        labels: of the manager's groups.
        bitmap: the file of its dirty bitmap.
        changed: called when what an operator sees may have changed.
        host: that domain servers run on.
    """

    def __init__(
        self,
        name: str,
        *,
        store: Store,
        settings: Settings,
        directory: Path,
        labels: Labels,
        bitmap: Path,
        changed: Callable[[], None],
        host: Host,
    ) -> None:
        self.name = name
        self.directory = directory
        self._labels = labels
        self._bitmap = bitmap
        self.settled = trio.Event()  # the first start has come to an end, good or bad
        self.ended = trio.Event()
        self.failure = ""  # why there is no domain server
        self.making: set[int] = set()  # numbers of disks that somebody is making
        self._store = store
        self._settings = settings
        self._changed = changed
        self._host = host
        self._session: Session | None = None
        self._scope = trio.CancelScope()
        self._numbers = Numbers()
        # Unbounded: what fills it is bounded by what there is to tell, and its one reader never blocks on it.
        self._post, self._queue = trio.open_memory_channel[Item](math.inf)
        self._stopping = False
        self._ending = False  # and its domain server with it

    # --- What others may ask ----------------------------------------------------------------------

    def state(self) -> DomainState:
        """What an operator is shown."""
        if self._session is None:
            return DomainState.FAILED if self.failure else DomainState.HELD
        if self._session.machine.is_held:
            return DomainState.FAILED if self._session.machine.failing else DomainState.HELD
        record = self._session.machine.record
        backups = [leg for leg in record.legs if leg.group != record.active]
        if backups and not any(leg.state is LegState.UPTODATE for leg in backups):
            return DomainState.DEGRADED
        return DomainState.ONLINE

    def trouble(self) -> str:
        """Why clients wait, in one line; empty when they do not."""
        if self._session is None:
            return self.failure or "the domain server is being started"
        return self._session.trouble()

    def lacking(self) -> set[str]:
        """Groups that the store calls up to date, and that may lack something all the same."""
        if self._session is None:
            return set()
        machine = self._session.machine
        return {leg.group for leg in machine.record.legs if machine.lacks(leg.group)}

    def migration_trouble(self) -> str:
        """Why a move to another group does not go on; empty when it does."""
        return "" if self._session is None else self._session.moves.trouble()

    def lost(self) -> Mapping[str, str]:
        """What speaks against legs that are attached, by group."""
        return {} if self._session is None else {g: str(e) for g, e in self._session.machine.lost.items()}

    def leg_numbers(self) -> Mapping[str, int]:
        """The domain server's ids of the legs that are open, by group."""
        return {} if self._session is None else {g: leg.number for g, leg in self._session.legs.open.items()}

    async def status(self) -> dict[str, Any] | None:
        """What the domain server says of itself; None when there is none, or it does not answer."""
        if self._session is None:
            return None
        try:
            status: dict[str, Any] = await self._session.link.call("status", limit_s=STATUS_PATIENCE_S)
            return status
        except (ServerGoneError, CommandError):
            return None

    async def do(self, work: Callable[[Session], Awaitable[T]]) -> T:
        """Carry out ``work`` when it is its turn and nothing else of this domain is under way.

        Raises:
            RefusedError: the turn did not come in time; or what ``work`` raised.
        """
        order = Order(work)
        self._post.send_nowait(order)
        with trio.move_on_after(ORDER_PATIENCE_S):
            await order.done.wait()
        if order.begun:
            await order.done.wait()
        elif not order.done.is_set():
            order.finish()  # withdrawn
            raise RefusedError(f"domain {self.name} is {self.state()}: {self.trouble() or 'busy'}")
        await order.outcome()
        result: T = order.result
        return result

    def nudge(self) -> None:
        """Have the session look again at what should be and is not yet."""
        self._post.send_nowait(Order(nothing))

    # --- Life -------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep the domain served until ``stop`` or ``leave``."""
        pause_s = RESTART_FIRST_S
        try:
            with self._scope:
                while not self._stopping:
                    began = trio.current_time()
                    try:
                        await self._serve()
                    except StandfastError as error:
                        if not self._stopping:
                            self._fail(error)
                    except Exception as error:
                        # The boundary: whatever one domain runs into, the others are supervised on.
                        log.exception("domain %s: the supervisor failed; it begins again", self.name)
                        self._fail(StandfastError(f"the supervisor failed inside ({error!r}); see the log"))
                    if trio.current_time() - began > RESTART_FORGET_S:
                        pause_s = RESTART_FIRST_S
                    if not self._stopping:
                        await trio.sleep(pause_s)
                    pause_s = min(2 * pause_s, RESTART_LAST_S)
        finally:
            self.settled.set()
            self.ended.set()

    def _fail(self, error: StandfastError) -> None:
        self.failure = str(error)
        message = f"the domain server of {self.name} is gone: {error}"
        log.warning("%s", message)
        with suppress(StoreError):
            self._store.add_events(
                [NewEvent(Severity.ERROR, "server-ended", message, self.name)], time.time()
            )
        self.settled.set()
        self._changed()

    async def _serve(self) -> None:
        """One domain server, until it is gone."""
        uuid = self._store.domain(self.name).domain.uuid
        running = self._host.find(self.directory, uuid)
        adopted = running is not None
        if running is None:
            running = self._host.start(
                self.name,
                uuid,
                self.directory,
                deadline_ms=self._settings.deadline_ms,
                probe_ms=math.ceil(self._settings.probe_interval_s * 1000),
            )
        try:
            link = await self._connect(running)
            error = await self._deal(link, adopted=adopted)
            if not isinstance(error, StoreError):
                # If it lives it did not do as told, and what it has done is not known. (With a store that
                # fails it lives and serves on, and is adopted when the store is well again.)
                running.kill()
                await running.wait_gone()
            raise error
        finally:
            if self._ending:
                # Cancelled between its start and its lock, say: nobody else would find it.
                running.kill()
                with trio.CancelScope(shield=True):
                    await running.wait_gone()
            running.close()

    async def _connect(self, running: Running) -> Link:
        with trio.move_on_after(process.START_TIMEOUT_S):
            while not running.has_ended():
                try:
                    return await self._host.connect(self.directory / "control.sock")
                except OSError:
                    await trio.sleep(0.01)  # nothing tells when a socket comes to be
        running.kill()
        raise process.StartError(f"it did not come up: {self._host.last_words(self.directory)}")

    async def _deal(self, link: Link, *, adopted: bool) -> StandfastError:
        """Deal with a server until it is gone; why it is."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.run)
            nursery.start_soon(self._listen, link)
            try:
                session = self._session = Session(
                    self.name,
                    store=self._store,
                    settings=self._settings,
                    link=link,
                    nursery=nursery,
                    post=self._post,
                    queue=self._queue,
                    numbers=self._numbers,
                    labels=self._labels,
                    bitmap=self._bitmap,
                    making=self.making,
                    changed=self._changed,
                )
                try:
                    await (session.adopt() if adopted else session.start())
                    self.failure = ""
                    await session.work(self.settled.set)
                finally:
                    self._session = None
                    session.close()
            except (ServerGoneError, CommandError, StoreError) as error:
                nursery.cancel_scope.cancel()
                return error
        raise AssertionError("a session ends only with the server")

    async def _listen(self, link: Link) -> None:
        async for event in link.events:
            self._post.send_nowait(Told(link, event))
        self._post.send_nowait(Told(link, None))

    async def stop(self) -> bool:
        """End the domain server and this supervisor; True when all that was acknowledged is on every leg."""
        self._stopping = self._ending = True
        clean = False
        if self._session is not None:
            link = self._session.link
            with suppress(ServerGoneError, CommandError), trio.move_on_after(STOP_PATIENCE_S):
                clean = (await link.call("stop", limit_s=math.inf))["clean"]
                await link.gone.wait()
        self._scope.cancel()
        await self.ended.wait()
        await self._end_process()
        if clean:
            domain = self._store.domain(self.name).domain
            try:
                self._store.change(domain.id, Change(session_open=False), time.time())
            except StoreError as error:
                log.warning("domain %s: that it ended cleanly is not recorded: %s", self.name, error)
        return clean

    async def _end_process(self) -> None:
        """Make sure that no domain server is left, such as one that serves while its store cannot be used."""
        uuid = self._store.domain(self.name).domain.uuid
        with trio.move_on_after(STOP_PATIENCE_S):
            while True:
                try:
                    running = self._host.find(self.directory, uuid)
                except process.StartingError:
                    await trio.sleep(0.01)  # it has its lock, and is about to say who it is
                    continue
                except process.StartError:
                    return  # somebody else's
                if running is None:
                    return
                try:
                    running.kill()
                    await running.wait_gone()
                finally:
                    running.close()

    async def leave(self) -> None:
        """End this supervisor and let the domain server serve on."""
        self._stopping = True
        self._scope.cancel()
        await self.ended.wait()
