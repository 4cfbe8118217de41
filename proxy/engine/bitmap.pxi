# The state of the dirty bitmap; what is done with it is in dirty.pxi.

cdef enum:
    PLANES = 5                 # the intent, and one for each leg: proxy.dirtymap.PLANES
    INTENT = 0
    DIRTY_SECTOR = 512
    DIRTY_HEADER = 16          # of each sector: checksum, its number, the domain's identity
    SECTOR_WORDS = 62          # (DIRTY_SECTOR - DIRTY_HEADER) // 8
    STAGE_SECTORS = 128        # written at once
    ROUND_NS = 4000000000      # between two rounds of clearing
    DIRTY_RETRY_NS = 500000000
    # Regions marked at once where writes seem to come one after the other, so that few of them wait.
    MARK_AHEAD = 16

cdef enum:  # RoundState
    ROUND_IDLE
    ROUND_FLUSHING             # every leg, so that what is to be cleared is durable on each
    ROUND_FOLDING              # legs that are away take over the marks

cdef struct Dirty:
    bint open
    int32_t fd
    uint32_t shift             # of a region's size
    uint64_t regions
    uint64_t words             # of a plane; whole sectors
    uint64_t sectors           # of a plane
    uint64_t identity          # of the domain, in every sector
    uint64_t *planes[PLANES]   # as they should be on the disk
    uint8_t *stale[PLANES]     # by sector: the disk has it otherwise
    uint64_t stale_count[PLANES]
    uint64_t *durable          # marks of the intent that are on the disk for certain
    uint64_t *touched          # written to in this round
    uint64_t *touched_before   # and in the one before
    uint64_t *clearing         # what this round is about
    uint64_t *copied[PLANES]   # by the plane's leg: regions brought over and not yet flushed
    uint8_t round
    uint64_t round_ns          # when the next one is due
    uint64_t round_generation  # the map it is about
    # The one write under way
    bint writing
    uint64_t retry_ns          # not before
    uint64_t began_ns
    bint failed                # the last write did, or is late; it was reported
    uint32_t plane
    uint64_t first_sector
    uint64_t sector_count
    uint64_t cursors[PLANES]   # where to look for stale sectors next, so that all get their turn
    Op op
    char *stage
