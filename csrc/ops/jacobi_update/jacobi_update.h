// jacobi_update: x <- shift + scale * z in place, change[token] = max over channels of |x_new - x_old| / scale.
//
// With guidance w > 0, raw holds the conditional samples before the unconditional ones, and
//   r = min(scale_c / scale_u, 1)^2,  q = 1 + w - w * r
//   scale = scale_c / sqrt(q),  shift = ((1 + w) * shift_c - w * r * shift_u) / q
// x, z (batch, tokens, channels); raw (batch or 2 * batch, tokens, 2 * channels or channels); change (batch, tokens).
// Memory: one pass; float32 moves 20 bytes an element (x, z, two halves of raw, x), 28 with guidance.
#pragma once
#include "cpu/variants.h"
#include "cuda/declare.h"
#include "ops/affine_common/affine_args.h"

namespace starflow {

struct JacobiUpdateArgs {
    AffineShape shape;  // batch is that of x
    Rows x, z, raw;
    float* change;  // contiguous
    double guidance;
};

// Rows [begin, end) of the batch * tokens rows.
struct JacobiUpdateKernels {
    void (*update)(const JacobiUpdateArgs& args, int64_t begin, int64_t end);
};

STARFLOW_DECLARE_VARIANTS(JacobiUpdateKernels, jacobi_update)
STARFLOW_DECLARE_CUDA(JacobiUpdateArgs, jacobi_update_cuda)

}  // namespace starflow
