/* gemm_bf16.cu: the tensor-core product for bf16; a file of its own, so that the dtypes compile side by side. */
#include "gemm_tiles.cuh"

lla_status lla_gemm_tiles_bf16(const lla_gemm_args *args, lla_gemm_choice choice, cudaStream_t stream) {
    return run_gemm_tiles<__nv_bfloat16>(args, choice, stream);
}
