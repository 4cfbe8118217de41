"""The manager's dealings with one domain server, from its start or adoption until it is gone.

One queue, one thing at a time: what the server told, a leg that was opened, an operator's order, the
clock. The machine (``proxy.failover``) says what follows and ``_carry_out`` does it, in order. What takes
several steps, each when the one before is done, has a module of its own: ``resyncs``, ``moves``, ``holds``, ``losses``.
"""

import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import trio

from proxy.allocator import shrink_ranges
from proxy.errors import RefusedError, StoreError, StoreOutdatedError
from proxy.extentmap import Run
from proxy.failover import (
    Adopted,
    Change,
    Drained,
    Effect,
    Evidence,
    EvidenceKind,
    FailClients,
    Failover,
    Fence,
    Hold,
    Input,
    Install,
    Installed,
    LegLost,
    LegReturned,
    MakeDurable,
    Ordered,
    Phase,
    Record,
    Recorded,
    RecordFailed,
    RejectParked,
    Release,
    RetryRecord,
    Started,
    Stuck,
    Transition,
)
from proxy.manager import maps, messages
from proxy.manager.holds import Holds
from proxy.manager.labels import Labels
from proxy.manager.legs import Leg, Legs, Numbers, evidence_of, is_evidence, is_remote
from proxy.manager.link import CommandError, Link, ServerGoneError
from proxy.manager.losses import Losses
from proxy.manager.moves import Moves
from proxy.manager.orders import Order, nothing
from proxy.manager.patience import Patience
from proxy.manager.resyncs import Resyncs
from proxy.manager.settings import Settings
from proxy.model import FailoverReceipt, Group, LegState, Replication, Severity
from proxy.sizes import KIB, MIB
from proxy.store import Change as StoreChange
from proxy.store import DiskRecord, DomainRecord, NewEvent, Store

log = logging.getLogger("standfast.session")

#: Between two automatic failbacks: a leg that fails as soon as it is used must not have clients wait all the time.
FAILBACK_PAUSE_S = 30.0
#: Phases in which nothing is under way.
AT_REST = (Phase.SERVING, Phase.HELD, Phase.PAUSED)


@dataclass(frozen=True, slots=True)
class Opened:
    """An attempt to open a leg has ended. ``link``: to the server that has the leg."""

    link: Link
    group: str
    result: Leg | Evidence


@dataclass(frozen=True, slots=True)
class Told:
    """What the domain server told; None: it has ended. ``link`` says which one's word it is."""

    link: Link
    event: dict[str, Any] | None


Item = Order | Opened | Told


class Session:
    """See the module.

    Args:
        name: the domain's.
        store, settings: the manager's.
        link: to the domain server; its ``run`` is somebody else's.
        nursery: for openings in the background.
        post, queue: both ends of the domain's queue, which outlives this session.
        numbers: for the domain's legs; they outlive this session too.
        labels: of the manager's groups.
        bitmap: the file of the dirty bitmap.
        making: numbers of disks that somebody is making.
        changed: called when what an operator sees may have changed.
    """

    def __init__(
        self,
        name: str,
        *,
        store: Store,
        settings: Settings,
        link: Link,
        nursery: trio.Nursery,
        post: trio.MemorySendChannel[Item],
        queue: trio.MemoryReceiveChannel[Item],
        numbers: Numbers,
        labels: Labels,
        bitmap: Path,
        making: Set[int],
        changed: Callable[[], None],
    ) -> None:
        self.name = name
        self.link = link
        self.store = store
        domain = store.domain(name)
        self.machine = Failover(
            domain.record,
            asynchronous=domain.domain.replication is Replication.ASYNC,
            operator_hold=domain.hold is not None,
        )
        self.legs = Legs(link, settings, numbers)
        self._numbers = numbers
        self.stuck = ""
        self._making = making
        self._labels = labels
        self._bitmap = bitmap
        self.settings = settings
        self._nursery = nursery
        self._post = post
        self._queue = queue
        self._changed = changed
        self._postponed: deque[Order] = deque()
        self.resyncs = Resyncs(self)
        self.losses = Losses(self)
        self.patience = Patience(self)
        self.moves = Moves(self)
        self.holds = Holds(self)
        self._verifying = False
        self._zeroing: dict[int, Order] = {}
        self._door_due = ""  # the TCP address that could not be had yet
        self._hold_number = 0
        self._unsettled: int | None = None
        self._unlabelled = ""  # the group that has become active, until clients are served from it
        self._with_record = StoreChange()  # what goes into the transaction of the next record
        self._store_error = ""
        self._failback_since: float | None = None  # since when the preferred leg could be returned to
        self._failback_from = -math.inf  # no automatic failback before this, on trio's clock

    # --- The beginning ----------------------------------------------------------------------------

    async def start(self) -> None:
        """Give a blank domain server its doors, its legs and its first map, in this order.

        It holds from the beginning: clients that come back connect at once, and wait for the rest.
        """
        domain = self.domain
        groups = self.groups()
        await self._open_bitmap(domain, groups)
        await self.pace_copies(self.settings.resync_rate_mib_s * MIB)
        if domain.domain.listen:
            await self._listen(domain.domain.listen, is_new=domain.record.generation == 1)
        await self.offer(domain.disks)
        lost: dict[str, Evidence] = {}

        async def open_one(group: str) -> None:
            result = await self._connect(groups[group], domain.runs[group], fresh=False)
            if isinstance(result, Leg):
                self.legs.open[group] = result
            else:
                lost[group] = result

        try:
            async with trio.open_nursery() as nursery:
                for group in domain.record.attached():
                    nursery.start_soon(open_one, group)
        except* StoreOutdatedError as outdated:
            raise outdated.exceptions[0] from None
        if self.link.gone.is_set():
            raise ServerGoneError("it has ended")
        for record in domain.record.legs:
            if record.group not in domain.record.attached():
                self.legs.suspect(groups[record.group])  # how it was lost is not known any more
        if domain.session_open:
            self.tell(
                Severity.WARNING,
                "unclean",
                f"domain {self.name} did not end cleanly; what was being written then is synced again from its "
                "active leg",
            )
            for leg in domain.record.legs:
                self.legs.suspect(groups[leg.group])
            remote = [group for group, leg in self.legs.open.items() if is_remote(leg.group)]
            if remote:
                await trio.sleep(self.settings.quarantine_s)
                for group in remote:
                    self.legs.trust(group)
        await self.feed(Started(lost, unclean=domain.session_open))

    async def _open_bitmap(self, domain: DomainRecord, groups: Mapping[str, Group]) -> None:
        """Have the domain server mark what is written to, beginning with what is known of each leg."""
        distrust = await self.link.call(
            "open-bitmap",
            path=str(self._bitmap),
            domain=str(domain.domain.uuid),
            size=domain.domain.size,
            session=domain.session,
            clean=not domain.session_open,
            least_shift=(self.settings.bitmap_region_kib * KIB).bit_length() - 1,
            legs=[
                {"uuid": str(groups[leg.group].uuid), "uptodate": leg.state is LegState.UPTODATE}
                for leg in domain.record.legs
            ],
        )
        self._with_record = StoreChange(session=domain.session + 1)
        if distrust and len(domain.record.legs) > 1:
            self.tell(
                Severity.WARNING,
                "bitmap-distrusted",
                f"domain {self.name}: which parts of its legs differ is not known ({distrust}); every leg that may "
                "lack something is copied whole",
            )

    async def pace_copies(self, rate: int) -> None:
        """Let copies take ``rate`` bytes a second at most; 0: all the devices give."""
        await self.link.call("pace", rate=rate, floor=self.settings.resync_floor_mib_s * MIB)

    async def adopt(self) -> None:
        """Take over a domain server that a manager before us had."""
        groups = self.groups()
        hello = await self.link.call("hello")
        if hello["generation"] == 0:
            # It was being started and serves nobody; what its start had to see to, only its starter knew.
            raise ServerGoneError("it never served under a manager that died; another one is started")
        if hello["generation"] > self.machine.record.generation:
            raise StoreError(
                f"the store of domain {self.name} is older (generation {self.machine.record.generation}) than its "
                f"running domain server ({hello['generation']}): end this manager and bring back the newer store"
            )
        self._numbers.skip(hello["last_leg"])
        status = await self.link.call("status")
        lost: dict[str, Evidence] = {}
        present = set()
        for text, found in hello["legs"].items():
            leg = self.legs.adopt(int(text), groups[found["group"]], found)
            # One that has gone since is told of next.
            leg.copying = text in status["legs"] and status["legs"][text]["copy"] is not None
            if found["drained"]:
                await self.legs.drained(leg.number, found["unproven"])
            if found["fenced"]:
                continue
            if found["mapped"]:
                present.add(leg.group.name)
                if found["against"]:
                    lost[leg.group.name] = evidence_of(leg, found["against"])
            elif found["against"]:
                await self.legs.discard(leg)
            else:
                # Opened by the manager before, which alone knew whether an old write can still land there.
                leg.fresh_at = trio.current_time()
                self.legs.suspect(leg.group)
        for record in self.machine.record.legs:
            if record.group not in self.legs.open:
                self.legs.suspect(groups[record.group])  # how it was lost is not known to us
        self.tell(Severity.INFO, "adopted", f"domain {self.name} was found running and is supervised again")
        if hello["bitmap_error"]:
            self._tell_bitmap(hello["bitmap_error"])
        self._verifying = status["verify"] is not None
        if hello["verified"] is not None:
            await self._take_verified(hello["verified"])
        await self.feed(Adopted(lost, frozenset(present), hello["held"], hello["generation"]))

    @property
    def domain(self) -> DomainRecord:
        """What the store says of the domain now."""
        return self.store.domain(self.name)

    def write(self, change: StoreChange) -> None:
        """Record a change that no new record of legs goes with. Raises StoreError."""
        self.store.change(self.domain.domain.id, change, time.time())

    def groups(self) -> dict[str, Group]:
        """All groups there are, by name."""
        return {group.name: group for group in self.store.groups()}

    # --- The queue --------------------------------------------------------------------------------

    async def work(self, settled: Callable[[], None]) -> None:
        """Take one thing at a time, until ServerGoneError says that this was the last.

        ``settled`` is called whenever the domain has come to rest, serving or held.
        """
        while True:
            await self._reconcile()
            if self.machine.phase in AT_REST:
                settled()
            self._changed()
            item = await self._next()
            if item is None:
                if self.machine.phase is Phase.UNRECORDED:
                    await self.feed(RetryRecord())
            elif isinstance(item, Order):
                await self._take_order(item)
            elif item.link is not self.link:
                continue  # of a server that is gone
            elif isinstance(item, Opened):
                self._take_opened(item)
            else:
                if item.event is None:
                    raise ServerGoneError("it has ended")
                await self._take_event(item.event)

    def close(self) -> None:
        """The server is gone: nobody need wait for what only it could have done."""
        error = self.ended()
        for part in (self.resyncs, self.losses, self.holds):
            part.close(error)
        for order in self._zeroing.values():
            order.finish(error)
        for order in self._postponed:
            self._post.send_nowait(order)
        if self._verifying and self.link.gone.is_set():
            message = f"the verify of domain {self.name} was interrupted: its domain server ended"
            self.tell(Severity.WARNING, "verified", message)

    def ended(self) -> RefusedError:
        """What those are told who waited for a server that is gone."""
        return RefusedError(f"the domain server of {self.name} ended meanwhile; try again")

    async def _next(self) -> Item | None:
        """The next thing, or None when it is only time to look again."""
        if self._postponed and self.machine.phase in AT_REST:
            return self._postponed.popleft()
        with trio.move_on_after(self.settings.reopen_interval_s if self._is_waiting() else math.inf):
            return await self._queue.receive()
        return None

    def _is_waiting(self) -> bool:
        """Whether something is to be looked at again although nobody will tell."""
        return (
            self.machine.phase in (Phase.HELD, Phase.PAUSED, Phase.UNRECORDED)
            or self.resyncs.is_waiting()
            or self.moves.is_waiting
            or bool(self._door_due)
            or self._failback_since is not None
        )

    async def _take_order(self, order: Order) -> None:
        if order.done.is_set():
            return  # withdrawn
        if self.machine.phase not in AT_REST:
            self._postponed.append(order)
            return
        order.begun = True
        try:
            order.result = await order.work(self)
        except (RefusedError, StoreError) as error:
            order.finish(error)
        except CommandError as error:
            order.finish(RefusedError(str(error)))
        except BaseException:
            order.finish(self.ended())
            raise
        else:
            order.finish()

    def _take_opened(self, opened: Opened) -> None:
        self.legs.opened(opened.group, opened.result)
        if isinstance(opened.result, Leg):
            return
        self.losses.withdraw(opened.group, RefusedError(f"{opened.group} cannot serve: {opened.result}"))
        self.resyncs.withdraw(opened.group, RefusedError(f"{opened.group} cannot be synced: {opened.result}"))

    async def _take_event(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        leg = self.legs.by_number(event.get("leg", 0))
        if is_evidence(event):
            if leg is not None:
                await self._take_evidence(leg, event)
        elif kind == "DRAINED":
            if event["a"] == self._hold_number:
                await self.feed(Drained())
        elif kind == "LEG_DRAINED":
            await self.legs.drained(event["leg"], event["a"])
        elif kind == "LEG_CLOSED":
            self.legs.closed(event["leg"])
        elif kind == "COPIED":
            if leg is not None:
                leg.copying, leg.copied, leg.copied_bytes = False, event["code"] == 0, event["a"]
        elif kind == "BITMAP_FAILED":
            self._tell_bitmap(event["code"])
        elif kind == "VERIFIED":
            await self._take_verified(event)
        elif kind == "READ_REPAIRED":
            if leg is not None:
                await self._take_repair(leg, event)
        elif kind == "FLUSHED":
            self.holds.flushed(event)
        elif kind == "REPLAYED":
            self._settle_failover(event["a"], event["b"])
        elif kind == "ZEROED" and event["disk"] in self._zeroing:
            code = event["code"]
            failed = RefusedError(f"the disk's space could not be zeroed (error {code})") if code else None
            self._zeroing.pop(event["disk"]).finish(failed)

    async def _take_evidence(self, leg: Leg, event: dict[str, Any]) -> None:
        group = leg.group.name
        in_use = group in self.machine.record.attached() and group not in self.machine.lost
        if leg.fresh_at is not None and not in_use:
            await self.legs.discard(leg)  # opened again, and lost again before it was of any use
        else:
            await self.feed(LegLost(group, evidence_of(leg, event)))

    def _tell_bitmap(self, code: int) -> None:
        if code:
            message = (
                f"domain {self.name}: the dirty bitmap {self._bitmap} cannot be written ({os.strerror(code)}); writes "
                "to parts of disks that were not being written to wait until it can"
            )
            self.tell(Severity.ERROR, "bitmap-failed", message)
        else:
            self.tell(
                Severity.INFO, "bitmap-back", f"domain {self.name}: the dirty bitmap can be written again"
            )

    async def _take_verified(self, found: dict[str, Any]) -> None:
        self._verifying = False
        domain = self.domain
        now = time.time()
        receipt = messages.verify_receipt(found, domain.disks, now)
        event = messages.verified(self.name, receipt)
        log.info("%s", event.message)
        try:
            self.store.change(domain.domain.id, StoreChange(verify=receipt, events=[event]), now)
        except StoreError as error:
            log.warning("domain %s: what its verify found is not recorded: %s", self.name, error)
        else:
            await self.link.call("verified-noted")

    async def _take_repair(self, leg: Leg, event: dict[str, Any]) -> None:
        """A read that a leg could not do was answered from a backup; too many of them fail the leg."""
        device = leg.group.devices[event["device"]].url
        cause = os.strerror(event["code"])
        self._record_event(messages.read_repaired(self.name, device, cause, event["a"], event["b"]))
        now = trio.current_time()
        window_s = self.settings.read_repairs_window_s
        leg.repaired_at.append(now)
        while leg.repaired_at[0] < now - window_s:
            leg.repaired_at.popleft()
        # As long as there is no other leg to go to, this one is the best there is.
        if (
            len(leg.repaired_at) > self.settings.read_repairs_max
            and self.machine.phase is Phase.SERVING
            and leg.group.name == self.machine.record.active
            and self.machine.successor() is not None
        ):
            detail = f"{len(leg.repaired_at)} reads had to be repaired within {window_s:g} s"
            leg.repaired_at.clear()
            evidence = Evidence(EvidenceKind.ERROR, device, event["code"], detail)
            await self.feed(LegLost(leg.group.name, evidence))

    def _settle_failover(self, replayed: int, longest_ns: int) -> None:
        if self._unsettled is None:
            return
        domain = self.domain.domain
        try:
            self.store.settle_failover(domain.id, self._unsettled, longest_ns / 1e6, replayed)
        except StoreError as error:
            log.warning("domain %s: what clients felt of the failover is not recorded: %s", self.name, error)
        self._unsettled = None
        self._changed()

    # --- The machine ------------------------------------------------------------------------------

    async def feed(self, event: Input) -> None:
        """Give the machine an input, and carry out what it says and what follows from that."""
        inputs: deque[Input] = deque([event])
        while inputs:
            for effect in self.machine.receive(inputs.popleft()):
                try:
                    answer = await self._carry_out(effect)
                except CommandError as error:
                    # What the server has and has not done is not known any more.
                    raise ServerGoneError(f"it does not obey: {error}") from error
                if answer is not None:
                    inputs.append(answer)
        self._changed()

    async def _carry_out(self, effect: Effect) -> Input | None:
        match effect:
            case Hold(catch_up):
                legs = [self.legs.open[group].number for group in catch_up if group in self.legs.open]
                self._hold_number = await self.link.call("hold", legs=legs)
            case Fence(group):
                await self.legs.fence(group)
            case MakeDurable(transition):
                return self._make_durable(transition)
            case Install(record):
                self.stuck = ""
                await self._install(record)
                return Installed()
            case Release():
                await self.link.call("release")
                if self._unlabelled:
                    self._nursery.start_soon(self._label, self._unlabelled)
                    self._unlabelled = ""
            case RejectParked():
                await self.link.call("reject-parked")
            case FailClients(reason):
                await self.link.call("fail-clients")
                self.stuck = f"clients are told errors: {reason}"
                self.tell(Severity.ERROR, "failed", f"domain {self.name} has failed: {self.stuck}")
            case Stuck(reason):
                if reason != self.stuck:
                    self.stuck = reason
                    self.tell(Severity.ERROR, "held", f"domain {self.name} is held: {reason}")
        return None

    def _make_durable(self, transition: Transition) -> Input:
        now = time.time()
        lost = self.losses.lost if self.machine.accepted == transition.after.active else []
        receipt = None
        if transition.is_failover:
            receipt = FailoverReceipt(
                transition.after.generation,
                now,
                transition.reason,
                transition.before.active,
                transition.after.active,
                transition.is_planned,
                lost_bytes=sum(one.length for one in lost),
            )
        change = replace(
            self._with_record,
            record=transition.after,
            session_open=True,
            failover=receipt,
            lost=lost,
            events=[
                *self._with_record.events,
                *messages.transition_events(self.name, transition),
                *messages.lost(self.name, transition, lost),
            ],
        )
        try:
            self.store.change(self.domain.domain.id, change, now)
        except StoreError as error:
            self._store_error = str(error)
            return RecordFailed(str(error))
        self._with_record = StoreChange()
        if receipt is not None:
            self._unsettled = receipt.generation
            self._unlabelled = receipt.target
        return Recorded()

    async def _install(self, record: Record) -> None:
        domain = self.domain
        legs = [self.legs.open[group] for group in record.attached()]
        groups = self.groups()
        encoded = [*maps.disk_places(domain.disks), *maps.disk_maps(domain, [leg.group for leg in legs])]
        await self.link.call(
            "install",
            generation=record.generation,
            legs=[
                {
                    "leg": leg.number,
                    "role": maps.leg_role(record, leg.group.name),
                    "uuid": str(leg.group.uuid),
                }
                for leg in legs
            ],
            away=[str(groups[leg.group].uuid) for leg in record.legs if leg.group not in record.attached()],
            backlog=self.settings.backlog_kib * KIB if self.machine.asynchronous else 0,
            disks=maps.disk_messages(domain.disks),
            map_bytes=[len(one) for one in encoded],
            payload=b"".join(encoded),
        )

    # --- What should be, and is not yet -----------------------------------------------------------

    async def _reconcile(self) -> None:
        """Bring lost legs back to a held domain, sync what is to be synced, tidy up."""
        if self._door_due:
            await self._listen(self._door_due, is_new=False)
        if self.machine.phase is Phase.HELD:
            await self._reopen_lost()
        await self.losses.advance()
        await self.patience.advance()
        if self.machine.operator_hold:
            await self.holds.advance()
        if self.machine.phase is Phase.SERVING:
            await self.moves.advance()
        await self.resyncs.advance()
        if self.machine.phase is Phase.SERVING:
            await self._undo_half_made()
        if self.machine.phase is Phase.SERVING:
            await self._advance_failback()

    def begin_open(self, group: str) -> None:
        """Open a leg while the queue goes on: a hung device must not keep a failover waiting."""
        if self.legs.may_open(group):
            self._nursery.start_soon(self._open, group)

    async def _open(self, group: str) -> None:
        runs = self.domain.runs[group]
        result: Leg | Evidence
        try:
            result = await self._connect(self.groups()[group], runs, fresh=True)
        except StoreOutdatedError as error:
            # Of a leg that has been away: whoever serves now has not noticed anything, and goes on.
            result = Evidence(EvidenceKind.UNREACHABLE, f"group {group}", detail=str(error))
        self._post.send_nowait(Opened(self.link, group, result))

    async def _connect(self, group: Group, runs: tuple[Run, ...], *, fresh: bool) -> Leg | Evidence:
        outdated = self.machine.record.leg(group.name).state is LegState.OUTDATED
        result = await self.legs.connect(
            group, runs, self._labels.of(group), fresh=fresh, stale_welcome=outdated
        )
        if isinstance(result, Leg) and result.stale:
            message = f"domain {self.name}: {group.name} is copied whole: {'; '.join(result.stale)}"
            self.tell(Severity.WARNING, "stale-leg", message)
        return result

    async def _label(self, group: str) -> None:
        """Label a leg anew that has become the active one, so that a store of before is known for what it is."""
        whole = self.groups()[group]
        runs = self.domain.runs[group]
        try:
            async with self._labels.of(whole).begun(stale_welcome=False) as order:
                await self.link.call(
                    "label",
                    limit_s=math.inf,
                    devices=messages.device_orders(whole, runs, order.generation),
                    labels=order.allowed,
                    timeout_s=self.settings.deadline_ms / 1000,
                )
                order.written()
        except (CommandError, ServerGoneError, StoreError) as error:
            log.warning("domain %s: %s could not be labelled anew: %s", self.name, group, error)

    async def _listen(self, address: str, *, is_new: bool) -> None:
        """Open the TCP door. Where it was before, somebody else may be; the Unix door is open all the same."""
        try:
            await self.link.call("listen", address=address)
        except CommandError as error:
            if is_new:
                raise
            if not self._door_due:
                self.tell(Severity.ERROR, "no-tcp", f"domain {self.name} {error}; it is tried again")
            self._door_due = address
        else:
            self._door_due = ""

    async def _reopen_lost(self) -> None:
        for group, evidence in list(self.machine.lost.items()):
            leg = self.legs.open.get(group)
            if not self.machine.can_return(group):
                continue
            if leg is None:
                self.begin_open(group)
            elif leg.fresh_at is None:
                # What only is late may still answer; what is gone has to be opened anew.
                if evidence.kind is not EvidenceKind.DEADLINE:
                    await self.legs.discard(leg)
            elif self.legs.trusted(leg) and self.machine.can_return(group):
                leg.fresh_at = None
                if group == self.machine.record.active:
                    # What it had not flushed it may have lost: a copy of before is no copy of what it is now.
                    self.resyncs.put_off_copies()
                await self.feed(LegReturned(group))
                return

    async def _undo_half_made(self) -> None:
        """Undo what making or growing a disk was cut short in by a crash; nobody has ever seen it."""
        for disk in self.domain.disks:
            if disk.number in self._making:
                continue
            if not disk.ready:
                reason = f"half-made disk {disk.name} is removed"
                await self.change(Change({}, reason), StoreChange(remove_disk=disk.number))
                return
            ranges = shrink_ranges(disk.ranges, disk.size)
            if ranges != disk.ranges:
                reason = f"space that disk {disk.name} did not grow into is taken back"
                await self.change(Change({}, reason), StoreChange(resize_disk=replace(disk, ranges=ranges)))
                return

    async def _advance_failback(self) -> None:
        """Return to the preferred leg, if that is the domain's policy and it is time.

        What an operator has ordered is not undone: he left the preferred leg because he wanted to.
        """
        domain = self.domain
        after_s = domain.domain.failback.after_s
        preferred = self.machine.record.preferred
        if (
            after_s is None
            or domain.migration is not None
            or preferred == self.machine.record.active
            or not self.machine.can_take_over(preferred)
            or (domain.last_failover is not None and domain.last_failover.planned)
        ):
            self._failback_since = None
            return
        now = trio.current_time()
        if self._failback_since is None:
            self._failback_since = now
        if now < max(self._failback_since + after_s, self._failback_from):
            return
        self._failback_from = now + FAILBACK_PAUSE_S
        try:
            await self.fail_over(
                preferred, f"automatic failback: {preferred} is preferred and up to date again"
            )
        except (RefusedError, StoreError) as error:
            log.warning("domain %s: no failback to %s: %s", self.name, preferred, error)

    # --- What orders are made of ------------------------------------------------------------------

    def need_serving(self) -> None:
        """Raise RefusedError unless clients are being served."""
        if self.machine.phase is not Phase.SERVING:
            raise self._held_refusal()

    def trouble(self) -> str:
        """Why clients wait, in one line; empty when they do not."""
        if self.stuck or not self.machine.operator_hold:
            return self.stuck
        return f"held by the operator; let clients go on with: standfast domain release {self.name}"

    def _held_refusal(self) -> RefusedError:
        return RefusedError(f"domain {self.name} is {'held: ' if self.stuck else ''}{self.trouble()}")

    async def change(self, change: Change, store_change: StoreChange) -> None:
        """A new record without a failover, with ``store_change`` in the same transaction.

        Raises:
            RefusedError: the domain is held.
            StoreError: it could not be made durable; nothing has changed.
        """
        self.need_serving()
        before = self.machine.record.generation
        self._with_record = store_change
        try:
            await self.feed(change)
        finally:
            self._with_record = StoreChange()
        if self.machine.record.generation == before:
            raise StoreError(self._store_error)

    async def fail_over(self, target: str, reason: str = "ordered by the operator") -> None:
        """Begin a failover to ``target``. Raises RefusedError, or StoreError when it could not be recorded."""
        if self.machine.operator_hold:
            raise self._held_refusal()
        # Clients are not held for a store that takes nothing; this is how to know beforehand.
        message = f"domain {self.name} is to fail over to {target}: {reason}"
        self.store.add_events([NewEvent(Severity.INFO, "ordered", message, self.name)], time.time())
        await self.feed(Ordered(target, reason))

    async def fail_back(self) -> str:
        """Begin the return to the preferred leg, and say which one that is.

        Raises:
            RefusedError: it is active already, or cannot be now; and what to do.
            StoreError: it could not be recorded.
        """
        record = self.machine.record
        preferred = record.preferred
        if preferred == record.active:
            raise RefusedError(f"domain {self.name} is on its preferred leg {preferred} already")
        if not self.machine.can_take_over(preferred):
            raise RefusedError(
                f"domain {self.name} cannot fail back to {preferred}, which is {self._shortcoming(preferred)}"
            )
        await self.fail_over(preferred, "failback ordered by the operator")
        return preferred

    def _shortcoming(self, group: str) -> str:
        """Why a leg cannot be active now, and what to do about it."""
        evidence = self.machine.lost.get(group)
        if evidence is not None:
            return f"failed ({evidence}); do first: bring its devices back"
        if self.machine.record.leg(group).state is LegState.SYNCING:
            return f"syncing; do first: standfast domain wait {self.name}"
        return (
            f"outdated; do first: standfast resync {self.name} --group {group}, "
            f"standfast domain wait {self.name}"
        )

    async def verify(self, rate: int, *, repair: bool) -> None:
        """Begin to compare all uptodate backups with the active leg, at ``rate`` bytes a second (0: no limit).

        Raises:
            RefusedError: there is nothing to compare, or a verify is under way.
        """
        self.need_serving()
        ranges = maps.verify_ranges(self.domain.disks)
        if not ranges:
            raise RefusedError(f"domain {self.name} has no disk; there is nothing to compare")
        await self.link.call("verify", ranges=ranges, rate=rate, repair=repair)
        self._verifying = True
        what = "verified and repaired" if repair else "verified"
        self.tell(Severity.INFO, "verify-started", f"domain {self.name} is being {what}")

    async def stop_verify(self) -> None:
        """End the verify under way. Raises RefusedError when there is none."""
        if not self._verifying:
            raise RefusedError(f"domain {self.name} is not being verified")
        await self.link.call("stop-verify")

    async def zero(self, disk: int, offset: int, length: int) -> Order:
        """Begin to zero part of a disk on every leg; the answer is done when all of it is."""
        order = self._zeroing[disk] = Order(nothing)
        try:
            await self.link.call("zero", disk=disk, offset=offset, length=length)
        except BaseException:
            del self._zeroing[disk]
            raise
        return order

    async def offer(self, disks: tuple[DiskRecord, ...]) -> None:
        """Offer clients the disks that are ready, and no others."""
        await self.link.call("exports", disks=maps.disk_messages(disks))

    def tell(self, severity: Severity, kind: str, message: str) -> None:
        """Record an event that goes with no other change; a full disk must not stop anything here."""
        self._record_event(NewEvent(severity, kind, message, self.name))

    def _record_event(self, event: NewEvent) -> None:
        log.info("%s", event.message)
        try:
            self.store.add_events([event], time.time())
        except StoreError as error:
            log.warning("event not recorded: %s", error)
