#include "arena.h"

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

enum { HUGE_PAGE = 2 << 20 };

/* The number in a one-line file, or SIZE_MAX where there is none ("max"). */
static size_t read_limit(const char *path) {
    FILE *file = fopen(path, "r");
    size_t value = SIZE_MAX;
    if (file) {
        if (fscanf(file, "%zu", &value) != 1) value = SIZE_MAX;
        fclose(file);
    }
    return value;
}

size_t lla_memory_available(void) {
    size_t available = SIZE_MAX;
    FILE *file = fopen("/proc/meminfo", "r");
    if (file) {
        char line[128];
        size_t kib;
        while (fgets(line, sizeof line, file))
            if (sscanf(line, "MemAvailable: %zu kB", &kib) == 1) available = kib * 1024;
        fclose(file);
    }
    const size_t limit = read_limit("/sys/fs/cgroup/memory.max"), used = read_limit("/sys/fs/cgroup/memory.current");
    if (limit != SIZE_MAX && used != SIZE_MAX && limit - used < available) available = limit > used ? limit - used : 0;
    return available;
}

lla_status lla_arena_alloc(size_t nbytes, char **out) {
    /* Over-map by a huge page, then give back what lies before and behind the aligned part. */
    const size_t size = (nbytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    char *raw =
        mmap(NULL, size + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED)
        return lla_fail(LLA_ENOMEM, "no memory for an arena of %zu bytes: %s", nbytes, strerror(errno));
    char *arena = (char *)(((uintptr_t)raw + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
    if (arena > raw) munmap(raw, (size_t)(arena - raw));
    if (raw + HUGE_PAGE > arena) munmap(arena + size, (size_t)(raw + HUGE_PAGE - arena));
    madvise(arena, size, MADV_HUGEPAGE); /* a wish: small pages work, too */
    *out = arena;
    return LLA_OK;
}

void lla_arena_free(char *arena, size_t nbytes) {
    if (arena) munmap(arena, (nbytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
}
