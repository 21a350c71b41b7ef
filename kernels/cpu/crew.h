/* crew.h: the threads that run a program: made once, woken for every step, meeting at barriers.
 *
 * Whoever waits spins for some microseconds and then sleeps, so that the step's short waits cost little and an idle
 * engine, or one that shares its cores with others, takes no time from anybody. */
#ifndef LLA_CREW_H
#define LLA_CREW_H

#include "../../base/status.h"

#include <stddef.h>

struct lla_crew;

/* The cores that the process may run on. */
size_t lla_core_count(void);

/* A crew of `size` threads, the caller of lla_crew_run among them; size 0: one a core. Refuses more than sixteen and
 * four a core. */
lla_status lla_crew_create(size_t size, struct lla_crew **out);
void lla_crew_destroy(struct lla_crew *crew); /* NULL is allowed */
size_t lla_crew_size(const struct lla_crew *crew);

/* Calls work(arg, rank) on every thread, rank 0 on the caller's, and returns when all are done. One caller at a time.
 */
void lla_crew_run(struct lla_crew *crew, void (*work)(void *arg, size_t rank), void *arg);

/* Inside work: returns when all threads of the crew have come here. What they wrote before is visible after. */
void lla_crew_barrier(struct lla_crew *crew);

#endif
