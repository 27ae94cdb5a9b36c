// affine_forward: z = (x - shift) / scale, log_det[token] = -sum over channels of log(scale), and the gradient of both.
//
// x, z (batch, tokens, channels); raw (batch, tokens, 2 * channels), or channels with activation "none".
// Memory: one pass; float32 moves 16 bytes an element (x, two halves of raw, z). Backward: x, raw and grad_z in, grad_x
// and grad_raw out, 28 bytes an element.
#pragma once
#include "cpu/variants.h"
#include "cuda/declare.h"
#include "ops/affine_common/affine_args.h"

namespace starflow {

struct AffineForwardArgs {
    AffineShape shape;
    Rows x, raw, z;
    void* log_det;  // (batch, tokens), contiguous, in the type of the arithmetic
    bool stream;    // z is written past the caches; its rows are aligned to cache lines
};

struct AffineForwardBackwardArgs {
    AffineShape shape;
    Rows x, raw, grad_z;
    const void* grad_log_det;  // (batch, tokens), contiguous, in the type of the arithmetic
    Rows grad_x, grad_raw;
    bool stream;  // grad_x and grad_raw are written past the caches
};

// Rows [begin, end) of the batch * tokens rows.
struct AffineForwardKernels {
    void (*forward)(const AffineForwardArgs& args, int64_t begin, int64_t end);
    void (*backward)(const AffineForwardBackwardArgs& args, int64_t begin, int64_t end);
};

STARFLOW_DECLARE_VARIANTS(AffineForwardKernels, affine_forward)

STARFLOW_DECLARE_CUDA(AffineForwardArgs, affine_forward_cuda)
STARFLOW_DECLARE_CUDA(AffineForwardBackwardArgs, affine_forward_backward_cuda)

}  // namespace starflow
