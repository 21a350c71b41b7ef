/* qwen2.c: the LLAISYS Qwen2 model: one sequence over a runner, in slot 0. */
#include "../include/llaisys/models/qwen2.h"

#include "kvpool.h"
#include "load.h"
#include "open.h"
#include "runner.h"
#include "tensor.h"

#include <math.h>
#include <stdlib.h>

struct LlaisysQwen2Model {
    struct lla_runner runner;
    struct lla_kvpool pool;
    int32_t *blocks; /* [max_blocks], nblock of them in use */
    size_t nblock;
    size_t length; /* tokens in the sequence */
    bool has_logits;
    struct LlaisysQwen2Weights weights;
    llaisysTensor_t *handles; /* every handle that `weights` points to */
    size_t nhandle;
};

static lla_status create(const struct lla_spec *spec, const struct lla_limits *limits, int device_id, int nthread,
                         struct LlaisysQwen2Model **out) {
    lla_status status;
    struct LlaisysQwen2Model *m = calloc(1, sizeof *m);
    LLA_REQUIRE(m, LLA_ENOMEM, "no memory for a model");
    LLA_TRY_GOTO(status, lla_runner_create(spec, limits, (struct lla_shard){0, 1}, device_id, nthread, &m->runner),
                 fail);
    LLA_TRY_GOTO(status, lla_kvpool_create(m->runner.graph.plan.nblock, m->runner.graph.dims.kv_block, &m->pool), fail);
    m->blocks = calloc(m->runner.graph.plan.max_blocks, sizeof *m->blocks);
    if (!m->blocks) {
        status = lla_fail(LLA_ENOMEM, "no memory for a block table of %zu blocks", m->runner.graph.plan.max_blocks);
        goto fail;
    }
    *out = m;
    return LLA_OK;
fail:
    llaisysQwen2ModelDestroy(m);
    return status;
}

void llaisysQwen2ModelDestroy(struct LlaisysQwen2Model *m) {
    if (!m) return;
    for (size_t i = 0; i < m->nhandle; i++) lla_tensor_release_borrowed(m->handles[i]);
    free(m->handles);
    free(m->weights.attn_norm_w); /* one allocation for all the arrays */
    free(m->blocks);
    lla_kvpool_destroy(&m->pool);
    lla_runner_destroy(&m->runner);
    free(m);
}

/* ---- weights as tensors ---- */

enum { HANDLES_PER_LAYER = 12 };

/* tensorLoad on a handle of a packed weight. */
static lla_status store_weight(struct LlaisysTensor *t, const void *host) {
    struct LlaisysQwen2Model *m = t->owner;
    return lla_runner_store(&m->runner, t->weight, t->row, t->shape[0], host);
}

/* A handle over rows [row, row + rows) of a weight. */
static lla_status borrow(struct LlaisysQwen2Model *m, enum lla_weight_kind kind, size_t layer, size_t row, size_t rows,
                         llaisysTensor_t *out) {
    const struct lla_plan *plan = &m->runner.graph.plan;
    const struct lla_weight *w = lla_plan_weight(plan, kind, layer);
    const size_t shape[2] = {rows, w->cols};
    char *data = m->runner.base + w->offset + row * w->cols * lla_dtype_size(plan->spec.dtype);
    *out = lla_tensor_borrow(data, shape, w->cols == 1 ? 1 : 2, NULL, plan->spec.dtype, plan->limits.device, 0);
    if (!*out) return LLA_ENOMEM;
    if (!m->runner.arena) { /* on a GPU matrices are packed: they can be loaded through the handle, not read */
        (*out)->load = store_weight;
        (*out)->owner = m;
        (*out)->weight = w;
        (*out)->row = row;
    }
    m->handles[m->nhandle++] = *out;
    return LLA_OK;
}

static lla_status make_handles(struct LlaisysQwen2Model *m) {
    const struct lla_plan *p = &m->runner.graph.plan;
    const size_t n = p->spec.nlayer, h = p->spec.hidden, q = p->nhead * p->spec.head_dim,
                 kv = p->nkvhead * p->spec.head_dim;
    struct LlaisysQwen2Weights *w = &m->weights;
    m->handles = calloc(3 + HANDLES_PER_LAYER * n, sizeof *m->handles);
    llaisysTensor_t *arrays = calloc(HANDLES_PER_LAYER * n, sizeof *arrays);
    w->attn_norm_w = arrays;
    LLA_REQUIRE(m->handles && arrays, LLA_ENOMEM, "no memory for %zu weight handles", HANDLES_PER_LAYER * n);
    llaisysTensor_t **const array[HANDLES_PER_LAYER] = {&w->attn_norm_w, &w->attn_q_w,   &w->attn_q_b, &w->attn_k_w,
                                                        &w->attn_k_b,    &w->attn_v_w,   &w->attn_v_b, &w->attn_o_w,
                                                        &w->mlp_norm_w,  &w->mlp_gate_w, &w->mlp_up_w, &w->mlp_down_w};
    for (size_t i = 0; i < HANDLES_PER_LAYER; i++) *array[i] = arrays + i * n;

    LLA_TRY(borrow(m, LLA_W_EMBED, 0, 0, p->spec.vocab, &w->in_embed));
    LLA_TRY(borrow(m, LLA_W_HEAD, 0, 0, p->vocab, &w->out_embed));
    LLA_TRY(borrow(m, LLA_W_NORM, 0, 0, h, &w->out_norm_w));
    for (size_t l = 0; l < n; l++) {
        LLA_TRY(borrow(m, LLA_W_ATTN_NORM, l, 0, h, &w->attn_norm_w[l]));
        LLA_TRY(borrow(m, LLA_W_QKV, l, 0, q, &w->attn_q_w[l]));
        LLA_TRY(borrow(m, LLA_W_QKV, l, q, kv, &w->attn_k_w[l]));
        LLA_TRY(borrow(m, LLA_W_QKV, l, q + kv, kv, &w->attn_v_w[l]));
        LLA_TRY(borrow(m, LLA_W_QKV_BIAS, l, 0, q, &w->attn_q_b[l]));
        LLA_TRY(borrow(m, LLA_W_QKV_BIAS, l, q, kv, &w->attn_k_b[l]));
        LLA_TRY(borrow(m, LLA_W_QKV_BIAS, l, q + kv, kv, &w->attn_v_b[l]));
        LLA_TRY(borrow(m, LLA_W_O, l, 0, h, &w->attn_o_w[l]));
        LLA_TRY(borrow(m, LLA_W_MLP_NORM, l, 0, h, &w->mlp_norm_w[l]));
        LLA_TRY(borrow(m, LLA_W_GATE_UP, l, 0, p->ffn, &w->mlp_gate_w[l]));
        LLA_TRY(borrow(m, LLA_W_GATE_UP, l, p->ffn, p->ffn, &w->mlp_up_w[l]));
        LLA_TRY(borrow(m, LLA_W_DOWN, l, 0, h, &w->mlp_down_w[l]));
    }
    return LLA_OK;
}

struct LlaisysQwen2Weights *llaisysQwen2ModelWeights(struct LlaisysQwen2Model *m) {
    lla_clear_error();
    if (!m) {
        lla_fail(LLA_EINVAL, "llaisysQwen2ModelWeights: model is NULL");
        return NULL;
    }
    return &m->weights;
}

/* ---- create, open ---- */

struct LlaisysQwen2Model *llaisysQwen2ModelCreate(const struct LlaisysQwen2Meta *meta, llaisysDeviceType_t device,
                                                  int *device_ids, int ndevice) {
    lla_clear_error();
    if (!meta) {
        lla_fail(LLA_EINVAL, "llaisysQwen2ModelCreate: meta is NULL");
        return NULL;
    }
    struct lla_spec spec = {.dtype = meta->dtype,
                            .nlayer = meta->nlayer,
                            .hidden = meta->hs,
                            .nhead = meta->nh,
                            .nkvhead = meta->nkvh,
                            .head_dim = meta->dh,
                            .ffn = meta->di,
                            .vocab = meta->voc,
                            .max_position = meta->maxseq,
                            .eps = meta->epsilon,
                            .theta = meta->theta,
                            .neos = meta->end_token >= 0};
    spec.eos[0] = meta->end_token;
    const struct lla_limits limits = {.device = device, .max_seq = meta->maxseq};
    struct LlaisysQwen2Model *m = NULL;
    if (lla_open_check(device, device_ids, ndevice) || lla_spec_check(&spec) ||
        create(&spec, &limits, device_ids ? device_ids[0] : 0, 0, &m))
        return NULL;
    if (make_handles(m)) {
        llaisysQwen2ModelDestroy(m);
        return NULL;
    }
    return m;
}

struct LlaisysQwen2Model *llaisysQwen2ModelOpen(const char *path, const struct LlaisysQwen2Options *given) {
    lla_clear_error();
    const struct LlaisysQwen2Options options = given ? *given : (struct LlaisysQwen2Options){0};
    struct lla_spec spec;
    struct lla_limits limits;
    struct lla_checkpoint *checkpoint = NULL;
    struct LlaisysQwen2Model *m = NULL;
    if (lla_open_check(options.device, options.device_ids, options.ndevice ? options.ndevice : 1) ||
        lla_open_resolve(path, &options, &spec, &limits, &checkpoint))
        return NULL;
    lla_status status = create(&spec, &limits, options.device_ids ? options.device_ids[0] : 0, options.nthread, &m);
    if (!status) status = lla_load_weights(&m->runner, checkpoint, options.progress ? lla_progress_bar : NULL);
    if (!status) status = make_handles(m);
    if (!status) status = lla_runner_ready(&m->runner);
    lla_checkpoint_close(checkpoint);
    if (status) {
        lla_fail_in(status, "%s", path);
        llaisysQwen2ModelDestroy(m);
        return NULL;
    }
    return m;
}

/* ---- steps ---- */

static lla_status check_step(const struct LlaisysQwen2Model *m, const int64_t *tokens, size_t ntoken,
                             const struct LlaisysSampling *s) {
    LLA_REQUIRE(m && tokens && ntoken > 0, LLA_EINVAL, "a step needs a model and at least one token");
    const struct lla_plan *plan = &m->runner.graph.plan;
    LLA_REQUIRE(ntoken <= plan->limits.max_seq - m->length, LLA_ELIMIT,
                "%zu tokens behind the %zu of the sequence exceed its limit of %zu tokens (maxseq)", ntoken, m->length,
                plan->limits.max_seq);
    for (size_t i = 0; i < ntoken; i++)
        LLA_REQUIRE(tokens[i] >= 0 && (uint64_t)tokens[i] < plan->spec.vocab, LLA_EINVAL,
                    "token %zu is %lld, expected an id from 0 to %zu", i, (long long)tokens[i], plan->spec.vocab - 1);
    if (!s) return LLA_OK;
    LLA_REQUIRE(s->temperature >= 0 && isfinite(s->temperature), LLA_EINVAL,
                "temperature is %g, expected a finite number from 0", (double)s->temperature);
    LLA_REQUIRE(s->top_k >= 0, LLA_EINVAL, "top_k is %d, expected 0 or more", s->top_k);
    LLA_REQUIRE(s->top_p > 0 && s->top_p <= 1, LLA_EINVAL, "top_p is %g, expected above 0 and at most 1",
                (double)s->top_p);
    return LLA_OK;
}

int64_t llaisysQwen2ModelStep(struct LlaisysQwen2Model *m, const int64_t *tokens, size_t ntoken,
                              const struct LlaisysSampling *sampling) {
    lla_clear_error();
    if (check_step(m, tokens, ntoken, sampling) || lla_runner_ready(&m->runner)) return -1;
    const struct lla_dims *d = &m->runner.graph.dims;
    const size_t before = m->nblock, end = m->length + ntoken;
    if (lla_kvpool_grow(&m->pool, m->blocks, &m->nblock, (end + d->kv_block - 1) / d->kv_block)) return -1;
    int64_t next = -1;
    for (size_t done = 0, n; done < ntoken; done += n) {
        n = ntoken - done < d->max_rows ? ntoken - done : d->max_rows;
        struct lla_step_seq seq = {.tokens = tokens + done,
                                   .ntoken = n,
                                   .position0 = m->length + done,
                                   .blocks = m->blocks,
                                   .want_next = done + n == ntoken};
        if (sampling)
            seq.sampling = (struct lla_sampling_row){.temperature = sampling->temperature,
                                                     .top_p = sampling->top_p,
                                                     .top_k = sampling->top_k,
                                                     .seed = sampling->seed};
        if (lla_runner_step(&m->runner, &seq, 1, &next)) {
            lla_kvpool_shrink(&m->pool, m->blocks, &m->nblock, before);
            return -1;
        }
    }
    m->length = end;
    m->has_logits = true;
    return next;
}

int64_t llaisysQwen2ModelInfer(struct LlaisysQwen2Model *model, int64_t *token_ids, size_t ntoken) {
    return llaisysQwen2ModelStep(model, token_ids, ntoken, NULL);
}

void llaisysQwen2ModelReset(struct LlaisysQwen2Model *m) {
    if (!m) return;
    lla_kvpool_shrink(&m->pool, m->blocks, &m->nblock, 0);
    m->length = 0;
    m->has_logits = false;
}

size_t llaisysQwen2ModelLength(const struct LlaisysQwen2Model *m) {
    return m ? m->length : 0;
}

int llaisysQwen2ModelLogits(struct LlaisysQwen2Model *m, float *logits) {
    lla_clear_error();
    if (!m || !logits || !m->has_logits)
        return lla_fail(LLA_EINVAL, "logits need a model that has taken a step, and memory for them");
    return lla_runner_logits(&m->runner, 0, logits);
}

int llaisysQwen2ModelIsEnd(const struct LlaisysQwen2Model *m, int64_t token) {
    return m && lla_open_is_end(&m->runner.graph.plan, token);
}

void llaisysQwen2ModelMeta(const struct LlaisysQwen2Model *m, struct LlaisysQwen2Meta *meta) {
    if (!m || !meta) return;
    lla_open_meta(&m->runner.graph.plan, meta);
}

/* ---- plan ---- */

char *llaisysQwen2Plan(const char *path, const struct LlaisysQwen2Options *given, const char *format) {
    lla_clear_error();
    const struct LlaisysQwen2Options options = given ? *given : (struct LlaisysQwen2Options){0};
    struct lla_spec spec;
    struct lla_limits limits;
    return lla_open_resolve(path, &options, &spec, &limits, NULL) ? NULL : lla_open_plan(&spec, &limits, format);
}

void llaisysFreeString(char *text) {
    free(text);
}
