// Vec<float>: one register of floats of the ISA that a kernel file is compiled for; Vec<double>: one double, for
// references and gradient checks, where speed does not matter.
//
// Everything here is local to the including file (unnamed namespace): an inline function with external linkage,
// compiled with AVX-512 flags, could be the copy that the linker keeps for every machine. So no std headers either.
#pragma once
#include <cstdint>

#include "common/dtype.h"

#ifndef STARFLOW_ISA
#error "kernel files are compiled once for each ISA, with STARFLOW_ISA naming the namespace"
#endif

namespace starflow::STARFLOW_ISA {
namespace {

template <class T>
struct Vec;

// How many lanes of a register take part: all of them, or the first n at the end of a row.
struct AllLanes {};
struct FirstLanes {
    int count;
};

template <class To, class From>
inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof(To));
    return to;
}

template <>
struct Vec<double> {
    static constexpr int lanes = 1;
    double v;
    Vec() = default;
    explicit Vec(double value) : v(value) {}
};

inline Vec<double> load(const double* p, AllLanes) { return Vec<double>(*p); }
inline Vec<double> load(const double* p, FirstLanes) { return Vec<double>(*p); }
inline void store(double* p, Vec<double> a, AllLanes) { *p = a.v; }
inline void store(double* p, Vec<double> a, FirstLanes) { *p = a.v; }
inline void stream(double* p, Vec<double> a) { *p = a.v; }
inline Vec<double> operator+(Vec<double> a, Vec<double> b) { return Vec<double>(a.v + b.v); }
inline Vec<double> operator-(Vec<double> a, Vec<double> b) { return Vec<double>(a.v - b.v); }
inline Vec<double> operator*(Vec<double> a, Vec<double> b) { return Vec<double>(a.v * b.v); }
inline Vec<double> operator/(Vec<double> a, Vec<double> b) { return Vec<double>(a.v / b.v); }
inline Vec<double> reciprocal(Vec<double> a) { return Vec<double>(1.0 / a.v); }
inline Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__FMA__)
    return Vec<double>(__builtin_fma(a.v, b.v, c.v));
#else
    return Vec<double>(a.v * b.v + c.v);
#endif
}
inline Vec<double> absolute(Vec<double> a) { return Vec<double>(__builtin_fabs(a.v)); }
inline Vec<double> square_root(Vec<double> a) { return Vec<double>(__builtin_sqrt(a.v)); }
// Returns the second operand where either is NaN, like the instruction.
inline Vec<double> minimum(Vec<double> a, Vec<double> b) { return Vec<double>(a.v < b.v ? a.v : b.v); }
inline Vec<double> maximum(Vec<double> a, Vec<double> b) { return Vec<double>(a.v > b.v ? a.v : b.v); }
inline Vec<double> select_greater(Vec<double> a, Vec<double> b, Vec<double> yes, Vec<double> no) {
    return a.v > b.v ? yes : no;
}
inline Vec<double> keep(Vec<double> a, AllLanes, double) { return a; }
inline Vec<double> keep(Vec<double> a, FirstLanes, double) { return a; }
inline Vec<double> maximum_magnitude(Vec<double> a, Vec<double> b) {
    const auto x = bits_as<int64_t>(a.v);
    const auto y = bits_as<int64_t>(b.v);
    return Vec<double>(bits_as<double>(x > y ? x : y));
}
inline double sum(Vec<double> a) { return a.v; }
inline double largest_magnitude(Vec<double> a) { return a.v; }
inline void deinterleave(Vec<double> a, Vec<double> b, Vec<double>& u, Vec<double>& v) {
    u = a;
    v = b;
}
inline void interleave(Vec<double> u, Vec<double> v, Vec<double>& a, Vec<double>& b) {
    a = u;
    b = v;
}
inline Vec<double> exponential(Vec<double> a) { return Vec<double>(__builtin_exp(a.v)); }
inline Vec<double> logarithm(Vec<double> a) { return Vec<double>(__builtin_log(a.v)); }
inline Vec<double> log1p_of_unit(Vec<double> a) { return Vec<double>(__builtin_log1p(a.v)); }
inline Vec<double> hyperbolic_tangent(Vec<double> a, Vec<double>& slope) {
    const double t = __builtin_tanh(a.v);
    slope = Vec<double>((1.0 - t) * (1.0 + t));
    return Vec<double>(t);
}
inline Vec<double> exponent(Vec<double> a) {
    return Vec<double>(static_cast<double>(static_cast<int64_t>((bits_as<uint64_t>(a.v) >> 52) & 0x7ff) - 1023));
}
inline Vec<double> mantissa(Vec<double> a) {
    const uint64_t biased = (bits_as<uint64_t>(a.v) >> 52) & 0x7ff;
    return Vec<double>(a.v * bits_as<double>((uint64_t{2046} - biased) << 52));
}

// x if lo <= x <= hi, else the bound; NaN stays NaN, because each instruction hands on its second operand.
template <class V>
inline V clamp(V x, V lo, V hi) {
    return minimum(hi, maximum(lo, x));
}

// Columns of a matrix of T that `load_turned` takes at a time.
template <class T, class V = Vec<float>>
inline constexpr int turned_columns = V::lanes;

}  // namespace
}  // namespace starflow::STARFLOW_ISA

#if defined(__AVX512F__)
#include "cpu/vec_avx512.h"
#elif defined(__AVX2__)
#include "cpu/vec_avx2.h"
#else
#include "cpu/vec_scalar.h"
#endif
#include "cpu/vec_math.h"

namespace starflow::STARFLOW_ISA {
namespace {

// columns[i] = column i of as many rows as a register has lanes.
template <class T>
inline void load_turned(const T* rows, int64_t stride, Vec<float> (&columns)[Vec<float>::lanes]) {
    for (int64_t i = 0; i < Vec<float>::lanes; ++i) columns[i] = load(rows + i * stride, AllLanes{});
    transpose(columns);
}

}  // namespace
}  // namespace starflow::STARFLOW_ISA

#if !defined(__AVX512F__)
namespace starflow::STARFLOW_ISA {
namespace {

// The first `count` values, each into its pair: as the first of it or the second.
inline void store_into_pairs(BFloat16* pairs, int second, Vec<float> a, int count) {
    BFloat16 values[Vec<float>::lanes];
    store(values, a, AllLanes{});
    for (int i = 0; i < count; ++i) pairs[2 * i + second] = values[i];
}

}  // namespace
}  // namespace starflow::STARFLOW_ISA
#endif
