/* Counts what a process does to the files of one directory, and strikes at one of these operations.
 *
 * Loaded with LD_PRELOAD, it passes all calls on until `attack_arm` is called. An operation counts if it is of a kind that
 * is asked for, and names a path in the directory or a file that was opened there. Before it is done the process gets a
 * signal, or it is failed, once or from then on; or the power of the file system is cut. A write may be done in half.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { LOOK = 1, CHANGE = 2, READ = 4, WRITE = 8 }; /* As in faults.py. */
enum blow { NONE, FAIL, HALVE };

#define SHUTDOWN _IOR('X', 125, uint32_t) /* What ext4 does at FS_IOC_SHUTDOWN, */
#define NO_LOG_FLUSH 2                    /* with what is in memory lost, as when the power fails. */

static struct {
    char directory[PATH_MAX];
    size_t length;
    int kinds, error, signal, lasting, halves, journal, log, cut;
    long at;
} attack;
static atomic_int armed;
static atomic_long count;

/* at: which operation, from 1; 0 strikes none, and logs all. cut: a file of the file system whose power fails, or "". */
void attack_arm(const char *directory, const char *log, const char *cut, long at, int kinds, int error, int signal,
                int lasting, int halves, int journal)
{
    attack.length = snprintf(attack.directory, PATH_MAX, "%s", directory);
    attack.at = at, attack.kinds = kinds, attack.error = error, attack.signal = signal;
    attack.lasting = lasting, attack.halves = halves, attack.journal = journal;
    attack.log = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    attack.cut = *cut ? syscall(SYS_openat, AT_FDCWD, cut, O_WRONLY | O_CREAT | O_CLOEXEC, 0644) : -1;
    atomic_store(&armed, 1);
}

/* Whether a call names a path in the directory, and which. That of an open file is what it was opened as. */
static int is_inside(int fd, const char *path, char *whole)
{
    char link[64];
    ssize_t length = 0;
    if (path == NULL || path[0] != '/') {
        snprintf(link, sizeof link, fd == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", fd);
        length = syscall(SYS_readlinkat, AT_FDCWD, link, whole, PATH_MAX - 1);
        if (length < 0)
            return 0;
        whole[length] = 0;
    }
    if (path != NULL && path[0] != 0)
        snprintf(whole + length, PATH_MAX, length ? "/%s" : "%s", path);
    return strncmp(whole, attack.directory, attack.length) == 0 &&
           (whole[attack.length] == 0 || whole[attack.length] == '/');
}

static void end(void)
{
    uint32_t how = NO_LOG_FLUSH;
    if (attack.journal) { /* A synced file takes the journal with it, and the data of no other file. */
        syscall(SYS_write, attack.cut, "1", 1);
        syscall(SYS_fsync, attack.cut);
    }
    if (attack.cut >= 0)
        syscall(SYS_ioctl, attack.cut, SHUTDOWN, &how);
    if (attack.signal)
        syscall(SYS_kill, getpid(), attack.signal);
}

static enum blow strike(const char *name, enum kind kind, int fd, const char *path, int other_fd, const char *other)
{
    char whole[2 * PATH_MAX + 2], line[3 * PATH_MAX];
    if (!(attack.kinds & kind))
        return NONE;
    if (!is_inside(fd, path, whole) && (other == NULL || !is_inside(other_fd, other, whole)))
        return NONE;
    long number = atomic_fetch_add(&count, 1) + 1;
    if (attack.at == 0 || number == attack.at) {
        int size = snprintf(line, sizeof line, "%d %s %s\n", kind, name, whole + attack.length);
        syscall(SYS_write, attack.log, line, size);
    }
    if (number == attack.at) {
        if (attack.halves && kind == WRITE)
            return HALVE;
        end();
    }
    int is_due = attack.at && (number == attack.at || (number > attack.at && attack.lasting));
    return is_due && attack.error ? FAIL : NONE;
}

static enum blow struck(const char *name, enum kind kind, int fd, const char *path, int other_fd, const char *other)
{
    if (!atomic_load(&armed))
        return NONE;
    int before = errno;
    enum blow blow = strike(name, kind, fd, path, other_fd, other);
    errno = blow == FAIL ? attack.error : before;
    return blow;
}

#define WATCH2(returns, failure, name, parameters, arguments, kind, fd, path, other_fd, other) \
    returns name parameters                                                                    \
    {                                                                                          \
        static returns(*real) parameters;                                                      \
        if (real == NULL)                                                                      \
            real = dlsym(RTLD_NEXT, #name);                                                    \
        if (struck(#name, kind, fd, path, other_fd, other) == FAIL)                            \
            return failure;                                                                    \
        return real arguments;                                                                 \
    }
#define WATCH(returns, failure, name, parameters, arguments, kind, fd, path) \
    WATCH2(returns, failure, name, parameters, arguments, kind, fd, path, 0, NULL)
#define PATH(name, parameters, arguments, kind) WATCH(int, -1, name, parameters, arguments, kind, AT_FDCWD, path)
#define AT(name, parameters, arguments, kind) WATCH(int, -1, name, parameters, arguments, kind, fd, path)
#define OPENED(returns, name, parameters, arguments, kind) WATCH(returns, -1, name, parameters, arguments, kind, fd, NULL)

/* Opening. */

static enum kind opening(int flags)
{
    return flags & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR) ? CHANGE : LOOK;
}

#define OPEN(name)                                                                                      \
    int name(const char *path, int flags, ...)                                                          \
    {                                                                                                   \
        static int (*real)(const char *, int, ...);                                                     \
        va_list rest;                                                                                   \
        va_start(rest, flags);                                                                          \
        int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, int) : 0;                               \
        va_end(rest);                                                                                   \
        if (real == NULL)                                                                               \
            real = dlsym(RTLD_NEXT, #name);                                                             \
        if (struck(#name, opening(flags), AT_FDCWD, path, 0, NULL) == FAIL)      \
            return -1;                                                                                  \
        return real(path, flags, mode);                                                                 \
    }
#define OPENAT(name)                                                                                    \
    int name(int fd, const char *path, int flags, ...)                                                  \
    {                                                                                                   \
        static int (*real)(int, const char *, int, ...);                                                \
        va_list rest;                                                                                   \
        va_start(rest, flags);                                                                          \
        int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, int) : 0;                               \
        va_end(rest);                                                                                   \
        if (real == NULL)                                                                               \
            real = dlsym(RTLD_NEXT, #name);                                                             \
        if (struck(#name, opening(flags), fd, path, 0, NULL) == FAIL)            \
            return -1;                                                                                  \
        return real(fd, path, flags, mode);                                                             \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
PATH(__open_2, (const char *path, int flags), (path, flags), opening(flags))
PATH(__open64_2, (const char *path, int flags), (path, flags), opening(flags))
AT(__openat_2, (int fd, const char *path, int flags), (fd, path, flags), opening(flags))
AT(__openat64_2, (int fd, const char *path, int flags), (fd, path, flags), opening(flags))
PATH(creat, (const char *path, mode_t mode), (path, mode), CHANGE)
PATH(creat64, (const char *path, mode_t mode), (path, mode), CHANGE)
#define FOPEN(name) \
    WATCH(FILE *, NULL, name, (const char *path, const char *mode), (path, mode), mode[0] == 'r' ? LOOK : CHANGE, AT_FDCWD, path)
FOPEN(fopen)
FOPEN(fopen64)

/* Looking. */

WATCH(DIR *, NULL, opendir, (const char *path), (path), LOOK, AT_FDCWD, path)
WATCH(DIR *, NULL, fdopendir, (int fd), (fd), LOOK, fd, NULL)
#define READDIR(entry, name)                                                                     \
    struct entry *name(DIR *stream)                                                              \
    {                                                                                            \
        static struct entry *(*real)(DIR *);                                                     \
        if (real == NULL)                                                                        \
            real = dlsym(RTLD_NEXT, #name);                                                      \
        /* The first one reads them all, of a folder that is small. */                           \
        if (telldir(stream) == 0 && struck(#name, READ, dirfd(stream), NULL, 0, NULL) == FAIL)   \
            return NULL;                                                                         \
        return real(stream);                                                                     \
    }
READDIR(dirent, readdir)
READDIR(dirent64, readdir64)
PATH(stat, (const char *path, struct stat *to), (path, to), LOOK)
PATH(lstat, (const char *path, struct stat *to), (path, to), LOOK)
PATH(stat64, (const char *path, struct stat64 *to), (path, to), LOOK)
PATH(lstat64, (const char *path, struct stat64 *to), (path, to), LOOK)
AT(fstatat, (int fd, const char *path, struct stat *to, int flags), (fd, path, to, flags), LOOK)
AT(fstatat64, (int fd, const char *path, struct stat64 *to, int flags), (fd, path, to, flags), LOOK)
AT(statx, (int fd, const char *path, int flags, unsigned mask, struct statx *to), (fd, path, flags, mask, to), LOOK)
OPENED(int, fstat, (int fd, struct stat *to), (fd, to), READ)
OPENED(int, fstat64, (int fd, struct stat64 *to), (fd, to), READ)
/* What programs call that were built with a glibc before 2.33. */
PATH(__xstat, (int version, const char *path, struct stat *to), (version, path, to), LOOK)
PATH(__lxstat, (int version, const char *path, struct stat *to), (version, path, to), LOOK)
PATH(__xstat64, (int version, const char *path, struct stat64 *to), (version, path, to), LOOK)
PATH(__lxstat64, (int version, const char *path, struct stat64 *to), (version, path, to), LOOK)
OPENED(int, __fxstat, (int version, int fd, struct stat *to), (version, fd, to), READ)
OPENED(int, __fxstat64, (int version, int fd, struct stat64 *to), (version, fd, to), READ)
AT(__fxstatat, (int version, int fd, const char *path, struct stat *to, int flags), (version, fd, path, to, flags), LOOK)
AT(__fxstatat64, (int version, int fd, const char *path, struct stat64 *to, int flags), (version, fd, path, to, flags), LOOK)
PATH(access, (const char *path, int mode), (path, mode), LOOK)
AT(faccessat, (int fd, const char *path, int mode, int flags), (fd, path, mode, flags), LOOK)
WATCH(ssize_t, -1, readlink, (const char *path, char *to, size_t size), (path, to, size), LOOK, AT_FDCWD, path)
WATCH(ssize_t, -1, readlinkat, (int fd, const char *path, char *to, size_t size), (fd, path, to, size), LOOK, fd, path)

/* Changing. */

PATH(mkdir, (const char *path, mode_t mode), (path, mode), CHANGE)
AT(mkdirat, (int fd, const char *path, mode_t mode), (fd, path, mode), CHANGE)
PATH(rmdir, (const char *path), (path), CHANGE)
PATH(remove, (const char *path), (path), CHANGE)
PATH(unlink, (const char *path), (path), CHANGE)
AT(unlinkat, (int fd, const char *path, int flags), (fd, path, flags), CHANGE)
PATH(chmod, (const char *path, mode_t mode), (path, mode), CHANGE)
AT(fchmodat, (int fd, const char *path, mode_t mode, int flags), (fd, path, mode, flags), CHANGE)
AT(utimensat, (int fd, const char *path, const struct timespec times[2], int flags), (fd, path, times, flags), CHANGE)
PATH(truncate, (const char *path, off_t size), (path, size), CHANGE)
PATH(truncate64, (const char *path, off64_t size), (path, size), CHANGE)
AT(symlinkat, (const char *target, int fd, const char *path), (target, fd, path), CHANGE)
PATH(symlink, (const char *target, const char *path), (target, path), CHANGE)
#define FROM_TO(name) \
    WATCH2(int, -1, name, (const char *path, const char *other), (path, other), CHANGE, AT_FDCWD, path, AT_FDCWD, other)
FROM_TO(rename)
FROM_TO(link)
WATCH2(int, -1, renameat, (int fd, const char *path, int to, const char *other), (fd, path, to, other), CHANGE, fd, path, to, other)
WATCH2(int, -1, renameat2, (int fd, const char *path, int to, const char *other, unsigned flags), (fd, path, to, other, flags), CHANGE, fd, path, to, other)
WATCH2(int, -1, linkat, (int fd, const char *path, int to, const char *other, int flags), (fd, path, to, other, flags), CHANGE, fd, path, to, other)

/* Reading. */

OPENED(ssize_t, read, (int fd, void *to, size_t size), (fd, to, size), READ)
OPENED(ssize_t, readv, (int fd, const struct iovec *to, int parts), (fd, to, parts), READ)
OPENED(ssize_t, pread, (int fd, void *to, size_t size, off_t offset), (fd, to, size, offset), READ)
OPENED(ssize_t, pread64, (int fd, void *to, size_t size, off64_t offset), (fd, to, size, offset), READ)
OPENED(ssize_t, preadv, (int fd, const struct iovec *to, int parts, off_t offset), (fd, to, parts, offset), READ)
WATCH(void *, (void *)-1, mmap, (void *at, size_t size, int protection, int flags, int fd, off_t offset), (at, size, protection, flags, fd, offset), READ, fd, NULL)
WATCH(void *, (void *)-1, mmap64, (void *at, size_t size, int protection, int flags, int fd, off64_t offset), (at, size, protection, flags, fd, offset), READ, fd, NULL)

/* Writing. */

#define WRITE_SOME(name, parameters, arguments, halved)                                   \
    ssize_t name parameters                                                               \
    {                                                                                     \
        static ssize_t(*real) parameters;                                                 \
        if (real == NULL)                                                                 \
            real = dlsym(RTLD_NEXT, #name);                                               \
        switch (struck(#name, WRITE, fd, NULL, 0, NULL)) {                                \
        case FAIL:                                                                        \
            return -1;                                                                    \
        case HALVE: {                                                                     \
            ssize_t written = real halved;                                                \
            end();                                                                        \
            return written;                                                               \
        }                                                                                 \
        default:                                                                          \
            return real arguments;                                                        \
        }                                                                                 \
    }
WRITE_SOME(write, (int fd, const void *from, size_t size), (fd, from, size), (fd, from, (size + 1) / 2))
WRITE_SOME(pwrite, (int fd, const void *from, size_t size, off_t offset), (fd, from, size, offset), (fd, from, (size + 1) / 2, offset))
WRITE_SOME(pwrite64, (int fd, const void *from, size_t size, off64_t offset), (fd, from, size, offset), (fd, from, (size + 1) / 2, offset))
WRITE_SOME(writev, (int fd, const struct iovec *from, int parts), (fd, from, parts), (fd, from, (parts + 1) / 2))
OPENED(ssize_t, sendfile, (int fd, int from, off_t *offset, size_t size), (fd, from, offset, size), WRITE)
OPENED(ssize_t, sendfile64, (int fd, int from, off64_t *offset, size_t size), (fd, from, offset, size), WRITE)
WATCH(ssize_t, -1, copy_file_range, (int from, off64_t *at, int fd, off64_t *to, size_t size, unsigned flags), (from, at, fd, to, size, flags), WRITE, fd, NULL)
OPENED(int, ftruncate, (int fd, off_t size), (fd, size), WRITE)
OPENED(int, ftruncate64, (int fd, off64_t size), (fd, size), WRITE)
OPENED(int, fsync, (int fd), (fd), WRITE)
OPENED(int, fdatasync, (int fd), (fd), WRITE)
OPENED(int, syncfs, (int fd), (fd), WRITE)
OPENED(int, fchmod, (int fd, mode_t mode), (fd, mode), CHANGE)
OPENED(int, futimens, (int fd, const struct timespec times[2]), (fd, times), CHANGE)
OPENED(int, flock, (int fd, int operation), (fd, operation), READ)
