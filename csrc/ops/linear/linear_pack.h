// linear_pack: a weight (out_channels, in_channels) into the panels that products read (csrc/cpu/panels.h), once.
//
//   float32, float16, bfloat16   rounded to that type; NaN and infinity stay
//   int8                         round(weight / scale), scale = max |weight| / 127 of each output channel
//   two_bfloat16                 the weight rounded to bfloat16, and what is left of it rounded again
//
// On CUDA, where products read the matrix as it is, packing rounds it and pads its rows with zeros, in plain torch.
// Memory: one pass; int8 reads each row twice.
#pragma once
#include "common/dtype.h"
#include "cpu/panels.h"
#include "cpu/variants.h"

namespace starflow {

struct LinearPackArgs {
    const void* weight;
    Dtype dtype;  // float32, bfloat16 or float16
    int64_t out_channels;
    int64_t in_channels;
    int64_t row_stride;  // in elements; in_channels lie side by side
    MatrixStorage storage;
    void* panels;
    float* column_scale;  // (out_channels,) of int8: infinity or NaN where a row is not finite
};

// Panels [first, last).
struct LinearPackKernels {
    void (*pack)(const LinearPackArgs& args, int64_t first, int64_t last);
};

STARFLOW_DECLARE_VARIANTS(LinearPackKernels, linear_pack)

}  // namespace starflow
