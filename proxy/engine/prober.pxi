# Probes: a device that nobody asks for anything is asked now and then, through the same queue as any request.
#
# A hang is evidence only once something has waited for it. Clients that only read say nothing of a backup, and
# those that are quiet say nothing of any device, so a leg could be lost long before anybody found out. A probe is
# a read of the first block, where the label lies; it is judged by the same deadline, the same errors and the same
# fence as what clients ask for. A medium error is no evidence: a device that answers with one is there. A hold does
# not wait for probes, but of the leg that is to take over, which might be gone and nobody know it yet.

cdef void probes_check(Core *core) noexcept nogil:
    """At each tick: probe the devices that have not been heard of for too long."""
    cdef Leg *leg
    cdef Device *device
    cdef uint32_t i, j
    if not core.probe_ns or core.map == NULL or core.held:
        return
    for i in range(core.map.leg_count):
        leg = core.map.legs[i]
        if leg.fenced:
            continue
        for j in range(leg.device_count):
            device = &leg.devices[j]
            if not device.in_flight and not device.lost and core.now_ns - device.heard_ns >= core.probe_ns:
                probe(core, device)

cdef void probe(Core *core, Device *device) noexcept nogil:
    cdef Request *request
    cdef char *buffer
    if core.free_subops == NULL:
        return
    buffer = arena_take(&core.arena, CLAIM_BLOCK)
    if buffer == NULL:
        return
    request = request_take(core, True)
    if request == NULL:
        arena_release(&core.arena, buffer)
        return
    device.heard_ns = core.now_ns  # the next one is due after this
    request.kind = PROBE
    request.buffer = buffer
    request.state = RUNNING
    core.running += 1
    device.leg.probing += 1
    request.shipping = device.leg
    request.map = core.map
    core.map.references += 1
    request.phase = READING
    request.legs = 0  # nothing more is to be issued
    subop_start(core, request, device, SUB_READ, 0,
                CLAIM_BLOCK if device.transfer_max > CLAIM_BLOCK else device.transfer_max, buffer, 0)

cdef inline bint probe_is_answered(Core *core, Request *request, int32_t error) noexcept nogil:
    """Whether this error is the answer of a device that is there, to a request that asked for no more than that."""
    return request.kind == PROBE and 0 < error < 256 and core.medium_errors[error]

cdef void probe_done(Core *core, Request *request) noexcept nogil:
    request.shipping.probing -= 1
    request_free(core, request)
