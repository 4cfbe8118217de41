# The arena: where the data of requests lives. One mapping, divided by a binary buddy system, so that
# the data thread never calls malloc and what clients can make us hold is bounded by its size.
#
# A buffer is named by its address; its order and its count of references are kept by page number.
# A buffer is shared by a request and the sub-operations that read from it or write to it: the last of
# them returns it. That is what keeps memory safe when a device answers long after its leg was fenced.

cdef enum:
    PAGE = 4096
    # Orders 0 to 14: 4 KiB to 64 MiB. The largest request is 32 MiB, and rounding an unaligned one out
    # to whole blocks makes it a little longer.
    ARENA_ORDERS = 15
    # Eight of the largest at once. Untouched pages cost nothing.
    ARENA_PAGES = 8 << 14
    # What clients' requests may take. The rest is for doing requests again whose buffers a hung device may
    # still write into, and for such buffers to lie scattered without leaving no room for a large one.
    ARENA_CLIENT_BYTES = ARENA_PAGES * PAGE // 4
    NO_PAGE = -1

cdef struct Arena:
    char *base
    uint64_t used_bytes
    bint touched                      # since the pages were last given back to the kernel
    int32_t heads[ARENA_ORDERS]
    int32_t next_free[ARENA_PAGES]
    int32_t previous_free[ARENA_PAGES]
    int8_t free_order[ARENA_PAGES]    # order of the free block that begins at this page, or -1
    int8_t used_order[ARENA_PAGES]    # order of the used block that begins at this page
    uint16_t references[ARENA_PAGES]

cdef void arena_push(Arena *arena, int32_t page, int order) noexcept nogil:
    cdef int32_t head = arena.heads[order]
    arena.next_free[page] = head
    arena.previous_free[page] = NO_PAGE
    if head != NO_PAGE:
        arena.previous_free[head] = page
    arena.heads[order] = page
    arena.free_order[page] = <int8_t>order

cdef void arena_unlink(Arena *arena, int32_t page, int order) noexcept nogil:
    cdef int32_t after = arena.next_free[page]
    cdef int32_t before = arena.previous_free[page]
    if before == NO_PAGE:
        arena.heads[order] = after
    else:
        arena.next_free[before] = after
    if after != NO_PAGE:
        arena.previous_free[after] = before
    arena.free_order[page] = -1

cdef int arena_open(Arena *arena) noexcept nogil:
    """Map the arena; 0, or -1 when the kernel refuses."""
    cdef int order
    cdef int32_t page
    arena.base = <char *>mmap(NULL, <size_t>ARENA_PAGES * PAGE, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if arena.base == <char *>MAP_FAILED:
        arena.base = NULL
        return -1
    for order in range(ARENA_ORDERS):
        arena.heads[order] = NO_PAGE
    memset(arena.free_order, -1, sizeof(arena.free_order))
    for page in range(ARENA_PAGES >> (ARENA_ORDERS - 1)):
        arena_push(arena, page << (ARENA_ORDERS - 1), ARENA_ORDERS - 1)
    return 0

cdef void arena_close(Arena *arena) noexcept nogil:
    if arena.base != NULL:
        munmap(arena.base, <size_t>ARENA_PAGES * PAGE)

cdef bint arena_can(Arena *arena, uint64_t length) noexcept nogil:
    """Whether arena_take() would succeed."""
    cdef int order
    for order in range(ARENA_ORDERS):
        if (<uint64_t>PAGE << order) >= length and arena.heads[order] != NO_PAGE:
            return True
    return False

cdef char *arena_take(Arena *arena, uint64_t length) noexcept nogil:
    """A page-aligned buffer of at least ``length`` bytes with one reference, or NULL: none is free."""
    cdef int wanted = 0
    cdef int order
    cdef int32_t page
    while (<uint64_t>PAGE << wanted) < length:
        wanted += 1
    order = wanted
    while order < ARENA_ORDERS and arena.heads[order] == NO_PAGE:
        order += 1
    if order >= ARENA_ORDERS:
        return NULL
    page = arena.heads[order]
    arena_unlink(arena, page, order)
    while order > wanted:
        order -= 1
        arena_push(arena, page + (1 << order), order)
    arena.used_order[page] = <int8_t>wanted
    arena.references[page] = 1
    arena.used_bytes += <uint64_t>PAGE << wanted
    arena.touched = True
    return arena.base + <uint64_t>page * PAGE

cdef inline uint64_t arena_round(uint64_t length) noexcept nogil:
    """What a buffer of ``length`` bytes takes; nothing for nothing."""
    cdef uint64_t size = PAGE
    if length == 0:
        return 0
    while size < length:
        size <<= 1
    return size

cdef inline int32_t arena_page(Arena *arena, char *buffer) noexcept nogil:
    return <int32_t>((buffer - arena.base) // PAGE)

cdef inline void arena_share(Arena *arena, char *buffer) noexcept nogil:
    arena.references[arena_page(arena, buffer)] += 1

cdef inline uint64_t arena_size(Arena *arena, char *buffer) noexcept nogil:
    return <uint64_t>PAGE << arena.used_order[arena_page(arena, buffer)]

cdef inline bint arena_shared(Arena *arena, char *buffer) noexcept nogil:
    return arena.references[arena_page(arena, buffer)] > 1

cdef bint arena_release(Arena *arena, char *buffer) noexcept nogil:
    """Drop one reference; True when it was the last and the space is free again."""
    cdef int32_t page = arena_page(arena, buffer)
    cdef int32_t buddy
    cdef int order
    arena.references[page] -= 1
    if arena.references[page] != 0:
        return False
    order = arena.used_order[page]
    arena.used_bytes -= <uint64_t>PAGE << order
    while order < ARENA_ORDERS - 1:
        buddy = page ^ (1 << order)
        if arena.free_order[buddy] != order:
            break
        arena_unlink(arena, buddy, order)
        page &= ~(1 << order)
        order += 1
    arena_push(arena, page, order)
    return True

cdef void arena_give_back(Arena *arena) noexcept nogil:
    """Return the pages of an arena nobody uses to the kernel, so that a burst leaves no weight behind."""
    if arena.touched and arena.used_bytes == 0:
        madvise(arena.base, <size_t>ARENA_PAGES * PAGE, MADV_DONTNEED)
        arena.touched = False
