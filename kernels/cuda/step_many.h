/* step_many.h: the nodes for steps of many rows (prompts); nodes.h' launchers call them where they take the shape.
 *
 * They give the same bits as the kernels for few rows: the order of every sum is the one that nodes.h describes. */
#ifndef LLA_CUDA_STEP_MANY_H
#define LLA_CUDA_STEP_MANY_H

#include "nodes.h"

/* Steps of at most so many rows stay with the kernels for few rows; on GPUs with wgmma gate, up and head change sooner.
 */
enum { LLA_FEW_ROWS = 64 };

/* Whether the kernels of step_gemm.cu take the node: 16-bit elements in rows that are whole units of 16 bytes. */
bool lla_many_qkv_takes(const lla_cuda_ctx *ctx);
bool lla_many_linear_add_takes(const lla_cuda_ctx *ctx, const lla_linear_add_args *args);
bool lla_many_gate_up_takes(const lla_cuda_ctx *ctx);
bool lla_many_head_takes(const lla_cuda_ctx *ctx);

lla_status lla_many_qkv(const lla_cuda_ctx *ctx, const lla_qkv_args *args);
lla_status lla_many_linear_add(const lla_cuda_ctx *ctx, const lla_linear_add_args *args);
lla_status lla_many_gate_up(const lla_cuda_ctx *ctx, const lla_gate_up_args *args);
/* The product alone, for the logit rows: normed [rows, hidden]. */
lla_status lla_many_head(const lla_cuda_ctx *ctx, const void *normed, const void *w, void *logits);

#endif
