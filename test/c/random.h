/* random.h: random numbers for tests, the same on every run (splitmix64). */
#ifndef LLA_TEST_RANDOM_H
#define LLA_TEST_RANDOM_H

#include <stddef.h>
#include <stdint.h>

struct rng {
    uint64_t state;
};

static inline uint64_t rng_next(struct rng *r) {
    uint64_t z = r->state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* From 0 to n - 1. */
static inline size_t rng_below(struct rng *r, size_t n) {
    return (size_t)(rng_next(r) % n);
}

/* From lo to hi, both included. */
static inline size_t rng_range(struct rng *r, size_t lo, size_t hi) {
    return lo + rng_below(r, hi - lo + 1);
}

/* Mean 0, variance 1, no further than 3.5 from 0: near enough to a normal distribution. */
static inline float rng_normal(struct rng *r) {
    float sum = -2;
    for (int i = 0; i < 4; i++) sum += (float)(rng_next(r) >> 40) * 0x1p-24f;
    return sum * 1.7320508f;
}

static inline void rng_shuffle(struct rng *r, int32_t *items, size_t n) {
    for (size_t i = n; i > 1; i--) {
        size_t j = rng_below(r, i);
        int32_t t = items[i - 1];
        items[i - 1] = items[j];
        items[j] = t;
    }
}

#endif
