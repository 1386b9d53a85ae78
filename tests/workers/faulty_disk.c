/* A slow or failing disk, preloaded into a process (LD_PRELOAD): calls on files whose path contains FAULT_PATH.

   FAULT_CALL: read, write (pwrite and fsync as well). FAULT_ERRNO: each fails with this number; or FAULT_SECONDS: each of the
   first FAULT_TIMES takes so much longer. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

static int fault(int file, const char *call) {
    const char *path = getenv("FAULT_PATH"), *calls = getenv("FAULT_CALL");
    char link[64], name[4096];
    if (!path || !calls || strcmp(call, calls)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, name, sizeof name - 1);
    if (length < 0) return 0;
    name[length] = 0;
    if (!strstr(name, path)) return 0;
    if (getenv("FAULT_ERRNO")) {
        errno = atoi(getenv("FAULT_ERRNO"));
        return -1;
    }
    static int left = -1;
    if (left < 0) left = atoi(getenv("FAULT_TIMES"));
    if (left > 0) {
        struct timespec pause = {atoi(getenv("FAULT_SECONDS")), 0};
        left--;
        nanosleep(&pause, NULL);
    }
    return 0;
}

#define FAULTY(type, function, call, parameters, arguments)                  \
    type function parameters {                                              \
        static type(*real) parameters;                                      \
        if (!real) real = (type(*) parameters)dlsym(RTLD_NEXT, #function);  \
        return fault(file, call) ? -1 : real arguments;                     \
    }

FAULTY(ssize_t, read, "read", (int file, void *data, size_t size), (file, data, size))
FAULTY(ssize_t, pread64, "read", (int file, void *data, size_t size, off64_t at), (file, data, size, at))
FAULTY(ssize_t, write, "write", (int file, const void *data, size_t size), (file, data, size))
FAULTY(ssize_t, pwrite64, "write", (int file, const void *data, size_t size, off64_t at), (file, data, size, at))
FAULTY(int, fsync, "write", (int file), (file))
