# Translation: from a byte of a disk to a byte of a device, in the installed map.

cdef uint64_t extent_find(LegTable *table, uint64_t offset) noexcept nogil:
    """Index of the extent that holds ``offset``, which is below the table's size."""
    cdef const uint64_t *offsets = table.offsets
    cdef uint64_t low = 0
    cdef uint64_t high = table.count
    cdef uint64_t middle
    if high > 8:
        # Extents of a striped map are equally long, so proportion finds the very one with a single
        # miss of the cache instead of twenty; elsewhere it is a harmless first step of the search.
        middle = <uint64_t>(<double>offset / <double>offsets[high] * <double>high)
        if middle >= high:
            middle = high - 1
        if offset < offsets[middle]:
            high = middle
        elif offset < offsets[middle + 1]:
            return middle
        else:
            low = middle + 1
    while high - low > 1:
        middle = (low + high) >> 1
        if offset < offsets[middle]:
            high = middle
        else:
            low = middle
    return low

cdef inline DiskMap *map_disk(Map *map, uint32_t number, uint32_t *hint) noexcept nogil:
    """The disk with this number, or NULL; ``hint`` is where it stood last time."""
    cdef uint32_t low = 0
    cdef uint32_t high = map.disk_count
    cdef uint32_t middle
    if hint[0] < high and map.disks[hint[0]].number == number:
        return &map.disks[hint[0]]
    while low < high:
        middle = (low + high) >> 1
        if map.disks[middle].number < number:
            low = middle + 1
        else:
            high = middle
    if low < map.disk_count and map.disks[low].number == number:
        hint[0] = low
        return &map.disks[low]
    return NULL
