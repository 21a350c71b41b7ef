/* isa.c: which instruction set runs, decided once by what the CPU has. */
#include "isa.h"

#include <stdlib.h>

#define DECLARE(isa)                                                                                                   \
    void lla_linear_##isa(const struct lla_linear *, size_t, size_t);                                                  \
    void lla_rms_norm_##isa(llaisysDataType_t, size_t, const void *, const int32_t *, const void *, float, void *,     \
                            size_t, size_t);                                                                           \
    void lla_rotate_##isa(llaisysDataType_t, size_t, const void *, const float *, bool, void *);                       \
    void lla_add_##isa(llaisysDataType_t, size_t, const void *, const void *, void *);                                 \
    void lla_swiglu_##isa(llaisysDataType_t, size_t, const void *, const void *, bool, void *);                        \
    size_t lla_argmax_##isa(llaisysDataType_t, size_t, const void *);                                                  \
    void lla_to_float_##isa(llaisysDataType_t, size_t, const void *, float *);                                         \
    void lla_attention_##isa(const struct lla_attention *);                                                            \
    void lla_attention_split_##isa(const struct lla_attention *, size_t, float *);                                     \
    void lla_attention_merge_##isa(const struct lla_attention *, size_t, const float *, size_t);                       \
    int32_t lla_draw_##isa(const struct lla_draw *);                                                                   \
    float lla_read_##isa(const float *, size_t);                                                                       \
    double lla_peak_##isa(llaisysDataType_t, size_t);                                                                  \
    static const struct lla_isa isa = {                                                                                \
        .name = #isa,                                                                                                  \
        .linear = lla_linear_##isa,                                                                                    \
        .rms_norm = lla_rms_norm_##isa,                                                                                \
        .rotate = lla_rotate_##isa,                                                                                    \
        .add = lla_add_##isa,                                                                                          \
        .swiglu = lla_swiglu_##isa,                                                                                    \
        .argmax = lla_argmax_##isa,                                                                                    \
        .to_float = lla_to_float_##isa,                                                                                \
        .attention = lla_attention_##isa,                                                                              \
        .attention_split = lla_attention_split_##isa,                                                                  \
        .attention_merge = lla_attention_merge_##isa,                                                                  \
        .draw = lla_draw_##isa,                                                                                        \
        .read = lla_read_##isa,                                                                                        \
        .peak = lla_peak_##isa,                                                                                        \
    };

DECLARE(portable)
#if defined(__x86_64__)
DECLARE(avx2)
DECLARE(avx512)
DECLARE(avx512bf16)
#endif

/* A NULL name asks for the best. */
const struct lla_isa *lla_isa_named(const char *name) {
#if defined(__x86_64__)
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const struct {
        const struct lla_isa *isa;
        bool there;
    } best_first[] = {{&avx512bf16, has_avx512 && __builtin_cpu_supports("avx512bf16")},
                      {&avx512, has_avx512},
                      {&avx2, has_avx2},
                      {&portable, true}};
    for (size_t i = 0; i < sizeof best_first / sizeof *best_first; i++)
        if (best_first[i].there && (!name || !strcmp(name, best_first[i].isa->name))) return best_first[i].isa;
    return NULL;
#else
    return !name || !strcmp(name, portable.name) ? &portable : NULL;
#endif
}

/* A name that this CPU does not have gives the best that it has. */
static const struct lla_isa *choose(void) {
    const char *wanted = getenv("LLAISYS_CPU_ISA");
    const struct lla_isa *isa = wanted ? lla_isa_named(wanted) : NULL;
    return isa ? isa : lla_isa_named(NULL);
}

const struct lla_isa *lla_isa(void) {
    static const struct lla_isa *_Atomic chosen;
    if (!chosen) chosen = choose(); /* idempotent: two threads choose the same */
    return chosen;
}

const char *lla_cpu_isa_name(void) {
    return lla_isa()->name;
}
