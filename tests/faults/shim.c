/* A library to preload. It intercepts libc's calls that read, write and sync files, and makes chosen ones fail like a
 * disk. faults.py builds it, and controls it through `faults_arm` or the variable FAULTS.
 *
 * There is one rule at a time. It matches the calls of one class on files whose path contains a text. The first `skip`
 * of them pass, the next `count` are hit, and the rest pass. It cannot hit reads by mmap, which make no call.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096 };

typedef struct {
    char kind[16];   /* "eio", "eof", "eintr", "short", "odd", "late", "zero", "flip", "misdirect", "enospc", "" */
    char calls[8];   /* "read", "write", "sync" */
    char path[512];
    long skip, count, parameter;
} rule;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static rule armed;
static long seen, fired;
static uint64_t random_state = 1;

/* Arms a rule and resets the counters. The kind "" only counts. parameter: milliseconds for "late", seed for "flip". */
void faults_arm(const char *kind, const char *calls, const char *path, long skip, long count, long parameter)
{
    pthread_mutex_lock(&lock);
    memset(&armed, 0, sizeof armed);
    strncpy(armed.kind, kind, sizeof armed.kind - 1);
    strncpy(armed.calls, calls, sizeof armed.calls - 1);
    strncpy(armed.path, path, sizeof armed.path - 1);
    armed.skip = skip;
    armed.count = count;
    armed.parameter = parameter;
    seen = fired = 0;
    random_state = (uint64_t)parameter * 2862933555777941757u + 3037000493u;
    pthread_mutex_unlock(&lock);
}

void faults_disarm(void)
{
    pthread_mutex_lock(&lock);
    armed.calls[0] = 0;
    pthread_mutex_unlock(&lock);
}

/* The number of calls that the rule has matched since it was armed, hit or not. */
long faults_seen(void)
{
    return seen;
}

/* The number of calls that were hit. */
long faults_fired(void)
{
    return fired;
}

/* FAULTS=kind:calls:skip:count:parameter:path arms a rule from the start of the program. */
__attribute__((constructor)) static void arm_from_environment(void)
{
    const char *text = getenv("FAULTS");
    char kind[16], calls[8];
    long skip, count, parameter;
    int end = 0;
    if (text != NULL && sscanf(text, "%15[^:]:%7[^:]:%ld:%ld:%ld:%n", kind, calls, &skip, &count, &parameter, &end) == 5)
        faults_arm(kind, calls, text + end, skip, count, parameter);
}

/* Returns whether a call is hit, and copies the rule if it is. Keeps errno. */
static int hits(int fd, const char *calls, rule *copy)
{
    int before = errno, hit = 0;
    if (strcmp(armed.calls, calls) != 0) /* a race here only delays a rule */
        return 0;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = before;
    if (length < 0)
        return 0;
    path[length] = 0;
    pthread_mutex_lock(&lock);
    if (strcmp(armed.calls, calls) == 0 && strstr(path, armed.path) != NULL) {
        long number = seen++;
        hit = armed.kind[0] != 0 && number >= armed.skip && number < armed.skip + armed.count;
        fired += hit;
        *copy = armed;
    }
    pthread_mutex_unlock(&lock);
    const char *log = getenv("FAULTS_LOG");
    if (hit && log != NULL) {
        FILE *file = fopen(log, "a");
        if (file != NULL) {
            fprintf(file, "%s %s %s\n", copy->kind, copy->calls, path);
            fclose(file);
        }
    }
    errno = before;
    return hit;
}

static void wait_ms(long ms)
{
    struct timespec left = {ms / 1000, ms % 1000 * 1000000};
    while (nanosleep(&left, &left) != 0 && errno == EINTR)
        ;
}

/* Changes the bytes that were read into iovecs, according to the rule. */
static void damage(const rule *r, const struct iovec *iovecs, int count, ssize_t bytes)
{
    if (bytes <= 0)
        return;
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    ssize_t at = (ssize_t)((random_state >> 33) % (uint64_t)bytes);
    for (int i = 0; i < count && bytes > 0; i++) {
        ssize_t here = (ssize_t)iovecs[i].iov_len < bytes ? (ssize_t)iovecs[i].iov_len : bytes;
        if (strcmp(r->kind, "zero") == 0)
            memset(iovecs[i].iov_base, 0, (size_t)here);
        else if (at >= 0 && at < here)
            ((unsigned char *)iovecs[i].iov_base)[at] ^= (unsigned char)(1 << (random_state >> 25 & 7));
        at -= here;
        bytes -= here;
    }
}

/* Returns the action for a read of `wanted` bytes: 0: read as usual; 1: return *result at once; 2: read only *length;
 * 3: read elsewhere; 4: change the bytes that were read. */
static int before_read(const rule *r, size_t wanted, ssize_t *result, size_t *length)
{
    if (strcmp(r->kind, "eio") == 0 || strcmp(r->kind, "eintr") == 0) {
        errno = strcmp(r->kind, "eio") == 0 ? EIO : EINTR;
        *result = -1;
        return 1;
    }
    if (strcmp(r->kind, "eof") == 0) {
        *result = 0;
        return 1;
    }
    if (strcmp(r->kind, "late") == 0) {
        wait_ms(r->parameter);
        return 0;
    }
    if (strcmp(r->kind, "short") == 0 && wanted > PAGE) {
        *length = wanted / 2 / PAGE * PAGE;
        *length = *length == 0 ? PAGE : *length;
        return 2;
    }
    if (strcmp(r->kind, "odd") == 0 && wanted > 2) {
        *length = (wanted / 2) | 1;
        return 2;
    }
    if (strcmp(r->kind, "misdirect") == 0)
        return 3;
    return strcmp(r->kind, "zero") == 0 || strcmp(r->kind, "flip") == 0 ? 4 : 0;
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static ssize_t faulty_preadv(ssize_t (*real)(int, const struct iovec *, int, off_t), int fd, const struct iovec *iovecs,
                             int count, off_t offset)
{
    rule r;
    if (!hits(fd, "read", &r))
        return real(fd, iovecs, count, offset);
    size_t wanted = 0, length = 0;
    ssize_t result = 0;
    for (int i = 0; i < count; i++)
        wanted += iovecs[i].iov_len;
    switch (before_read(&r, wanted, &result, &length)) {
    case 1:
        return result;
    case 2: /* a direct read must keep its alignment: read everything, and report less */
        result = real(fd, iovecs, count, offset);
        return result > (ssize_t)length ? (ssize_t)length : result;
    case 3:
        result = real(fd, iovecs, count, offset >= PAGE ? offset - PAGE : offset + PAGE);
        return result < (ssize_t)wanted ? real(fd, iovecs, count, offset) : result;
    case 4:
        result = real(fd, iovecs, count, offset);
        damage(&r, iovecs, count, result);
        return result;
    }
    return real(fd, iovecs, count, offset);
}

ssize_t preadv(int fd, const struct iovec *iovecs, int count, off_t offset)
{
    REAL(preadv);
    return faulty_preadv(real, fd, iovecs, count, offset);
}

ssize_t preadv64(int fd, const struct iovec *iovecs, int count, off64_t offset)
{
    REAL(preadv64);
    return faulty_preadv(real, fd, iovecs, count, offset);
}

ssize_t pread(int fd, void *buffer, size_t bytes, off_t offset)
{
    REAL(preadv);
    struct iovec one = {buffer, bytes};
    return faulty_preadv(real, fd, &one, 1, offset);
}

ssize_t pread64(int fd, void *buffer, size_t bytes, off64_t offset)
{
    REAL(preadv64);
    struct iovec one = {buffer, bytes};
    return faulty_preadv(real, fd, &one, 1, offset);
}

ssize_t read(int fd, void *buffer, size_t bytes)
{
    REAL(read);
    rule r;
    if (!hits(fd, "read", &r))
        return real(fd, buffer, bytes);
    size_t length = 0;
    ssize_t result = 0;
    struct iovec one = {buffer, bytes};
    off_t here;
    switch (before_read(&r, bytes, &result, &length)) {
    case 1:
        return result;
    case 2:
        return real(fd, buffer, length);
    case 3:
        here = lseek(fd, 0, SEEK_CUR);
        result = real(fd, buffer, bytes);
        if (here >= PAGE && result > 0) {
            REAL(pread);
            real(fd, buffer, (size_t)result, here - PAGE);
        }
        return result;
    case 4:
        result = real(fd, buffer, bytes);
        damage(&r, &one, 1, result);
        return result;
    }
    return real(fd, buffer, bytes);
}

/* NumPy's fromfile calls this function. libc's own reads inside it do not pass through `read` above. */
size_t fread(void *buffer, size_t size, size_t count, FILE *file)
{
    REAL(fread);
    rule r;
    if (!hits(fileno(file), "read", &r))
        return real(buffer, size, count, file);
    size_t length = 0, got;
    ssize_t result = 0;
    struct iovec one = {buffer, size * count};
    switch (before_read(&r, size * count, &result, &length)) {
    case 1:
        if (result < 0)
            file->_flags |= 0x20; /* _IO_ERR_SEEN */
        return 0;
    case 2:
        return real(buffer, size, length / (size ? size : 1), file);
    case 4:
        got = real(buffer, size, count, file);
        damage(&r, &one, 1, (ssize_t)(got * size));
        return got;
    }
    return real(buffer, size, count, file);
}

/* Returns the action for a write: 1: return *result at once; 2: write only *length bytes. */
static int before_write(const rule *r, size_t wanted, ssize_t *result, size_t *length)
{
    if (strcmp(r->kind, "eio") == 0 || strcmp(r->kind, "enospc") == 0) {
        errno = strcmp(r->kind, "eio") == 0 ? EIO : ENOSPC;
        *result = -1;
        return 1;
    }
    if (strcmp(r->kind, "late") == 0)
        wait_ms(r->parameter);
    if (strcmp(r->kind, "short") == 0 && wanted > 1) {
        *length = wanted / 2;
        return 2;
    }
    return 0;
}

ssize_t write(int fd, const void *buffer, size_t bytes)
{
    REAL(write);
    rule r;
    size_t length = bytes;
    ssize_t result = 0;
    if (hits(fd, "write", &r) && before_write(&r, bytes, &result, &length) == 1)
        return result;
    return real(fd, buffer, length);
}

static ssize_t faulty_pwrite(ssize_t (*real)(int, const void *, size_t, off_t), int fd, const void *buffer,
                             size_t bytes, off_t offset)
{
    rule r;
    size_t length = bytes;
    ssize_t result = 0;
    if (hits(fd, "write", &r) && before_write(&r, bytes, &result, &length) == 1)
        return result;
    return real(fd, buffer, length, offset);
}

ssize_t pwrite(int fd, const void *buffer, size_t bytes, off_t offset)
{
    REAL(pwrite);
    return faulty_pwrite(real, fd, buffer, bytes, offset);
}

ssize_t pwrite64(int fd, const void *buffer, size_t bytes, off64_t offset)
{
    REAL(pwrite64);
    return faulty_pwrite(real, fd, buffer, bytes, offset);
}

static int faulty_sync(int (*real)(int), int fd)
{
    rule r;
    if (!hits(fd, "sync", &r))
        return real(fd);
    if (strcmp(r.kind, "late") == 0)
        wait_ms(r.parameter);
    errno = EIO;
    return strcmp(r.kind, "eio") == 0 ? -1 : real(fd);
}

int fsync(int fd)
{
    REAL(fsync);
    return faulty_sync(real, fd);
}

int fdatasync(int fd)
{
    REAL(fdatasync);
    return faulty_sync(real, fd);
}
