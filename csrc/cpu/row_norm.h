// LayerNorm and RMSNorm of one row in float32 (formulas in row_norm_args.h). For kernel files.
#pragma once
#include "cpu/matmul.h"
#include "cpu/row_norm_args.h"

namespace starflow::STARFLOW_ISA {
namespace {

// value = (x - shift) * factor, then weight and bias by channel.
struct RowStatistics {
    float shift;
    float factor;
};

template <class Visitor>
inline void over_channels_of(int64_t width, const Visitor& visitor) {
    int64_t c = 0;
    for (; c + Vec<float>::lanes <= width; c += Vec<float>::lanes) visitor(c, AllLanes{});
    if (c < width) visitor(c, FirstLanes{static_cast<int>(width - c)});
}

// Two passes: the variance is of what the mean left, without cancellation.
inline RowStatistics statistics_of(const float* x, int64_t width, const RowNorm& norm) {
    using V = Vec<float>;
    const float per_channel = 1.0F / static_cast<float>(width);
    float mean = 0.0F;
    if (norm.kind == NormKind::layer) {
        V total(0.0F);
        over_channels_of(width, [&](int64_t c, auto lanes) { total = total + keep(load(x + c, lanes), lanes, 0.0F); });
        mean = sum(total) * per_channel;
    }
    V squares(0.0F);
    over_channels_of(width, [&](int64_t c, auto lanes) {
        const V left = keep(load(x + c, lanes) - V(mean), lanes, 0.0F);
        squares = multiply_add(left, left, squares);
    });
    return {mean, 1.0F / __builtin_sqrtf(sum(squares) * per_channel + norm.epsilon)};
}

template <class Lanes>
inline Vec<float> normalised(Vec<float> x, int64_t c, Lanes lanes, const RowNorm& norm, const RowStatistics& of) {
    using V = Vec<float>;
    const V standard = (x - V(of.shift)) * V(of.factor);
    if (norm.kind == NormKind::rms) return multiply_add(standard, load(norm.weight + c, lanes), standard);
    const V weight = load(norm.weight + c, lanes);
    return norm.bias == nullptr ? standard * weight : multiply_add(standard, weight, load(norm.bias + c, lanes));
}

// out = norm(x), in place too.
inline void normalise_row(const float* x, float* out, int64_t width, const RowNorm& norm) {
    if (norm.kind == NormKind::none) {
        if (x != out) over_channels_of(width, [&](int64_t c, auto lanes) { store(out + c, load(x + c, lanes), lanes); });
        return;
    }
    const RowStatistics of = statistics_of(x, width, norm);
    over_channels_of(width, [&](int64_t c, auto lanes) {
        store(out + c, normalised(load(x + c, lanes), c, lanes, norm, of), lanes);
    });
}

// Row r of a product, normalised on its way in.
template <class Product>
inline void pack_normalised_row(const PackedRows& packed, int64_t r, const float* x, int64_t width,
                                const RowNorm& norm) {
    if (norm.kind == NormKind::none) {
        pack_row<Product>(packed, r, width, [&](int64_t c, auto lanes) { return load(x + c, lanes); });
        return;
    }
    const RowStatistics of = statistics_of(x, width, norm);
    pack_row<Product>(packed, r, width,
                      [&](int64_t c, auto lanes) { return normalised(load(x + c, lanes), c, lanes, norm, of); });
}

}  // namespace
}  // namespace starflow::STARFLOW_ISA
