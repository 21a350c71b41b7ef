/* sm90.cuh: kernels/cuda/sm90.cuh for the emulator. Products read shared memory as late as they may, when somebody
 * waits for them, and bulk copies arrive when somebody waits for their barrier. */
#ifndef LLA_EMULATOR_SM90_CUH
#define LLA_EMULATOR_SM90_CUH

#include "../../kernels/cuda/ptx.cuh"

#include <cuda.h>

#define LLA_SM90A_CODE

/* ---- barriers ---- */

static inline void barrier_init(uint32_t barrier, unsigned arrivals) {
    emulator::mbarrier_init(barrier, arrivals);
}
static inline void barriers_ready() {}
static inline void barrier_arrive(uint32_t barrier) {
    emulator::mbarrier_expect(barrier, 0);
}
static inline void barrier_arrive_for(uint32_t barrier, unsigned bytes) {
    emulator::mbarrier_expect(barrier, bytes);
}
static inline void barrier_wait(uint32_t barrier, unsigned parity) {
    emulator::mbarrier_wait(barrier, parity);
}

/* ---- bulk copies ---- */

/* What cuTensorMapEncodeTiled() keeps: sizes and box in elements of two bytes, strides in bytes, innermost first. */
struct EmulatedMap {
    const char *at;
    uint64_t sizes[3], strides[3];
    uint32_t box[3];
    bool is_swizzled;
};
static_assert(sizeof(EmulatedMap) <= sizeof(CUtensorMap), "it lies in one");

static inline void emulator_copy(uint32_t to, const CUtensorMap *map, unsigned x, unsigned y, unsigned z,
                                 uint32_t barrier) {
    EmulatedMap m;
    memcpy(&m, map, sizeof m);
    const size_t n = (size_t)m.box[0] * m.box[1] * m.box[2] * 2;
    emulator::transfer(emulator::self->block, barrier, n, [=] {
        uint32_t at = to;
        for (unsigned k = z; k < z + m.box[2]; k++)
            for (unsigned j = y; j < y + m.box[1]; j++)
                for (unsigned i = x; i < x + m.box[0]; i += 8, at += 16) {
                    uint16_t unit[8] = {};
                    for (unsigned e = 0; e < 8; e++)
                        if (i + e < m.sizes[0] && j < m.sizes[1] && k < m.sizes[2])
                            memcpy(unit + e, m.at + k * m.strides[2] + j * m.strides[1] + (i + e) * 2, 2);
                    memcpy(in_shared(m.is_swizzled ? at ^ (at >> 7 & 7) << 4 : at, 16), unit, 16);
                }
    });
}
static inline void copy_boxes(uint32_t to, const CUtensorMap *map, unsigned column, unsigned row, unsigned matrix,
                              uint32_t barrier, bool) {
    emulator_copy(to, map, column, row, matrix, barrier);
}
static inline void copy_box(uint32_t to, const CUtensorMap *map, unsigned column, unsigned row, uint32_t barrier) {
    emulator_copy(to, map, column, row, 0, barrier);
}

/* ---- registers ---- */

template <int N> void give_registers() {}
template <int N> void take_registers() {}

/* ---- products ---- */

static inline uint64_t wgmma_rows(uint32_t address) {
    return address >> 4;
}
static inline void wgmma_fence() {}
static inline void wgmma_publish() {}
template <int NI> void wgmma_arrived(float (&)[NI][4]) {}
static inline void wgmma_commit() {
    emulator::self->products.push_back(std::move(emulator::self->open_products));
    emulator::self->open_products.clear();
}
template <int N> void wgmma_wait() {
    auto &groups = emulator::self->products;
    for (; groups.size() > N; groups.pop_front())
        for (const auto &product : groups.front()) product();
}

/* Element (row, column) of rows of 128 bytes that lie swizzled from a descriptor's address on. */
template <class T> float emulator_element(uint64_t descriptor, unsigned row, unsigned column) {
    const uint32_t at = (uint32_t)(descriptor << 4) + row * 128 + column * 2;
    T v;
    memcpy(&v, in_shared(at ^ (at >> 7 & 7) << 4, 2), 2);
    return emulator_float(v);
}

/* This thread's part of c [16, 8 NI] (+)= a [16, 16] b [8 NI, 16]^T; `a` gives rows g and g + 8. */
template <int NI, class A, class B> void emulator_wgmma(float (&c)[NI][4], A a, B b, int accumulate) {
    const unsigned lane = threadIdx.x % 32;
    emulator::self->open_products.push_back([=, &c] {
        for (unsigned j = 0; j < NI; j++)
            for (unsigned i = 0; i < 4; i++) {
                double sum = accumulate ? c[j][i] : 0;
                for (unsigned k = 0; k < 16; k++) sum += (double)a(i / 2, k) * b(8 * j + lane % 4 * 2 + i % 2, k);
                c[j][i] = (float)sum;
            }
    });
}

struct EmulatedRows {
    float v[2][16];
    float operator()(unsigned half, unsigned k) const { return v[half][k]; }
};

/* Rows g and g + 8 of a warp's operand in registers. */
template <class T> EmulatedRows emulator_rows(const uint4 &w) {
    const emulator::Lanes &lanes = emulator::exchange(&w, sizeof w);
    EmulatedRows rows;
    for (unsigned t = 0; t < 4; t++) {
        struct Fragment {
            T v[8];
        };
        const Fragment f = emulator::of_lane<Fragment>(lanes, threadIdx.x % 32 / 4 * 4 + t);
        for (unsigned i = 0; i < 8; i++) rows.v[i / 2 % 2][2 * t + i % 2 + (i & 4 ? 8 : 0)] = emulator_float(f.v[i]);
    }
    return rows;
}

template <class T, int NI> struct Wgmma {
    static void run(float (&c)[NI][4], const uint4 &w, uint64_t x, int accumulate) {
        emulator_wgmma(
            c, emulator_rows<T>(w), [=](unsigned n, unsigned k) { return emulator_element<T>(x, n, k); }, accumulate);
    }
};
template <class T> struct WgmmaColumns {
    static void run(float (&c)[8][4], const uint4 &w, uint64_t x, int accumulate) {
        emulator_wgmma(
            c, emulator_rows<T>(w), [=](unsigned n, unsigned k) { return emulator_element<T>(x, k, n); }, accumulate);
    }
};
template <class T> struct WgmmaShared {
    static void run(float (&c)[8][4], uint64_t w, uint64_t x, int accumulate) {
        const unsigned row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
        emulator_wgmma(
            c, [=](unsigned half, unsigned k) { return emulator_element<T>(w, row + 8 * half, k); },
            [=](unsigned n, unsigned k) { return emulator_element<T>(x, n, k); }, accumulate);
    }
};

#endif
