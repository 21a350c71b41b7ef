/* plan.c: shards the weights, places buffers by lifetime, and lays the arena out. */
#include "plan.h"

#include <stdlib.h>

static size_t round_up(size_t n, size_t unit) {
    return (n + unit - 1) / unit * unit;
}

static size_t align_up(size_t n) {
    return round_up(n, LLA_ALIGN);
}

static size_t min_size(size_t a, size_t b) {
    return a < b ? a : b;
}

lla_status lla_limits_resolve(const struct lla_spec *spec, struct lla_limits *limits) {
    /* a GPU's products want rows: with 512 a step's tiles do not fill an H100 (profiles/prefill.md) */
    const size_t default_seq = 4096, default_chunk = limits->device == LLAISYS_DEVICE_CPU ? 512 : 2048,
                 default_block = 32;
    if (!limits->max_seq) limits->max_seq = min_size(spec->max_position, default_seq);
    if (!limits->max_seqs) limits->max_seqs = 1;
    if (!limits->kv_block) limits->kv_block = default_block;
    if (!limits->kv_tokens) limits->kv_tokens = round_up(limits->max_seq, limits->kv_block) * limits->max_seqs;
    if (!limits->prefill_chunk) limits->prefill_chunk = min_size(default_chunk, limits->max_seq);
    LLA_REQUIRE(limits->max_seq <= spec->max_position, LLA_ELIMIT,
                "max_seq is %zu tokens, but the model was made for a context of %zu", limits->max_seq,
                spec->max_position);
    LLA_REQUIRE(limits->max_seqs <= 4096, LLA_ELIMIT, "max_seqs is %zu, expected at most 4096", limits->max_seqs);
    LLA_REQUIRE((limits->kv_block & (limits->kv_block - 1)) == 0 && limits->kv_block <= 256, LLA_EINVAL,
                "kv_block is %zu tokens, expected a power of two up to 256", limits->kv_block);
    LLA_REQUIRE(limits->prefill_chunk <= 65536, LLA_ELIMIT, "prefill_chunk is %zu tokens, expected at most 65536",
                limits->prefill_chunk);
    limits->kv_tokens = (limits->kv_tokens + limits->kv_block - 1) / limits->kv_block * limits->kv_block;
    LLA_REQUIRE(limits->kv_tokens >= limits->max_seq, LLA_ELIMIT,
                "kv_tokens is %zu, which does not hold one sequence of max_seq = %zu tokens", limits->kv_tokens,
                limits->max_seq);
    LLA_REQUIRE(limits->kv_tokens <= (size_t)1 << 30, LLA_ELIMIT, "kv_tokens is %zu, expected at most 2^30",
                limits->kv_tokens);
    return LLA_OK;
}

lla_status lla_plan_shard(const struct lla_spec *spec, struct lla_shard shard, struct lla_plan *plan) {
    const size_t n = shard.degree, r = shard.rank;
    LLA_REQUIRE(n >= 1 && r < n, LLA_EINVAL, "tensor-parallel rank %zu of %zu, expected a rank below a positive degree",
                r, n);
    LLA_REQUIRE(spec->nhead % n == 0, LLA_EINVAL, "%zu query heads do not divide by the tensor-parallel degree %zu",
                spec->nhead, n);
    LLA_REQUIRE(spec->nkvhead % n == 0 || n % spec->nkvhead == 0, LLA_EINVAL,
                "%zu KV heads and the tensor-parallel degree %zu: expected one to divide by the other", spec->nkvhead,
                n);
    LLA_REQUIRE(spec->ffn % n == 0, LLA_EINVAL,
                "an FFN of %zu columns does not divide by the tensor-parallel degree %zu", spec->ffn, n);
    LLA_REQUIRE(spec->vocab >= n, LLA_EINVAL, "a vocabulary of %zu is smaller than the tensor-parallel degree %zu",
                spec->vocab, n);
    plan->shard = shard;
    plan->nhead = spec->nhead / n;
    if (spec->nkvhead >= n) {
        plan->nkvhead = spec->nkvhead / n;
        plan->kvhead0 = r * plan->nkvhead;
    } else { /* ranks outnumber KV heads: each KV head is held by n / nkvhead ranks */
        plan->nkvhead = 1;
        plan->kvhead0 = r / (n / spec->nkvhead);
    }
    plan->ffn = spec->ffn / n;
    plan->vocab0 = spec->vocab * r / n;
    plan->vocab = spec->vocab * (r + 1) / n - plan->vocab0;
    return LLA_OK;
}

void lla_plan_blocks(struct lla_plan *plan) {
    const struct lla_limits *l = &plan->limits;
    plan->max_blocks = (l->max_seq + l->kv_block - 1) / l->kv_block;
    plan->nblock = l->kv_tokens / l->kv_block + 1;
    plan->max_rows = l->prefill_chunk > l->max_seqs ? l->prefill_chunk : l->max_seqs;
}

/* ---- weights ---- */

static void part(struct lla_weight *w, const char *name, size_t layer, size_t full_rows, size_t full_cols, size_t row0,
                 size_t rows, size_t col0, size_t cols) {
    struct lla_weight_part *p = &w->parts[w->nparts++];
    const bool is_vector = strstr(name, "norm") || strstr(name, ".bias");
    *p = (struct lla_weight_part){.ndim = is_vector ? 1 : 2,
                                  .full_rows = full_rows,
                                  .full_cols = full_cols,
                                  .row0 = row0,
                                  .rows = rows,
                                  .col0 = col0,
                                  .cols = cols,
                                  .dst_row = w->rows};
    snprintf(p->name, sizeof p->name, name, layer);
    w->rows += rows;
    w->cols = cols;
}

#define LAYER "model.layers.%zu."

/* The weights of this rank, in the order in which a step reads them. */
static void list_weights(struct lla_plan *plan) {
    const struct lla_spec *s = &plan->spec;
    const size_t h = s->hidden, q = s->nhead * s->head_dim, kv = s->nkvhead * s->head_dim;
    const size_t my_q = plan->nhead * s->head_dim, q0 = plan->shard.rank * my_q;
    const size_t my_kv = plan->nkvhead * s->head_dim, kv0 = plan->kvhead0 * s->head_dim;
    const size_t ffn0 = plan->shard.rank * plan->ffn;
    struct lla_weight *w = plan->weights;
#define NEXT(k, l) (w++)->kind = (k), w[-1].layer = (l)
    NEXT(LLA_W_EMBED, 0);
    part(w - 1, "model.embed_tokens.weight", 0, s->vocab, h, 0, s->vocab, 0, h);
    for (size_t l = 0; l < s->nlayer; l++) {
        NEXT(LLA_W_ATTN_NORM, l);
        part(w - 1, LAYER "input_layernorm.weight", l, h, 1, 0, h, 0, 1);
        NEXT(LLA_W_QKV, l);
        part(w - 1, LAYER "self_attn.q_proj.weight", l, q, h, q0, my_q, 0, h);
        part(w - 1, LAYER "self_attn.k_proj.weight", l, kv, h, kv0, my_kv, 0, h);
        part(w - 1, LAYER "self_attn.v_proj.weight", l, kv, h, kv0, my_kv, 0, h);
        NEXT(LLA_W_QKV_BIAS, l);
        part(w - 1, LAYER "self_attn.q_proj.bias", l, q, 1, q0, my_q, 0, 1);
        part(w - 1, LAYER "self_attn.k_proj.bias", l, kv, 1, kv0, my_kv, 0, 1);
        part(w - 1, LAYER "self_attn.v_proj.bias", l, kv, 1, kv0, my_kv, 0, 1);
        NEXT(LLA_W_O, l);
        part(w - 1, LAYER "self_attn.o_proj.weight", l, h, q, 0, h, q0, my_q);
        NEXT(LLA_W_MLP_NORM, l);
        part(w - 1, LAYER "post_attention_layernorm.weight", l, h, 1, 0, h, 0, 1);
        NEXT(LLA_W_GATE_UP, l);
        part(w - 1, LAYER "mlp.gate_proj.weight", l, s->ffn, h, ffn0, plan->ffn, 0, h);
        part(w - 1, LAYER "mlp.up_proj.weight", l, s->ffn, h, ffn0, plan->ffn, 0, h);
        NEXT(LLA_W_DOWN, l);
        part(w - 1, LAYER "mlp.down_proj.weight", l, h, s->ffn, 0, h, ffn0, plan->ffn);
    }
    NEXT(LLA_W_NORM, 0);
    part(w - 1, "model.norm.weight", 0, h, 1, 0, h, 0, 1);
    NEXT(LLA_W_HEAD, 0);
    part(w - 1, s->tied ? "model.embed_tokens.weight" : "lm_head.weight", 0, s->vocab, h, plan->vocab0, plan->vocab, 0,
         h);
#undef NEXT
    plan->nweight = (size_t)(w - plan->weights);
}

enum { PER_LAYER = 7, OUTSIDE = 3 };

const struct lla_weight *lla_plan_weight(const struct lla_plan *plan, enum lla_weight_kind kind, size_t layer) {
    switch (kind) {
    case LLA_W_EMBED:
        return &plan->weights[0];
    case LLA_W_NORM:
        return &plan->weights[plan->nweight - 2];
    case LLA_W_HEAD:
        return &plan->weights[plan->nweight - 1];
    default:
        return &plan->weights[1 + layer * PER_LAYER + (size_t)(kind - LLA_W_ATTN_NORM)];
    }
}

/* ---- buffers ---- */

static bool meet(const struct lla_buffer *a, const struct lla_buffer *b) {
    return a->first <= b->last && b->first <= a->last;
}

lla_status lla_layout(struct lla_buffer *buffers, size_t count, size_t *total) {
    *total = 0;
    size_t *order = malloc((count + 1) * sizeof *order);
    LLA_REQUIRE(order, LLA_ENOMEM, "no memory to place %zu buffers", count);
    for (size_t i = 0; i < count;
         i++) { /* by size, largest first; insertion sort: counts are small, and ties keep their order */
        size_t j = i;
        for (; j > 0 && buffers[order[j - 1]].nbytes < buffers[i].nbytes; j--) order[j] = order[j - 1];
        order[j] = i;
    }
    for (size_t i = 0; i < count; i++) {
        struct lla_buffer *b = &buffers[order[i]];
        b->offset = 0;
        for (size_t j = 0; j < i;) { /* the lowest offset that clears every placed buffer alive at the same time */
            const struct lla_buffer *other = &buffers[order[j]];
            if (meet(b, other) && b->offset < other->offset + other->nbytes && other->offset < b->offset + b->nbytes) {
                b->offset = align_up(other->offset + other->nbytes);
                j = 0;
            } else {
                j++;
            }
        }
        if (b->offset + align_up(b->nbytes) > *total) *total = b->offset + align_up(b->nbytes);
    }
    free(order);
    return LLA_OK;
}

/* ---- the arena ---- */

static void region(struct lla_plan *plan, enum lla_region_kind kind, const char *name, const char *shape, size_t offset,
                   size_t nbytes, size_t first, size_t last) {
    struct lla_region *r = &plan->regions[plan->nregion++];
    *r = (struct lla_region){.kind = kind, .offset = offset, .nbytes = nbytes, .first = first, .last = last};
    snprintf(r->name, sizeof r->name, "%s", name);
    snprintf(r->shape, sizeof r->shape, "%s", shape);
}

static const char *const weight_name[LLA_W_KINDS] = {"embed",    "attn_norm", "qkv",  "qkv_bias", "o",
                                                     "mlp_norm", "gate_up",   "down", "norm",     "head"};

static void place_weights(struct lla_plan *plan) {
    const struct lla_spec *s = &plan->spec;
    const size_t element = lla_dtype_size(s->dtype);
    for (size_t i = 0; i < plan->nweight; i++) {
        struct lla_weight *w = &plan->weights[i];
        w->nbytes = w->rows * w->cols * element;
        if (plan->limits.device == LLAISYS_DEVICE_NVIDIA && w->cols > 1)
            w->nbytes = round_up(w->rows, LLA_WEIGHT_TILE) * round_up(w->cols, LLA_WEIGHT_TILE) * element;
        if (w->kind == LLA_W_HEAD && s->tied) { /* the rank's rows of the embedding table, which lies first */
            w->offset = plan->weights[0].offset + plan->vocab0 * s->hidden * element;
            continue;
        }
        w->offset = plan->total;
        plan->total = align_up(plan->total + w->nbytes);
        char name[LLA_NAME], shape[LLA_NAME];
        if (w->kind >= LLA_W_ATTN_NORM && w->kind <= LLA_W_DOWN)
            snprintf(name, sizeof name, "layer %zu %s", w->layer, weight_name[w->kind]);
        else
            snprintf(name, sizeof name, "%s", weight_name[w->kind]);
        if (w->cols == 1)
            snprintf(shape, sizeof shape, "[%zu] %s", w->rows, lla_dtype_name(s->dtype));
        else
            snprintf(shape, sizeof shape, "[%zu, %zu] %s", w->rows, w->cols, lla_dtype_name(s->dtype));
        region(plan, LLA_R_WEIGHT, name, shape, w->offset, w->nbytes, 0, plan->nnode - 1);
    }
    plan->weight_bytes = plan->total;
}

lla_status lla_plan_make(const struct lla_spec *spec, const struct lla_limits *limits, struct lla_shard shard,
                         struct lla_buffer *buffers, size_t nbuffer, size_t nnode, struct lla_plan *plan) {
    memset(plan, 0, sizeof *plan);
    plan->spec = *spec;
    plan->limits = *limits;
    LLA_TRY(lla_spec_check(spec));
    LLA_TRY(lla_limits_resolve(spec, &plan->limits));
    LLA_TRY(lla_plan_shard(spec, shard, plan));
    plan->nnode = nnode;
    plan->max_blocks = (plan->limits.max_seq + plan->limits.kv_block - 1) / plan->limits.kv_block;
    plan->nblock = plan->limits.kv_tokens / plan->limits.kv_block + 1;
    plan->max_rows =
        plan->limits.prefill_chunk > plan->limits.max_seqs ? plan->limits.prefill_chunk : plan->limits.max_seqs;

    const size_t nweight = OUTSIDE + PER_LAYER * spec->nlayer;
    plan->weights = calloc(nweight, sizeof *plan->weights);
    plan->regions = calloc(nweight + nbuffer, sizeof *plan->regions);
    struct lla_buffer *overlaid = calloc(nbuffer + 1, sizeof *overlaid);
    lla_status status = LLA_OK;
    if (!plan->weights || !plan->regions || !overlaid) {
        status = lla_fail(LLA_ENOMEM, "no memory for a plan of %zu weights and %zu buffers", nweight, nbuffer);
        goto out;
    }
    list_weights(plan);
    place_weights(plan);

    /* buffers that live over the whole step, in their order, then the overlaid activations */
    size_t count = 0;
    for (size_t i = 0; i < nbuffer; i++) {
        struct lla_buffer *b = &buffers[i];
        if (b->kind == LLA_R_ACTIVATION) {
            overlaid[count++] = *b;
            plan->activation_sum += align_up(b->nbytes);
            continue;
        }
        b->offset = plan->total;
        plan->total = align_up(plan->total + b->nbytes);
        if (b->kind == LLA_R_KV) plan->kv_bytes += b->nbytes;
        region(plan, b->kind, b->name, b->shape, b->offset, b->nbytes, 0, nnode - 1);
    }
    LLA_TRY_GOTO(status, lla_layout(overlaid, count, &plan->activation_bytes), out);
    count = 0;
    for (size_t i = 0; i < nbuffer; i++) {
        struct lla_buffer *b = &buffers[i];
        if (b->kind != LLA_R_ACTIVATION) continue;
        b->offset = plan->total + overlaid[count++].offset;
        region(plan, b->kind, b->name, b->shape, b->offset, b->nbytes, b->first, b->last);
    }
    plan->total += plan->activation_bytes;
out:
    free(overlaid);
    if (status) lla_plan_free(plan);
    return status;
}

void lla_plan_free(struct lla_plan *plan) {
    free(plan->weights);
    free(plan->regions);
    memset(plan, 0, sizeof *plan);
}

lla_status lla_plan_fit(const struct lla_plan *plan, size_t available) {
    if (plan->total <= available) return LLA_OK;
    const double mib = 1024.0 * 1024.0;
    const char *advice = plan->weight_bytes > available
                             ? "the weights alone do not fit: use a smaller model or more devices"
                         : plan->kv_bytes >= plan->activation_bytes ? "lower max_seq or kv_tokens"
                                                                    : "lower prefill_chunk or max_seqs";
    return lla_fail(
        LLA_ENOMEM,
        "the plan needs %zu bytes (%.1f MiB: weights %.1f, KV cache %.1f, activations %.1f), %zu (%.1f MiB) are "
        "available; %s",
        plan->total, (double)plan->total / mib, (double)plan->weight_bytes / mib, (double)plan->kv_bytes / mib,
        (double)plan->activation_bytes / mib, available, (double)available / mib, advice);
}
