# The backlog of an asynchronous domain: what clients have been told is written, and legs that lag have yet to get.
#
# There a write of a client goes to the active leg alone. When it is done there it is put into the backlog, data and
# all, as a *ship*, and answered; each backup is sent the ships in the order of their answers, many at once.
# Two things keep their order: writes that overlap, and what began after a flush, or a write with FUA, was answered,
# which waits for that one and all before it; flushes are sent like writes. So at every moment a lagging leg is
# what the active leg could be after a loss of power at some earlier moment, as clients who flush rely on. (To keep
# all writes in order would cost a journey to the leg and back for each that a client makes after another.) Of
# flushes that are waiting only the last is carried out; for the others their place in the order is enough.
#
# Everything that must not see the lag waits for it: a flush of ours, so that no mark of the dirty bitmap is cleared
# and no stop is clean before the legs have it all; with its claim, and for what that overlaps, a verify, a read
# repair, the zeroing of new space; and Drained, for the leg that is to take over, so that it has all that was ever
# answered, as long as this process lives. The others go on lagging behind that one.
#
# The backlog is bounded. A leg for which there is no more room falls *behind*: its part of the backlog is dropped
# and the manager told, which records the leg outdated. What it lacks is marked in the dirty bitmap all the same,
# since marks outlive the backlog (dirty.pxi), and is copied when the leg is brought back.

cdef inline Ship *ship_at(Core *core, uint64_t number) noexcept nogil:
    return &core.ships[number & (SHIPS_MAX - 1)]

cdef inline uint16_t ship_bit(Core *core, Leg *leg) noexcept nogil:
    """Stands for a leg in a ship."""
    return <uint16_t>(1 << (leg - &core.legs[0]))

cdef inline bint lags(Leg *leg) noexcept nogil:
    """Whether a leg is sent the backlog."""
    return leg.lagging and not leg.behind

cdef void ship_release(Core *core, Ship *ship) noexcept nogil:
    """No leg waits for it any more."""
    if ship.buffer != NULL:
        core.ship_bytes -= arena_size(&core.arena, ship.buffer)
        arena_release(&core.arena, ship.buffer)
        ship.buffer = NULL
    while core.ships_first < core.ships_end and ship_at(core, core.ships_first).pending == 0:
        core.ships_first += 1

cdef void ship_take_off(Core *core, Leg *leg, uint64_t number) noexcept nogil:
    """A leg has this one, or will never get it."""
    cdef Ship *ship = ship_at(core, number)
    leg.ship_bytes -= ship.length
    ship.pending &= ~ship_bit(core, leg)
    if ship.pending == 0:
        ship_release(core, ship)

cdef void leg_falls_behind(Core *core, Leg *leg, bint tell) noexcept nogil:
    """Drop a leg's part of the backlog: it gets nothing more, and has to be brought back from the dirty bitmap."""
    cdef uint64_t bytes = leg.ship_bytes
    cdef uint64_t number
    if not lags(leg):
        return
    leg.behind = True
    for number in range(leg.ships_landed, core.ships_end):
        if ship_at(core, number).pending & ship_bit(core, leg):
            ship_take_off(core, leg, number)
    leg.ships_landed = leg.ships_sent = core.ships_end
    core.ships_moved = True
    if tell and not sf_mutant(BEHIND_UNTOLD):
        event_put(core, EVENT_LEG_BEHIND, leg.id, 0, ENOBUFS, core.map.generation, bytes, 0)

# --- In ------------------------------------------------------------------------------------------

cdef void ship(Core *core, Request *request) noexcept nogil:
    """Put what a client's write or flush has done to the active leg into the backlog, for all legs that lag."""
    cdef uint64_t size = 0 if request.buffer == NULL else arena_size(&core.arena, request.buffer)
    cdef uint16_t legs = 0
    cdef Ship *entry
    cdef Leg *leg
    cdef uint32_t i
    if request.kind != FLUSH and (not request.length or (request.kind == TRIM and not request.trimming)):
        return
    # The last one may be larger than what was left: otherwise a leg could be too slow for one large write.
    while core.ships_end - core.ships_first == SHIPS_MAX or core.ship_bytes >= core.ship_limit:
        leg = leg_slowest(core)
        if leg == NULL:
            break
        leg_falls_behind(core, leg, True)
    for i in range(request.map.leg_count):
        leg = request.map.legs[i]
        if lags(leg):
            legs |= ship_bit(core, leg)
            leg.ship_bytes += request.length
    if legs == 0:
        return
    entry = ship_at(core, core.ships_end)
    core.ships_end += 1
    entry.kind = request.kind
    entry.disk = request.disk
    entry.offset = request.offset
    entry.length = request.length
    entry.claim_offset = request.claim_offset
    entry.span_offset = request.span_offset
    entry.span_end = request.span_end
    entry.block_size = request.block_size
    entry.fua = request.fua
    entry.keep_allocated = request.keep_allocated
    entry.edges = request.edges
    entry.claim_end = request.claim_end
    entry.after = request.seen if request.kind == FLUSH else request.barrier
    if request.kind == FLUSH or request.fua:
        core.ship_barrier = core.ships_end
    if request.kind == FLUSH:
        core.ship_flush = core.ships_end
    entry.answered_ns = core.now_ns
    entry.pending = legs
    entry.buffer = request.buffer
    if entry.buffer != NULL:
        arena_share(&core.arena, entry.buffer)
        core.ship_bytes += size

cdef Leg *leg_slowest(Core *core) noexcept nogil:
    """The leg that lags most; NULL: none does."""
    cdef Leg *slowest = NULL
    cdef uint32_t i
    for i in range(LEG_SLOTS):
        if (core.legs[i].in_use and lags(&core.legs[i]) and core.legs[i].ships_landed < core.ships_end
                and (slowest == NULL or core.legs[i].ships_landed < slowest.ships_landed)):
            slowest = &core.legs[i]
    return slowest

# --- Out -----------------------------------------------------------------------------------------

cdef void ships_pump(Core *core) noexcept nogil:
    """Send each leg what it may have by now."""
    cdef uint32_t i
    if core.ships_first == core.ships_end:
        return
    for i in range(LEG_SLOTS):
        if core.legs[i].in_use and lags(&core.legs[i]):
            leg_ship(core, &core.legs[i])

cdef void leg_ship(Core *core, Leg *leg) noexcept nogil:
    cdef Ship *entry
    cdef Request *request
    while leg.ships_sent < core.ships_end and not leg.behind:
        entry = ship_at(core, leg.ships_sent)
        if not entry.pending & ship_bit(core, leg):
            leg.ships_sent += 1
            ships_settle(core, leg)
            continue
        if leg.shipping == SHIPS_PER_LEG or leg.ships_sent - leg.ships_landed >= SHIPS_WINDOW:
            return
        if (entry.kind == FLUSH and leg.ships_sent + 1 < core.ship_flush
                and ship_at(core, core.ship_flush - 1).pending & ship_bit(core, leg)):
            # A later one is on its way. What is ordered behind this one has waited for what is before it.
            leg.ships_sent += 1
            ship_take_off(core, leg, leg.ships_sent - 1)
            ships_settle(core, leg)
            continue
        if ship_must_wait(core, leg, entry) and not sf_mutant(SHIPPED_OUT_OF_ORDER):
            return
        # Half of what is kept for our own work is left to others of it.
        if core.free_requests.count <= REQUESTS_RESERVED // 2:
            return
        request = request_take(core, True)
        request.shipping = leg
        request.token = leg.ships_sent
        request.kind = entry.kind
        request.disk = entry.disk
        request.offset = entry.offset
        request.length = entry.length
        request.claim_offset = entry.claim_offset
        request.span_offset = entry.span_offset
        request.span_end = entry.span_end
        request.block_size = entry.block_size
        request.fua = entry.fua
        request.keep_allocated = entry.keep_allocated
        request.edges = entry.edges
        request.buffer = entry.buffer
        if request.buffer != NULL:
            arena_share(&core.arena, request.buffer)
        leg.ships_sent += 1
        leg.shipping += 1
        ship_start(core, request)

cdef bint ship_must_wait(Core *core, Leg *leg, Ship *entry) noexcept nogil:
    """Whether something that is on its way to the leg has to be there before this."""
    cdef Ship *other
    cdef uint64_t number
    # One that is being copied to is a mixture anyway.
    if entry.after > leg.ships_landed and (entry.kind == FLUSH or not leg_is_syncing(core, leg)):
        return True
    if entry.kind == FLUSH:
        return False
    for number in range(leg.ships_landed, leg.ships_sent):
        other = ship_at(core, number)
        if (other.pending & ship_bit(core, leg) and other.kind != FLUSH and other.disk == entry.disk
                and other.claim_offset < entry.claim_end and entry.claim_offset < other.claim_end):
            return True
    return False

cdef void ship_start(Core *core, Request *request) noexcept nogil:
    """Run one: what was written is known to the byte, so there is nothing left to read or to refuse."""
    cdef Map *map = core.map
    cdef uint32_t hint = 0
    request.state = RUNNING
    core.running += 1
    request.map = map
    map.references += 1
    if request.kind == FLUSH:
        enter(core, request, FLUSHING)
        advance(core, request)
        return
    request.disk_map = map_disk(map, request.disk, &hint)
    if request.disk_map == NULL:
        finish(core, request, ESHUTDOWN)  # the disk is gone, and its bytes with it
        return
    if request.kind == WRITE:
        enter(core, request, WRITING)
    elif request.kind == ZERO and (edge_shared(request, 0) or edge_shared(request, 1)):
        enter(core, request, WRITING_EDGES)
    else:
        enter(core, request, ZEROING)
    advance(core, request)

cdef void ship_done(Core *core, Request *request) noexcept nogil:
    """A leg has it, or has failed it, which speaks against the leg and is told as for any request."""
    cdef Leg *leg = request.shipping
    cdef uint64_t number = request.token
    # The disk may be gone, and its bytes with it; when a device answers so, that is a failure like any other.
    cdef bint failed = request.failed or (request.error != 0 and request.error != ESHUTDOWN)
    leg.shipping -= 1
    request_free(core, request)
    if leg.behind:
        return
    if failed:
        leg_falls_behind(core, leg, True)
        return
    ship_take_off(core, leg, number)
    ships_settle(core, leg)

cdef void ships_settle(Core *core, Leg *leg) noexcept nogil:
    """Take note of how far a leg has come without a gap."""
    while (leg.ships_landed < leg.ships_sent
            and not ship_at(core, leg.ships_landed).pending & ship_bit(core, leg)):
        leg.ships_landed += 1
        core.ships_moved = True

# --- Waiting for it ------------------------------------------------------------------------------

cdef bint ships_landed(Core *core, uint16_t legs, uint64_t end) noexcept nogil:
    """Whether each of these legs has all that was answered before this number, or will never have it."""
    cdef Leg *leg
    cdef uint32_t i
    if core.ships_first == core.ships_end:
        return True
    for i in range(LEG_SLOTS):
        leg = &core.legs[i]
        if leg.in_use and legs & ship_bit(core, leg) and lags(leg) and leg.ships_landed < end:
            return False
    return True

cdef uint32_t errands_running(Core *core, uint16_t legs) noexcept nogil:
    """How many of the requests that run concern but one leg, and that one of these: ships and probes."""
    cdef uint32_t count = 0
    cdef uint32_t i
    for i in range(LEG_SLOTS):
        if core.legs[i].in_use and legs & ship_bit(core, &core.legs[i]):
            count += core.legs[i].shipping + core.legs[i].probing
    return count

cdef uint64_t ships_overlapping(Core *core, Request *request) noexcept nogil:
    """Where the backlog ends as far as a request with a claim is concerned: behind the last that it overlaps."""
    cdef uint64_t number = core.ships_end
    cdef Ship *entry
    while number > core.ships_first:
        entry = ship_at(core, number - 1)
        if (entry.pending and entry.kind != FLUSH and entry.disk == request.disk
                and entry.claim_offset < request.claim_end and request.claim_offset < entry.claim_end):
            break
        number -= 1
    return number

cdef bint ships_matter(Request *request) noexcept nogil:
    """Whether a request of ours is about more legs than the active one, and must find them equal."""
    return request.connection == NULL and request.shipping == NULL and (
        request.kind == FLUSH or request.kind == ZERO or request.kind == VERIFY or request.kind == REPAIR)

cdef void ships_await(Core *core, Request *request) noexcept nogil:
    """Keep a request until the legs have what it has seen."""
    list_push(&core.catching, request)

cdef void ships_resume(Core *core) noexcept nogil:
    """Let those go on that wait for what has landed by now."""
    cdef uint32_t count = core.catching.count
    cdef Request *request
    core.ships_moved = False
    while count:
        count -= 1
        request = list_pop(&core.catching)
        if not ships_landed(core, request.awaited, request.seen):
            list_push(&core.catching, request)
        elif request.state == RUNNING:
            advance(core, request)
        elif core.held and (request.kind != FLUSH or not request.token):
            list_push(&core.catching, request)
        else:
            start(core, request)

# --- Legs ----------------------------------------------------------------------------------------

cdef bint leg_is_behind(Map *map) noexcept nogil:
    """Whether some leg of this map gets nothing any more and is still to be left out of the next one."""
    cdef uint32_t i
    for i in range(map.leg_count):
        if map.legs[i].behind:
            return True
    return False

cdef void ships_install(Core *core, Map *map) noexcept nogil:
    """A new map: who lags in it, and who does no longer."""
    cdef Leg *leg
    cdef uint32_t i
    for i in range(LEG_SLOTS):
        leg = &core.legs[i]
        if leg.in_use and lags(leg) and not map_has(map, leg):
            leg_falls_behind(core, leg, False)
    for i in range(map.leg_count):
        leg = map.legs[i]
        if not map.asynchronous or i == map.active:
            if lags(leg) and leg.ships_landed < core.ships_end:
                # It would serve without what clients were told is written: Drained was not awaited. It is told, so that
                # clients wait for ever rather than read that.
                leg_falls_behind(core, leg, True)
            leg.lagging = False
        elif not leg.lagging:
            leg.lagging = True
            leg.ships_landed = leg.ships_sent = core.ships_end
    core.ships_moved = True
