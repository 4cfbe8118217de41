# Devices that are NBD exports of another server: the engine as a client, many commands in flight on
# one stream, simple replies. The stream was negotiated in Python (backends/nbd.py).
#
# A command's cookie is the slot of its sub-operation and the serial of the slot's use, so that an
# answer to anything but a command in flight is recognised; it ends the stream, since a server that
# answers what was not asked cannot be trusted with what was.

cdef enum:
    NBD_REQUEST_MAGIC = 0x25609513
    NBD_SIMPLE_REPLY_MAGIC = 0x67446698
    NBD_CMD_READ = 0
    NBD_CMD_WRITE = 1
    NBD_CMD_DISC = 2
    NBD_CMD_FLUSH = 3
    NBD_CMD_TRIM = 4
    NBD_CMD_WRITE_ZEROES = 6
    NBD_FLAG_FUA = 1
    NBD_FLAG_NO_HOLE = 2
    NBD_HEADER = 28
    NBD_REPLY = 16

cdef void remote_queue(Core *core, SubOp *sub) noexcept nogil:
    """Queue a command; the queue is sent when the batch is settled."""
    cdef Device *device = sub.device
    sub.queued = True
    sub.next = NULL
    if device.queue_tail == NULL:
        device.queue_head = sub
    else:
        device.queue_tail.next = sub
    device.queue_tail = sub
    if not device.dirty:
        device.dirty = True
        device.next_dirty = core.dirty_devices
        core.dirty_devices = device

cdef void remote_command(Core *core, SubOp *sub) noexcept nogil:
    """Write the command's header; its parts go to the stream."""
    cdef Stream *stream = sub.device.stream
    cdef uint16_t command = NBD_CMD_READ
    cdef uint16_t flags = 0
    cdef uint64_t length = sub.length - sub.progress
    if sub.kind == SUB_ZERO and not sub.device.can_zero:
        sub.kind = SUB_ZERO_FILL
    if sub.kind == SUB_WRITE or sub.kind == SUB_ZERO_FILL:
        command = NBD_CMD_WRITE
        if sub.kind == SUB_WRITE and sub_is_durable(sub):
            flags = NBD_FLAG_FUA
    elif sub.kind == SUB_ZERO:
        command = NBD_CMD_WRITE_ZEROES
        if sub.request.keep_allocated:
            flags = NBD_FLAG_NO_HOLE
    elif sub.kind == SUB_FLUSH:
        command = NBD_CMD_FLUSH
        length = 0
    if sub.kind == SUB_ZERO_FILL and length > ZERO_FILL_BYTES:
        length = ZERO_FILL_BYTES
    if sub.kind == SUB_ZERO_FILL and length > sub.device.transfer_max:
        length = sub.device.transfer_max
    sub.op.length = length
    sub.answered = False
    sub.queued = False
    sub.sending = True
    sf_put32(sub.header, NBD_REQUEST_MAGIC)
    sf_put16(sub.header + 4, flags)
    sf_put16(sub.header + 6, command)
    sf_put64(sub.header + 8, (<uint64_t>sub.serial << 32) | <uint64_t>(sub - core.subops))
    sf_put64(sub.header + 16, sub.device_offset + sub.progress)
    sf_put32(sub.header + 24, <uint32_t>length)
    stream_put(stream, sub.header, NBD_HEADER)
    if command == NBD_CMD_WRITE:
        stream_put(stream, core.zeroes if sub.kind == SUB_ZERO_FILL else sub.data, length)

cdef void remote_send(Core *core, Device *device) noexcept nogil:
    """Send all queued commands, in as few calls as they need."""
    cdef Stream *stream = device.stream
    cdef SubOp *last
    while device.queue_head != NULL and not stream.sending and not device.lost:
        last = NULL
        device.batch = device.queue_head
        while device.queue_head != NULL and stream_has_room(stream):
            last = device.queue_head
            device.queue_head = last.next
            remote_command(core, last)
        last.next = NULL
        if device.queue_head == NULL:
            device.queue_tail = NULL
        if stream_send(core, stream):
            remote_sent(core, device)

cdef void remote_sent(Core *core, Device *device) noexcept nogil:
    """The batch is on the wire: what was answered meanwhile may now be let go."""
    cdef SubOp *sub = device.batch
    cdef SubOp *after
    device.batch = NULL
    while sub != NULL:
        after = sub.next
        sub.next = NULL
        sub.sending = False
        if sub.answered:
            remote_answered(core, sub)
        sub = after

cdef void remote_send_done(Core *core, Op *op) noexcept nogil:
    cdef Device *device = <Device *>op.owner
    cdef Stream *stream = device.stream
    stream.sending = False
    if op.result <= 0 and op.result != -EAGAIN and op.result != -EINTR:
        remote_lost(core, device, <int32_t>-op.result if op.result else EPIPE)
        remote_bury(core, device)
        return
    if device.lost:
        remote_bury(core, device)
        return
    if op.result > 0 and stream_advance(stream, <uint64_t>op.result):
        remote_sent(core, device)
    elif stream_send(core, stream):
        remote_sent(core, device)
    if not stream.sending:
        remote_send(core, device)

cdef void remote_receive_done(Core *core, Op *op) noexcept nogil:
    cdef Device *device = <Device *>op.owner
    cdef Stream *stream = device.stream
    if op.result <= 0 and op.result != -EAGAIN and op.result != -EINTR:
        stream.receiving = False
        remote_lost(core, device, <int32_t>-op.result if op.result else ECONNRESET)
        remote_bury(core, device)
        return
    stream_received(stream, <uint64_t>op.result if op.result > 0 else 0)
    if device.lost:
        remote_bury(core, device)
        return
    if remote_parse(core, device):
        stream_receive(core, stream)
    else:
        remote_lost(core, device, EPROTO)
        remote_bury(core, device)

cdef bint remote_parse(Core *core, Device *device) noexcept nogil:
    """Take in what was received; False when the server broke the protocol."""
    cdef Stream *stream = device.stream
    cdef SubOp *sub
    cdef char *reply
    cdef uint64_t cookie
    cdef uint32_t slot
    cdef uint32_t error
    while True:
        if device.filling != NULL:
            if not stream_fill(stream):
                return True
            sub = device.filling
            device.filling = NULL
            sub.op.result = 0
            remote_answer(core, sub)
        if stream.rx_end - stream.rx_start < NBD_REPLY:
            return True
        reply = stream.rx + stream.rx_start
        cookie = sf_get64(reply + 8)
        slot = <uint32_t>cookie
        if sf_get32(reply) != NBD_SIMPLE_REPLY_MAGIC or slot >= SUBOPS_MAX:
            return False
        sub = &core.subops[slot]
        if (not sub.in_flight or sub.device != device or sub.serial != cookie >> 32
                or sub.queued or sub.answered):
            return False
        stream.rx_start += NBD_REPLY
        error = sf_get32(reply + 4)
        if sub.kind == SUB_READ and error == 0:
            stream.fill = sub.data
            stream.fill_left = sub.length
            device.filling = sub
            continue
        sub.op.result = -<int64_t>error if error <= 4095 else -EIO
        remote_answer(core, sub)

cdef void remote_answer(Core *core, SubOp *sub) noexcept nogil:
    """A command was answered. While its bytes may still be being sent, it must stay in place."""
    if sub.sending:
        sub.answered = True
    else:
        remote_answered(core, sub)

cdef void remote_answered(Core *core, SubOp *sub) noexcept nogil:
    cdef Device *device = sub.device
    cdef int32_t error = <int32_t>-sub.op.result
    if not error:
        sub.progress += sub.op.length
    if sub.request != NULL and not device.leg.fenced and not device.lost:
        if not error and sub.kind != SUB_FLUSH and sub.progress < sub.length:
            sub.serial += 1
            remote_queue(core, sub)  # the rest of a ZERO_FILL
            return
        if sub.kind == SUB_ZERO and error == EOPNOTSUPP:
            device.can_zero = False
            sub.serial += 1
            remote_queue(core, sub)
            return
    subop_end(core, sub, error)

cdef void remote_lost(Core *core, Device *device, int32_t error) noexcept nogil:
    """The stream is dead, or must be: no more goes out, and what is in flight is of unknown fate."""
    if device.lost:
        return
    device.lost = True
    device.error = error
    core.ring.shut(core.ring, device.stream.fd, SHUT_RDWR)
    if not device.leg.fenced:
        device.reported = True
        event_put(core, EVENT_DEVICE_LOST, device.leg.id, device.index, error,
                  core.map.generation if core.map != NULL else 0, device.in_flight, 0)

cdef void remote_bury(Core *core, Device *device) noexcept nogil:
    """End what was in flight on a lost stream, once the kernel no longer touches its buffers."""
    cdef SubOp *sub
    if device.stream.receiving or device.stream.sending:
        return
    device.filling = NULL
    device.stream.fill_left = 0
    device.batch = NULL
    while device.queue_head != NULL:  # never sent: these are not of unknown fate
        sub = device.queue_head
        device.queue_head = sub.next
        subop_end(core, sub, device.error)
    device.queue_tail = NULL
    while device.oldest != NULL:
        sub = device.oldest
        if sub.kind == SUB_WRITE or sub.kind == SUB_ZERO or sub.kind == SUB_ZERO_FILL:
            device.unproven += not sf_mutant(UNPROVEN_UNCOUNTED)
        sub.sending = False
        subop_end(core, sub, device.error)
    leg_check_closed(core, device.leg)

cdef void remote_fence(Core *core, Device *device) noexcept nogil:
    """Let no further byte out. Answers to what is out are still awaited: each one proves that its
    command can do nothing any more. Only a send caught half-way makes us cut the stream."""
    cdef SubOp *sub
    cdef SubOp *dropped
    if device.stream.sending:
        remote_lost(core, device, ECONNABORTED)
        return
    dropped = device.queue_head
    device.queue_head = NULL
    device.queue_tail = NULL
    while dropped != NULL:
        sub = dropped
        dropped = sub.next
        subop_end(core, sub, ECANCELED)
