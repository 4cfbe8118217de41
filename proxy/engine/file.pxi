# Devices that are descriptors with offsets: regular files, block devices, files in memory.

cdef inline bint sub_is_durable(SubOp *sub) noexcept nogil:
    """Whether a write must be durable when its device answers."""
    return (sub.request.fua and sub.request.map.can_fua
            and not (sf_mutant(BACKUP_WITHOUT_FUA) and mutant_on_backup(sub)))

cdef void file_submit(Core *core, SubOp *sub) noexcept nogil:
    """Submit what is left of a sub-operation."""
    cdef Device *device = sub.device
    cdef Op *op = &sub.op
    op.fd = device.fd
    op.in_memory = device.in_memory
    op.offset = sub.device_offset + sub.progress
    op.length = sub.length - sub.progress
    op.flags = 0
    if sub.kind == SUB_FLUSH:
        op.kind = OP_SYNC
    elif sub.kind == SUB_READ:
        op.kind = OP_READ
        op.data = sub.data + sub.progress
    elif sub.kind == SUB_WRITE:
        op.kind = OP_WRITE
        op.data = sub.data + sub.progress
        if sub_is_durable(sub):
            op.flags = RWF_DSYNC
    else:
        # tmpfs cannot zero a range, many disks cannot discard one; some can do neither.
        op.kind = OP_ALLOCATE
        if sub.kind == SUB_ZERO and device.can_punch and not sub.request.keep_allocated:
            op.flags = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        elif sub.kind == SUB_ZERO and device.can_zero_range:
            op.flags = FALLOC_FL_ZERO_RANGE
        else:
            sub.kind = SUB_ZERO_FILL
            op.kind = OP_WRITE
            op.data = core.zeroes
            if op.length > ZERO_FILL_BYTES:
                op.length = ZERO_FILL_BYTES
            if op.length > device.transfer_max:
                op.length = device.transfer_max
    core.ring.submit(core.ring, op)

cdef void file_done(Core *core, Op *op) noexcept nogil:
    cdef SubOp *sub = <SubOp *>op.owner
    cdef Device *device = sub.device
    cdef int64_t result = op.result
    if result > 0 or (result == 0 and (op.kind == OP_SYNC or op.kind == OP_ALLOCATE)):
        if op.kind == OP_SYNC or op.kind == OP_ALLOCATE:
            sub.progress = sub.length
        else:
            sub.progress += <uint64_t>result
        result = 0
    elif result == 0:
        result = -EIO  # the device ends before the extent does: it has shrunk
    # A fenced leg gets nothing more, not even the rest of a short write.
    if sub.request != NULL and not device.leg.fenced:
        if result == -EINTR or result == -EAGAIN or (
                result == 0 and sub.progress < sub.length and not sf_mutant(SHORT_WRITE_TAKEN)):
            file_submit(core, sub)
            return
        if sub.kind == SUB_ZERO and result == -EOPNOTSUPP:
            if op.flags == FALLOC_FL_ZERO_RANGE:
                device.can_zero_range = False
            else:
                device.can_punch = False
            file_submit(core, sub)
            return
    subop_end(core, sub, <int32_t>-result)
