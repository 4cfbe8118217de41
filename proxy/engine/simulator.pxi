# The submission layer as a simulator: operations wait until the test completes them, in any order, with
# any result, as late as it likes. Time is what the test says. Nothing else differs: the engine above is
# the one that ships.

cdef struct SimRing:
    Ring face
    Op *pending
    Op *completed_head
    Op *completed_tail
    uint64_t clock_ns
    uint64_t next_number
    uint32_t shut_count
    int32_t shut_fds[CONNECTIONS_MAX]

cdef void sim_open(SimRing *sim) noexcept nogil:
    memset(sim, 0, sizeof(SimRing))
    sim.face.submit = sim_submit
    sim.face.wait = sim_wait
    sim.face.send_nowait = sim_send_nowait
    sim.face.shut = sim_shut
    sim.clock_ns = 1000000000
    sim.next_number = 1

cdef void sim_submit(Ring *face, Op *op) noexcept nogil:
    cdef SimRing *sim = <SimRing *>face
    op.number = sim.next_number
    sim.next_number += 1
    op.next = sim.pending
    sim.pending = op

cdef void sim_wait(Ring *face, Core *core, uint64_t timeout_ns) noexcept nogil:
    cdef SimRing *sim = <SimRing *>face
    cdef Op *op
    core.now_ns = sim.clock_ns
    while sim.completed_head != NULL:
        op = sim.completed_head
        sim.completed_head = op.next
        if sim.completed_head == NULL:
            sim.completed_tail = NULL
        op.done(core, op)

cdef ssize_t sim_send_nowait(Ring *face, int fd, iovec *iov, uint32_t count) noexcept nogil:
    # Every send waits for the test, which sees it as an operation like any other.
    return -EAGAIN

cdef void sim_shut(Ring *face, int fd, int how) noexcept nogil:
    cdef SimRing *sim = <SimRing *>face
    if sim.shut_count < CONNECTIONS_MAX:
        sim.shut_fds[sim.shut_count] = fd
        sim.shut_count += 1

cdef Op *sim_find(SimRing *sim, uint64_t number, bint take) noexcept nogil:
    """The pending operation of this number, or NULL; taken off the list when asked."""
    cdef Op *before = NULL
    cdef Op *op = sim.pending
    while op != NULL and op.number != number:
        before = op
        op = op.next
    if op != NULL and take:
        if before == NULL:
            sim.pending = op.next
        else:
            before.next = op.next
    return op

cdef void sim_complete(SimRing *sim, Op *op, int64_t result) noexcept nogil:
    op.result = result
    op.next = NULL
    if sim.completed_tail == NULL:
        sim.completed_head = op
    else:
        sim.completed_tail.next = op
    sim.completed_tail = op
