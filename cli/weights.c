/* weights.c: random weights for measuring. */
#include "bench.h"
#include "shapes.h"

#include <math.h>
#include <stdlib.h>

lla_status bench_shape(const char *name, struct lla_spec *spec) {
    size_t i = 0, n = sizeof lla_shapes / sizeof *lla_shapes;
    while (i < n && strcmp(name, lla_shapes[i].name)) i++;
    LLA_REQUIRE(i < n, LLA_EINVAL, "--shape %s is not known; see --help", name);
    *spec = lla_shapes[i].spec;
    return LLA_OK;
}

void bench_print_shapes(FILE *out) {
    for (size_t i = 0; i < sizeof lla_shapes / sizeof *lla_shapes; i++)
        fprintf(out, "%s %s", i ? "," : "", lla_shapes[i].name);
}

uint64_t bench_mix(uint64_t *state) { /* splitmix64 */
    uint64_t z = *state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

lla_status bench_randomize(struct lla_runner *runner) {
    enum { PIECE = 1 << 16, STAGING = 32 << 20 };
    const struct lla_plan *plan = &runner->graph.plan;
    const size_t element = lla_dtype_size(plan->spec.dtype);
    char *staging = malloc(STAGING);
    LLA_REQUIRE(staging, LLA_ENOMEM, "no memory to make weights");
    lla_status status = LLA_OK;
    for (size_t i = 0; i < plan->nweight && !status; i++) {
        const struct lla_weight *w = &plan->weights[i];
        if (w->kind == LLA_W_HEAD && plan->spec.tied) continue;
        const bool is_norm = w->cols == 1 && w->kind != LLA_W_QKV_BIAS;
        const float scale = sqrtf(3.0f / (float)(w->cols > 1 ? w->cols : 12)) * (is_norm ? 0.1f : 1.0f);
        const size_t most = STAGING / (w->cols * element);
        for (size_t r = 0, n; r < w->rows && !status; r += n) {
            n = w->rows - r < most ? w->rows - r : most;
            const size_t first = r * w->cols, count = n * w->cols;
#pragma omp parallel for schedule(dynamic)
            for (size_t p = 0; p < count; p += PIECE) {
                uint64_t state = i * 0x1000000000 + first + p;
                for (size_t j = p; j < count && j < p + PIECE; j++) {
                    const float unit = (float)(bench_mix(&state) >> 40) * 0x1p-23f - 1;
                    lla_store_float(staging, j, unit * scale + (is_norm ? 1.0f : 0.0f), plan->spec.dtype);
                }
            }
            status = lla_runner_store(runner, w, r, n, staging);
        }
    }
    free(staging);
    return status;
}
