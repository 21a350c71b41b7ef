/* nodes.c: the CPU twins of the step's nodes (contracts in kernels.h). Every thread of the team calls them; phases of a
 * node that depend on each other are parted by barriers, and the executor puts one between nodes. */
#include "crew.h"
#include "isa.h"

#include <math.h>

/* Rows of x are shared out in tasks of this many where a node works by rows. */
enum { COLUMN_GRAIN = 8, ATTENTION_ROWS = 16 };

static void barrier(struct lla_team team) {
    lla_crew_barrier(team.crew);
}

static const struct lla_step_header *header(const struct lla_ctx *ctx) {
    return (const struct lla_step_header *)(ctx->arena + ctx->io->header);
}

static const int32_t *ints(const struct lla_ctx *ctx, size_t offset) {
    return (const int32_t *)(ctx->arena + offset);
}

static size_t element(const struct lla_ctx *ctx) {
    return lla_dtype_size(ctx->dims->dtype);
}

void lla_cpu_embed(const struct lla_ctx *ctx, const struct lla_embed_args *args, struct lla_team team) {
    const size_t row_bytes = ctx->dims->hidden * element(ctx);
    const struct lla_dims *d = ctx->dims;
    const int32_t *tokens = ints(ctx, ctx->io->tokens), *fed = ints(ctx, ctx->io->fed);
    const int32_t *positions = ints(ctx, ctx->io->positions), *row_seq = ints(ctx, ctx->io->row_seq);
    const int32_t *table = ints(ctx, ctx->io->block_table);
    int32_t *kv_tokens = (int32_t *)(ctx->arena + ctx->io->kv_tokens);
    size_t lo, hi;
    lla_share((size_t)header(ctx)->nrow, 1, team, &lo, &hi);
    for (size_t r = lo; r < hi; r++) {
        const int32_t token = tokens[r] < 0 ? fed[~tokens[r]] : tokens[r];
        const size_t position = (size_t)positions[r];
        const size_t block = (size_t)table[(size_t)row_seq[r] * d->max_blocks + position / d->kv_block];
        memcpy(ctx->arena + args->x + r * row_bytes, ctx->arena + args->weight + (size_t)token * row_bytes, row_bytes);
        kv_tokens[block * d->kv_block + position % d->kv_block] = token;
    }
}

/* normed [rows, hidden] = norm of x's rows (those of `index`, or all); ends with a barrier. */
static void norm(const struct lla_ctx *ctx, size_t rows, const int32_t *index, size_t x, size_t weight, size_t normed,
                 struct lla_team team) {
    const struct lla_dims *d = ctx->dims;
    size_t lo, hi;
    lla_share(rows, 1, team, &lo, &hi);
    lla_isa()->rms_norm(d->dtype, d->hidden, ctx->arena + x, index, ctx->arena + weight, d->eps, ctx->arena + normed,
                        lo, hi);
    barrier(team);
}

/* The thread's columns of a product. */
static void linear(const struct lla_linear *args, struct lla_team team) {
    size_t lo, hi;
    lla_share(args->n, COLUMN_GRAIN, team, &lo, &hi);
    if (lo < hi) lla_isa()->linear(args, lo, hi);
}

void lla_cpu_qkv(const struct lla_ctx *ctx, const struct lla_qkv_args *args, struct lla_team team) {
    const struct lla_dims *d = ctx->dims;
    const size_t rows = (size_t)header(ctx)->nrow, heads = d->nhead + 2 * d->nkvhead, dim = d->head_dim,
                 size = element(ctx);
    norm(ctx, rows, NULL, args->x, args->norm, args->normed, team);
    linear(&(struct lla_linear){.dtype = d->dtype,
                                .epilogue = LLA_EPI_STORE,
                                .m = rows,
                                .n = heads * dim,
                                .k = d->hidden,
                                .x = ctx->arena + args->normed,
                                .w = ctx->arena + args->w,
                                .bias = ctx->arena + args->bias,
                                .out = ctx->arena + args->qkv},
           team);
    barrier(team);

    const int32_t *positions = ints(ctx, ctx->io->positions), *row_seq = ints(ctx, ctx->io->row_seq);
    const int32_t *table = ints(ctx, ctx->io->block_table);
    size_t lo, hi;
    lla_share(rows * heads, 1, team, &lo, &hi);
    for (size_t i = lo; i < hi; i++) {
        const size_t row = i / heads, head = i % heads, position = (size_t)positions[row];
        const char *in = ctx->arena + args->qkv + i * dim * size;
        if (head < d->nhead + d->nkvhead) {
            float cos_sin[1024];
            lla_isa()->to_float(d->dtype, dim, ctx->arena + args->rope + position * dim * size, cos_sin);
            lla_isa()->rotate(d->dtype, dim, in, cos_sin, true, (void *)in);
        }
        if (head < d->nhead) {
            memcpy(ctx->arena + args->q + (row * d->nhead + head) * dim * size, in, dim * size);
            continue;
        }
        const bool is_v = head >= d->nhead + d->nkvhead;
        const size_t kvhead = (head - d->nhead) % d->nkvhead;
        const size_t block = (size_t)table[(size_t)row_seq[row] * d->max_blocks + position / d->kv_block];
        const size_t slot = (block * d->nkvhead + kvhead) * d->kv_block + position % d->kv_block;
        memcpy(ctx->arena + (is_v ? args->v_cache : args->k_cache) + slot * dim * size, in, dim * size);
    }
}

void lla_cpu_attention(const struct lla_ctx *ctx, const struct lla_attention_args *args, struct lla_team team) {
    const struct lla_dims *d = ctx->dims;
    const struct lla_isa *isa = lla_isa();
    const size_t rows = (size_t)header(ctx)->nrow, dim = d->head_dim, size = element(ctx),
                 group = d->nhead / d->nkvhead;
    const int32_t *positions = ints(ctx, ctx->io->positions), *row_seq = ints(ctx, ctx->io->row_seq);

    struct lla_attention a = {.dtype = d->dtype, .group = group, .dim = dim, .vdim = dim};
    a.scale = 1.0f / sqrtf((float)dim);
    a.q_stride = a.out_stride = d->nhead * dim;
    a.k_block_stride = a.v_block_stride = d->nkvhead * d->kv_block * dim;
    a.k_token_stride = a.v_token_stride = dim;
    a.kv_shift = (size_t)__builtin_ctzll(d->kv_block);

    /* Where every sequence has one row, splits are shared out too, so that few sequences of long context keep all
     * threads busy. */
    bool single = true;
    size_t nsplit = 0;
    for (size_t r = 0; r < rows; r++) {
        single = single && (r == 0 || row_seq[r] != row_seq[r - 1]);
        nsplit += (size_t)positions[r] / LLA_ATTN_SPLIT + 1;
    }
    const bool by_split = single && nsplit <= d->max_splits && nsplit > rows;
    const size_t part = group * (dim + 2), stride = d->nkvhead * part; /* floats: of a KV head, of a split */
    float *partial = (float *)(ctx->arena + args->partial);

    for (int phase = by_split ? 0 : 1; phase < 2; phase++) {
        size_t task = 0, first_split = 0;
        for (size_t r = 0, n; r < rows; r += n) {
            n = 1; /* rows of one sequence, ATTENTION_ROWS at most */
            while (r + n < rows && row_seq[r + n] == row_seq[r] && n < ATTENTION_ROWS) n++;
            const size_t splits = (size_t)positions[r] / LLA_ATTN_SPLIT + 1;
            a.nrow = n;
            a.position0 = (size_t)positions[r];
            a.table = ints(ctx, ctx->io->block_table) + (size_t)row_seq[r] * d->max_blocks;
            for (size_t kvhead = 0; kvhead < d->nkvhead; kvhead++) {
                const size_t head = kvhead * group;
                a.q = ctx->arena + args->q + (r * d->nhead + head) * dim * size;
                a.out = ctx->arena + args->out + (r * d->nhead + head) * dim * size;
                a.k = ctx->arena + args->k_cache + kvhead * d->kv_block * dim * size;
                a.v = ctx->arena + args->v_cache + kvhead * d->kv_block * dim * size;
                float *mine = partial + first_split * stride + kvhead * part;
                if (phase == 0) {
                    for (size_t s = 0; s < splits; s++)
                        if (task++ % team.size == team.rank) isa->attention_split(&a, s, mine + s * stride);
                } else if (task++ % team.size == team.rank) {
                    if (by_split)
                        isa->attention_merge(&a, splits, mine, stride);
                    else
                        isa->attention(&a);
                }
            }
            first_split += splits;
        }
        if (phase == 0) barrier(team);
    }
}

void lla_cpu_linear_add(const struct lla_ctx *ctx, const struct lla_linear_add_args *args, struct lla_team team) {
    linear(&(struct lla_linear){.dtype = ctx->dims->dtype,
                                .epilogue = LLA_EPI_ADD,
                                .m = (size_t)header(ctx)->nrow,
                                .n = ctx->dims->hidden,
                                .k = args->k,
                                .x = ctx->arena + args->in,
                                .w = ctx->arena + args->w,
                                .out = ctx->arena + args->x},
           team);
}

void lla_cpu_gate_up(const struct lla_ctx *ctx, const struct lla_gate_up_args *args, struct lla_team team) {
    const struct lla_dims *d = ctx->dims;
    const size_t rows = (size_t)header(ctx)->nrow;
    norm(ctx, rows, NULL, args->x, args->norm, args->normed, team);
    linear(&(struct lla_linear){.dtype = d->dtype,
                                .epilogue = LLA_EPI_SWIGLU,
                                .m = rows,
                                .n = d->ffn,
                                .k = d->hidden,
                                .x = ctx->arena + args->normed,
                                .w = ctx->arena + args->w,
                                .w2 = ctx->arena + args->w + d->ffn * d->hidden * element(ctx),
                                .out = ctx->arena + args->act},
           team);
}

void lla_cpu_head(const struct lla_ctx *ctx, const struct lla_head_args *args, struct lla_team team) {
    const struct lla_dims *d = ctx->dims;
    const size_t rows = (size_t)header(ctx)->nlogit;
    norm(ctx, rows, ints(ctx, ctx->io->logit_rows), args->x, args->norm, args->normed, team);
    linear(&(struct lla_linear){.dtype = d->dtype,
                                .epilogue = LLA_EPI_STORE,
                                .m = rows,
                                .n = d->vocab,
                                .k = d->hidden,
                                .x = ctx->arena + args->normed,
                                .w = ctx->arena + args->w,
                                .out = ctx->arena + args->logits},
           team);
}

void lla_cpu_sample(const struct lla_ctx *ctx, const struct lla_sample_args *args, struct lla_team team) {
    const struct lla_dims *d = ctx->dims;
    const struct lla_sampling_row *sampling = (const struct lla_sampling_row *)(ctx->arena + ctx->io->sampling);
    int32_t *next = (int32_t *)(ctx->arena + ctx->io->next);
    size_t lo, hi;
    lla_share((size_t)header(ctx)->nlogit, 1, team, &lo, &hi);
    for (size_t r = lo; r < hi; r++) {
        if (!lla_is_plain(&sampling[r])) continue; /* drawn behind the program */
        const void *logits = ctx->arena + args->logits + r * d->vocab * element(ctx);
        next[r] = (int32_t)lla_isa()->argmax(d->dtype, d->vocab, logits);
    }
}

int32_t lla_cpu_draw(const struct lla_draw *draw) {
    return lla_isa()->draw(draw);
}

/* The expressions are those of draw.c, and so is the order. */
void lla_finish_logprobs(const struct lla_odds *odds, size_t n, struct lla_candidate *logprobs) {
    double log_mass = NAN;
    if (isfinite(odds->max)) log_mass = log(ldexp((double)odds->mass, -LLA_WEIGHT_BITS)) + (double)odds->max;
    for (size_t i = 0; i < n; i++) {
        const struct lla_candidate *c = &odds->top[i];
        logprobs[i] = *c;
        if (c->token >= 0) logprobs[i].value = (float)((double)c->value - log_mass);
    }
}
