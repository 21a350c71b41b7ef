/* draw.c: the token of one row of logits that is not simply the largest, and log-probabilities (struct lla_draw in
 * kernels.h has the formulas).
 *
 * Nothing is sorted: where a prefix of the sorted row ends is found by a radix selection on the values' bits, eleven,
 * eleven and ten of them at a time. Each pass adds up, for every value of those bits, how many tokens have it, or how
 * much mass, and the bin in which the sum from the top reaches its target is looked into by the next. Masses are
 * integers, so that sums are exact and have no order. */
#include "simd.h"

enum { CHUNK = 256, BINS = 2048, STRETCH = 64 };

size_t LLA_FN(lla_argmax)(llaisysDataType_t dtype, size_t n, const void *values);
void LLA_FN(lla_to_float)(llaisysDataType_t dtype, size_t n, const void *x, float *out);

/* What is left of a row, by token. */
struct list {
    float *value;
    int32_t *token; /* not written yet while the list is the whole row */
    size_t n;
    bool is_row;
    float max, scale; /* weights are 2^((value - max) * scale) */
};

/* A larger value has a larger key; 0 and -0 have one. */
INLINE uint32_t key_of(float value) {
    const uint32_t bits = lla_float_bits(value + 0.0f);
    return bits ^ ((0u - (bits >> 31)) | 0x80000000u);
}

INLINE float value_of(uint32_t key) {
    return lla_bits_float(key >> 31 ? key ^ 0x80000000u : ~key);
}

/* The weights of n <= CHUNK values, none above max, in units of 2^-LLA_WEIGHT_BITS. 2^t = 2^k e^(f ln 2) with k whole
 * and |f| <= 1/2; 24 bits of the latter, by its series, relative error 5e-9 before rounding. Only operations that are
 * rounded alike everywhere. */
static void weigh(const struct list *l, size_t first, size_t n, uint64_t *weight) {
    const float *v = l->value + first, max = l->max, scale = l->scale;
    float power[CHUNK];
    for (size_t i = 0; i < n; i++) { /* by itself, or the compiler makes the bound a branch */
        const float t = (v[i] - max) * scale;
        power[i] = t > -60.0f ? t : -60.0f;
    }
    for (size_t i = 0; i < n; i++) {
        const int32_t k = (int32_t)(power[i] - 0.5f);
        const float x = (power[i] - (float)k) * 0.69314718f;
        float p = 1.0f / 5040;
        p = p * x + 1.0f / 720;
        p = p * x + 1.0f / 120;
        p = p * x + 1.0f / 24;
        p = p * x + 1.0f / 6;
        p = p * x + 0.5f;
        p = p * x + 1.0f;
        p = p * x + 1.0f;
        weight[i] = (uint64_t)(uint32_t)(int32_t)(p * 0x1p24f) << (LLA_WEIGHT_BITS - 24) >> (uint32_t)-k;
    }
}

INLINE size_t chunk_at(const struct list *l, size_t i) {
    return l->n - i < CHUNK ? l->n - i : CHUNK;
}

/* Keeps values of keys above `key` and the first `ties` of that key. Most stretches hold none, which is soon seen. */
static void keep(struct list *l, uint32_t key, uint64_t ties) {
    size_t kept = 0;
    for (size_t i = 0, n; i < l->n; i += n) {
        bool has_any = false;
        n = l->n - i < STRETCH ? l->n - i : STRETCH;
        for (size_t j = i; j < i + n; j++) has_any |= key_of(l->value[j]) >= key;
        for (size_t j = i; has_any && j < i + n; j++) {
            const uint32_t k = key_of(l->value[j]);
            const bool is_tie = k == key && ties;
            l->value[kept] = l->value[j];
            l->token[kept] = l->is_row ? (int32_t)j : l->token[j];
            ties -= is_tie;
            kept += is_tie || k > key;
        }
    }
    l->n = kept;
    l->is_row = false;
}

/* The highest bin where the sum from the top reaches target, which it leaves less what stands above that bin. */
static uint32_t find(const uint64_t *bins, uint32_t nbin, uint64_t *target) {
    uint32_t b = nbin - 1;
    for (; b && bins[b] < *target; b--) *target -= bins[b];
    return b;
}

/* Adds the list's values whose keys begin with `prefix` into bins by the bits behind it. Neighbours go to different
 * sets of bins, since additions to one place wait for each other. */
static void add_up(const struct list *l, bool by_mass, unsigned shift, unsigned bits, uint32_t prefix, uint64_t *bins) {
    enum { SETS = 4 };
    uint64_t sets[SETS][BINS] = {0}, weight[CHUNK];
    uint32_t bin[CHUNK];
    const uint32_t mask = (1u << bits) - 1;
    for (size_t i = 0, n; i < l->n; i += n) {
        n = chunk_at(l, i);
        if (by_mass) weigh(l, i, n, weight);
        for (size_t j = 0; j < n; j++) {
            const uint32_t key = key_of(l->value[i + j]), is_in = (uint64_t)key >> (shift + bits) == prefix;
            bin[j] = key >> shift & mask;
            weight[j] = is_in ? (by_mass ? weight[j] : 1) : 0;
        }
        for (size_t j = 0; j < n; j++) sets[j % SETS][bin[j]] += weight[j];
    }
    for (size_t b = 0; b < BINS; b++) bins[b] = sets[0][b] + sets[1][b] + sets[2][b] + sets[3][b];
}

/* Keeps the smallest prefix of the list in descending order, equal values by token, whose count, or whose mass, reaches
 * target. The first pass looks at all values; the others at what is not below its bin. */
static void cut(struct list *l, bool by_mass, double share, uint64_t target) {
    uint64_t bins[BINS];
    add_up(l, by_mass, 21, 11, 0, bins);
    if (by_mass) {
        uint64_t mass = 0;
        for (size_t b = 0; b < BINS; b++) mass += bins[b];
        const double wanted = ceil(share * (double)mass);
        target = wanted < 1 ? 1 : wanted < (double)mass ? (uint64_t)wanted : mass;
    }
    uint32_t key = find(bins, BINS, &target);
    keep(l, key << 21, l->n);
    add_up(l, by_mass, 10, 11, key, bins);
    key = key << 11 | find(bins, BINS, &target);
    add_up(l, by_mass, 0, 10, key, bins);
    key = key << 10 | find(bins, 1024, &target);
    uint64_t one = 1;
    for (size_t i = 0; by_mass && i < l->n; i++)
        if (key_of(l->value[i]) == key) {
            weigh(l, i, 1, &one);
            break;
        }
    keep(l, key, (target + one - 1) / one);
}

/* Keeps the k largest of a whole row. No less than the k-th largest of its stretches' largest values: there are k of
 * those. Where k is small, little is left to look at closely. */
static void cut_row(struct list *l, size_t k) {
    const size_t count = l->n / STRETCH;
    struct list top = {.value = (float *)l->token, .token = l->token + count, .n = count, .is_row = true};
    if (k <= count / 4) {
        for (size_t i = 0; i < count; i++) {
            uint32_t key = 0; /* as an integer, so that NaN has its place */
            for (size_t j = i * STRETCH; j < (i + 1) * STRETCH; j++)
                key = key_of(l->value[j]) > key ? key_of(l->value[j]) : key;
            top.value[i] = value_of(key);
        }
        cut(&top, false, 0, k);
        uint32_t least = UINT32_MAX;
        for (size_t i = 0; i < top.n; i++) least = key_of(top.value[i]) < least ? key_of(top.value[i]) : least;
        keep(l, least, l->n);
    }
    cut(l, false, 0, k);
}

/* Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11): the first word for a key and a
 * counter. */
static uint32_t philox(uint64_t seed, uint64_t counter) {
    uint32_t c0 = (uint32_t)counter, c1 = (uint32_t)(counter >> 32), c2 = 0, c3 = 0;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        const uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        c0 = n0;
        c2 = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c0;
}

/* The weights of a chunk, with 0 for those below `least`, and their sum. */
static uint64_t mass_of(const struct list *l, size_t first, size_t n, uint64_t least, uint64_t *weight) {
    uint64_t sum = 0;
    weigh(l, first, n, weight);
    for (size_t j = 0; j < n; j++) sum += weight[j] = weight[j] >= least ? weight[j] : 0;
    return sum;
}

static uint64_t mass_of_all(const struct list *l, uint64_t least) {
    uint64_t weight[CHUNK], mass = 0;
    for (size_t i = 0; i < l->n; i += CHUNK) mass += mass_of(l, i, chunk_at(l, i), least, weight);
    return mass;
}

/* The token at a random place of the list's mass, laid out in order of tokens. */
static int32_t pick(const struct list *l, const struct lla_sampling_row *s) {
    const uint64_t least = (uint64_t)ceil((double)s->min_p * (double)((uint64_t)1 << LLA_WEIGHT_BITS));
    uint64_t weight[CHUNK];
    const uint64_t mass = mass_of_all(l, least);
    /* place = floor(mass * random / 2^32), without the product's upper bits being lost */
    const uint64_t random = philox(s->seed, (uint64_t)(uint32_t)s->position);
    uint64_t place = (mass >> 32) * random + ((mass & 0xffffffffu) * random >> 32);
    for (size_t i = 0; i < l->n; i += CHUNK) {
        const size_t n = chunk_at(l, i);
        const uint64_t sum = mass_of(l, i, n, least, weight);
        if (place >= sum) {
            place -= sum;
            continue;
        }
        size_t j = 0;
        for (; place >= weight[j]; j++) place -= weight[j];
        return l->is_row ? (int32_t)(i + j) : l->token[i + j];
    }
    return 0; /* not reached: place < mass */
}

/* The row in f32, -infinity where the mask does not allow a token. */
static void load(const struct lla_draw *d, float *value) {
    LLA_FN(lla_to_float)(d->dtype, d->n, d->logits, value);
    if (!d->mask) return;
    for (size_t i = 0; i < d->n; i += 32) {
        const uint32_t word = d->mask[i / 32];
        const size_t n = d->n - i < 32 ? d->n - i : 32;
        if (word == UINT32_MAX) continue;
        for (size_t j = 0; j < n; j++) value[i + j] = word >> j & 1 ? value[i + j] : -INFINITY;
    }
}

static size_t first_allowed(const struct lla_draw *d) {
    for (size_t i = 0; i < d->n; i++)
        if (d->mask[i / 32] >> i % 32 & 1) return i;
    return 0;
}

/* Bias and penalties; `count` [n] is scratch, set only where a known token needs it. */
static void adjust(const struct lla_draw *d, float *value, int32_t *count) {
    const struct lla_sampling_row *s = d->how;
    for (int32_t i = 0; i < s->nbias; i++) value[d->bias[i].token] += d->bias[i].bias;
    if (!lla_has_penalty(s)) return;
    for (size_t i = 0; i < d->nknown; i++) count[d->known[i]] = 0;
    for (size_t i = d->nprompt; i < d->nknown; i++) count[d->known[i]]++;
    for (size_t i = 0; i < d->nknown; i++) {
        float *v = &value[d->known[i]];
        int32_t *c = &count[d->known[i]];
        if (*c < 0) continue; /* had its turn */
        if (s->repetition > 0) *v = *v > 0 ? *v / s->repetition : *v * s->repetition;
        if (*c) *v = *v - (float)*c * s->frequency - s->presence;
        *c = -1;
    }
}

static int32_t choose(const struct lla_draw *d, struct list *l) {
    const struct lla_sampling_row *s = d->how;
    load(d, l->value);
    adjust(d, l->value, l->token);
    size_t best = LLA_FN(lla_argmax)(LLAISYS_DTYPE_F32, l->n, l->value);
    l->max = l->value[best];
    if (d->mask && l->max == -INFINITY) best = first_allowed(d);
    if (lla_is_greedy(s) || !isfinite(l->max)) return (int32_t)best;
    l->scale = 1.44269504f / s->temperature;
    if (!(l->scale <= 3e38f)) l->scale = 3e38f; /* of the smallest temperatures: 0 * infinity is no number */
    if (s->top_k > 0 && (size_t)s->top_k < l->n) cut_row(l, (size_t)s->top_k);
    if (s->top_p < 1) cut(l, true, (double)s->top_p, 0);
    return pick(l, s);
}

/* Log-probabilities of the allowed logits as they came: the chosen token's, then the largest in order. */
static void report(const struct lla_draw *d, int32_t chosen, struct list *l) {
    const size_t most = (size_t)d->how->nlogprob - 1, top = most < d->n ? most : d->n;
    struct lla_candidate *out = d->logprobs;
    load(d, l->value);
    l->max = l->value[LLA_FN(lla_argmax)(LLAISYS_DTYPE_F32, l->n, l->value)];
    l->scale = 1.44269504f;
    double log_mass = NAN;
    if (isfinite(l->max)) log_mass = log(ldexp((double)mass_of_all(l, 0), -LLA_WEIGHT_BITS)) + (double)l->max;
    out[0] = (struct lla_candidate){(float)((double)l->value[chosen] - log_mass), chosen};
    for (size_t i = top; i < most; i++) out[1 + i] = (struct lla_candidate){-INFINITY, -1};
    if (!top) return;
    if (top < l->n)
        cut_row(l, top);
    else
        keep(l, 0, l->n);
    for (size_t i = 0; i < l->n; i++) { /* insertion: there are few */
        const uint32_t key = key_of(l->value[i]);
        size_t j = i;
        for (; j && key_of(out[j].value) < key; j--) out[j + 1] = out[j];
        out[j + 1] = (struct lla_candidate){l->value[i], l->token[i]};
    }
    for (size_t i = 1; i <= l->n; i++) out[i].value = (float)((double)out[i].value - log_mass);
}

int32_t LLA_FN(lla_draw)(const struct lla_draw *d) {
    float *value = (float *)d->scratch;
    int32_t *token = (int32_t *)(value + d->n);
    const struct list row = {.value = value, .token = token, .n = d->n, .is_row = true};
    struct list l = row;
    const int32_t chosen = choose(d, &l);
    l = row;
    if (d->how->nlogprob) report(d, chosen, &l);
    return chosen;
}
