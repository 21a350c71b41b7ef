/* kvpool.h: the KV blocks of an arena: who uses them, what they hold, and which may be taken.
 *
 * Block 0 is the dummy that padding rows write to, and never given out. Every other block is
 *
 *     free     used by nobody, and nothing in it is worth keeping;
 *     cached   used by nobody, but it holds the KV of kv_block known tokens behind a known prefix: the least recently
 *              used one is evicted when no block is free;
 *     active   used by one sequence or shared by several: refs counts them;
 *
 * so that free + cached + active = total, always. A full block gets a name when it is committed: a number that is never
 * used again. It is found under the key (salt, name of the block before it, its tokens), which is compared whole, so
 * that a collision of hashes cannot hand out another text's KV. Names chain blocks to their exact prefix; a block whose
 * prefix was evicted is not found again and goes when its turn comes. A sequence gives its last block back first, so
 * that eviction takes a chain from its end.
 *
 * Only full blocks are shared, and nobody writes to a full block: sharing copies nothing. The tokens behind the last
 * full block are computed again by whoever continues the text, less than one block of them.
 *
 * Ownership: a sequence's block list is its caller's memory, the references in it are given back by lla_kvpool_release
 * or lla_kvpool_shrink. Threads: one at a time. All memory is taken by lla_kvpool_create. */
#ifndef LLA_KVPOOL_H
#define LLA_KVPOOL_H

#include "../base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct lla_kvblock {
    uint64_t name;        /* 0: none, the block cannot be found */
    uint64_t before;      /* name of the block in front of it; 0: it starts a text */
    uint64_t salt;        /* texts of different salts share nothing */
    int32_t refs;         /* sequences that use it */
    int32_t chain;        /* next block of the same bucket; 0: none */
    int32_t older, newer; /* neighbours in the list of cached blocks; 0: none */
};

struct lla_kvpool {
    size_t total;    /* blocks that can be given out */
    size_t kv_block; /* tokens of a block */
    int32_t *free;   /* stack of free blocks */
    size_t nfree, ncached, nactive;
    struct lla_kvblock *blocks; /* [total + 1] */
    int32_t *tokens;            /* [total + 1, kv_block]: what named blocks hold */
    int32_t *buckets;           /* [mask + 1]: first block of each chain; 0: none */
    size_t mask;
    int32_t oldest, newest; /* ends of the list of cached blocks */
    uint64_t names;         /* given so far */
    uint64_t evicted;       /* so far */
    uint64_t given_back;    /* how often a block has become free or cached: unchanged, no more blocks can be had */
};

/* A sequence's blocks, for positions 0, 1, ... in order. Zeroed but for `blocks`, salt and is_private, it is empty. */
struct lla_kvseq {
    int32_t *blocks; /* [most blocks of a sequence], nblock of them in use */
    size_t nblock;
    size_t nknown; /* leading blocks that are full and matched or committed */
    uint64_t name; /* of the last of those */
    uint64_t salt;
    bool is_private; /* finds nothing and leaves nothing */
};

/* A pool of blocks 1 .. nblock - 1, each of kv_block tokens. */
lla_status lla_kvpool_create(size_t nblock, size_t kv_block, struct lla_kvpool *pool);
void lla_kvpool_destroy(struct lla_kvpool *pool);

/* Blocks that can be had now: free and cached ones. */
static inline size_t lla_kvpool_available(const struct lla_kvpool *pool) {
    return pool->nfree + pool->ncached;
}

/* Appends blocks to blocks[*count ..] until there are `want`; gives none and fails with LLA_ELIMIT where too few can be
 * had. */
lla_status lla_kvpool_grow(struct lla_kvpool *pool, int32_t *blocks, size_t *count, size_t want);
/* Gives back blocks [keep, *count), the last first. */
void lla_kvpool_shrink(struct lla_kvpool *pool, const int32_t *blocks, size_t *count, size_t keep);

/* Looks for the sequence's next blocks, from nknown on, among those that are known to hold its tokens, and takes them
 * in place of its own (whose content is lost) or behind them. Only blocks that lie whole within tokens [ntoken] are
 * taken. Returns how many were found. */
size_t lla_kvpool_match(struct lla_kvpool *pool, struct lla_kvseq *seq, const int64_t *tokens, size_t ntoken);
/* Makes those blocks known that lie whole within tokens [ntoken], of which all KV has been computed. Where another
 * block is known for the same tokens, the sequence keeps its own, which is then not found. */
void lla_kvpool_commit(struct lla_kvpool *pool, struct lla_kvseq *seq, const int64_t *tokens, size_t ntoken);
/* Gives all blocks back and empties the sequence; what was committed stays cached. */
void lla_kvpool_release(struct lla_kvpool *pool, struct lla_kvseq *seq);

/* Walks the whole pool and fails with what is wrong in it: counts that do not add up, lists that do not agree. */
lla_status lla_kvpool_check(const struct lla_kvpool *pool);

#endif
