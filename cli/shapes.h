/* shapes.h: the shapes that can be measured without a checkpoint, with random weights. */
#ifndef LLA_SHAPES_H
#define LLA_SHAPES_H

#include "../planner/spec.h"

/* As their config.json say. */
static const struct {
    const char *name;
    struct lla_spec spec;
} lla_shapes[] = {
    {"qwen2-0.5b", {LLAISYS_DTYPE_BF16, 24, 896, 14, 2, 64, 4864, 151936, 32768, true, 1e-6f, 1e6, {151643}, 1}},
    {"deepseek-r1-distill-qwen-1.5b",
     {LLAISYS_DTYPE_BF16, 28, 1536, 12, 2, 128, 8960, 151936, 131072, false, 1e-6f, 1e4, {151643}, 1}},
    {"qwen2.5-7b", {LLAISYS_DTYPE_BF16, 28, 3584, 28, 4, 128, 18944, 152064, 131072, false, 1e-6f, 1e6, {151645}, 1}},
    {"qwen2.5-14b", {LLAISYS_DTYPE_BF16, 48, 5120, 40, 8, 128, 13824, 152064, 131072, false, 1e-6f, 1e6, {151645}, 1}},
    {"qwen2.5-32b", {LLAISYS_DTYPE_BF16, 64, 5120, 40, 8, 128, 27648, 152064, 131072, false, 1e-6f, 1e6, {151645}, 1}},
};

#endif
