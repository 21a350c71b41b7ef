/* test_kvpool.c: no block is lost, given twice or written while shared; what is found is the asker's own prefix; the
 * oldest goes first. A million random operations are compared with a naive model that searches everything.
 *
 * Another seed: `test_kvpool random 12345`, or the environment variable LLAISYS_TEST_SEED. */
#include "../../engine/kvpool.h"
#include "harness.h"
#include "random.h"

#include <stdbool.h>
#include <stdlib.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { OPERATIONS = 200000 };
#else
enum { OPERATIONS = 1000000 };
#endif
enum { SEQS = 12, BLOCKS = 49, GRAIN = 4, LONGEST = 60, MOST = LONGEST / GRAIN + 1, TEXTS = 40, SALTS = 2 };

static uint64_t test_seed = 5;

/* ---- the model ---- */

struct model_seq {
    struct lla_kvseq kv;
    int32_t blocks[MOST];
    int64_t tokens[LONGEST];
    size_t ntoken, computed; /* KV of positions below computed is in the blocks */
    size_t known;            /* as kv.nknown should be */
    uint64_t before;         /* the model's name of block known - 1 */
    bool live;
};

struct model_block {
    uint64_t content[GRAIN]; /* digest of the whole prefix that each position's KV was computed from */
    uint64_t name, before, salt;
    int64_t tokens[GRAIN];
    uint64_t idle_since; /* of a named block without users */
};

static struct lla_kvpool pool;
static struct model_seq seqs[SEQS];
static struct model_block blocks[BLOCKS];
static int64_t texts[TEXTS][LONGEST];
static uint64_t model_names, model_time;
static size_t saw_found, saw_evicted, saw_refused, saw_adopted, saw_twins, saw_shared;

static uint64_t digest(const struct model_seq *s, size_t position) {
    uint64_t h = 7 + s->kv.salt;
    for (size_t i = 0; i <= position; i++) h = (h ^ (uint64_t)s->tokens[i]) * 0x100000001b3u + i;
    return h;
}

static size_t users(int32_t b) {
    size_t n = 0;
    for (size_t s = 0; s < SEQS; s++)
        for (size_t i = 0; i < seqs[s].kv.nblock; i++) n += seqs[s].blocks[i] == b;
    return n;
}

static int32_t model_find(const struct model_seq *s, size_t index) {
    for (int32_t b = 1; b < BLOCKS; b++)
        if (blocks[b].name && blocks[b].before == s->before && blocks[b].salt == s->kv.salt &&
            !memcmp(blocks[b].tokens, s->tokens + index * GRAIN, sizeof blocks[b].tokens))
            return b;
    return 0;
}

/* The named block without users that has been so for longest. */
static int32_t model_oldest(void) {
    int32_t oldest = 0;
    for (int32_t b = 1; b < BLOCKS; b++)
        if (blocks[b].name && !users(b) && (!oldest || blocks[b].idle_since < blocks[oldest].idle_since)) oldest = b;
    return oldest;
}

/* ---- operations, each checked ---- */

static void check_counts(void) {
    size_t nfree = 0, cached = 0, active = 0;
    for (int32_t b = 1; b < BLOCKS; b++) {
        const size_t n = users(b);
        CHECK_INT(pool.blocks[b].refs, n);
        if (n)
            active++;
        else if (blocks[b].name)
            cached++;
        else
            nfree++;
        saw_shared += n > 1;
    }
    CHECK_INT(pool.nfree, nfree);
    CHECK_INT(pool.ncached, cached);
    CHECK_INT(pool.nactive, active);
    CHECK_INT(pool.nfree + pool.ncached + pool.nactive, pool.total);
    if (lla_kvpool_check(&pool)) HARNESS_FAIL("%s", lla_last_error());
}

static void match(struct model_seq *s, size_t ntoken) {
    int32_t expected[MOST];
    size_t n = 0, known = s->known;
    for (; !s->kv.is_private && (s->known + 1) * GRAIN <= ntoken; n++, s->known++) {
        const int32_t b = model_find(s, s->known);
        if (!b) break;
        expected[s->known] = b;
        s->before = blocks[b].name;
    }
    const size_t held = s->kv.nblock;
    CHECK_INT(lla_kvpool_match(&pool, &s->kv, s->tokens, ntoken), n);
    CHECK_INT(s->kv.nknown, s->known);
    CHECK_INT(s->kv.nblock, held > s->known ? held : s->known);
    for (size_t i = known; i < s->known; i++) {
        CHECK_INT(s->blocks[i], expected[i]);
        for (size_t j = 0; j < GRAIN; j++) CHECK(blocks[s->blocks[i]].content[j] == digest(s, i * GRAIN + j));
    }
    s->computed = s->known * GRAIN > s->computed ? s->known * GRAIN : s->computed;
    saw_found += n;
    saw_adopted += held > known ? n : 0;
}

static bool grow(struct model_seq *s, size_t want) {
    const size_t before = s->kv.nblock, available = lla_kvpool_available(&pool);
    int32_t evicted[MOST];
    size_t nevicted = 0;
    if (want > before && want - before > available) {
        lla_clear_error();
        CHECK_INT(lla_kvpool_grow(&pool, s->blocks, &s->kv.nblock, want), LLA_ELIMIT);
        CHECK_STR_HAS(lla_last_error(), "KV blocks are needed");
        CHECK_INT(s->kv.nblock, before);
        saw_refused++;
        return false;
    }
    for (size_t need = want > before ? want - before : 0, i = pool.nfree; i < need; i++) {
        evicted[nevicted] = model_oldest();
        blocks[evicted[nevicted++]].name = 0;
    }
    const size_t nfree = pool.nfree;
    CHECK_INT(lla_kvpool_grow(&pool, s->blocks, &s->kv.nblock, want), LLA_OK);
    CHECK_INT(s->kv.nblock, want > before ? want : before);
    for (size_t i = before; i < s->kv.nblock; i++) {
        CHECK(s->blocks[i] > 0 && s->blocks[i] < BLOCKS);
        CHECK_INT(users(s->blocks[i]), 1);
        CHECK(!blocks[s->blocks[i]].name);
        if (i - before >= nfree) CHECK_INT(s->blocks[i], evicted[i - before - nfree]);
    }
    saw_evicted += nevicted;
    return true;
}

static void compute(struct model_seq *s, size_t n) {
    const size_t end = s->computed + n;
    if (!grow(s, (end + GRAIN - 1) / GRAIN)) return;
    for (; s->computed < end; s->computed++) {
        const int32_t b = s->blocks[s->computed / GRAIN];
        CHECK_INT(users(b), 1); /* nobody writes to what others read */
        CHECK(!blocks[b].name);
        blocks[b].content[s->computed % GRAIN] = digest(s, s->computed);
    }
}

static void commit(struct model_seq *s) {
    for (; !s->kv.is_private && (s->known + 1) * GRAIN <= s->computed; s->known++) {
        int32_t b = model_find(s, s->known);
        saw_twins += b != 0;
        if (!b) {
            b = s->blocks[s->known];
            blocks[b].name = ++model_names;
            blocks[b].before = s->before;
            blocks[b].salt = s->kv.salt;
            memcpy(blocks[b].tokens, s->tokens + s->known * GRAIN, sizeof blocks[b].tokens);
        }
        s->before = blocks[b].name;
    }
    lla_kvpool_commit(&pool, &s->kv, s->tokens, s->computed);
    CHECK_INT(s->kv.nknown, s->known);
}

static void release(struct model_seq *s) {
    int32_t held[MOST];
    const size_t n = s->kv.nblock;
    memcpy(held, s->blocks, n * sizeof *held);
    lla_kvpool_release(&pool, &s->kv);
    CHECK_INT(s->kv.nblock, 0);
    for (size_t i = n; i-- > 0;)
        if (!users(held[i])) blocks[held[i]].idle_since = ++model_time;
    s->live = false;
    s->known = s->computed = s->before = 0;
}

static void start(struct model_seq *s, struct rng *rng) {
    s->live = true;
    s->kv = (struct lla_kvseq){
        .blocks = s->blocks, .salt = rng_below(rng, 8) ? 0 : 1, .is_private = rng_below(rng, 8) == 0};
    int64_t *text = texts[rng_below(rng, TEXTS)];
    if (rng_below(rng, 4) == 0) /* a branch: it replaces the text, so that old branches are forgotten */
        for (size_t i = rng_below(rng, LONGEST); i < LONGEST; i++) text[i] = (int64_t)rng_below(rng, 2);
    memcpy(s->tokens, text, sizeof s->tokens);
    s->ntoken = rng_range(rng, 1, LONGEST);
    match(s, s->ntoken - 1);
}

static void operate(struct rng *rng) {
    struct model_seq *s = &seqs[rng_below(rng, SEQS)];
    if (!s->live) {
        start(s, rng);
        return;
    }
    const size_t left = s->ntoken - s->computed;
    switch (rng_below(rng, 8)) {
    case 0:
        release(s);
        break;
    case 1: /* ask for room long before it is needed, then for what others have computed since */
        grow(s, (s->ntoken + GRAIN - 1) / GRAIN);
        break;
    case 2:
        if (s->computed == s->known * GRAIN) match(s, s->ntoken - 1);
        break;
    case 3: /* want no more than there is */
        grow(s, rng_below(rng, s->kv.nblock + 1));
        break;
    default:
        if (left) compute(s, rng_range(rng, 1, left < 9 ? left : 9));
        if (rng_below(rng, 3)) commit(s);
    }
}

static void run_operations(struct rng *rng, size_t operations, bool collide) {
    CHECK_INT(lla_kvpool_create(BLOCKS, GRAIN, &pool), LLA_OK);
    CHECK_INT(pool.total, BLOCKS - 1);
    if (collide) pool.mask = 0; /* every key in one bucket: tokens decide, not hashes */
    memset(seqs, 0, sizeof seqs);
    memset(blocks, 0, sizeof blocks);
    for (size_t t = 0; t < TEXTS; t++)
        for (size_t i = 0; i < LONGEST; i++) texts[t][i] = i < 8 ? (int64_t)(t % 3) : (int64_t)rng_below(rng, 2);
    for (size_t i = 0; i < operations && !TEST_FAILURES; i++) {
        operate(rng);
        if (i % 8 == 0) check_counts();
    }
    for (size_t i = 0; i < SEQS; i++) release(&seqs[i]);
    check_counts();
    CHECK_INT(pool.nactive, 0);
    lla_kvpool_destroy(&pool);
}

TEST(random_operations) {
    struct rng rng = {test_seed};
    run_operations(&rng, OPERATIONS, false);
    run_operations(&rng, OPERATIONS / 10, true);
    const size_t enough = OPERATIONS / 1000;
    CHECK(saw_found > enough && saw_evicted > enough && saw_refused > enough && saw_adopted > enough / 10 &&
          saw_twins > enough && saw_shared > enough);
    if (TEST_FAILURES) fprintf(stderr, "seed %llu\n", (unsigned long long)test_seed);
}

/* ---- what sequences may count on ---- */

static struct lla_kvseq asker(int32_t *list) {
    return (struct lla_kvseq){.blocks = list};
}

/* Whatever was computed is found again, but for the last block's part, until something needs the room. */
TEST(a_follow_up_computes_at_most_a_block) {
    CHECK_INT(lla_kvpool_create(40, 16, &pool), LLA_OK);
    int64_t tokens[400];
    int32_t list[40];
    for (size_t i = 0; i < 400; i++) tokens[i] = (int64_t)(i % 7);
    for (size_t n = 1; n < 300; n++) {
        struct lla_kvseq seq = asker(list);
        seq.salt = n;
        CHECK_INT(lla_kvpool_match(&pool, &seq, tokens, n), 0);
        CHECK_INT(lla_kvpool_grow(&pool, list, &seq.nblock, (n + 15) / 16), LLA_OK);
        lla_kvpool_commit(&pool, &seq, tokens, n);
        lla_kvpool_release(&pool, &seq);
        const size_t found = 16 * lla_kvpool_match(&pool, &seq, tokens, 400);
        CHECK(found <= n && n - found < 16);
        lla_kvpool_release(&pool, &seq);
        CHECK_INT(pool.nactive, 0);
    }
    lla_kvpool_destroy(&pool);
}

TEST(opt_out_and_salt) {
    CHECK_INT(lla_kvpool_create(20, 4, &pool), LLA_OK);
    const int64_t tokens[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    int32_t list[4], other[4];
    struct lla_kvseq one = asker(list), two = asker(other);
    one.is_private = true;
    CHECK_INT(lla_kvpool_grow(&pool, list, &one.nblock, 2), LLA_OK);
    lla_kvpool_commit(&pool, &one, tokens, 8);
    CHECK_INT(lla_kvpool_match(&pool, &two, tokens, 8), 0); /* it leaves nothing */
    lla_kvpool_release(&pool, &one);
    CHECK_INT(pool.nfree, 19);
    one.is_private = false, one.salt = 9;
    CHECK_INT(lla_kvpool_grow(&pool, list, &one.nblock, 2), LLA_OK);
    lla_kvpool_commit(&pool, &one, tokens, 8);
    CHECK_INT(lla_kvpool_match(&pool, &two, tokens, 8), 0);
    two.salt = 9;
    CHECK_INT(lla_kvpool_match(&pool, &two, tokens, 7), 1); /* whole blocks alone */
    CHECK_INT(lla_kvpool_match(&pool, &two, tokens, 8), 1);
    CHECK(!memcmp(list, other, 2 * sizeof *list));
    CHECK_INT(pool.nactive, 2);
    lla_kvpool_release(&pool, &two);
    two.is_private = true;
    CHECK_INT(lla_kvpool_match(&pool, &two, tokens, 8), 0); /* it finds nothing */
    lla_kvpool_release(&pool, &one);
    CHECK_INT(pool.ncached, 2);
    lla_kvpool_destroy(&pool);
}

/* Eviction takes a text from its end, so that its beginning can still be used. */
TEST(the_end_goes_first) {
    CHECK_INT(lla_kvpool_create(9, 2, &pool), LLA_OK);
    const int64_t tokens[16] = {1, 2, 3, 4, 5, 6, 7, 8, 9};
    int32_t list[8], others[8];
    struct lla_kvseq one = asker(list), two = asker(others);
    CHECK_INT(lla_kvpool_grow(&pool, list, &one.nblock, 8), LLA_OK);
    lla_kvpool_commit(&pool, &one, tokens, 16);
    lla_kvpool_release(&pool, &one);
    CHECK_INT(pool.ncached, 8);
    CHECK_INT(lla_kvpool_grow(&pool, others, &two.nblock, 3), LLA_OK);
    CHECK_INT(pool.evicted, 3);
    CHECK_INT(lla_kvpool_match(&pool, &one, tokens, 16), 5);
    lla_kvpool_release(&pool, &one);
    lla_kvpool_release(&pool, &two);
    CHECK_INT(pool.nfree, 3);
    CHECK_INT(lla_kvpool_check(&pool), LLA_OK);
    lla_kvpool_destroy(&pool);
}

/* The audit is worth something only if it fails. */
TEST(the_audit_sees) {
    CHECK_INT(lla_kvpool_create(9, 2, &pool), LLA_OK);
    int32_t list[8];
    size_t count = 0;
    CHECK_INT(lla_kvpool_grow(&pool, list, &count, 3), LLA_OK);
    CHECK_INT(lla_kvpool_check(&pool), LLA_OK);
    pool.nfree--;
    CHECK(lla_kvpool_check(&pool));
    pool.nfree++, pool.blocks[list[0]].refs = 0;
    CHECK(lla_kvpool_check(&pool));
    pool.blocks[list[0]].refs = 1, pool.free[0] = list[1];
    CHECK(lla_kvpool_check(&pool));
    lla_kvpool_destroy(&pool);
}

TEST(only_the_dummy) {
    int32_t block;
    size_t count = 0;
    CHECK_INT(lla_kvpool_create(1, 16, &pool), LLA_OK);
    CHECK_INT(lla_kvpool_grow(&pool, &block, &count, 0), LLA_OK);
    CHECK_INT(lla_kvpool_grow(&pool, &block, &count, 1), LLA_ELIMIT);
    CHECK_INT(count, 0);
    lla_kvpool_destroy(&pool);
}

int main(int argc, char **argv) {
    const char *seed = argc > 2 ? argv[2] : getenv("LLAISYS_TEST_SEED");
    if (seed) test_seed = strtoull(seed, NULL, 10);
    return harness_main(argc > 1 ? argv[1] : NULL);
}
