#include "crew.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

/* About 20 microseconds of pauses: longer than any wait of a healthy step, shorter than a time slice. */
enum { SPINS = 2000 };

struct lla_crew {
    size_t size;
    pthread_t *threads; /* [size - 1] */
    size_t nthread;     /* started */
    void (*work)(void *arg, size_t rank);
    void *arg;
    bool stop;
    _Alignas(64) _Atomic unsigned step;  /* counts the calls of work; workers wait for the next */
    _Alignas(64) _Atomic unsigned phase; /* counts the barriers */
    _Alignas(64) atomic_size_t arrived;
    atomic_int sleepers;
};

struct worker {
    struct lla_crew *crew;
    size_t rank;
};

static void pause_cpu(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Returns when *word is no longer `old`. */
static void wait_while(struct lla_crew *crew, _Atomic unsigned *word, unsigned old) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(word, memory_order_acquire) != old) return;
        pause_cpu();
    }
    atomic_fetch_add(&crew->sleepers, 1);
    while (atomic_load(word) == old)
#if defined(__linux__)
        syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, old, NULL, NULL, 0);
#else
        sched_yield();
#endif
    atomic_fetch_sub(&crew->sleepers, 1);
}

static void advance(struct lla_crew *crew, _Atomic unsigned *word) {
    atomic_fetch_add(word, 1);
#if defined(__linux__)
    if (atomic_load(&crew->sleepers)) syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, (int)crew->size, NULL, NULL, 0);
#else
    (void)crew;
#endif
}

void lla_crew_barrier(struct lla_crew *crew) {
    if (crew->size == 1) return;
    const unsigned phase = atomic_load_explicit(&crew->phase, memory_order_relaxed);
    if (atomic_fetch_add(&crew->arrived, 1) + 1 == crew->size) {
        atomic_store(&crew->arrived, 0);
        advance(crew, &crew->phase);
    } else {
        wait_while(crew, &crew->phase, phase);
    }
}

static void *run_worker(void *arg) {
    struct lla_crew *crew = ((struct worker *)arg)->crew;
    const size_t rank = ((struct worker *)arg)->rank;
    free(arg);
    for (unsigned step = 0;; step++) {
        wait_while(crew, &crew->step, step);
        if (crew->stop) return NULL;
        crew->work(crew->arg, rank);
        lla_crew_barrier(crew);
    }
}

void lla_crew_run(struct lla_crew *crew, void (*work)(void *arg, size_t rank), void *arg) {
    crew->work = work;
    crew->arg = arg;
    advance(crew, &crew->step);
    work(arg, 0);
    lla_crew_barrier(crew);
}

size_t lla_core_count(void) {
#if defined(__linux__)
    cpu_set_t set;
    if (!sched_getaffinity(0, sizeof set, &set)) return (size_t)CPU_COUNT(&set);
#endif
    const long count = sysconf(_SC_NPROCESSORS_ONLN);
    return count > 0 ? (size_t)count : 1;
}

size_t lla_crew_size(const struct lla_crew *crew) {
    return crew->size;
}

lla_status lla_crew_create(size_t size, struct lla_crew **out) {
    const size_t cores = lla_core_count(), most = 16 + 4 * cores;
    if (!size) size = cores;
    LLA_REQUIRE(size <= most, LLA_EINVAL, "%zu CPU threads, expected at most %zu on %zu cores", size, most, cores);
    struct lla_crew *crew = aligned_alloc(64, (sizeof *crew + 63) / 64 * 64);
    LLA_REQUIRE(crew, LLA_ENOMEM, "no memory for a crew of %zu threads", size);
    memset(crew, 0, sizeof *crew);
    crew->size = size;
    crew->threads = calloc(size, sizeof *crew->threads);
    for (size_t rank = 1; crew->threads && rank < size; rank++) {
        struct worker *worker = malloc(sizeof *worker);
        if (!worker) break;
        *worker = (struct worker){crew, rank};
        if (pthread_create(&crew->threads[rank - 1], NULL, run_worker, worker)) {
            free(worker);
            break;
        }
        crew->nthread++;
    }
    if (crew->nthread != size - 1) {
        const size_t started = crew->nthread;
        lla_crew_destroy(crew);
        return lla_fail(LLA_ENOMEM, "only %zu of %zu CPU threads could be started", started + 1, size);
    }
    *out = crew;
    return LLA_OK;
}

void lla_crew_destroy(struct lla_crew *crew) {
    if (!crew) return;
    crew->stop = true;
    advance(crew, &crew->step);
    for (size_t i = 0; i < crew->nthread; i++) pthread_join(crew->threads[i], NULL);
    free(crew->threads);
    free(crew);
}
