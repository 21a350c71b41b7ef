/* test_attention.c: the CPU's attention of every instruction set: near to a double-precision reference, and to the bit
 * the same whichever rows stand together and however splits are shared out. */
#include "harness.h"
#include "kernels.h"

static const llaisysDataType_t dtypes[] = {LLAISYS_DTYPE_BF16, LLAISYS_DTYPE_F16, LLAISYS_DTYPE_F32};

/* A KV cache of blocks in random order; what no row may see is NaN. */
struct attention_case {
    struct lla_attention a;
    size_t element, nblock, block;
    char *q, *out;
    int32_t table[1024];
};

static void cache_fill(struct attention_case *c, char *cache, size_t dim, size_t block_stride, size_t token_stride,
                       size_t total, struct rng *rng) {
    for (size_t t = 0; t < total; t++)
        for (size_t i = 0; i < dim; i++)
            lla_store_float(cache, (size_t)c->table[t / c->block] * block_stride + t % c->block * token_stride + i,
                            rng_normal(rng), c->a.dtype);
}

static void make_case(struct attention_case *c, struct rng *rng, int round) {
    static const size_t dims[] = {16, 24, 64, 128, 2, 10, 33, 80};
    struct lla_attention *a = &c->a;
    memset(a, 0, sizeof *a);
    a->dtype = dtypes[rng_below(rng, 3)];
    c->element = lla_dtype_size(a->dtype);
    a->group = round % 10 == 9 ? rng_range(rng, 20, 60) : rng_range(rng, 1, 7);
    a->nrow = round % 3 ? 1 : rng_range(rng, 1, 20);
    a->position0 = rng_below(rng, round % 2 ? 700 : 60);
    a->dim = dims[rng_below(rng, 8)], a->vdim = rng_below(rng, 3) ? a->dim : dims[rng_below(rng, 8)];
    a->scale = 1 / sqrtf((float)a->dim);
    a->kv_shift = rng_below(rng, 9);
    c->block = (size_t)1 << a->kv_shift;
    const size_t heads = rng_range(rng, 1, 3), head = rng_below(rng, heads), total = a->position0 + a->nrow;
    const size_t used = (total + c->block - 1) / c->block;
    c->nblock = used + 3;
    for (size_t b = 0; b < c->nblock; b++) c->table[b] = (int32_t)b;
    rng_shuffle(rng, c->table, c->nblock);
    a->table = c->table;
    /* this KV head is one of several of a block, as in the engine's cache, or of a token, as in the operator's */
    const bool by_block = rng_below(rng, 2);
    a->k_token_stride = by_block ? a->dim : heads * a->dim;
    a->v_token_stride = by_block ? a->vdim : heads * a->vdim;
    a->k_block_stride = heads * c->block * a->dim;
    a->v_block_stride = heads * c->block * a->vdim;
    char *k = guarded(0, c->nblock * a->k_block_stride * c->element);
    char *v = guarded(1, c->nblock * a->v_block_stride * c->element);
    a->k = k + head * (by_block ? c->block : 1) * a->dim * c->element;
    a->v = v + head * (by_block ? c->block : 1) * a->vdim * c->element;
    cache_fill(c, (char *)a->k, a->dim, a->k_block_stride, a->k_token_stride, total, rng);
    cache_fill(c, (char *)a->v, a->vdim, a->v_block_stride, a->v_token_stride, total, rng);
    a->q_stride = heads * a->group * a->dim;
    a->out_stride = heads * a->group * a->vdim;
    const size_t rest = (heads - 1) * a->group; /* the last row has no other heads behind it */
    c->q = guarded(2, (a->nrow * a->q_stride - rest * a->dim) * c->element);
    c->out = guarded(3, (a->nrow * a->out_stride - rest * a->vdim) * c->element);
    a->q = c->q, a->out = c->out;
    const float size = rng_below(rng, 4) ? 1.0f : 8.0f; /* sharp softmax, too */
    for (size_t i = 0; i < a->nrow; i++)
        for (size_t j = 0; j < a->group * a->dim; j++)
            lla_store_float(c->q, i * a->q_stride + j, size * rng_normal(rng), a->dtype);
}

static double k_at(const struct attention_case *c, size_t t, size_t i) {
    const struct lla_attention *a = &c->a;
    return (double)lla_load_float(
        a->k, (size_t)c->table[t / c->block] * a->k_block_stride + t % c->block * a->k_token_stride + i, a->dtype);
}

static double v_at(const struct attention_case *c, size_t t, size_t i) {
    const struct lla_attention *a = &c->a;
    return (double)lla_load_float(
        a->v, (size_t)c->table[t / c->block] * a->v_block_stride + t % c->block * a->v_token_stride + i, a->dtype);
}

static void check_query(const struct lla_isa *isa, const struct attention_case *c, size_t row, size_t head) {
    const struct lla_attention *a = &c->a;
    const size_t limit = a->position0 + row + 1;
    double score[1024], top = -INFINITY, sum = 0;
    for (size_t t = 0; t < limit; t++) {
        score[t] = 0;
        for (size_t i = 0; i < a->dim; i++)
            score[t] += (double)lla_load_float(c->q, row * a->q_stride + head * a->dim + i, a->dtype) * k_at(c, t, i);
        score[t] *= (double)a->scale;
        if (score[t] > top) top = score[t];
    }
    for (size_t t = 0; t < limit; t++) sum += score[t] = exp(score[t] - top);
    for (size_t i = 0; i < a->vdim; i++) {
        double expected = 0;
        for (size_t t = 0; t < limit; t++) expected += score[t] / sum * v_at(c, t, i);
        const float got = lla_load_float(c->out, row * a->out_stride + head * a->vdim + i, a->dtype);
        const double half = a->dtype == LLAISYS_DTYPE_BF16 ? 0x1p-8 : a->dtype == LLAISYS_DTYPE_F16 ? 0x1p-11 : 0;
        if (fabs((double)got - expected) <= fabs(expected) * half + 3e-5) continue;
        HARNESS_FAIL("%s %s attention of %zu/%zu, row %zu of %zu at %zu, head %zu of %zu: [%zu] is %g, expected %g",
                     isa->name, lla_dtype_name(a->dtype), a->dim, a->vdim, row, a->nrow, a->position0, head, a->group,
                     i, (double)got, expected);
        return;
    }
}

TEST(near_the_reference) {
    struct rng rng = {41};
    static struct attention_case c;
    for (int round = 0; round < (SLOW ? 40 : 200); round++) EACH_ISA(isa) {
            make_case(&c, &rng, round);
            isa->attention(&c.a);
            for (size_t row = 0; row < c.a.nrow; row += 5)
                for (size_t head = 0; head < c.a.group; head += 3) check_query(isa, &c, row, head);
            if (TEST_FAILURES > 5) return;
        }
}

/* Rows alone, and rows as splits that are merged, against rows together. */
TEST(the_same_to_the_bit) {
    struct rng rng = {42};
    static struct attention_case c;
    static float partial[4 * 60 * (128 + 2)];
    size_t several = 0;
    for (int round = 0; round < (SLOW ? 60 : 400); round++) EACH_ISA(isa) {
            make_case(&c, &rng, round);
            isa->attention(&c.a);
            const size_t row_bytes = c.a.group * c.a.vdim * c.element;
            char *other = guarded(4, row_bytes);
            for (size_t row = 0; row < c.a.nrow; row++) {
                struct lla_attention one = c.a;
                one.nrow = 1;
                one.position0 = c.a.position0 + row;
                one.q = c.q + row * c.a.q_stride * c.element;
                one.out = other;
                const char *together = c.out + row * c.a.out_stride * c.element;
                memset(other, 0xff, row_bytes);
                isa->attention(&one);
                if (memcmp(together, other, row_bytes))
                    HARNESS_FAIL("%s: row %zu differs when it is alone", isa->name, row);

                const size_t nsplit = one.position0 / LLA_ATTN_SPLIT + 1, part = c.a.group * (c.a.vdim + 2);
                const size_t stride = part + rng_below(&rng, 2) * 10;
                several += nsplit > 1;
                memset(partial, 0xff, sizeof partial);
                if (nsplit * stride > sizeof partial / sizeof *partial) continue;
                for (size_t s = nsplit; s-- > 0;) isa->attention_split(&one, s, partial + s * stride);
                memset(other, 0xff, row_bytes);
                isa->attention_merge(&one, nsplit, partial, stride);
                if (memcmp(together, other, row_bytes))
                    HARNESS_FAIL("%s %s: row %zu at %zu differs when it is made of %zu splits", isa->name,
                                 lla_dtype_name(c.a.dtype), row, one.position0, nsplit);
            }
            if (TEST_FAILURES > 5) return;
        }
    CHECK(several > 100);
}

/* Rows of any position: the last one before, and the first one behind, the end of a vector, a block and a split. */
TEST(every_length) {
    struct rng rng = {43};
    static struct attention_case c;
    for (size_t position = 0; position < 530; position += position % 64 < 35 || position > 250 ? 1 : 7) EACH_ISA(isa) {
            do make_case(&c, &rng, 1);
            while (c.a.position0 < position || c.a.dim > 24 || c.a.vdim > 24);
            c.a.position0 = position;
            isa->attention(&c.a);
            check_query(isa, &c, 0, c.a.group - 1);
            if (TEST_FAILURES > 5) return;
        }
}

RUN_TESTS()
