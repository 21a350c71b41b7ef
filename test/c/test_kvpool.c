/* test_kvpool.c: no block is lost or given twice, whatever sequences come and go. */
#include "../../engine/kvpool.h"
#include "harness.h"
#include "random.h"

#include <stdlib.h>

enum { SEQS = 9, BLOCKS = 64 };

/* Every block but the dummy is either free or with one sequence. */
static void check_conserved(const struct lla_kvpool *pool, int32_t held[SEQS][BLOCKS], const size_t *count) {
    int seen[BLOCKS] = {0};
    size_t used = 0;
    for (size_t i = 0; i < pool->nfree; i++) {
        CHECK(pool->free[i] > 0 && pool->free[i] < BLOCKS);
        seen[pool->free[i]]++;
    }
    for (size_t s = 0; s < SEQS; s++)
        for (size_t i = 0; i < count[s]; i++, used++) {
            CHECK(held[s][i] > 0 && held[s][i] < BLOCKS);
            seen[held[s][i]]++;
        }
    CHECK_INT(seen[0], 0);
    for (int b = 1; b < BLOCKS; b++) CHECK_INT(seen[b], 1);
    CHECK_INT(pool->nfree + used, pool->total);
}

TEST(random_operations) {
    struct rng rng = {5};
    struct lla_kvpool pool;
    int32_t held[SEQS][BLOCKS];
    size_t count[SEQS] = {0}, refused = 0, emptied = 0;
    CHECK_INT(lla_kvpool_create(BLOCKS, &pool), LLA_OK);
    CHECK_INT(pool.total, BLOCKS - 1);
    for (int round = 0; round < 20000 && !TEST_FAILURES; round++) {
        size_t s = rng_below(&rng, SEQS), before = count[s], nfree = pool.nfree;
        int32_t copy[BLOCKS];
        memcpy(copy, held[s], sizeof copy);
        if (rng_below(&rng, 3)) {
            size_t want = before + rng_below(&rng, 12);
            if (rng_below(&rng, 8) == 0) want = rng_below(&rng, before + 1); /* less than there is changes nothing */
            if (want > BLOCKS - 1) want = BLOCKS - 1;
            lla_status status = lla_kvpool_grow(&pool, held[s], &count[s], want);
            if (want > before && want - before > nfree) {
                CHECK_INT(status, LLA_ELIMIT);
                CHECK_STR_HAS(lla_last_error(), "KV blocks are needed");
                CHECK_INT(count[s], before);
                CHECK_INT(pool.nfree, nfree);
                refused++;
            } else {
                CHECK_INT(status, LLA_OK);
                CHECK_INT(count[s], want > before ? want : before);
            }
            CHECK(!memcmp(held[s], copy, before * sizeof *copy)); /* what a sequence has stays where it is */
        } else {
            size_t keep = rng_below(&rng, 3) ? rng_below(&rng, before + 3) : 0;
            lla_kvpool_shrink(&pool, held[s], &count[s], keep);
            CHECK_INT(count[s], keep < before ? keep : before);
            emptied += before && !count[s];
        }
        check_conserved(&pool, held, count);
    }
    CHECK(refused > 100 && emptied > 100);
    for (size_t s = 0; s < SEQS; s++) lla_kvpool_shrink(&pool, held[s], &count[s], 0);
    CHECK_INT(pool.nfree, pool.total);
    lla_kvpool_destroy(&pool);
}

TEST(only_the_dummy) {
    struct lla_kvpool pool;
    int32_t block;
    size_t count = 0;
    CHECK_INT(lla_kvpool_create(1, &pool), LLA_OK);
    CHECK_INT(lla_kvpool_grow(&pool, &block, &count, 0), LLA_OK);
    CHECK_INT(lla_kvpool_grow(&pool, &block, &count, 1), LLA_ELIMIT);
    CHECK_INT(count, 0);
    lla_kvpool_destroy(&pool);
}

RUN_TESTS()
