/* bench.h: what the parts of llaisys-bench share. */
#ifndef LLA_BENCH_H
#define LLA_BENCH_H

#include "../engine/runner.h"

#include <stdio.h>

/* `llaisys-bench serve`: the exit status. */
int bench_serve(int argc, char **argv);

/* The spec of a known shape, and their names. */
lla_status bench_shape(const char *name, struct lla_spec *spec);
void bench_print_shapes(FILE *out);

/* The next random number (splitmix64). */
uint64_t bench_mix(uint64_t *state);

/* Uniform values of variance 1/cols (so that activations keep their size); norm weights around 1. */
lla_status bench_randomize(struct lla_runner *runner);

#endif
