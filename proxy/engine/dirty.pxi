# The dirty bitmap: which regions of the domain may differ between its legs.
#
# The bitmap has *planes*, each with one bit for each region of the domain. Plane 0 is the *intent*: a region is
# marked there, durably, before a write to it is issued, and stays marked until a flush has shown that every
# leg of the map has it. The others are the legs': what a leg that is away, or being copied to, may lack.
#
#   write ── marked? ──> start
#              └─ no: MARKING, until the sector of the bitmap that has its bits is on the disk
#
# A region that is written to again and again is marked once. Marks are cleared in rounds, a few seconds apart:
# of regions not written to since the round before, after a flush of all legs, and after the planes of legs that
# are away have durably taken them over. So whatever a leg lacks is in its own plane or in the intent, at any
# moment, and whoever starts after a crash joins the two (proxy/dirtymap.py, which also describes the file).

cdef uint32_t crc_table[256]

cdef void crc_prepare() noexcept nogil:
    """CRC-32 as in zlib.crc32."""
    cdef uint32_t i, j, value
    for i in range(256):
        value = i
        for j in range(8):
            value = (value >> 1) ^ (0xEDB88320u if value & 1 else 0)
        crc_table[i] = value

cdef uint32_t crc32(const char *data, uint64_t length) noexcept nogil:
    cdef uint32_t value = 0xFFFFFFFFu
    cdef uint64_t i
    for i in range(length):
        value = crc_table[(value ^ <uint8_t>data[i]) & 0xFF] ^ (value >> 8)
    return value ^ 0xFFFFFFFFu

cdef inline bint bit_is(const uint64_t *bits, uint64_t number) noexcept nogil:
    return (bits[number >> 6] >> (number & 63)) & 1

cdef inline void bit_set(uint64_t *bits, uint64_t number) noexcept nogil:
    bits[number >> 6] |= <uint64_t>1 << (number & 63)

cdef inline void dirty_stale(Dirty *dirty, uint32_t plane, uint64_t word) noexcept nogil:
    """The disk has this word's sector otherwise."""
    cdef uint64_t sector = word // SECTOR_WORDS
    if not dirty.stale[plane][sector]:
        dirty.stale[plane][sector] = 1
        dirty.stale_count[plane] += 1

cdef void dirty_put(Dirty *dirty, uint32_t plane, uint64_t word, uint64_t value) noexcept nogil:
    if dirty.planes[plane][word] != value:
        dirty.planes[plane][word] = value
        dirty_stale(dirty, plane, word)

# --- Marking -------------------------------------------------------------------------------------

cdef bint dirty_marked(Core *core, Request *request) noexcept nogil:
    """Whether every region of a writer's claim is marked, durably. What is not is on its way to be."""
    cdef Dirty *dirty = &core.dirty
    cdef uint32_t hint = 0
    cdef DiskMap *disk = map_disk(
        core.map, request.disk, &hint if request.connection == NULL else &request.connection.disk_hint)
    cdef uint64_t offset = request.claim_offset
    cdef uint64_t end = request.claim_end
    cdef uint64_t index, part, region, last
    cdef bint marked = True
    if disk == NULL:
        return True  # it is refused in a moment
    if end > disk.allotted:
        end = disk.allotted
    while offset < end:
        index = extent_find(&disk.domain, offset)
        part = disk.domain.offsets[index + 1]
        if part > end:
            part = end
        region = disk.domain.device_offsets[index] + (offset - disk.domain.offsets[index])
        last = (region + (part - offset) - 1) >> dirty.shift
        region >>= dirty.shift
        while region <= last:
            if sf_mutant(MARK_FORGOTTEN) and region % 4 == 3:
                region += 1
                continue
            bit_set(dirty.touched, region)
            if not bit_is(dirty.durable, region):
                marked = False
                dirty_mark(dirty, region)
            region += 1
        offset = part
    return marked

cdef void dirty_mark(Dirty *dirty, uint64_t region) noexcept nogil:
    """Have a region marked, and what follows it if the one before is already."""
    cdef uint64_t end = region + 1
    if bit_is(dirty.planes[INTENT], region):
        return
    if region and bit_is(dirty.durable, region - 1):
        end = region + MARK_AHEAD
    while region < end and region < dirty.regions:
        if not bit_is(dirty.planes[INTENT], region):
            bit_set(dirty.planes[INTENT], region)
            dirty_stale(dirty, INTENT, region >> 6)
        region += 1

cdef void dirty_await(Core *core, Request *request) noexcept nogil:
    """Let a writer wait until its regions are marked."""
    request.state = MARKING
    list_push(&core.marking, request)
    dirty_write(core)

cdef void dirty_resume(Core *core) noexcept nogil:
    """Start the writers whose regions are marked by now."""
    cdef uint32_t count = core.marking.count
    core.marks_moved = False
    while count:
        count -= 1
        start(core, list_pop(&core.marking))  # it comes back if it must

# --- The disk ------------------------------------------------------------------------------------

cdef bint dirty_pick(Core *core) noexcept nogil:
    """Choose the sectors to write next: every other time those that writers wait for. False: all is on the disk."""
    cdef Dirty *dirty = &core.dirty
    cdef uint32_t plane, turn
    cdef uint64_t i, sector
    # After the intent somebody else has a turn, or with new marks all the time none would ever be cleared.
    turn = 1 if dirty.plane == INTENT else INTENT
    for plane in range(turn, turn + PLANES):
        plane %= PLANES
        if not dirty.stale_count[plane]:
            continue
        for i in range(dirty.sectors):
            sector = (dirty.cursors[plane] + i) % dirty.sectors
            if dirty.stale[plane][sector]:
                dirty.plane = plane
                dirty.first_sector = sector
                dirty.sector_count = dirty.sectors - sector
                if dirty.sector_count > STAGE_SECTORS:
                    dirty.sector_count = STAGE_SECTORS
                while not dirty.stale[plane][sector + dirty.sector_count - 1]:
                    dirty.sector_count -= 1
                dirty.cursors[plane] = (sector + dirty.sector_count) % dirty.sectors
                return True
    return False

cdef void dirty_write(Core *core) noexcept nogil:
    """Write what is to be written, unless a write is under way: the next one takes all that has come meanwhile."""
    cdef Dirty *dirty = &core.dirty
    cdef uint64_t i, number
    cdef uint32_t small
    cdef char *sector
    if not dirty.open or dirty.writing or core.now_ns < dirty.retry_ns or not dirty_pick(core):
        return
    dirty.writing = True
    dirty.began_ns = core.now_ns
    for i in range(dirty.sector_count):
        number = dirty.first_sector + i
        sector = dirty.stage + i * DIRTY_SECTOR
        if dirty.stale[dirty.plane][number]:
            dirty.stale[dirty.plane][number] = 0
            dirty.stale_count[dirty.plane] -= 1
        number += 1 + dirty.plane * dirty.sectors
        small = <uint32_t>number
        memcpy(sector + 4, &small, 4)
        memcpy(sector + 8, &dirty.identity, 8)
        memcpy(sector + DIRTY_HEADER, dirty.planes[dirty.plane] + (dirty.first_sector + i) * SECTOR_WORDS,
               SECTOR_WORDS * 8)
        small = crc32(sector + 4, DIRTY_SECTOR - 4)
        memcpy(sector, &small, 4)
    dirty.op.kind = OP_WRITE
    dirty.op.fd = dirty.fd
    dirty.op.flags = RWF_DSYNC
    dirty.op.offset = (1 + dirty.plane * dirty.sectors + dirty.first_sector) * DIRTY_SECTOR
    dirty.op.length = dirty.sector_count * DIRTY_SECTOR
    dirty.op.data = dirty.stage
    core.ring.submit(core.ring, &dirty.op)

cdef void dirty_failed(Core *core, int32_t error) noexcept nogil:
    if not core.dirty.failed:
        core.dirty.failed = True
        event_put(core, EVENT_BITMAP_FAILED, 0, 0, error, 0, 0, 0)

cdef void dirty_written(Core *core, Op *op) noexcept nogil:
    cdef Dirty *dirty = &core.dirty
    cdef uint64_t first = dirty.first_sector * SECTOR_WORDS
    cdef uint64_t i, j, word
    cdef uint64_t *staged
    dirty.writing = False
    if op.result != <int64_t>op.length:
        for i in range(dirty.sector_count):
            dirty_stale(dirty, dirty.plane, first + i * SECTOR_WORDS)
        dirty.retry_ns = core.now_ns + DIRTY_RETRY_NS
        dirty_failed(core, <int32_t>-op.result if op.result < 0 else ENOSPC)
        dirty_write(core)
        return
    if dirty.failed:
        dirty.failed = False
        event_put(core, EVENT_BITMAP_FAILED, 0, 0, 0, 0, 0, 0)
    if dirty.plane == INTENT:
        for i in range(dirty.sector_count):
            staged = <uint64_t *>(dirty.stage + i * DIRTY_SECTOR + DIRTY_HEADER)
            for j in range(SECTOR_WORDS):
                word = first + i * SECTOR_WORDS + j
                # What was cleared meanwhile will be on the disk too.
                dirty.durable[word] = staged[j] & dirty.planes[INTENT][word]
        core.marks_moved = True
    dirty_write(core)

# --- Rounds --------------------------------------------------------------------------------------

cdef void dirty_check(Core *core) noexcept nogil:
    """At each tick: go on with the round under way, or begin the next."""
    cdef Dirty *dirty = &core.dirty
    cdef uint64_t *swapped
    cdef uint64_t word
    cdef uint64_t left = 0
    cdef Request *request
    cdef uint32_t i
    if not dirty.open or core.map == NULL:
        return
    if dirty.writing and core.now_ns - dirty.began_ns > core.deadline_ns:
        dirty_failed(core, ETIMEDOUT)
    dirty_write(core)
    if dirty.round == ROUND_FOLDING:
        dirty_fold_done(core)
    if dirty.round != ROUND_IDLE or not core.map.tracked or core.held or core.now_ns < dirty.round_ns:
        return
    dirty.round_ns = core.now_ns + core.round_every_ns
    for i in range(REQUESTS_MAX):
        request = &core.requests[i]
        if request.claimed and request.exclusive:
            dirty_marked(core, request)  # it may have been under way for longer than a round
    for word in range(dirty.words):
        dirty.clearing[word] = (
            dirty.planes[INTENT][word] & dirty.durable[word] & ~dirty.touched[word] & ~dirty.touched_before[word])
        left |= dirty.clearing[word]
    swapped = dirty.touched_before
    dirty.touched_before = dirty.touched
    dirty.touched = swapped
    memset(dirty.touched, 0, dirty.words * 8)
    if not left:
        return
    request = request_take(core, True)
    if request == NULL:
        return
    request.kind = FLUSH
    request.cleaning = True
    dirty.round = ROUND_FLUSHING
    dirty.round_generation = core.map.generation
    if sf_mutant(CLEARED_UNFLUSHED):
        request_free(core, request)
        dirty_flushed(core, 0)
        return
    admit(core, request)

cdef void dirty_flushed(Core *core, int32_t error) noexcept nogil:
    """Every leg has durably what this round is about; legs that are away are told what they lack of it."""
    cdef Dirty *dirty = &core.dirty
    cdef uint64_t word
    cdef uint32_t plane
    dirty.round = ROUND_IDLE
    if error or core.map.generation != dirty.round_generation or leg_is_behind(core.map):
        return
    dirty.round = ROUND_FOLDING
    for plane in range(1, PLANES):
        if core.map.away & (1 << plane) and not sf_mutant(AWAY_NOT_TOLD):
            for word in range(dirty.words):
                dirty_put(dirty, plane, word, dirty.planes[plane][word] | dirty.clearing[word])
    dirty_write(core)
    dirty_fold_done(core)

cdef void dirty_fold_done(Core *core) noexcept nogil:
    """Clear the round's marks, once the planes of all legs that are away are on the disk."""
    cdef Dirty *dirty = &core.dirty
    cdef uint64_t word, gone
    cdef uint32_t plane
    if core.map.generation != dirty.round_generation:
        dirty.round = ROUND_IDLE  # some leg may have gone away that has not taken them over
        return
    for plane in range(1, PLANES):
        if dirty.stale_count[plane] or (dirty.writing and dirty.plane == plane):
            return
    dirty.round = ROUND_IDLE
    for word in range(dirty.words):
        gone = dirty.clearing[word] & ~dirty.touched[word]
        if gone:
            dirty.durable[word] &= ~gone
            dirty_put(dirty, INTENT, word, dirty.planes[INTENT][word] & ~gone)
    dirty_write(core)

# --- Legs ----------------------------------------------------------------------------------------

cdef void dirty_install(Core *core, Map *before, Map *map) noexcept nogil:
    """A new map: who has come back lacks what is marked; who is up to date lacks nothing.

    And when the active leg has come back, whoever is being copied to may have what that leg has lost of the
    marked regions, such as what it had answered and not flushed: copied or not, they are copied again.
    """
    cdef Dirty *dirty = &core.dirty
    cdef uint32_t i, k, plane
    cdef uint64_t word
    if not dirty.open:
        return
    for i in range(map.leg_count):
        plane = map.planes[i]
        if not plane:
            continue
        if map.roles[i] != ROLE_SYNCING:
            for word in range(dirty.words):
                dirty_put(dirty, plane, word, 0)
        elif before == NULL or not map_syncs(before, map.legs[i]) or not map_has(before, map.legs[map.active]):
            for word in range(dirty.words):
                dirty_put(dirty, plane, word, dirty.planes[plane][word] | dirty.planes[INTENT][word])
                dirty.copied[plane][word] &= ~dirty.planes[INTENT][word]
            for k in range(LEG_SLOTS):
                if core.copiers[k].in_use and core.copiers[k].leg == map.legs[i]:
                    core.copiers[k].range_index = 0
                    core.copiers[k].range_offset = 0
                    core.copiers[k].run_begin = core.copiers[k].run_end = 0
    dirty_write(core)

cdef inline bint map_has(Map *map, Leg *leg) noexcept nogil:
    cdef uint32_t i
    for i in range(map.leg_count):
        if map.legs[i] == leg:
            return True
    return False

cdef inline bint map_syncs(Map *map, Leg *leg) noexcept nogil:
    cdef uint32_t i
    for i in range(map.leg_count):
        if map.legs[i] == leg:
            return map.roles[i] == ROLE_SYNCING
    return False

cdef uint32_t dirty_plane(Core *core, Leg *leg) noexcept nogil:
    """The plane of a leg of the installed map; 0: none."""
    cdef uint32_t i
    for i in range(core.map.leg_count):
        if core.map.legs[i] == leg:
            return core.map.planes[i]
    return 0

cdef uint64_t dirty_bytes(Dirty *dirty, Map *map, uint32_t plane, bint away) noexcept nogil:
    """Bytes of disks that lie in regions which a leg lacks."""
    cdef LegTable *table
    cdef uint64_t count = 0
    cdef uint64_t position, stop, after
    cdef uint64_t k
    cdef uint32_t i
    for i in range(map.disk_count):
        table = &map.disks[i].domain
        for k in range(table.count):
            position = table.device_offsets[k]
            stop = position + table.offsets[k + 1] - table.offsets[k]
            while position < stop:
                after = ((position >> dirty.shift) + 1) << dirty.shift
                if after > stop:
                    after = stop
                if bit_is(dirty.planes[plane], position >> dirty.shift) or (
                        away and bit_is(dirty.planes[INTENT], position >> dirty.shift)):
                    count += after - position
                position = after
    return count
