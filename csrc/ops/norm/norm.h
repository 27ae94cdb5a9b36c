// norm: out = (s - mean) * inverse * (weight_offset + weight) + bias over the channels of each row, s = x, or x +
// residual.
//
//   layer_norm: mean = sum(s) / C,  inverse = 1 / sqrt(sum((s - mean)^2) / C + epsilon)
//   rms_norm:   mean = 0,           inverse = 1 / sqrt(sum(s^2) / C + epsilon),           no bias
// epsilon and weight_offset (0: a plain weight, 1: an offset from one) are the caller's.
// Gradient, with n = (s - mean) * inverse, g = grad_out * (weight_offset + weight):
//   grad_s = inverse * (g - sum(g) / C - n * sum(g * n) / C) + grad_sum    (rms_norm: without sum(g))
//   grad_weight = sum over rows of grad_out * n,  grad_bias = sum over rows of grad_out
// The sums over rows are taken within blocks of rows, then over the blocks (RowBlocks).
//
// x (batch, tokens, channels); weight, bias (channels,); out, residual and sum like x in the type of the arithmetic.
// Memory: x is read once and out written once, float32 8 bytes an element, 16 with a residual; a row is read two or
// three times, but from the first-level cache. Gradient: 12 bytes an element (grad_out, x, grad_x).
#pragma once
#include "common/rows.h"
#include "cpu/norm_kind.h"
#include "cpu/variants.h"
#include "cuda/declare.h"

namespace starflow {

// A block of 256 threads holds a row in registers.
inline constexpr int64_t norm_most_channels_cuda = 4096;

struct NormShape {
    int64_t batch;
    int64_t tokens;
    int64_t channels;
    Dtype data;  // of x and grad_x
    bool centred;
    double epsilon;
    double weight_offset;
};

struct NormArgs {
    NormShape shape;
    Rows x;
    Rows residual;       // null: none
    const void* weight;  // weight, bias, out, sum: contiguous, in the type of the arithmetic
    const void* bias;    // null: none
    void* out;
    void* sum;    // null: none
    bool stream;  // out is written past the caches; its rows are aligned to cache lines
    bool early;   // CUDA: the launch may begin before the one in front of it has ended
};

struct NormBackwardArgs {
    NormShape shape;
    Rows grad_out;  // in the type of the arithmetic
    Rows grad_sum;  // null: none
    Rows x;
    const void* weight;
    void* grad_x;      // contiguous
    void* partial;     // (blocks, parameters, channels) in the type of the arithmetic
    void* parameters;  // (parameters, channels): the sum of partial over the blocks
    RowBlocks blocks;
    bool with_bias;  // two parameters, else one
    bool stream;     // grad_x is written past the caches
};

struct NormKernels {
    // Rows [begin, end) of the batch * tokens rows.
    void (*forward)(const NormArgs& args, int64_t begin, int64_t end);
    // Blocks [begin, end) of rows.
    void (*backward)(const NormBackwardArgs& args, int64_t begin, int64_t end);
    // Values [begin, end) of the parameters * channels values.
    void (*sum_blocks)(const NormBackwardArgs& args, int64_t begin, int64_t end);
};

STARFLOW_DECLARE_VARIANTS(NormKernels, norm)
STARFLOW_DECLARE_CUDA(NormArgs, norm_cuda)
STARFLOW_DECLARE_CUDA(NormBackwardArgs, norm_backward_cuda)

}  // namespace starflow
