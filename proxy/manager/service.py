"""What an operator can ask of the manager; the HTTP application is a thin face of this.

Orders that change what domains and groups there are take one lock: two operators cannot allot the
same space. Orders to one domain take their turn in its supervisor.
"""

import logging
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import trio

from proxy.allocator import allot, allot_ranges, grow_ranges, round_up
from proxy.errors import InvalidError, NotFoundError, RefusedError
from proxy.extentmap import Run
from proxy.failover import Change, LegRecord, Record
from proxy.manager import groups, process
from proxy.manager.holds import release_change
from proxy.manager.labels import Labels
from proxy.manager.legs import is_remote
from proxy.manager.orders import Order
from proxy.manager.session import Session
from proxy.manager.settings import Settings
from proxy.manager.supervisor import STOP_PATIENCE_S, Host, Supervisor
from proxy.model import (
    LEGS_MAX,
    MANUAL,
    Desired,
    Group,
    LegState,
    LostRange,
    Severity,
    check_name,
    format_patience,
    parse_delay,
    parse_layout,
    parse_patience,
    parse_replication,
)
from proxy.sizes import format_size, parse_size
from proxy.store import Change as StoreChange
from proxy.store import DiskRecord, DomainRecord, NewEvent, Store

log = logging.getLogger("standfast.service")

#: unix(7): a socket's path has at most 108 bytes, the last of them zero.
SOCKET_PATH_MAX = 107
#: How long a new domain has to begin to serve before it is taken back.
CREATE_TIMEOUT_S = 60
#: How long an ordered failover waits to learn what clients felt of it: a moment after it is over.
RECEIPT_PATIENCE_S = 2
#: How long an operator's hold may take to be reached: devices that hang are given up long before.
HOLD_PATIENCE_S = 60


class Service:
    """The manager's operations.

    Args:
        store: the only one on it.
        settings: of this manager.
        run: where sockets are.
        bitmaps: where the domains' dirty bitmaps are.
        host: that domain servers run on; this one, unless it is simulated.
    """

    def __init__(
        self, store: Store, settings: Settings, run: Path, bitmaps: Path, host: Host | None = None
    ) -> None:
        self.store = store
        self.settings = settings
        self.run_directory = run
        self._bitmaps = bitmaps
        self._labels = Labels(store)
        self._host = host or Host()
        self.supervisors: dict[str, Supervisor] = {}
        self._nursery: trio.Nursery | None = None
        self._site = trio.Lock()
        self._labelling = trio.Lock()  # a device may take its time; domains need not wait for it
        self._changed = trio.Event()
        self.version = 0  # counts what an operator could see change

    # --- Life -------------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self, *, keep_domains: bool) -> AsyncIterator[None]:
        """Supervise all domains for as long as the context lasts; then end them, or leave them serving."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for domain in self.store.domains():
                if domain.desired is Desired.ONLINE:
                    self._supervise(domain.domain.name)
            try:
                await self._finish_stops()
                self._drop_orphans()
                yield
            finally:
                # By now nobody gives orders any more.
                with trio.CancelScope(shield=True):
                    async with trio.open_nursery() as ending:
                        for supervisor in self.supervisors.values():
                            ending.start_soon(supervisor.leave if keep_domains else supervisor.stop)
                nursery.cancel_scope.cancel()

    async def _finish_stops(self) -> None:
        """End domain servers that a manager before us had recorded as stopped, and then died.

        Before anybody gives orders: the space of a domain in maintenance may be given to another.
        """
        for domain in self.store.domains():
            name = domain.domain.name
            if domain.desired is Desired.MAINTENANCE and self._is_served(domain):
                log.info("domain %s was being taken offline; that is done now", name)
                supervisor = self._supervise(name)
                with trio.move_on_after(STOP_PATIENCE_S):
                    await supervisor.settled.wait()  # only who has adopted it can end it cleanly
                await self.supervisors.pop(name).stop()

    def _drop_orphans(self) -> None:
        """Remove the dirty bitmaps of domains whose removal a crash cut short."""
        known = {str(domain.domain.uuid) for domain in self.store.domains()}
        for path in self._bitmaps.iterdir():
            if path.name.removesuffix(".new") not in known:
                path.unlink(missing_ok=True)

    def _is_served(self, domain: DomainRecord) -> bool:
        try:
            running = self._host.find(self.run_directory / domain.domain.name, domain.domain.uuid)
        except process.StartingError:
            return True
        except process.StartError:
            return False  # somebody else's
        if running is not None:
            running.close()
        return running is not None

    def _supervise(self, name: str) -> Supervisor:
        assert self._nursery is not None
        supervisor = Supervisor(
            name,
            store=self.store,
            settings=self.settings,
            directory=self.run_directory / name,
            labels=self._labels,
            bitmap=self._bitmap(self.store.domain(name)),
            changed=self.note_change,
            host=self._host,
        )
        self.supervisors[name] = supervisor
        self._nursery.start_soon(supervisor.run)
        return supervisor

    def _bitmap(self, domain: DomainRecord) -> Path:
        return self._bitmaps / str(domain.domain.uuid)

    def note_change(self) -> None:
        """Something an operator sees may have changed."""
        self.version += 1
        self._changed.set()
        self._changed = trio.Event()

    async def wait_change(self, version: int, timeout_s: float) -> None:
        """Return when ``version`` is past, or after ``timeout_s``."""
        with trio.move_on_after(timeout_s):
            while self.version == version:
                await self._changed.wait()

    def _supervisor(self, name: str) -> Supervisor:
        self.store.domain(name)  # NotFoundError
        supervisor = self.supervisors.get(name)
        if supervisor is None:
            raise RefusedError(f"domain {name} is in maintenance; start it first")
        return supervisor

    # --- Groups -----------------------------------------------------------------------------------

    async def create_group(self, name: str, urls: Sequence[str], layout: str, *, force: bool) -> Group:
        """Make a group of devices, and label them. Raises StandfastError, and then nothing has changed."""
        parsed = parse_layout(layout)
        async with self._labelling:
            group = await groups.create_group(self.store, name, urls, parsed, force=force, at=time.time())
            self.note_change()
            return group

    async def accept_group(self, name: str) -> int:
        """Take a group's devices as they are, although the store says otherwise; the generation they have.

        Raises:
            NotFoundError, RefusedError: there is none, or a device cannot be reached or is not its.
        """
        async with self._labelling:
            group = self.store.group(name)
            generation = await groups.accept_labels(self.store, group)
            self.store.add_events(
                [NewEvent(Severity.WARNING, "group-accepted", f"group {name} was accepted as it is")],
                time.time(),
            )
            self.note_change()
            return generation

    async def remove_group(self, name: str) -> list[str]:
        """Forget a group and take the labels off its devices; what could not be reached is returned.

        Raises:
            NotFoundError, RefusedError: there is none, or a domain uses it.
        """
        async with self._labelling:
            group = self.store.group(name)
            self.store.remove_group(name, time.time())
            self.note_change()
            return await groups.wipe_labels(group)

    # --- Domains ----------------------------------------------------------------------------------

    async def create_domain(
        self,
        name: str,
        size: str,
        active: str,
        backups: Sequence[str],
        replication: str,
        listen: str,
        failback: str = str(MANUAL),
        accept_loss: str = str(MANUAL),
        no_leg: str = format_patience(MANUAL),
    ) -> DomainRecord:
        """Allot a domain's space on every leg and put it online; its first sync goes on in the background.

        Raises:
            StandfastError: and then nothing is left of it.
        """
        check_name("domain", name)
        size_bytes = round_up(parse_size(size))
        mode = parse_replication(replication)
        failback_policy = parse_delay("failback", failback)
        loss_policy = parse_delay("accept-loss", accept_loss)
        patience = parse_patience(no_leg)
        self._check_paths(name)
        _check_address(listen)
        names = [active, *backups]
        if len(set(names)) != len(names):
            raise InvalidError("a group is named twice; every leg is a group of its own")
        if len(names) > LEGS_MAX:
            raise InvalidError(f"{len(names)} legs; a domain has at most {LEGS_MAX}")
        async with self._site:
            runs = {
                group.name: allot(group, self.store.taken(group.name), size_bytes)
                for group in [self.store.group(one) for one in names]
            }
            legs = [
                LegRecord(active, LegState.UPTODATE),
                *(LegRecord(one, LegState.SYNCING) for one in backups),
            ]
            record = Record(1, active, tuple(legs))
            self.store.add_domain(
                name,
                uuid4(),
                size_bytes,
                mode,
                listen,
                record,
                runs,
                time.time(),
                failback=failback_policy,
                accept_loss=loss_policy,
                no_leg=patience,
            )
            supervisor = self._supervise(name)
            try:
                with trio.move_on_after(CREATE_TIMEOUT_S):
                    await supervisor.settled.wait()
                if supervisor.trouble() or not supervisor.settled.is_set():
                    trouble = supervisor.trouble() or "it did not come up in time"
                    raise RefusedError(f"domain {name} cannot be put online: {trouble}")
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self._take_away(name)
                raise
        return self.store.domain(name)

    def _check_paths(self, name: str) -> None:
        path = self.run_directory / name / "control.sock~"
        if len(bytes(path)) > SOCKET_PATH_MAX:
            raise InvalidError(
                f"the domain's sockets would have paths of {len(bytes(path))} bytes, such as {path}; the system "
                f"allows {SOCKET_PATH_MAX}: use a shorter name, or a shorter --run directory"
            )

    async def _take_away(self, name: str) -> None:
        domain = self.store.domain(name)
        supervisor = self.supervisors.pop(name, None)
        clean = not domain.session_open if supervisor is None else await supervisor.stop()
        if not clean and any(is_remote(self.store.group(leg.group)) for leg in domain.record.legs):
            # Writes of unknown fate may still land on another server's devices: not in somebody else's space.
            await trio.sleep(self.settings.quarantine_s)
        self.store.remove_domain(name, time.time())
        self._bitmap(domain).unlink(missing_ok=True)
        with suppress(process.StartError):
            if self._host.find(self.run_directory / name, domain.domain.uuid) is None:
                shutil.rmtree(self.run_directory / name, ignore_errors=True)
        self.note_change()

    async def remove_domain(self, name: str, *, force: bool) -> None:
        """End a domain and free its space. Raises RefusedError while clients use it, unless forced."""
        async with self._site:
            self.store.domain(name)
            await self._check_unused(name, force=force)
            await self._take_away(name)

    async def start_domain(self, name: str) -> None:
        """Put a domain online again; returns when it serves.

        Raises:
            RefusedError: it does not come up, and goes on trying.
        """
        async with self._site:
            domain = self.store.domain(name)
            if name not in self.supervisors:
                self.store.change(domain.domain.id, StoreChange(desired=Desired.ONLINE), time.time())
                self._supervise(name)
                self.note_change()
            supervisor = self.supervisors[name]
        await supervisor.settled.wait()
        if supervisor.ended.is_set():
            raise RefusedError(f"domain {name} was stopped meanwhile")
        if supervisor.trouble():
            raise RefusedError(f"domain {name} does not serve: {supervisor.trouble()}")

    async def stop_domain(self, name: str, *, force: bool) -> None:
        """Take a domain offline, for maintenance. Raises RefusedError while clients use it, unless forced."""
        async with self._site:
            domain = self.store.domain(name)
            if name not in self.supervisors:
                return
            await self._check_unused(name, force=force)
            self.store.change(
                domain.domain.id,
                StoreChange(
                    desired=Desired.MAINTENANCE,
                    events=[NewEvent(Severity.INFO, "maintenance", f"domain {name} was taken offline", name)],
                ),
                time.time(),
            )
            await self.supervisors.pop(name).stop()
            self.note_change()

    async def _check_unused(self, name: str, *, force: bool, disk: str | None = None) -> None:
        supervisor = self.supervisors.get(name)
        if supervisor is None or force:
            return
        status = await supervisor.status()
        clients = [one for one in (status or {}).get("clients", ()) if disk in (None, one)]
        if clients:
            what = f"domain {name}" if disk is None else f"disk {name}/{disk}"
            used = ", ".join(sorted(set(clients)))
            raise RefusedError(
                f"{what} has {len(clients)} clients (disk {used}); end them first, or say --force"
            )

    async def fail_over(self, name: str, target: str | None, *, accept_loss: bool = False) -> DomainRecord:
        """Change the active leg, as ordered; returns when clients are served from the new one.

        Args:
            accept_loss: the new one may lack what clients were told is written; only if there is no other way.

        Raises:
            RefusedError: no leg, or not that one, can take over; or nothing would have to be lost.
        """
        if accept_loss:
            return await self._accept_loss(name, target)

        async def begin(session: Session) -> tuple[int, str]:
            chosen = target or session.machine.successor()
            if chosen is None:
                backups = [
                    leg for leg in session.machine.record.legs if leg.group != session.machine.record.active
                ]
                states = ", ".join(f"{leg.group} is {leg.state}" for leg in backups) or "there is none"
                raise RefusedError(f"domain {name} has no uptodate backup to fail over to: {states}")
            generation = session.machine.record.generation
            await session.fail_over(chosen)
            return generation, chosen

        return await self._switch(name, begin)

    async def _accept_loss(self, name: str, target: str | None) -> DomainRecord:
        supervisor = self._supervisor(name)

        async def begin(session: Session) -> tuple[int, str, Order]:
            record = session.machine.record
            others = [leg.group for leg in record.legs if leg.group != record.active]
            if target is None and len(others) > 1:
                raise RefusedError(
                    f"domain {name} has several legs that lack something; say which is to serve: --to "
                    + " or ".join(others)
                )
            chosen = target or (others[0] if others else record.active)
            return record.generation, chosen, session.losses.accept(chosen, "the operator accepts a loss")

        before, chosen, order = await supervisor.do(begin)
        await order.outcome()

        async def begun(session: Session) -> tuple[int, str]:
            return before, chosen

        return await self._switch(name, begun)

    def losses(self, name: str) -> list[LostRange]:
        """What the last failover of a domain that has lost anything has lost, by disk and offset."""
        return self.store.losses(self.store.domain(name).domain.id)

    async def fail_back(self, name: str) -> DomainRecord:
        """Return to the preferred leg; returns when clients are served from it.

        Raises:
            RefusedError: it is active already, or cannot take over, and what to do.
        """

        async def begin(session: Session) -> tuple[int, str]:
            generation = session.machine.record.generation
            return generation, await session.fail_back()

        return await self._switch(name, begin)

    async def _switch(
        self, name: str, begin: Callable[[Session], Awaitable[tuple[int, str]]]
    ) -> DomainRecord:
        """Have ``begin`` begin a switch, from which generation to which leg; returns when that is over."""
        supervisor = self._supervisor(name)
        before, chosen = await supervisor.do(begin)
        await self._wait_settled(supervisor, before)
        record = self.store.domain(name).record
        if record.active != chosen:
            raise RefusedError(
                f"domain {name} did not fail over to {chosen}, which was lost on the way; {record.active} is active"
            )
        with trio.move_on_after(RECEIPT_PATIENCE_S):
            while True:
                version = self.version
                domain = self.store.domain(name)
                if domain.last_failover is None or domain.last_failover.stall_ms is not None:
                    return domain
                await self.wait_change(version, RECEIPT_PATIENCE_S)
        return self.store.domain(name)

    async def _wait_settled(self, supervisor: Supervisor, generation: int) -> None:
        """Return when a transition that began at ``generation`` is over."""

        async def rest(session: Session) -> bool:
            return session.machine.record.generation > generation

        if not await supervisor.do(rest):
            raise RefusedError(f"domain {supervisor.name} did not change: {supervisor.trouble()}")

    async def hold_domain(self, name: str, timeout_s: float | None) -> DomainRecord:
        """Hold a domain's clients; returns when all they had under way is done on every leg, and flushed.

        Args:
            timeout_s: when to release them again; None: when ``release_domain`` is called.

        Raises:
            RefusedError: it is held already; or it could not be reached, and clients are not held.
        """
        supervisor = self._supervisor(name)

        async def begin(session: Session) -> Order:
            return await session.holds.begin(timeout_s)

        order = await supervisor.do(begin)
        try:
            with trio.fail_after(HOLD_PATIENCE_S):
                await order.outcome()
        except (RefusedError, trio.TooSlowError) as error:
            trouble = str(error) or supervisor.trouble()
            with suppress(RefusedError):
                await self.release_domain(name)
            raise RefusedError(
                f"domain {name} could not be held at one point of the order of writes, and is released again: {trouble}"
            ) from error
        return self.store.domain(name)

    async def release_domain(self, name: str) -> DomainRecord:
        """End the operator's hold. Raises RefusedError when there is none."""
        domain = self.store.domain(name)
        why = "ordered by the operator"
        if name in self.supervisors:

            async def release(session: Session) -> None:
                await session.holds.release(why)

            await self.supervisors[name].do(release)
        elif domain.hold is None:
            raise RefusedError(f"domain {name} is not held by the operator")
        else:
            self.store.change(domain.domain.id, release_change(name, why), time.time())
        self.note_change()
        return self.store.domain(name)

    async def migrate(self, name: str, target: str, source: str | None) -> DomainRecord:
        """Begin to move a domain to another group; the move goes on by itself, across restarts.

        Args:
            target: a group that is no leg yet.
            source: the leg that leaves in the end; None: the one that is active now.

        Raises:
            RefusedError: a move is under way, there is no room, or ``target`` is a leg already.
        """
        async with self._site:
            supervisor = self._supervisor(name)
            runs = self._allot_leg(name, target)
            record = self.store.domain(name).record
            if source is not None and source not in {leg.group for leg in record.legs}:
                raise NotFoundError(f"domain {name} has no leg on a group {source}")

            async def begin(session: Session) -> None:
                await session.moves.add_leg(target, runs, replaces=source or session.machine.record.active)

            await supervisor.do(begin)
            self.note_change()
        return self.store.domain(name)

    async def add_leg(self, name: str, group: str) -> DomainRecord:
        """Add a backup to a domain, the last in preference; returns when its first sync begins.

        Raises:
            RefusedError: it is a leg already, there is no room, or it cannot be reached: then it is outdated.
        """
        async with self._site:
            supervisor = self._supervisor(name)
            runs = self._allot_leg(name, group)

            async def begin(session: Session) -> Order:
                await session.moves.add_leg(group, runs, replaces=None)
                return session.resyncs.begin(group)

            order = await supervisor.do(begin)
            self.note_change()
        await order.outcome()
        return self.store.domain(name)

    def _allot_leg(self, name: str, target: str) -> Sequence[Run]:
        domain = self.store.domain(name)
        self._check_settled(domain)
        group = self.store.group(target)
        legs = [leg.group for leg in domain.record.legs]
        if target in legs:
            raise RefusedError(f"group {target} is a leg of domain {name} already")
        if len(legs) >= LEGS_MAX:
            raise RefusedError(f"domain {name} has {len(legs)} legs, the most there can be; remove one first")
        return allot(group, self.store.taken(target), domain.domain.size)

    def _check_settled(self, domain: DomainRecord) -> None:
        migration = domain.migration
        if migration is None:
            return
        name, target = domain.domain.name, migration.target
        if target is None:
            raise RefusedError(f"group {migration.source} is just leaving domain {name}; wait until it has")
        raise RefusedError(
            f"domain {name} is just moving from {migration.source} to {target}; wait until it has, or give that up: "
            f"standfast domain remove-leg {name} {target}"
        )

    async def remove_leg(self, name: str, group: str) -> DomainRecord:
        """Begin to remove a backup from a domain; that goes on by itself, across restarts.

        Raises:
            RefusedError: it is active, or the domain is being moved elsewhere than to it.
        """
        async with self._site:
            supervisor = self._supervisor(name)
            domain = self.store.domain(name)
            if group not in {leg.group for leg in domain.record.legs}:
                raise NotFoundError(f"domain {name} has no leg on a group {group}")
            if domain.migration is None or group != domain.migration.target:
                self._check_settled(domain)

            async def begin(session: Session) -> None:
                session.moves.remove_leg(group)

            await supervisor.do(begin)
            self.note_change()
        return self.store.domain(name)

    def set_domain(
        self,
        name: str,
        *,
        failback: str | None = None,
        accept_loss: str | None = None,
        no_leg: str | None = None,
    ) -> DomainRecord:
        """Change a domain's policies; what is None stays as it is.

        Raises:
            InvalidError: there is no such policy.
        """
        domain = self.store.domain(name)
        change = StoreChange(
            failback=None if failback is None else parse_delay("failback", failback),
            accept_loss=None if accept_loss is None else parse_delay("accept-loss", accept_loss),
            no_leg=None if no_leg is None else parse_patience(no_leg),
            events=[
                NewEvent(Severity.INFO, "domain-set", f"{what} of domain {name} is {policy} now", name)
                for what, policy in (("failback", failback), ("accept-loss", accept_loss), ("no-leg", no_leg))
                if policy is not None
            ],
        )
        if change.events:
            self.store.change(domain.domain.id, change, time.time())
            if name in self.supervisors:
                self.supervisors[name].nudge()
            self.note_change()
        return self.store.domain(name)

    async def resync(self, name: str, group: str | None, rate: str | None) -> list[str]:
        """Begin to bring outdated legs back, all or the one named; returns which, once they are reached.

        Args:
            rate: what copies of this domain may take a second from now on, as a size; None: as it is.

        Raises:
            RefusedError: there is none, or it cannot be reached.
        """
        supervisor = self._supervisor(name)
        record = self.store.domain(name).record
        if group is not None and group not in {leg.group for leg in record.legs}:
            raise NotFoundError(f"domain {name} has no leg on a group {group}")
        wanted = (
            [leg.group for leg in record.legs if leg.state is LegState.OUTDATED] if group is None else [group]
        )
        if not wanted:
            raise RefusedError(f"domain {name} has no outdated leg; there is nothing to sync")

        rate_bytes = None if rate is None else 0 if rate == "0" else parse_size(rate)

        async def begin(session: Session) -> list[Order]:
            if rate_bytes is not None:
                await session.pace_copies(rate_bytes)
            return [session.resyncs.begin(one) for one in wanted]

        for order in await supervisor.do(begin):
            await order.outcome()
        return wanted

    async def verify(self, name: str, rate: str | None, *, repair: bool) -> DomainRecord:
        """Begin to compare the legs of a domain, and to repair what differs when asked to.

        Args:
            rate: of the active leg a second, as a size, with or without "/s"; None: as fast as devices and
                clients allow.

        Raises:
            RefusedError: there is nothing to compare, or a verify is under way.
        """
        rate_bytes = 0 if rate is None else parse_size(rate.removesuffix("/s"))

        async def begin(session: Session) -> None:
            await session.verify(rate_bytes, repair=repair)

        await self._supervisor(name).do(begin)
        return self.store.domain(name)

    async def stop_verify(self, name: str) -> DomainRecord:
        """End the verify under way. Raises RefusedError when there is none."""
        await self._supervisor(name).do(Session.stop_verify)
        return self.store.domain(name)

    # --- Disks ------------------------------------------------------------------------------------

    def disk(self, name: str, disk_name: str) -> DiskRecord:
        """A disk that clients can use. Raises NotFoundError."""
        for disk in self.store.domain(name).disks:
            if disk.name == disk_name and disk.ready:
                return disk
        raise NotFoundError(f"there is no disk {name}/{disk_name}")

    async def create_disk(self, name: str, disk_name: str, size: str) -> DiskRecord:
        """Allot a disk in a domain; returns when it reads as zeroes and clients can use it.

        Raises:
            StandfastError: and then nothing is left of it.
        """
        check_name("disk", disk_name)
        size_bytes = parse_size(size)
        supervisor = self._supervisor(name)

        async def allot_space(session: Session) -> DiskRecord:
            domain = self.store.domain(name)
            if disk_name in {disk.name for disk in domain.disks}:
                raise RefusedError(f"there is a disk {name}/{disk_name} already")
            taken = [part for disk in domain.disks for part in disk.ranges]
            ranges = allot_ranges(domain.domain.size, taken, size_bytes)
            number = self.store.next_disk_number(domain.domain.id)
            disk = DiskRecord(number, disk_name, size_bytes, ranges, ready=False)
            await session.change(Change({}, f"disk {disk_name} is made"), StoreChange(add_disk=disk))
            # Not before: should that be recorded and the domain server end over it, nobody makes the disk any more.
            supervisor.making.add(number)
            return disk

        async def offer(session: Session) -> None:
            event = NewEvent(Severity.INFO, "disk-created", f"disk {name}/{disk_name} was made", name)
            domain = self.store.domain(name)
            change = StoreChange(ready_disk=disk.number, events=[event])
            self.store.change(domain.domain.id, change, time.time())
            await session.offer(self.store.domain(name).disks)

        disk = await supervisor.do(allot_space)
        try:
            await self._zero(supervisor, disk, 0, _space(disk))
            await supervisor.do(offer)
        finally:
            # If it is not ready by now the session removes it, as after a crash.
            supervisor.making.discard(disk.number)
            supervisor.nudge()
        self.note_change()
        return replace(disk, ready=True)

    async def _zero(self, supervisor: Supervisor, disk: DiskRecord, offset: int, end: int) -> None:
        async def begin(session: Session) -> Order:
            return await session.zero(disk.number, offset, end - offset)

        if offset < end:
            await (await supervisor.do(begin)).outcome()

    async def resize_disk(self, name: str, disk_name: str, size: str) -> DiskRecord:
        """Grow a disk; clients see the new size when they connect anew.

        Raises:
            RefusedError: it would shrink, or there is no room.
        """
        size_bytes = parse_size(size)
        supervisor = self._supervisor(name)

        async def allot_more(session: Session) -> DiskRecord:
            domain = self.store.domain(name)
            disk = self.disk(name, disk_name)
            if disk.number in supervisor.making:
                raise RefusedError(f"disk {name}/{disk_name} is being resized already")
            if size_bytes < disk.size:
                raise RefusedError(
                    f"disk {name}/{disk_name} has {format_size(disk.size)}; it cannot shrink to "
                    f"{format_size(size_bytes)}, which would lose what is at its end"
                )
            taken = [part for other in domain.disks if other.number != disk.number for part in other.ranges]
            ranges = grow_ranges(domain.domain.size, taken, disk.ranges, size_bytes)
            if ranges != disk.ranges:
                larger = replace(disk, ranges=ranges)
                await session.change(
                    Change({}, f"disk {disk_name} gets more space"), StoreChange(resize_disk=larger)
                )
            supervisor.making.add(disk.number)
            return replace(disk, ranges=ranges)

        async def show(session: Session) -> None:
            event = NewEvent(
                Severity.INFO,
                "disk-resized",
                f"disk {name}/{disk_name} has {format_size(size_bytes)} now",
                name,
            )
            if self.disk(name, disk_name).number != disk.number:
                raise RefusedError(f"disk {name}/{disk_name} was removed meanwhile")
            grown = replace(disk, size=size_bytes)
            await session.change(
                Change({}, f"disk {disk_name} grows"), StoreChange(resize_disk=grown, events=[event])
            )

        disk = await supervisor.do(allot_more)
        try:
            # All beyond the old end: an earlier attempt may have allotted it and not zeroed it, and of a leg that
            # serves although it lacked something what no client could see is not known either.
            await self._zero(supervisor, disk, disk.size, _space(disk))
            await supervisor.do(show)
        finally:
            # If it has not grown by now the session takes the space back, as after a crash.
            supervisor.making.discard(disk.number)
            supervisor.nudge()
        self.note_change()
        return self.disk(name, disk_name)

    async def remove_disk(self, name: str, disk_name: str, *, force: bool) -> None:
        """Remove a disk and what is on it. Raises RefusedError while clients use it, unless forced."""
        disk = self.disk(name, disk_name)
        supervisor = self._supervisor(name)
        await self._check_unused(name, force=force, disk=disk_name)

        async def remove(session: Session) -> None:
            event = NewEvent(Severity.INFO, "disk-removed", f"disk {name}/{disk_name} was removed", name)
            await session.change(
                Change({}, f"disk {disk_name} is removed"),
                StoreChange(remove_disk=disk.number, events=[event]),
            )

        await supervisor.do(remove)
        self.note_change()


def _space(disk: DiskRecord) -> int:
    """Bytes allotted to a disk; at least its size."""
    return sum(part.length for part in disk.ranges)


def _check_address(listen: str) -> None:
    """Raise InvalidError unless ``listen`` is empty or HOST:PORT."""
    if not listen:
        return
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InvalidError(f"listen address {listen!r} is not HOST:PORT, such as 127.0.0.1:10809")
