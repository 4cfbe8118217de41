# The submission layer on io_uring.

cdef enum:
    SQ_ENTRIES = 1024
    # Every sub-operation and two operations per stream can complete between two reaps.
    CQ_ENTRIES = 16384
    REAP_BATCH = 256
    # Of work on files in memory done at a stretch: while the rest waits, sockets are heard and answers
    # sent, so clients and we copy at the same time instead of in turn; and what was just copied is
    # still in the processor's cache.
    SLICE_BYTES = 256 << 10
    # A client with one request at a time sends the next a moment after its answer. To sleep and be woken takes
    # longer than that moment; so it is waited for awake, this long, where the last wait was as short.
    SPIN_NS = 50000
    SPIN_WORTH_NS = 100000
    SPIN_ANSWERS = 2           # of the last batch; when it had more there is enough to do without

cdef struct Uring:
    Ring face                # first: a Ring * is a Uring *
    io_uring ring
    # Operations on files in memory, carried out by ourselves in uring_wait().
    Op *work_head
    Op *work_tail
    bint kept_waiting        # queued submissions were, once, for a slice of that
    bint spins               # the last wait was short

cdef int uring_open(Uring *uring) noexcept nogil:
    """Create the ring. Only the thread that calls this may submit. Returns 0 or -errno."""
    cdef io_uring_params params
    cdef int result
    memset(uring, 0, sizeof(Uring))
    uring.face.submit = uring_submit
    uring.face.wait = uring_wait
    uring.face.send_nowait = uring_send_nowait
    uring.face.shut = uring_shut
    memset(&params, 0, sizeof(params))
    # TASKRUN_FLAG lets the reap below notice finished work without a system call when it has not waited.
    params.flags = (IORING_SETUP_CQSIZE | IORING_SETUP_CLAMP | IORING_SETUP_SINGLE_ISSUER
                    | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG)
    params.cq_entries = CQ_ENTRIES
    result = io_uring_queue_init_params(SQ_ENTRIES, &uring.ring, &params)
    if result == -EINVAL:  # before Linux 6.1
        memset(&params, 0, sizeof(params))
        params.flags = IORING_SETUP_CQSIZE | IORING_SETUP_CLAMP
        params.cq_entries = CQ_ENTRIES
        result = io_uring_queue_init_params(SQ_ENTRIES, &uring.ring, &params)
    return result

cdef void uring_close(Uring *uring) noexcept nogil:
    io_uring_queue_exit(&uring.ring)

cdef int64_t memory_io(Op *op, uint64_t skip, uint64_t length) noexcept nogil:
    """Carry out part of ``op`` on a file that is memory, where nothing can block."""
    cdef iovec iov
    cdef ssize_t result
    while True:
        if op.kind == OP_SYNC:
            return 0
        if op.kind == OP_ALLOCATE:
            result = fallocate(op.fd, op.flags, <int64_t>op.offset, <int64_t>op.length)
        else:
            iov.iov_base = op.data + skip
            iov.iov_len = length
            if op.kind == OP_READ:
                result = preadv2(op.fd, &iov, 1, <int64_t>(op.offset + skip), 0)
            else:
                result = pwritev2(op.fd, &iov, 1, <int64_t>(op.offset + skip), 0)
        if result >= 0:
            return result
        if errno != EINTR:
            return -errno

cdef void memory_slice(Uring *uring, Core *core) noexcept nogil:
    """Do up to a slice of what waits for us, and call ``done`` of all that is completed by it."""
    cdef uint64_t budget = SLICE_BYTES
    cdef uint64_t length
    cdef int64_t result
    cdef Op *op
    cdef Op *finished = NULL
    cdef Op **last = &finished
    while budget and uring.work_head != NULL:
        op = uring.work_head
        length = op.length - <uint64_t>op.result
        if op.kind != OP_READ and op.kind != OP_WRITE:
            op.result = memory_io(op, 0, 0)
        else:
            if length > budget:
                length = budget
            budget -= length
            result = memory_io(op, <uint64_t>op.result, length)
            if result == <int64_t>length and op.result + result < <int64_t>op.length:
                op.result += result
                continue  # the slice is used up
            if result >= 0:
                op.result += result
            elif op.result == 0:
                op.result = result  # else what was done so far stands, as in read(2)
        uring.work_head = op.next
        op.next = NULL
        last[0] = op
        last = &op.next
    if uring.work_head == NULL:
        uring.work_tail = NULL
    while finished != NULL:
        op = finished
        finished = op.next
        op.done(core, op)

cdef void uring_submit(Ring *face, Op *op) noexcept nogil:
    cdef Uring *uring = <Uring *>face
    cdef io_uring_sqe *sqe
    if op.in_memory:
        # tmpfs has no NOWAIT: through the ring each of these would be handed to a kernel worker
        # thread, which costs several times the copy itself.
        op.result = 0
        op.next = NULL
        if uring.work_tail == NULL:
            uring.work_head = op
        else:
            uring.work_tail.next = op
        uring.work_tail = op
        return
    sqe = io_uring_get_sqe(&uring.ring)
    while sqe == NULL:
        io_uring_submit(&uring.ring)
        sqe = io_uring_get_sqe(&uring.ring)
    if op.kind == OP_READ:
        io_uring_prep_read(sqe, op.fd, op.data, <unsigned int>op.length, op.offset)
    elif op.kind == OP_WRITE:
        io_uring_prep_write(sqe, op.fd, op.data, <unsigned int>op.length, op.offset)
        sqe.rw_flags = <uint32_t>op.flags
    elif op.kind == OP_RECEIVE:
        io_uring_prep_recvmsg(sqe, op.fd, op.message, 0)
    elif op.kind == OP_SEND:
        io_uring_prep_sendmsg(sqe, op.fd, op.message, MSG_NOSIGNAL | MSG_WAITALL)
    elif op.kind == OP_SYNC:
        io_uring_prep_fsync(sqe, op.fd, IORING_FSYNC_DATASYNC)
    else:
        io_uring_prep_fallocate(sqe, op.fd, op.flags, <int64_t>op.offset, <int64_t>op.length)
    sqe.user_data = <uint64_t>op

cdef bint uring_spin(Uring *uring) noexcept nogil:
    """Wait awake for a moment; True when something has completed."""
    cdef io_uring_cqe *first = NULL
    cdef uint64_t end_ns = sf_monotonic_ns() + SPIN_NS
    if io_uring_sq_ready(&uring.ring):
        io_uring_submit(&uring.ring)
    while io_uring_peek_cqe(&uring.ring, &first) != 0:
        if sf_monotonic_ns() >= end_ns:
            return False
    return True

cdef void uring_wait(Ring *face, Core *core, uint64_t timeout_ns) noexcept nogil:
    cdef Uring *uring = <Uring *>face
    cdef io_uring_cqe *cqes[REAP_BATCH]
    cdef io_uring_cqe *first = NULL
    cdef __kernel_timespec timeout
    cdef uint64_t began_ns
    cdef unsigned int count, i
    cdef Op *op
    if uring.work_head != NULL:
        core.now_ns = sf_monotonic_ns()
        memory_slice(uring, core)
        # A short slice is over before anything submitted now could matter: the next wait submits.
        if io_uring_sq_ready(&uring.ring):
            if uring.work_head != NULL or uring.kept_waiting:
                io_uring_submit(&uring.ring)
                uring.kept_waiting = False
            else:
                uring.kept_waiting = True
    else:
        began_ns = core.now_ns
        if not (uring.spins and core.batch_answers <= SPIN_ANSWERS and uring_spin(uring)):
            timeout.tv_sec = <int64_t>(timeout_ns // 1000000000)
            timeout.tv_nsec = <long long>(timeout_ns % 1000000000)
            io_uring_submit_and_wait_timeout(&uring.ring, &first, 1, &timeout, NULL)
        uring.kept_waiting = False
        uring.spins = sf_monotonic_ns() - began_ns <= SPIN_WORTH_NS
        core.batch_answers = 0
    core.now_ns = sf_monotonic_ns()
    while True:
        count = io_uring_peek_batch_cqe(&uring.ring, cqes, REAP_BATCH)
        for i in range(count):
            op = <Op *>cqes[i].user_data
            op.result = cqes[i].res
            op.done(core, op)
        io_uring_cq_advance(&uring.ring, count)
        if count < REAP_BATCH:
            break

cdef ssize_t uring_send_nowait(Ring *face, int fd, iovec *iov, uint32_t count) noexcept nogil:
    cdef msghdr message
    cdef ssize_t sent
    memset(&message, 0, sizeof(message))
    message.msg_iov = iov
    message.msg_iovlen = count
    while True:
        sent = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
        if sent >= 0:
            return sent
        if errno != EINTR:
            return -errno

cdef void uring_shut(Ring *face, int fd, int how) noexcept nogil:
    shutdown(fd, how)
