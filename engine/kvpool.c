#include "kvpool.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

lla_status lla_kvpool_create(size_t nblock, size_t kv_block, struct lla_kvpool *pool) {
    *pool = (struct lla_kvpool){.total = nblock - 1, .kv_block = kv_block};
    size_t nbucket = 2;
    while (nbucket < 2 * nblock) nbucket *= 2;
    pool->mask = nbucket - 1;
    pool->free = malloc(nblock * sizeof *pool->free);
    pool->blocks = calloc(nblock, sizeof *pool->blocks);
    pool->tokens = malloc(nblock * kv_block * sizeof *pool->tokens);
    pool->buckets = calloc(nbucket, sizeof *pool->buckets);
    if (!pool->free || !pool->blocks || !pool->tokens || !pool->buckets) {
        lla_kvpool_destroy(pool);
        return lla_fail(LLA_ENOMEM, "no memory for a pool of %zu KV blocks", nblock);
    }
    for (; pool->nfree < pool->total; pool->nfree++)
        pool->free[pool->nfree] = (int32_t)(pool->total - pool->nfree); /* the lowest block on top */
    return LLA_OK;
}

void lla_kvpool_destroy(struct lla_kvpool *pool) {
    free(pool->free);
    free(pool->blocks);
    free(pool->tokens);
    free(pool->buckets);
    memset(pool, 0, sizeof *pool);
}

/* ---- names ---- */

static uint64_t mix(uint64_t x) { /* the finalizer of MurmurHash3 */
    x = (x ^ x >> 33) * 0xff51afd7ed558ccdu;
    x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53u;
    return x ^ x >> 33;
}

/* The hash of a key takes in the whole prefix, through the name of the block before. */
static uint64_t hash_start(uint64_t salt, uint64_t before) {
    return mix(mix(salt + 0x9e3779b97f4a7c15u) ^ before);
}

static uint64_t hash_token(uint64_t h, int32_t token) {
    return (h ^ (uint32_t)token) * 0x9fb21c651e98df25u ^ h >> 29;
}

static int32_t *tokens_of(const struct lla_kvpool *p, int32_t b) {
    return p->tokens + (size_t)b * p->kv_block;
}

static size_t bucket_of(const struct lla_kvpool *p, uint64_t salt, uint64_t before, const int64_t *tokens) {
    uint64_t h = hash_start(salt, before);
    for (size_t i = 0; i < p->kv_block; i++) h = hash_token(h, (int32_t)tokens[i]);
    return (size_t)mix(h) & p->mask;
}

static size_t bucket_of_block(const struct lla_kvpool *p, int32_t b) {
    const struct lla_kvblock *block = &p->blocks[b];
    uint64_t h = hash_start(block->salt, block->before);
    for (size_t i = 0; i < p->kv_block; i++) h = hash_token(h, tokens_of(p, b)[i]);
    return (size_t)mix(h) & p->mask;
}

/* The block of that key in the bucket; 0: none. */
static int32_t find(const struct lla_kvpool *p, size_t bucket, uint64_t salt, uint64_t before, const int64_t *tokens) {
    for (int32_t b = p->buckets[bucket]; b; b = p->blocks[b].chain) {
        if (p->blocks[b].before != before || p->blocks[b].salt != salt) continue;
        size_t i = 0;
        while (i < p->kv_block && tokens_of(p, b)[i] == (int32_t)tokens[i]) i++;
        if (i == p->kv_block) return b;
    }
    return 0;
}

static void forget(struct lla_kvpool *p, int32_t b) {
    int32_t *link = &p->buckets[bucket_of_block(p, b)];
    while (*link != b) link = &p->blocks[*link].chain;
    *link = p->blocks[b].chain;
    p->blocks[b].name = 0;
}

/* ---- the list of cached blocks ---- */

static void list_append(struct lla_kvpool *p, int32_t b) {
    p->blocks[b].older = p->newest;
    p->blocks[b].newer = 0;
    *(p->newest ? &p->blocks[p->newest].newer : &p->oldest) = b;
    p->newest = b;
    p->ncached++;
}

static void list_remove(struct lla_kvpool *p, int32_t b) {
    const struct lla_kvblock *block = &p->blocks[b];
    *(block->newer ? &p->blocks[block->newer].older : &p->newest) = block->older;
    *(block->older ? &p->blocks[block->older].newer : &p->oldest) = block->newer;
    p->ncached--;
}

/* ---- taking and giving back ---- */

/* A block without content for one sequence; there is one. */
static int32_t take(struct lla_kvpool *p) {
    int32_t b;
    if (p->nfree) {
        b = p->free[--p->nfree];
    } else {
        b = p->oldest;
        list_remove(p, b);
        forget(p, b);
        p->evicted++;
    }
    p->blocks[b].refs = 1;
    p->nactive++;
    return b;
}

static void give_back(struct lla_kvpool *p, int32_t b) {
    if (--p->blocks[b].refs) return;
    p->nactive--;
    p->given_back++;
    if (p->blocks[b].name)
        list_append(p, b);
    else
        p->free[p->nfree++] = b;
}

lla_status lla_kvpool_grow(struct lla_kvpool *pool, int32_t *blocks, size_t *count, size_t want) {
    if (want <= *count) return LLA_OK;
    LLA_REQUIRE(want - *count <= lla_kvpool_available(pool), LLA_ELIMIT,
                "%zu KV blocks are needed, %zu of %zu are free", want - *count, lla_kvpool_available(pool),
                pool->total);
    while (*count < want) blocks[(*count)++] = take(pool);
    assert(pool->nfree + pool->ncached + pool->nactive == pool->total);
    return LLA_OK;
}

void lla_kvpool_shrink(struct lla_kvpool *pool, const int32_t *blocks, size_t *count, size_t keep) {
    while (*count > keep) give_back(pool, blocks[--*count]);
    assert(pool->nfree + pool->ncached + pool->nactive == pool->total);
}

void lla_kvpool_release(struct lla_kvpool *pool, struct lla_kvseq *seq) {
    lla_kvpool_shrink(pool, seq->blocks, &seq->nblock, 0);
    seq->nknown = 0;
    seq->name = 0;
}

/* ---- prefixes ---- */

size_t lla_kvpool_match(struct lla_kvpool *pool, struct lla_kvseq *seq, const int64_t *tokens, size_t ntoken) {
    if (seq->is_private) return 0;
    size_t found = 0;
    for (; (seq->nknown + 1) * pool->kv_block <= ntoken; found++) {
        const int64_t *next = tokens + seq->nknown * pool->kv_block;
        const int32_t b = find(pool, bucket_of(pool, seq->salt, seq->name, next), seq->salt, seq->name, next);
        if (!b) break;
        if (!pool->blocks[b].refs++) {
            list_remove(pool, b);
            pool->nactive++;
        }
        if (seq->nknown == seq->nblock)
            seq->nblock++;
        else
            give_back(pool, seq->blocks[seq->nknown]);
        seq->blocks[seq->nknown++] = b;
        seq->name = pool->blocks[b].name;
    }
    assert(pool->nfree + pool->ncached + pool->nactive == pool->total);
    return found;
}

void lla_kvpool_commit(struct lla_kvpool *pool, struct lla_kvseq *seq, const int64_t *tokens, size_t ntoken) {
    if (seq->is_private) return;
    for (; (seq->nknown + 1) * pool->kv_block <= ntoken; seq->nknown++) {
        const int64_t *full = tokens + seq->nknown * pool->kv_block;
        const size_t bucket = bucket_of(pool, seq->salt, seq->name, full);
        int32_t b = find(pool, bucket, seq->salt, seq->name, full);
        if (!b) {
            b = seq->blocks[seq->nknown];
            struct lla_kvblock *block = &pool->blocks[b];
            block->name = ++pool->names;
            block->before = seq->name;
            block->salt = seq->salt;
            for (size_t i = 0; i < pool->kv_block; i++) tokens_of(pool, b)[i] = (int32_t)full[i];
            block->chain = pool->buckets[bucket];
            pool->buckets[bucket] = b;
        }
        seq->name = pool->blocks[b].name;
    }
}

/* ---- audit ---- */

lla_status lla_kvpool_check(const struct lla_kvpool *p) {
    size_t active = 0, named = 0, found = 0, listed = 0;
    LLA_REQUIRE(p->nfree + p->ncached + p->nactive == p->total, LLA_EINVAL,
                "KV pool: %zu free, %zu cached and %zu active blocks, expected %zu together", p->nfree, p->ncached,
                p->nactive, p->total);
    for (size_t b = 1; b <= p->total; b++) {
        LLA_REQUIRE(p->blocks[b].refs >= 0, LLA_EINVAL, "KV pool: block %zu has %d references", b, p->blocks[b].refs);
        active += p->blocks[b].refs > 0;
        named += p->blocks[b].name > 0;
    }
    LLA_REQUIRE(active == p->nactive, LLA_EINVAL, "KV pool: %zu blocks have references, expected %zu", active,
                p->nactive);
    for (size_t i = 0; i < p->nfree; i++) {
        const int32_t b = p->free[i];
        LLA_REQUIRE(b > 0 && (size_t)b <= p->total && !p->blocks[b].refs && !p->blocks[b].name, LLA_EINVAL,
                    "KV pool: block %d is free, but in use or named", b);
    }
    for (int32_t b = p->oldest, before = 0; b; before = b, b = p->blocks[b].newer, listed++)
        LLA_REQUIRE(listed < p->ncached && p->blocks[b].name && !p->blocks[b].refs && p->blocks[b].older == before,
                    LLA_EINVAL, "KV pool: block %d does not belong into the list of cached blocks", b);
    LLA_REQUIRE(listed == p->ncached, LLA_EINVAL, "KV pool: %zu blocks are listed as cached, expected %zu", listed,
                p->ncached);
    for (size_t i = 0; i <= p->mask; i++)
        for (int32_t b = p->buckets[i]; b; b = p->blocks[b].chain, found++)
            LLA_REQUIRE(found < named && p->blocks[b].name && bucket_of_block(p, b) == i, LLA_EINVAL,
                        "KV pool: block %d stands in the wrong bucket", b);
    LLA_REQUIRE(found == named, LLA_EINVAL, "KV pool: %zu blocks can be found, expected the %zu named ones", found,
                named);
    return LLA_OK;
}
