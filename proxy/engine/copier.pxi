# Copying the active leg to one that is syncing, while clients write.
#
# Clients' writes go to both legs from the moment the leg is in the map; the copy brings over what was
# there before. Each step is an ordinary request that claims its range as a reader: it waits for writes
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
    copier.range_count = range_count
    for i in range(range_count):
        copier.total += copier.ranges[i].length
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

cdef void copier_pump(Core *core, Copier *copier) noexcept nogil:
    """Keep its window full; when all is copied, make it durable."""
    cdef CopyRange *extent
    cdef Request *request
    cdef uint64_t length
    while not copier.error and copier.in_flight < COPY_WINDOW and copier.range_index < copier.range_count:
        extent = &copier.ranges[copier.range_index]
        length = extent.length - copier.range_offset
        if length > COPY_CHUNK:
            length = COPY_CHUNK
        request = request_take(core, True)
        if request == NULL:
            return
        request.buffer = arena_take(&core.arena, length)
        if request.buffer == NULL:
            request_free(core, request)
            return
        request.kind = COPY
        request.copier = copier
        request.disk = extent.disk
        request.offset = extent.offset + copier.range_offset
        request.length = length
        copier.range_offset += length
        if copier.range_offset == extent.length:
            copier.range_index += 1
            copier.range_offset = 0
        copier.in_flight += 1
        admit(core, request)
    if copier.in_flight:
        return
    if copier.error:
        copier_end(core, copier)
    elif copier.range_index == copier.range_count and not copier.flushing:
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
        copier_end(core, copier)
    request_free(core, request)

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

cdef void copiers_pump(Core *core) noexcept nogil:
    cdef uint32_t i
    if core.held:
        return
    for i in range(LEG_SLOTS):
        if core.copiers[i].in_use:
            copier_pump(core, &core.copiers[i])
