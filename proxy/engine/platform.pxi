# What the engine needs from libc, the kernel and liburing: declarations only.

cdef extern from "<errno.h>" nogil:
    int errno
    int EAGAIN, EBUSY, ECANCELED, ECONNABORTED, ECONNRESET, EINTR, EINVAL, EIO, ENOBUFS, ENOMEM, ENOSPC
    int EOPNOTSUPP
    int EPIPE, EPROTO, ESHUTDOWN, ESTALE, ETIMEDOUT

from libc.stdint cimport INT64_MAX, int8_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport abort, calloc, free, malloc
from libc.string cimport memcmp, memcpy, memmove, memset

cdef extern from * nogil:
    """
    #include <stdint.h>
    #include <string.h>
    #include <time.h>
    /* NBD is big-endian and its fields are not aligned in a byte stream. */
    static inline uint16_t sf_get16(const char *p) { uint16_t v; memcpy(&v, p, 2); return __builtin_bswap16(v); }
    static inline uint32_t sf_get32(const char *p) { uint32_t v; memcpy(&v, p, 4); return __builtin_bswap32(v); }
    static inline uint64_t sf_get64(const char *p) { uint64_t v; memcpy(&v, p, 8); return __builtin_bswap64(v); }
    static inline void sf_put16(char *p, uint16_t v) { v = __builtin_bswap16(v); memcpy(p, &v, 2); }
    static inline void sf_put32(char *p, uint32_t v) { v = __builtin_bswap32(v); memcpy(p, &v, 4); }
    static inline void sf_put64(char *p, uint64_t v) { v = __builtin_bswap64(v); memcpy(p, &v, 8); }
    static inline uint64_t sf_monotonic_ns(void) {
        struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t);
        return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
    }
    static inline void *sf_load(void **p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static inline void sf_store(void **p, void *v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
    /* A block is all zero when its first byte is and it equals itself shifted by one. */
    static inline int sf_all_zero(const char *p, uint64_t n) { return p[0] == 0 && memcmp(p, p + 1, n - 1) == 0; }
    static inline uint32_t sf_lowest_bit(uint64_t v) { return (uint32_t)__builtin_ctzll(v); }   /* of v != 0 */
    static inline uint32_t sf_highest_bit(uint64_t v) { return 63u - (uint32_t)__builtin_clzll(v); }
    static inline uint32_t sf_bits(uint64_t v) { return (uint32_t)__builtin_popcountll(v); }
    """
    uint16_t sf_get16(const char *p)
    uint32_t sf_get32(const char *p)
    uint64_t sf_get64(const char *p)
    void sf_put16(char *p, uint16_t v)
    void sf_put32(char *p, uint32_t v)
    void sf_put64(char *p, uint64_t v)
    uint64_t sf_monotonic_ns()
    void *sf_load(void **p)
    void sf_store(void **p, void *v)
    bint sf_all_zero(const char *p, uint64_t n)
    uint32_t sf_lowest_bit(uint64_t v)
    uint32_t sf_highest_bit(uint64_t v)
    uint32_t sf_bits(uint64_t v)
    bint likely "__builtin_expect"(bint condition, long expected)

cdef extern from "<sys/types.h>" nogil:
    ctypedef long ssize_t

cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t preadv2(int fd, const iovec *iov, int count, int64_t offset, int flags)
    ssize_t pwritev2(int fd, const iovec *iov, int count, int64_t offset, int flags)

cdef extern from "<fcntl.h>" nogil:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <linux/falloc.h>
    #include <linux/fs.h>
    """
    int fallocate(int fd, int mode, int64_t offset, int64_t length)
    int FALLOC_FL_PUNCH_HOLE
    int FALLOC_FL_KEEP_SIZE
    int FALLOC_FL_ZERO_RANGE
    int RWF_DSYNC

cdef extern from "<sys/socket.h>" nogil:
    cdef struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    ssize_t sendmsg(int fd, const msghdr *message, int flags)
    int shutdown(int fd, int how)
    int MSG_NOSIGNAL
    int MSG_DONTWAIT
    int MSG_WAITALL
    int SHUT_RD
    int SHUT_RDWR

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t length, int protection, int flags, int fd, int64_t offset)
    int munmap(void *address, size_t length)
    int madvise(void *address, size_t length, int advice)
    int PROT_READ
    int PROT_WRITE
    int MAP_PRIVATE
    int MAP_ANONYMOUS
    int MAP_NORESERVE
    int MADV_DONTNEED
    void *MAP_FAILED

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int initial, int flags)
    int EFD_CLOEXEC
    int EFD_NONBLOCK

cdef extern from "<unistd.h>" nogil:
    int close(int fd)
    ssize_t write(int fd, const void *data, size_t length)
    int fdatasync(int fd)

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attributes)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)
    int pthread_cond_init(pthread_cond_t *condition, void *attributes)
    int pthread_cond_destroy(pthread_cond_t *condition)
    int pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex)
    int pthread_cond_broadcast(pthread_cond_t *condition)

cdef extern from "<liburing.h>" nogil:
    cdef struct io_uring:
        pass
    cdef struct io_uring_sqe:
        uint64_t user_data
        uint32_t rw_flags
    cdef struct io_uring_cqe:
        uint64_t user_data
        int32_t res
    cdef struct io_uring_params:
        uint32_t flags
        uint32_t cq_entries
    cdef struct __kernel_timespec:
        int64_t tv_sec
        long long tv_nsec
    unsigned int IORING_SETUP_CQSIZE
    unsigned int IORING_SETUP_CLAMP
    unsigned int IORING_SETUP_SINGLE_ISSUER
    unsigned int IORING_SETUP_DEFER_TASKRUN
    unsigned int IORING_SETUP_TASKRUN_FLAG
    unsigned int IORING_FSYNC_DATASYNC
    int io_uring_queue_init_params(unsigned int entries, io_uring *ring, io_uring_params *params)
    void io_uring_queue_exit(io_uring *ring)
    io_uring_sqe *io_uring_get_sqe(io_uring *ring)
    int io_uring_peek_cqe(io_uring *ring, io_uring_cqe **cqe)
    int io_uring_submit(io_uring *ring)
    int io_uring_submit_and_wait_timeout(
        io_uring *ring, io_uring_cqe **cqe, unsigned int count, __kernel_timespec *timeout, void *signals)
    unsigned int io_uring_sq_ready(const io_uring *ring)
    unsigned int io_uring_peek_batch_cqe(io_uring *ring, io_uring_cqe **cqes, unsigned int count)
    void io_uring_cq_advance(io_uring *ring, unsigned int count)
    void io_uring_prep_read(io_uring_sqe *sqe, int fd, void *data, unsigned int length, uint64_t offset)
    void io_uring_prep_write(io_uring_sqe *sqe, int fd, const void *data, unsigned int length, uint64_t offset)
    void io_uring_prep_fsync(io_uring_sqe *sqe, int fd, unsigned int flags)
    void io_uring_prep_fallocate(io_uring_sqe *sqe, int fd, int mode, int64_t offset, int64_t length)
    void io_uring_prep_recvmsg(io_uring_sqe *sqe, int fd, msghdr *message, unsigned int flags)
    void io_uring_prep_sendmsg(io_uring_sqe *sqe, int fd, const msghdr *message, unsigned int flags)
