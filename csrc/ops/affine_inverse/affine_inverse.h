// affine_inverse: x = shift + scale * z, and its gradient.
//
// z, x (batch, tokens, channels); raw (batch, tokens, 2 * channels), or channels with activation "none".
// Memory: one pass; float32 moves 16 bytes an element (z, two halves of raw, x). Backward: z, raw and grad_x in, grad_z
// and grad_raw out, 28 bytes an element.
#pragma once
#include "cpu/variants.h"
#include "cuda/declare.h"
#include "ops/affine_common/affine_args.h"

namespace starflow {

struct AffineInverseArgs {
    AffineShape shape;
    Rows z, raw, x;
    bool stream;  // x is written past the caches; its rows are aligned to cache lines
};

struct AffineInverseBackwardArgs {
    AffineShape shape;
    Rows z, raw, grad_x;
    Rows grad_z, grad_raw;
    bool stream;  // grad_z and grad_raw are written past the caches
};

// Rows [begin, end) of the batch * tokens rows.
struct AffineInverseKernels {
    void (*forward)(const AffineInverseArgs& args, int64_t begin, int64_t end);
    void (*backward)(const AffineInverseBackwardArgs& args, int64_t begin, int64_t end);
};

STARFLOW_DECLARE_VARIANTS(AffineInverseKernels, affine_inverse)
STARFLOW_DECLARE_CUDA(AffineInverseArgs, affine_inverse_cuda)
STARFLOW_DECLARE_CUDA(AffineInverseBackwardArgs, affine_inverse_backward_cuda)

}  // namespace starflow
