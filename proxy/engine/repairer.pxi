# Read repair: what the active leg cannot read is answered from a backup, and written back to it.
#
# A medium error on a read of the active leg costs the request a second read, whole, from an uptodate backup,
# under the same map and the same claim: nothing was written there meanwhile, so it sees what it would have
# seen. What could not be read is noted, and then copied from the backup to the active leg by a request of
# our own that claims it as a writer. It reads and writes under that one claim, so it puts nothing old over
# what a client writes. A note is for one active leg; when that changes, or no backup is left, the note is
# dropped, and whatever still cannot be read is met again by the next read.

cdef int32_t repair_source(Map *map) noexcept nogil:
    """The leg of this map to read from in place of its active one; -1: there is none."""
    cdef uint32_t i, j
    cdef bint usable
    for i in range(map.leg_count):
        if map.roles[i] != ROLE_BACKUP or map.legs[i].fenced or map.legs[i].behind:
            continue
        usable = True
        for j in range(map.legs[i].device_count):
            if map.legs[i].devices[j].lost:
                usable = False
        if usable:
            return <int32_t>i
    return -1

cdef uint16_t repair_leg(Core *core, Map *map) noexcept nogil:
    """Stands for the leg that ``repair_source`` names; 0: there is none."""
    cdef int32_t source = repair_source(map)
    return ship_bit(core, map.legs[source]) if source >= 0 else 0

cdef bint may_reread(Core *core, SubOp *sub, int32_t error) noexcept nogil:
    """Whether a sub-operation that failed is a read of the active leg that a backup can stand in for."""
    cdef Request *request = sub.request
    cdef Map *map = request.map
    if sub.kind != SUB_READ or request.kind == PROBE or error < 0 or error >= 256 or not core.medium_errors[error]:
        return False
    # The end of a file is no bad block: to write there would put zeroes over all that is missing before it.
    if sub.op.result == 0 or sub.device.lost or sub.device.leg != map.legs[map.active]:
        return False
    return repair_source(map) >= 0

cdef bint reread(Core *core, Request *request) noexcept nogil:
    """Read again, from a backup, what the active leg could not read; False: there is none any more."""
    cdef int32_t source = repair_source(request.map)
    request.rereading = False
    if source < 0:
        return False
    request.source = <uint32_t>source
    enter(core, request, request.phase)
    return True

cdef void repair_note(Core *core, SubOp *sub, int32_t error) noexcept nogil:
    """Remember to write back what this sub-operation could not read."""
    cdef Request *request = sub.request
    cdef Repair *repair
    cdef uint64_t begin, end
    cdef uint32_t i
    if request.phase == READING_EDGES:
        begin = edge_offset(request, <uint32_t>(<uint64_t>(sub.data - request.edges) // CLAIM_BLOCK))
    else:
        begin = request.claim_offset + <uint64_t>(sub.data - request.buffer)
    end = (begin + sub.length + CLAIM_BLOCK - 1) & ~<uint64_t>(CLAIM_BLOCK - 1)
    begin &= ~<uint64_t>(CLAIM_BLOCK - 1)
    for i in range(core.repair_count):
        repair = &core.repairs[(core.repair_first + i) % REPAIRS_MAX]
        if (repair.leg == sub.device.leg.id and repair.disk == request.disk
                and repair.offset <= begin and end <= repair.end):
            return
    if core.repair_count == REPAIRS_MAX:
        return
    repair = &core.repairs[(core.repair_first + core.repair_count) % REPAIRS_MAX]
    core.repair_count += 1
    repair.leg = sub.device.leg.id
    repair.device = sub.device.index
    repair.error = error
    repair.device_offset = sub.device_offset
    repair.disk = request.disk
    repair.offset = repair.cursor = begin
    repair.end = end

cdef bint repair_holds(Map *map, Repair *repair) noexcept nogil:
    """Whether a note can still be carried out under this map."""
    return map.legs[map.active].id == repair.leg and repair_source(map) >= 0

cdef void repair_drop(Core *core) noexcept nogil:
    core.repair_first = (core.repair_first + 1) % REPAIRS_MAX
    core.repair_count -= 1

cdef void repairs_pump(Core *core) noexcept nogil:
    """Carry out the notes, one step of one at a time."""
    cdef Repair *repair
    cdef Request *request
    cdef uint64_t length
    if core.held or core.repairing:
        return
    while core.repair_count and not repair_holds(core.map, &core.repairs[core.repair_first]):
        repair_drop(core)
    if core.repair_count == 0:
        return
    repair = &core.repairs[core.repair_first]
    length = repair.end - repair.cursor
    if length > COPY_CHUNK:
        length = COPY_CHUNK
    request = request_take(core, True)
    if request == NULL:
        return
    request.buffer = arena_take(&core.arena, length)
    if request.buffer == NULL:
        request_free(core, request)
        return
    request.kind = REPAIR
    request.disk = repair.disk
    request.offset = repair.cursor
    request.length = length
    if not marks_ready(core, request):
        request_free(core, request)
        return
    core.repairing = True
    admit(core, request)

cdef bint marks_ready(Core *core, Request *request) noexcept nogil:
    """Whether what this request of our own is to write to is marked in the dirty bitmap; if not, it will be.

    A write that fails may leave anything behind, also one that was to leave what is there. The marks
    are waited for without a claim: while the bitmap cannot be written clients go on reading.
    """
    request.claim_offset = request.offset
    request.claim_end = request.offset + request.length
    if not core.map.tracked or dirty_marked(core, request):
        return True
    dirty_write(core)
    return False

cdef void repair_done(Core *core, Request *request) noexcept nogil:
    """A step is over, for better or worse."""
    cdef Repair *repair = &core.repairs[core.repair_first]
    cdef Device *device
    cdef Leg *leg
    core.repairing = False
    repair.cursor += request.length
    if request.error:
        repair_drop(core)
    elif repair.cursor == repair.end:
        leg = leg_by_id(core, repair.leg)
        device = &leg.devices[repair.device]
        device.read_repairs += 1
        core.counters.read_repairs += 1
        # A device that takes every write and fails every read makes any number of these. Who does not listen
        # finds them in the counters.
        if event_room(core):
            event_put(core, EVENT_READ_REPAIRED, leg.id, device.index, repair.error, core.map.generation,
                      repair.device_offset, repair.end - repair.offset)
        repair_drop(core)
    request_free(core, request)
