/* arena.h: one allocation of host memory for a whole plan. */
#ifndef LLA_ARENA_H
#define LLA_ARENA_H

#include "../base/status.h"

#include <stddef.h>

/* Bytes that the process may still take: the machine's available memory, or less where a cgroup limits it. */
size_t lla_memory_available(void);

/* Zeroed memory, aligned to 2 MiB and on huge pages where the system gives them. Free with lla_arena_free. */
lla_status lla_arena_alloc(size_t nbytes, char **out);
void lla_arena_free(char *arena, size_t nbytes);

#endif
