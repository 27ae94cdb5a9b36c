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

// What is added to the weight: the published checkpoints store that of RMSNorm as an offset from one.
static constexpr double weight_offset_of(NormKind kind) { return kind == NormKind::rms ? 1.0 : 0.0; }

// Where the mean is this many times the standard deviation or more, what rounding leaves of it is no longer small
// beside the distances from it, which are exact there: their own mean corrects it. Its square.
inline constexpr double far_mean_squared = 1024.0;

struct RowNorm {
    NormKind kind;
    const float* weight;  // (channels,)
    const float* bias;    // (channels,) or null; for layer alone
    float epsilon;
    float weight_offset;
};

}  // namespace starflow
