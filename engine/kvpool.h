/* kvpool.h: which KV blocks of an arena are free. Block 0 is the dummy that padding rows write to, and never given out.
 */
#ifndef LLA_KVPOOL_H
#define LLA_KVPOOL_H

#include "../base/status.h"

#include <stddef.h>
#include <stdint.h>

struct lla_kvpool {
    int32_t *free; /* stack of free blocks */
    size_t nfree;
    size_t total; /* blocks that can be given out */
};

/* A pool of blocks 1 .. nblock - 1. */
lla_status lla_kvpool_create(size_t nblock, struct lla_kvpool *pool);
void lla_kvpool_destroy(struct lla_kvpool *pool);

/* Appends blocks to blocks[*count ..] until there are `want`; gives none and fails with LLA_ELIMIT where too few are
 * free. */
lla_status lla_kvpool_grow(struct lla_kvpool *pool, int32_t *blocks, size_t *count, size_t want);
/* Gives back blocks [keep, *count). */
void lla_kvpool_shrink(struct lla_kvpool *pool, const int32_t *blocks, size_t *count, size_t keep);

#endif
