// One float at a time: the variant that every machine runs. Included by vec.h alone.
#pragma once
#include "cpu/vec.h"

namespace starflow::STARFLOW_ISA {
namespace {

template <>
struct Vec<float> {
    static constexpr int lanes = 1;
    float v;
    Vec() = default;
    explicit Vec(float value) : v(value) {}
};

inline float widen(float value) { return value; }
inline float widen(BFloat16 value) { return bits_as<float>(static_cast<uint32_t>(value.bits) << 16); }
inline float widen(Float16 value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
    const uint32_t magnitude = value.bits & 0x7fff;
    if (magnitude >= 0x7c00) return bits_as<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // Shifted into float32's fields the exponent is short by 112; the product mends it, for subnormals too.
    return bits_as<float>(sign | bits_as<uint32_t>(bits_as<float>(magnitude << 13) * 0x1p112F));
}

inline void narrow(float value, float* out) { *out = value; }
inline void narrow(float value, BFloat16* out) {
    const auto bits = bits_as<uint32_t>(value);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    out->bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void narrow(float value, Float16* out) {
    const auto bits = bits_as<uint32_t>(value);
    const uint32_t sign = (bits >> 16) & 0x8000;
    const uint32_t magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) {
        half = 0x7e00;
    } else if (magnitude >= 0x477ff000) {  // 65520 and above round to infinity
        half = 0x7c00;
    } else if (magnitude < 0x38800000) {  // subnormal in float16: adding 0.5 rounds to multiples of 2^-24
        half = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5F) - 0x3f000000;
    } else {
        half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    }
    out->bits = static_cast<uint16_t>(sign | half);
}

template <class Storage>
inline Vec<float> load(const Storage* p, AllLanes) {
    return Vec<float>(widen(*p));
}
template <class Storage>
inline Vec<float> load(const Storage* p, FirstLanes) {
    return Vec<float>(widen(*p));
}
template <class Storage>
inline void store(Storage* p, Vec<float> a, AllLanes) {
    narrow(a.v, p);
}
template <class Storage>
inline void store(Storage* p, Vec<float> a, FirstLanes) {
    narrow(a.v, p);
}
template <class Storage>
inline void stream(Storage* p, Vec<float> a) {
    narrow(a.v, p);
}

inline Vec<float> load(const int8_t* p, AllLanes) { return Vec<float>(static_cast<float>(*p)); }

// One pair of neighbours in bfloat16.
struct Pairs {
    BFloat16 v[2];
};
inline Pairs load_pairs(const BFloat16* p) { return {{p[0], p[1]}}; }
inline Vec<float> first_of(Pairs a) { return Vec<float>(widen(a.v[0])); }
inline Vec<float> second_of(Pairs a) { return Vec<float>(widen(a.v[1])); }

inline void stream_fence() {}

inline Vec<float> operator+(Vec<float> a, Vec<float> b) { return Vec<float>(a.v + b.v); }
inline Vec<float> operator-(Vec<float> a, Vec<float> b) { return Vec<float>(a.v - b.v); }
inline Vec<float> operator*(Vec<float> a, Vec<float> b) { return Vec<float>(a.v * b.v); }
inline Vec<float> operator/(Vec<float> a, Vec<float> b) { return Vec<float>(a.v / b.v); }
inline Vec<float> reciprocal(Vec<float> a) { return Vec<float>(1.0F / a.v); }
// Two roundings: a fused one would be a call into libm here.
inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) { return Vec<float>(a.v * b.v + c.v); }
inline Vec<float> absolute(Vec<float> a) { return Vec<float>(__builtin_fabsf(a.v)); }
inline Vec<float> square_root(Vec<float> a) { return Vec<float>(__builtin_sqrtf(a.v)); }
inline Vec<float> minimum(Vec<float> a, Vec<float> b) { return Vec<float>(a.v < b.v ? a.v : b.v); }
inline Vec<float> maximum(Vec<float> a, Vec<float> b) { return Vec<float>(a.v > b.v ? a.v : b.v); }
inline Vec<float> select_greater(Vec<float> a, Vec<float> b, Vec<float> yes, Vec<float> no) {
    return a.v > b.v ? yes : no;
}
inline bool any_greater(Vec<float> a, Vec<float> b) { return a.v > b.v; }
inline Vec<float> keep(Vec<float> a, AllLanes, float) { return a; }
inline Vec<float> keep(Vec<float> a, FirstLanes, float) { return a; }
inline Vec<float> maximum_magnitude(Vec<float> a, Vec<float> b) {
    const auto x = bits_as<int32_t>(a.v);
    const auto y = bits_as<int32_t>(b.v);
    return Vec<float>(bits_as<float>(x > y ? x : y));
}
inline float sum(Vec<float> a) { return a.v; }
inline float largest(Vec<float> a) { return a.v; }
inline void transpose(Vec<float> (&)[1]) {}
inline float largest_magnitude(Vec<float> a) { return a.v; }
// Neighbours apart, and together again: one lane has no neighbours.
inline void deinterleave(Vec<float> a, Vec<float> b, Vec<float>& u, Vec<float>& v) {
    u = a;
    v = b;
}
inline void interleave(Vec<float> u, Vec<float> v, Vec<float>& a, Vec<float>& b) {
    a = u;
    b = v;
}

// 1.5 * 2^23 pushes the fraction out of the mantissa: rounds to nearest, and leaves the integer in the low bits.
inline Vec<float> round_to_integer(Vec<float> a) { return Vec<float>((a.v + 0x1.8p23F) - 0x1.8p23F); }
inline Vec<float> times_power_of_two(Vec<float> a, Vec<float> power) {
    const auto bits = bits_as<uint32_t>(power.v + 0x1.8p23F);
    return Vec<float>(bits_as<float>(bits_as<uint32_t>(a.v) + (bits << 23)));
}
inline Vec<float> exponent(Vec<float> a) {
    return Vec<float>(static_cast<float>(static_cast<int32_t>((bits_as<uint32_t>(a.v) >> 23) & 0xff) - 127));
}
inline Vec<float> mantissa(Vec<float> a) {
    const uint32_t biased = (bits_as<uint32_t>(a.v) >> 23) & 0xff;
    return Vec<float>(a.v * bits_as<float>((254 - biased) << 23));
}

}  // namespace
}  // namespace starflow::STARFLOW_ISA
