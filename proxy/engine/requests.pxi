# The life of a request: admitted, claimed, translated, issued to every leg that must have it, answered;
# or parked when a leg fails it, and done again, whole, under the next map.
#
#   admit ── held? ──> HELD ──release──┐
#     └─> begin ── conflict? ──> WAITING ──settle──┐
#             └─> start ──> RUNNING ──> finish     │
#                   ^          └─ a leg failed ──> PARKED ──install/release──> start

# --- Pools ---------------------------------------------------------------------------------------

cdef Request *request_take(Core *core, bint ours) noexcept nogil:
    """A blank request, or NULL: none is free for this kind of user."""
    cdef Request *request
    if core.free_requests.count <= (0 if ours else REQUESTS_RESERVED):
        return NULL
    request = list_pop(&core.free_requests)
    memset(request, 0, sizeof(Request))
    return request

cdef void request_free(Core *core, Request *request) noexcept nogil:
    if request.buffer != NULL:
        if request.connection != NULL:
            core.client_bytes -= arena_size(&core.arena, request.buffer)
        arena_release(&core.arena, request.buffer)
        request.buffer = NULL
    request.state = IDLE
    list_push(&core.free_requests, request)

cdef void map_release(Core *core, Map *map) noexcept nogil:
    cdef uint32_t i
    map.references -= 1
    if map.references == 0:
        for i in range(map.leg_count):
            map.legs[i].maps -= 1
            leg_check_closed(core, map.legs[i])
        event_put(core, EVENT_MAP_RETIRED, 0, 0, 0, map.generation, 0, 0)

# --- Admission -----------------------------------------------------------------------------------

cdef void admit(Core *core, Request *request) noexcept nogil:
    """Take in a request whose kind, disk, offset, length, flags and buffers are set."""
    request.admitted_ns = core.busy_ns = core.now_ns
    if request.connection != NULL:
        core.client_ns = core.now_ns
    request.claim_offset = request.offset & ~<uint64_t>(CLAIM_BLOCK - 1)
    request.claim_end = (request.offset + request.length + CLAIM_BLOCK - 1) & ~<uint64_t>(CLAIM_BLOCK - 1)
    request.exclusive = (request.kind == WRITE or request.kind == ZERO or request.kind == TRIM
                         or request.kind == REPAIR or (request.kind == VERIFY and request.step.exclusive))
    # A flush of the control thread's own covers what is there: an operator's hold is made durable by one.
    if (core.held and (request.kind != FLUSH or not request.token or core.map == NULL)
            and not (sf_mutant(ADMITTED_WHILE_HELD) and core.map != NULL)):
        request.state = HELD
        if core.failing and request.connection != NULL:
            finish(core, request, EIO)
            return
        mark_replayed(core, request)
        list_push(&core.held_requests, request)
        return
    begin(core, request)

cdef void begin(Core *core, Request *request) noexcept nogil:
    """Claim, and start unless an earlier request is in the way."""
    # A flush covers what has been answered, never what is still in flight: it claims nothing.
    if (request.length and request.kind != FLUSH and not mutant_unclaimed(request)
            and not claim(core, request)):
        core.counters.waited += 1
        request.state = WAITING
        list_push(&core.waiting, request)
        return
    start(core, request)

cdef void start(Core *core, Request *request) noexcept nogil:
    """Run a request, from its beginning, under the installed map."""
    cdef Map *map = core.map
    cdef uint64_t mask, limit
    cdef uint64_t end = request.offset + request.length
    cdef uint32_t hint = 0
    if (request.exclusive and map.tracked and not dirty_marked(core, request)
            and not sf_mutant(MARK_UNAWAITED)):
        dirty_await(core, request)
        return
    if request.state != CATCHING:
        request.barrier = core.ship_barrier
        request.seen = core.ships_end
        request.awaited = ALL_LEGS
        if ships_matter(request) and request.kind != FLUSH:
            request.seen = ships_overlapping(core, request)
    if ships_matter(request) and not ships_landed(core, request.awaited, request.seen) and not sf_mutant(LAG_UNAWAITED):
        request.state = CATCHING
        ships_await(core, request)
        return
    request.state = RUNNING
    core.running += 1
    request.failed = False
    request.rejected = False
    request.rereading = False
    request.error = 0
    request.map = map
    request.source = map.leg_count - 1 if sf_mutant(READ_FROM_LAST_LEG) else map.active
    map.references += 1
    if request.kind == FLUSH:
        enter(core, request, FLUSHING)
        advance(core, request)
        return
    request.disk_map = map_disk(
        map, request.disk, &hint if request.connection == NULL else &request.connection.disk_hint)
    if request.disk_map == NULL:
        finish(core, request, ESHUTDOWN)  # the disk was removed under its client
        return
    # Clients see the disk's size; we also work on what is allotted beyond it.
    limit = request.disk_map.size if request.connection != NULL else request.disk_map.allotted
    if end > limit:
        finish(core, request, EINVAL if request.kind == READ or request.kind == TRIM else ENOSPC)
        return
    request.block_size = map.block_size
    mask = map.block_size - 1
    request.span_offset = request.offset & ~mask
    request.span_end = (end + mask) & ~mask
    if request.length == 0:
        finish(core, request, 0)
        return
    if request.kind == TRIM:
        # Legs must stay equal, so a trim either zeroes on all of them or does nothing on any; and once it has
        # begun that holds under the next map too, whose legs may have larger blocks or be unable to zero.
        mask = CLAIM_BLOCK - 1
        request.span_offset = (request.offset + mask) & ~mask
        request.span_end = end & ~mask
        if request.span_offset >= request.span_end or not (map.can_zero or request.trimming):
            finish(core, request, 0)
            return
        request.trimming = True
        enter(core, request, ZEROING)
    elif request.kind == REPAIR:
        if not repair_holds(map, &core.repairs[core.repair_first]):
            finish(core, request, ECANCELED)
            return
        request.source = <uint32_t>repair_source(map)
        enter(core, request, READING)
    elif request.kind == VERIFY:
        if not verifier_holds(core, map):
            finish(core, request, ESTALE)
            return
        enter(core, request, READING)
    elif request.kind == READ or request.kind == COPY:
        enter(core, request, READING)
    elif ((request.offset != request.span_offset or end != request.span_end)
            and not (sf_mutant(EDGES_NOT_READ_AGAIN) and request.kind == WRITE and request.phase == READING_EDGES)):
        enter(core, request, READING_EDGES)
    else:
        enter(core, request, ZEROING if request.kind == ZERO else WRITING)
    advance(core, request)

# --- Phases --------------------------------------------------------------------------------------

cdef void enter(Core *core, Request *request, uint8_t phase) noexcept nogil:
    cdef Map *map = request.map
    cdef uint32_t i
    cdef bint resumed = sf_mutant(REPLAYED_IN_PART) and phase == WRITING and request.phase == WRITING
    request.phase = phase
    request.legs = 0
    for i in range(map.leg_count):
        if not resumed:
            request.cursors[i] = 0 if phase == FLUSHING else request.span_offset
        if phase == READING or phase == READING_EDGES or request.kind == VERIFY:
            if i == request.source:
                request.legs = 1 << i
        elif request.kind == REPAIR:
            if i == map.active:
                request.legs = 1 << i
        elif request.shipping != NULL:
            if map.legs[i] == request.shipping:
                request.legs = 1 << i
        elif map.asynchronous and request.connection != NULL and i != map.active:
            continue  # it is for the backlog
        elif sf_mutant(BACKUP_NOT_ZEROED) and phase == ZEROING and request.kind != COPY and i != map.active:
            continue
        elif request.kind != COPY or map.legs[i] == request.copier.leg:
            request.legs |= 1 << i
    if phase == READING_EDGES or phase == WRITING_EDGES:
        for i in range(map.leg_count):
            request.cursors[i] = 0
    elif phase == ZEROING and request.kind == ZERO:
        # Whole blocks only; the edges have been written.
        for i in range(map.leg_count):
            request.cursors[i] = zero_begin(request)

cdef inline uint64_t zero_begin(Request *request) noexcept nogil:
    cdef uint64_t mask = request.block_size - 1
    return (request.offset + mask) & ~mask

cdef inline uint64_t zero_end(Request *request) noexcept nogil:
    if request.kind == TRIM or request.kind == COPY:
        return request.span_end
    return (request.offset + request.length) & ~<uint64_t>(request.block_size - 1)

cdef bint next_phase(Core *core, Request *request) noexcept nogil:
    """Go on to what follows a phase that is done; False when nothing does."""
    cdef Map *map = request.map
    if request.kind == VERIFY:
        return verify_next(core, request)
    if request.phase == READING:
        if request.kind == READ or request.kind == PROBE:
            return False
        # What is sparse stays sparse; but only a write has a device replace a bad block.
        if request.kind == COPY and map.can_zero and sf_all_zero(request.buffer, request.length):
            enter(core, request, ZEROING)
        else:
            enter(core, request, WRITING)
        return True
    if request.phase == READING_EDGES:
        merge_edges(request)
        enter(core, request, WRITING_EDGES if request.kind == ZERO else WRITING)
        return True
    if request.phase == WRITING_EDGES:
        enter(core, request, ZEROING)
        return True
    if request.fua and request.phase != FLUSHING and not (request.phase == WRITING and map.can_fua):
        enter(core, request, FLUSHING)
        return True
    return False

cdef inline uint64_t edge_offset(Request *request, uint32_t edge) noexcept nogil:
    """Where edge 0 (the first block) or 1 (the last) lies on the disk."""
    return request.span_offset if edge == 0 else request.span_end - request.block_size

cdef inline bint edge_shared(Request *request, uint32_t edge) noexcept nogil:
    """Whether this block is shared with a neighbour, and not already counted as edge 0."""
    if edge == 0:
        return (request.offset != request.span_offset
                or (request.span_end - request.span_offset == request.block_size
                    and request.offset + request.length != request.span_end))
    return (request.offset + request.length != request.span_end
            and request.span_end - request.span_offset > request.block_size)

cdef void merge_edges(Request *request) noexcept nogil:
    """Put the neighbours' bytes around a WRITE's data, or zeroes into a ZERO's first and last block."""
    cdef uint64_t end = request.offset + request.length
    cdef uint64_t block_begin, block_end, first, last
    cdef uint32_t edge
    cdef char *block
    for edge in range(2):
        if not edge_shared(request, edge):
            continue
        block = request.edges + edge * CLAIM_BLOCK
        block_begin = edge_offset(request, edge)
        block_end = block_begin + request.block_size
        first = request.offset if request.offset > block_begin else block_begin
        last = end if end < block_end else block_end
        if request.kind == ZERO:
            memset(block + (first - block_begin), 0, last - first)
            continue
        memcpy(request.buffer + (block_begin - request.claim_offset), block, first - block_begin)
        memcpy(request.buffer + (last - request.claim_offset), block + (last - block_begin), block_end - last)

cdef void advance(Core *core, Request *request) noexcept nogil:
    """Issue what its phase has left; when all is done go on, park or finish."""
    while True:
        if sf_mutant(SWAPPED_MID_REQUEST):
            mutant_swap(core, request)
        if not request.failed and not request.rereading:
            if request.phase == FLUSHING:
                issue_flushes(core, request)
            elif request.phase == READING_EDGES or request.phase == WRITING_EDGES:
                issue_edges(core, request)
            else:
                issue_span(core, request)
        if (request.failed or request.rereading) and request.starved:
            request.starved = False
            list_remove(&core.starved, request)
        if sf_mutant(FIRST_LEG_SUFFICES):
            mutant_forget_backups(request)
        if request.outstanding or request.starved:
            return
        if request.failed and sf_mutant(PARKED_ANSWERED):
            finish(core, request, 0)
            return
        if request.failed:
            if request.rejected or request.shipping != NULL:
                finish(core, request, request.error)
            else:
                park(core, request)
            return
        if request.rereading and request.kind == VERIFY:
            request.step.unreadable = True  # to compare a backup with itself says nothing; the repair is noted
            finish(core, request, request.error)
            return
        if request.rereading:
            request.seen = ships_overlapping(core, request)
            request.awaited = repair_leg(core, request.map)
            if not ships_landed(core, request.awaited, request.seen):
                ships_await(core, request)  # until then what the backup has may be older
                return
            if not reread(core, request):
                park(core, request)  # the backup is on its way out of the map; the next one decides
                return
            continue
        if not next_phase(core, request):
            finish(core, request, 0)
            return

# --- Issuing -------------------------------------------------------------------------------------

cdef bint issue_more(Core *core, Request *request, Leg *leg) noexcept nogil:
    """Whether one more sub-operation may be issued now. If only a slot is missing, it is remembered."""
    if request.failed or request.rereading or request.outstanding >= SUBOPS_PER_REQUEST:
        return False
    if leg.fenced or (leg.in_flight < SUBOPS_PER_LEG and core.free_subops != NULL):
        return True
    if not request.starved:
        request.starved = True
        list_push(&core.starved, request)
    return False

cdef void issue_span(Core *core, Request *request) noexcept nogil:
    cdef uint64_t end = zero_end(request) if request.phase == ZEROING else request.span_end
    cdef uint8_t kind = SUB_READ
    # The second half of the buffer of a VERIFY, or the whole of any other.
    cdef uint64_t half = request.length if request.phase == COMPARING else 0
    cdef uint64_t length
    cdef uint32_t i
    if request.phase == WRITING:
        kind = SUB_WRITE
    elif request.phase == ZEROING:
        kind = SUB_ZERO
    for i in range(request.map.leg_count):
        if not request.legs & (1 << i):
            continue
        while request.cursors[i] < end and issue_more(core, request, request.map.legs[i]):
            length = issue(core, request, i, kind, request.cursors[i], end - request.cursors[i],
                           NULL if kind == SUB_ZERO else request.buffer,
                           half + request.cursors[i] - request.claim_offset)
            request.cursors[i] += length

cdef void issue_edges(Core *core, Request *request) noexcept nogil:
    cdef uint8_t kind = SUB_READ if request.phase == READING_EDGES else SUB_WRITE
    cdef uint64_t block_size = request.block_size
    cdef uint64_t within
    cdef uint32_t i, edge
    for i in range(request.map.leg_count):
        if not request.legs & (1 << i):
            continue
        # Cursors count the bytes of both blocks. One block may take several transfers of a device.
        while request.cursors[i] < 2 * block_size and issue_more(core, request, request.map.legs[i]):
            edge = <uint32_t>(request.cursors[i] / block_size)
            within = request.cursors[i] % block_size
            if edge_shared(request, edge):
                request.cursors[i] += issue(
                    core, request, i, kind, edge_offset(request, edge) + within, block_size - within, request.buffer,
                    <uint64_t>(request.edges - request.buffer) + edge * CLAIM_BLOCK + within)
            else:
                request.cursors[i] += block_size

cdef void issue_flushes(Core *core, Request *request) noexcept nogil:
    cdef Leg *leg
    cdef Device *device
    cdef uint32_t i
    for i in range(request.map.leg_count):
        if not request.legs & (1 << i) or (sf_mutant(BACKUP_NOT_FLUSHED) and i != request.map.active):
            continue
        leg = request.map.legs[i]
        while request.cursors[i] < leg.device_count and issue_more(core, request, leg):
            device = &leg.devices[request.cursors[i]]
            request.cursors[i] += 1
            if device.can_flush and device_usable(core, request, device):
                subop_start(core, request, device, SUB_FLUSH, 0, 0, NULL, 0)

cdef bint device_usable(Core *core, Request *request, Device *device) noexcept nogil:
    """The gate: nothing is ever issued to a fenced leg or a lost device."""
    if (device.leg.fenced and not sf_mutant(FENCE_GATE_OPEN)) or device.lost:
        request.failed = True
        request.error = device.error if device.error else EIO
        return False
    return True

cdef uint64_t issue(Core *core, Request *request, uint32_t leg_index, uint8_t kind, uint64_t offset,
                    uint64_t length, char *buffer, uint64_t buffer_offset) noexcept nogil:
    """Issue the part of [offset, offset + length) that one sub-operation can do; its length."""
    cdef LegTable *table = &request.disk_map.tables[leg_index]
    cdef uint64_t index = extent_find(table, offset)
    cdef Device *device = &request.map.legs[leg_index].devices[table.devices[index]]
    cdef uint64_t limit = table.offsets[index + 1] - offset
    if not device_usable(core, request, device):
        return length
    if kind == SUB_ZERO:
        if limit > ALLOCATE_MAX:
            limit = ALLOCATE_MAX
    elif limit > device.transfer_max:
        limit = device.transfer_max
    if length > limit:
        length = limit
    subop_start(core, request, device, kind, table.device_offsets[index] + (offset - table.offsets[index]),
                length, buffer, buffer_offset)
    return length

# --- Sub-operations ------------------------------------------------------------------------------

cdef void subop_start(Core *core, Request *request, Device *device, uint8_t kind, uint64_t device_offset,
                      uint64_t length, char *buffer, uint64_t buffer_offset) noexcept nogil:
    cdef SubOp *sub = core.free_subops
    core.free_subops = sub.next
    sub.next = NULL
    sub.serial += 1
    sub.request = request
    sub.device = device
    sub.kind = kind
    sub.device_offset = device_offset
    sub.length = length
    sub.progress = 0
    sub.buffer = buffer
    sub.data = NULL
    sub.in_flight = True
    sub.queued = False
    sub.sending = False
    sub.answered = False
    if buffer != NULL:
        arena_share(&core.arena, buffer)
        sub.data = buffer + buffer_offset
    sub.started_ns = core.now_ns
    sub.newer = NULL
    sub.older = device.newest
    if device.newest == NULL:
        device.oldest = sub
    else:
        device.newest.newer = sub
    device.newest = sub
    device.in_flight += 1
    device.leg.in_flight += 1
    request.outstanding += 1
    if device.kind == DEVICE_NBD:
        remote_queue(core, sub)
    else:
        file_submit(core, sub)

cdef void subop_end(Core *core, SubOp *sub, int32_t error) noexcept nogil:
    """A sub-operation is over: the device has answered, or its stream is known to be dead."""
    cdef Request *request = sub.request
    cdef Device *device = sub.device
    cdef uint64_t latency = core.now_ns - sub.started_ns
    cdef bint rereads
    if sub.older == NULL:
        device.oldest = sub.newer
    else:
        sub.older.newer = sub.newer
    if sub.newer == NULL:
        device.newest = sub.older
    else:
        sub.newer.older = sub.older
    device.in_flight -= 1
    device.heard_ns = core.now_ns
    device.leg.in_flight -= 1
    if latency > device.latency_max_ns:
        device.latency_max_ns = latency
    if sub.kind == SUB_READ:
        device.reads += 1
        device.read_bytes += sub.length
    elif sub.kind == SUB_FLUSH:
        device.flushes += 1
    else:
        device.writes += 1
        device.written_bytes += sub.length
    if sub.buffer != NULL:
        arena_release(&core.arena, sub.buffer)
    rereads = error != 0 and request != NULL and may_reread(core, sub, error)
    if rereads:
        repair_note(core, sub, error)
    sub.request = NULL
    sub.in_flight = False
    sub.next = core.free_subops
    core.free_subops = sub
    core.relief = True
    if request == NULL:
        device.late += 1
        core.counters.late += 1
        leg_check_drained(core, device.leg)
        leg_check_closed(core, device.leg)
        return
    request.outstanding -= 1
    if error and not device.leg.fenced and not probe_is_answered(core, request, error):
        device.errors += 1
        device.error = error
    if rereads:
        request.rereading = True
        request.error = error
    elif error and not (sf_mutant(BACKUP_ERROR_IGNORED) and device.leg != request.map.legs[request.map.active]):
        request.failed = True
        request.error = error
        if not device.reported and not device.leg.fenced and not probe_is_answered(core, request, error):
            device.reported = True
            event_put(core, EVENT_DEVICE_ERROR, device.leg.id, device.index, error, request.map.generation,
                      sub.kind, sub.device_offset)
    advance(core, request)

# --- The end -------------------------------------------------------------------------------------

cdef void leave(Core *core, Request *request) noexcept nogil:
    """It runs no more: let go of its map."""
    core.running -= 1
    map_release(core, request.map)
    request.map = NULL

cdef void park(Core *core, Request *request) noexcept nogil:
    """Keep a request that a leg failed until the next map. Its claim stays."""
    cdef bint is_next = request.map != core.map
    if core.failing and request.connection != NULL:
        finish(core, request, request.error)
        return
    leave(core, request)
    if sf_mutant(PARKED_UNCLAIMED):
        unclaim(core, request)
    request.state = PARKED
    mark_replayed(core, request)
    core.counters.parked += 1
    if is_next and not core.held:
        # A flush of our own that began while the domain held: the release that it would wait for has been.
        list_push(&core.cramped, request)
    else:
        list_push(&core.parked, request)

cdef void finish(Core *core, Request *request, int32_t error) noexcept nogil:
    if request.state == RUNNING:
        if (request.map.asynchronous and (request.exclusive or request.kind == FLUSH)
                and request.connection != NULL and not error):
            ship(core, request)
        leave(core, request)
    if core.failing and request.connection != NULL and request.kind != READ and not error:
        error = EIO  # done, but on which legs is not recorded: nothing is acknowledged while the domain holds
    request.state = FINISHED
    request.error = error
    unclaim(core, request)
    if (core.held and not core.failing and request.kind != READ and request.connection != NULL
            and not sf_mutant(ACKNOWLEDGED_WHILE_HELD)):
        # Once a failover is decided nothing is acknowledged before its record is durable.
        mark_replayed(core, request)
        list_push(&core.withheld, request)
        return
    answer(core, request)

cdef void answer(Core *core, Request *request) noexcept nogil:
    cdef uint64_t waited_ns
    cdef int32_t error
    if request.replayed:
        core.replays_pending -= 1
        core.replays += 1
        core.counters.replayed += 1
        waited_ns = core.now_ns - request.admitted_ns
        if waited_ns > core.replay_longest_ns:
            core.replay_longest_ns = waited_ns
    if request.connection != NULL:
        connection_answer(core, request)
    elif request.kind == PROBE:
        probe_done(core, request)
    elif request.shipping != NULL:
        ship_done(core, request)
    elif request.copier != NULL:
        copier_done(core, request)
    elif request.cleaning:
        error = request.error
        request_free(core, request)
        dirty_flushed(core, error)
    elif request.kind == REPAIR:
        repair_done(core, request)
    elif request.step != NULL:
        verifier_done(core, request)
    else:
        event_put(core, EVENT_DONE, 0, 0, request.error, 0, request.token, 0)
        request_free(core, request)

cdef inline void mark_replayed(Core *core, Request *request) noexcept nogil:
    """A client will have felt the hold or the failure through this request."""
    if request.connection != NULL and not request.replayed:
        request.replayed = True
        core.replays_pending += 1

# --- Hold, release, install, fence ---------------------------------------------------------------

cdef bint refresh_buffer(Core *core, Request *request) noexcept nogil:
    """Give a request whose buffer a late answer may still write into a fresh one; False: no memory."""
    cdef char *fresh
    cdef uint64_t size
    if not request.scribbled or not arena_shared(&core.arena, request.buffer) or sf_mutant(LATE_ANSWER_SCRIBBLES):
        return True
    size = arena_size(&core.arena, request.buffer)
    fresh = arena_take(&core.arena, size)
    if fresh == NULL:
        return False
    if request.kind == WRITE:
        memcpy(fresh, request.buffer, size)  # only its edges can be written into
    if request.edges != NULL:
        request.edges = fresh + (request.edges - request.buffer)
    arena_release(&core.arena, request.buffer)
    request.buffer = fresh
    request.scribbled = False
    return True

cdef void restart_parked(Core *core) noexcept nogil:
    """Do the parked requests again, whole, under the installed map."""
    cdef uint32_t count = core.parked.count
    cdef Request *request
    while count:
        count -= 1
        request = list_pop(&core.parked)
        if request.copier != NULL and request.copier.error:
            finish(core, request, ECANCELED)
        elif refresh_buffer(core, request):
            start(core, request)
        else:
            list_push(&core.cramped, request)

cdef void settle(Core *core) noexcept nogil:
    """Between two batches: start those that nothing is in the way of any more."""
    cdef Request *request
    cdef Request *after
    cdef uint32_t count
    while core.wake and not core.held:
        core.wake = False
        request = core.waiting.head
        while request != NULL:
            after = request.next
            if claim_clear(core, request):
                list_remove(&core.waiting, request)
                start(core, request)
            request = after
    while core.cramped.count and not core.held and refresh_buffer(core, core.cramped.head):
        start(core, list_pop(&core.cramped))
    if core.marks_moved and not core.held:
        dirty_resume(core)
    if core.ships_moved:
        ships_resume(core)
    count = core.starved.count if core.relief else 0
    core.relief = False
    while count:
        count -= 1
        request = list_pop(&core.starved)
        request.starved = False
        advance(core, request)
    if (core.held and not core.drain_reported
            and (core.running == errands_running(core, ~core.drain_legs) or sf_mutant(DRAIN_UNAWAITED))
            and (ships_landed(core, core.drain_legs, core.ships_end) or sf_mutant(LAG_UNAWAITED))):
        core.drain_reported = True
        event_put(core, EVENT_DRAINED, 0, 0, 0, core.map.generation if core.map != NULL else 0, core.holds, 0)
    if core.replay_report and core.replays_pending == 0:
        core.replay_report = False
        event_put(core, EVENT_REPLAYED, 0, 0, 0, core.map.generation, core.replays, core.replay_longest_ns)
        core.replays = 0
        core.replay_longest_ns = 0

cdef void hold(Core *core, uint16_t legs) noexcept nogil:
    """Let nothing begin, until release(); DRAINED tells when nothing runs, and these legs owe no answer and no part of
    the backlog."""
    core.held = True
    core.failing = False
    core.drain_legs = legs
    core.holds += 1
    core.drain_reported = False
    core.replay_report = False

cdef void release(Core *core) noexcept nogil:
    """End the hold: answer what was withheld, redo what was parked, let in what was held, in this order."""
    cdef uint32_t count = core.held_requests.count
    core.held = core.failing = False
    core.wake = core.marks_moved = core.ships_moved = True
    core.replay_report = True
    while core.withheld.count:
        answer(core, list_pop(&core.withheld))
    restart_parked(core)
    while count:
        count -= 1
        begin(core, list_pop(&core.held_requests))

cdef void install(Core *core, Map *map) noexcept nogil:
    """The atomic switch: one pointer, between two batches. What failed under the old map is done again."""
    cdef Map *before = core.map
    cdef Request *request
    cdef Device *device
    cdef uint32_t i, j
    dirty_install(core, before, map)
    core.map = map
    map.references += 1
    for i in range(map.leg_count):
        map.legs[i].maps += 1
    ships_install(core, map)
    if before != NULL and before.legs[before.active] != map.legs[map.active]:
        # What is done and not answered may be missing on the leg that serves now, if a loss was accepted: it is
        # done again. Nothing that overlaps it has begun since.
        while core.withheld.count:
            request = list_pop(&core.withheld)
            request.state = HELD
            list_push(&core.held_requests, request)
    if before != NULL:
        map_release(core, before)
    for i in range(map.leg_count):
        if map.legs[i].behind and not map.legs[i].fenced and not sf_mutant(BEHIND_UNTOLD):
            event_put(core, EVENT_LEG_BEHIND, map.legs[i].id, 0, ENOBUFS, map.generation, 0, 0)
        for j in range(map.legs[i].device_count):
            device = &map.legs[i].devices[j]
            device.reported = device.lost
            if device.lost and not map.legs[i].fenced:
                # Whoever made this map did not know; nothing else would ever tell.
                event_put(core, EVENT_DEVICE_LOST, map.legs[i].id, j, device.error, map.generation, 0, 0)
    copiers_check(core)
    verifier_check(core)
    if not core.held:
        restart_parked(core)

cdef void fail_parked(Core *core) noexcept nogil:
    """Answer every request that met an error with it: no leg can do better."""
    cdef uint32_t count = core.parked.count
    cdef uint32_t i, j
    cdef Request *request
    while count:
        count -= 1
        request = list_pop(&core.parked)
        finish(core, request, request.error)
    for i in range(REQUESTS_MAX):
        # Of these a part is still under way; what failed them will not be reported again.
        if core.requests[i].state == RUNNING and core.requests[i].failed:
            core.requests[i].rejected = True
    if core.map == NULL:
        return
    for i in range(core.map.leg_count):
        for j in range(core.map.legs[i].device_count):
            if not core.map.legs[i].devices[j].lost:
                core.map.legs[i].devices[j].reported = False

cdef void fail_clients(Core *core) noexcept nogil:
    """End the patience of a hold: answer all that clients wait for, and will ask for until it is over, with an error.

    What they wrote may be on any leg by now. Its regions are marked, and whoever has every leg but one brought up to
    date again from its marks before that counts (proxy/failover.py) may say so.
    """
    core.failing = True
    fail_list(core, &core.held_requests)
    fail_list(core, &core.waiting)
    fail_list(core, &core.marking)
    fail_list(core, &core.catching)
    fail_list(core, &core.parked)
    fail_list(core, &core.cramped)
    fail_list(core, &core.withheld)

cdef void fail_list(Core *core, RequestList *requests) noexcept nogil:
    cdef uint32_t count = requests.count
    cdef Request *request
    while count:
        count -= 1
        request = list_pop(requests)
        if request.connection == NULL:
            list_push(requests, request)
            continue
        if request.replayed:
            request.replayed = False
            core.replays_pending -= 1
        finish(core, request, request.error if request.error else EIO)

cdef void leg_check_drained(Core *core, Leg *leg) noexcept nogil:
    cdef uint64_t unproven = 0
    cdef uint32_t i
    if leg.fenced and (leg.in_flight == 0 or sf_mutant(FENCE_UNAWAITED)) and not leg.drain_reported:
        leg.drain_reported = True
        for i in range(leg.device_count):
            unproven += leg.devices[i].unproven
        event_put(core, EVENT_LEG_DRAINED, leg.id, 0, 0, 0, unproven, 0)

cdef void leg_check_closed(Core *core, Leg *leg) noexcept nogil:
    """Tell the control thread when a closing leg's descriptors can be closed, and when nothing in the
    engine knows it any more. A held domain's map may name it for a long time after the first."""
    cdef Stream *stream
    cdef uint32_t i
    if not leg.closing or leg.in_flight:
        return
    for i in range(leg.device_count):
        stream = leg.devices[i].stream
        if stream != NULL and (stream.receiving or stream.sending):
            return
    if not leg.closed:
        leg.closed = True
        event_put(core, EVENT_LEG_CLOSED, leg.id, 0, 0, 0, 0, 0)
    if not leg.forgotten and leg.maps == 0 and copier_of(core, leg) == NULL:
        leg.forgotten = True
        event_put(core, EVENT_LEG_FORGOTTEN, leg.id, 0, 0, 0, 0, 0)

cdef void leg_close(Core *core, Leg *leg) noexcept nogil:
    """Fence a leg and let go of its devices as soon as nothing is in flight on them."""
    cdef uint32_t i
    fence(core, leg)
    leg.closing = True
    for i in range(leg.device_count):
        if leg.devices[i].kind == DEVICE_NBD:
            remote_lost(core, &leg.devices[i], ESHUTDOWN)
    leg_check_closed(core, leg)

cdef void fence(Core *core, Leg *leg) noexcept nogil:
    """Close the gate to a leg for good. What is in flight on it is waited for by nobody any more."""
    cdef Device *device
    cdef SubOp *sub
    cdef Request *request
    cdef uint32_t i
    if leg.fenced:
        return
    leg.fenced = True
    leg_falls_behind(core, leg, False)
    core.relief = True
    for i in range(leg.device_count):
        device = &leg.devices[i]
        if device.kind == DEVICE_NBD:
            remote_fence(core, device)
        sub = device.oldest
        while sub != NULL:
            request = sub.request
            if request != NULL:
                sub.request = NULL
                request.outstanding -= 1
                request.failed = True
                request.error = device.error if device.error else EIO
                if sub.kind == SUB_READ:
                    request.scribbled = True
                advance(core, request)
            sub = sub.newer
    leg_check_drained(core, leg)

cdef void check_deadlines(Core *core) noexcept nogil:
    """A device that neither answers nor fails is evidence: report it once, until it answers."""
    cdef Leg *leg
    cdef Device *device
    cdef SubOp *sub
    cdef uint64_t age, patience
    cdef uint32_t i, j
    for i in range(LEG_SLOTS):
        leg = &core.legs[i]
        if not leg.in_use or leg.fenced or sf_mutant(DEADLINE_UNREPORTED):
            continue
        for j in range(leg.device_count):
            device = &leg.devices[j]
            sub = device.oldest
            while sub != NULL and not device.reported:
                age = core.now_ns - sub.started_ns
                if age <= core.deadline_ns:
                    break  # all after it are younger
                patience = core.deadline_ns
                if sub.kind == SUB_FLUSH:
                    patience *= FLUSH_PATIENCE
                if age > patience:
                    device.reported = True
                    device.error = ETIMEDOUT
                    event_put(core, EVENT_DEADLINE_MISSED, leg.id, device.index, ETIMEDOUT,
                              core.map.generation if core.map != NULL else 0, age, 0)
                sub = sub.newer
