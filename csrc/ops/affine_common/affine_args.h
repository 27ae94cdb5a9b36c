// What the kernels of the affine ops take: pointers, sizes and strides. No torch, no std.
//
//   raw = [a | b] along channels; soft clip: v <- s * tanh(v / s) on both halves
//   scale = exp(a) | softplus(a + log(e - 1)) | 1,   shift = b   ("none": raw = b alone)
//   scale stays within [exp(-80), exp(80)], so that it and its inverse are finite in float32
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "common/rows.h"

namespace starflow {

enum class ScaleActivation : int32_t { softplus, exponential, none };
inline constexpr const char* scale_activation_names[]{"softplus", "exp", "none"};

inline constexpr double softplus_bias = 0.541324854612918;  // log(e - 1): a = 0 gives a scale of 1
inline constexpr double log_scale_limit = 80.0;
inline constexpr double scale_limit = 5.540622384393510e34;  // exp(80)

struct AffineOptions {
    ScaleActivation activation;
    double soft_clip;  // 0: none
    bool shifted;      // row n of raw belongs to token n + 1; token 0 has shift 0 and scale 1
};

struct AffineShape {
    int64_t batch;
    int64_t tokens;
    int64_t channels;
    Dtype data;  // of x, z and their gradients
    Dtype raw;
    AffineOptions options;
};

}  // namespace starflow
