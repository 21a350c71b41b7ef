/* test_sample.c: tokens are drawn as struct lla_draw says: against a plain reference that sorts, on random rows, edge
 * values, exact supports and frequencies; the same bits in every instruction set.
 *
 * `test_sample bench` prints what a draw from a vocabulary of 151,936 costs. */
#include "harness.h"
#include "kernels.h"

#include <stdlib.h>
#include <time.h>

enum { MOST = 151936, KNOWN = 300, MOST_BIAS = 40 };

static float logits[MOST]; /* exact in `dtype` */
static char stored[4 * MOST];
static int64_t known[KNOWN];
static struct lla_bias bias[MOST_BIAS];

/* ---- the reference ---- */

/* Philox4x32-10, written down a second time. */
static uint32_t philox(uint64_t seed, uint64_t counter) {
    uint32_t c[4] = {(uint32_t)counter, (uint32_t)(counter >> 32), 0, 0};
    uint32_t k[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    for (int i = 0; i < 10; i++, k[0] += 0x9E3779B9u, k[1] += 0xBB67AE85u) {
        const uint64_t a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
        const uint32_t n[4] = {(uint32_t)(b >> 32) ^ c[1] ^ k[0], (uint32_t)b, (uint32_t)(a >> 32) ^ c[3] ^ k[1],
                               (uint32_t)a};
        memcpy(c, n, sizeof c);
    }
    return c[0];
}

/* The generator's published first word for a key and a counter of zeros. */
TEST(philox_known_answer) {
    CHECK_INT(philox(0, 0), 0x6627e8d5u);
}

static float value[MOST];   /* adjusted */
static double weight[MOST]; /* 0 outside the support */
static struct sorted {
    float value;
    int32_t token;
} sorted[MOST];

static int descending(const void *a, const void *b) {
    const struct sorted *x = a, *y = b;
    if (x->value != y->value) return x->value > y->value ? -1 : 1;
    return (x->token > y->token) - (x->token < y->token);
}

static void sort(const float *v, size_t n) {
    for (size_t i = 0; i < n; i++) sorted[i] = (struct sorted){v[i], (int32_t)i};
    qsort(sorted, n, sizeof *sorted, descending);
}

static void adjust(const struct lla_draw *d) {
    const struct lla_sampling_row *s = d->how;
    memcpy(value, logits, d->n * sizeof *value);
    for (int32_t i = 0; i < s->nbias; i++) value[d->bias[i].token] += d->bias[i].bias;
    for (size_t t = 0; t < d->n; t++) {
        size_t count = 0, seen = 0;
        for (size_t i = 0; i < d->nknown; i++) {
            seen += d->known[i] == (int64_t)t;
            count += d->known[i] == (int64_t)t && i >= d->nprompt;
        }
        if (seen && s->repetition > 0) value[t] = value[t] > 0 ? value[t] / s->repetition : value[t] * s->repetition;
        if (count) value[t] = value[t] - (float)count * s->frequency - s->presence;
    }
}

/* Fills weight[] with the support; false where a rounding decides what belongs to it. */
static bool support(const struct lla_draw *d) {
    const struct lla_sampling_row *s = d->how;
    const double close = 3e-6;
    bool is_clear = true;
    adjust(d);
    sort(value, d->n);
    memset(weight, 0, d->n * sizeof *weight);
    if (lla_is_greedy(s)) {
        weight[sorted[0].token] = 1;
        return true;
    }
    const size_t k = s->top_k > 0 && (size_t)s->top_k < d->n ? (size_t)s->top_k : d->n;
    double total = 0, mass = 0;
    for (size_t i = 0; i < k; i++)
        total += exp(((double)sorted[i].value - (double)sorted[0].value) / (double)s->temperature);
    for (size_t i = 0; i < k; i++) {
        const double w = exp(((double)sorted[i].value - (double)sorted[0].value) / (double)s->temperature);
        if (i && s->top_p < 1) {
            if (fabs(mass - (double)s->top_p * total) < close * total) is_clear = false;
            if (mass >= (double)s->top_p * total) break;
        }
        mass += w;
        if (s->min_p > 0 && fabs(w - (double)s->min_p) < close && i) is_clear = false;
        if (w >= (double)s->min_p) weight[sorted[i].token] = w;
    }
    return is_clear;
}

/* The token, or -1 where a rounding decides. */
static int32_t reference(const struct lla_draw *d) {
    if (!support(d)) return -1;
    double mass = 0, sum = 0;
    for (size_t i = 0; i < d->n; i++) mass += weight[i];
    const double place = (double)philox(d->how->seed, (uint32_t)d->how->position) * 0x1p-32 * mass;
    for (size_t i = 0; i < d->n; i++) {
        if (weight[i] == 0) continue;
        if (!lla_is_greedy(d->how) && fabs(sum - place) < 3e-6 * mass && sum > 0) return -1;
        sum += weight[i];
        if (sum > place) return fabs(sum - place) < 3e-6 * mass && !lla_is_greedy(d->how) ? -1 : (int32_t)i;
    }
    return -1;
}

/* ---- the draw ---- */

static struct lla_draw row_of(llaisysDataType_t dtype, size_t n, const struct lla_sampling_row *how) {
    for (size_t i = 0; i < n; i++) {
        lla_store_float(stored, i, logits[i], dtype);
        logits[i] = lla_load_float(stored, i, dtype);
    }
    return (struct lla_draw){.dtype = dtype, .n = n, .how = how, .known = known, .bias = bias};
}

/* With memory that ends where it should, in every instruction set. */
static int32_t draw(struct lla_draw d) {
    static struct lla_candidate first[64];
    int32_t token = -1;
    const size_t nbytes = d.n * lla_dtype_size(d.dtype), nlogprob = (size_t)d.how->nlogprob;
    struct lla_candidate *logprobs = d.logprobs;
    EACH_ISA(isa) {
        d.logits = memcpy(guarded(0, nbytes), stored, nbytes);
        d.scratch = guarded(1, d.n * sizeof *d.scratch);
        d.logprobs = guarded(2, (nlogprob + 1) * sizeof *d.logprobs);
        const int32_t drawn = isa->draw(&d);
        CHECK(drawn >= 0 && (size_t)drawn < d.n);
        if (token < 0) {
            token = drawn;
            memcpy(first, d.logprobs, nlogprob * sizeof *first);
        }
        CHECK_INT(drawn, token);
        CHECK(!memcmp(first, d.logprobs, nlogprob * sizeof *first));
        if (memcmp(d.logits, stored, nbytes)) HARNESS_FAIL("the logits have changed");
    }
    if (logprobs) memcpy(logprobs, first, nlogprob * sizeof *first);
    return token;
}

static void fill(struct rng *rng, size_t n, size_t kind) {
    const float scale = (float[]){0.1f, 1, 4, 20}[rng_below(rng, 4)];
    for (size_t i = 0; i < n; i++) {
        logits[i] = scale * rng_normal(rng);
        if (kind == 1) logits[i] = 2.5f;
        if (kind == 2) logits[i] = (float)rng_below(rng, 4) - 1; /* many ties, 0 and -0 among them */
        if (kind == 2 && logits[i] == 0 && i % 2) logits[i] = -0.0f;
        if (kind == 3 && rng_below(rng, 3)) logits[i] = -INFINITY;
    }
    if (kind == 3) logits[rng_below(rng, n)] = 1;
}

static struct lla_sampling_row random_how(struct rng *rng, size_t n) {
    struct lla_sampling_row s = {.temperature = (float[]){0.3f, 0.8f, 1, 1.5f, 10}[rng_below(rng, 5)],
                                 .top_p = (float[]){1, 1, 0.95f, 0.5f, 0.05f, 0}[rng_below(rng, 6)],
                                 .min_p = (float[]){0, 0, 0.01f, 0.3f, 1}[rng_below(rng, 5)],
                                 .position = (int32_t)rng_below(rng, 100000),
                                 .seed = rng_next(rng)};
    if (rng_below(rng, 2)) s.top_k = (int32_t)rng_range(rng, 1, rng_below(rng, 2) ? 50 : n + 2);
    if (rng_below(rng, 8) == 0) s.temperature = 0;
    if (rng_below(rng, 2)) {
        s.repetition = (float[]){0, 1, 1.3f, 0.7f}[rng_below(rng, 4)];
        s.presence = (float[]){0, 0.5f, -1}[rng_below(rng, 3)];
        s.frequency = (float[]){0, 0.25f, -0.125f}[rng_below(rng, 3)];
    }
    if (rng_below(rng, 2)) s.nbias = (int32_t)rng_range(rng, 1, MOST_BIAS);
    return s;
}

static void check_rows(size_t rounds, size_t most_known, const size_t *sizes, size_t nsize, uint64_t seed) {
    struct rng rng = {seed};
    size_t unclear = 0;
    for (size_t i = 0; i < rounds && TEST_FAILURES < 5; i++) {
        const size_t n = sizes[rng_below(&rng, nsize)];
        const llaisysDataType_t dtype =
            (llaisysDataType_t[]){LLAISYS_DTYPE_BF16, LLAISYS_DTYPE_F16, LLAISYS_DTYPE_F32}[rng_below(&rng, 3)];
        const struct lla_sampling_row how = random_how(&rng, n);
        fill(&rng, n, rng_below(&rng, 5));
        for (size_t j = 0; j < KNOWN; j++) known[j] = (int64_t)rng_below(&rng, n < 40 ? n : 40);
        for (size_t j = 0; j < MOST_BIAS; j++)
            bias[j] =
                (struct lla_bias){(int32_t)rng_below(&rng, n), (float[]){-100, 100, 0.5f, -2}[rng_below(&rng, 4)]};
        struct lla_draw d = row_of(dtype, n, &how);
        d.nknown = rng_range(&rng, 1, most_known);
        d.nprompt = rng_below(&rng, d.nknown + 1);
        const int32_t expected = reference(&d);
        const int32_t drawn = draw(d);
        unclear += expected < 0;
        if (expected >= 0 && drawn != expected)
            HARNESS_FAIL("round %zu, %zu %s: token %d, expected %d (temperature %g, top_k %d, top_p %g, min_p %g)", i,
                         n, lla_dtype_name(dtype), drawn, expected, (double)how.temperature, how.top_k,
                         (double)how.top_p, (double)how.min_p);
    }
    printf("%zu of %zu rows were decided by rounding\n", unclear, rounds);
    CHECK(unclear < rounds / 5);
}

TEST(random_rows_as_the_reference) {
    const size_t sizes[] = {1, 2, 17, 256, 300, 2000};
    check_rows(SLOW ? 300 : 3000, KNOWN, sizes, 6, 1);
}

TEST(large_rows_as_the_reference) {
    const size_t sizes[] = {5000, MOST};
    check_rows(SLOW ? 10 : 60, 10, sizes, 2, 2);
}

/* ---- exact supports ---- */

/* Draws with many seeds: exactly the tokens of `expected` (ended by -1) must come. */
static void check_support(size_t n, struct lla_sampling_row how, const int32_t *expected) {
    bool seen[64] = {0}, wanted[64] = {0};
    const struct lla_draw d = row_of(LLAISYS_DTYPE_F32, n, &how);
    for (; *expected >= 0; expected++) wanted[*expected] = true;
    for (how.seed = 0; how.seed < 3000; how.seed++) seen[draw(d)] = true;
    for (size_t i = 0; i < n; i++)
        if (seen[i] != wanted[i]) HARNESS_FAIL("token %zu: drawn %d, expected %d", i, seen[i], wanted[i]);
}

#define SUPPORT(n, how, ...) check_support(n, (struct lla_sampling_row)how, (const int32_t[]){__VA_ARGS__, -1})
#define HOW(...) {__VA_ARGS__}

/* Probabilities 8, 4, 2, 1, 1 sixteenths, tokens shuffled. */
static void sixteenths(void) {
    static const int powers[] = {1, 3, 0, 2, 0};
    for (size_t i = 0; i < 5; i++) logits[i] = (float)powers[i] * 0.6931472f - 5;
}

TEST(supports_of_top_k) {
    sixteenths();
    SUPPORT(5, HOW(.temperature = 1, .top_p = 1, .top_k = 1), 1);
    SUPPORT(5, HOW(.temperature = 1, .top_p = 1, .top_k = 2), 1, 3);
    SUPPORT(5, HOW(.temperature = 1, .top_p = 1, .top_k = 4), 0, 1, 2, 3); /* of equals the first */
    SUPPORT(5, HOW(.temperature = 1, .top_p = 1, .top_k = 5), 0, 1, 2, 3, 4);
    SUPPORT(5, HOW(.temperature = 1, .top_p = 1, .top_k = 6), 0, 1, 2, 3, 4);
    SUPPORT(5, HOW(.temperature = 1, .top_p = 1, .top_k = INT32_MAX), 0, 1, 2, 3, 4);
    SUPPORT(5, HOW(.temperature = 1, .top_p = 1), 0, 1, 2, 3, 4);
}

TEST(supports_of_top_p) {
    sixteenths();
    SUPPORT(5, HOW(.temperature = 1, .top_p = 0), 1);
    SUPPORT(5, HOW(.temperature = 1, .top_p = 1e-30f), 1);
    SUPPORT(5, HOW(.temperature = 1, .top_p = 0.49f), 1);
    SUPPORT(5, HOW(.temperature = 1, .top_p = 0.51f), 1, 3);
    SUPPORT(5, HOW(.temperature = 1, .top_p = 0.74f), 1, 3);
    SUPPORT(5, HOW(.temperature = 1, .top_p = 0.76f), 0, 1, 3);
    SUPPORT(5, HOW(.temperature = 1, .top_p = 0.9f), 0, 1, 2, 3);
    SUPPORT(5, HOW(.temperature = 1, .top_p = 0.94f), 0, 1, 2, 3, 4);
    SUPPORT(5, HOW(.temperature = 1, .top_p = 1), 0, 1, 2, 3, 4);
    /* of what top_k leaves: 8/12 and 4/12 */
    SUPPORT(5, HOW(.temperature = 1, .top_p = 0.66f, .top_k = 2), 1);
    SUPPORT(5, HOW(.temperature = 1, .top_p = 0.67f, .top_k = 2), 1, 3);
}

TEST(supports_of_min_p) {
    sixteenths();
    SUPPORT(5, HOW(.temperature = 1, .top_p = 1, .min_p = 0), 0, 1, 2, 3, 4);
    SUPPORT(5, HOW(.temperature = 1, .top_p = 1, .min_p = 0.12f), 0, 1, 2, 3, 4);
    SUPPORT(5, HOW(.temperature = 1, .top_p = 1, .min_p = 0.13f), 0, 1, 3);
    SUPPORT(5, HOW(.temperature = 1, .top_p = 1, .min_p = 0.51f), 1);
    SUPPORT(5, HOW(.temperature = 1, .top_p = 1, .min_p = 1), 1);
    /* by the probabilities that temperature leaves: roots of them */
    SUPPORT(5, HOW(.temperature = 2, .top_p = 1, .min_p = 0.51f), 1, 3);
}

TEST(rows_of_equals) {
    for (size_t i = 0; i < 6; i++) logits[i] = i % 2 ? 0.0f : -0.0f;
    SUPPORT(6, HOW(.temperature = 1, .top_p = 1), 0, 1, 2, 3, 4, 5);
    SUPPORT(6, HOW(.temperature = 1, .top_p = 1, .top_k = 3), 0, 1, 2);
    SUPPORT(6, HOW(.temperature = 1, .top_p = 0.6f), 0, 1, 2, 3);
    SUPPORT(6, HOW(.temperature = 1, .top_p = 1, .min_p = 1), 0, 1, 2, 3, 4, 5);
    SUPPORT(6, HOW(.temperature = 0), 0);
}

TEST(infinite_logits) {
    for (size_t i = 0; i < 6; i++) logits[i] = -INFINITY;
    SUPPORT(6, HOW(.temperature = 1, .top_p = 1), 0); /* nothing is left: the first */
    logits[4] = -3;
    SUPPORT(6, HOW(.temperature = 1, .top_p = 1), 4);
    SUPPORT(6, HOW(.temperature = 1, .top_p = 0.5f, .top_k = 3, .min_p = 0.1f), 4);
    SUPPORT(6, HOW(.temperature = 0), 4);
    logits[2] = -3;
    SUPPORT(6, HOW(.temperature = 1, .top_p = 1, .top_k = 4), 2, 4);
    logits[3] = INFINITY;
    SUPPORT(6, HOW(.temperature = 1, .top_p = 1), 3);
}

TEST(logits_that_are_no_numbers) {
    struct lla_candidate logprobs[3];
    for (size_t i = 0; i < 20; i++) logits[i] = (float)i;
    logits[7] = logits[12] = NAN;
    logits[15] = -NAN;
    SUPPORT(20, HOW(.temperature = 0), 7);
    SUPPORT(20, HOW(.temperature = 1, .top_p = 0.9f, .top_k = 4, .min_p = 0.1f), 7);
    const struct lla_sampling_row how = {.temperature = 1, .top_p = 1, .nlogprob = 3};
    struct lla_draw d = row_of(LLAISYS_DTYPE_BF16, 20, &how);
    d.logprobs = logprobs;
    CHECK_INT(draw(d), 7);
    for (size_t i = 0; i < 3; i++) CHECK(isnan(logprobs[i].value));
    logits[0] = 0;
    for (size_t i = 0; i < 20; i++) logits[i] = lla_bits_float(0xffffffffu);
    d = row_of(LLAISYS_DTYPE_F32, 20, &how);
    d.logprobs = logprobs;
    CHECK_INT(draw(d), 0);
}

TEST(temperatures_at_the_ends) {
    sixteenths();
    SUPPORT(5, HOW(.temperature = 1e-45f, .top_p = 1), 1);
    SUPPORT(5, HOW(.temperature = 1e-30f, .top_p = 0.9f, .top_k = 3), 1);
    SUPPORT(5, HOW(.temperature = 3e38f, .top_p = 1), 0, 1, 2, 3, 4);
    logits[0] = 3e38f, logits[1] = -3e38f; /* their difference is no f32 */
    SUPPORT(2, HOW(.temperature = 1, .top_p = 1), 0);
}

/* ---- bias and penalties ---- */

static int32_t greedy(size_t n, struct lla_sampling_row how, size_t nprompt, size_t nknown) {
    struct lla_draw d = row_of(LLAISYS_DTYPE_F32, n, &how);
    d.nprompt = nprompt;
    d.nknown = nknown;
    return draw(d);
}

TEST(bias) {
    for (size_t i = 0; i < 10; i++) logits[i] = (float)i;
    bias[0] = (struct lla_bias){2, 100};
    CHECK_INT(greedy(10, (struct lla_sampling_row){.nbias = 1}, 0, 0), 2);
    bias[1] = (struct lla_bias){2, -100};
    CHECK_INT(greedy(10, (struct lla_sampling_row){.nbias = 2}, 0, 0), 9);
    bias[0] = (struct lla_bias){9, -INFINITY};
    CHECK_INT(greedy(10, (struct lla_sampling_row){.nbias = 1}, 0, 0), 8);
    SUPPORT(10, HOW(.temperature = 100, .top_p = 1, .nbias = 1), 0, 1, 2, 3, 4, 5, 6, 7, 8);
    for (int32_t i = 0; i < 10; i++) bias[i] = (struct lla_bias){i, i == 3 ? 0 : -INFINITY};
    SUPPORT(10, HOW(.temperature = 1, .top_p = 1, .nbias = 10), 3);
    bias[3].bias = -INFINITY;
    SUPPORT(10, HOW(.temperature = 1, .top_p = 1, .nbias = 10), 0);
}

TEST(penalties) {
    static const int64_t text[] = {5, 5, 4, /* answer: */ 3, 3, 2};
    memcpy(known, text, sizeof text);
    for (size_t i = 0; i < 6; i++) logits[i] = (float)i + 1;
    /* 1, 2, 3/2, 4/2, 5/2, 6/2: once each, however often a token came */
    CHECK_INT(greedy(6, (struct lla_sampling_row){.repetition = 2}, 3, 6), 5);
    CHECK_INT(greedy(6, (struct lla_sampling_row){.repetition = 4}, 3, 6), 1);
    for (size_t i = 0; i < 6; i++) logits[i] = -(float)i - 1; /* -1, -2, -6, -8 */
    logits[0] = -100;
    CHECK_INT(greedy(6, (struct lla_sampling_row){.repetition = 0.1f}, 3, 6), 2); /* -0.3 */
    for (size_t i = 0; i < 6; i++) logits[i] = i == 3 ? 3 : 0;
    logits[1] = 1.5f;
    /* presence and frequency look at the answer alone: 3 - 2 * frequency - presence */
    CHECK_INT(greedy(6, (struct lla_sampling_row){.frequency = 0.7f}, 3, 6), 3);
    CHECK_INT(greedy(6, (struct lla_sampling_row){.frequency = 0.8f}, 3, 6), 1);
    CHECK_INT(greedy(6, (struct lla_sampling_row){.frequency = 2}, 6, 6), 3);
    CHECK_INT(greedy(6, (struct lla_sampling_row){.presence = 1.4f}, 3, 6), 3);
    CHECK_INT(greedy(6, (struct lla_sampling_row){.presence = 1.6f}, 3, 6), 1);
    CHECK_INT(greedy(6, (struct lla_sampling_row){.presence = 2}, 6, 6), 3);
    CHECK_INT(greedy(6, (struct lla_sampling_row){.presence = -2}, 3, 6), 3);
    logits[3] = 0; /* -2 lifts 2 and 3 alike: the first */
    CHECK_INT(greedy(6, (struct lla_sampling_row){.presence = -2}, 3, 6), 2);
}

/* ---- log-probabilities ---- */

TEST(logprobs_are_the_models) {
    struct rng rng = {5};
    struct lla_candidate got[24];
    for (size_t i = 0; i < (SLOW ? 50 : 500) && TEST_FAILURES < 5; i++) {
        const size_t n = (size_t[]){1, 3, 21, 700, 6000}[rng_below(&rng, 5)], kind = rng_below(&rng, 4);
        struct lla_sampling_row how = random_how(&rng, n);
        how.nlogprob = (int32_t)rng_range(&rng, 1, 21);
        how.nbias = 0;
        fill(&rng, n, kind);
        struct lla_draw d = row_of(rng_below(&rng, 2) ? LLAISYS_DTYPE_BF16 : LLAISYS_DTYPE_F32, n, &how);
        d.logprobs = got;
        for (size_t j = 0; j < KNOWN; j++) known[j] = (int64_t)rng_below(&rng, n);
        d.nknown = KNOWN;
        const int32_t drawn = draw(d);
        how.nlogprob = 0;
        CHECK_INT(draw(d), drawn); /* telling does not change it */
        sort(logits, n);
        double sum = 0;
        for (size_t j = 0; j < n; j++) sum += exp((double)logits[j] - (double)sorted[0].value);
        const double log_sum = log(sum) + (double)sorted[0].value;
        CHECK_INT(got[0].token, drawn);
        for (size_t j = 0; (int32_t)j < d.how->nlogprob; j++) {
            const int32_t token = j == 0 ? drawn : j <= n ? sorted[j - 1].token : -1;
            const double expected = token < 0 ? -INFINITY : (double)logits[token] - log_sum;
            CHECK_INT(got[j].token, token);
            if ((double)got[j].value != expected && !(fabs((double)got[j].value - expected) < 2e-6 * (1 - expected)))
                HARNESS_FAIL("round %zu, entry %zu of %zu: %.9g, expected %.9g", i, j, n, (double)got[j].value,
                             expected);
        }
    }
}

/* ---- masks ---- */

/* A masked row is drawn as one whose other logits are -infinity, log-probabilities included. */
TEST(a_mask_leaves_nothing_of_other_tokens) {
    static uint32_t mask[MOST / 32 + 1];
    struct rng rng = {7};
    for (size_t i = 0; i < (SLOW ? 60 : 600) && TEST_FAILURES < 5; i++) {
        const size_t n = (size_t[]){1, 31, 32, 33, 700, 6000}[rng_below(&rng, 6)], kind = rng_below(&rng, 4);
        struct lla_sampling_row how = random_how(&rng, n);
        struct lla_candidate got[2][8];
        how.nlogprob = (int32_t)rng_below(&rng, 8);
        how.nbias = 0;
        fill(&rng, n, kind);
        struct lla_draw d = row_of(rng_below(&rng, 2) ? LLAISYS_DTYPE_BF16 : LLAISYS_DTYPE_F32, n, &how);
        for (size_t j = 0; j < KNOWN; j++) known[j] = (int64_t)rng_below(&rng, n);
        d.nknown = KNOWN;
        const uint64_t density = rng_range(&rng, 1, 20);
        for (size_t j = 0; j < n / 32 + 1; j++) mask[j] = rng_below(&rng, 3) ? 0 : UINT32_MAX;
        for (size_t j = 0; j < n; j++)
            if (rng_below(&rng, density) == 0) mask[j / 32] ^= 1u << j % 32;
        const size_t sure = rng_below(&rng, n);
        if (logits[sure] > -INFINITY) mask[sure / 32] |= 1u << sure % 32;
        size_t possible = 0;
        for (size_t j = 0; j < n; j++) possible += logits[j] > -INFINITY && mask[j / 32] >> j % 32 & 1;
        if (!possible) continue;
        d.mask = mask;
        d.logprobs = got[0];
        const int32_t masked = draw(d);
        CHECK(mask[masked / 32] >> masked % 32 & 1);
        for (size_t j = 0; j < n; j++)
            if (!(mask[j / 32] >> j % 32 & 1)) lla_store_float(stored, j, -INFINITY, d.dtype);
        d.mask = NULL;
        d.logprobs = got[1];
        CHECK_INT(draw(d), masked);
        CHECK(!memcmp(got[0], got[1], (size_t)how.nlogprob * sizeof **got));
    }
}

/* Whatever the other tokens are, and whatever is left of the allowed ones: the choice is one of these. */
TEST(only_the_allowed_are_chosen) {
    const float nan = 0.0f / 0.0f;
    const uint32_t mask[2] = {0, 1u << 3 | 1u << 5}; /* 35 and 37 */
    struct lla_sampling_row how = {.temperature = 1, .top_p = 0.9f, .nbias = 0};
    for (size_t i = 0; i < 40; i++) logits[i] = (float[]){nan, INFINITY, 1e30f}[i % 3];
    logits[35] = 1, logits[37] = 2;
    for (int greedy = 0; greedy < 2; greedy++) {
        how.temperature = greedy ? 0 : 1;
        struct lla_draw d = row_of(LLAISYS_DTYPE_F32, 40, &how);
        d.mask = mask;
        for (how.seed = 0; how.seed < 50; how.seed++) {
            const int32_t token = draw(d);
            CHECK(token == 37 || (token == 35 && !greedy));
        }
        logits[35] = logits[37] = -INFINITY; /* not even these */
        d = row_of(LLAISYS_DTYPE_F32, 40, &how);
        d.mask = mask;
        CHECK_INT(draw(d), 35);
        logits[37] = nan;
        d = row_of(LLAISYS_DTYPE_F32, 40, &how);
        d.mask = mask;
        CHECK_INT(draw(d), 37);
        logits[35] = 1, logits[37] = 2;
        how.nbias = 2, bias[0] = (struct lla_bias){35, -INFINITY}, bias[1] = (struct lla_bias){37, -INFINITY};
        d = row_of(LLAISYS_DTYPE_F32, 40, &how);
        d.mask = mask;
        CHECK_INT(draw(d), 35);
        how.nbias = 0;
    }
}

/* ---- frequencies ---- */

/* Chi-square over the support: a correct draw exceeds the limit for one choice of seeds in a million. */
static void check_frequencies(size_t n, struct lla_sampling_row how) {
    enum { DRAWS = 40000 };
    static size_t counts[64];
    memset(counts, 0, sizeof counts);
    const struct lla_draw given = row_of(LLAISYS_DTYPE_F32, n, &how);
    CHECK(support(&given));
    static struct lla_candidate scratch[64];
    struct lla_draw d = given;
    d.logits = stored;
    d.scratch = scratch;
    for (how.seed = 0; how.seed < DRAWS; how.seed++) {
        how.position = (int32_t)(how.seed * 7);
        counts[lla_cpu_draw(&d)]++;
    }
    double mass = 0, chi = 0, freedom = -1;
    for (size_t i = 0; i < n; i++) mass += weight[i];
    for (size_t i = 0; i < n; i++) {
        const double expected = DRAWS * weight[i] / mass, miss = (double)counts[i] - expected;
        if (weight[i] == 0) {
            CHECK_INT(counts[i], 0);
        } else {
            chi += miss * miss / expected;
            freedom++;
        }
    }
    /* Wilson and Hilferty's approximation at 4.75 standard deviations */
    const double c = 2 / (9 * freedom), limit = freedom * pow(1 - c + 4.75 * sqrt(c), 3);
    if (!(chi < limit)) HARNESS_FAIL("chi-square %.1f of %g degrees of freedom, limit %.1f", chi, freedom, limit);
}

TEST(frequencies) {
    struct rng rng = {9};
    for (size_t i = 0; i < 40; i++) logits[i] = 1.5f * rng_normal(&rng);
    check_frequencies(40, (struct lla_sampling_row){.temperature = 1, .top_p = 1});
    check_frequencies(40, (struct lla_sampling_row){.temperature = 0.6f, .top_p = 1});
    check_frequencies(40, (struct lla_sampling_row){.temperature = 1, .top_p = 1, .top_k = 7});
    check_frequencies(40, (struct lla_sampling_row){.temperature = 1, .top_p = 0.8f});
    check_frequencies(40, (struct lla_sampling_row){.temperature = 1.4f, .top_p = 0.9f, .top_k = 30, .min_p = 0.05f});
    for (int32_t i = 0; i < 10; i++) bias[i] = (struct lla_bias){i, i == 4 ? -INFINITY : 1};
    check_frequencies(40, (struct lla_sampling_row){.temperature = 1, .top_p = 0.97f, .nbias = 10});
    for (size_t i = 0; i < 40; i++) logits[i] = 1;
    check_frequencies(40, (struct lla_sampling_row){.temperature = 1, .top_p = 1});
    check_frequencies(40, (struct lla_sampling_row){.temperature = 1, .top_p = 1, .top_k = 21});
}

/* ---- what it costs ---- */

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int bench(void) {
    enum { VOCAB = 151936, ROUNDS = 31, HISTORY = 4096 };
    static uint16_t row[VOCAB];
    static struct lla_candidate scratch[VOCAB], logprobs[21];
    static int64_t history[HISTORY];
    struct rng rng = {2};
    for (size_t i = 0; i < VOCAB; i++) row[i] = lla_f32_to_bf16(3 * rng_normal(&rng));
    for (size_t i = 0; i < HISTORY; i++) history[i] = (int64_t)rng_below(&rng, VOCAB);
    const struct {
        const char *name;
        struct lla_sampling_row how;
    } cases[] = {{"greedy, with a penalty over 4096 tokens", {.repetition = 1.1f}},
                 {"temperature 1", {.temperature = 1, .top_p = 1}},
                 {"temperature 1, top_k 50", {.temperature = 1, .top_p = 1, .top_k = 50}},
                 {"temperature 1, top_p 0.9", {.temperature = 1, .top_p = 0.9f}},
                 {"temperature 0.6, top_p 0.95", {.temperature = 0.6f, .top_p = 0.95f}},
                 {"the same, top_k 20, min_p 0.05", {.temperature = 0.6f, .top_p = 0.95f, .top_k = 20, .min_p = 0.05f}},
                 {"greedy, 20 log-probabilities", {.nlogprob = 21}},
                 {"everything",
                  {.temperature = 0.6f,
                   .top_p = 0.95f,
                   .top_k = 1000,
                   .min_p = 0.01f,
                   .repetition = 1.1f,
                   .presence = 0.5f,
                   .frequency = 0.5f,
                   .nlogprob = 21}}};
    printf("ms a draw, median of %d, vocabulary %d, bf16, %s\n", ROUNDS, VOCAB, lla_cpu_isa_name());
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct lla_sampling_row how = cases[i].how;
        const struct lla_draw d = {.dtype = LLAISYS_DTYPE_BF16,
                                   .n = VOCAB,
                                   .logits = row,
                                   .how = &how,
                                   .known = history,
                                   .nknown = HISTORY,
                                   .nprompt = HISTORY / 2,
                                   .scratch = scratch,
                                   .logprobs = logprobs};
        double times[ROUNDS];
        for (size_t r = 0; r < ROUNDS; r++) {
            how.seed = r;
            const double begun = seconds();
            lla_cpu_draw(&d);
            double took = seconds() - begun;
            size_t j = r;
            for (; j && times[j - 1] > took; j--) times[j] = times[j - 1];
            times[j] = took;
        }
        printf("%-40s %7.3f\n", cases[i].name, 1e3 * times[ROUNDS / 2]);
    }
    const double begun = seconds();
    size_t sum = 0;
    for (size_t r = 0; r < ROUNDS; r++) sum += lla_isa()->argmax(LLAISYS_DTYPE_BF16, VOCAB, row);
    printf("%-40s %7.3f\n", "greedy alone: the program's own node", 1e3 * (seconds() - begun) / ROUNDS);
    return sum == 0;
}

int main(int argc, char **argv) {
    if (argc > 1 && !strcmp(argv[1], "bench")) return bench();
    return harness_main(argc > 1 ? argv[1] : NULL);
}
