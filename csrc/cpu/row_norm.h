// LayerNorm and RMSNorm of one row, in float32, on its way into packed rows (csrc/cpu/matmul.h) or into memory. For
// kernel files.
//
//   layer  (x - mean) / sqrt(mean((x - mean)^2) + epsilon) * (weight_offset + weight) + bias
//   rms    x / sqrt(mean(x^2) + epsilon) * (weight_offset + weight)
#pragma once
#include "cpu/matmul.h"
#include "cpu/norm_kind.h"
#include "cpu/rows.h"

namespace starflow::STARFLOW_ISA {
namespace {

// The mean that a row is centred by, and the inverse that the centred row is multiplied by.
struct RowMoments {
    float mean;
    float inverse;
};

template <class T>
inline RowMoments row_moments(const T* x, int64_t channels, const RowNorm& norm) {
    using V = Vec<float>;
    const float share = 1.0F / static_cast<float>(channels);
    RowMoments moments{0.0F, 1.0F};
    if (norm.kind == NormKind::layer) {
        moments.mean = share * sum_over<V>(channels, [&](int64_t c, auto lanes) { return load(x + c, lanes); });
    }
    const auto sum_of_squares = [&] {
        const V mean(moments.mean);
        return sum_over<V>(channels, [&](int64_t c, auto lanes) {
            const V distance = load(x + c, lanes) - mean;
            return distance * distance;
        });
    };
    float squares = sum_of_squares();
    if (moments.mean * moments.mean > static_cast<float>(far_mean_squared) * share * squares) {
        const V mean(moments.mean);
        moments.mean += share * sum_over<V>(channels, [&](int64_t c, auto lanes) { return load(x + c, lanes) - mean; });
        squares = sum_of_squares();
    }
    moments.inverse = 1.0F / __builtin_sqrtf(share * squares + norm.epsilon);
    return moments;
}

// Channels [c, c + lanes) of a normalised row.
template <class T, class Lanes>
inline Vec<float> normalised(const T* x, int64_t c, Lanes lanes, const RowMoments& moments, const RowNorm& norm) {
    using V = Vec<float>;
    const V y = (load(x + c, lanes) - V(moments.mean)) * V(moments.inverse);
    const V weight = load(norm.weight + c, lanes);
    const V weighted = y * (norm.weight_offset == 0.0F ? weight : V(norm.weight_offset) + weight);
    return norm.bias == nullptr ? weighted : weighted + load(norm.bias + c, lanes);
}

// A row normalised where it lies.
inline void normalise_row(float* x, int64_t channels, const RowNorm& norm) {
    if (norm.kind == NormKind::none) return;
    const RowMoments moments = row_moments(x, channels, norm);
    over_channels(channels,
                  [&](int64_t c, auto lanes) { store(x + c, normalised(x, c, lanes, moments, norm), lanes); });
}

// Packs all rows row_of(r) (depth,) into `packed`, normalised, or as they are for NormKind::none. Computing the moments
// reads a row up to twice from the first-level cache, which takes less time than one product with it.
template <class Product, class RowOf>
inline void pack_normalised_rows(const PackedRows& packed, int64_t depth, const RowNorm& norm, const RowOf& row_of) {
    for (int64_t r = 0; r < packed.rows; ++r) {
        const auto* x = row_of(r);
        if (norm.kind == NormKind::none) {
            pack_row<Product>(packed, r, depth, [&](int64_t c, auto lanes) { return load(x + c, lanes); });
        } else {
            const RowMoments moments = row_moments(x, depth, norm);
            pack_row<Product>(packed, r, depth,
                              [&](int64_t c, auto lanes) { return normalised(x, c, lanes, moments, norm); });
        }
    }
}

}  // namespace
}  // namespace starflow::STARFLOW_ISA
