/* gemm_f16.cu: the tensor-core product for f16; a file of its own, so that the dtypes compile side by side. */
#include "gemm_tiles.cuh"

lla_status lla_gemm_tiles_f16(const lla_gemm_args *args, lla_gemm_choice choice, cudaStream_t stream) {
    return run_gemm_tiles<__half>(args, choice, stream);
}
