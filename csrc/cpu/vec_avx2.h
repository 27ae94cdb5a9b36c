// Eight floats: AVX2 with FMA and F16C. Included by vec.h alone.
#pragma once
#include <immintrin.h>

#include "cpu/vec.h"

namespace starflow::STARFLOW_ISA {
namespace {

template <>
struct Vec<float> {
    static constexpr int lanes = 8;
    __m256 v;
    Vec() = default;
    explicit Vec(__m256 value) : v(value) {}
    explicit Vec(float value) : v(_mm256_set1_ps(value)) {}
};

inline __m256i first_lanes(FirstLanes n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n.count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline __m256 widen(__m128i bits, const BFloat16*) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline __m256 widen(__m128i bits, const Float16*) { return _mm256_cvtph_ps(bits); }

inline __m128i narrow(__m256 a, const BFloat16*) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
    const __m256i chosen =
        _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan));
    const __m256i high = _mm256_srli_epi32(chosen, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
inline __m128i narrow(__m256 a, const Float16*) { return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }

inline Vec<float> load(const float* p, AllLanes) { return Vec<float>(_mm256_loadu_ps(p)); }
inline Vec<float> load(const float* p, FirstLanes n) { return Vec<float>(_mm256_maskload_ps(p, first_lanes(n))); }
inline void store(float* p, Vec<float> a, AllLanes) { _mm256_storeu_ps(p, a.v); }
inline void store(float* p, Vec<float> a, FirstLanes n) { _mm256_maskstore_ps(p, first_lanes(n), a.v); }
inline void stream(float* p, Vec<float> a) { _mm256_stream_ps(p, a.v); }

template <class Half>
inline Vec<float> load(const Half* p, AllLanes) {
    return Vec<float>(widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), p));
}
template <class Half>
inline Vec<float> load(const Half* p, FirstLanes n) {
    alignas(16) Half buffer[8] = {};
    for (int i = 0; i < n.count; ++i) buffer[i] = p[i];
    return load(buffer, AllLanes{});
}
template <class Half>
inline void store(Half* p, Vec<float> a, AllLanes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a.v, p));
}
template <class Half>
inline void store(Half* p, Vec<float> a, FirstLanes n) {
    alignas(16) Half buffer[8];
    store(buffer, a, AllLanes{});
    for (int i = 0; i < n.count; ++i) p[i] = buffer[i];
}
template <class Half>
inline void stream(Half* p, Vec<float> a) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(a.v, p));
}

inline Vec<float> load(const int8_t* p, AllLanes) {
    return Vec<float>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
}

// One pair of neighbours in bfloat16 a lane.
struct Pairs {
    __m256i v;
};
inline Pairs load_pairs(const BFloat16* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline Vec<float> first_of(Pairs a) { return Vec<float>(_mm256_castsi256_ps(_mm256_slli_epi32(a.v, 16))); }
inline Vec<float> second_of(Pairs a) {
    return Vec<float>(_mm256_castsi256_ps(_mm256_and_si256(a.v, _mm256_set1_epi32(static_cast<int>(0xffff0000)))));
}

// Streaming stores are not ordered by the lock that ends a parallel region.
inline void stream_fence() { _mm_sfence(); }

inline Vec<float> operator+(Vec<float> a, Vec<float> b) { return Vec<float>(_mm256_add_ps(a.v, b.v)); }
inline Vec<float> operator-(Vec<float> a, Vec<float> b) { return Vec<float>(_mm256_sub_ps(a.v, b.v)); }
inline Vec<float> operator*(Vec<float> a, Vec<float> b) { return Vec<float>(_mm256_mul_ps(a.v, b.v)); }
inline Vec<float> operator/(Vec<float> a, Vec<float> b) { return Vec<float>(_mm256_div_ps(a.v, b.v)); }
// 1 / a for normal a with a normal inverse, within 3 units of 2^-24: 12 bits of the instruction, doubled by a Newton
// step; a third of a division's time.
inline Vec<float> reciprocal(Vec<float> a) {
    const __m256 r = _mm256_rcp_ps(a.v);
    return Vec<float>(_mm256_fmadd_ps(r, _mm256_fnmadd_ps(a.v, r, _mm256_set1_ps(1.0F)), r));
}
inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
    return Vec<float>(_mm256_fmadd_ps(a.v, b.v, c.v));
}
inline Vec<float> absolute(Vec<float> a) { return Vec<float>(_mm256_andnot_ps(_mm256_set1_ps(-0.0F), a.v)); }
inline Vec<float> square_root(Vec<float> a) { return Vec<float>(_mm256_sqrt_ps(a.v)); }
inline Vec<float> minimum(Vec<float> a, Vec<float> b) { return Vec<float>(_mm256_min_ps(a.v, b.v)); }
inline Vec<float> maximum(Vec<float> a, Vec<float> b) { return Vec<float>(_mm256_max_ps(a.v, b.v)); }
inline Vec<float> select_greater(Vec<float> a, Vec<float> b, Vec<float> yes, Vec<float> no) {
    return Vec<float>(_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)));
}
inline bool any_greater(Vec<float> a, Vec<float> b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)) != 0;
}
inline Vec<float> keep(Vec<float> a, AllLanes, float) { return a; }
inline Vec<float> keep(Vec<float> a, FirstLanes n, float rest) {
    return Vec<float>(_mm256_blendv_ps(_mm256_set1_ps(rest), a.v, _mm256_castsi256_ps(first_lanes(n))));
}
inline Vec<float> maximum_magnitude(Vec<float> a, Vec<float> b) {
    return Vec<float>(_mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a.v), _mm256_castps_si256(b.v))));
}
inline float sum(Vec<float> a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float largest(Vec<float> a) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline float largest_magnitude(Vec<float> a) {
    const __m256i bits = _mm256_castps_si256(a.v);
    const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1))));
}

// Lane j of row i becomes lane i of row j.
inline void transpose(Vec<float> (&rows)[8]) {
    __m256 t[8];
    __m256 u[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
        t[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
    }
    for (int i = 0; i < 8; i += 4) {
        for (int c = 0; c < 2; ++c) {
            u[i + 2 * c] = _mm256_shuffle_ps(t[i + c], t[i + c + 2], 0x44);
            u[i + 2 * c + 1] = _mm256_shuffle_ps(t[i + c], t[i + c + 2], 0xee);
        }
    }
    for (int c = 0; c < 4; ++c) {
        rows[c].v = _mm256_permute2f128_ps(u[c], u[4 + c], 0x20);
        rows[4 + c].v = _mm256_permute2f128_ps(u[c], u[4 + c], 0x31);
    }
}

// Hides where an address comes from: a loop over eight rows would otherwise have an address for each of them, more than
// there are registers.
inline const float* in_register(const float* address) {
    __asm__("" : "+r"(address));
    return address;
}

// Columns that load_turned takes of rows of float. Four of a row are half a register: what lies across the halves comes
// together as it is loaded, which leaves 2 shuffles for each column in place of 3.
template <>
inline constexpr int turned_columns<float, Vec<float>> = 4;
inline void load_turned(const float* rows, int64_t stride, Vec<float> (&columns)[4]) {
    rows = in_register(rows);
    const float* below = in_register(rows + 4 * stride);
    const auto both = [&](int64_t offset) {
        return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows + offset)), _mm_loadu_ps(below + offset),
                                    1);
    };
    const __m256 a = both(0);
    const __m256 b = both(stride);
    const __m256 c = both(2 * stride);
    const __m256 d = both(3 * stride);
    const __m256 ab_low = _mm256_unpacklo_ps(a, b);
    const __m256 cd_low = _mm256_unpacklo_ps(c, d);
    const __m256 ab_high = _mm256_unpackhi_ps(a, b);
    const __m256 cd_high = _mm256_unpackhi_ps(c, d);
    columns[0].v = _mm256_shuffle_ps(ab_low, cd_low, 0x44);
    columns[1].v = _mm256_shuffle_ps(ab_low, cd_low, 0xee);
    columns[2].v = _mm256_shuffle_ps(ab_high, cd_high, 0x44);
    columns[3].v = _mm256_shuffle_ps(ab_high, cd_high, 0xee);
}

// Takes neighbours apart, (a, b) = u0 v0 u1 v1 ... into u and v, and puts them together again.
inline __m256 across_halves(__m256 a) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(a), 0xd8)); }
inline void deinterleave(Vec<float> a, Vec<float> b, Vec<float>& u, Vec<float>& v) {
    u = Vec<float>(across_halves(_mm256_shuffle_ps(a.v, b.v, 0x88)));
    v = Vec<float>(across_halves(_mm256_shuffle_ps(a.v, b.v, 0xdd)));
}
inline void interleave(Vec<float> u, Vec<float> v, Vec<float>& a, Vec<float>& b) {
    const __m256 low = _mm256_unpacklo_ps(u.v, v.v);
    const __m256 high = _mm256_unpackhi_ps(u.v, v.v);
    a = Vec<float>(_mm256_permute2f128_ps(low, high, 0x20));
    b = Vec<float>(_mm256_permute2f128_ps(low, high, 0x31));
}

inline Vec<float> round_to_integer(Vec<float> a) {
    return Vec<float>(_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline Vec<float> times_power_of_two(Vec<float> a, Vec<float> power) {
    const __m256i shift = _mm256_slli_epi32(_mm256_cvtps_epi32(power.v), 23);
    return Vec<float>(_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.v), shift)));
}
inline __m256i biased_exponent(Vec<float> a) {
    return _mm256_and_si256(_mm256_srli_epi32(_mm256_castps_si256(a.v), 23), _mm256_set1_epi32(0xff));
}
inline Vec<float> exponent(Vec<float> a) {
    return Vec<float>(_mm256_cvtepi32_ps(_mm256_sub_epi32(biased_exponent(a), _mm256_set1_epi32(127))));
}
inline Vec<float> mantissa(Vec<float> a) {
    const __m256i inverse = _mm256_slli_epi32(_mm256_sub_epi32(_mm256_set1_epi32(254), biased_exponent(a)), 23);
    return Vec<float>(_mm256_mul_ps(a.v, _mm256_castsi256_ps(inverse)));
}

}  // namespace
}  // namespace starflow::STARFLOW_ISA
