/* kernels.h: the contracts of the step's nodes: what each computes, on which shapes, with which roundings.
 *
 * A node's operands are byte offsets from the arena's base, so that one program serves any arena. R is the number of
 * rows (tokens) of the step, `nrow` of its header; a row belongs to a sequence slot and has a position; rows of one
 * sequence stand together in order of position. D is the model's dtype: bf16, f16 or f32. round() rounds to D (nothing
 * happens for f32); sums are accumulated in f32. The roundings are those of transformers' Qwen2 modelling code, so that
 * greedy tokens agree.
 *
 * Every reduction has an order that the shapes alone set: a row's result does not depend on the other rows of the step.
 */
#ifndef LLA_KERNELS_H
#define LLA_KERNELS_H

#include "../base/dtype.h"
#include "../base/status.h"

#ifdef __cplusplus
extern "C" {
#endif

#ifdef __CUDACC__
#define LLA_BOTH __host__ __device__
#else
#define LLA_BOTH
#endif

/* Tokens of one attention split: softmax partial sums cover positions [0, 256), [256, 512), ... and are merged in that
 * order. */
enum { LLA_ATTN_SPLIT = 256 };
/* The same on a GPU, where a split is a warp's work. */
enum { LLA_CUDA_SPLIT = 64 };

/* Dimensions of one rank's program. */
struct lla_dims {
    llaisysDataType_t dtype;
    size_t hidden, nhead, nkvhead, head_dim, ffn;
    size_t vocab;      /* rows of this rank's lm_head */
    size_t kv_block;   /* tokens of a KV block */
    size_t max_blocks; /* columns of the block table */
    size_t max_rows;   /* rows of the largest step */
    size_t max_seqs;   /* rows of the block table, and logit rows at most */
    size_t max_splits; /* attention splits of a step in which each sequence has one row, at most */
    float eps;
};

/* The step region: all that changes from step to step, and its results. Written by the host before the program runs. */
struct lla_step_header {
    int32_t nrow;   /* R */
    int32_t nlogit; /* rows whose next token is wanted, L */
    /* Where each row is alone of its sequence: attention splits of LLA_CUDA_SPLIT tokens, of all rows and of the one
     * that has most. nsplit 0: a GPU has to look for itself. */
    int32_t nsplit, longest;
};

/* How a row's next token is chosen; struct lla_draw has the formulas. Zeroed: the largest logit. */
struct lla_sampling_row {
    float temperature; /* 0: greedy */
    float top_p, min_p;
    float repetition; /* 0 or 1: none */
    float presence, frequency;
    int32_t top_k;    /* 0: all */
    int32_t nbias;    /* tokens with a bias */
    int32_t nlogprob; /* log-probabilities wanted: 0, or the chosen token's and the nlogprob - 1 largest */
    int32_t position; /* of the row that predicts; the random number's counter */
    uint64_t seed;
    /* filled in with the step */
    int32_t nprompt;    /* of the position + 1 known tokens, the prompt's */
    int32_t first_bias; /* where its biases begin in the step's */
    int32_t mask;       /* 1 + its row of the step's masks; 0: all tokens are allowed */
};

/* Bounds of what a row may ask for. */
enum { LLA_MAX_BIAS = 1024, LLA_MAX_LOGPROB = 21 };

struct lla_candidate {
    float value;
    int32_t token;
};

struct lla_bias {
    int32_t token;
    float bias; /* -INFINITY bans the token */
};

/* What a GPU finds for a row's log-probabilities, for lla_finish_logprobs: in `top` logits, the chosen token's first.
 */
struct lla_odds {
    uint64_t mass; /* sum of e^(logit - max), in units of 2^-LLA_WEIGHT_BITS */
    float max;     /* the largest logit */
    struct lla_candidate top[LLA_MAX_LOGPROB];
};

/* Columns of `squares`: one for 16 of x, in whole groups of four, those behind the last zero. */
LLA_BOTH static inline size_t lla_square_columns(size_t hidden) {
    return (hidden + 63) / 64 * 4;
}

/* Offsets of the step region's parts, and of what the nodes share besides their arguments. */
struct lla_io {
    size_t header;      /* struct lla_step_header */
    size_t tokens;      /* i32 [max_rows]: a token, or ~i: what the step before this one chose in its logit row i */
    size_t positions;   /* i32 [max_rows] */
    size_t row_seq;     /* i32 [max_rows]: sequence slot of the row */
    size_t block_table; /* i32 [max_seqs, max_blocks]: KV block of a slot's positions */
    size_t logit_rows;  /* i32 [max_seqs]: rows whose logits are wanted */
    size_t sampling;    /* struct lla_sampling_row [max_seqs], by logit row */
    size_t bias;        /* struct lla_bias [max_seqs, LLA_MAX_BIAS], one row's behind the other's; on a GPU */
    size_t mask;        /* u32 [max_seqs, ceil(vocab / 32)]: those of masked rows, as struct lla_draw; on a GPU */
    size_t next;        /* i32 [max_seqs]: the chosen tokens, out */
    size_t odds;        /* struct lla_odds [max_seqs], out; on a GPU */
    size_t fed;         /* i32 [max_seqs]: `next` of the step before */
    size_t arrived;     /* i32 [max_rows, nkvhead]: counters of the GPU's attention, zero between steps */
    size_t best;        /* u64 [max_seqs]: a GPU's head may leave there what is the largest of a row's logits, in an
                           order of integers, and below it ~token; else 0, which embed writes */
    size_t squares;     /* f32 [max_rows, lla_square_columns(hidden)]: sums of squares of 16 columns of x as it stands,
                           on a GPU alone: embed and linear_add, which write x, leave them for the norms of qkv, gate_up
                           and head. (Where ranks share o and down, who adds their parts will have to.) */
    size_t kv_tokens;   /* i32 [nblock, kv_block]: the tokens of which the KV blocks hold keys and values */
};

/* x [R, hidden] = rows `tokens` of weight [vocab, hidden], where ~i stands for fed[i]. Each token
 * is noted in kv_tokens, at its place in the KV blocks. */
struct lla_embed_args {
    size_t weight, x;
};

/* n = round(norm * round(x / sqrt(mean(x^2) + eps)));  y = round(n w^T + bias), w [(nhead + 2 nkvhead) head_dim,
 * hidden]. q and k are rotated by position: with halves a, b of a head and the table's rounded cos, sin: a' =
 * round(round(a cos) - round(b sin)), b' = round(round(b cos) + round(a sin)). q [R, nhead, head_dim] out; k, v go to
 * their cache slot: cache [nblock, nkvhead, kv_block, head_dim]. rope [max_seq, head_dim]: head_dim/2 cosines, then as
 * many sines. normed and qkv are scratch. */
struct lla_qkv_args {
    size_t x, norm, w, bias, rope, normed, qkv, q, k_cache, v_cache;
};

/* out [R, nhead, head_dim] = round(softmax(q k^T / sqrt(head_dim)) v) over positions 0 .. the row's own, through the
 * block table. Scores, exponentials and sums in f32, by splits of LLA_ATTN_SPLIT tokens; a GPU rounds the exponentials
 * for its tensor cores, in numerator and denominator alike. partial: f32 [max_splits, nhead, head_dim + 2]. */
struct lla_attention_args {
    size_t q, k_cache, v_cache, partial, out;
};

/* x [R, hidden] = round(x + round(in w^T)), in [R, k], w [hidden, k]: the O and down projections with their residual.
 */
struct lla_linear_add_args {
    size_t in, w, x, k;
};

/* n as in qkv;  g = round(n wg^T), u = round(n wu^T), w = [wg; wu] [2 ffn, hidden];  act [R, ffn] = round(round(g / (1
 * + e^-g)) u). */
struct lla_gate_up_args {
    size_t x, norm, w, normed, act;
};

/* For the L logit rows: n as in qkv;  logits [L, vocab] = round(n w^T). */
struct lla_head_args {
    size_t x, norm, w, normed, logits;
};

/* next [L]: the largest logit's token, the first of equals; NaN counts as largest. Rows that want more (lla_is_plain)
 * are drawn as struct lla_draw says: on the CPU behind the program, by lla_cpu_draw; on a GPU by this node, from the
 * step's biases and masks, with the known tokens that kv_tokens has for the row's sequence. The same logits give the
 * same token and odds on both. candidates: scratch struct lla_candidate [max_seqs, vocab]. */
struct lla_sample_args {
    size_t logits, candidates;
};

/* Every op: NAME, function suffix and argument member. The CPU functions are lla_cpu_<suffix>, the CUDA ones
 * lla_cuda_<suffix>. */
#define LLA_NODE_OPS(X)                                                                                                \
    X(EMBED, embed)                                                                                                    \
    X(QKV, qkv)                                                                                                        \
    X(ATTENTION, attention)                                                                                            \
    X(LINEAR_ADD, linear_add)                                                                                          \
    X(GATE_UP, gate_up)                                                                                                \
    X(HEAD, head)                                                                                                      \
    X(SAMPLE, sample)

enum lla_op {
#define X(NAME, suffix) LLA_OP_##NAME,
    LLA_NODE_OPS(X)
#undef X
        LLA_OP_COUNT
};

/* What every node of a program sees. */
struct lla_ctx {
    char *arena;
    const struct lla_dims *dims;
    const struct lla_io *io;
};

/* The calling thread's place in the team that runs a node; all threads of the team call the node's function. */
struct lla_crew;
struct lla_team {
    size_t rank, size;
    struct lla_crew *crew; /* for barriers */
};

#define X(NAME, suffix)                                                                                                \
    void lla_cpu_##suffix(const struct lla_ctx *ctx, const struct lla_##suffix##_args *args, struct lla_team team);
LLA_NODE_OPS(X)
#undef X

/* ---- choosing a token ---- */

/* Whether a row takes the largest value. */
LLA_BOTH static inline bool lla_is_greedy(const struct lla_sampling_row *s) {
    return s->temperature <= 0 || s->top_k == 1;
}

LLA_BOTH static inline bool lla_has_penalty(const struct lla_sampling_row *s) {
    return (s->repetition != 0 && s->repetition != 1) || s->presence != 0 || s->frequency != 0;
}

/* Whether the largest logit is all that a row wants: no draw then. */
LLA_BOTH static inline bool lla_is_plain(const struct lla_sampling_row *s) {
    return lla_is_greedy(s) && !lla_has_penalty(s) && !s->nbias && !s->nlogprob && !s->mask;
}

/* A weight of 1 as an integer. */
enum { LLA_WEIGHT_BITS = 40 };

/* One row's token, in f32, by token t of n, in this order:
 *
 *     logit[t] = -infinity                                      where the mask's bit is clear
 *     v = logit[t] + bias[t]                                    several of one token add up
 *     v = v > 0 ? v / repetition : v * repetition               t in prompt or answer
 *     v = v - count * frequency - presence                      count > 0 of t in the answer
 *     greedy: the largest v, the first of equals
 *     w = floor(2^40 e^((v - max v) / temperature))             w = 0 for what is rarer than 2^-40 of the likeliest
 *     top_k: the k largest v
 *     top_p: of these the fewest largest whose w reach top_p of all theirs, at least one
 *     min_p: of these, those with w >= min_p 2^40
 *     random = Philox4x32-10(seed, position); the first t with sum of w up to t > floor(random / 2^32 * sum of w)
 *
 * Of equal v the smaller token comes first throughout. Where the largest v is NaN or infinite, its first token is
 * taken, or, where all are -infinity, the first that the mask allows. Log-probabilities are those of the model among
 * the tokens that the mask allows: logit[t] - log(sum of e^logit), before all that follows the mask above; NaN where a
 * logit is NaN or the largest infinite.
 *
 * Sums are of integers: they have no order, so that neither the instruction set nor, on a GPU, the blocks that share a
 * row change a token. From the same logits a GPU's sample node draws the same token and finds the same
 * log-probabilities, but that the tokens beside NaN may be others. */
struct lla_draw {
    llaisysDataType_t dtype;
    size_t n;
    const void *logits; /* [n] */
    const struct lla_sampling_row *how;
    const int64_t *known;          /* [nknown]: prompt and answer, ids below n; read only where there is a penalty */
    size_t nknown, nprompt;        /* nprompt <= nknown */
    const struct lla_bias *bias;   /* [how->nbias], ids below n */
    const uint32_t *mask;          /* [ceil(n / 32)]: bit t % 32 of word t / 32 allows token t, and at least one is set;
                                      NULL: all are allowed */
    struct lla_candidate *scratch; /* [n] */
    struct lla_candidate *logprobs; /* [how->nlogprob], out: the chosen token's, then the largest; token -1 beyond n */
};
int32_t lla_cpu_draw(const struct lla_draw *draw);

/* Log-probabilities [n] from a GPU's odds, to the bit as lla_cpu_draw's. */
void lla_finish_logprobs(const struct lla_odds *odds, size_t n, struct lla_candidate *logprobs);

/* The instruction set in use: "avx512bf16", "avx512", "avx2" or "portable". Chosen at the first call by what the CPU
 * has, or by the environment variable LLAISYS_CPU_ISA, for diagnosis. */
const char *lla_cpu_isa_name(void);

/* [max_seq, head_dim] cosines and sines of RoPE in dtype, from double precision: angle = pos / theta^(2j / head_dim).
 */
void lla_rope_table(llaisysDataType_t dtype, size_t max_seq, size_t head_dim, double theta, void *out);

#ifdef __cplusplus
}
#endif

#endif
