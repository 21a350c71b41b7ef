/* test_plan.c: where the planner puts buffers and weights, what it gives each rank, and what it refuses. */
#include "../../planner/plan.h"
#include "harness.h"
#include "random.h"

#include <stdlib.h>

static const struct shape {
    const char *label;
    struct lla_spec spec;
} shapes[] = {
    {"0.5b", {LLAISYS_DTYPE_BF16, 24, 896, 14, 2, 64, 4864, 151936, 32768, true, 1e-6f, 1e6, {151645}, 1}},
    {"1.5b", {LLAISYS_DTYPE_BF16, 28, 1536, 12, 2, 128, 8960, 151936, 131072, false, 1e-6f, 1e4, {151643}, 1}},
    {"7b", {LLAISYS_DTYPE_F16, 28, 3584, 28, 4, 128, 18944, 152064, 131072, false, 1e-6f, 1e4, {151643}, 1}},
    {"14b", {LLAISYS_DTYPE_BF16, 48, 5120, 40, 8, 128, 13824, 152064, 131072, false, 1e-5f, 1e6, {151643}, 1}},
    {"32b", {LLAISYS_DTYPE_BF16, 64, 5120, 40, 8, 128, 27648, 152064, 131072, false, 1e-5f, 1e6, {151643}, 1}},
    {"odd", {LLAISYS_DTYPE_F32, 2, 36, 6, 3, 10, 42, 101, 512, true, 1e-6f, 1e4, {0}, 0}},
};
enum { NSHAPE = sizeof shapes / sizeof *shapes };

static size_t aligned(size_t n) {
    return (n + LLA_ALIGN - 1) / LLA_ALIGN * LLA_ALIGN;
}

/* ---- lla_layout ---- */

static bool meet(const struct lla_buffer *a, const struct lla_buffer *b) {
    return a->first <= b->last && b->first <= a->last;
}

TEST(layout_of_random_buffers) {
    enum { CASES = 4000, MOST = 40 };
    struct rng rng = {11};
    size_t shared = 0;
    for (int round = 0; round < CASES && !TEST_FAILURES; round++) {
        struct lla_buffer buffers[MOST] = {0};
        const size_t n = rng_below(&rng, MOST + 1), nnode = rng_range(&rng, 1, 30);
        size_t total, end = 0, sum = 0, live_peak = 0;
        for (size_t i = 0; i < n; i++) {
            buffers[i].kind = LLA_R_ACTIVATION;
            buffers[i].nbytes = rng_below(&rng, 5) ? rng_below(&rng, 5000) : rng_below(&rng, 4) * LLA_ALIGN;
            buffers[i].first = rng_below(&rng, nnode);
            buffers[i].last = rng_range(&rng, buffers[i].first, nnode - 1);
            buffers[i].offset = 12345; /* must not matter */
            sum += aligned(buffers[i].nbytes);
        }
        CHECK_INT(lla_layout(buffers, n, &total), LLA_OK);
        for (size_t i = 0; i < n; i++) {
            const struct lla_buffer *a = &buffers[i];
            CHECK_INT(a->offset % LLA_ALIGN, 0);
            if (a->offset + aligned(a->nbytes) > end) end = a->offset + aligned(a->nbytes);
            for (size_t j = i + 1; j < n; j++) {
                const struct lla_buffer *b = &buffers[j];
                const bool overlap =
                    a->nbytes && b->nbytes && a->offset < b->offset + b->nbytes && b->offset < a->offset + a->nbytes;
                CHECK(!overlap || !meet(a, b));
                shared += overlap;
            }
        }
        CHECK_INT(total, end);
        CHECK(total <= sum);
        for (size_t node = 0; node < nnode; node++) {
            size_t live = 0;
            for (size_t i = 0; i < n; i++)
                if (buffers[i].first <= node && node <= buffers[i].last) live += buffers[i].nbytes;
            if (live > live_peak) live_peak = live;
        }
        CHECK(total >= live_peak);
    }
    CHECK(shared > CASES); /* bytes are shared at all */
}

TEST(layout_is_the_same_every_time) {
    struct lla_buffer a[3] = {{.nbytes = 300, .first = 0, .last = 1},
                              {.nbytes = 1000, .first = 1, .last = 2},
                              {.nbytes = 300, .first = 2, .last = 3}};
    size_t total;
    CHECK_INT(lla_layout(a, 3, &total), LLA_OK);
    CHECK_INT(a[1].offset, 0);
    CHECK_INT(a[0].offset, 1024);
    CHECK_INT(a[2].offset, 1024); /* lives after a[0] */
    CHECK_INT(total, 1024 + 512);
}

/* ---- limits ---- */

static struct lla_limits resolved(const struct lla_spec *spec, struct lla_limits limits) {
    CHECK_INT(lla_limits_resolve(spec, &limits), LLA_OK);
    return limits;
}

static const char *refused(const struct lla_spec *spec, struct lla_limits limits) {
    lla_clear_error();
    CHECK(lla_limits_resolve(spec, &limits));
    return lla_last_error();
}

TEST(limits_defaults) {
    const struct lla_spec *small = &shapes[5].spec, *large = &shapes[1].spec;
    struct lla_limits l = resolved(large, (struct lla_limits){0});
    CHECK_INT(l.max_seq, 4096);
    CHECK_INT(l.max_seqs, 1);
    CHECK_INT(l.kv_block, 32);
    CHECK_INT(l.kv_tokens, 4096);
    CHECK_INT(l.prefill_chunk, 512);
    l = resolved(small, (struct lla_limits){0});
    CHECK_INT(l.max_seq, 512);
    CHECK_INT(l.kv_tokens, 512);
    l = resolved(small, (struct lla_limits){.max_seq = 100});
    CHECK_INT(l.prefill_chunk, 100);
    CHECK_INT(l.kv_tokens, 128); /* whole blocks */
    l = resolved(small, (struct lla_limits){.max_seq = 100, .kv_tokens = 1001, .kv_block = 16});
    CHECK_INT(l.kv_tokens, 1008);
    const struct lla_limits again = resolved(small, l);
    CHECK(!memcmp(&again, &l, sizeof l)); /* resolved limits stay as they are */
}

/* Where nothing is said, every sequence can reach its limit. */
TEST(limits_default_kv_holds_every_sequence) {
    struct rng rng = {3};
    for (int round = 0; round < 500; round++) {
        struct lla_limits l = {.max_seq = rng_range(&rng, 1, 512),
                               .max_seqs = rng_range(&rng, 1, 20),
                               .kv_block = (size_t)1 << rng_below(&rng, 9)};
        struct lla_plan plan = {.limits = resolved(&shapes[5].spec, l)};
        lla_plan_blocks(&plan);
        CHECK(plan.max_blocks * plan.limits.kv_block >= plan.limits.max_seq);
        CHECK(plan.nblock - 1 >= plan.max_blocks * plan.limits.max_seqs);
        if (TEST_FAILURES) return;
    }
}

TEST(limits_refused) {
    const struct lla_spec *s = &shapes[5].spec; /* a context of 512 */
    CHECK_STR_HAS(refused(s, (struct lla_limits){.max_seq = 513}),
                  "max_seq is 513 tokens, but the model was made for a context of 512");
    CHECK_STR_HAS(refused(s, (struct lla_limits){.max_seqs = 4097}), "max_seqs is 4097, expected at most 4096");
    CHECK_STR_HAS(refused(s, (struct lla_limits){.kv_block = 24}), "kv_block is 24 tokens, expected a power of two");
    CHECK_STR_HAS(refused(s, (struct lla_limits){.kv_block = 512}), "kv_block is 512");
    CHECK_STR_HAS(refused(s, (struct lla_limits){.prefill_chunk = 65537}), "prefill_chunk is 65537");
    CHECK_STR_HAS(refused(s, (struct lla_limits){.max_seq = 200, .kv_tokens = 100}),
                  "kv_tokens is 128, which does not hold one sequence of max_seq = 200 tokens");
    CHECK_STR_HAS(refused(s, (struct lla_limits){.kv_tokens = ((size_t)1 << 31) + 1}), "expected at most 2^30");
}

TEST(fit_says_which_limit_to_lower) {
    struct lla_plan plan = {.total = 1000 << 20, .weight_bytes = 600 << 20};
    plan.kv_bytes = 300 << 20, plan.activation_bytes = 100 << 20;
    CHECK_INT(lla_plan_fit(&plan, plan.total), LLA_OK);
    CHECK_INT(lla_plan_fit(&plan, plan.total - 1), LLA_ENOMEM);
    CHECK_STR_HAS(lla_last_error(), "needs 1048576000 bytes (1000.0 MiB: weights 600.0, KV cache 300.0, activations");
    CHECK_STR_HAS(lla_last_error(), "1048575999 (1000.0 MiB) are available; lower max_seq or kv_tokens");
    plan.kv_bytes = 100 << 20, plan.activation_bytes = 300 << 20;
    CHECK_INT(lla_plan_fit(&plan, 800 << 20), LLA_ENOMEM);
    CHECK_STR_HAS(lla_last_error(), "lower prefill_chunk or max_seqs");
    CHECK_INT(lla_plan_fit(&plan, 500 << 20), LLA_ENOMEM);
    CHECK_STR_HAS(lla_last_error(), "the weights alone do not fit");
}

/* ---- lla_plan_make ---- */

static void check_regions(const struct lla_plan *plan, const char *label) {
    size_t sum = plan->activation_bytes, kv = 0, weights = 0, end = 0;
    for (size_t i = 0; i < plan->nregion; i++) {
        const struct lla_region *a = &plan->regions[i];
        CHECK_INT(a->offset % LLA_ALIGN, 0);
        CHECK(a->offset + a->nbytes <= plan->total);
        CHECK(a->first <= a->last && a->last < plan->nnode);
        if (a->kind != LLA_R_ACTIVATION) {
            CHECK_INT(a->offset, end); /* side by side, in order */
            end = a->offset + aligned(a->nbytes);
            sum += aligned(a->nbytes);
            CHECK(a->first == 0 && a->last == plan->nnode - 1);
        }
        kv += a->kind == LLA_R_KV ? a->nbytes : 0;
        weights += a->kind == LLA_R_WEIGHT ? aligned(a->nbytes) : 0;
        for (size_t j = i + 1; j < plan->nregion; j++) {
            const struct lla_region *b = &plan->regions[j];
            if (a->offset >= b->offset + b->nbytes || b->offset >= a->offset + a->nbytes) continue;
            CHECK(a->kind == LLA_R_ACTIVATION && b->kind == LLA_R_ACTIVATION);
            CHECK(a->last < b->first || b->last < a->first);
        }
        if (TEST_FAILURES) {
            fprintf(stderr, "in the plan of %s, region %s\n", label, a->name);
            return;
        }
    }
    CHECK_INT(plan->total, sum);
    CHECK_INT(plan->kv_bytes, kv);
    CHECK_INT(plan->weight_bytes, weights);
    CHECK(plan->activation_bytes <= plan->activation_sum);
}

/* Random buffers of every kind around the weights. */
TEST(plans_do_not_overlap) {
    struct rng rng = {17};
    for (int round = 0; round < 300 && !TEST_FAILURES; round++) {
        enum { N = 12, NODES = 8 };
        struct lla_buffer buffers[N] = {0};
        struct lla_plan plan;
        const struct shape *shape = &shapes[round % NSHAPE];
        const struct lla_limits limits = {.max_seq = rng_range(&rng, 1, 512), .max_seqs = rng_range(&rng, 1, 9)};
        for (size_t i = 0; i < N; i++) {
            buffers[i].name = "buffer";
            buffers[i].kind = (enum lla_region_kind)rng_range(&rng, LLA_R_TABLE, LLA_R_ACTIVATION);
            buffers[i].nbytes = rng_below(&rng, 100000);
            buffers[i].first = rng_below(&rng, NODES);
            buffers[i].last = rng_range(&rng, buffers[i].first, NODES - 1);
        }
        CHECK_INT(lla_plan_make(&shape->spec, &limits, (struct lla_shard){0, 1}, buffers, N, NODES, &plan), LLA_OK);
        check_regions(&plan, shape->label);
        for (size_t i = 0; i < N; i++) {
            bool found = false;
            for (size_t r = 0; r < plan.nregion; r++)
                found |= plan.regions[r].offset == buffers[i].offset && plan.regions[r].nbytes == buffers[i].nbytes &&
                         plan.regions[r].kind == buffers[i].kind;
            CHECK(found);
        }
        lla_plan_free(&plan);
    }
}

TEST(tied_heads_share_the_embedding) {
    for (size_t i = 0; i < NSHAPE; i++) {
        const struct lla_spec *s = &shapes[i].spec;
        struct lla_plan plan;
        CHECK_INT(lla_plan_make(s, &(struct lla_limits){0}, (struct lla_shard){0, 1}, NULL, 0, 8, &plan), LLA_OK);
        const struct lla_weight *embed = lla_plan_weight(&plan, LLA_W_EMBED, 0),
                                *head = lla_plan_weight(&plan, LLA_W_HEAD, 0);
        CHECK_INT(head->kind, LLA_W_HEAD);
        CHECK_INT(head->offset == embed->offset, s->tied);
        CHECK_INT(head->nbytes, s->vocab * s->hidden * lla_dtype_size(s->dtype));
        CHECK_INT(plan.nregion, plan.nweight - s->tied);
        CHECK(!strcmp(head->parts[0].name, s->tied ? "model.embed_tokens.weight" : "lm_head.weight"));
        for (size_t l = 0; l < s->nlayer; l++)
            for (int k = LLA_W_ATTN_NORM; k <= LLA_W_DOWN; k++) {
                const struct lla_weight *w = lla_plan_weight(&plan, (enum lla_weight_kind)k, l);
                CHECK_INT(w->kind, k);
                CHECK_INT(w->layer, l);
            }
        CHECK_INT(lla_plan_weight(&plan, LLA_W_NORM, 0)->kind, LLA_W_NORM);
        lla_plan_free(&plan);
    }
}

TEST(impossible_plans) {
    struct lla_plan plan;
    struct lla_spec spec = shapes[5].spec;
    spec.head_dim = 9;
    CHECK(lla_plan_make(&spec, &(struct lla_limits){0}, (struct lla_shard){0, 1}, NULL, 0, 8, &plan));
    CHECK_STR_HAS(lla_last_error(), "head_dim");
    CHECK(lla_plan_make(&shapes[5].spec, &(struct lla_limits){.max_seq = 1000}, (struct lla_shard){0, 1}, NULL, 0, 8,
                        &plan));
    CHECK_STR_HAS(lla_last_error(), "max_seq");
    CHECK(lla_plan_make(&shapes[5].spec, &(struct lla_limits){0}, (struct lla_shard){2, 2}, NULL, 0, 8, &plan));
    CHECK_STR_HAS(lla_last_error(), "rank 2 of 2");
}

/* ---- tensor parallelism ---- */

/* How often the ranks together hold each element of a source tensor: a part takes whole rows or whole columns. */
struct cover {
    char name[LLA_NAME];
    size_t rows, cols, *by_row, *by_col;
};

static void cover_add(struct cover *c, const struct lla_weight_part *p) {
    if (!c->by_row) {
        memcpy(c->name, p->name, sizeof c->name);
        c->rows = p->full_rows, c->cols = p->full_cols;
        c->by_row = calloc(c->rows, sizeof *c->by_row);
        c->by_col = calloc(c->cols, sizeof *c->by_col);
    }
    CHECK(!strcmp(c->name, p->name));
    CHECK_INT(c->rows, p->full_rows);
    CHECK_INT(c->cols, p->full_cols);
    CHECK(p->row0 + p->rows <= p->full_rows && p->col0 + p->cols <= p->full_cols);
    if (p->cols == p->full_cols)
        for (size_t r = 0; r < p->rows; r++) c->by_row[p->row0 + r]++;
    else {
        CHECK_INT(p->rows, p->full_rows);
        for (size_t i = 0; i < p->cols; i++) c->by_col[p->col0 + i]++;
    }
}

/* An element is held by_row + by_col times: the same everywhere where both are. */
static void cover_check(struct cover *c, size_t times) {
    size_t wrong = 0;
    for (size_t r = 0; r < c->rows; r++) wrong += c->by_row[r] + c->by_col[0] != times;
    for (size_t i = 0; i < c->cols; i++) wrong += c->by_row[0] + c->by_col[i] != times;
    if (wrong) HARNESS_FAIL("%s: %zu rows and columns are not held %zu times", c->name, wrong, times);
    free(c->by_row);
    free(c->by_col);
}

/* A rank's query heads must find their own KV heads, at the same place in the group. */
static void check_heads(const struct lla_plan *p, const struct lla_spec *s) {
    const size_t group = s->nhead / s->nkvhead, mine = p->nhead / p->nkvhead;
    CHECK_INT(p->nhead % p->nkvhead, 0);
    for (size_t h = 0; h < p->nhead; h++) CHECK_INT((p->shard.rank * p->nhead + h) / group, p->kvhead0 + h / mine);
}

static void check_degree(const struct shape *shape, size_t degree) {
    const struct lla_spec *s = &shape->spec;
    const size_t layers[] = {0, s->nlayer - 1}, kv_times = degree > s->nkvhead ? degree / s->nkvhead : 1;
    struct cover covers[2][LLA_W_KINDS][LLA_MAX_PARTS] = {0};
    size_t vocab = 0;
    for (size_t rank = 0; rank < degree; rank++) {
        struct lla_plan plan;
        const struct lla_limits limits = {.max_seq = 100};
        CHECK_INT(lla_plan_make(s, &limits, (struct lla_shard){rank, degree}, NULL, 0, 8, &plan), LLA_OK);
        check_heads(&plan, s);
        CHECK_INT(plan.vocab0, vocab);
        vocab += plan.vocab;
        for (size_t i = 0; i < plan.nweight; i++) {
            const struct lla_weight *w = &plan.weights[i];
            size_t rows = 0;
            for (size_t j = 0; j < w->nparts; j++) {
                CHECK_INT(w->parts[j].dst_row, rows);
                CHECK_INT(w->parts[j].cols, w->cols);
                CHECK_INT(w->parts[j].ndim, w->parts[j].full_cols == 1 ? 1 : 2);
                rows += w->parts[j].rows;
                for (size_t l = 0; l < 2; l++)
                    if (w->layer == layers[l]) cover_add(&covers[l][w->kind][j], &w->parts[j]);
            }
            CHECK_INT(w->rows, rows);
            CHECK_INT(w->nbytes, w->rows * w->cols * lla_dtype_size(s->dtype));
        }
        const struct lla_weight *head = lla_plan_weight(&plan, LLA_W_HEAD, 0);
        if (s->tied)
            CHECK_INT(head->offset, plan.weights[0].offset + plan.vocab0 * s->hidden * lla_dtype_size(s->dtype));
        check_regions(&plan, shape->label);
        lla_plan_free(&plan);
    }
    CHECK_INT(vocab, s->vocab);
    for (size_t l = 0; l < 2; l++)
        for (size_t k = 0; k < LLA_W_KINDS; k++)
            for (size_t j = 0; j < LLA_MAX_PARTS; j++) {
                const bool is_kv = (k == LLA_W_QKV || k == LLA_W_QKV_BIAS) && j > 0;
                const bool whole = k == LLA_W_EMBED || k == LLA_W_ATTN_NORM || k == LLA_W_MLP_NORM || k == LLA_W_NORM;
                if (covers[l][k][j].by_row) cover_check(&covers[l][k][j], whole ? degree : is_kv ? kv_times : 1);
            }
    if (TEST_FAILURES) fprintf(stderr, "in %s, degree %zu\n", shape->label, degree);
}

TEST(ranks_hold_every_weight) {
    static const size_t degrees[NSHAPE][8] = {{1, 2, 14}, {1, 2, 4}, {1, 2, 4}, {1, 2, 4, 8}, {1, 2, 4, 8}, {1, 3, 6}};
    for (size_t i = 0; i < NSHAPE; i++)
        for (size_t d = 0; degrees[i][d] && !TEST_FAILURES; d++)
            if (shapes[i].spec.ffn % degrees[i][d] == 0) check_degree(&shapes[i], degrees[i][d]);
}

static const char *shard_refused(const struct lla_spec *spec, size_t rank, size_t degree) {
    struct lla_plan plan = {0};
    lla_clear_error();
    CHECK(lla_plan_shard(spec, (struct lla_shard){rank, degree}, &plan));
    return lla_last_error();
}

TEST(degrees_refused) {
    const struct lla_spec *half = &shapes[0].spec, *seven = &shapes[2].spec, *forty = &shapes[3].spec;
    CHECK_STR_HAS(shard_refused(half, 0, 4), "14 query heads do not divide by the tensor-parallel degree 4");
    CHECK_STR_HAS(shard_refused(half, 0, 7), "2 KV heads and the tensor-parallel degree 7");
    CHECK_STR_HAS(shard_refused(seven, 0, 8), "28 query heads do not divide");
    CHECK_STR_HAS(shard_refused(seven, 0, 14), "4 KV heads and the tensor-parallel degree 14");
    CHECK_STR_HAS(shard_refused(forty, 0, 16), "40 query heads do not divide");
    CHECK_STR_HAS(shard_refused(forty, 0, 5), "8 KV heads and the tensor-parallel degree 5");
    struct lla_spec odd = shapes[5].spec;
    CHECK_STR_HAS(shard_refused(&odd, 3, 3), "rank 3 of 3");
    CHECK_STR_HAS(shard_refused(&odd, 0, 0), "rank 0 of 0");
    odd.ffn = 41;
    CHECK_STR_HAS(shard_refused(&odd, 0, 3), "an FFN of 41 columns does not divide by the tensor-parallel degree 3");
    odd.ffn = 42, odd.vocab = 2;
    CHECK_STR_HAS(shard_refused(&odd, 0, 3), "a vocabulary of 2 is smaller");
}

RUN_TESTS()
