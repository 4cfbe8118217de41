# The engine's state: plain C structures in fixed pools, touched by the data thread only (the mailbox
# and the event queue, which two threads share, say so).

cdef enum:
    LEGS_MAX = 4               # of one map: proxy.model.LEGS_MAX
    LEG_SLOTS = 16             # known at once, with fenced ones whose last answers are still awaited
    ALL_LEGS = 0xffff          # a bit for each
    REQUESTS_MAX = 2048
    # What the engine's own work (copying, zeroing) always finds free, so that clients cannot starve it.
    REQUESTS_RESERVED = 64
    SUBOPS_MAX = 8192
    # Of one leg, so that a map's legs find enough beside as many that were fenced and hang for ever.
    SUBOPS_PER_LEG = SUBOPS_MAX // (2 * LEGS_MAX)
    # Of one request in flight: a long one advances in steps, so that it cannot take the whole pool.
    SUBOPS_PER_REQUEST = 64
    CONNECTIONS_MAX = 1024
    # Of one connection at most, and less when there are many (connections_share): past either, its socket
    # is not read until answers have gone out.
    REQUESTS_PER_CONNECTION = 256
    BYTES_PER_CONNECTION = 48 << 20   # room for the largest request and half as much again
    # Of reads from files in memory: nothing there is waited for, so more than one buffer being filled while
    # the other is sent only pushes both out of the processor's cache.
    MEMORY_READ_BYTES = 2 << 20
    PAYLOAD_MAX = 32 << 20     # of one READ or WRITE: what proto.md asks every server to take
    ZERO_FILL_BYTES = 1 << 20  # of one write that stands in for a missing "zero this" of a device
    ALLOCATE_MAX = 64 << 20    # of one "zero this", so that it ends well within a deadline
    EVENTS_MAX = 16384
    CLAIM_BLOCK = 4096         # claims are rounded out to this: proxy.model.BLOCK_SIZE_MAX
    TICK_NS = 50000000         # how often deadlines are looked at
    IDLE_NS = 1000000000       # how long it sleeps with nothing in flight
    GIVE_BACK_NS = 5000000000  # idle this long, the arena's memory goes back to the kernel
    STOP_PATIENCE_NS = 2000000000  # how long a stop waits for devices that do not answer
    FLUSH_PATIENCE = 4         # a flush may take this many deadlines: it answers for many writes
    SEND_IOVS = 512            # of one send: below the kernel's 1,024, and enough for a full batch
    BLOCK_SIZE_MIN = 512       # what a client that asks is told to keep to
    # How long a client that does not take its answers, or does not finish a payload, may keep others waiting.
    CLIENT_PATIENCE_NS = 5000000000
    COPY_CHUNK = 512 << 10     # of one step of a copy: what a client's write may have to wait for
    COPY_WINDOW = 4            # steps of one copy in flight
    # While clients are at work a copy takes one small step at a time, so that one of their requests at most
    # waits behind it, and for no longer than for another request of theirs.
    COPY_CHUNK_YIELDING = 64 << 10
    CLIENTS_GONE_NS = 20000000 # without a request of theirs: the copy has the devices to itself
    # Between two flushes of a copy, after which what it has brought over need not be copied again.
    COPY_CHECKPOINT_BYTES = 256 << 20
    VERIFY_CHUNK = 256 << 10   # of one step of a verify: 64 claim blocks, a bit of a mask for each
    VERIFY_WINDOW = 4          # steps of it in flight
    VERIFY_BURST_NS = 100000000  # what it has missed of its rate, it makes good up to this
    MISMATCHES_MAX = 1000      # ranges listed of one verify; what is beyond is counted
    REPAIRS_MAX = 64           # noted at once; what is beyond is met again by the next read
    SHIPS_MAX = 16384          # in the backlog at once; a power of 2
    SHIPS_PER_LEG = 128        # of them in flight to one leg
    SHIPS_WINDOW = 512         # from the first in flight to it to the last, so that few are looked through

cdef enum:  # RequestKind
    READ = 0
    WRITE = 1
    FLUSH = 3
    TRIM = 4
    ZERO = 6
    COPY = 7                   # ours: from the active leg to one that is syncing
    REPAIR = 8                 # ours: from a backup to the active leg, which could not read it
    VERIFY = 9                 # ours: of the active leg with its backups
    PROBE = 10                 # ours: of one device, for an answer

cdef enum:  # RequestState
    IDLE                       # in the pool, or being received
    HELD                       # admitted while the domain holds
    WAITING                    # for an earlier overlapping request
    MARKING                    # for its regions to be marked in the dirty bitmap
    CATCHING                   # for lagging legs to have what was answered before it
    RUNNING
    PARKED                     # a leg failed it: to be done again, whole, under the next map
    FINISHED                   # on its way out

cdef enum:  # Phase
    READING
    COMPARING                  # VERIFY: reading a backup into the other half of the buffer
    READING_EDGES              # of an unaligned write: the blocks it shares with its neighbours
    WRITING
    WRITING_EDGES              # of an unaligned ZERO
    ZEROING
    FLUSHING

cdef enum:  # SubOpKind
    SUB_READ
    SUB_WRITE
    SUB_ZERO
    SUB_ZERO_FILL              # a SUB_ZERO the device cannot do, carried out as writes
    SUB_FLUSH

cdef enum:  # LegRole
    ROLE_ACTIVE = 0            # reads and writes
    ROLE_BACKUP = 1            # up to date: writes
    ROLE_SYNCING = 2           # writes, and being copied to

cdef enum:  # DeviceKind
    DEVICE_FILE = 0
    DEVICE_NBD = 1

cdef enum:  # EventKind
    EVENT_DEVICE_ERROR = 1     # leg, device, code: errno, a: kind of sub-operation, b: device offset
    EVENT_DEVICE_LOST          # leg, device, code: errno, a: sub-operations whose fate is unknown
    EVENT_DEADLINE_MISSED      # leg, device, a: age in ns
    EVENT_LEG_DRAINED          # leg: every sub-operation ever sent to it has completed
    EVENT_DRAINED              # nothing runs but errands to legs that the hold is not for; a: number of the hold
    EVENT_REPLAYED             # a: requests that were held or parked, b: the longest of them, ns
    EVENT_COPIED               # leg: equal to the active one (code 0) or given up (code: errno); a: bytes
    EVENT_DONE                 # a: token of the engine's own request, code: errno
    EVENT_CONNECTION_CLOSED    # a: connection, code: errno (0: by the client)
    EVENT_MAP_RETIRED          # generation: nothing uses this map any more
    EVENT_LEG_CLOSED           # leg: its descriptors are closed
    EVENT_LEG_FORGOTTEN        # leg: nothing of it is left in the engine
    EVENT_BITMAP_FAILED        # code: errno, writes wait for the dirty bitmap; 0: they do no longer
    EVENT_READ_REPAIRED        # leg, device, code: errno of the read, a: device offset of it, b: bytes written back
    EVENT_VERIFIED             # code: errno (ESTALE: the legs changed, ECANCELED: stopped), a: bytes compared, b: bad
    EVENT_LEG_BEHIND           # leg: it is sent no more of the backlog; a: bytes of it that were dropped

cdef struct Leg
cdef struct Device
cdef struct Map
cdef struct Connection
cdef struct Copier
cdef struct VerifyStep
cdef struct Request
cdef struct SubOp

ctypedef void (*mail_t)(Core *core, void *arguments) noexcept nogil

cdef struct RequestList:
    Request *head
    Request *tail
    uint32_t count

cdef inline void list_push(RequestList *list, Request *request) noexcept nogil:
    request.next = NULL
    request.previous = list.tail
    if list.tail == NULL:
        list.head = request
    else:
        list.tail.next = request
    list.tail = request
    list.count += 1

cdef inline void list_remove(RequestList *list, Request *request) noexcept nogil:
    if request.previous == NULL:
        list.head = request.next
    else:
        request.previous.next = request.next
    if request.next == NULL:
        list.tail = request.previous
    else:
        request.next.previous = request.previous
    list.count -= 1

cdef inline Request *list_pop(RequestList *list) noexcept nogil:
    cdef Request *request = list.head
    if request != NULL:
        list_remove(list, request)
    return request

cdef struct Request:
    Request *previous          # on the one list its state names
    Request *next
    Request *claim_previous
    Request *claim_next
    Connection *connection     # NULL: our own
    Copier *copier             # of a COPY
    VerifyStep *step           # of a VERIFY, and of the flush after it
    Leg *shipping              # of the backlog, and of a PROBE: the one leg it goes to
    uint64_t token             # of one of our own; of the backlog: its number there
    uint64_t seen              # where the backlog ended when it began, as far as it is concerned
    uint16_t awaited           # legs that must have what was answered before that, a bit each
    uint64_t barrier           # and the last flush in it
    uint64_t cookie
    uint64_t offset            # as asked for, in bytes of the disk
    uint64_t length
    uint64_t claim_offset      # rounded out to CLAIM_BLOCK
    uint64_t claim_end
    uint64_t admitted_ns
    Map *map                   # the one map it runs under
    DiskMap *disk_map
    uint64_t span_offset       # rounded out to the map's blocks (TRIM: in to CLAIM_BLOCK): what devices see
    uint64_t span_end
    char *buffer               # of the arena: the bytes from claim_offset on
    char *edges                # within the buffer: two blocks, for a WRITE or ZERO that may need them
    uint64_t cursors[LEGS_MAX]  # next byte to issue on each leg; edges: of both blocks; flushing: next device
    uint32_t disk
    uint32_t block_size        # of the map that it began under
    uint32_t outstanding       # sub-operations in flight
    int32_t error              # errno of what failed
    uint8_t kind
    uint8_t state
    uint8_t phase
    uint8_t legs               # bit i: leg i of the map takes part in this phase
    bint fua
    bint keep_allocated        # ZERO must not punch a hole
    bint trimming              # TRIM may have zeroed on some legs already
    uint32_t source            # the leg of the map that it reads from
    bint rereading             # the active leg could not read it all: once nothing is in flight, a backup is asked
    bint failed                # a leg failed it
    bint rejected              # and no leg can do better: it is not to be parked but answered
    bint claimed
    bint exclusive             # its claim is a writer's
    bint blocks_others
    Request *waits_for         # the latest of the claims in its way; NULL: to be looked at again
    bint starved               # waits for a sub-operation's slot
    bint replayed              # was held or parked
    bint cleaning              # the FLUSH of a round of the dirty bitmap
    bint scribbled             # an answer nobody waits for may yet be written into its buffers
    char reply[16]

cdef struct SubOp:
    Op op
    Core *core
    Request *request           # NULL: its leg was fenced, nobody waits any more
    Device *device
    SubOp *older               # in flight on the device, by time of issue
    SubOp *newer
    SubOp *next                # free list, or the device's queue of commands to send
    char *data
    char *buffer               # of the arena, referenced
    uint64_t device_offset
    uint64_t length
    uint64_t progress
    uint64_t started_ns
    uint32_t serial            # of this use of the slot
    uint8_t kind
    bint in_flight             # the slot is in use
    bint queued                # NBD: waits for the next send
    bint sending               # NBD: its bytes may still be being sent
    bint answered              # NBD: while they were; see remote_sent()
    char header[28]

cdef struct Stream:
    int32_t fd
    char *rx                   # RX_BYTES, the streams's own
    uint32_t rx_start
    uint32_t rx_end
    bint receiving
    bint sending
    char *fill                 # where the payload that comes next belongs
    uint64_t fill_left
    Op rx_op
    msghdr rx_message
    iovec rx_iov[2]
    Op tx_op
    msghdr tx_message
    iovec tx_iov[SEND_IOVS]
    uint32_t tx_first
    uint32_t tx_count

cdef struct Device:
    Core *core
    Leg *leg
    uint32_t index
    int32_t fd
    uint8_t kind
    bint in_memory
    bint can_fua
    bint can_flush
    bint can_zero              # NBD: it takes WRITE_ZEROES
    bint can_punch             # until the file system says it cannot
    bint can_zero_range
    bint lost                  # its stream is broken
    bint reported              # an error of it was reported and is not settled yet
    uint32_t block_size
    uint64_t transfer_max
    SubOp *oldest
    SubOp *newest
    uint32_t in_flight
    int32_t error              # of the last failure, errno
    uint64_t heard_ns          # when it last answered, or was added, or was probed
    # NBD
    Stream *stream
    SubOp *queue_head          # commands to send
    SubOp *queue_tail
    SubOp *batch               # being sent
    SubOp *filling             # the read whose payload is being received
    bint dirty                 # on the core's list of devices with commands to send
    Device *next_dirty
    # Statistics
    uint64_t reads
    uint64_t writes
    uint64_t read_bytes
    uint64_t written_bytes
    uint64_t flushes
    uint64_t errors
    uint64_t late              # answers after the fence
    uint64_t unproven          # sub-operations whose fate is unknown: the stream broke
    uint64_t read_repairs      # ranges it could not read and was given again
    uint64_t latency_max_ns

cdef struct Leg:
    Core *core
    int64_t id
    bint in_use
    bint fenced
    bint drain_reported
    bint closing
    bint closed
    bint forgotten
    uint32_t device_count
    uint32_t in_flight
    uint32_t maps              # that name it and are not retired
    Device *devices
    CopyRange *copy_ranges
    # Of the backlog
    bint lagging               # it is sent clients' writes after they are answered
    bint behind                # and lacks some that it will not be sent any more
    uint32_t shipping          # in flight to it
    uint32_t probing           # probes of its devices that are not answered yet
    uint64_t ships_sent        # number of the next to be sent
    uint64_t ships_landed      # number of the first that it has not
    uint64_t ship_bytes        # of disks, that it has yet to get

cdef struct Ship:
    # One write or flush of a client that was answered before all legs had it.
    uint16_t pending           # bit i: the leg in slot i has yet to get it
    uint8_t kind
    bint fua
    bint keep_allocated
    uint32_t disk
    uint32_t block_size
    uint64_t offset
    uint64_t length
    uint64_t claim_offset
    uint64_t claim_end
    uint64_t span_offset
    uint64_t span_end
    char *buffer               # of the arena, referenced; NULL: there are no bytes
    char *edges
    uint64_t after             # no leg gets it before all below this number
    uint64_t answered_ns

cdef struct LegTable:
    # The extent map of one disk on one leg; proxy.extentmap.ExtentMap's three arrays.
    uint64_t count
    const uint64_t *offsets    # count + 1, the last one is the size
    const uint32_t *devices
    const uint64_t *device_offsets

cdef struct DiskMap:
    uint32_t number
    uint64_t size
    uint64_t allotted          # what every table covers; at least the size, in whole blocks
    LegTable tables[LEGS_MAX]
    LegTable domain            # where it lies in the domain, for the dirty bitmap; device 0 is the domain

cdef struct Map:
    uint64_t generation
    uint32_t references        # requests that run under it, and one for being installed
    uint32_t leg_count
    uint32_t active            # index into legs
    uint32_t disk_count
    uint32_t block_size        # the largest of all devices
    bint can_fua
    bint can_zero
    bint reads_memory          # the active leg's devices are files in memory
    Leg *legs[LEGS_MAX]
    uint8_t roles[LEGS_MAX]
    uint8_t planes[LEGS_MAX]   # of the dirty bitmap; 0: none
    uint8_t away               # bit i: plane i is of a leg that takes no part
    bint tracked               # legs may come to differ: writes are marked in the dirty bitmap
    bint asynchronous          # clients' writes are answered when the active leg has them
    DiskMap *disks             # by number

cdef struct Connection:
    Core *core
    uint32_t number
    bint in_use
    bint closing               # no further request is read
    bint closed                # nothing of it is left; the control thread is being told
    bint shut
    bint obeys_block_size      # it was told the smallest block and asked for it
    bint sated                 # not read until some of its own requests are answered
    bint stalled               # not read until it is its turn for memory
    bint dirty                 # on the list of connections with answers to send
    uint32_t disk
    uint32_t disk_hint
    int32_t error
    Stream stream
    uint32_t in_flight
    uint64_t in_flight_bytes
    Request *filling           # a write whose payload is being received
    uint64_t skip              # bytes of a refused write's payload still to come
    uint64_t filling_ns        # since when
    uint64_t sending_ns        # since when the batch waits for the client to take it; 0: it does not
    uint64_t wanted_bytes      # what it is in line for
    uint64_t stalled_ns        # since when
    RequestList answers
    RequestList batch          # answers being sent
    Connection *next_dirty
    Connection *next_stalled
    Connection *next_closed

cdef struct CopyRange:
    uint32_t disk
    uint64_t offset
    uint64_t length

cdef struct Copier:
    bint in_use
    Leg *leg
    CopyRange *ranges          # the leg's, see leg_free()
    uint32_t range_count
    uint32_t range_index
    uint64_t range_offset
    uint32_t in_flight
    uint64_t copied
    uint64_t total
    uint64_t unflushed         # of what is copied
    uint64_t run_begin         # bytes of the domain that the last steps cover without a gap
    uint64_t run_end
    uint64_t next_ns           # no step before
    bint flushing
    int32_t error              # why it gave up; 0 while it goes on

cdef struct Repair:
    int64_t leg                # id of the active leg that could not read it
    uint32_t device
    int32_t error              # errno it answered with
    uint64_t device_offset
    uint32_t disk
    uint64_t offset            # in whole claim blocks
    uint64_t end
    uint64_t cursor            # written back up to here

cdef struct VerifyStep:
    bint busy
    bint exclusive             # once more, to repair
    Request *due               # to be done once more as soon as what it may write to is marked dirty
    bint unreadable            # the active leg could not read it
    bint written               # the leg was written to, and is compared again
    uint32_t leg               # which of the verifier's is compared
    uint64_t differing[LEGS_MAX]  # on each of them: bit i is block i of the step
    uint64_t repaired[LEGS_MAX]

cdef struct Mismatch:
    int64_t leg                # its id
    uint32_t disk
    uint64_t offset
    uint64_t length

cdef struct Verifier:
    bint begun                 # there is something to report
    bint in_use                # and it goes on
    bint repair
    int64_t active             # ids of the legs it is about
    int64_t legs[LEGS_MAX]
    uint32_t leg_count
    CopyRange *ranges          # freed by the control thread, see mail_verify()
    uint32_t range_count
    uint32_t range_index
    uint64_t range_offset
    VerifyStep steps[VERIFY_WINDOW]
    uint32_t in_flight
    uint64_t rate              # bytes of the active leg a second; 0: no limit but yielding to clients
    uint64_t due_ns            # when the next step may begin
    uint64_t total             # bytes
    uint64_t compared
    uint64_t mismatched        # on all legs together
    uint64_t repaired
    uint64_t unreadable
    uint64_t unlisted
    Mismatch found[MISMATCHES_MAX]
    uint32_t found_count
    int32_t error              # why it gave up; 0 while it goes on

cdef struct EventRecord:
    uint32_t kind
    int32_t code
    int64_t leg
    uint32_t device
    uint64_t generation
    uint64_t a
    uint64_t b

cdef struct Counters:
    uint64_t reads
    uint64_t writes
    uint64_t flushes
    uint64_t trims
    uint64_t zeroes
    uint64_t read_bytes
    uint64_t written_bytes
    uint64_t errors            # answered with one
    uint64_t refused           # requests that broke the protocol's rules
    uint64_t waited            # for an overlapping request
    uint64_t parked
    uint64_t replayed
    uint64_t late              # answers of fenced legs, dropped
    uint64_t read_repairs

cdef struct Core:
    Ring *ring
    Arena arena
    uint64_t client_bytes      # of it: buffers of clients' requests
    char *zeroes               # ZERO_FILL_BYTES, read only
    uint64_t now_ns
    uint64_t tick_ns
    uint64_t deadline_ns
    uint64_t probe_ns          # silent for this long, a device is probed; 0: never
    uint64_t round_every_ns    # between two rounds of the dirty bitmap
    uint8_t nbd_errors[256]    # proxy.errors.NBD_ERROR_BY_ERRNO
    bint medium_errors[256]    # those of proxy.failover.MEDIUM_ERRORS
    Map *map
    bint held
    uint64_t holds             # how often it was told to hold: DRAINED says of which
    bint failing               # held, and clients are not kept waiting: they are told errors
    uint16_t drain_legs        # legs that the hold is for: DRAINED waits for their backlog and probes; a bit each
    bint drain_reported
    bint stopping
    uint32_t running
    uint64_t busy_ns           # when a request last came in
    uint64_t client_ns         # and when a client's did
    uint64_t copy_rate         # bytes a second that a copy may take; 0: all it can
    uint64_t copy_floor        # and while clients are at work
    uint64_t stop_ns           # when it was told to stop
    # Requests
    RequestList free_requests
    RequestList held_requests
    RequestList waiting
    RequestList parked
    RequestList cramped        # to be done again as soon as there is memory for it
    RequestList withheld       # done, but not to be answered while the domain holds
    RequestList starved
    RequestList marking        # for the dirty bitmap
    bint marks_moved           # some of those may be able to go on
    Dirty dirty
    # The backlog: ships by number, from the first that some leg lacks
    Ship *ships
    uint64_t ships_first
    uint64_t ships_end
    uint64_t ship_barrier      # the end of its last flush, or write with FUA
    uint64_t ship_flush        # the end of its last flush
    uint64_t ship_bytes        # of the arena that it keeps
    uint64_t ship_limit        # and may keep
    RequestList catching       # for a leg to have all up to some number
    bint ships_moved           # some of those may be able to go on
    bint wake                  # a claim others wait for is gone
    Request *claims_head       # by arrival
    Request *claims_tail
    uint32_t wide_claims
    uint16_t readers[4096]     # claims by hash of the 64 KiB they lie in; see claims.pxi
    uint16_t writers[4096]
    SubOp *free_subops
    bint relief                # a starved request may find a slot now
    # What clients felt of the last hold
    bint replay_report         # due once the last of them is answered
    uint32_t replays_pending
    uint64_t replays
    uint64_t replay_longest_ns
    # Streams with something to send, clients in line for memory, and those just gone
    Connection *dirty_connections
    Device *dirty_devices
    Connection *stalled_head
    Connection *stalled_tail
    bint resuming              # the one that was first in line is at it
    Connection *closed_connections
    Leg legs[LEG_SLOTS]
    Copier copiers[LEG_SLOTS]     # one for each leg, so that there always is one
    Verifier verifier
    Repair repairs[REPAIRS_MAX]
    uint32_t repair_first
    uint32_t repair_count
    bint repairing             # a step of the first one is under way
    Connection *connections[CONNECTIONS_MAX]
    uint32_t connection_count
    uint32_t request_share     # what one connection may have in flight as things are
    uint64_t byte_share
    uint32_t batch_answers     # to clients, since the last wait
    Counters counters
    Request *requests
    SubOp *subops
    # Shared with the control thread, under the mutex
    pthread_mutex_t mutex
    pthread_cond_t mail_taken
    void *mail                 # mail_t; set by the control thread, cleared by the data thread
    void *mail_arguments
    int wake_fd
    int event_fd
    EventRecord events[EVENTS_MAX]
    uint32_t event_first
    uint32_t event_count
    bint running_loop          # the data thread is in run_loop()
    int32_t start_error        # errno, when there is no ring to be had
    bint stepped               # there is no data thread: the simulator steps
