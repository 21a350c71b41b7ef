#include "kvpool.h"

#include <stdlib.h>

lla_status lla_kvpool_create(size_t nblock, struct lla_kvpool *pool) {
    pool->total = nblock - 1;
    pool->free = malloc(nblock * sizeof *pool->free);
    LLA_REQUIRE(pool->free, LLA_ENOMEM, "no memory for a pool of %zu KV blocks", nblock);
    for (pool->nfree = 0; pool->nfree < pool->total; pool->nfree++)
        pool->free[pool->nfree] = (int32_t)(pool->total - pool->nfree); /* the lowest block on top */
    return LLA_OK;
}

void lla_kvpool_destroy(struct lla_kvpool *pool) {
    free(pool->free);
    pool->free = NULL;
}

lla_status lla_kvpool_grow(struct lla_kvpool *pool, int32_t *blocks, size_t *count, size_t want) {
    if (want <= *count) return LLA_OK;
    LLA_REQUIRE(want - *count <= pool->nfree, LLA_ELIMIT, "%zu KV blocks are needed, %zu of %zu are free",
                want - *count, pool->nfree, pool->total);
    while (*count < want) blocks[(*count)++] = pool->free[--pool->nfree];
    return LLA_OK;
}

void lla_kvpool_shrink(struct lla_kvpool *pool, const int32_t *blocks, size_t *count, size_t keep) {
    while (*count > keep) pool->free[pool->nfree++] = blocks[--*count];
}
