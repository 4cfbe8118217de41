# Verify: comparing every uptodate backup with the active leg, byte by byte, while clients write.
#
# Each step is a request that claims its range as a reader: it waits for writes under way, and writes that come
# later wait for it, so what it reads of all legs is of one moment and a write in flight is no false alarm. It
# reads the range of the active leg into the first half of its buffer and that of one leg after the other
# into the second. Where it is to repair, a step that found a difference is done once more with a writer's
# claim: nobody reads a backup while it is written to. A change of the legs in the middle ends the whole.

cdef bint verifier_holds(Core *core, Map *map) noexcept nogil:
    """Whether this map has the legs in their roles that are being compared."""
    cdef Verifier *verifier = &core.verifier
    cdef int32_t place
    cdef uint32_t i
    if map.legs[map.active].id != verifier.active:
        return False
    for i in range(verifier.leg_count):
        place = verifier_leg(map, verifier.legs[i])
        if place < 0 or map.legs[place].behind:
            return False
    return True

cdef int32_t verifier_leg(Map *map, int64_t leg) noexcept nogil:
    """Where this backup stands in the map; -1: it is none there."""
    cdef uint32_t i
    for i in range(map.leg_count):
        if map.legs[i].id == leg and map.roles[i] == ROLE_BACKUP:
            return <int32_t>i
    return -1

cdef int32_t verifier_start(Core *core, CopyRange *ranges, uint32_t range_count, uint64_t rate,
                            bint repair) noexcept nogil:
    """Begin to compare ``ranges`` at ``rate`` bytes a second (0: see verifier_pump()); 0 or an errno."""
    cdef Verifier *verifier = &core.verifier
    cdef Map *map = core.map
    cdef uint32_t i
    if verifier.in_use:
        return EBUSY
    if map == NULL or repair_source(map) < 0:
        return EINVAL
    memset(verifier, 0, sizeof(Verifier))
    verifier.in_use = True
    verifier.begun = True
    verifier.active = map.legs[map.active].id
    for i in range(map.leg_count):
        if map.roles[i] == ROLE_BACKUP and not map.legs[i].behind:
            verifier.legs[verifier.leg_count] = map.legs[i].id
            verifier.leg_count += 1
    verifier.ranges = ranges
    verifier.range_count = range_count
    verifier.rate = rate
    verifier.repair = repair
    verifier.due_ns = core.now_ns
    for i in range(range_count):
        verifier.total += ranges[i].length
    return 0

cdef void verifier_check(Core *core) noexcept nogil:
    """A new map is installed: give up comparing legs that it has not, or has in other roles."""
    cdef Verifier *verifier = &core.verifier
    if verifier.in_use and not verifier.error and not verifier_holds(core, core.map):
        verifier.error = ESTALE

cdef void verifier_pump(Core *core) noexcept nogil:
    """Keep its window full, as fast as it may; when all is compared, make what was repaired durable."""
    cdef Verifier *verifier = &core.verifier
    cdef CopyRange *extent
    cdef VerifyStep *step
    cdef Request *request
    cdef uint64_t length, rate, behind_ns
    cdef uint32_t i
    if not verifier.in_use:
        return
    for i in range(VERIFY_WINDOW):
        request = verifier.steps[i].due
        if request != NULL and verifier.error:
            verifier.steps[i].due = NULL
            verifier_done(core, request)  # it counts as found, and not as repaired
        elif request != NULL and not core.held and marks_ready(core, request):
            verifier.steps[i].due = NULL
            admit(core, request)
    while (not verifier.error and not core.held and verifier.in_flight < VERIFY_WINDOW
            and verifier.range_index < verifier.range_count and core.now_ns >= verifier.due_ns):
        extent = &verifier.ranges[verifier.range_index]
        length = extent.length - verifier.range_offset
        if length > VERIFY_CHUNK:
            length = VERIFY_CHUNK
        request = request_take(core, True)
        if request == NULL:
            return
        request.buffer = arena_take(&core.arena, 2 * length)
        if request.buffer == NULL:
            request_free(core, request)
            return
        step = &verifier.steps[0]
        while step.busy:
            step += 1
        memset(step, 0, sizeof(VerifyStep))
        step.busy = True
        request.kind = VERIFY
        request.step = step
        request.disk = extent.disk
        request.offset = extent.offset + verifier.range_offset
        request.length = length
        verifier.range_offset += length
        if verifier.range_offset == extent.length:
            verifier.range_index += 1
            verifier.range_offset = 0
        verifier.in_flight += 1
        # Whom nobody told a rate yields to clients as a copy does.
        rate = verifier.rate if verifier.rate or not clients_work(core) else core.copy_floor
        if rate:
            # What was missed for lack of room is made good, but not more of it than a moment's.
            behind_ns = core.now_ns - verifier.due_ns
            if behind_ns > VERIFY_BURST_NS:
                verifier.due_ns = core.now_ns - VERIFY_BURST_NS
            verifier.due_ns += <uint64_t>(<double>length * 1e9 / <double>rate)
        admit(core, request)
    if verifier.in_flight:
        return
    if verifier.error:
        verifier_end(core)
    elif verifier.range_index < verifier.range_count or core.held:
        return
    elif verifier.mismatched and verifier.repair:
        request = request_take(core, True)
        if request == NULL:
            return
        request.kind = FLUSH
        request.step = &verifier.steps[0]
        verifier.in_flight += 1
        admit(core, request)
    else:
        verifier_end(core)

cdef uint64_t verifier_patience(Core *core, uint64_t patience) noexcept nogil:
    """How long the loop may wait before the next step is due; at most ``patience``."""
    cdef Verifier *verifier = &core.verifier
    if (not verifier.in_use or core.held or verifier.error or verifier.in_flight == VERIFY_WINDOW
            or verifier.range_index == verifier.range_count or verifier.due_ns <= core.now_ns):
        return patience
    return patience if patience < verifier.due_ns - core.now_ns else verifier.due_ns - core.now_ns

cdef bint verify_next(Core *core, Request *request) noexcept nogil:
    """Go on to what follows a phase of a step; False when nothing does."""
    cdef Verifier *verifier = &core.verifier
    cdef VerifyStep *step = request.step
    cdef uint64_t differing
    if request.phase == READING:
        memset(step.differing, 0, sizeof(step.differing))
        memset(step.repaired, 0, sizeof(step.repaired))
        step.leg = 0
        step.written = False
    elif request.phase == WRITING:
        step.written = True
        enter(core, request, COMPARING)
        return True
    else:
        differing = verify_compare(request)
        if step.written:
            step.written = False
            step.repaired[step.leg] = step.differing[step.leg] & ~differing
            request.span_offset = request.offset
            request.span_end = request.offset + request.length
        else:
            step.differing[step.leg] = differing
            if differing and step.exclusive:
                # From the first differing block to the last: what lies between is the same on both.
                request.span_offset = request.offset + CLAIM_BLOCK * <uint64_t>sf_lowest_bit(differing)
                request.span_end = request.offset + CLAIM_BLOCK * (<uint64_t>sf_highest_bit(differing) + 1)
                enter(core, request, WRITING)
                return True
        step.leg += 1
    if step.leg == verifier.leg_count:
        return False
    request.source = <uint32_t>verifier_leg(request.map, verifier.legs[step.leg])
    enter(core, request, COMPARING)
    return True

cdef uint64_t verify_compare(Request *request) noexcept nogil:
    """The blocks in which the halves of its buffer differ: bit i is the block i."""
    cdef uint64_t differing = 0
    cdef uint64_t offset = 0
    if memcmp(request.buffer, request.buffer + request.length, request.length) == 0:
        return 0
    while offset < request.length:
        if memcmp(request.buffer + offset, request.buffer + request.length + offset, CLAIM_BLOCK) != 0:
            differing |= <uint64_t>1 << (offset // CLAIM_BLOCK)
        offset += CLAIM_BLOCK
    return differing

cdef void verifier_done(Core *core, Request *request) noexcept nogil:
    """A step, or the flush at the end, is over, for better or worse."""
    cdef Verifier *verifier = &core.verifier
    cdef VerifyStep *step = request.step
    cdef bint differs = False
    cdef uint32_t i
    if request.kind == FLUSH:
        verifier.in_flight -= 1
        if request.error and not verifier.error:
            verifier.error = request.error
        request_free(core, request)
        verifier_end(core)
        return
    for i in range(verifier.leg_count):
        differs = differs or step.differing[i] != 0
    if step.unreadable:
        verifier.unreadable += request.length
    elif request.error == ESHUTDOWN:
        verifier.total -= request.length  # the disk is gone, and its bytes with it
    elif request.error:
        if not verifier.error:
            verifier.error = request.error
    elif differs and verifier.repair and not step.exclusive and not verifier.error:
        step.exclusive = True
        step.due = request
        return
    else:
        verifier.compared += request.length
        for i in range(verifier.leg_count):
            verifier_note(verifier, request, i)
    step.busy = False
    verifier.in_flight -= 1
    request_free(core, request)

cdef void verifier_note(Verifier *verifier, Request *request, uint32_t index) noexcept nogil:
    """Count and list what a step has found on one leg."""
    cdef uint64_t differing = request.step.differing[index]
    cdef uint64_t repaired = request.step.repaired[index]
    cdef uint64_t begin, length
    cdef uint32_t first, i
    cdef Mismatch *found
    verifier.repaired += CLAIM_BLOCK * <uint64_t>sf_bits(repaired)
    while differing:
        first = sf_lowest_bit(differing)
        begin = request.offset + first * <uint64_t>CLAIM_BLOCK
        length = 0
        while first < 64 and differing & (<uint64_t>1 << first):
            differing &= ~(<uint64_t>1 << first)
            length += CLAIM_BLOCK
            first += 1
        verifier.mismatched += length
        for i in range(verifier.found_count):
            found = &verifier.found[i]
            if found.leg != verifier.legs[index] or found.disk != request.disk:
                continue
            if found.offset + found.length == begin:
                found.length += length
                length = 0
                break
            if begin + length == found.offset:
                found.offset = begin
                found.length += length
                length = 0
                break
        if length == 0:
            continue
        if verifier.found_count == MISMATCHES_MAX:
            verifier.unlisted += length
            continue
        found = &verifier.found[verifier.found_count]
        verifier.found_count += 1
        found.leg = verifier.legs[index]
        found.disk = request.disk
        found.offset = begin
        found.length = length

cdef void verifier_end(Core *core) noexcept nogil:
    core.verifier.in_use = False
    event_put(core, EVENT_VERIFIED, 0, 0, core.verifier.error, core.map.generation, core.verifier.compared,
              core.verifier.mismatched)
