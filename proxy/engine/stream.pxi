# One end of a stream socket, used by both sides of NBD: the door (door.pxi), where clients come in,
# and remote devices (remote.pxi), where we are the client.
#
# Receiving: small messages collect in ``rx``; a payload goes straight to where it belongs (``fill``)
# and what follows it in the same receive lands in ``rx``, so large payloads are copied once, by the
# kernel. Sending: one call for everything that is ready.

cdef enum:
    RX_BYTES = 256 << 10

cdef void stream_receive(Core *core, Stream *stream) noexcept nogil:
    """Receive what comes next; ``rx_op.done`` is called with it."""
    cdef uint32_t pending = stream.rx_end - stream.rx_start
    cdef uint32_t count = 0
    if stream.receiving:
        return
    if stream.rx_start:
        # Never more than part of a header: payloads are taken out as they come.
        memmove(stream.rx, stream.rx + stream.rx_start, pending)
        stream.rx_start = 0
        stream.rx_end = pending
    if stream.fill_left:
        stream.rx_iov[0].iov_base = stream.fill
        stream.rx_iov[0].iov_len = stream.fill_left
        count = 1
    stream.rx_iov[count].iov_base = stream.rx + stream.rx_end
    stream.rx_iov[count].iov_len = RX_BYTES - stream.rx_end
    stream.rx_message.msg_iov = stream.rx_iov
    stream.rx_message.msg_iovlen = count + 1
    stream.rx_op.kind = OP_RECEIVE
    stream.rx_op.fd = stream.fd
    stream.rx_op.message = &stream.rx_message
    stream.receiving = True
    core.ring.submit(core.ring, &stream.rx_op)

cdef void stream_received(Stream *stream, uint64_t length) noexcept nogil:
    """Account for ``length`` bytes that a receive brought."""
    cdef uint64_t filled
    stream.receiving = False
    if stream.fill_left:
        filled = length if length < stream.fill_left else stream.fill_left
        stream.fill += filled
        stream.fill_left -= filled
        length -= filled
    stream.rx_end += <uint32_t>length

cdef bint stream_fill(Stream *stream) noexcept nogil:
    """Move what has been received to the payload it belongs to; True when that is complete."""
    cdef uint64_t available = stream.rx_end - stream.rx_start
    if stream.fill_left:
        if available > stream.fill_left:
            available = stream.fill_left
        memcpy(stream.fill, stream.rx + stream.rx_start, available)
        stream.fill += available
        stream.fill_left -= available
        stream.rx_start += <uint32_t>available
    return stream.fill_left == 0

cdef inline bint stream_has_room(Stream *stream) noexcept nogil:
    """Whether another message of two parts still fits into the send being prepared."""
    return stream.tx_count + 2 <= SEND_IOVS

cdef inline void stream_put(Stream *stream, void *data, uint64_t length) noexcept nogil:
    stream.tx_iov[stream.tx_count].iov_base = data
    stream.tx_iov[stream.tx_count].iov_len = length
    stream.tx_count += 1

cdef bint stream_advance(Stream *stream, uint64_t sent) noexcept nogil:
    """Account for ``sent`` bytes; True when nothing of the send is left."""
    cdef iovec *part
    while stream.tx_first < stream.tx_count:
        part = &stream.tx_iov[stream.tx_first]
        if sent < part.iov_len:
            part.iov_base = <char *>part.iov_base + sent
            part.iov_len -= sent
            return False
        sent -= part.iov_len
        stream.tx_first += 1
    stream.tx_first = 0
    stream.tx_count = 0
    return True

cdef bint stream_send(Core *core, Stream *stream) noexcept nogil:
    """Send what was put: True when it is gone at once, else ``tx_op.done`` is called later.

    An error of the socket shows there too, never here.
    """
    cdef ssize_t sent = core.ring.send_nowait(
        core.ring, stream.fd, stream.tx_iov + stream.tx_first, stream.tx_count - stream.tx_first)
    if sent > 0 and stream_advance(stream, <uint64_t>sent):
        return True
    stream.tx_message.msg_iov = stream.tx_iov + stream.tx_first
    stream.tx_message.msg_iovlen = stream.tx_count - stream.tx_first
    stream.tx_op.kind = OP_SEND
    stream.tx_op.fd = stream.fd
    stream.tx_op.message = &stream.tx_message
    stream.sending = True
    core.ring.submit(core.ring, &stream.tx_op)
    return False
