// Parameters of a norm over the channels of a row, as kernels take them: no torch, no std.
#pragma once
#include <cstdint>

namespace starflow {

enum class NormKind : int32_t { none, layer, rms };

struct RowNorm {
    NormKind kind;
    const float* weight;  // (channels,); of rms an offset from one
    const float* bias;    // (channels,) or null; of layer alone
    float epsilon;
};

}  // namespace starflow
