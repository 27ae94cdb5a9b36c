// What a norm over the last axis takes: no torch, no std.
#pragma once
#include <cstdint>

namespace starflow {

// none: x;  layer: (x - mean) / sqrt(variance + epsilon) * weight + bias;  rms: x / sqrt(mean(x^2) + epsilon) *
// (1 + weight), as the published checkpoints store it.
enum class NormKind : int32_t { none, layer, rms };

struct RowNorm {
    NormKind kind = NormKind::none;
    const float* weight = nullptr;  // (width,)
    const float* bias = nullptr;    // (width,) of layer, or null
    float epsilon = 0.0F;
};

}  // namespace starflow
