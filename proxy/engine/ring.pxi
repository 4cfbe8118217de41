# The submission layer: the one way the engine reaches devices and sockets, and learns the time. It has two
# implementations, io_uring (uring.pxi) and the simulator (simulator.pxi), chosen once at the start;
# everything above it cannot tell which one it runs on.

cdef enum:  # OpKind
    OP_READ = 1      # data, length, offset; result: bytes
    OP_WRITE         # the same; flags may hold RWF_DSYNC
    OP_SYNC          # fdatasync
    OP_ALLOCATE      # fallocate: flags is its mode; result: 0
    OP_RECEIVE       # message: where bytes of a stream socket go; result: bytes, 0 at its end
    OP_SEND          # message: what to send, all of it; result: bytes

cdef struct Core
cdef struct Op

ctypedef void (*op_done_t)(Core *core, Op *op) noexcept nogil

# One asynchronous operation. It belongs to whoever embeds it (a sub-operation, a stream) and must stay
# in place from submission until its ``done`` is called. ``result`` is what the system call returns,
# or a negative errno.
cdef struct Op:
    op_done_t done
    void *owner
    uint8_t kind
    bint in_memory           # the file is memory: complete it within submit(), see uring_submit()
    int32_t fd
    int32_t flags
    int64_t result
    uint64_t offset
    uint64_t length
    char *data
    msghdr *message
    Op *next                 # the ring's own list
    uint64_t number          # the simulator's name for it

cdef struct Ring:
    void (*submit)(Ring *ring, Op *op) noexcept nogil
    # Submit what is queued, wait for a completion or the timeout, call ``done`` of all that completed.
    void (*wait)(Ring *ring, Core *core, uint64_t timeout_ns) noexcept nogil
    # Send what the socket takes at once: bytes, or a negative errno (-EAGAIN: none).
    ssize_t (*send_nowait)(Ring *ring, int fd, iovec *iov, uint32_t count) noexcept nogil
    # End a stream, SHUT_RD or SHUT_RDWR; its operations of that direction then complete by themselves.
    void (*shut)(Ring *ring, int fd, int how) noexcept nogil
