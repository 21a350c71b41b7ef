/* ring.cuh: the stream of a block's weights through shared memory, for the kernel that runs a whole step.
 *
 * Weights do not depend on activations: producer warps copy the block's share of the whole step, in the order in which
 * it will be used, through a ring of pieces for each consumer warp, and run ahead as far as the rings allow, through
 * every wait of the consumers. A piece is up to PIECE tiles of 16 x 16 weights of one row tile, in a row.
 *
 * At most `window` pieces a ring are on their way at once: enough to keep the memory busy; more would only queue, and
 * the small messages between blocks would queue behind them. */
#ifndef LLA_RING_CUH
#define LLA_RING_CUH

#include "step.cuh"

enum {
    CONSUMERS = 16, /* warps that compute */
    PRODUCERS = 4,  /* warps that fill the rings */
    RINGS_EACH = CONSUMERS / PRODUCERS,
    PIECE = 3,
    TILE_BYTES = 512,
    MOST_SLOTS = 8, /* pieces of a ring */
};

/* A weight matrix as the step uses it: row tiles are dealt to the blocks in turn; a row's K is cut into `parts`. With
 * 16 parts all consumer warps work on one row tile; with eight, the two groups of eight warps take the block's row
 * tiles in turns, the first one by group `first_group`. */
struct Matrix {
    const char *base; /* layer 0's, packed */
    unsigned ntiles, ktiles, parts, first_group;
    bool reversed; /* dealt from the last block backwards, so that not always the same blocks have one tile more */
};

enum { QKV_W, O_W, GATE_UP_W, DOWN_W, HEAD_W, MATRICES };

/* Every matrix of the step, in order of use; the head is outside the layers. */
struct Weights {
    Matrix matrix[MATRICES];
    size_t layer_stride; /* bytes from one layer's weights to the next layer's */
    unsigned nlayer;
};

/* A block's share of a matrix: row tiles first, first + gridDim.x, ... */
struct Share {
    unsigned first, count;
    __device__ __forceinline__ void set(const Matrix &m) {
        first = m.reversed ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
        count = first < m.ntiles ? (m.ntiles - first + gridDim.x - 1) / gridDim.x : 0;
    }
};

/* A warp's work on a matrix: row tiles i, i + step, ... of the block's share, K tiles k .. k_last - 1 of each. */
struct Work {
    unsigned i, step, k, k_last;
    __device__ __forceinline__ Work(const Matrix &m, unsigned warp) {
        const bool is_long = m.parts == 16;
        const unsigned part = is_long ? warp : warp % 8;
        i = is_long ? 0 : (warp / 8 + m.first_group) & 1;
        step = is_long ? 1 : 2;
        const unsigned shift = is_long ? 4 : 3; /* parts are a power of two */
        k = m.ktiles * part >> shift;
        k_last = m.ktiles * (part + 1) >> shift;
    }
};

struct Rings {
    uint64_t full[CONSUMERS][MOST_SLOTS], empty[CONSUMERS][MOST_SLOTS];
    Share shares[MATRICES];

    /* Lanes of one warp; a barrier of the block follows. */
    __device__ __forceinline__ void init(const Weights &w, unsigned lane) {
        for (unsigned i = lane; i < CONSUMERS * MOST_SLOTS; i += 32) {
            mbarrier_init(shared_address(&full[0][0] + i), 32 / RINGS_EACH); /* lanes of a producer */
            mbarrier_init(shared_address(&empty[0][0] + i), 1);
        }
        if (lane < MATRICES) shares[lane].set(w.matrix[lane]);
    }
};

/* Slots of all rings: [CONSUMERS][slots] pieces. */
struct Slots {
    uint32_t base; /* shared memory address */
    unsigned count;
    __device__ __forceinline__ uint32_t at(unsigned warp, unsigned slot) const {
        return base + (warp * count + slot) * (PIECE * TILE_BYTES);
    }
};

/* A place in a ring and the parity of the barriers' phase there. */
struct RingPlace {
    unsigned slot = 0, parity = 0;
    __device__ __forceinline__ void next(unsigned slots) {
        if (++slot == slots) {
            slot = 0;
            parity ^= 1;
        }
    }
};

/* Ends the kernel with an error instead of leaving it to hang when what it waits for never comes. */
struct Patience {
    unsigned left = 1u << 24; /* seconds */
    __device__ __forceinline__ void spend() {
        if (--left == 0) __trap();
    }
};

/* Walks one warp's pieces of the whole step, in the order in which the warp consumes them. */
struct PieceCursor {
    unsigned layer = 0, which = QKV_W;
    unsigned row_tiles, tiles;   /* left of the matrix, and of the part of K of the row tile */
    unsigned part_tiles, stride; /* tiles of a part, and bytes from one row tile to the warp's next */
    const char *row_tile, *from; /* where the part of the row tile, and the next piece, begin */
    bool is_over = false;

    /* To the first piece of the current matrix or, if the warp has none there, of a later one. */
    __device__ __forceinline__ void enter(const Weights &w, const Share *shares, unsigned warp, bool with_head) {
        for (;; which = which + 1 == HEAD_W && ++layer < w.nlayer ? QKV_W : which + 1) {
            if (which > HEAD_W || (which == HEAD_W && !with_head)) {
                is_over = true;
                return;
            }
            const Matrix &m = w.matrix[which];
            const Share share = shares[which];
            const Work work(m, warp);
            if (work.i >= share.count || work.k >= work.k_last) continue;
            row_tiles = (share.count - work.i + work.step - 1) / work.step;
            part_tiles = tiles = work.k_last - work.k;
            stride = gridDim.x * work.step * m.ktiles * TILE_BYTES;
            row_tile = from = m.base + (which == HEAD_W ? 0 : layer * w.layer_stride) +
                              ((size_t)(share.first + work.i * gridDim.x) * m.ktiles + work.k) * TILE_BYTES;
            return;
        }
    }
    /* Behind a piece of n tiles. */
    __device__ __forceinline__ void next(const Weights &w, const Share *shares, unsigned warp, bool with_head,
                                         unsigned n) {
        from += n * TILE_BYTES;
        tiles -= n;
        if (tiles) return;
        tiles = part_tiles;
        from = row_tile += stride;
        if (--row_tiles) return;
        which = which + 1 == HEAD_W && ++layer < w.nlayer ? QKV_W : which + 1;
        enter(w, shares, warp, with_head);
    }
};

enum { LANES_EACH = 32 / RINGS_EACH }; /* producer lanes that serve one ring */

/* Producer warp p keeps rings p RINGS_EACH, ... filled, LANES_EACH lanes a ring, which copy 128 bytes at once. Plain
 * asynchronous copies; cp.async.bulk was only tried when something else was the limit. */
__device__ __forceinline__ void fill_rings(Rings &rings, const Slots &slots, const Weights &w, bool with_head,
                                           unsigned window, unsigned ahead, unsigned pace, unsigned p) {
    const unsigned ring = p * RINGS_EACH + threadIdx.x % 32 / LANES_EACH, lane = threadIdx.x % LANES_EACH;
    const uint32_t full = shared_address(rings.full[ring]), empty = shared_address(rings.empty[ring]);
    PieceCursor at;
    at.enter(w, rings.shares, ring, with_head);
    RingPlace place, landing;
    unsigned in_flight = 0, filled = 0, early = 0; /* pieces asked for in the second-level cache, beyond the ring */
    PieceCursor behind = at;                       /* the first piece that is not asked for there */
    long long last = clock64();
    while (__any_sync(~0u, !at.is_over)) {
        bool ready = !at.is_over;
        if (ready && in_flight == window) { /* has the oldest one landed? */
            ready = mbarrier_poll(full + landing.slot * 8, landing.parity);
            if (ready) {
                landing.next(slots.count);
                in_flight--;
            }
        }
        if (ready && filled == slots.count) ready = mbarrier_poll(empty + place.slot * 8, place.parity ^ 1);
        __syncwarp();
        if (!ready) {
            if (behind.is_over || early >= ahead || filled < slots.count || clock64() - last < pace) continue;
            last = clock64();
            const unsigned n = min(behind.tiles, (unsigned)PIECE);
            for (unsigned line = lane; line < n * TILE_BYTES / 128; line += LANES_EACH)
                prefetch_l2(behind.from + line * 128);
            behind.next(w, rings.shares, ring, with_head, n);
            early++;
            continue;
        }
        const uint32_t to = slots.at(ring, place.slot) + lane * 16;
        const char *from = at.from + lane * 16;
        const unsigned n = min(at.tiles, (unsigned)PIECE);
        constexpr int STEP = LANES_EACH * 16;
#pragma unroll
        for (int i = 0; i < PIECE * TILE_BYTES / STEP; i++)
            if (i * STEP / TILE_BYTES < (int)n) cp_async_16(to + i * STEP, from + i * STEP, true);
        cp_async_arrive(full + place.slot * 8);
        place.next(slots.count);
        filled += filled < slots.count;
        in_flight++;
        at.next(w, rings.shares, ring, with_head, n);
        if (early)
            early--;
        else
            behind = at;
    }
}

#endif
