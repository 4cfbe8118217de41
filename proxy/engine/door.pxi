# The NBD door: clients in the transmission phase. Negotiation happened in Python
# (domainserver/negotiation.py); here a connection is a descriptor and the number of a disk.
#
# Whatever a client sends costs at most its own connection: a bad magic ends it, every other wrong
# request is answered with an error, and a refused write's payload is read and thrown away so that
# the stream stays in step. Past its share of requests or bytes a connection is not read (it is
# *stalled*) until answers have made room: TCP's own back-pressure does the rest.

cdef void connection_open(Core *core, Connection *connection) noexcept nogil:
    """Begin to serve; what the client sent early is in the stream already."""
    core.connections[connection.number] = connection
    core.connection_count += 1
    connections_share(core)
    connection_read(core, connection)

cdef void connections_share(Core *core) noexcept nogil:
    """Divide what clients may take among them, and one more that may come."""
    core.request_share = (REQUESTS_MAX - REQUESTS_RESERVED) // (core.connection_count + 1)
    if core.request_share > REQUESTS_PER_CONNECTION:
        core.request_share = REQUESTS_PER_CONNECTION
    core.byte_share = ARENA_CLIENT_BYTES // (core.connection_count + 1)
    if core.byte_share > BYTES_PER_CONNECTION:
        core.byte_share = BYTES_PER_CONNECTION

cdef void connection_read(Core *core, Connection *connection) noexcept nogil:
    """Take in what was received and ask for more, unless the connection is closing or must wait."""
    if not connection.closing and not connection_parse(core, connection):
        connection_abort(core, connection, EPROTO)
    if connection.closing:
        connection_check_closed(core, connection)
    elif not connection.sated and not connection.stalled:
        stream_receive(core, &connection.stream)

cdef void connection_receive_done(Core *core, Op *op) noexcept nogil:
    cdef Connection *connection = <Connection *>op.owner
    cdef Stream *stream = &connection.stream
    if op.result == 0:
        # The client asks for nothing more; it may still be listening for answers.
        stream.receiving = False
        connection.closing = True
    elif op.result < 0 and op.result != -EAGAIN and op.result != -EINTR:
        stream.receiving = False
        connection_abort(core, connection, <int32_t>-op.result)
    else:
        stream_received(stream, <uint64_t>op.result if op.result > 0 else 0)
    connection_read(core, connection)

cdef bint connection_sated(Core *core, Connection *connection, bint reads, uint64_t bytes) noexcept nogil:
    """Whether a connection has its share of requests or bytes in flight; one request is its due."""
    cdef uint64_t share = core.byte_share
    if reads and share > MEMORY_READ_BYTES and core.map != NULL and core.map.reads_memory:
        share = MEMORY_READ_BYTES
    return connection.in_flight > 0 and (
        connection.in_flight >= core.request_share
        or connection.in_flight_bytes + bytes > share)

cdef bint room_for(Core *core, uint64_t bytes) noexcept nogil:
    """Whether a client's request that needs a buffer of ``bytes`` can be taken in."""
    return (core.free_requests.count > REQUESTS_RESERVED
            and core.client_bytes + bytes <= ARENA_CLIENT_BYTES
            and arena_can(&core.arena, bytes))

cdef void connection_stall(Core *core, Connection *connection, uint64_t bytes) noexcept nogil:
    """Get in line for memory: first come, first served, so that large requests get their turn."""
    connection.stalled = True
    connection.stalled_ns = core.now_ns
    connection.wanted_bytes = bytes
    connection.next_stalled = NULL
    if core.stalled_tail == NULL:
        core.stalled_head = connection
    else:
        core.stalled_tail.next_stalled = connection
    core.stalled_tail = connection

cdef bint connections_resume(Core *core) noexcept nogil:
    """Let the first in line for memory go on, if there is room for it; True when it went."""
    cdef Connection *connection = core.stalled_head
    if connection == NULL or not (connection.closing or room_for(core, connection.wanted_bytes)):
        return False
    core.stalled_head = connection.next_stalled
    if core.stalled_head == NULL:
        core.stalled_tail = NULL
    connection.stalled = False
    core.resuming = True
    connection_read(core, connection)
    core.resuming = False
    return True

cdef bint connection_parse(Core *core, Connection *connection) noexcept nogil:
    """Turn received bytes into requests; False when the client broke the protocol beyond repair."""
    cdef Stream *stream = &connection.stream
    cdef Request *request
    cdef char *header
    cdef uint64_t available
    cdef int32_t error
    while not connection.closing:
        if connection.skip:
            available = stream.rx_end - stream.rx_start
            if available > connection.skip:
                available = connection.skip
            stream.rx_start += <uint32_t>available
            connection.skip -= available
            if connection.skip:
                return True
            request = connection.filling
            connection.filling = NULL
            answer(core, request)
        if connection.filling != NULL:
            if not stream_fill(stream):
                return True
            request = connection.filling
            connection.filling = NULL
            admit(core, request)
        if stream.rx_end - stream.rx_start < NBD_HEADER:
            return True
        header = stream.rx + stream.rx_start
        if sf_get32(header) != NBD_REQUEST_MAGIC:
            return False
        if sf_get16(header + 6) == NBD_CMD_DISC:
            stream.rx_start += NBD_HEADER
            connection.closing = True
            return True
        request = connection_request(core, connection, header)
        if request == NULL:
            return True
        stream.rx_start += NBD_HEADER
        error = request.error
        if request.kind == WRITE and request.length and request.state == IDLE:
            connection.filling = request
            connection.filling_ns = core.now_ns
            if error:
                connection.skip = request.length
            else:
                stream.fill = request.buffer + (request.offset - request.claim_offset)
                stream.fill_left = request.length
        elif error:
            answer(core, request)
        else:
            admit(core, request)
    return True

cdef Request *connection_request(Core *core, Connection *connection, char *header) noexcept nogil:
    """A request from its header, with its buffers, and ``error`` set when it must be refused.

    NULL: not now; the connection is sated, or in line for memory.
    """
    cdef uint16_t flags = sf_get16(header + 4)
    cdef uint16_t command = sf_get16(header + 6)
    cdef uint64_t offset = sf_get64(header + 16)
    cdef uint64_t length = sf_get32(header + 24)
    cdef uint64_t data_bytes = 0
    cdef uint64_t bytes
    cdef uint64_t begin = offset & ~<uint64_t>(CLAIM_BLOCK - 1)
    cdef int32_t error = connection_check(core, connection, flags, command, offset, length)
    cdef bint edges = not error and (command == NBD_CMD_WRITE or command == NBD_CMD_WRITE_ZEROES) and (
        (offset | length) & (CLAIM_BLOCK - 1)) != 0
    cdef Request *request
    if not error and (command == NBD_CMD_READ or command == NBD_CMD_WRITE):
        data_bytes = (offset + length + CLAIM_BLOCK - 1) // CLAIM_BLOCK * CLAIM_BLOCK - begin
    bytes = arena_round(data_bytes + (2 * CLAIM_BLOCK if edges else 0))
    if connection_sated(core, connection, command == NBD_CMD_READ, bytes):
        connection.sated = True
        return NULL
    # Nobody overtakes those in line, except whoever has just come to its head.
    if (core.stalled_head != NULL and not core.resuming) or not room_for(core, bytes):
        connection_stall(core, connection, bytes)
        return NULL
    core.resuming = False
    request = request_take(core, False)
    request.kind = <uint8_t>command if command <= NBD_CMD_WRITE_ZEROES else FLUSH
    request.connection = connection
    request.cookie = sf_get64(header + 8)
    request.disk = connection.disk
    request.offset = offset
    request.length = length
    request.claim_offset = begin
    request.error = error
    request.fua = flags & NBD_FLAG_FUA
    request.keep_allocated = flags & NBD_FLAG_NO_HOLE
    request.admitted_ns = core.now_ns
    if bytes:
        request.buffer = arena_take(&core.arena, bytes)
        if edges:
            request.edges = request.buffer + data_bytes
    if error:
        core.counters.refused += 1
    connection.in_flight += 1
    if request.buffer != NULL:
        connection.in_flight_bytes += bytes
        core.client_bytes += bytes
    return request

cdef int32_t connection_check(Core *core, Connection *connection, uint16_t flags, uint16_t command,
                              uint64_t offset, uint64_t length) noexcept nogil:
    """The errno a request must be refused with, or 0. Source: NBD proto.md, "Request types", "Error values"."""
    cdef uint16_t allowed = NBD_FLAG_FUA  # on every command, once negotiated
    cdef DiskMap *disk
    if command == NBD_CMD_WRITE_ZEROES:
        allowed |= NBD_FLAG_NO_HOLE
    if (command > NBD_CMD_WRITE_ZEROES or command == 5 or flags & ~allowed):
        return EINVAL
    if command == NBD_CMD_FLUSH:
        return 0 if offset == 0 and length == 0 else EINVAL
    if (command == NBD_CMD_READ or command == NBD_CMD_WRITE) and length > PAYLOAD_MAX:
        return EINVAL
    if connection.obeys_block_size and ((offset | length) & (BLOCK_SIZE_MIN - 1)):
        return EINVAL
    if offset > INT64_MAX or length > INT64_MAX - offset:
        return EINVAL if command == NBD_CMD_READ or command == NBD_CMD_TRIM else ENOSPC
    if core.map == NULL:
        return 0  # held until there is one, and looked at then
    disk = map_disk(core.map, connection.disk, &connection.disk_hint)
    if disk == NULL:
        return ESHUTDOWN
    if offset > disk.size or length > disk.size - offset:
        return EINVAL if command == NBD_CMD_READ or command == NBD_CMD_TRIM else ENOSPC
    return 0

# --- Answers -------------------------------------------------------------------------------------

cdef void connection_answer(Core *core, Request *request) noexcept nogil:
    """Queue the answer; it goes out with all others of this batch."""
    cdef Connection *connection = request.connection
    cdef int32_t error = request.error
    cdef Counters *counters = &core.counters
    if error:
        counters.errors += 1
    elif request.kind == READ:
        counters.reads += 1
        counters.read_bytes += request.length
    elif request.kind == WRITE:
        counters.writes += 1
        counters.written_bytes += request.length
    elif request.kind == FLUSH:
        counters.flushes += 1
    elif request.kind == TRIM:
        counters.trims += 1
    else:
        counters.zeroes += 1
    request.state = FINISHED
    core.batch_answers += 1
    sf_put32(request.reply, NBD_SIMPLE_REPLY_MAGIC)
    sf_put32(request.reply + 4, core.nbd_errors[error if error < 256 else EIO])
    sf_put64(request.reply + 8, request.cookie)
    list_push(&connection.answers, request)
    if not connection.dirty:
        connection.dirty = True
        connection.next_dirty = core.dirty_connections
        core.dirty_connections = connection

cdef void connection_send(Core *core, Connection *connection) noexcept nogil:
    """Send every answer that is ready."""
    cdef Stream *stream = &connection.stream
    cdef Request *request
    while connection.answers.count and not stream.sending:
        if connection.shut:
            # Nobody listens: what is left is only to be let go.
            while connection.answers.count:
                list_push(&connection.batch, list_pop(&connection.answers))
            connection_sent(core, connection)
            break
        while connection.answers.count and stream_has_room(stream):
            request = list_pop(&connection.answers)
            list_push(&connection.batch, request)
            stream_put(stream, request.reply, NBD_REPLY)
            if request.kind == READ and request.error == 0 and request.length:
                stream_put(stream, request.buffer + (request.offset - request.claim_offset), request.length)
        if stream_send(core, stream):
            connection_sent(core, connection)
        else:
            connection.sending_ns = core.now_ns
    connection_check_closed(core, connection)

cdef void connection_sent(Core *core, Connection *connection) noexcept nogil:
    """The batch is gone: its requests are over, and their share is free again."""
    cdef Request *request
    connection.sending_ns = 0
    while connection.batch.count:
        request = list_pop(&connection.batch)
        connection.in_flight -= 1
        if request.buffer != NULL:
            connection.in_flight_bytes -= arena_size(&core.arena, request.buffer)
        request_free(core, request)
    if connection.sated:
        connection.sated = False
        connection_read(core, connection)

cdef void connection_send_done(Core *core, Op *op) noexcept nogil:
    cdef Connection *connection = <Connection *>op.owner
    cdef Stream *stream = &connection.stream
    stream.sending = False
    if op.result <= 0 and op.result != -EAGAIN and op.result != -EINTR:
        connection_abort(core, connection, <int32_t>-op.result if op.result else EPIPE)
        connection_sent(core, connection)
    elif op.result > 0 and stream_advance(stream, <uint64_t>op.result):
        connection_sent(core, connection)
    elif stream_send(core, stream):
        connection_sent(core, connection)
    connection_send(core, connection)

# --- The end of a connection ---------------------------------------------------------------------

cdef void connection_end(Core *core, Connection *connection) noexcept nogil:
    """Read no more from this client, but answer what it has asked."""
    if connection.closing:
        return
    connection.closing = True
    connection.sated = False
    core.ring.shut(core.ring, connection.stream.fd, SHUT_RD)
    connection_check_closed(core, connection)

cdef void connection_abort(Core *core, Connection *connection, int32_t error) noexcept nogil:
    """The client is gone or must go. What it asked for is carried out still; nobody is told."""
    connection.closing = True
    connection.sated = False
    if connection.shut:
        return
    connection.shut = True
    connection.error = error
    core.ring.shut(core.ring, connection.stream.fd, SHUT_RDWR)

cdef void connection_check_closed(Core *core, Connection *connection) noexcept nogil:
    """Let a closing connection go once nothing of it is left anywhere."""
    cdef Request *request = connection.filling
    if not connection.closing or connection.closed:
        return
    if request != NULL and not connection.stream.receiving:
        # Its payload will never be complete: it has touched nothing.
        connection.filling = NULL
        connection.in_flight -= 1
        request_free(core, request)
    if (connection.in_flight or connection.stream.receiving or connection.stream.sending
            or connection.stalled or connection.dirty):
        return
    connection.closed = True
    connection.next_closed = core.closed_connections
    core.closed_connections = connection

cdef void connections_bury(Core *core) noexcept nogil:
    """Tell the control thread of those that are gone; it frees them, so nothing may touch them after."""
    cdef Connection *connection
    while core.closed_connections != NULL:
        connection = core.closed_connections
        core.closed_connections = connection.next_closed
        core.connections[connection.number] = NULL
        core.connection_count -= 1
        connections_share(core)
        event_put(core, EVENT_CONNECTION_CLOSED, 0, 0, connection.error, 0, connection.number, 0)

cdef void connections_check(Core *core) noexcept nogil:
    """End the client that has kept others waiting longest, by not taking its answers or not finishing a payload.

    Only while somebody is in line: a client that is merely paused, and hurts nobody, is let be.
    """
    cdef Connection *slowest = NULL
    cdef Connection *connection
    cdef uint64_t since
    cdef uint64_t longest = core.now_ns
    cdef uint32_t i
    if core.stalled_head == NULL or core.now_ns - core.stalled_head.stalled_ns <= CLIENT_PATIENCE_NS:
        return
    for i in range(CONNECTIONS_MAX):
        connection = core.connections[i]
        if connection == NULL or connection.shut:
            continue
        since = connection.sending_ns
        if connection.filling != NULL and (since == 0 or connection.filling_ns < since):
            since = connection.filling_ns
        if since and since < longest and core.now_ns - since > CLIENT_PATIENCE_NS:
            slowest = connection
            longest = since
    if slowest != NULL:
        connection_abort(core, slowest, ETIMEDOUT)
