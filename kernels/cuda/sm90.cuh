/* sm90.cuh: what only sm_90a has, as functions: asynchronous products, bulk copies and the barriers that they complete
 * on. Everything is empty elsewhere. */
#ifndef LLA_SM90_CUH
#define LLA_SM90_CUH

#include "ptx.cuh"

#ifdef LLA_PTX_SM90 /* another implementation: the emulator's, for tests without a GPU */
#include LLA_PTX_SM90
#else

#include <cuda.h> /* CUtensorMap */
#include <type_traits>

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define LLA_SM90A_CODE
#endif

/* Rows of x [8 n, 64] in shared memory, 128 bytes each, 16-byte unit u of row r at u ^ (r % 8), from an address that is
 * a multiple of 1024; + 2 for every 16 columns. */
__device__ __forceinline__ uint64_t wgmma_rows(uint32_t address) {
    return address >> 4 | (uint64_t)1 << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

/* Before the first product, and after registers of one were written. */
__device__ __forceinline__ void wgmma_fence() {
#ifdef LLA_SM90A_CODE
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void wgmma_commit() {
#ifdef LLA_SM90A_CODE
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

/* Waits until at most N of the newest groups are under way. */
template <int N> __device__ __forceinline__ void wgmma_wait() {
#ifdef LLA_SM90A_CODE
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#endif
}

/* ---- barriers in shared memory ---- */

__device__ __forceinline__ void barrier_init(uint32_t barrier, unsigned arrivals) {
#ifdef LLA_SM90A_CODE
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
#endif
}

/* Shows the barriers that this thread initialised to bulk copies; before a __syncthreads(). */
__device__ __forceinline__ void barriers_ready() {
#ifdef LLA_SM90A_CODE
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
#ifdef LLA_SM90A_CODE
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}

/* Arrives, and lets the phase end only when so many bytes have been copied, too. */
__device__ __forceinline__ void barrier_arrive_for(uint32_t barrier, unsigned bytes) {
#ifdef LLA_SM90A_CODE
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#endif
}

/* Waits for the end of a phase: of the first, the third, ... for parity 0, of the others for parity 1. */
__device__ __forceinline__ void barrier_wait(uint32_t barrier, unsigned parity) {
#ifdef LLA_SM90A_CODE
    asm volatile(
        "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra again; }" ::"r"(
            barrier),
        "r"(parity)
        : "memory");
#endif
}

/* ---- bulk copies to shared memory, which complete on a barrier ---- */

/* The box of a stack of matrices that begins at (matrix, row, column); what lies outside is zero. What is read once may
 * leave the second-level cache first. */
__device__ __forceinline__ void copy_boxes(uint32_t to, const CUtensorMap *map, unsigned column, unsigned row,
                                           unsigned matrix, uint32_t barrier, bool is_read_once) {
#ifdef LLA_SM90A_CODE
    if (is_read_once)
        asm volatile(
            "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
            "[%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
            "l"(map), "r"(column), "r"(row), "r"(matrix), "r"(barrier), "l"(evict_first())
            : "memory");
    else
        asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
                     "%3, %4}], [%5];" ::"r"(to),
                     "l"(map), "r"(column), "r"(row), "r"(matrix), "r"(barrier)
                     : "memory");
#endif
}

/* The box of a matrix that begins at (row, column); what lies outside the matrix is zero. */
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap *map, unsigned column, unsigned row,
                                         uint32_t barrier) {
#ifdef LLA_SM90A_CODE
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
                 "%3}], [%4];" ::"r"(to),
                 "l"(map), "r"(column), "r"(row), "r"(barrier)
                 : "memory");
#endif
}

/* ---- registers ---- */

/* Changes how many registers a thread of this group of four warps has. */
template <int N> __device__ __forceinline__ void give_registers() {
#ifdef LLA_SM90A_CODE
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
#endif
}
template <int N> __device__ __forceinline__ void take_registers() {
#ifdef LLA_SM90A_CODE
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

/* ---- products ---- */

/* Shows what this thread's copies and stores wrote to shared memory to the products of all, behind a barrier. */
__device__ __forceinline__ void wgmma_publish() {
#ifdef LLA_SM90A_CODE
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

/* Keeps the compiler from reading sums before a wait. */
template <int NI> __device__ __forceinline__ void wgmma_arrived(float (&c)[NI][4]) {
#pragma unroll
    for (int j = 0; j < NI; j++)
        asm volatile("" : "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])::"memory");
}

#ifdef LLA_SM90A_CODE
#define LLA_WGMMA(N, registers, w, x, p, transposed, sums, ...)                                                        \
    if constexpr (std::is_same<T, __half>::value)                                                                      \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %" p ", 0; wgmma.mma_async.sync.aligned.m64n" N                   \
                     "k16.f32.f16.f16 {" registers "}, " w ", " x ", p, 1, 1, " transposed "; }"                       \
                     : sums                                                                                            \
                     : __VA_ARGS__);                                                                                   \
    else                                                                                                               \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %" p ", 0; wgmma.mma_async.sync.aligned.m64n" N                   \
                     "k16.f32.bf16.bf16 {" registers "}, " w ", " x ", p, 1, 1, " transposed "; }"                     \
                     : sums                                                                                            \
                     : __VA_ARGS__)
#else
#define LLA_WGMMA(...)
#endif
#define LLA_D4(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define LLA_D16(j) LLA_D4(j), LLA_D4(j + 1), LLA_D4(j + 2), LLA_D4(j + 3)
#define LLA_C2 LLA_D4(0), LLA_D4(1)
#define LLA_C8 LLA_D16(0), LLA_D16(4)
#define LLA_C16 LLA_C8, LLA_D16(8), LLA_D16(12)
#define LLA_C24 LLA_C16, LLA_D16(16), LLA_D16(20)
#define LLA_R8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define LLA_R16 LLA_R8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define LLA_R32 LLA_R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define LLA_R64                                                                                                        \
    LLA_R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"                                        \
            "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define LLA_R96                                                                                                        \
    LLA_R64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"                                        \
            "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"

/* c [64, 8 NI] (+)= w [64, 16] x [8 NI, 16]^T by a group of four warps; warp v holds rows 16 v .. 16 v + 15 of w and c,
 * in the fragment layout of mma.m16n8k16. */
template <class T, int NI> struct Wgmma;
template <class T> struct Wgmma<T, 2> {
    static __device__ __forceinline__ void run(float (&c)[2][4], const uint4 &w, uint64_t x, int accumulate) {
        LLA_WGMMA("16", LLA_R8, "{%8,%9,%10,%11}", "%12", "13", "0", LLA_C2, "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w),
                  "l"(x), "r"(accumulate));
    }
};
template <class T> struct Wgmma<T, 4> {
    static __device__ __forceinline__ void run(float (&c)[4][4], const uint4 &w, uint64_t x, int accumulate) {
        LLA_WGMMA("32", LLA_R16, "{%16,%17,%18,%19}", "%20", "21", "0", LLA_D16(0), "r"(w.x), "r"(w.y), "r"(w.z),
                  "r"(w.w), "l"(x), "r"(accumulate));
    }
};
template <class T> struct Wgmma<T, 8> {
    static __device__ __forceinline__ void run(float (&c)[8][4], const uint4 &w, uint64_t x, int accumulate) {
        LLA_WGMMA("64", LLA_R32, "{%32,%33,%34,%35}", "%36", "37", "0", LLA_C8, "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w),
                  "l"(x), "r"(accumulate));
    }
};
template <class T> struct Wgmma<T, 16> {
    static __device__ __forceinline__ void run(float (&c)[16][4], const uint4 &w, uint64_t x, int accumulate) {
        LLA_WGMMA("128", LLA_R64, "{%64,%65,%66,%67}", "%68", "69", "0", LLA_C16, "r"(w.x), "r"(w.y), "r"(w.z),
                  "r"(w.w), "l"(x), "r"(accumulate));
    }
};
template <class T> struct Wgmma<T, 24> {
    static __device__ __forceinline__ void run(float (&c)[24][4], const uint4 &w, uint64_t x, int accumulate) {
        LLA_WGMMA("192", LLA_R96, "{%96,%97,%98,%99}", "%100", "101", "0", LLA_C24, "r"(w.x), "r"(w.y), "r"(w.z),
                  "r"(w.w), "l"(x), "r"(accumulate));
    }
};

/* The same for x [16, 64] in shared memory with its rows along K, 8 KB for 64 rows: c [64, 64] (+)= w [64, 16] x. */
template <class T> struct WgmmaColumns {
    static __device__ __forceinline__ void run(float (&c)[8][4], const uint4 &w, uint64_t x, int accumulate) {
        LLA_WGMMA("64", LLA_R32, "{%32,%33,%34,%35}", "%36", "37", "1", LLA_C8, "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w),
                  "l"(x), "r"(accumulate));
    }
};
/* And with both in shared memory: c [64, 64] (+)= w [64, 16] x [64, 16]^T. */
template <class T> struct WgmmaShared {
    static __device__ __forceinline__ void run(float (&c)[8][4], uint64_t w, uint64_t x, int accumulate) {
        LLA_WGMMA("64", LLA_R32, "%32", "%33", "34", "0, 0", LLA_C8, "l"(w), "l"(x), "r"(accumulate));
    }
};

#undef LLA_WGMMA
#undef LLA_D4
#undef LLA_D16
#undef LLA_C2
#undef LLA_C8
#undef LLA_C16
#undef LLA_C24
#undef LLA_R8
#undef LLA_R16
#undef LLA_R32
#undef LLA_R64
#undef LLA_R96

#endif
#endif
