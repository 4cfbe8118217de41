"""The manager's end in a domain server: commands in, events out."""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from errno import EBUSY, EIO
from pathlib import Path
from typing import Any
from uuid import UUID

import trio

from backends import OpenDevice, open_device
from proxy.dirtymap import INTENT, LegContent, marked_ranges
from proxy.domainserver.bitmap import Bitmap, Disk, open_bitmap
from proxy.domainserver.doors import Doors, export_of
from proxy.domainserver.legs import DeviceOrder, Generations, LegError, label_leg, open_leg
from proxy.engine import Engine, Event, EventKind, LegRole, RequestKind, Tracking
from proxy.errors import RefusedError
from proxy.extentmap import ExtentMap
from proxy.wire import Decoder, Frame, WireError

log = logging.getLogger("standfast.control")

#: How long a stop lets clients take their answers, and then the legs flush.
STOP_PATIENCE_S = 5
#: And then the engine to come to rest.
_SETTLE_PATIENCE_S = 2
#: Between two looks at what the engine tells nobody of: whether it is at rest, and the dirty bitmap on the disk.
_POLL_S = 0.005
#: How long a manager may leave its socket unread before it is taken for dead.
SEND_PATIENCE_S = 5

#: Events that speak against a leg.
_AGAINST = {
    EventKind.DEVICE_ERROR,
    EventKind.DEVICE_LOST,
    EventKind.DEADLINE_MISSED,
    EventKind.LEG_BEHIND,
}
#: Those that hold for as long as the leg is open; others the engine reports anew if they still do.
_FOR_GOOD = {EventKind.DEVICE_LOST.name, EventKind.LEG_BEHIND.name}


@dataclass(slots=True)
class LegStatus:
    """What a manager that comes later must know of a leg.

    ``mapped``: some map has named it; else it was opened, and never used. ``against``: the first event that
    speaks so.
    """

    group: str
    mapped: bool = False
    fenced: bool = False
    copy_began: float | None = None
    copied: bool = False
    drained: bool = False
    unproven: int = 0
    against: dict[str, Any] | None = None


@dataclass(slots=True)
class VerifyStatus:
    """The verify under way: ``began`` on trio's clock, ``limit`` in bytes a second (0: none), ``groups`` by leg."""

    began: float
    limit: int
    groups: dict[int, str]


class Server:
    """One domain server: an engine, its doors, and the obedience of a manager.

    Args:
        domain: its name.
        directory: of its sockets.
        engine: its data plane.
        doors: of that engine.
        open_device: gives the device of a URL.
        disk: that its dirty bitmap is kept on.
    """

    def __init__(
        self,
        domain: str,
        directory: Path,
        *,
        engine: Engine,
        doors: Doors,
        open_device: Callable[[str], Awaitable[OpenDevice]] = open_device,
        disk: Disk | None = None,
    ) -> None:
        self.domain = domain
        self._directory = directory
        self.engine = engine
        self.doors = doors
        self._open_device = open_device
        self.stopped = trio.Event()
        self.clean = False
        self._legs: dict[int, LegStatus] = {}
        self._last_leg = 0  # the largest number that any leg has had
        self._openings: dict[int, trio.CancelScope] = {}
        self._disk = disk or Disk()
        self._verify: VerifyStatus | None = None
        self._verified: dict[str, Any] | None = None  # what the last one found, until a manager has noted it
        self._bitmap_error = 0  # why new regions cannot be written to
        self._bitmap: Bitmap | None = None
        self._away: tuple[UUID, ...] = ()
        self._outdated_since: dict[UUID, float] = {}  # on trio's clock
        self._held = True
        self._generation = 0
        self._active = 0  # the number of the leg
        self._maps: set[int] = set()  # generations of those that requests still run under
        self._listening: str | None = None
        self._is_open = False
        self._manager: trio.abc.Stream | None = None
        self._passing = trio.Lock()
        self._sending = trio.Lock()
        self._done: dict[int, int] = {}  # token to errno, of the server's own requests
        self._changed = trio.Condition()  # something the engine told was taken in
        self._nursery: trio.Nursery | None = None

    # --- Tasks ------------------------------------------------------------------------------------

    async def watch_engine(self, nursery: trio.Nursery) -> None:
        """Pass on the engine's events for as long as it runs."""
        self._nursery = nursery
        while not self.stopped.is_set():
            await trio.lowlevel.wait_readable(self.engine.event_fd)
            await self._pass_events()

    async def serve_manager(self, stream: trio.abc.Stream) -> None:
        """Obey one manager until it goes. A new one takes the place of one before."""
        if self._manager is not None:
            await trio.aclose_forcefully(self._manager)
        self._manager = stream
        log.info("a manager has connected")
        decoder = Decoder()
        try:
            # What opens when the manager goes is of no use to the next one, who does not know of it.
            async with stream, trio.open_nursery() as openings:
                async for data in stream:
                    for frame in decoder.receive(data):
                        if frame.body.get("op") in ("open-leg", "label"):
                            # A device may take its time; the fence of another must not wait for it.
                            openings.start_soon(self._obey, stream, frame)
                        else:
                            await self._obey(stream, frame)
                openings.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError, WireError) as error:
            log.info("manager lost: %s", error.exceptions[0])
        finally:
            if self._manager is stream:
                self._manager = None
                log.info("the manager has gone; serving on")

    # --- Out --------------------------------------------------------------------------------------

    async def _send(self, body: dict[str, Any]) -> None:
        async with self._sending:
            manager = self._manager
            if manager is None:
                return
            with trio.move_on_after(SEND_PATIENCE_S) as patience:
                try:
                    await manager.send_all(Frame(body).encode())
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    log.debug("the manager went before it could be told: %s", body)
            if patience.cancelled_caught:
                log.warning("the manager does not listen; going on without it")
                await trio.aclose_forcefully(manager)

    async def _pass_events(self) -> None:
        """Take in and pass on what the engine has told; in order, whichever task gets here first."""
        async with self._passing:
            events = self.engine.events()
            for event in events:
                self._note(event)
            for event in events:
                if event.kind is EventKind.CONNECTION_CLOSED:
                    self.doors.forget(event.a, event.code)
                elif event.kind is EventKind.DONE:
                    self._done[event.a] = event.code
                elif event.kind is EventKind.VERIFIED:
                    await self._send({"event": self._verified})
                elif event.kind not in (EventKind.MAP_RETIRED, EventKind.LEG_FORGOTTEN):
                    await self._send({"event": _message(event)})
        async with self._changed:
            self._changed.notify_all()

    def _note(self, event: Event) -> None:
        """Remember what a later manager would have to be told."""
        if event.kind is EventKind.MAP_RETIRED:
            self._maps.discard(event.generation)
        elif event.kind is EventKind.VERIFIED:
            self._verified = {"kind": event.kind.name, "leg": 0, **self._verify_report()}
            self._verify = None
            log.info("the verify has ended: %s", event)
        elif event.kind is EventKind.BITMAP_FAILED:
            self._bitmap_error = event.code
        leg = self._legs.get(event.leg)
        if leg is None:
            return
        if event.kind in _AGAINST:
            if leg.against is None or event.kind.name in _FOR_GOOD:
                leg.against = _message(event)
            log.warning("leg %s (%d): %s", leg.group, event.leg, event)
        elif event.kind is EventKind.COPIED:
            leg.copied = event.code == 0
        elif event.kind is EventKind.LEG_DRAINED:
            leg.drained, leg.unproven = True, event.a
        elif event.kind is EventKind.LEG_CLOSED:
            del self._legs[event.leg]

    # --- In ---------------------------------------------------------------------------------------

    async def _obey(self, manager: trio.abc.Stream, frame: Frame) -> None:
        operation = frame.body.get("op")
        handler = _OPERATIONS.get(operation) if isinstance(operation, str) else None
        answer: dict[str, Any] = {"id": frame.body.get("id")}
        try:
            if handler is None:
                raise ValueError(f"unknown command {operation!r}")
            answer["result"] = await handler(self, frame)
        except RefusedError as error:
            answer["error"] = {"text": str(error)}
        except LegError as error:
            answer["error"] = {
                "text": str(error),
                "position": error.position,
                "errno": error.error_number,
                "is_newer": error.is_newer,
            }
        except Exception as error:
            # The boundary: whatever a command ran into, the clients are served on.
            log.exception("command %s failed", operation)
            answer["error"] = {"text": f"{type(error).__name__}: {error}"}
        await self._pass_events()
        if self._manager is manager:  # to the next one the number of the command means something else
            await self._send(answer)
        if operation == "stop":
            self.stopped.set()

    async def _hello(self, frame: Frame) -> dict[str, Any]:
        return {
            "domain": self.domain,
            "bitmap_error": self._bitmap_error,
            "generation": self._generation,
            "held": self._held,
            "last_leg": self._last_leg,
            "legs": {str(leg_id): asdict(leg) for leg_id, leg in self._legs.items()},
            "verified": self._verified,
        }

    async def _status(self, frame: Frame) -> dict[str, Any]:
        now = trio.current_time()
        legs = {
            str(leg_id): {
                "devices": [device._asdict() for device in self.engine.device_statistics(leg_id)],
                "copy": self._copy_status(leg_id),
                "backlog": self._backlog_status(leg_id),
            }
            for leg_id in self._legs
        }
        return {
            # After the devices', so that what is counted there is counted here.
            "statistics": self.engine.statistics()._asdict(),
            "clients": list(self.doors.clients.values()),
            "legs": legs,
            "dirty_bytes": self._dirty_bytes(),
            # If it has not been sent the last writes either; nobody knows before there is a map.
            "doubtful_bytes": self._dirty_bytes(doubtful=True) if self._generation else {},
            "outdated_s": {str(group): now - since for group, since in self._outdated_since.items()},
            "marked_bytes": self.engine.dirty_bytes(INTENT, away=False),
            "verify": None if self._verify is None else self._verify_report(),
        }

    def _verify_report(self) -> dict[str, Any]:
        report, verify = self.engine.verify_report(), self._verify
        assert report is not None and verify is not None
        return {
            **report._asdict(),
            "mismatches": [
                (verify.groups[one.leg], one.disk, one.offset, one.length) for one in report.mismatches
            ],
            "seconds": trio.current_time() - verify.began,
            "limit": verify.limit,
        }

    def _copy_status(self, leg_id: int) -> dict[str, Any] | None:
        progress = self.engine.copy_progress(leg_id)
        began = self._legs[leg_id].copy_began
        if progress is None or began is None:
            return None
        return {"copied": progress[0], "total": progress[1], "seconds": trio.current_time() - began}

    def _backlog_status(self, leg_id: int) -> dict[str, Any]:
        """What a leg that lags has yet to get, and since when the oldest of it has been answered."""
        count, age_ns = self.engine.backlog(leg_id)
        return {"bytes": count, "seconds": age_ns / 1e9}

    def _dirty_bytes(self, *, doubtful: bool = False) -> dict[str, int]:
        """What each leg lacks, or may lack if ``doubtful``, by the uuid of its group."""
        if self._bitmap is None:
            return {}
        return {
            str(group): self.engine.dirty_bytes(plane, away=doubtful or group in self._away)
            for plane, group in enumerate(self._bitmap.content.groups, 1)
            if group is not None
        }

    async def _open_bitmap(self, frame: Frame) -> str:
        """Renew the dirty bitmap for this session; why the last one's could not be relied on, or nothing."""
        body = frame.body
        try:
            self._bitmap, distrust = await open_bitmap(
                self.engine,
                self._disk,
                Path(body["path"]),
                UUID(body["domain"]),
                body["size"],
                body["session"],
                [LegContent(UUID(leg["uuid"]), leg["uptodate"]) for leg in body["legs"]],
                clean=body["clean"],
                least_shift=body["least_shift"],
            )
        except OSError as error:
            raise RefusedError(
                f"the dirty bitmap {body['path']} cannot be written: {error.strerror}"
            ) from error
        return distrust

    async def _give_up(self, frame: Frame) -> list[tuple[int, int]]:
        """Prepare for a leg to serve that lacks something; what that is, (offset, length) in bytes of the domain."""
        assert self._bitmap is not None
        plane = self._bitmap.content.plane_of(UUID(frame.body["uuid"]))
        if plane is None:
            raise RefusedError("nothing is known of what it lacks")
        lacking, written = self.engine.give_up_to(plane)
        with trio.move_on_after(frame.body["timeout_s"]):
            while not written:
                await trio.sleep(_POLL_S)
                lacking, written = self.engine.give_up_to(plane)
        if not written:
            raise RefusedError("the dirty bitmap cannot be written")
        return marked_ranges(lacking, self._bitmap.content.region_shift, self._bitmap.content.size)

    async def _pace(self, frame: Frame) -> None:
        self.engine.pace_copies(rate=frame.body["rate"], floor=frame.body["floor"])

    async def _open_leg(self, frame: Frame) -> list[str]:
        """Open a leg; what was found stale on it, a line each."""
        leg_id = frame.body["leg"]
        self._last_leg = max(self._last_leg, leg_id)
        orders = [DeviceOrder.from_message(message) for message in frame.body["devices"]]

        async def distrust() -> None:
            assert self._bitmap is not None
            try:
                await self._bitmap.distrust(self.engine, UUID(frame.body["uuid"]))
            except OSError as error:
                raise RefusedError(f"the dirty bitmap cannot be written: {error.strerror}") from error

        with trio.CancelScope() as scope:
            self._openings[leg_id] = scope
            try:
                specs, stale = await open_leg(
                    orders,
                    Generations(**frame.body["labels"]),
                    distrust=distrust,
                    timeout_s=frame.body["timeout_s"],
                    open_device=self._open_device,
                )
            finally:
                del self._openings[leg_id]
        if scope.cancelled_caught:
            raise RefusedError(f"the opening of leg {leg_id} was given up")
        self.engine.add_leg(leg_id, specs)
        self._legs[leg_id] = LegStatus(frame.body["group"])
        return stale

    async def _label(self, frame: Frame) -> None:
        """Label the devices of a leg anew."""
        orders = [DeviceOrder.from_message(message) for message in frame.body["devices"]]
        await label_leg(
            orders,
            Generations(**frame.body["labels"]),
            timeout_s=frame.body["timeout_s"],
            open_device=self._open_device,
        )

    async def _install(self, frame: Frame) -> None:
        """Install a map, and offer the disks in it that are ready."""
        disks = frame.body["disks"]
        maps = _split(frame.payload, frame.body["map_bytes"])
        places, tables = maps[: len(disks)], maps[len(disks) :]
        legs = [(leg["leg"], LegRole(leg["role"])) for leg in frame.body["legs"]]
        tracking = await self._track(frame.body, places)
        self.engine.install(
            frame.body["generation"],
            legs,
            [
                (disk["number"], disk["size"], tables[index * len(legs) : (index + 1) * len(legs)])
                for index, disk in enumerate(disks)
            ],
            tracking=tracking,
            backlog=frame.body["backlog"],
        )
        self._note_outdated(frame.body)
        self._generation = frame.body["generation"]
        self._active = next(leg_id for leg_id, role in legs if role is LegRole.ACTIVE)
        self._maps.add(self._generation)
        for leg_id, _ in legs:
            self._legs[leg_id].mapped = True
        for leg in self._legs.values():
            if leg.against and leg.against["kind"] not in _FOR_GOOD:
                leg.against = None
        await self._offer(disks)

    def _note_outdated(self, body: dict[str, Any]) -> None:
        """Remember since when which groups have not been up to date, as far as is known here."""
        outdated = {UUID(leg["uuid"]) for leg in body["legs"] if leg["role"] == LegRole.SYNCING}
        outdated |= set(self._away)
        now = trio.current_time()
        self._outdated_since = {group: self._outdated_since.get(group, now) for group in outdated}

    async def _track(self, body: dict[str, Any], places: list[ExtentMap]) -> Tracking | None:
        """What the engine needs to mark writes for a new map; None: the domain has one leg and no other."""
        attached = [UUID(leg["uuid"]) for leg in body["legs"]]
        self._away = tuple(UUID(one) for one in body["away"])
        assert self._bitmap is not None
        try:
            await self._bitmap.assign(self.engine, [*attached, *self._away])
        except OSError as error:
            raise RefusedError(f"the dirty bitmap cannot be written: {error.strerror}") from error
        if len(attached) == 1 and not self._away:
            return None
        plane_of = self._bitmap.plane_of
        return Tracking(
            [plane_of(group) for group in attached], [plane_of(group) for group in self._away], places
        )

    async def _exports(self, frame: Frame) -> None:
        await self._offer(frame.body["disks"])

    async def _offer(self, disks: list[dict[str, Any]]) -> None:
        ready = [disk for disk in disks if disk["ready"]]
        self.doors.numbers = {disk["name"]: disk["number"] for disk in ready}
        self.doors.exports = {
            disk["name"]: export_of(self.domain, disk["name"], disk["size"]) for disk in ready
        }
        for number, disk_name in list(self.doors.clients.items()):
            if disk_name not in self.doors.numbers:
                self.engine.end_connection(number)
        if not self._is_open:
            # Not before: a client that comes back must not be told that its disk does not exist.
            assert self._nursery is not None
            await self._nursery.start(self.doors.serve_unix, self._directory / "nbd.sock")
            self._is_open = True

    async def _listen(self, frame: Frame) -> None:
        """Open the TCP door."""
        address = frame.body["address"]
        if address == self._listening:
            return
        assert self._nursery is not None
        host, _, port = address.rpartition(":")
        try:
            await self._nursery.start(self.doors.serve_tcp, host.strip("[]"), int(port))
        except OSError as error:
            raise RefusedError(f"cannot listen on {address}: {error.strerror}") from error
        self._listening = address

    async def _hold(self, frame: Frame) -> int:
        self._held = True
        return self.engine.hold(frame.body["legs"])

    async def _release(self, frame: Frame) -> None:
        self.engine.release()
        self._held = False

    async def _fence(self, frame: Frame) -> None:
        self.engine.fence_leg(frame.body["leg"])
        self._legs[frame.body["leg"]].fenced = True

    async def _close_leg(self, frame: Frame) -> None:
        """Let go of a leg; one that is still being opened never comes to be."""
        if frame.body["leg"] in self._openings:
            self._openings[frame.body["leg"]].cancel()
            return
        if frame.body["leg"] not in self._legs:
            return  # a manager before had let go of it too, and it has gone since
        self._legs[frame.body["leg"]].fenced = True
        self.engine.close_leg(frame.body["leg"])

    async def _reject_parked(self, frame: Frame) -> None:
        self.engine.fail_parked()
        for leg in self._legs.values():
            if leg.against and leg.against["kind"] not in _FOR_GOOD:
                leg.against = None

    async def _fail_clients(self, frame: Frame) -> None:
        self.engine.fail_clients()

    async def _copy(self, frame: Frame) -> None:
        self._legs[frame.body["leg"]].copied = False
        ranges = [(disk, offset, length) for disk, offset, length in frame.body["ranges"]]
        self.engine.copy_leg(frame.body["leg"], ranges)
        self._legs[frame.body["leg"]].copy_began = trio.current_time()

    async def _begin_verify(self, frame: Frame) -> None:
        """Begin to compare the legs. Answered at once; the event ``VERIFIED`` tells the end."""
        body = frame.body
        ranges = [(disk, offset, length) for disk, offset, length in body["ranges"]]
        try:
            if self._verify is not None:
                raise OSError(
                    EBUSY, "its end has not been taken in"
                )  # and would be taken for the end of this one
            self.engine.verify(ranges, rate=body["rate"], repair=body["repair"])
        except OSError as error:
            if error.errno == EBUSY:
                raise RefusedError(
                    f"domain {self.domain} is being verified already; wait, or: standfast verify {self.domain} --stop"
                ) from None
            raise RefusedError(f"domain {self.domain} has no uptodate backup to compare with") from None
        groups = {leg_id: leg.group for leg_id, leg in self._legs.items()}
        self._verify = VerifyStatus(trio.current_time(), body["rate"], groups)

    async def _stop_verify(self, frame: Frame) -> None:
        self.engine.stop_verify()

    async def _note_verified(self, frame: Frame) -> None:
        self._verified = None

    async def _zero(self, frame: Frame) -> None:
        """Zero a range of a disk on all legs. Answered at once; the event ``zeroed`` tells the end."""
        body = frame.body
        assert self._nursery is not None
        self._nursery.start_soon(self._zero_range, body["disk"], body["offset"], body["length"])

    async def _zero_range(self, disk: int, offset: int, length: int) -> None:
        # A request of a disk that was removed may still be writing where this one is now: it runs under a map
        # of before, and no claim keeps it in order with this disk's.
        newest = self._generation
        async with self._changed:
            while any(generation < newest for generation in self._maps):
                await self._changed.wait()
        try:
            active = -1
            code = 0
            while not code and active != self._active:
                # A leg that came to serve in between need not have been there when it was zeroed.
                active = self._active
                code = await self._wait_done(self.engine.submit(RequestKind.ZERO, disk, offset, length))
                if not code:
                    # Whoever is told that it is zeroed makes that durable, and a loss of power must not undo it.
                    code = await self._wait_done(self.engine.submit(RequestKind.FLUSH))
        except OSError as error:
            code = error.errno or EIO
        await self._send({"event": {"kind": "ZEROED", "disk": disk, "code": code}})

    async def _flush(self, frame: Frame) -> int:
        """Flush every leg, also while clients are held. Answered at once; the event ``flushed`` tells the end."""
        assert self._nursery is not None
        token = self.engine.submit(RequestKind.FLUSH)
        self._nursery.start_soon(self._finish_flush, token)
        return token

    async def _finish_flush(self, token: int) -> None:
        code = await self._wait_done(token)
        await self._send({"event": {"kind": "FLUSHED", "token": token, "code": code}})

    async def _wait_done(self, token: int) -> int:
        async with self._changed:
            while token not in self._done:
                await self._changed.wait()
            return self._done.pop(token)

    async def _stop(self, frame: Frame) -> dict[str, Any]:
        await self.stop()
        return {"clean": self.clean}

    async def stop(self) -> None:
        """Let clients finish and flush every leg; ``clean`` says whether all of that was possible."""
        self.doors.close()
        for number in list(self.doors.clients):
            self.engine.end_connection(number)
        with trio.move_on_after(STOP_PATIENCE_S):
            async with self._changed:
                while self.doors.clients:
                    await self._changed.wait()
        # Who is left may merely not take its answers; what counts is whether something still runs, other than what is
        # over in a moment, such as the flush of a round of the bitmap.
        with trio.move_on_after(_SETTLE_PATIENCE_S):
            while self.engine.statistics().running:
                await trio.sleep(_POLL_S)
        if not self._held and self._generation and not self.engine.statistics().running:
            with trio.move_on_after(STOP_PATIENCE_S):
                code = await self._wait_done(self.engine.submit(RequestKind.FLUSH))
                # A leg that fell behind has flushed what it has, and nobody may have recorded yet that it lacks some.
                self.clean = code == 0 and not self.engine.statistics().behind
        log.info("stopping, %s", "clean" if self.clean else "not clean")


def _message(event: Event) -> dict[str, Any]:
    return {**event._asdict(), "kind": event.kind.name}


def _split(payload: bytes, lengths: list[int]) -> list[ExtentMap]:
    """The extent maps in a payload, given the length of each."""
    maps = []
    offset = 0
    for length in lengths:
        maps.append(ExtentMap.from_bytes(payload[offset : offset + length]))
        offset += length
    if offset != len(payload):
        raise ValueError(f"{len(payload) - offset} bytes too many behind the extent maps")
    return maps


_OPERATIONS: dict[str, Callable[[Server, Frame], Awaitable[Any]]] = {
    "hello": Server._hello,
    "status": Server._status,
    "open-leg": Server._open_leg,
    "label": Server._label,
    "install": Server._install,
    "exports": Server._exports,
    "listen": Server._listen,
    "hold": Server._hold,
    "release": Server._release,
    "fence": Server._fence,
    "close-leg": Server._close_leg,
    "reject-parked": Server._reject_parked,
    "fail-clients": Server._fail_clients,
    "copy": Server._copy,
    "open-bitmap": Server._open_bitmap,
    "give-up": Server._give_up,
    "pace": Server._pace,
    "verify": Server._begin_verify,
    "stop-verify": Server._stop_verify,
    "verified-noted": Server._note_verified,
    "zero": Server._zero,
    "flush": Server._flush,
    "stop": Server._stop,
}
