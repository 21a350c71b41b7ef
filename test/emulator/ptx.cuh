/* ptx.cuh: kernels/cuda/ptx.cuh for the emulator: what the instructions do, thread by thread. */
#ifndef LLA_EMULATOR_PTX_CUH
#define LLA_EMULATOR_PTX_CUH

#include "cuda.h"

using emulator::in_shared;

/* ---- tensor cores ---- */

static inline float emulator_float(__nv_bfloat16 v) {
    return __bfloat162float(v);
}
static inline float emulator_float(__half v) {
    return __half2float(v);
}

template <class T> void mma_16816(float (&c)[4], const uint4 &a, const uint2 &b) {
    struct Fragments {
        T a[8], b[4];
    } mine;
    memcpy(mine.a, &a, sizeof a);
    memcpy(mine.b, &b, sizeof b);
    const emulator::Lanes &lanes = emulator::exchange(&mine, sizeof mine);
    float rows[16][16], columns[8][16];
    for (unsigned lane = 0; lane < 32; lane++) {
        const Fragments f = emulator::of_lane<Fragments>(lanes, lane);
        const unsigned g = lane / 4, t = lane % 4 * 2;
        for (unsigned i = 0; i < 8; i++)
            rows[g + (i & 2 ? 8 : 0)][t + i % 2 + (i & 4 ? 8 : 0)] = emulator_float(f.a[i]);
        for (unsigned i = 0; i < 4; i++) columns[g][t + i % 2 + (i & 2 ? 8 : 0)] = emulator_float(f.b[i]);
    }
    const unsigned lane = threadIdx.x % 32;
    for (unsigned i = 0; i < 4; i++) {
        double sum = c[i];
        for (unsigned k = 0; k < 16; k++)
            sum += (double)rows[lane / 4 + (i & 2 ? 8 : 0)][k] * columns[lane % 4 * 2 + i % 2][k];
        c[i] = (float)sum;
    }
}

/* ---- memory ---- */

static inline uint4 load_stream(const void *p) {
    uint4 v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline void prefetch_l1(const void *) {}
static inline void prefetch_l2(const void *) {}
static inline float exp2_fast(float x) {
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;
}
static inline void make_opaque(uint4 &) {}
static inline unsigned long long global_ns() {
    return 0;
}
static inline unsigned sm_id() {
    return 0;
}

/* ---- shared memory ---- */

static inline uint32_t shared_address(const void *p) {
    return (uint32_t)((const char *)p - emulator::shared);
}
static inline void store_shared_16(uint32_t to, uint4 v) {
    memcpy(in_shared(to, sizeof v), &v, sizeof v);
}
static inline uint4 load_shared_16(uint32_t from) {
    uint4 v;
    memcpy(&v, in_shared(from, sizeof v), sizeof v);
    return v;
}
static inline uint32_t load_shared_4(uint32_t from) {
    uint32_t v;
    memcpy(&v, in_shared(from, sizeof v), sizeof v);
    return v;
}
static inline void cp_async_16(uint32_t to, const void *from, bool valid) {
    emulator::self->open.push_back({in_shared(to, 16), from, valid});
}
static inline uint64_t evict_first() {
    return 0;
}
static inline uint64_t evict_normal() {
    return 0;
}
static inline void cp_async_16(uint32_t to, const void *from, bool valid, uint64_t) {
    cp_async_16(to, from, valid);
}
static inline void cp_async_commit() {
    emulator::self->groups.push_back(std::move(emulator::self->open));
    emulator::self->open.clear();
}
template <int N> void cp_async_wait() {
    auto &groups = emulator::self->groups;
    for (; groups.size() > N; groups.pop_front())
        for (const emulator::Copy &copy : groups.front())
            if (copy.is_valid)
                memcpy(copy.to, copy.from, 16);
            else
                memset(copy.to, 0, 16);
}
static inline uint4 emulator_ldmatrix(uint32_t address, bool is_transposed) {
    const emulator::Lanes &lanes = emulator::exchange(&address, sizeof address);
    const unsigned lane = threadIdx.x % 32;
    uint16_t v[4][2];
    for (unsigned m = 0; m < 4; m++)
        for (unsigned e = 0; e < 2; e++) {
            const unsigned i = lane / 4, j = lane % 4 * 2 + e, row = is_transposed ? j : i, col = is_transposed ? i : j;
            memcpy(&v[m][e], in_shared(emulator::of_lane<uint32_t>(lanes, 8 * m + row), 16) + col * 2, 2);
        }
    uint4 r;
    memcpy(&r, v, sizeof r);
    return r;
}
static inline uint4 ldmatrix_x4(uint32_t address) {
    return emulator_ldmatrix(address, false);
}
static inline uint4 ldmatrix_x4_trans(uint32_t address) {
    return emulator_ldmatrix(address, true);
}
static inline uint32_t transpose_8x8(uint32_t v) {
    struct Pair {
        uint16_t v[2];
    };
    const emulator::Lanes &lanes = emulator::exchange(&v, sizeof v);
    const unsigned lane = threadIdx.x % 32;
    Pair pair;
    for (unsigned e = 0; e < 2; e++)
        pair.v[e] = emulator::of_lane<Pair>(lanes, (lane % 4 * 2 + e) * 4 + lane / 8).v[lane / 4 % 2];
    uint32_t r;
    memcpy(&r, &pair, sizeof r);
    return r;
}

/* ---- barriers of part of a block ---- */

static inline void barrier_sync(int id, int threads) {
    emulator::barrier(id, (unsigned)threads, true);
}

/* ---- clusters ---- */

using emulator::cluster_arrive;
using emulator::cluster_wait;
using emulator::mbarrier_expect;
using emulator::mbarrier_init;
using emulator::mbarrier_wait;

static inline void cluster_arrive_relaxed() {
    cluster_arrive();
}
static inline uint4 load_cluster_16(uint32_t from, unsigned rank) {
    uint4 v;
    memcpy(&v, emulator::in_block(rank, from, sizeof v), sizeof v);
    return v;
}
static inline void fence_shared_async() {}
static inline void copy_to_cluster(uint32_t to, uint32_t from, unsigned bytes, uint32_t barrier, unsigned rank) {
    const unsigned sender = emulator::self->block;
    emulator::in_block(rank, to + bytes - 16, 16);
    in_shared(from + bytes - 16, 16);
    emulator::transfer(rank, barrier, bytes,
                       [=] { memcpy(in_shared(to, 16), emulator::in_block(sender, from, 16), bytes); });
}
static inline void store_cluster_16(uint32_t to, unsigned rank, const float (&v)[4]) {
    memcpy(emulator::in_block(rank, to, sizeof v), v, sizeof v);
}

/* ---- kernels that begin before their turn: no emulated one does ---- */

static inline void pdl_launch_next() {}
static inline void pdl_wait() {}

#endif
