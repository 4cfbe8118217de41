# Copying the active leg to one that is syncing, while clients write.
#
# Clients' writes go to both legs from the moment the leg is in the map; the copy brings over what was
# there before: of the ranges it is given, what the leg's plane of the dirty bitmap names. Each step is an ordinary request that claims its range as a reader: it waits for writes
# under way, and writes that come later wait for it, so a copy never puts an old block over a new one.

cdef int32_t copier_start(Core *core, Leg *leg, uint32_t range_count) noexcept nogil:
    """Begin to copy ``leg.copy_ranges`` to ``leg``; 0 or an errno."""
    cdef Copier *copier = NULL
    cdef uint32_t i
    if not leg_is_syncing(core, leg):
        return EINVAL
    if copier_of(core, leg) != NULL:
        return EBUSY
    for i in range(LEG_SLOTS):
        if not core.copiers[i].in_use and copier == NULL:
            copier = &core.copiers[i]
    if copier == NULL:
        return EBUSY
    memset(copier, 0, sizeof(Copier))
    copier.in_use = True
    copier.leg = leg
    copier.ranges = leg.copy_ranges
    copier.range_count = range_count - (1 if range_count and sf_mutant(COPY_MISSES_RANGE) else 0)
    copier.total = copier_rest(core, copier)
    i = dirty_plane(core, leg)
    if i:
        memset(core.dirty.copied[i], 0, core.dirty.words * 8)
    if sf_mutant(COPIED_EARLY):
        event_put(core, EVENT_COPIED, leg.id, 0, 0, core.map.generation, copier.total, 0)
    return 0

cdef Copier *copier_of(Core *core, Leg *leg) noexcept nogil:
    """The copy to this leg, or NULL."""
    cdef uint32_t i
    for i in range(LEG_SLOTS):
        if core.copiers[i].in_use and core.copiers[i].leg == leg:
            return &core.copiers[i]
    return NULL

cdef bint leg_is_syncing(Core *core, Leg *leg) noexcept nogil:
    cdef uint32_t i
    if core.map != NULL:
        for i in range(core.map.leg_count):
            if core.map.legs[i] == leg:
                return core.map.roles[i] == ROLE_SYNCING
    return False

cdef uint64_t copier_piece(Core *core, Copier *copier, uint64_t limit) noexcept nogil:
    """Go to the next bytes of its ranges that the leg lacks; how many, up to ``limit``, or 0: it lacks no more."""
    cdef Dirty *dirty = &core.dirty
    cdef uint32_t plane = dirty_plane(core, copier.leg)
    cdef uint32_t hint = 0
    cdef CopyRange *extent
    cdef DiskMap *disk
    cdef uint64_t offset, end, index, position, stop, region
    while copier.range_index < copier.range_count:
        extent = &copier.ranges[copier.range_index]
        offset = extent.offset + copier.range_offset
        end = extent.offset + extent.length
        disk = map_disk(core.map, extent.disk, &hint)
        if disk == NULL or offset == end:  # a disk that is gone takes its bytes with it
            copier.range_index += 1
            copier.range_offset = 0
            continue
        if not plane or end > disk.allotted:
            return end - offset if end - offset < limit else limit
        index = extent_find(&disk.domain, offset)
        if end > disk.domain.offsets[index + 1]:
            end = disk.domain.offsets[index + 1]
        position = disk.domain.device_offsets[index] + (offset - disk.domain.offsets[index])
        stop = position + (end - offset)
        region = position >> dirty.shift
        if not bit_is(dirty.planes[plane], region):
            while region << dirty.shift < stop and not bit_is(dirty.planes[plane], region):
                region += 1
            copier.range_offset += (region << dirty.shift if region << dirty.shift < stop else stop) - position
            continue
        if stop > position + limit:
            stop = position + limit
        while region << dirty.shift < stop and bit_is(dirty.planes[plane], region):
            region += 1
        return (region << dirty.shift if region << dirty.shift < stop else stop) - position
    return 0

cdef uint64_t copier_rest(Core *core, Copier *copier) noexcept nogil:
    """How many bytes it has still to copy."""
    cdef Copier ahead = copier[0]
    cdef uint64_t length = copier_piece(core, &ahead, INT64_MAX)
    cdef uint64_t rest = 0
    while length:
        rest += length
        ahead.range_offset += length
        length = copier_piece(core, &ahead, INT64_MAX)
    return rest

cdef inline bint clients_work(Core *core) noexcept nogil:
    return core.now_ns - core.client_ns < CLIENTS_GONE_NS

cdef uint64_t copy_pace(Core *core) noexcept nogil:
    """Bytes a second that copies may take now; 0: all they can."""
    if clients_work(core) and core.copy_floor and (not core.copy_rate or core.copy_floor < core.copy_rate):
        return core.copy_floor
    return core.copy_rate

cdef void copier_pump(Core *core, Copier *copier) noexcept nogil:
    """Keep its window full, at its pace; flush from time to time, and when all is copied."""
    cdef bint yields = clients_work(core) and core.copy_floor != 0
    cdef uint64_t pace = copy_pace(core)
    cdef uint64_t length
    cdef Request *request
    if copier.leg.behind and not copier.error:
        copier.error = ECANCELED
    while (not copier.error and not copier.flushing and copier.unflushed < COPY_CHECKPOINT_BYTES
            and copier.in_flight < (1 if yields else COPY_WINDOW)):
        length = copier_piece(core, copier, COPY_CHUNK_YIELDING if yields else COPY_CHUNK)
        if not length:
            break
        if pace and core.now_ns < copier.next_ns:
            return
        request = request_take(core, True)
        if request == NULL:
            return
        request.buffer = arena_take(&core.arena, length)
        if request.buffer == NULL:
            request_free(core, request)
            return
        request.kind = COPY
        request.copier = copier
        request.disk = copier.ranges[copier.range_index].disk
        request.offset = copier.ranges[copier.range_index].offset + copier.range_offset
        request.length = length
        copier_note(core, copier, request)
        copier.range_offset += length
        copier.unflushed += length
        copier.in_flight += 1
        if pace:
            copier.next_ns = core.now_ns + <uint64_t>(<double>length * 1e9 / <double>pace)
        admit(core, request)
    if copier.in_flight:
        return
    if copier.error:
        copier_end(core, copier)
    elif sf_mutant(COPY_UNFLUSHED) and not copier.flushing:
        copier.unflushed = 0
        copier_checkpoint(core, copier)
    elif not copier.flushing:
        request = request_take(core, True)
        if request == NULL:
            return
        request.kind = FLUSH
        request.copier = copier
        copier.flushing = True
        copier.in_flight += 1
        admit(core, request)

cdef void copier_done(Core *core, Request *request) noexcept nogil:
    """A step is over, for better or worse."""
    cdef Copier *copier = request.copier
    copier.in_flight -= 1
    if request.error == 0:
        copier.copied += request.length
    elif request.error != ESHUTDOWN and not copier.error:  # ESHUTDOWN: the disk is gone, and its bytes with it
        copier.error = request.error
    if request.kind == FLUSH and not copier.error:
        copier.flushing = False
        copier.unflushed = 0
        copier_checkpoint(core, copier)
    request_free(core, request)

cdef void copier_note(Core *core, Copier *copier, Request *request) noexcept nogil:
    """Remember the regions that steps cover, one step or several: once all is flushed, the leg lacks them no more."""
    cdef Dirty *dirty = &core.dirty
    cdef uint32_t plane = dirty_plane(core, copier.leg)
    cdef uint32_t hint = 0
    cdef DiskMap *disk = map_disk(core.map, request.disk, &hint)
    cdef uint64_t index, position, region
    if not plane or disk == NULL or request.offset + request.length > disk.allotted:
        return
    index = extent_find(&disk.domain, request.offset)
    position = disk.domain.device_offsets[index] + (request.offset - disk.domain.offsets[index])
    if position != copier.run_end:
        copier.run_begin = position
    copier.run_end = position + request.length
    region = (copier.run_begin + (<uint64_t>1 << dirty.shift) - 1) >> dirty.shift
    while (region + 1) << dirty.shift <= copier.run_end:
        bit_set(dirty.copied[plane], region)
        region += 1
        copier.run_begin = region << dirty.shift

cdef void copier_checkpoint(Core *core, Copier *copier) noexcept nogil:
    """All it has copied is durable: take that off what the leg lacks. When that was all, it is done."""
    cdef Dirty *dirty = &core.dirty
    cdef uint32_t plane = dirty_plane(core, copier.leg)
    cdef bint ended = copier_piece(core, copier, COPY_CHUNK) == 0
    cdef uint64_t word
    if plane:
        for word in range(dirty.words):
            dirty_put(dirty, plane, word,
                      0 if ended else dirty.planes[plane][word] & ~dirty.copied[plane][word])
        memset(dirty.copied[plane], 0, dirty.words * 8)
        dirty_write(core)
    if ended:
        copier_end(core, copier)

cdef void copier_end(Core *core, Copier *copier) noexcept nogil:
    copier.in_use = False
    event_put(core, EVENT_COPIED, copier.leg.id, 0, copier.error,
              core.map.generation, copier.copied, 0)
    leg_check_closed(core, copier.leg)

cdef void copiers_check(Core *core) noexcept nogil:
    """A new map is installed: give up copies to legs that are not syncing in it."""
    cdef uint32_t i
    for i in range(LEG_SLOTS):
        if core.copiers[i].in_use and not core.copiers[i].error and not leg_is_syncing(core, core.copiers[i].leg):
            core.copiers[i].error = ECANCELED
            copier_withdraw(core, &core.copiers[i], &core.held_requests)
            copier_withdraw(core, &core.copiers[i], &core.waiting)
            copier_withdraw(core, &core.copiers[i], &core.parked)
            copier_withdraw(core, &core.copiers[i], &core.cramped)
            copier_withdraw(core, &core.copiers[i], &core.catching)

cdef void copier_withdraw(Core *core, Copier *copier, RequestList *requests) noexcept nogil:
    """End steps that only wait: a domain may be held until its legs' slots are free, and these keep one."""
    cdef Request *request = requests.head
    cdef Request *after
    while request != NULL:
        after = request.next
        if request.copier == copier:
            list_remove(requests, request)
            finish(core, request, ECANCELED)
        request = after

cdef uint64_t copiers_pause(Core *core) noexcept nogil:
    """How long until a copy that waits for its time may go on."""
    cdef uint64_t pause = IDLE_NS
    cdef uint32_t i
    for i in range(LEG_SLOTS):
        if core.copiers[i].in_use and core.copiers[i].next_ns > core.now_ns and not core.held:
            if core.copiers[i].next_ns - core.now_ns < pause:
                pause = core.copiers[i].next_ns - core.now_ns
    return pause

cdef void copiers_pump(Core *core) noexcept nogil:
    cdef uint32_t i
    for i in range(LEG_SLOTS):
        if core.copiers[i].in_use and (not core.held or core.copiers[i].error):
            copier_pump(core, &core.copiers[i])
