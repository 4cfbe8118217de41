# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The compiled engine. Its design is in the package's docstring; its Python face is at the end of this file."""

include "platform.pxi"
include "ring.pxi"
include "arena.pxi"
include "bitmap.pxi"
include "core.pxi"
include "extents.pxi"
include "mutants.pxi"
include "claims.pxi"
include "dirty.pxi"
include "stream.pxi"
include "requests.pxi"
include "backlog.pxi"
include "file.pxi"
include "remote.pxi"
include "door.pxi"
include "copier.pxi"
include "repairer.pxi"
include "verifier.pxi"
include "prober.pxi"
include "loop.pxi"
include "uring.pxi"
include "simulator.pxi"

import os
import threading

cimport cython

from proxy.engine.types import (
    DeviceStatistics, Event, EventKind, LegRole, Mismatch as MismatchReport, OpKind, PendingOp,
    RequestKind, Statistics, VerifyReport,
)

cdef struct AddLegMail:
    Leg leg
    int32_t error

cdef struct LegMail:
    int64_t id
    uint32_t range_count
    CopyRange *ranges
    int32_t error

cdef struct VerifyMail:
    uint32_t range_count
    CopyRange *ranges
    uint64_t rate
    bint repair
    int32_t error

cdef struct RequestMail:
    uint8_t kind
    uint32_t disk
    uint64_t offset
    uint64_t length
    uint64_t token
    int32_t error

cdef struct PlaneMail:
    uint32_t plane

cdef struct GiveUpMail:
    uint32_t plane
    uint64_t *lacking
    bint written

cdef struct BacklogMail:
    Leg *leg
    uint64_t bytes
    uint64_t age_ns

cdef struct StatisticsMail:
    Counters counters
    uint32_t connections
    uint64_t running
    bint held
    uint64_t generation
    uint64_t memory_bytes
    uint64_t backlog
    uint32_t behind
    uint32_t waited_for

cdef struct DevicesMail:
    Leg *leg
    Device *devices            # copies, as many as the leg has

cdef struct PaceMail:
    uint64_t rate
    uint64_t floor

cdef Leg *leg_by_id(Core *core, int64_t id) noexcept nogil:
    cdef uint32_t i
    for i in range(LEG_SLOTS):
        if core.legs[i].in_use and core.legs[i].id == id:
            return &core.legs[i]
    return NULL

cdef void mail_add_leg(Core *core, void *arguments) noexcept nogil:
    cdef AddLegMail *request = <AddLegMail *>arguments
    cdef Leg *leg
    cdef Device *device
    cdef uint32_t i, j
    request.error = EBUSY
    for i in range(LEG_SLOTS):
        leg = &core.legs[i]
        if leg.in_use:
            continue
        leg[0] = request.leg
        leg.in_use = True
        for j in range(leg.device_count):
            device = &leg.devices[j]
            device.leg = leg
            device.heard_ns = core.now_ns
            if device.kind == DEVICE_NBD:
                stream_receive(core, device.stream)
        request.error = 0
        return

cdef void mail_forget_leg(Core *core, void *arguments) noexcept nogil:
    (<Leg *>arguments).in_use = False

cdef void mail_fence(Core *core, void *arguments) noexcept nogil:
    fence(core, <Leg *>arguments)

cdef void mail_close_leg(Core *core, void *arguments) noexcept nogil:
    leg_close(core, <Leg *>arguments)

cdef void mail_copy(Core *core, void *arguments) noexcept nogil:
    cdef LegMail *request = <LegMail *>arguments
    cdef Leg *leg = leg_by_id(core, request.id)
    cdef CopyRange *before = leg.copy_ranges
    leg.copy_ranges = request.ranges
    request.error = copier_start(core, leg, request.range_count)
    if request.error:
        leg.copy_ranges = before
    else:
        request.ranges = before  # the control thread frees what it gets back

cdef void mail_open_bitmap(Core *core, void *arguments) noexcept nogil:
    core.dirty = (<Dirty *>arguments)[0]
    core.dirty.round_ns = core.now_ns + core.round_every_ns

cdef void mail_fill_plane(Core *core, void *arguments) noexcept nogil:
    cdef PlaneMail *request = <PlaneMail *>arguments
    cdef uint64_t region
    for region in range(core.dirty.regions):
        bit_set(core.dirty.planes[request.plane], region)
        dirty_stale(&core.dirty, request.plane, region >> 6)
    dirty_write(core)

cdef void mail_give_up(Core *core, void *arguments) noexcept nogil:
    cdef GiveUpMail *request = <GiveUpMail *>arguments
    cdef Dirty *dirty = &core.dirty
    cdef uint32_t plane, i
    cdef uint64_t word
    for i in range(LEG_SLOTS):
        # What a copy from the leg that is given up has brought over is to be copied from another.
        if core.copiers[i].in_use and not core.copiers[i].error:
            core.copiers[i].error = ECANCELED
    for word in range(dirty.words):
        request.lacking[word] = dirty.planes[request.plane][word] | dirty.planes[INTENT][word]
        for plane in range(1, PLANES):
            if plane != request.plane:
                dirty_put(dirty, plane, word, dirty.planes[plane][word] | request.lacking[word])
    dirty_write(core)
    request.written = not dirty.writing or dirty.plane == INTENT
    for plane in range(1, PLANES):
        if plane != request.plane and dirty.stale_count[plane]:
            request.written = False

cdef void mail_backlog(Core *core, void *arguments) noexcept nogil:
    cdef BacklogMail *request = <BacklogMail *>arguments
    request.bytes = request.leg.ship_bytes
    request.age_ns = 0
    if (lags(request.leg) and request.leg.ships_landed < core.ships_end
            and core.now_ns > ship_at(core, request.leg.ships_landed).answered_ns):
        request.age_ns = core.now_ns - ship_at(core, request.leg.ships_landed).answered_ns

cdef void mail_statistics(Core *core, void *arguments) noexcept nogil:
    cdef StatisticsMail *request = <StatisticsMail *>arguments
    cdef uint32_t i
    request.counters = core.counters
    request.connections = core.connection_count
    request.running = core.running - errands_running(core, ALL_LEGS) + core.parked.count + core.cramped.count
    request.held = core.held
    request.memory_bytes = core.arena.used_bytes
    request.backlog = core.ships_end - core.ships_first
    request.generation = 0
    request.behind = 0
    request.waited_for = 0
    for i in range(REQUESTS_MAX):
        request.waited_for += core.requests[i].connection != NULL and core.requests[i].state != IDLE
    if core.map != NULL:
        request.generation = core.map.generation
        for i in range(core.map.leg_count):
            request.behind += core.map.legs[i].behind

cdef void mail_device_statistics(Core *core, void *arguments) noexcept nogil:
    cdef DevicesMail *request = <DevicesMail *>arguments
    memcpy(request.devices, request.leg.devices, request.leg.device_count * sizeof(Device))

cdef void mail_pace(Core *core, void *arguments) noexcept nogil:
    core.copy_rate = (<PaceMail *>arguments).rate
    core.copy_floor = (<PaceMail *>arguments).floor

cdef void mail_verify(Core *core, void *arguments) noexcept nogil:
    cdef VerifyMail *request = <VerifyMail *>arguments
    cdef CopyRange *before = core.verifier.ranges
    request.error = verifier_start(core, request.ranges, request.range_count, request.rate, request.repair)
    if not request.error:
        request.ranges = before  # the control thread frees what it gets back

cdef void mail_stop_verify(Core *core, void *arguments) noexcept nogil:
    if core.verifier.in_use and not core.verifier.error:
        core.verifier.error = ECANCELED

cdef void mail_verify_report(Core *core, void *arguments) noexcept nogil:
    memcpy(arguments, &core.verifier, sizeof(Verifier))

cdef void mail_hold(Core *core, void *arguments) noexcept nogil:
    hold(core, (<uint16_t *>arguments)[0])

cdef void mail_release(Core *core, void *arguments) noexcept nogil:
    release(core)

cdef void mail_install(Core *core, void *arguments) noexcept nogil:
    install(core, <Map *>arguments)

cdef void mail_fail_parked(Core *core, void *arguments) noexcept nogil:
    fail_parked(core)

cdef void mail_fail_clients(Core *core, void *arguments) noexcept nogil:
    fail_clients(core)

cdef void mail_open_connection(Core *core, void *arguments) noexcept nogil:
    connection_open(core, <Connection *>arguments)

cdef void mail_end_connection(Core *core, void *arguments) noexcept nogil:
    connection_end(core, <Connection *>arguments)

cdef void mail_request(Core *core, void *arguments) noexcept nogil:
    cdef RequestMail *mail = <RequestMail *>arguments
    cdef Request *request = request_take(core, True)
    mail.error = EBUSY
    if request == NULL:
        return
    request.kind = mail.kind
    request.disk = mail.disk
    request.offset = mail.offset
    request.length = mail.length
    request.token = mail.token
    if (mail.offset | mail.length) & (CLAIM_BLOCK - 1):
        request.buffer = arena_take(&core.arena, 2 * CLAIM_BLOCK)
        if request.buffer == NULL:
            request_free(core, request)
            return
        request.edges = request.buffer
    mail.error = 0
    admit(core, request)


cdef bint stream_open(Stream *stream, int fd) noexcept:
    stream.fd = fd
    stream.rx = <char *>malloc(RX_BYTES)
    return stream.rx != NULL

cdef void connection_free(Connection *connection) noexcept:
    close(connection.stream.fd)
    free(connection.stream.rx)
    free(connection)

cdef void leg_close_descriptors(Leg *leg) noexcept:
    cdef uint32_t i
    for i in range(leg.device_count):
        if leg.devices[i].fd >= 0:
            close(leg.devices[i].fd)
        leg.devices[i].fd = -1

cdef void leg_free(Leg *leg) noexcept:
    cdef uint32_t i
    leg_close_descriptors(leg)
    for i in range(leg.device_count):
        if leg.devices[i].stream != NULL:
            free(leg.devices[i].stream.rx)
            free(leg.devices[i].stream)
    free(leg.devices)
    free(leg.copy_ranges)

cdef void bitmap_free(Dirty *dirty) noexcept:
    cdef uint32_t plane
    if dirty.fd >= 0:
        close(dirty.fd)
    for plane in range(PLANES):
        free(dirty.planes[plane])
        free(dirty.stale[plane])
        free(dirty.copied[plane])
    free(dirty.durable)
    free(dirty.touched)
    free(dirty.touched_before)
    free(dirty.clearing)
    free(dirty.stage)

cdef int table_fill(LegTable *table, extent_map, list kept) except -1:
    """Point ``table`` at the columns of an extent map, and keep them alive in ``kept``."""
    cdef const uint64_t[::1] offsets = extent_map.offsets
    cdef const uint32_t[::1] devices = extent_map.devices
    cdef const uint64_t[::1] device_offsets = extent_map.device_offsets
    kept.append((offsets, devices, device_offsets))
    table.count = <uint64_t>devices.shape[0]
    if (table.count == 0 or <uint64_t>offsets.shape[0] != table.count + 1
            or <uint64_t>device_offsets.shape[0] != table.count):
        raise ValueError("an extent map is malformed")
    table.offsets = &offsets[0]
    table.devices = &devices[0]
    table.device_offsets = &device_offsets[0]
    return 0

cdef int fill_ranges(CopyRange *to, ranges) except -1:
    for i, (disk, offset, length) in enumerate(ranges):
        if length <= 0 or offset < 0 or (offset | length) % CLAIM_BLOCK:
            raise ValueError(f"range {offset}+{length} is not made of whole blocks")
        to[<size_t>i].disk = disk
        to[<size_t>i].offset = offset
        to[<size_t>i].length = length
    return 0

cdef void map_free(Map *map) noexcept:
    free(map.disks)
    free(map)


@cython.no_gc_clear  # __dealloc__ still needs its maps
cdef class Engine:
    """One data plane. Every method is the control thread's; run() alone is the data thread's.

    Args:
        nbd_errors: errno to the protocol's error value; what is missing is EIO.
        deadline_ns: how long a device may take for one operation before it is reported.
        medium_errors: errnos of a device that is there and cannot read; with an uptodate backup such a
            read is repaired, not reported. None: every error is reported.
        probe_ns: how long a device may be silent before it is asked for something; 0: for ever.
    """

    cdef Core *core
    cdef object _lock
    cdef object _thread
    cdef Connection *_connections[CONNECTIONS_MAX]
    cdef dict _maps            # generation -> (address of the Map, what keeps its arrays alive)
    cdef uint64_t _next_token

    def __cinit__(self, *, dict nbd_errors, uint64_t deadline_ns, medium_errors=(), uint64_t probe_ns=0):
        cdef Core *core
        cdef uint32_t i
        self.core = core = <Core *>calloc(1, sizeof(Core))
        if core == NULL:
            raise MemoryError
        self._lock = threading.Lock()
        self._maps = {}
        self._next_token = 1
        core.deadline_ns = deadline_ns
        core.probe_ns = probe_ns
        core.round_every_ns = ROUND_NS
        core.dirty.fd = -1
        core.dirty.op.done = dirty_written
        crc_prepare()
        core.wake_fd = core.event_fd = -1
        core.requests = <Request *>calloc(REQUESTS_MAX, sizeof(Request))
        core.subops = <SubOp *>calloc(SUBOPS_MAX, sizeof(SubOp))
        core.ships = <Ship *>calloc(SHIPS_MAX, sizeof(Ship))
        if core.requests == NULL or core.subops == NULL or core.ships == NULL or arena_open(&core.arena) < 0:
            raise MemoryError
        core.zeroes = <char *>mmap(NULL, ZERO_FILL_BYTES, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if core.zeroes == <char *>MAP_FAILED:
            core.zeroes = NULL
            raise MemoryError
        for i in range(REQUESTS_MAX):
            list_push(&core.free_requests, &core.requests[i])
        for i in range(SUBOPS_MAX):
            core.subops[i].op.done = file_done
            core.subops[i].op.owner = &core.subops[i]
            core.subops[i].next = core.free_subops
            core.free_subops = &core.subops[i]
        for i in range(256):
            core.nbd_errors[i] = <uint8_t>(0 if i == 0 else nbd_errors.get(i, EIO))
        if any(not 0 < error < 256 for error in medium_errors):
            raise ValueError("an errno is 1 to 255")
        for i in medium_errors:
            core.medium_errors[i] = True
        pthread_mutex_init(&core.mutex, NULL)
        pthread_cond_init(&core.mail_taken, NULL)
        # The ring waits on the first itself, so it must not be non-blocking.
        core.wake_fd = eventfd(0, EFD_CLOEXEC)
        core.event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if core.wake_fd < 0 or core.event_fd < 0:
            raise OSError(errno, os.strerror(errno))
        core.held = True  # until the first map there is nothing to run under

    def __dealloc__(self):
        cdef Core *core = self.core
        cdef uint32_t i
        if core == NULL:
            return
        if anything_in_flight(core) or core.dirty.writing:
            return  # a device that never answered may still write into our memory: leave it mapped
        for i in range(LEG_SLOTS):
            if core.legs[i].in_use:
                leg_free(&core.legs[i])
        for i in range(CONNECTIONS_MAX):
            if self._connections[i] != NULL:
                connection_free(self._connections[i])
        for address, _ in self._maps.values():
            map_free(<Map *><size_t>address)
        if core.wake_fd >= 0:
            close(core.wake_fd)
        if core.event_fd >= 0:
            close(core.event_fd)
        if core.zeroes != NULL:
            munmap(core.zeroes, ZERO_FILL_BYTES)
        bitmap_free(&core.dirty)
        arena_close(&core.arena)
        free(core.verifier.ranges)
        free(core.requests)
        free(core.subops)
        free(core.ships)
        pthread_cond_destroy(&core.mail_taken)
        pthread_mutex_destroy(&core.mutex)
        free(core)

    cdef int _mail(self, mail_t function, void *arguments) except -1:
        cdef bint taken = False
        with self._lock:
            with nogil:
                taken = mail(self.core, function, arguments)
        if not taken:
            raise RuntimeError("the engine is not running")
        return 0

    cdef Leg *_leg(self, int64_t leg_id) except NULL:
        cdef Leg *leg = leg_by_id(self.core, leg_id)
        if leg == NULL:
            raise KeyError(leg_id)
        return leg

    # --- Life ------------------------------------------------------------------------------------

    def start(self):
        """Start the data thread and wait until it takes commands.

        Raises:
            OSError: the kernel gives no ring.
        """
        cdef int32_t error
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        with nogil:
            pthread_mutex_lock(&self.core.mutex)
            while not self.core.running_loop and not self.core.start_error:
                pthread_cond_wait(&self.core.mail_taken, &self.core.mutex)
            error = self.core.start_error
            pthread_mutex_unlock(&self.core.mutex)
        if error:
            raise OSError(error, f"io_uring is not to be had: {os.strerror(error)}")

    def _run(self):
        with nogil:
            run_loop(self.core)

    def stop(self):
        """Cut every stream, wait for what is in flight on files, and end the data thread."""
        self._mail(stop, NULL)
        self._thread.join()

    @property
    def event_fd(self):
        """Readable when events() has something."""
        return self.core.event_fd

    def events(self):
        """All events since the last call, oldest first. Memory of what they say is gone is freed here."""
        cdef Core *core = self.core
        cdef EventRecord record
        cdef bint more = True
        cdef list found = []
        try:
            os.read(core.event_fd, 8)
        except BlockingIOError:
            pass
        while True:
            pthread_mutex_lock(&core.mutex)
            more = core.event_count > 0
            if more:
                record = core.events[core.event_first]
                core.event_first = (core.event_first + 1) % EVENTS_MAX
                core.event_count -= 1
            pthread_mutex_unlock(&core.mutex)
            if not more:
                return found
            if record.kind == EVENT_MAP_RETIRED:
                address, _ = self._maps.pop(record.generation)
                map_free(<Map *><size_t>address)
            elif record.kind == EVENT_CONNECTION_CLOSED:
                connection_free(self._connections[record.a])
                self._connections[record.a] = NULL
            elif record.kind == EVENT_LEG_CLOSED:
                leg_close_descriptors(leg_by_id(core, record.leg))
            elif record.kind == EVENT_LEG_FORGOTTEN:
                leg = leg_by_id(core, record.leg)
                self._mail(mail_forget_leg, leg)
                leg_free(leg)
            found.append(Event(EventKind(record.kind), record.leg, record.device, record.code,
                               record.generation, record.a, record.b))

    # --- Legs ------------------------------------------------------------------------------------

    def add_leg(self, int64_t leg_id, devices):
        """Make a leg of connected devices (DeviceSpec, in the order of the group) known to the engine.

        Nothing is sent to it before a map names it. The descriptors are the engine's from here on,
        also when this raises.
        """
        cdef AddLegMail request
        cdef Device *device
        cdef uint32_t i
        memset(&request, 0, sizeof(request))
        request.leg.core = self.core
        request.leg.id = leg_id
        request.leg.device_count = <uint32_t>len(devices)
        request.leg.devices = <Device *>calloc(len(devices), sizeof(Device))
        if request.leg.devices == NULL:
            raise MemoryError
        for i in range(request.leg.device_count):
            spec = devices[i]
            device = &request.leg.devices[i]
            device.core = self.core
            device.index = i
            device.fd = spec.fd
            device.kind = spec.kind
            device.block_size = spec.block_size
            device.transfer_max = spec.transfer_max
            device.in_memory = spec.in_memory
            device.can_flush = spec.can_flush
            device.can_fua = spec.can_fua
            device.can_zero = spec.can_zero
            device.can_punch = device.can_zero_range = True
            if device.kind == DEVICE_NBD:
                device.stream = <Stream *>calloc(1, sizeof(Stream))
                if device.stream == NULL or not stream_open(device.stream, spec.fd):
                    leg_free(&request.leg)
                    raise MemoryError
                device.stream.rx_op.done = remote_receive_done
                device.stream.tx_op.done = remote_send_done
                device.stream.rx_op.owner = device.stream.tx_op.owner = device
        if leg_by_id(self.core, leg_id) != NULL:
            leg_free(&request.leg)
            raise ValueError(f"leg {leg_id} is known already")
        try:
            self._mail(mail_add_leg, &request)
        except BaseException:
            leg_free(&request.leg)
            raise
        if request.error:
            leg_free(&request.leg)
            raise OSError(request.error, f"more than {LEG_SLOTS} legs, with those not drained yet")

    def fence_leg(self, int64_t leg_id):
        """Close the gate: nothing is issued to this leg ever again. LEG_DRAINED tells when all has come back."""
        self._mail(mail_fence, self._leg(leg_id))

    def close_leg(self, int64_t leg_id):
        """Fence a leg and cut its streams; LEG_CLOSED tells when its descriptors are closed."""
        self._mail(mail_close_leg, self._leg(leg_id))

    def copy_leg(self, int64_t leg_id, ranges):
        """Begin to copy ``ranges`` (disk number, offset, length in bytes) to a leg that is syncing.

        COPIED tells how it ended.
        """
        cdef LegMail request
        cdef uint32_t i
        memset(&request, 0, sizeof(request))
        self._leg(leg_id)
        request.id = leg_id
        request.range_count = <uint32_t>len(ranges)
        request.ranges = <CopyRange *>calloc(len(ranges) or 1, sizeof(CopyRange))
        if request.ranges == NULL:
            raise MemoryError
        try:
            fill_ranges(request.ranges, ranges)
            self._mail(mail_copy, &request)
        finally:
            free(request.ranges)
        if request.error:
            raise OSError(request.error, os.strerror(request.error))

    def copy_progress(self, int64_t leg_id):
        """Bytes copied and in all, of the copy to this leg that goes on; None when there is none.

        A copy that was sent back to an earlier place copies some of it twice: then all is what was copied.
        """
        cdef uint32_t i
        cdef Copier *copier
        for i in range(LEG_SLOTS):
            if self.core.copiers[i].in_use and self.core.copiers[i].leg.id == leg_id:
                copier = &self.core.copiers[i]
                return copier.copied, max(copier.total, copier.copied)
        return None

    def pace_copies(self, *, uint64_t rate, uint64_t floor):
        """Let copies take ``rate`` bytes a second at most, and ``floor`` while clients are at work; 0: no limit."""
        cdef PaceMail request
        request.rate = rate
        request.floor = floor
        self._mail(mail_pace, &request)

    def backlog(self, int64_t leg_id):
        """What a leg has yet to get of the backlog: bytes, and for how long the oldest has been answered, in ns."""
        cdef BacklogMail request
        request.leg = self._leg(leg_id)
        self._mail(mail_backlog, &request)
        return request.bytes, request.age_ns

    # --- The dirty bitmap ------------------------------------------------------------------------

    def open_bitmap(self, int fd, *, uint32_t shift, uint64_t regions, uint64_t identity, planes):
        """Mark in this file what is written to, from the first map on that is installed with ``tracking``.

        Args:
            fd: of a file as proxy.dirtymap describes, just written; the engine's from here on.
            shift: the size of a region is 2 to this power.
            regions: how many the domain has.
            identity: what each sector carries.
            planes: what the file holds: the bits of each plane, in bytes of whole sectors.
        """
        cdef Dirty dirty
        cdef uint32_t i
        cdef const unsigned char[::1] bits
        assert not self.core.dirty.open
        memset(&dirty, 0, sizeof(dirty))
        dirty.fd = fd
        dirty.open = True
        dirty.op.done = dirty_written
        dirty.shift = shift
        dirty.regions = regions
        dirty.identity = identity
        dirty.sectors = (regions + 64 * SECTOR_WORDS - 1) // (64 * SECTOR_WORDS)
        dirty.words = dirty.sectors * SECTOR_WORDS
        dirty.durable = <uint64_t *>calloc(dirty.words, 8)
        dirty.touched = <uint64_t *>calloc(dirty.words, 8)
        dirty.touched_before = <uint64_t *>calloc(dirty.words, 8)
        dirty.clearing = <uint64_t *>calloc(dirty.words, 8)
        dirty.stage = <char *>calloc(STAGE_SECTORS, DIRTY_SECTOR)
        for i in range(PLANES):
            dirty.planes[i] = <uint64_t *>calloc(dirty.words, 8)
            dirty.stale[i] = <uint8_t *>calloc(dirty.sectors, 1)
            dirty.copied[i] = <uint64_t *>calloc(dirty.words, 8)
            if dirty.planes[i] == NULL or dirty.stale[i] == NULL or dirty.copied[i] == NULL:
                bitmap_free(&dirty)
                raise MemoryError
        if (dirty.durable == NULL or dirty.touched == NULL or dirty.touched_before == NULL
                or dirty.clearing == NULL or dirty.stage == NULL):
            bitmap_free(&dirty)
            raise MemoryError
        for i in range(PLANES):
            bits = planes[i]
            if <uint64_t>bits.shape[0] != dirty.words * 8:
                bitmap_free(&dirty)
                raise ValueError(f"plane {i} has {bits.shape[0]} bytes instead of {dirty.words * 8}")
            memcpy(dirty.planes[i], &bits[0], dirty.words * 8)
        memcpy(dirty.durable, dirty.planes[INTENT], dirty.words * 8)
        try:
            self._mail(mail_open_bitmap, &dirty)
        except BaseException:
            bitmap_free(&dirty)
            raise

    def fill_plane(self, uint32_t plane):
        """Have the leg of this plane lack everything."""
        cdef PlaneMail request
        assert 0 < plane < PLANES and self.core.dirty.open
        request.plane = plane
        self._mail(mail_fill_plane, &request)

    def give_up_to(self, uint32_t plane):
        """Prepare for the leg of this plane to serve although it lacks something, which is then lost.

        What it lacks the other legs have otherwise, so they lack it from here on: their planes take it over.

        Returns:
            The bits of the regions that it lacks, or may; and whether the others' planes are on the disk. It must
            not serve before they are: call again.
        """
        cdef GiveUpMail request
        assert 0 < plane < PLANES and self.core.dirty.open
        bits = bytearray(self.core.dirty.words * 8)
        cdef unsigned char[::1] view = bits
        request.plane = plane
        request.lacking = <uint64_t *>&view[0]
        self._mail(mail_give_up, &request)
        return bytes(bits), bool(request.written)

    def dirty_bytes(self, uint32_t plane, *, bint away):
        """Bytes of disks in regions that a leg lacks; ``away``: it takes no part in the map.

        Of plane 0: in regions of which legs may differ if we crash now.
        """
        cdef Core *core = self.core
        cdef uint64_t count = 0
        assert plane < PLANES
        if core.map != NULL and core.map.tracked:
            with nogil:  # whoever frees maps is in this thread
                count = dirty_bytes(&core.dirty, core.map, plane, away)
        return count

    # --- Verify ----------------------------------------------------------------------------------

    def verify(self, ranges, *, uint64_t rate=0, bint repair=False):
        """Begin to compare all backups with the active leg, byte by byte; VERIFIED tells the end.

        Args:
            ranges: (disk number, offset, length in bytes), in whole blocks.
            rate: bytes of the active leg a second; 0: as fast as the devices can, but while clients are at
                work no faster than copies then are (``pace_copies``).
            repair: write what differs from the active leg to the backup.

        Raises:
            OSError: EBUSY, one is under way; EINVAL, there is no uptodate backup.
        """
        cdef VerifyMail request
        cdef uint32_t i
        memset(&request, 0, sizeof(request))
        request.rate = rate
        request.repair = repair
        request.range_count = <uint32_t>len(ranges)
        request.ranges = <CopyRange *>calloc(len(ranges) or 1, sizeof(CopyRange))
        if request.ranges == NULL:
            raise MemoryError
        try:
            fill_ranges(request.ranges, ranges)
            self._mail(mail_verify, &request)
        finally:
            free(request.ranges)
        if request.error:
            raise OSError(request.error, os.strerror(request.error))

    def stop_verify(self):
        """Give up the verify under way, if there is one; VERIFIED tells when it is over."""
        self._mail(mail_stop_verify, NULL)

    def verify_report(self):
        """How far the verify under way has come, or what the last one found; None when there was none."""
        cdef Verifier *v = <Verifier *>malloc(sizeof(Verifier))
        cdef uint32_t i
        if v == NULL:
            raise MemoryError
        try:
            self._mail(mail_verify_report, v)
            if not v.begun:
                return None
            found = sorted(
                MismatchReport(v.found[i].leg, v.found[i].disk, v.found[i].offset, v.found[i].length)
                for i in range(v.found_count))
            return VerifyReport(
                v.in_use, v.error, v.repair, v.total, v.compared, v.mismatched, v.repaired, v.unreadable,
                v.unlisted, tuple(found))
        finally:
            free(v)

    # --- The map ---------------------------------------------------------------------------------

    def install(self, uint64_t generation, legs, disks, *, tracking=None, uint64_t backlog=0):
        """Switch to a new map, between two batches. What failed under the old one is done again.

        Args:
            generation: higher than any before.
            legs: (leg id, LegRole) pairs; exactly one is ACTIVE.
            disks: (number, size in bytes, one extent map per leg) by ascending number. An extent
                map has ``offsets``, ``devices`` and ``device_offsets`` as proxy.extentmap.ExtentMap;
                those of one disk cover the same number of whole blocks, at least its size.
            tracking: a Tracking; None: legs cannot come to differ, and nothing is marked in the bitmap.
            backlog: bytes of memory for what backups have yet to get of what clients were told is written;
                0: they are told when all legs have it.
        """
        cdef Core *core = self.core
        cdef Map *map
        cdef Leg *leg
        cdef LegTable *table
        cdef uint32_t i, j, highest
        cdef uint64_t k
        cdef list kept = []
        if not 1 <= len(legs) <= LEGS_MAX:
            raise ValueError(f"{len(legs)} legs; a map has 1 to {LEGS_MAX}")
        if [role for _, role in legs].count(LegRole.ACTIVE) != 1:
            raise ValueError("exactly one leg is active")
        if len({leg_id for leg_id, _ in legs}) != len(legs):
            raise ValueError("a leg is named twice")
        if core.map != NULL and generation <= core.map.generation or generation in self._maps:
            raise ValueError(f"generation {generation} is not newer than the installed one")
        map = <Map *>calloc(1, sizeof(Map))
        if map == NULL:
            raise MemoryError
        map.disks = <DiskMap *>calloc(len(disks) or 1, sizeof(DiskMap))
        try:
            if map.disks == NULL:
                raise MemoryError
            map.generation = generation
            map.leg_count = <uint32_t>len(legs)
            map.disk_count = <uint32_t>len(disks)
            map.block_size = 1
            map.can_fua = map.can_zero = map.reads_memory = True
            if tracking is not None:
                if not core.dirty.open:
                    raise ValueError("there is no dirty bitmap to track in")
                if len(tracking.planes) != len(legs) or len(tracking.maps) != len(disks):
                    raise ValueError("tracking is not of these legs and disks")
                map.tracked = True
                map.asynchronous = backlog > 0
                for plane in tracking.away:
                    map.away |= 1 << plane
            for i, (leg_id, role) in enumerate(legs):
                leg = self._leg(leg_id)
                if leg.closing:
                    raise ValueError(f"leg {leg_id} is being closed")
                map.legs[i] = leg
                map.roles[i] = role
                if tracking is not None:
                    map.planes[i] = tracking.planes[i]
                    assert 0 < map.planes[i] < PLANES and not map.away & (1 << map.planes[i])
                if role == LegRole.ACTIVE:
                    map.active = i
                for j in range(leg.device_count):
                    if role == LegRole.ACTIVE and not leg.devices[j].in_memory:
                        map.reads_memory = False
                    if leg.devices[j].block_size > map.block_size:
                        map.block_size = leg.devices[j].block_size
                    map.can_fua = map.can_fua and leg.devices[j].can_fua
                    map.can_zero = map.can_zero and (
                        leg.devices[j].kind == DEVICE_FILE or leg.devices[j].can_zero)
            if map.block_size > CLAIM_BLOCK:
                raise ValueError(f"blocks of {map.block_size} bytes; at most {CLAIM_BLOCK} are supported")
            for i, (number, size, tables) in enumerate(disks):
                map.disks[i].number = number
                map.disks[i].size = size
                if i and map.disks[i - 1].number >= map.disks[i].number:
                    raise ValueError("disks are not in ascending order of number")
                if len(tables) != len(legs):
                    raise ValueError(f"disk {number} has {len(tables)} extent maps for {len(legs)} legs")
                for j, extent_map in enumerate(tables):
                    table = &map.disks[i].tables[j]
                    table_fill(table, extent_map, kept)
                    if j == 0:
                        map.disks[i].allotted = table.offsets[table.count]
                    if table.offsets[table.count] != map.disks[i].allotted or map.disks[i].allotted % CLAIM_BLOCK:
                        raise ValueError(f"the extent maps of disk {number} are not all of the same whole blocks")
                    if map.disks[i].allotted < map.disks[i].size:
                        raise ValueError(f"the extent map of disk {number} is shorter than the disk")
                    highest = 0
                    for k in range(table.count):
                        if table.devices[k] > highest:
                            highest = table.devices[k]
                    if highest >= map.legs[j].device_count:
                        raise ValueError(f"the extent map of disk {number} names a device its leg has not")
                if tracking is not None:
                    table = &map.disks[i].domain
                    table_fill(table, tracking.maps[i], kept)
                    if table.offsets[table.count] < map.disks[i].allotted:
                        raise ValueError(f"disk {number} is longer than its part of the domain")
                    for k in range(table.count):
                        if ((table.device_offsets[k] + table.offsets[k + 1] - table.offsets[k] - 1)
                                >> core.dirty.shift) >= core.dirty.regions:
                            raise ValueError(f"disk {number} reaches past the end of the domain")
            self._maps[generation] = (<size_t>map, kept)
            core.ship_limit = min(backlog, ARENA_CLIENT_BYTES)
            self._mail(mail_install, map)
        except BaseException:
            self._maps.pop(generation, None)
            map_free(map)
            raise

    def hold(self, legs=()):
        """Admit no request to the devices; the number of this hold.

        DRAINED with that number tells when those under way are done or parked, and these legs have answered their
        probes and, if they lag, have all that clients were told is written.
        """
        cdef uint16_t bits = 0
        cdef Leg *leg
        for leg_id in legs:
            leg = leg_by_id(self.core, leg_id)
            if leg != NULL:  # one that is gone owes nothing
                bits |= ship_bit(self.core, leg)
        self._mail(mail_hold, &bits)
        return self.core.holds

    def release(self):
        """Do again what was parked, let in what was held; REPLAYED tells what clients felt of it."""
        if self.core.map == NULL:
            raise RuntimeError("there is no map to run under yet")
        self._mail(mail_release, NULL)

    def fail_parked(self):
        """Answer parked requests with the error they met."""
        self._mail(mail_fail_parked, NULL)

    def fail_clients(self):
        """While the domain holds: answer all that clients wait for, or ask for, with an error, until hold() or release().

        No leg may be left that is not fenced, or some requests go on waiting for its answers.
        """
        if not self.core.held:
            raise RuntimeError("clients are being served")
        self._mail(mail_fail_clients, NULL)

    def submit(self, kind, uint32_t disk=0, uint64_t offset=0, uint64_t length=0):
        """Have a FLUSH or ZERO of the engine's own carried out like a client's; the token DONE names."""
        cdef RequestMail request
        memset(&request, 0, sizeof(request))
        request.kind = RequestKind(kind)
        request.disk = disk
        request.offset = offset
        request.length = length
        request.token = self._next_token
        self._next_token += 1
        self._mail(mail_request, &request)
        if request.error:
            raise OSError(request.error, os.strerror(request.error))
        return request.token

    # --- Connections -----------------------------------------------------------------------------

    def add_connection(self, int fd, uint32_t disk, *, bint obeys_block_size, bytes leftover=b""):
        """Serve a client that has finished negotiation; the number its events name.

        Args:
            fd: its socket, in blocking mode; the engine's from here on.
            disk: the number of the disk it chose.
            obeys_block_size: it was told the smallest block on its own asking.
            leftover: what it had already sent of its first requests.

        The descriptor is closed when this raises.
        """
        cdef Connection *connection
        cdef uint32_t number = 0
        if len(leftover) > RX_BYTES:
            close(fd)
            raise ValueError("more early bytes than a receive buffer holds")
        while number < CONNECTIONS_MAX and self._connections[number] != NULL:
            number += 1
        if number == CONNECTIONS_MAX:
            close(fd)
            raise OSError(EBUSY, f"more than {CONNECTIONS_MAX} connections")
        connection = <Connection *>calloc(1, sizeof(Connection))
        if connection == NULL or not stream_open(&connection.stream, fd):
            free(connection)
            close(fd)
            raise MemoryError
        connection.core = self.core
        connection.number = number
        connection.disk = disk
        connection.obeys_block_size = obeys_block_size
        connection.stream.rx_op.done = connection_receive_done
        connection.stream.tx_op.done = connection_send_done
        connection.stream.rx_op.owner = connection.stream.tx_op.owner = connection
        memcpy(connection.stream.rx, <const char *>leftover, len(leftover))
        connection.stream.rx_end = <uint32_t>len(leftover)
        self._connections[number] = connection
        try:
            self._mail(mail_open_connection, connection)
        except BaseException:
            self._connections[number] = NULL
            connection_free(connection)
            raise
        return number

    def end_connection(self, uint32_t number):
        """Read no more from a client, answer what it has asked, then close; CONNECTION_CLOSED tells."""
        if number >= CONNECTIONS_MAX or self._connections[number] == NULL:
            raise KeyError(number)
        self._mail(mail_end_connection, self._connections[number])

    # --- Statistics ------------------------------------------------------------------------------

    def statistics(self):
        """Counters of the whole engine, between two batches."""
        cdef StatisticsMail m
        cdef Counters s
        self._mail(mail_statistics, &m)
        s = m.counters
        return Statistics(
            s.reads, s.writes, s.flushes, s.trims, s.zeroes, s.read_bytes, s.written_bytes, s.errors, s.refused,
            s.waited, s.parked, s.replayed, s.late, m.connections, m.running, m.held, m.generation, m.memory_bytes,
            s.read_repairs, m.backlog, m.behind, m.waited_for)

    def device_statistics(self, int64_t leg_id):
        """Counters of each device of a leg, in order, between two batches."""
        cdef DevicesMail request
        cdef Device *d
        cdef uint32_t i
        cdef list found = []
        request.leg = self._leg(leg_id)
        request.devices = <Device *>malloc(request.leg.device_count * sizeof(Device))
        if request.devices == NULL:
            raise MemoryError
        try:
            self._mail(mail_device_statistics, &request)
            for i in range(request.leg.device_count):
                d = &request.devices[i]
                found.append(DeviceStatistics(
                    d.reads, d.writes, d.flushes, d.read_bytes, d.written_bytes, d.errors, d.in_flight, d.late,
                    d.unproven, d.latency_max_ns, d.error, d.lost, d.read_repairs))
        finally:
            free(request.devices)
        return found


cdef class SimulatedEngine(Engine):
    """The same engine on the simulator: no thread, no system calls, time and completions from the test.

    Commands take effect at once; step() runs one batch of what was completed.
    """

    cdef SimRing sim

    def __cinit__(self, **_):
        sim_open(&self.sim)
        self.core.ring = &self.sim.face
        self.core.stepped = True
        self.core.now_ns = self.sim.clock_ns

    def __dealloc__(self):
        self.sim.pending = NULL

    @property
    def now_ns(self):
        """The simulated time."""
        return self.sim.clock_ns

    @now_ns.setter
    def now_ns(self, uint64_t now_ns):
        self.sim.clock_ns = now_ns

    @property
    def round_every_ns(self):
        """Between two rounds of clearing marks; shorter than the shipping engine's where a test is."""
        return self.core.round_every_ns

    @round_every_ns.setter
    def round_every_ns(self, uint64_t round_every_ns):
        self.core.round_every_ns = round_every_ns

    def step(self):
        """Take in all completions so far and do what follows from them."""
        with nogil:
            sim_wait(&self.sim.face, self.core, 0)
            settle_all(self.core)

    def pending(self, uint64_t after=0):
        """Operations submitted and not completed, in order of submission; only those numbered above ``after``."""
        cdef Op *op = self.sim.pending
        cdef uint64_t length
        cdef size_t i
        cdef list found = []
        while op != NULL and op.number > after:
            length = op.length
            if op.kind == OP_RECEIVE or op.kind == OP_SEND:
                length = 0
                for i in range(op.message.msg_iovlen):
                    length += op.message.msg_iov[i].iov_len
            found.append(PendingOp(op.number, OpKind(op.kind), op.fd, op.offset, length, op.flags))
            op = op.next
        found.reverse()
        return found

    def data(self, uint64_t number):
        """The bytes a pending WRITE or SEND would put out."""
        cdef Op *op = sim_find(&self.sim, number, False)
        cdef size_t i
        if op == NULL:
            raise KeyError(number)
        if op.kind == OP_WRITE:
            return <bytes>op.data[:op.length]
        return b"".join([
            <bytes>(<char *>op.message.msg_iov[i].iov_base)[:op.message.msg_iov[i].iov_len]
            for i in range(op.message.msg_iovlen)])

    def complete(self, uint64_t number, int64_t result, bytes data=b""):
        """Complete an operation; ``data`` is what a READ or RECEIVE brings. Taken in by the next step()."""
        cdef Op *op = sim_find(&self.sim, number, True)
        cdef const char *source = data
        cdef size_t left = <size_t>len(data)
        cdef size_t i, length
        if op == NULL:
            raise KeyError(number)
        if op.kind == OP_READ:
            if left > op.length:
                raise ValueError("more data than was asked for")
            memcpy(op.data, source, left)
        elif op.kind == OP_RECEIVE:
            for i in range(op.message.msg_iovlen):
                length = op.message.msg_iov[i].iov_len
                if length > left:
                    length = left
                memcpy(op.message.msg_iov[i].iov_base, source, length)
                source += length
                left -= length
            if left:
                raise ValueError("more data than was asked for")
        sim_complete(&self.sim, op, result)

    def take_shut(self):
        """Descriptors whose streams the engine has ended since the last call."""
        cdef uint32_t i
        cdef list found = [self.sim.shut_fds[i] for i in range(self.sim.shut_count)]
        self.sim.shut_count = 0
        return found
