/* kernels.h: what the tests of the CPU's primitives share. */
#ifndef LLA_TEST_KERNELS_H
#define LLA_TEST_KERNELS_H

#include "../../kernels/cpu/isa.h"
#include "random.h"

#include <math.h>
#include <stdlib.h>
#include <sys/mman.h>

/* Sanitizers make everything slower by an order of magnitude: fewer rounds then. */
#if defined(__SANITIZE_ADDRESS__)
enum { SLOW = 1 };
#else
enum { SLOW = 0 };
#endif

static const char *const isa_names[] = {"portable", "avx2", "avx512", "avx512bf16"};

/* Runs the statement behind it for every instruction set that the CPU has. */
#define EACH_ISA(isa)                                                                                                  \
    for (size_t isa##_i = 0; isa##_i < sizeof isa_names / sizeof *isa_names; isa##_i++)                                \
        for (const struct lla_isa *isa = lla_isa_named(isa_names[isa##_i]); isa; isa = NULL)

/* nbytes that end where a page without access begins, filled with 0xff (NaN). One for each slot at a time. */
static inline void *guarded(size_t slot, size_t nbytes) {
    enum { SLOTS = 8, SIZE = 16 << 20, PAGE = 4096 };
    static char *ends[SLOTS];
    if (!ends[slot]) {
        char *base = mmap(NULL, SIZE + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base == MAP_FAILED || mprotect(base + SIZE, PAGE, PROT_NONE)) abort();
        ends[slot] = base + SIZE;
    }
    if (slot >= SLOTS || nbytes > SIZE) abort();
    return memset(ends[slot] - nbytes, 0xff, nbytes);
}

/* lo and hi in any order. */
static inline bool between(float got, float lo, float hi) {
    return (got >= lo && got <= hi) || (got >= hi && got <= lo);
}

#endif
