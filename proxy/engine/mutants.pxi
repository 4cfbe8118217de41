# Deliberate breaches of the engine's promises, one for each rule that is easy to get wrong. The simulator has to
# find every one of them (tests/sim/mutants.py says what each breaks). A test build (-DSF_MUTANTS) can commit any,
# chosen at run time; in the build that ships sf_mutant() is the constant 0 and nothing of them is left.

cdef extern from * nogil:
    """
    #ifdef SF_MUTANTS
    __attribute__((visibility("default"))) int sf_mutant_chosen;
    #define sf_mutant(number) (sf_mutant_chosen == (number))
    #else
    #define sf_mutant(number) 0
    #endif
    """
    bint sf_mutant(int number)

cdef enum:
    # Holding, fencing, switching
    FENCE_GATE_OPEN = 1
    FENCE_UNAWAITED = 2
    UNPROVEN_UNCOUNTED = 3
    ACKNOWLEDGED_WHILE_HELD = 4
    ADMITTED_WHILE_HELD = 5
    DRAIN_UNAWAITED = 6
    SWAPPED_MID_REQUEST = 7
    # Doing requests again
    PARKED_ANSWERED = 20
    PARKED_UNCLAIMED = 21
    REPLAYED_IN_PART = 22
    EDGES_NOT_READ_AGAIN = 23
    LATE_ANSWER_SCRIBBLES = 24
    # Replication
    FIRST_LEG_SUFFICES = 40
    BACKUP_ERROR_IGNORED = 41
    BACKUP_NOT_ZEROED = 42
    BACKUP_NOT_FLUSHED = 43
    BACKUP_WITHOUT_FUA = 44
    READ_FROM_LAST_LEG = 45
    WRITE_UNCLAIMED = 46
    READ_UNCLAIMED = 47
    SHORT_WRITE_TAKEN = 48
    DEADLINE_UNREPORTED = 49
    # Copying
    COPY_UNCLAIMED = 60
    COPY_MISSES_RANGE = 61
    COPY_UNFLUSHED = 62
    COPIED_EARLY = 63
    # Verifying and repairing
    VERIFY_UNCLAIMED = 80
    REPAIR_UNCLAIMED = 81
    # The dirty bitmap
    MARK_UNAWAITED = 100
    MARK_FORGOTTEN = 101
    CLEARED_UNFLUSHED = 102
    AWAY_NOT_TOLD = 103
    # The backlog
    SHIPPED_OUT_OF_ORDER = 120
    LAG_UNAWAITED = 121
    BEHIND_UNTOLD = 122

cdef inline bint mutant_unclaimed(Request *request) noexcept nogil:
    """Whether a request passes by all claims."""
    return (sf_mutant(WRITE_UNCLAIMED) and request.exclusive
            or sf_mutant(READ_UNCLAIMED) and request.kind == READ
            or sf_mutant(COPY_UNCLAIMED) and request.kind == COPY
            or sf_mutant(VERIFY_UNCLAIMED) and request.kind == VERIFY
            or sf_mutant(REPAIR_UNCLAIMED) and request.kind == REPAIR)

cdef inline bint mutant_on_backup(SubOp *sub) noexcept nogil:
    return sub.device.leg != sub.request.map.legs[sub.request.map.active]

cdef void mutant_swap(Core *core, Request *request) noexcept nogil:
    """SWAPPED_MID_REQUEST: what is left of a request goes where the newest map has it."""
    cdef uint32_t hint = 0
    cdef DiskMap *disk = map_disk(core.map, request.disk, &hint) if core.map != NULL else NULL
    if (request.map == core.map or request.disk_map == NULL or disk == NULL or request.shipping != NULL
            or request.source >= core.map.leg_count):
        return
    map_release(core, request.map)
    core.map.references += 1
    request.map = core.map
    request.disk_map = disk

cdef void mutant_forget_backups(Request *request) noexcept nogil:
    """FIRST_LEG_SUFFICES: once the active leg has all of a write, no other is waited for."""
    cdef Map *map = request.map
    cdef SubOp *sub
    cdef uint32_t i, j
    if request.phase != WRITING or request.failed or request.cursors[map.active] < request.span_end:
        return
    for j in range(map.legs[map.active].device_count):
        sub = map.legs[map.active].devices[j].oldest
        while sub != NULL:
            if sub.request == request:
                return
            sub = sub.newer
    for i in range(map.leg_count):
        for j in range(map.legs[i].device_count):
            sub = map.legs[i].devices[j].oldest
            while sub != NULL:
                if sub.request == request and not sub.queued:
                    sub.request = NULL
                    request.outstanding -= 1
                sub = sub.newer
