// The products of tensor cores in the layouts that the PTX ISA gives to fragments.
#pragma once
#include <bit>
#include <cstdint>

#include <cuda_fp16.h>

#include "runtime.h"

namespace emulation {

// What one lane brings to mma.sync: a 16 x depth, b depth x 8, sum 16 x 8.
struct Fragments {
    Format format;
    int depth;
    float* sum;
    const uint32_t* a;
    const uint32_t* b;
};

inline float half_of(uint32_t word, int half, Format format) {
    const auto bits = static_cast<uint16_t>(word >> (16 * half));
    if (format == Format::bfloat16) return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
    return __half2float(__half(__half_raw{bits}));
}

// Products and sums in float64, rounded once: closer to the hardware's wide sums than a chain of float32.
inline void multiply_fragments(Fragments** lanes) {
    const Format format = lanes[0]->format;
    const int depth = lanes[0]->depth;
    float a[16][16];
    float b[16][8];
    for (int l = 0; l < 32; ++l) {
        const int group = l / 4;
        const int in_group = l % 4;
        if (format == Format::tf32) {
            // Of the 32 bits the lowest 13 do not count.
            for (int i = 0; i < depth / 2; ++i) {
                a[group + 8 * (i % 2)][in_group + 4 * (i / 2)] = std::bit_cast<float>(lanes[l]->a[i] & 0xffffe000U);
            }
            for (int i = 0; i < depth / 4; ++i) {
                b[in_group + 4 * i][group] = std::bit_cast<float>(lanes[l]->b[i] & 0xffffe000U);
            }
            continue;
        }
        for (int i = 0; i < depth / 2; ++i) {
            a[group + 8 * (i / 2 % 2)][2 * in_group + i % 2 + 8 * (i / 4)] = half_of(lanes[l]->a[i / 2], i % 2, format);
        }
        for (int i = 0; i < depth / 4; ++i) {
            b[2 * in_group + i % 2 + 8 * (i / 2)][group] = half_of(lanes[l]->b[i / 2], i % 2, format);
        }
    }
    for (int l = 0; l < 32; ++l) {
        for (int i = 0; i < 4; ++i) {
            double sum = lanes[l]->sum[i];
            for (int k = 0; k < depth; ++k) sum += double(a[l / 4 + 8 * (i / 2)][k]) * b[k][2 * (l % 4) + i % 2];
            lanes[l]->sum[i] = static_cast<float>(sum);
        }
    }
}

}  // namespace emulation
