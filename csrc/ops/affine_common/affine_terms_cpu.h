// The map from raw to shift and scale and its derivative, over Vec: the CPU kernels of the affine ops share them.
#pragma once
#include "common/visit.h"
#include "cpu/rows.h"
#include "cpu/vec.h"
#include "ops/affine_common/affine_args.h"

namespace starflow::STARFLOW_ISA {
namespace {

// The two halves of raw for some channels, with what their derivatives need.
template <class V>
struct RawTerms {
    V log_half;        // after the clip
    V shift;           // after the clip
    V log_half_slope;  // d log_half / d raw
    V shift_slope;     // d shift / d raw
};

template <class V>
struct Scale {
    V scale;
    V log_slope;  // d log(scale) / d log_half
};

template <class V, class Scalar>
struct Clip {
    explicit Clip(double bound)
        : on(bound > 0.0), bound(static_cast<Scalar>(bound)), inverse(static_cast<Scalar>(on ? 1.0 / bound : 0.0)) {}

    V operator()(V raw, V& slope) const {
        if (!on) {
            slope = V(Scalar(1));
            return raw;
        }
        return bound * hyperbolic_tangent(raw * inverse, slope);
    }

    bool on;
    V bound;
    V inverse;
};

template <ScaleActivation activation, class V, class Storage, class ClipType, class Lanes>
inline RawTerms<V> load_raw(const Storage* raw, int64_t channels, int64_t c, const ClipType& clip, Lanes lanes) {
    RawTerms<V> terms;
    if constexpr (activation == ScaleActivation::none) {
        terms.log_half = V(0);
        terms.log_half_slope = V(0);
        terms.shift = clip(load(raw + c, lanes), terms.shift_slope);
    } else {
        terms.log_half = clip(load(raw + c, lanes), terms.log_half_slope);
        terms.shift = clip(load(raw + channels + c, lanes), terms.shift_slope);
    }
    return terms;
}

// 1 where lo <= x <= hi, else 0: the derivative of a clamp. NaN gives 0, and the clamped value carries the NaN.
template <class V, class T>
inline V inside(V x, T lo, T hi) {
    return select_greater(V(lo), x, V(T(0)), select_greater(x, V(hi), V(T(0)), V(T(1))));
}

// A gradient times the slope of a clamp: zero where the slope is, whatever comes through, which may be infinite there.
template <class V>
inline V through_clamp(V gradient, V slope) {
    return select_greater(slope, V(0), gradient * slope, V(0));
}

// The derivative is dead code, and dropped, where the caller does not read it.
template <ScaleActivation activation, class V, class T>
inline Scale<V> scale_of(V log_half, T) {
    Scale<V> result;
    const T limit = static_cast<T>(log_scale_limit);
    if constexpr (activation == ScaleActivation::none) {
        result.scale = V(T(1));
        result.log_slope = V(T(0));
    } else if constexpr (activation == ScaleActivation::exponential) {
        result.scale = exponential(clamp(log_half, V(-limit), V(limit)));
        result.log_slope = inside(log_half, -limit, limit);
    } else {
        const T top = static_cast<T>(scale_limit);
        const V biased = log_half + V(static_cast<T>(softplus_bias));
        const V u = clamp(biased, V(-limit), V(top));
        // softplus(u) = max(u, 0) + log(1 + exp(-|u|)); for u < 0 the second term alone, exact in relative terms.
        const V decay = exponential(maximum(V(-limit), V(T(0)) - absolute(u)));
        result.scale = maximum(V(T(0)), u) + log1p_of_unit(decay);
        const V sigmoid = select_greater(V(T(0)), u, decay, V(T(1))) * reciprocal(V(T(1)) + decay);
        result.log_slope = inside(biased, -limit, top) * sigmoid * reciprocal(result.scale);
    }
    return result;
}

// The sum of log(scale) by products of mantissas and sums of exponents: one logarithm a row instead of one an element.
template <class V, class T>
class LogSum {
  public:
    void add(V scale) {
        product_ = product_ * mantissa(scale);
        exponents_ = exponents_ + exponent(scale);
        // Mantissas are below 2, so 64 of them stay below 2^64.
        if (++count_ == 64) fold();
    }

    T total() {
        fold();
        return sum(logs_) + sum(exponents_) * static_cast<T>(0.6931471805599453);
    }

  private:
    void fold() {
        logs_ = logs_ + logarithm(product_);
        product_ = V(T(1));
        count_ = 0;
    }

    V product_ = V(T(1));
    V exponents_ = V(T(0));
    V logs_ = V(T(0));
    int count_ = 0;
};

// Call visitor(data type, raw type, activation) with the three as template arguments.
template <class Visitor>
static inline void visit_affine(const AffineShape& shape, const Visitor& visitor) {
    visit_data_and_raw(shape.data, shape.raw, [&](auto data, auto raw) {
        switch (shape.options.activation) {
            case ScaleActivation::softplus:
                return visitor(data, raw, Constant<ScaleActivation::softplus>{});
            case ScaleActivation::exponential:
                return visitor(data, raw, Constant<ScaleActivation::exponential>{});
            case ScaleActivation::none:
                return visitor(data, raw, Constant<ScaleActivation::none>{});
        }
    });
}

}  // namespace
}  // namespace starflow::STARFLOW_ISA
