// Parameters of a norm over the channels of a row, as kernels take them: no torch, no std.
#pragma once
#include <cstdint>

namespace starflow {

enum class NormKind : int32_t { none, layer, rms };
inline constexpr const char* norm_kind_names[]{"none", "layer_norm", "rms_norm"};

// The epsilons are those of the published models.
inline constexpr double layer_norm_epsilon = 1e-5;
inline constexpr double rms_norm_epsilon = 1e-6;
static constexpr double epsilon_of(NormKind kind) {
    return kind == NormKind::layer ? layer_norm_epsilon : kind == NormKind::rms ? rms_norm_epsilon : 0.0;
}

struct RowNorm {
    NormKind kind;
    const float* weight;  // (channels,); for rms an offset from one
    const float* bias;    // (channels,) or null; for layer alone
    float epsilon;
};

}  // namespace starflow
