# The data thread: one batch after another. And the two places where it meets the control thread: the
# mailbox (one command at a time, carried out between two batches) and the queue of events.

cdef void event_put(Core *core, uint32_t kind, int64_t leg, uint32_t device, int32_t code,
                    uint64_t generation, uint64_t a, uint64_t b) noexcept nogil:
    cdef EventRecord *event
    cdef uint64_t one = 1
    cdef bint first
    pthread_mutex_lock(&core.mutex)
    if core.event_count == EVENTS_MAX:
        abort()  # every kind is bounded by what it tells of, far below this
    event = &core.events[(core.event_first + core.event_count) % EVENTS_MAX]
    event.kind = kind
    event.leg = leg
    event.device = device
    event.code = code
    event.generation = generation
    event.a = a
    event.b = b
    first = core.event_count == 0
    core.event_count += 1
    pthread_mutex_unlock(&core.mutex)
    if first:
        write(core.event_fd, &one, sizeof(one))

cdef bint event_room(Core *core) noexcept nogil:
    """Whether there is room for an event of which there may be any number."""
    cdef bint room
    pthread_mutex_lock(&core.mutex)
    room = core.event_count < EVENTS_MAX // 2
    pthread_mutex_unlock(&core.mutex)
    return room

cdef bint mail(Core *core, mail_t function, void *arguments) noexcept nogil:
    """Have ``function`` carried out by the data thread, and wait for it; False: that is not running.

    Called by the control thread, one call at a time.
    """
    cdef uint64_t one = 1
    cdef bint taken = False
    if core.stepped:
        function(core, arguments)
        return True
    pthread_mutex_lock(&core.mutex)
    if core.running_loop:
        core.mail_arguments = arguments
        sf_store(&core.mail, <void *>function)
        write(core.wake_fd, &one, sizeof(one))
        while core.mail != NULL and core.running_loop:
            pthread_cond_wait(&core.mail_taken, &core.mutex)
        taken = core.mail == NULL
        core.mail = NULL
    pthread_mutex_unlock(&core.mutex)
    return taken

cdef void mail_take(Core *core) noexcept nogil:
    cdef void *function = sf_load(&core.mail)
    if function == NULL:
        return
    (<mail_t>function)(core, core.mail_arguments)
    pthread_mutex_lock(&core.mutex)
    core.mail = NULL
    pthread_cond_broadcast(&core.mail_taken)
    pthread_mutex_unlock(&core.mutex)

cdef void send_all(Core *core) noexcept nogil:
    """Send what this batch has made ready, one call a stream."""
    cdef Device *device
    cdef Connection *connection
    while core.dirty_devices != NULL:
        device = core.dirty_devices
        core.dirty_devices = device.next_dirty
        device.dirty = False
        remote_send(core, device)
    while core.dirty_connections != NULL:
        connection = core.dirty_connections
        core.dirty_connections = connection.next_dirty
        connection.dirty = False
        connection_send(core, connection)

cdef void settle_all(Core *core) noexcept nogil:
    """After a batch of completions: go on with everything that can, until only waiting is left."""
    cdef bint was_stopped
    while True:
        settle(core)
        ships_pump(core)
        copiers_pump(core)
        repairs_pump(core)
        verifier_pump(core)
        send_all(core)
        if connections_resume(core):
            continue
        if core.dirty_devices != NULL or core.dirty_connections != NULL:
            continue
        if core.wake and not core.held:
            continue
        if core.starved.count and core.relief:
            continue
        if core.marks_moved and not core.held:
            continue
        if core.ships_moved:
            continue
        break
    if core.now_ns >= core.tick_ns:
        # Long overdue: we were stopped ourselves, and what has come meanwhile is still to be heard.
        was_stopped = core.tick_ns and core.now_ns - core.tick_ns > core.deadline_ns // 4 + 2 * TICK_NS
        core.tick_ns = core.now_ns + TICK_NS
        if was_stopped and anything_in_flight(core):
            core.tick_ns += core.deadline_ns // 4
        else:
            check_deadlines(core)
            connections_check(core)
            probes_check(core)
        dirty_check(core)
    connections_bury(core)

cdef bint anything_in_flight(Core *core) noexcept nogil:
    cdef uint32_t i
    for i in range(LEG_SLOTS):
        if core.legs[i].in_flight:
            return True
    return False

cdef void step(Core *core) noexcept nogil:
    """One batch: wait, take in what completed, send what is ready."""
    cdef uint64_t patience = IDLE_NS
    cdef uint64_t pause
    if anything_in_flight(core) or core.dirty.round != ROUND_IDLE or core.dirty.failed:
        patience = TICK_NS
    elif core.now_ns - core.busy_ns > GIVE_BACK_NS:
        arena_give_back(&core.arena)
    if core.probe_ns and core.probe_ns < patience:
        patience = core.probe_ns
    pause = copiers_pause(core)
    core.ring.wait(core.ring, core, verifier_patience(core, patience if patience < pause else pause))
    mail_take(core)
    settle_all(core)

cdef void stop(Core *core, void *arguments) noexcept nogil:
    """Leave the loop once nothing is in flight; streams are cut, so only a hung file can delay that."""
    cdef uint32_t i
    core.stopping = True
    core.stop_ns = core.now_ns
    for i in range(CONNECTIONS_MAX):
        if core.connections[i] != NULL:
            connection_abort(core, core.connections[i], ESHUTDOWN)
    for i in range(LEG_SLOTS):
        if core.legs[i].in_use:
            leg_close(core, &core.legs[i])

cdef bint stopped(Core *core) noexcept nogil:
    cdef uint32_t i, j
    if not core.stopping:
        return False
    if core.now_ns - core.stop_ns > STOP_PATIENCE_NS:
        return True
    if core.dirty.writing:
        return False
    for i in range(LEG_SLOTS):
        if core.legs[i].in_flight:
            return False
        for j in range(core.legs[i].device_count):
            if core.legs[i].devices[j].stream != NULL and (
                    core.legs[i].devices[j].stream.receiving or core.legs[i].devices[j].stream.sending):
                return False
    for i in range(CONNECTIONS_MAX):
        if core.connections[i] != NULL and (
                core.connections[i].stream.receiving or core.connections[i].stream.sending):
            return False
    return True

cdef void wake_done(Core *core, Op *op) noexcept nogil:
    core.ring.submit(core.ring, op)

cdef int run_loop(Core *core) noexcept nogil:
    """The data thread, from its first batch to its last; 0 or -errno when there is no ring to be had."""
    cdef Uring uring
    cdef Op wake
    cdef uint64_t wakes = 0
    cdef int result = uring_open(&uring)
    if result < 0:
        pthread_mutex_lock(&core.mutex)
        core.start_error = -result
        pthread_cond_broadcast(&core.mail_taken)
        pthread_mutex_unlock(&core.mutex)
        return result
    core.ring = &uring.face
    memset(&wake, 0, sizeof(wake))
    wake.done = wake_done
    wake.kind = OP_READ
    wake.fd = core.wake_fd
    wake.data = <char *>&wakes
    wake.length = sizeof(wakes)
    core.now_ns = sf_monotonic_ns()
    core.ring.submit(core.ring, &wake)
    pthread_mutex_lock(&core.mutex)
    core.running_loop = True
    pthread_cond_broadcast(&core.mail_taken)
    pthread_mutex_unlock(&core.mutex)
    while not stopped(core):
        step(core)
    pthread_mutex_lock(&core.mutex)
    core.running_loop = False
    pthread_cond_broadcast(&core.mail_taken)
    pthread_mutex_unlock(&core.mutex)
    uring_close(&uring)
    core.ring = NULL
    return 0
