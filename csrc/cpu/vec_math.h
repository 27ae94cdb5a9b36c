// Elementary functions of Vec<float>, once for every ISA. Included by vec.h alone.
//
// Bounds are of the relative error against float64, in units of 2^-24 (half an ulp), measured over the stated range by
// tests/ops; polynomials are Chebyshev interpolants of the function's own quotient.
#pragma once
#include "cpu/vec.h"

namespace starflow::STARFLOW_ISA {
namespace {

// exp(x) for |x| <= 87; NaN stays. Error below 4.
inline Vec<float> exponential(Vec<float> x) {
    using V = Vec<float>;
    const V n = round_to_integer(x * V(0x1.715476p0F));
    // ln 2 in two parts, the first with trailing zeros, so that n times it is exact.
    V r = multiply_add(n, V(-0x1.62e4p-1F), x);
    r = multiply_add(n, V(-0x1.7f7d1cp-20F), r);
    V q = multiply_add(V(0.0013933652488F), r, V(0.00836318354468F));
    q = multiply_add(q, r, V(0.0416664648954F));
    q = multiply_add(q, r, V(0.166665769672F));
    q = multiply_add(q, r, V(0.500000001347F));
    return times_power_of_two(multiply_add(r * r, q, r) + V(1.0F), n);
}

// 2^x for |x| <= 125; NaN stays. Error below 2.
inline Vec<float> power_of_two(Vec<float> x) {
    using V = Vec<float>;
    const V n = round_to_integer(x);
    const V r = x - n;
    V q = multiply_add(V(0.00015453162942F), r, V(0.00133908633642F));
    q = multiply_add(q, r, V(0.00961808255728F));
    q = multiply_add(q, r, V(0.0555035711422F));
    q = multiply_add(q, r, V(0.240226507606F));
    q = multiply_add(q, r, V(0.693147188026F));
    return times_power_of_two(multiply_add(q, r, V(1.0F)), n);
}

// 2^x for |x| <= 125 where it is rounded to bfloat16 next and only sums of many keep more; NaN stays. Relative error
// below 2.8e-6.
inline Vec<float> coarse_power_of_two(Vec<float> x) {
    using V = Vec<float>;
    const V n = round_to_integer(x);
    const V r = x - n;
    V q = multiply_add(V(0.0095700463F), r, V(0.0559177436F));
    q = multiply_add(q, r, V(0.240247443F));
    q = multiply_add(q, r, V(0.69312185F));
    return times_power_of_two(multiply_add(q, r, V(0.999999285F)), n);
}

// 2 * atanh(s) for |s| <= 1/3: the odd series that both logarithms end in.
inline Vec<float> twice_atanh(Vec<float> s) {
    using V = Vec<float>;
    const V w = s * s;
    V q = multiply_add(V(0.134340407243F), w, V(0.141169410308F));
    q = multiply_add(q, w, V(0.200038366601F));
    q = multiply_add(q, w, V(0.333333198272F));
    const V twice = s + s;
    return multiply_add(twice * w, q, twice);
}

// log(1 + t) for 0 <= t <= 1; relative to the result, also where t is tiny. Error below 6.
inline Vec<float> log1p_of_unit(Vec<float> t) { return twice_atanh(t * reciprocal(t + Vec<float>(2.0F))); }

// log(x) for normal x > 0; absolute error below 4 plus 2 relative ones.
inline Vec<float> logarithm(Vec<float> x) {
    using V = Vec<float>;
    V m = mantissa(x);
    V e = exponent(x);
    const V root(1.41421356F);
    e = select_greater(m, root, e + V(1.0F), e);
    m = select_greater(m, root, m * V(0.5F), m);
    const V tail = multiply_add(e, V(0x1.7f7d1cp-20F), twice_atanh((m - V(1.0F)) * reciprocal(m + V(1.0F))));
    return multiply_add(e, V(0x1.62e4p-1F), tail);
}

// tanh(x), and its slope 1 - tanh^2 without cancellation. Error below 8.
inline Vec<float> hyperbolic_tangent(Vec<float> x, Vec<float>& slope) {
    using V = Vec<float>;
    const V size = absolute(x);
    const V decay = exponential(maximum(V(-80.0F), V(-2.0F) * size));
    const V inverse = reciprocal(V(1.0F) + decay);
    slope = V(4.0F) * decay * inverse * inverse;
    const V far = (V(1.0F) - decay) * inverse;
    const V w = x * x;
    V q = multiply_add(V(-0.0069469843F), w, V(0.0214727104F));
    q = multiply_add(q, w, V(-0.0539337878F));
    q = multiply_add(q, w, V(0.133332273763F));
    q = multiply_add(q, w, V(-0.333333328093F));
    const V near = multiply_add(x * w, q, x);
    return select_greater(V(0.5F), size, near, select_greater(V(0.0F), x, V(0.0F) - far, far));
}

// gelu(x) = x * Phi(x), Phi the normal distribution function. The tail Phi(-|x|) = exp(-x^2 / 2) * h(|x|), with h, half
// the scaled complementary error function at |x| / sqrt(2), a polynomial in 1 / (1 + 0.3 |x|) fitted for the smallest
// relative error (1.5e-7). Relative error below 40 for |x| < 5; further down it is that of exp(-x^2 / 2), 1e-5.
inline Vec<float> gelu(Vec<float> x) {
    using V = Vec<float>;
    const V size = absolute(x);
    const V t = reciprocal(multiply_add(V(0.3F), size, V(1.0F)));
    V h = multiply_add(V(0.0356775042F), t, V(-0.157214335F));
    h = multiply_add(h, t, V(0.206372713F));
    h = multiply_add(h, t, V(-0.0537011809F));
    h = multiply_add(h, t, V(0.128570842F));
    h = multiply_add(h, t, V(0.0999107151F));
    h = multiply_add(h, t, V(0.120754399F));
    h = multiply_add(h, t, V(0.11962927F));
    const V tail = h * t * exponential(maximum(V(-87.0F), V(-0.5F) * x * x));
    return x * select_greater(V(0.0F), x, tail, V(1.0F) - tail);
}

// gelu(x) where it is rounded to bfloat16 next: Phi(x) = 1 / (1 + 2^-q), q = log2(Phi(x) / Phi(-x)), an odd function,
// as a polynomial of degree 5 fitted up to |x| = 6. Error below 7.5e-5, and below 6.5e-4 of results above 0.01,
// where rounding adds up to 2e-3.
inline Vec<float> coarse_gelu(Vec<float> x) {
    using V = Vec<float>;
    const V w = minimum(x * x, V(36.0F));
    const V slope = multiply_add(multiply_add(V(-0.00112004043F), w, V(0.107555941F)), w, V(2.30011702F));
    return x * reciprocal(V(1.0F) + coarse_power_of_two(clamp(V(0.0F) - x * slope, V(-125.0F), V(125.0F))));
}

// gelu(x) with Phi(x) = (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3).
inline Vec<float> gelu_tanh(Vec<float> x) {
    using V = Vec<float>;
    const V u = x * multiply_add(V(0.0713548163F) * x, x, V(1.5957691216F));
    return x * reciprocal(V(1.0F) + exponential(clamp(V(0.0F) - u, V(-87.0F), V(87.0F))));
}

// silu(x) = x / (1 + exp(-x)). Below -87 the power is held there: the result is 1e-36 in place of 0.
inline Vec<float> silu(Vec<float> x) {
    using V = Vec<float>;
    return x * reciprocal(V(1.0F) + exponential(clamp(V(0.0F) - x, V(-87.0F), V(87.0F))));
}

}  // namespace
}  // namespace starflow::STARFLOW_ISA
