// Sixteen floats: AVX-512 F, BW, VL, DQ. Included by vec.h alone.
#pragma once
#include <immintrin.h>

#include "cpu/vec.h"

namespace starflow::STARFLOW_ISA {
namespace {

template <>
struct Vec<float> {
    static constexpr int lanes = 16;
    __m512 v;
    Vec() = default;
    explicit Vec(__m512 value) : v(value) {}
    explicit Vec(float value) : v(_mm512_set1_ps(value)) {}
};

inline __mmask16 first_lanes(FirstLanes n) { return static_cast<__mmask16>((1U << n.count) - 1); }

inline __m512 widen(__m256i bits, const BFloat16*) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline __m512 widen(__m256i bits, const Float16*) { return _mm512_cvtph_ps(bits); }

#if defined(__AVX512BF16__)
// Subnormals become zero.
inline __m256i narrow(__m512 a, const BFloat16*) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a)); }
#else
inline __m256i narrow(__m512 a, const BFloat16*) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    const __m512i chosen = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16));
}
#endif
inline __m256i narrow(__m512 a, const Float16*) { return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }

inline Vec<float> load(const float* p, AllLanes) { return Vec<float>(_mm512_loadu_ps(p)); }
inline Vec<float> load(const float* p, FirstLanes n) { return Vec<float>(_mm512_maskz_loadu_ps(first_lanes(n), p)); }
inline void store(float* p, Vec<float> a, AllLanes) { _mm512_storeu_ps(p, a.v); }
inline void store(float* p, Vec<float> a, FirstLanes n) { _mm512_mask_storeu_ps(p, first_lanes(n), a.v); }
inline void stream(float* p, Vec<float> a) { _mm512_stream_ps(p, a.v); }

template <class Half>
inline Vec<float> load(const Half* p, AllLanes) {
    return Vec<float>(widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), p));
}
template <class Half>
inline Vec<float> load(const Half* p, FirstLanes n) {
    return Vec<float>(widen(_mm256_maskz_loadu_epi16(first_lanes(n), p), p));
}
template <class Half>
inline void store(Half* p, Vec<float> a, AllLanes) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a.v, p));
}
template <class Half>
inline void store(Half* p, Vec<float> a, FirstLanes n) {
    _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(a.v, p));
}
template <class Half>
inline void stream(Half* p, Vec<float> a) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(a.v, p));
}

inline Vec<float> load(const int8_t* p, AllLanes) {
    return Vec<float>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
}

// One pair of neighbours in bfloat16 a lane.
struct Pairs {
    __m512i v;
};
inline Pairs load_pairs(const BFloat16* p) { return {_mm512_loadu_si512(p)}; }
// The first `count` values of 32, then zeros.
inline Pairs load_pairs(const BFloat16* p, int count) {
    return {_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), p)};
}
// The first `count` values, each into its pair: as the first of it or the second. The other is not written: a store of
// whole pairs could undo what another thread puts there.
inline void store_into_pairs(BFloat16* pairs, int second, Vec<float> a, int count) {
    const __m512i wide = _mm512_cvtepu16_epi32(narrow(a.v, pairs));
    const __m512i placed = second != 0 ? _mm512_slli_epi32(wide, 16) : wide;
    const auto first = static_cast<__mmask32>(0x55555555U & ((uint64_t{1} << (2 * count)) - 1));
    _mm512_mask_storeu_epi16(pairs, second != 0 ? first << 1U : first, placed);
}
inline Vec<float> as_floats(Pairs a) { return Vec<float>(_mm512_castsi512_ps(a.v)); }
inline void store_pairs(BFloat16* p, Pairs a) { _mm512_storeu_si512(p, a.v); }
// Two rows of 32 values as pairs of one value of each: those of the first 16, those of the last.
inline void interleave(Pairs a, Pairs b, Pairs& first, Pairs& last) {
    const __m512i low = _mm512_unpacklo_epi16(a.v, b.v);
    const __m512i high = _mm512_unpackhi_epi16(a.v, b.v);
    const __m512i from_low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i from_high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    first = {_mm512_permutex2var_epi64(low, from_low, high)};
    last = {_mm512_permutex2var_epi64(low, from_high, high)};
}
inline Pairs broadcast_pair(const BFloat16* p) {
    int32_t bits;
    __builtin_memcpy(&bits, p, sizeof(bits));
    return {_mm512_set1_epi32(bits)};
}
inline Vec<float> first_of(Pairs a) { return Vec<float>(_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))); }
inline Vec<float> second_of(Pairs a) {
    return Vec<float>(_mm512_castsi512_ps(_mm512_and_si512(a.v, _mm512_set1_epi32(static_cast<int>(0xffff0000)))));
}
#if defined(__AVX512BF16__)
// sum + a[0] * b[0] + a[1] * b[1] in each lane. Subnormals count as zero.
inline Vec<float> multiply_add_pairs(Pairs a, Pairs b, Vec<float> sum) {
    return Vec<float>(_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v)));
}
#endif

// Streaming stores are not ordered by the lock that ends a parallel region.
inline void stream_fence() { _mm_sfence(); }

inline Vec<float> operator+(Vec<float> a, Vec<float> b) { return Vec<float>(_mm512_add_ps(a.v, b.v)); }
inline Vec<float> operator-(Vec<float> a, Vec<float> b) { return Vec<float>(_mm512_sub_ps(a.v, b.v)); }
inline Vec<float> operator*(Vec<float> a, Vec<float> b) { return Vec<float>(_mm512_mul_ps(a.v, b.v)); }
inline Vec<float> operator/(Vec<float> a, Vec<float> b) { return Vec<float>(_mm512_div_ps(a.v, b.v)); }
// 1 / a for normal a with a normal inverse, within 2 units of 2^-24: 14 bits of the instruction, doubled by a Newton
// step; a third of a division's time.
inline Vec<float> reciprocal(Vec<float> a) {
    const __m512 r = _mm512_rcp14_ps(a.v);
    return Vec<float>(_mm512_fmadd_ps(r, _mm512_fnmadd_ps(a.v, r, _mm512_set1_ps(1.0F)), r));
}
inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
    return Vec<float>(_mm512_fmadd_ps(a.v, b.v, c.v));
}
inline Vec<float> absolute(Vec<float> a) { return Vec<float>(_mm512_abs_ps(a.v)); }
inline Vec<float> square_root(Vec<float> a) { return Vec<float>(_mm512_sqrt_ps(a.v)); }
inline Vec<float> minimum(Vec<float> a, Vec<float> b) { return Vec<float>(_mm512_min_ps(a.v, b.v)); }
inline Vec<float> maximum(Vec<float> a, Vec<float> b) { return Vec<float>(_mm512_max_ps(a.v, b.v)); }
inline Vec<float> select_greater(Vec<float> a, Vec<float> b, Vec<float> yes, Vec<float> no) {
    return Vec<float>(_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), no.v, yes.v));
}
inline bool any_greater(Vec<float> a, Vec<float> b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ) != 0; }
inline Vec<float> keep(Vec<float> a, AllLanes, float) { return a; }
inline Vec<float> keep(Vec<float> a, FirstLanes n, float rest) {
    return Vec<float>(_mm512_mask_blend_ps(first_lanes(n), _mm512_set1_ps(rest), a.v));
}
inline Vec<float> maximum_magnitude(Vec<float> a, Vec<float> b) {
    return Vec<float>(_mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v))));
}
inline float sum(Vec<float> a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(Vec<float> a) { return _mm512_reduce_max_ps(a.v); }
inline float largest_magnitude(Vec<float> a) {
    return bits_as<float>(_mm512_reduce_max_epi32(_mm512_castps_si512(a.v)));
}

// Lane j of row i becomes lane i of row j: 64 shuffles, each in one of four stages that double what lies together.
inline void transpose(Vec<float> (&rows)[16]) {
    __m512 t[16];
    __m512 u[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
        t[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
    }
    const auto pairs = [](__m512 a, __m512 b, bool high) {
        const __m512d x = _mm512_castps_pd(a);
        const __m512d y = _mm512_castps_pd(b);
        return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y));
    };
    for (int i = 0; i < 16; i += 4) {
        for (int c = 0; c < 4; ++c) u[i + c] = pairs(t[i + c / 2], t[i + c / 2 + 2], c % 2 != 0);
    }
    // u[4 g + c] holds column 4 l + c of rows 4 g to 4 g + 3 in its quarter l.
    for (int c = 0; c < 4; ++c) {
        const __m512 even_top = _mm512_shuffle_f32x4(u[c], u[4 + c], 0x88);
        const __m512 odd_top = _mm512_shuffle_f32x4(u[c], u[4 + c], 0xdd);
        const __m512 even_bottom = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0x88);
        const __m512 odd_bottom = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0xdd);
        rows[c].v = _mm512_shuffle_f32x4(even_top, even_bottom, 0x88);
        rows[4 + c].v = _mm512_shuffle_f32x4(odd_top, odd_bottom, 0x88);
        rows[8 + c].v = _mm512_shuffle_f32x4(even_top, even_bottom, 0xdd);
        rows[12 + c].v = _mm512_shuffle_f32x4(odd_top, odd_bottom, 0xdd);
    }
}

// Takes neighbours apart, (a, b) = u0 v0 u1 v1 ... into u and v, and puts them together again.
inline void deinterleave(Vec<float> a, Vec<float> b, Vec<float>& u, Vec<float>& v) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    u = Vec<float>(_mm512_permutex2var_ps(a.v, even, b.v));
    v = Vec<float>(_mm512_permutex2var_ps(a.v, _mm512_or_si512(even, _mm512_set1_epi32(1)), b.v));
}
inline void interleave(Vec<float> u, Vec<float> v, Vec<float>& a, Vec<float>& b) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    a = Vec<float>(_mm512_permutex2var_ps(u.v, first, v.v));
    b = Vec<float>(_mm512_permutex2var_ps(u.v, _mm512_or_si512(first, _mm512_set1_epi32(8)), v.v));
}

inline Vec<float> round_to_integer(Vec<float> a) {
    return Vec<float>(_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline Vec<float> times_power_of_two(Vec<float> a, Vec<float> power) {
    return Vec<float>(_mm512_scalef_ps(a.v, power.v));
}
inline Vec<float> exponent(Vec<float> a) { return Vec<float>(_mm512_getexp_ps(a.v)); }
inline Vec<float> mantissa(Vec<float> a) {
    return Vec<float>(_mm512_getmant_ps(a.v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src));
}

}  // namespace
}  // namespace starflow::STARFLOW_ISA
