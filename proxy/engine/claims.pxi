# Claims: overlapping requests run one after the other, in order of arrival; readers share.
#
# Why: two writes to one block in flight at once may reach two legs in different orders, and the legs
# then differ for ever. A read beside a write may answer with what not every leg has yet, and after a
# failover an older block would be read. And a copy to a syncing leg must not cross a write of a
# client. All three are one rule: a request runs only when no earlier one that conflicts with its
# span is alive. It keeps its claim while it is parked, so a replay meets the same order.
#
# The list of claims is in order of arrival. Two tables of counters, hashed by the 64 KiB granule,
# answer the common case, nothing there, without walking it.

cdef enum:
    GRANULE_SHIFT = 16
    GRANULES = 4096
    # A claim over more granules than this is not counted but makes everyone walk the list.
    WIDE = 64

cdef inline uint32_t claim_cell(uint32_t disk, uint64_t granule) noexcept nogil:
    return <uint32_t>((granule + <uint64_t>disk * 2654435761u) & (GRANULES - 1))

cdef void claim_count(Core *core, Request *request, int32_t step) noexcept nogil:
    cdef uint64_t first = request.claim_offset >> GRANULE_SHIFT
    cdef uint64_t last = (request.claim_end - 1) >> GRANULE_SHIFT
    cdef uint16_t *table = &core.writers[0] if request.exclusive else &core.readers[0]
    cdef uint64_t granule
    if last - first >= WIDE:
        core.wide_claims += step
        return
    for granule in range(first, last + 1):
        table[claim_cell(request.disk, granule)] += step

cdef bint claim_maybe(Core *core, Request *request) noexcept nogil:
    """Whether some claim may conflict; False is certain."""
    cdef uint64_t first = request.claim_offset >> GRANULE_SHIFT
    cdef uint64_t last = (request.claim_end - 1) >> GRANULE_SHIFT
    cdef uint64_t granule
    cdef uint32_t cell
    if core.wide_claims or last - first >= WIDE:
        return core.claims_head != NULL
    for granule in range(first, last + 1):
        cell = claim_cell(request.disk, granule)
        if core.writers[cell] or (request.exclusive and core.readers[cell]):
            return True
    return False

cdef Request *claim_conflict(Request *latest, Request *request) noexcept nogil:
    """The latest claim, from ``latest`` back to the earliest, that conflicts; or NULL.

    The latest, since that one will mostly be the last to go: a queue for one block then moves one by one,
    and its others are not looked at in vain.
    """
    cdef Request *other = latest
    while other != NULL:
        if (other.disk == request.disk
                and (other.exclusive or request.exclusive)
                and other.claim_offset < request.claim_end and request.claim_offset < other.claim_end):
            return other
        other = other.claim_previous
    return NULL

cdef bint claim(Core *core, Request *request) noexcept nogil:
    """Claim the request's span; True when it may run now, False when an earlier one is in its way."""
    cdef Request *conflict = NULL
    if claim_maybe(core, request):
        conflict = claim_conflict(core.claims_tail, request)
    request.claim_next = NULL
    request.claim_previous = core.claims_tail
    if core.claims_tail == NULL:
        core.claims_head = request
    else:
        core.claims_tail.claim_next = request
    core.claims_tail = request
    request.claimed = True
    request.blocks_others = False
    claim_count(core, request, 1)
    request.waits_for = conflict
    if conflict != NULL:
        conflict.blocks_others = True
    return conflict == NULL

cdef bint claim_clear(Core *core, Request *request) noexcept nogil:
    """Whether a waiting request may run now; if not, what is in its way will tell when it goes."""
    cdef Request *conflict
    if request.waits_for != NULL:
        return False
    conflict = request.waits_for = claim_conflict(request.claim_previous, request)
    if conflict != NULL:
        conflict.blocks_others = True
    return conflict == NULL

cdef void unclaim(Core *core, Request *request) noexcept nogil:
    """Give the claim back; whoever waits for it is looked at when the loop settles."""
    cdef Request *waiting = core.waiting.head
    if not request.claimed:
        return
    if request.claim_previous == NULL:
        core.claims_head = request.claim_next
    else:
        request.claim_previous.claim_next = request.claim_next
    if request.claim_next == NULL:
        core.claims_tail = request.claim_previous
    else:
        request.claim_next.claim_previous = request.claim_previous
    claim_count(core, request, -1)
    request.claimed = False
    if request.blocks_others:
        core.wake = True
        while waiting != NULL:
            if waiting.waits_for == request:
                waiting.waits_for = NULL
            waiting = waiting.next
