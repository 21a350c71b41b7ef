/* test_step.c: a sequence's logits and tokens are the same to the bit alone and in any company, for any chunks of the
 * prompt, bucket, slot, order of KV blocks, number of threads, and whatever lay in memory that the step does not own.
 *
 * The reference of each sequence is a run alone, one token a step, one thread, in clean memory. */
#include "../../engine/kvpool.h"
#include "../../engine/runner.h"
#include "../../kernels/cpu/isa.h"
#include "harness.h"
#include "model.h"

#include <stdlib.h>

#if defined(__SANITIZE_ADDRESS__)
enum { SLOW = 1 };
#else
enum { SLOW = 0 };
#endif

enum { MAX_LENGTH = 640, MAX_BLOCKS = MAX_LENGTH };

static const struct model {
    const char *label;
    struct lla_spec spec;
    struct lla_limits limits;
    size_t lengths[6]; /* of the sequences; 0 ends them */
    int rounds;
} models[] = {
    {"group 3, head_dim 24, K 72",
     {LLAISYS_DTYPE_BF16, 2, 72, 6, 2, 24, 150, 131, 640, false, 1e-6f, 1e4, {0}, 0},
     {.max_seq = 640, .max_seqs = 5, .kv_tokens = 2000, .kv_block = 16, .prefill_chunk = 100},
     {601, 290, 70, 33, 1, 257},
     8},
    {"group 7, head_dim 16, odd FFN",
     {LLAISYS_DTYPE_F16, 2, 65, 7, 1, 16, 99, 101, 640, true, 1e-5f, 1e6, {0}, 0},
     {.max_seq = 560, .max_seqs = 8, .kv_tokens = 1500, .kv_block = 8, .prefill_chunk = 64},
     {530, 3, 258, 40, 90, 17},
     8},
    {"group 1, head_dim 64, K 33, blocks of 1",
     {LLAISYS_DTYPE_F32, 3, 33, 2, 2, 64, 65, 77, 640, false, 1e-6f, 1e4, {0}, 0},
     {.max_seq = 300, .max_seqs = 3, .kv_tokens = 700, .kv_block = 1, .prefill_chunk = 33},
     {280, 100, 12},
     6},
    {"group 2, head_dim 128, FFN in two K blocks",
     {LLAISYS_DTYPE_BF16, 1, 96, 4, 2, 128, 2113, 203, 640, true, 1e-6f, 1e4, {0}, 0},
     {.max_seq = 640, .max_seqs = 4, .kv_tokens = 1200, .kv_block = 256, .prefill_chunk = 128},
     {300, 90, 31},
     4},
    {"group 5, head_dim 10, hidden in two K blocks",
     {LLAISYS_DTYPE_BF16, 1, 2100, 5, 1, 10, 31, 67, 640, false, 1e-6f, 1e4, {0}, 0},
     {.max_seq = 320, .max_seqs = 4, .kv_tokens = 640, .kv_block = 32, .prefill_chunk = 40},
     {270, 20, 9},
     3},
};
enum { NMODEL = sizeof models / sizeof *models, MAX_SEQS = 6 };

struct sequence {
    size_t length;
    int64_t tokens[MAX_LENGTH];
    float *logits; /* [length, vocab]: the reference's */
    int64_t next[MAX_LENGTH];
};

static struct lla_runner runner;
static struct lla_crew *crews[4]; /* of 1, 2 and 3 threads; the first is the runner's */
static struct sequence sequences[MAX_SEQS];
static size_t nsequence;

/* Another way of choosing at each position: greedy, top_k, top_p, and all of them open. */
static struct lla_sampling_row sampling_at(size_t seq, size_t position) {
    static const struct lla_sampling_row rows[] = {{0},
                                                   {.temperature = 0.7f, .top_p = 1, .top_k = 5},
                                                   {.temperature = 1.3f, .top_p = 0.8f},
                                                   {.temperature = 1, .top_p = 1}};
    struct lla_sampling_row row = rows[(seq + position) % 4];
    row.seed = 1000 * seq + 7;
    return row;
}

static void open_model(const struct model *m) {
    CHECK_INT(lla_runner_create(&m->spec, &m->limits, (struct lla_shard){0, 1}, 0, 1, &runner), LLA_OK);
    crews[1] = runner.crew;
    for (size_t n = 2; n < 4; n++) CHECK_INT(lla_crew_create(n, &crews[n]), LLA_OK);
    fill_weights(&runner.graph, runner.arena, 99);
    struct rng rng = {7};
    for (nsequence = 0; nsequence < MAX_SEQS && m->lengths[nsequence]; nsequence++) {
        struct sequence *s = &sequences[nsequence];
        s->length = m->lengths[nsequence];
        s->logits = malloc(s->length * m->spec.vocab * sizeof *s->logits);
        for (size_t i = 0; i < s->length; i++) s->tokens[i] = (int64_t)rng_below(&rng, m->spec.vocab);
    }
}

static void close_model(void) {
    runner.crew = crews[1];
    lla_runner_destroy(&runner);
    for (size_t n = 2; n < 4; n++) lla_crew_destroy(crews[n]);
    for (size_t i = 0; i < nsequence; i++) free(sequences[i].logits);
}

static void run_references(void) {
    const size_t vocab = runner.graph.dims.vocab;
    int32_t blocks[MAX_BLOCKS];
    for (size_t b = 0; b < MAX_BLOCKS; b++) blocks[b] = (int32_t)b + 1;
    for (size_t i = 0; i < nsequence; i++) {
        struct sequence *s = &sequences[i];
        for (size_t p = 0; p < s->length; p++) {
            const struct lla_step_seq step = {.tokens = &s->tokens[p],
                                              .ntoken = 1,
                                              .position0 = p,
                                              .blocks = blocks,
                                              .want_next = true,
                                              .sampling = sampling_at(i, p)};
            CHECK_INT(lla_runner_step(&runner, &step, 1, &s->next[p]), LLA_OK);
            lla_runner_logits(&runner, 0, s->logits + p * vocab);
        }
    }
}

/* ---- memory ---- */

static size_t element(void) {
    return lla_dtype_size(runner.graph.dims.dtype);
}

/* All bits set: NaN in every dtype, -1 as an integer. Neither a step's inputs and activations nor KV that no sequence
 * owns may matter. owned [nblock]: tokens in use of each block. */
static void poison(const size_t *owned) {
    const struct lla_graph *g = &runner.graph;
    for (size_t i = 0; i < g->plan.nregion; i++) {
        const struct lla_region *r = &g->plan.regions[i];
        if (r->kind == LLA_R_ACTIVATION || r->kind == LLA_R_STEP) memset(runner.arena + r->offset, 0xff, r->nbytes);
    }
    const size_t token = g->dims.head_dim * element(), head = g->dims.kv_block * token;
    for (size_t cache = LLA_B_K_CACHE; cache <= LLA_B_V_CACHE; cache++)
        for (size_t layer = 0; layer < g->plan.spec.nlayer; layer++)
            for (size_t b = 0; b < g->plan.nblock; b++)
                for (size_t h = 0; h < g->dims.nkvhead; h++)
                    memset(runner.arena + g->offset[cache] + layer * g->kv_layer_stride +
                               (b * g->dims.nkvhead + h) * head + owned[b] * token,
                           0xff, (g->dims.kv_block - owned[b]) * token);
}

/* The regions that the host fills for a step. */
static void copy_inputs(char *to, const char *from) {
    static const enum lla_buf inputs[] = {LLA_B_HEADER,      LLA_B_TOKENS,     LLA_B_POSITIONS, LLA_B_ROW_SEQ,
                                          LLA_B_BLOCK_TABLE, LLA_B_LOGIT_ROWS, LLA_B_SAMPLING};
    for (size_t i = 0; i < sizeof inputs / sizeof *inputs; i++) {
        const struct lla_region *r = region_of(&runner.graph, inputs[i]);
        memcpy(to + r->offset, from + r->offset, r->nbytes);
    }
}

/* What the runner draws behind the program: tokens of rows that are not plain, and the draws' scratch. */
static void copy_drawn(char *to, const char *from, size_t logits) {
    const struct lla_graph *g = &runner.graph;
    const struct lla_sampling_row *how = (const struct lla_sampling_row *)(from + g->io.sampling);
    const size_t scratch = g->dims.vocab * sizeof(struct lla_candidate);
    for (size_t r = 0; r < logits; r++) {
        if (lla_is_plain(&how[r])) continue;
        memcpy(to + g->io.next + 4 * r, from + g->io.next + 4 * r, 4);
        memcpy(to + g->offset[LLA_B_CANDIDATES] + r * scratch, from + g->offset[LLA_B_CANDIDATES] + r * scratch,
               scratch);
    }
}

/* Runs the step that has just run again, node by node from the memory before it, in the smallest bucket or another. */
static void check_replay(char *before, size_t rows, size_t logits, struct rng *rng) {
    const size_t total = runner.graph.plan.total;
    char *again = malloc(total);
    for (size_t b = 0; b < runner.nprogram; b++) {
        const struct lla_program *p = &runner.programs[b];
        if (p->rows < rows || p->logits < logits) continue;
        memcpy(again, before, total);
        copy_inputs(again, runner.arena);
        for (size_t i = 0; i < p->nnode; i++) lla_exec_cpu(p, again, crews[rng_range(rng, 1, 3)], i, i + 1);
        copy_drawn(again, runner.arena, logits);
        if (memcmp(again, runner.arena, total)) HARNESS_FAIL("node by node in the bucket of %zu rows differs", p->rows);
    }
    free(again);
}

/* ---- random schedules ---- */

struct live {
    size_t seq, slot, done, nblock;
    int32_t blocks[MAX_BLOCKS];
    bool active;
};

static size_t saw_by_split, saw_whole, saw_replays;

/* Counts the paths that the attention of this step takes. */
static void note_path(const struct lla_step_seq *steps, size_t n) {
    bool single = true, long_context = false;
    for (size_t i = 0; i < n; i++) {
        single = single && steps[i].ntoken == 1;
        long_context |= steps[i].position0 + steps[i].ntoken > LLA_ATTN_SPLIT;
    }
    saw_by_split += single && long_context;
    saw_whole += !single && long_context;
}

static void owned_tokens(const struct live *lives, size_t *owned) {
    const size_t block = runner.graph.dims.kv_block;
    memset(owned, 0, runner.graph.plan.nblock * sizeof *owned);
    for (size_t i = 0; i < nsequence; i++)
        for (size_t b = 0; b < lives[i].nblock; b++) {
            const size_t left = lives[i].done > b * block ? lives[i].done - b * block : 0;
            owned[lives[i].blocks[b]] = left < block ? left : block;
        }
}

/* All sequences come, are computed in random pieces in random company, and go. */
static void run_schedule(const struct model *m, struct rng *rng) {
    const struct lla_graph *g = &runner.graph;
    const size_t vocab = g->dims.vocab, seqs = g->dims.max_seqs;
    struct live lives[MAX_SEQS] = {0};
    struct lla_kvpool pool;
    CHECK_INT(lla_kvpool_create(g->plan.nblock, g->dims.kv_block, &pool), LLA_OK);
    rng_shuffle(rng, pool.free, pool.nfree);
    size_t *owned = calloc(g->plan.nblock, sizeof *owned), finished = 0, style = rng_below(rng, 3);
    float *logits = malloc(vocab * sizeof *logits);
    char *before = malloc(g->plan.total);
    bool slot_used[8] = {false};

    while (finished < nsequence && !TEST_FAILURES) {
        struct lla_step_seq steps[MAX_SEQS];
        size_t who[MAX_SEQS], n = 0, rows = 0, wanted = 0;
        int32_t order[MAX_SEQS];
        int64_t next[MAX_SEQS];
        for (size_t i = 0; i < nsequence; i++) order[i] = (int32_t)i;
        rng_shuffle(rng, order, nsequence);
        /* styles: pieces of any size, mostly single tokens, mostly as long as they may be */
        const size_t most = style == 0   ? rng_range(rng, 1, 40)
                            : style == 1 ? (rng_below(rng, 6) ? 1 : 20)
                                         : g->dims.max_rows;
        for (size_t k = 0; k < nsequence && n < seqs; k++) {
            const size_t i = (size_t)order[k];
            struct live *l = &lives[i];
            const size_t left = sequences[i].length - l->done;
            if (!left || rng_below(rng, 4) == 0 || rows == g->dims.max_rows) continue;
            size_t count = rng_range(rng, 1, most < left ? most : left);
            if (style == 2 && rng_below(rng, 2)) count = most < left ? most : left;
            if (count > g->dims.max_rows - rows) count = g->dims.max_rows - rows;
            if (!l->active) {
                size_t slot = rng_below(rng, seqs), tries = 0;
                while (slot_used[slot] && tries++ < seqs) slot = (slot + 1) % seqs;
                if (slot_used[slot]) continue;
                l->slot = slot, l->active = slot_used[slot] = true;
            }
            if (lla_kvpool_grow(&pool, l->blocks, &l->nblock,
                                (l->done + count + g->dims.kv_block - 1) / g->dims.kv_block))
                continue; /* waits for blocks */
            steps[n] = (struct lla_step_seq){.slot = l->slot,
                                             .tokens = sequences[i].tokens + l->done,
                                             .ntoken = count,
                                             .position0 = l->done,
                                             .blocks = l->blocks,
                                             .want_next = count == left || rng_below(rng, 4),
                                             .sampling = sampling_at(i, l->done + count - 1)};
            wanted += steps[n].want_next;
            rows += count;
            who[n++] = i;
        }
        if (!n) continue;
        note_path(steps, n);
        owned_tokens(lives, owned);
        poison(owned);
        const bool replay = rng_below(rng, SLOW ? 100 : 30) == 0;
        if (replay) memcpy(before, runner.arena, g->plan.total);
        runner.crew = crews[rng_range(rng, 1, 3)];
        CHECK_INT(lla_runner_step(&runner, steps, n, next), LLA_OK);
        for (size_t i = 0, row = 0; i < n; i++) {
            const struct sequence *s = &sequences[who[i]];
            const size_t p = steps[i].position0 + steps[i].ntoken - 1;
            lives[who[i]].done = p + 1;
            if (!steps[i].want_next) {
                CHECK_INT(next[i], -1);
                continue;
            }
            lla_runner_logits(&runner, row++, logits);
            if (memcmp(logits, s->logits + p * vocab, vocab * sizeof *logits))
                HARNESS_FAIL(
                    "%s: logits of sequence %zu at %zu differ, in a step of %zu sequences and %zu rows, %zu threads",
                    m->label, who[i], p, n, rows, lla_crew_size(runner.crew));
            CHECK_INT(next[i], s->next[p]);
        }
        if (replay) check_replay(before, rows, wanted, rng), saw_replays++;
        for (size_t i = 0; i < n; i++) {
            struct live *l = &lives[who[i]];
            if (l->done < sequences[who[i]].length) continue;
            lla_kvpool_shrink(&pool, l->blocks, &l->nblock, 0);
            slot_used[l->slot] = false;
            finished++;
        }
    }
    free(before);
    free(logits);
    free(owned);
    lla_kvpool_destroy(&pool);
}

TEST(logits_do_not_depend_on_company) {
    struct rng rng = {2024};
    for (size_t i = 0; i < NMODEL && !TEST_FAILURES; i++) {
        open_model(&models[i]);
        run_references();
        saw_by_split = saw_whole = saw_replays = 0;
        for (int round = 0; round < (SLOW ? 2 : models[i].rounds) && !TEST_FAILURES; round++)
            run_schedule(&models[i], &rng);
        CHECK(saw_by_split && saw_whole && (SLOW || saw_replays));
        close_model();
    }
}

/* Greedy is the largest logit, the first of equals; sampling stays within top_k and differs from seed to seed. */
TEST(choices) {
    open_model(&models[0]);
    run_references();
    const size_t vocab = runner.graph.dims.vocab;
    size_t not_greedy = 0;
    for (size_t i = 0; i < nsequence; i++)
        for (size_t p = 0; p < sequences[i].length; p++) {
            const float *logits = sequences[i].logits + p * vocab, chosen = logits[sequences[i].next[p]];
            size_t above = 0, first = 0;
            for (size_t t = 0; t < vocab; t++) above += logits[t] > chosen;
            for (size_t t = 1; t < vocab; t++)
                if (logits[t] > logits[first]) first = t;
            const struct lla_sampling_row s = sampling_at(i, p);
            if (s.temperature == 0) CHECK_INT(sequences[i].next[p], first);
            if (s.top_k) CHECK(above < (size_t)s.top_k);
            not_greedy += above > 0;
            for (size_t t = 0; t < vocab; t++) CHECK(isfinite(logits[t]));
        }
    CHECK(not_greedy > 100);
    close_model();
}

/* ---- nodes ---- */

/* Sets what the node does not say that it reads to NaN; the caches stay, of which it writes a part only. */
static void poison_unread(const struct lla_node *node, char *arena) {
    char *keep = calloc(1, runner.graph.plan.total);
    for (int pass = 0; pass < 2; pass++)
        for (int id = 0; id < LLA_B_COUNT; id++) {
            const struct lla_region *r = region_of(&runner.graph, id);
            if (pass == 0 && node->reads >> id & 1) memset(keep + r->offset, 1, r->nbytes);
            if (pass == 0 || r->kind == LLA_R_KV) continue;
            for (size_t b = r->offset; b < r->offset + r->nbytes; b++)
                if (!keep[b]) arena[b] = (char)0xff;
        }
    free(keep);
}

/* Bytes that a node changes lie in buffers that it says it writes, and depend on nothing but what it says it reads. */
TEST(nodes_touch_what_they_say) {
    for (size_t m = 0; m < 3; m++) {
        open_model(&models[m]);
        const struct lla_graph *g = &runner.graph;
        const size_t total = g->plan.total;
        char *before = malloc(total), *clean = malloc(total), *dirty = malloc(total), *may = malloc(total);
        int32_t blocks[MAX_BLOCKS], others[MAX_BLOCKS];
        for (size_t b = 0; b < MAX_BLOCKS; b++)
            blocks[b] = (int32_t)b + 1, others[b] = (int32_t)(g->plan.nblock - 1 - b);
        const struct lla_step_seq steps[2] = {
            {.slot = 2, .tokens = sequences[0].tokens, .ntoken = 11, .blocks = blocks, .want_next = true},
            {.slot = 0,
             .tokens = sequences[1].tokens,
             .ntoken = 2,
             .blocks = others,
             .want_next = true,
             .sampling = sampling_at(1, 0)}};
        int64_t next[2];
        memcpy(before, runner.arena, total);
        CHECK_INT(lla_runner_step(&runner, steps, 2, next), LLA_OK);
        copy_inputs(before, runner.arena);
        const struct lla_program *p = &runner.programs[runner.nprogram - 1];
        for (size_t i = 0; i < p->nnode; i++) {
            memcpy(clean, before, total);
            memcpy(dirty, before, total);
            poison_unread(&p->nodes[i], dirty);
            lla_exec_cpu(p, clean, crews[2], i, i + 1);
            lla_exec_cpu(p, dirty, crews[1], i, i + 1);
            memset(may, 0, total);
            for (int id = 0; id < LLA_B_COUNT; id++)
                if (p->nodes[i].writes >> id & 1) memset(may + region_of(g, id)->offset, 1, region_of(g, id)->nbytes);
            size_t astray = 0, moved = 0, changed = 0;
            for (size_t b = 0; b < total; b++) {
                if (clean[b] == before[b]) continue;
                changed++;
                astray += !may[b];
                moved += clean[b] != dirty[b];
            }
            if (astray || moved || !changed)
                HARNESS_FAIL(
                    "%s: node %zu %s: %zu bytes change, %zu outside of what it writes, %zu by what it does not read",
                    models[m].label, i, p->nodes[i].name, changed, astray, moved);
            memcpy(before, clean, total);
        }
        free(before), free(clean), free(dirty), free(may);
        close_model();
    }
}

/* ---- one step ahead ---- */

/* Two sequences of which each step is launched before the one before it is waited for, their tokens fed by that one:
 * the tokens are those of steps one by one. The entries change places, and a third sequence's prompt joins for a while.
 */
TEST(steps_fed_by_the_step_before) {
    enum { STEPS = 12 };
    int32_t blocks[3][MAX_BLOCKS];
    int64_t expected[2][STEPS], next[3], unknown = -1;
    for (size_t m = 0; m < 3; m++) {
        open_model(&models[m]);
        const size_t each = (runner.graph.plan.nblock - 1) / 3;
        for (size_t s = 0; s < 3; s++)
            for (size_t b = 0; b < MAX_BLOCKS; b++) blocks[s][b] = (int32_t)(s * each + b % each) + 1;
        struct lla_step_seq waited[3] = {0}; /* no log-probabilities */
        for (size_t s = 0; s < 2; s++)
            for (size_t t = 0; t < STEPS; t++) {
                const struct lla_step_seq one = {.slot = s,
                                                 .tokens = t ? &expected[s][t - 1] : sequences[s].tokens,
                                                 .ntoken = t ? 1 : 3 + s,
                                                 .position0 = t ? 2 + s + t : 0,
                                                 .blocks = blocks[s],
                                                 .want_next = true,
                                                 .sampling = sampling_at(s, t)};
                CHECK_INT(lla_runner_step(&runner, &one, 1, &expected[s][t]), LLA_OK);
            }
        for (size_t t = 0; t <= STEPS; t++) {
            size_t n = 0;
            int32_t feed[3];
            struct lla_step_seq step[3];
            const bool has_prompt = t % 3 == 1;
            if (has_prompt) { /* before the others: logit rows are not entries */
                feed[n] = -1;
                step[n++] =
                    (struct lla_step_seq){.slot = 2, .tokens = sequences[2].tokens, .ntoken = 2, .blocks = blocks[2]};
            }
            for (size_t k = 0; k < 2 && t < STEPS; k++) {
                const size_t s = (k + t) % 2;
                const int32_t before = (int32_t)((s + t - 1) % 2) + ((t - 1) % 3 == 1); /* its entry in the last step */
                feed[n] = t ? before : -1;
                step[n++] = (struct lla_step_seq){.slot = s,
                                                  .tokens = t ? &unknown : sequences[s].tokens,
                                                  .ntoken = t ? 1 : 3 + s,
                                                  .position0 = t ? 2 + s + t : 0,
                                                  .blocks = blocks[s],
                                                  .want_next = true,
                                                  .sampling = sampling_at(s, t)};
            }
            if (n) CHECK_INT(lla_runner_launch(&runner, step, t ? feed : NULL, n), LLA_OK);
            if (t) {
                const size_t last = t - 1, prompt = last % 3 == 1;
                CHECK_INT(lla_runner_wait(&runner, waited, 2 + prompt, next), LLA_OK);
                if (prompt) CHECK_INT(next[0], -1);
                for (size_t k = 0; k < 2; k++) CHECK_INT(next[prompt + k], expected[(k + last) % 2][last]);
            }
        }
        if (runner.launched > runner.waited) CHECK_INT(lla_runner_wait(&runner, waited, 1, next), LLA_OK);
        close_model();
    }
}

/* ---- refusals ---- */

static void check_refused(const struct lla_step_seq *steps, size_t n, const char *message) {
    char *before = malloc(runner.graph.plan.total);
    int64_t next[16];
    memcpy(before, runner.arena, runner.graph.plan.total);
    lla_clear_error();
    CHECK(lla_runner_step(&runner, steps, n, next));
    CHECK_STR_HAS(lla_last_error(), message);
    CHECK(!memcmp(before, runner.arena, runner.graph.plan.total));
    free(before);
}

static void check_fed(const struct lla_step_seq *steps, const int32_t *feed, size_t n, const char *message) {
    char *before = malloc(runner.graph.plan.total);
    memcpy(before, runner.arena, runner.graph.plan.total);
    lla_clear_error();
    CHECK(lla_runner_launch(&runner, steps, feed, n));
    CHECK_STR_HAS(lla_last_error(), message);
    CHECK(!memcmp(before, runner.arena, runner.graph.plan.total));
    free(before);
}

/* The header counts splits where each row is alone of its sequence, and only there. */
TEST(headers) {
    open_model(&models[0]);
    int32_t blocks[MAX_BLOCKS], others[MAX_BLOCKS];
    for (size_t b = 0; b < MAX_BLOCKS; b++)
        blocks[b] = (int32_t)b + 1, others[b] = (int32_t)(runner.graph.plan.nblock - 1 - b);
    const struct lla_step_header *header = (const struct lla_step_header *)(runner.arena + runner.graph.io.header);
    struct lla_step_seq steps[2] = {{.slot = 1,
                                     .tokens = sequences[0].tokens,
                                     .ntoken = 1,
                                     .position0 = LLA_CUDA_SPLIT,
                                     .blocks = blocks,
                                     .want_next = true},
                                    {.slot = 3,
                                     .tokens = sequences[1].tokens,
                                     .ntoken = 1,
                                     .position0 = LLA_CUDA_SPLIT - 1,
                                     .blocks = others,
                                     .want_next = true}};
    int64_t next[2];
    CHECK_INT(lla_runner_step(&runner, steps, 2, next), LLA_OK);
    CHECK_INT(header->nrow, 2);
    CHECK_INT(header->nlogit, 2);
    CHECK_INT(header->nsplit, 3);
    CHECK_INT(header->longest, 2);
    steps[1].ntoken = 2;
    CHECK_INT(lla_runner_step(&runner, steps, 2, next), LLA_OK);
    CHECK_INT(header->nrow, 3);
    CHECK_INT(header->nsplit, 0);
    CHECK_INT(header->longest, 0);
    close_model();
}

TEST(steps_refused) {
    open_model(&models[2]); /* 300 tokens a sequence, 3 sequences, 33 rows, 701 blocks of 1 */
    int32_t blocks[MAX_BLOCKS];
    for (size_t b = 0; b < MAX_BLOCKS; b++) blocks[b] = (int32_t)b + 1;
    int64_t tokens[64] = {0};
    const struct lla_step_seq good = {.tokens = tokens, .ntoken = 1, .blocks = blocks, .want_next = true};
    struct lla_step_seq s[4] = {good, good, good, good};
    for (size_t i = 0; i < 4; i++) s[i].slot = i % 3;
    check_refused(s, 0, "a step of 0 sequences, the plan allows 1 to 3");
    s[0].slot = 3;
    check_refused(s, 1, "sequence slot 3, expected less than 3");
    s[0] = good, s[0].ntoken = 0;
    check_refused(s, 1, "at least one token");
    s[0].ntoken = 34;
    check_refused(s, 1, "a step of 34 rows");
    s[0].ntoken = 2, s[0].position0 = 299;
    check_refused(s, 1, "2 tokens behind 299 exceed the sequence limit of 300");
    s[0].position0 = SIZE_MAX;
    check_refused(s, 1, "exceed the sequence limit");
    s[0] = good, tokens[0] = 77;
    check_refused(s, 1, "token 0 is 77, expected an id from 0 to 76");
    tokens[0] = -1;
    check_refused(s, 1, "token 0 is -1");
    tokens[0] = 0, blocks[0] = 0;
    check_refused(s, 1, "KV block 0, expected 1 to 700");
    blocks[0] = 701;
    check_refused(s, 1, "KV block 701");
    blocks[0] = 1, s[1].slot = s[0].slot;
    check_refused(s, 2, "sequence slot 0 stands twice in a step");
    int64_t next[3];
    CHECK(lla_runner_wait(&runner, s, 1, next));
    CHECK_STR_HAS(lla_last_error(), "no step is in flight");
    tokens[0] = -1;
    check_fed(s, (int32_t[]){0}, 1, "entry 0 of the step before has chosen no token");
    tokens[0] = 0, s[0].want_next = false, s[1].slot = 1;
    CHECK_INT(lla_runner_step(&runner, s, 2, next), LLA_OK);
    tokens[0] = -1;
    check_fed(s, (int32_t[]){0}, 1, "entry 0 of the step before has chosen no token");
    check_fed(s, (int32_t[]){3}, 1, "entry 3 of the step before has chosen no token");
    s[0].ntoken = 2;
    check_fed(s, (int32_t[]){1}, 1, "2 tokens, the first -1, of an entry that takes the choice of entry 1");
    s[0].ntoken = 1, tokens[0] = 5;
    check_fed(s, (int32_t[]){1}, 1, "expected one, -1");
    tokens[0] = 0;
    for (int i = 0; i < 2; i++) CHECK_INT(lla_runner_launch(&runner, s, NULL, 1), LLA_OK);
    check_fed(s, NULL, 1, "a third step was launched while two are in flight");
    check_refused(s, 1, "a step is in flight");
    for (int i = 0; i < 2; i++) CHECK_INT(lla_runner_wait(&runner, s, 1, next), LLA_OK);
    close_model();
}

RUN_TESTS()
