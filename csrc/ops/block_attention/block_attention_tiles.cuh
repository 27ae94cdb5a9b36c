// What the CUDA kernels of block_attention and of its gradient share: tiles in shared memory, how they are filled, and
// products of blocks of 16 x 16 x 16 by tensor cores. The threads of a warp hold sums as m16n8k16 has them: thread
// 4 g + q has columns 2 q and 2 q + 1 of rows g and g + 8 of each 16 x 8.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/mma_sm80.hpp>

#include "cuda/enqueue.cuh"
#include "cuda/packed.cuh"
#include "cuda/power_of_two.cuh"
#include "cuda/reduce.cuh"
#include "ops/block_attention/block_attention_schedule.h"

namespace starflow::cuda {

inline constexpr float log2_of_e = 1.44269504F;

__device__ inline int warp() { return static_cast<int>(threadIdx.x) / warp_size; }

// The compiler moves no load from behind this call to before it: the results would wait in registers that sums need.
__device__ inline void hold_loads() { __syncwarp(); }

// The compiler computes nothing from the result before it comes here: it would wait in a register that sums need.
__device__ inline int compute_here(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

__device__ inline float compute_here(float value) { return __int_as_float(compute_here(__float_as_int(value))); }

// What all threads of a quad, which have the columns of the same rows, hold together.
__device__ inline float quad_sum(float value) {
    value += __shfl_xor_sync(whole_warp, value, 1);
    return value + __shfl_xor_sync(whole_warp, value, 2);
}
__device__ inline float quad_largest(float value) {
    value = fmaxf(value, __shfl_xor_sync(whole_warp, value, 1));
    return fmaxf(value, __shfl_xor_sync(whole_warp, value, 2));
}

// (rows, width) in shared memory. A row of 16-bit elements is 8, 16 or 32 chunks of 16 bytes, whose number is xored
// with the row's: 8 rows of one chunk, which ldmatrix reads, and 8 chunks of one row, which copies write, meet all 32
// banks once. Rows of float32, which are read word by word, start 4 banks after one another, with the same effect.
template <class Element_, int width_>
struct Tile {
    using Element = Element_;
    static constexpr int width = width_;
    static constexpr int chunk = 16 / static_cast<int>(sizeof(Element));
    static constexpr int stride = sizeof(Element) == 4 ? width + 4 : width;

    Element* data;

    STARFLOW_HOST_DEVICE static constexpr int bytes(int rows) {
        return rows * stride * static_cast<int>(sizeof(Element));
    }
    __device__ Element* at(int row, int column) const {
        return data + row * stride + (sizeof(Element) == 4 ? column : column ^ row % 8 * chunk);
    }
    // The same address as at(row + row_block, column + column_block), where the blocks are multiples of 16 that the
    // compiler knows and column < 16: one operation of integers for each column, none for a row.
    __device__ Element* at(int row, int row_block, int column, int column_block) const {
        constexpr auto size = static_cast<int>(sizeof(Element));
        const int bytes = static_cast<int>(reinterpret_cast<char*>(at(row, column)) - reinterpret_cast<char*>(data));
        const int moved = size == 4 ? bytes + column_block * size : bytes ^ column_block * size;
        return reinterpret_cast<Element*>(reinterpret_cast<char*>(data) + moved + row_block * stride * size);
    }
};

// Begin to fill rows [0, rows) of a tile by all threads: with source(row), a row of head_dim elements of `memory` or
// null, and zeros elsewhere. `wide`: rows start at multiples of 16 bytes and are whole chunks; without it elements are
// copied one by one, which any head_dim and stride may have.
template <int rows, int threads, class Tile, class Source>
__device__ void fetch(Tile tile, const void* memory, int head_dim, bool wide, const Source& source) {
    using Element = typename Tile::Element;
    constexpr int chunks = Tile::width / Tile::chunk;
    constexpr int rows_at_once = threads / chunks;
    static_assert(threads % chunks == 0 && rows % rows_at_once == 0);
    const int column = static_cast<int>(threadIdx.x) % chunks * Tile::chunk;
    // Not unrolled: addresses that are kept from tile to tile would take the registers of the sums.
#pragma unroll 1
    for (int row = static_cast<int>(threadIdx.x) / chunks; row < rows; row += rows_at_once) {
        const Element* from = source(row);
        Element* to = tile.at(row, column);
        if (wide) {
            const bool some = from != nullptr && column < head_dim;
            cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>::copy(
                *static_cast<const cute::uint128_t*>(some ? from + column : memory),
                *reinterpret_cast<cute::uint128_t*>(to), some);
        } else {
#pragma unroll 1
            for (int c = 0; c < Tile::chunk; ++c) {
                to[c] = from != nullptr && column + c < head_dim ? from[column + c] : Element{};
            }
        }
    }
}

// Copy rows [first, first + rows) of a tile to target(row), a row of head_dim elements or null, by the lanes of a warp.
template <int rows, class Tile, class Target>
__device__ void flush(Tile tile, int first, int head_dim, bool wide, const Target& target) {
    using Element = typename Tile::Element;
    constexpr int chunks = Tile::width / Tile::chunk;
    constexpr int rows_at_once = chunks < warp_size ? warp_size / chunks : 1;
    static_assert(rows % rows_at_once == 0);
#pragma unroll 1
    for (int row = lane() / chunks; row < rows; row += rows_at_once) {
        Element* to = target(row);
        if (to == nullptr) continue;
#pragma unroll 1
        for (int column = lane() % chunks * Tile::chunk; column < head_dim; column += warp_size * Tile::chunk) {
            const Element* from = tile.at(first + row, column);
            if (wide) {
                using Chunk = Packed<Element, Tile::chunk>;
                *reinterpret_cast<Chunk*>(to + column) = *reinterpret_cast<const Chunk*>(from);
            } else {
#pragma unroll 1
                for (int c = 0; c < Tile::chunk; ++c) {
                    if (column + c < head_dim) to[column + c] = from[c];
                }
            }
        }
    }
}

// Whether every row of these starts at a multiple of 16 bytes and is whole chunks of them.
template <class... Rows>
bool whole_chunks(const AttentionShape& shape, const Rows&... all) {
    const int64_t chunk = shape.data == Dtype::float32 ? 4 : 8;
    const auto fits = [&](const HeadRows& rows) {
        return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.batch_stride % chunk == 0 &&
               rows.head_stride % chunk == 0 && rows.row_stride % chunk == 0;
    };
    return shape.head_dim % chunk == 0 && (fits(all) && ...);
}

// Products of 16 rows by a depth of 16 by 16 columns.
// left(tile, row, block, depth): 16 rows of a tile from row + block on, channels [depth, depth + 16).
// right(tile, row, depth): the same of [row, row + 16) as columns of the product.
// right_by_rows(tile, row, column): rows of the tile are the depth.
// All but the first row are known to the compiler, and multiples of 16.
// left_from(a, b): two neighbouring sums (16, 8), rounded.
// add(a, b, left, right): into two such sums.
template <class Element>
struct Products;

// An operand (16, 16) as m16n8k16 takes it, or two of (16, 8).
struct HalfOperand {
    uint32_t words[4];
};

template <class Half, class Instruction, uint32_t (*round)(float, float)>
struct HalfProducts {
    using Operand = HalfOperand;

    template <class Tile>
    __device__ static Operand left(Tile tile, int row, int block, int depth) {
        return load<cute::SM75_U32x4_LDSM_N>(tile.at(row + lane() % 16, block, lane() / 16 * 8, depth));
    }
    template <class Tile>
    __device__ static Operand right(Tile tile, int row, int depth) {
        return load<cute::SM75_U32x4_LDSM_N>(tile.at(lane() / 16 * 8 + lane() % 8, row, lane() / 8 % 2 * 8, depth));
    }
    template <class Tile>
    __device__ static Operand right_by_rows(Tile tile, int row, int column) {
        return load<cute::SM75_U16x8_LDSM_T>(tile.at(lane() % 16, row, lane() / 16 * 8, column));
    }
    __device__ static Operand left_from(const float (&a)[4], const float (&b)[4]) {
        return {{round(a[0], a[1]), round(a[2], a[3]), round(b[0], b[1]), round(b[2], b[3])}};
    }
    __device__ static void add(float (&a)[4], float (&b)[4], const Operand& left, const Operand& right) {
        multiply(a, left, right.words[0], right.words[1]);
        multiply(b, left, right.words[2], right.words[3]);
    }

  private:
    template <class Load>
    __device__ static Operand load(const Half* row) {
        Operand operand;
        Load::copy(*reinterpret_cast<const cute::uint128_t*>(row), operand.words[0], operand.words[1], operand.words[2],
                   operand.words[3]);
        return operand;
    }
    __device__ static void multiply(float (&sums)[4], const Operand& left, uint32_t b0, uint32_t b1) {
        Instruction::fma(sums[0], sums[1], sums[2], sums[3], left.words[0], left.words[1], left.words[2], left.words[3],
                         b0, b1, sums[0], sums[1], sums[2], sums[3]);
    }
};

__device__ inline uint32_t round_bfloat16(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return __bfloat16_as_ushort(pair.x) | static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16;
}
__device__ inline uint32_t round_float16(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return __half_as_ushort(__low2half(pair)) | static_cast<uint32_t>(__half_as_ushort(__high2half(pair))) << 16;
}

template <>
struct Products<BFloat16> : HalfProducts<BFloat16, cute::SM80_16x8x16_F32BF16BF16F32_TN, round_bfloat16> {};
template <>
struct Products<Float16> : HalfProducts<Float16, cute::SM80_16x8x16_F32F16F16F32_TN, round_float16> {};

// float32 on tensor cores: x = high + low, both of the 11 bits of tf32, and x y = high high + high low + low high,
// which leaves out 2^-22 of it. Tensor cores do not round their sums but cut them: what they have added up over a depth
// of 16 is added to the sums by float32 arithmetic. The order of the depth is free, if it is the same on both sides:
// the sums of a thread are left operands as they are when k = q stands for column 2 q and k = q + 4 for 2 q + 1.
template <>
struct Products<float> {
    struct Operand {
        uint32_t high[8];  // a depth of 8, or 8 columns, at a time
        uint32_t low[8];

        __device__ void set(int i, float value) {
            const uint32_t rounded = round_tf32(value);
            high[i] = rounded;
            low[i] = round_tf32(value - __uint_as_float(rounded));
        }
    };

    template <class Tile>
    __device__ static Operand left(Tile tile, int row, int block, int depth) {
        Operand operand;
#pragma unroll
        for (int s = 0; s < 2; ++s) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                operand.set(4 * s + i, *(tile.at(row + lane() / 4, block, lane() % 4, depth) +
                                         (i % 2 * Tile::stride + s) * 8 + i / 2 * 4));
            }
        }
        return operand;
    }
    template <class Tile>
    __device__ static Operand right(Tile tile, int row, int depth) {
        return fill_right([&](int n, int s, int i) {
            return *(tile.at(lane() / 4, row, lane() % 4, depth) + (n * Tile::stride + s) * 8 + i * 4);
        });
    }
    template <class Tile>
    __device__ static Operand right_by_rows(Tile tile, int row, int column) {
        return fill_right([&](int n, int s, int i) {
            return *(tile.at(lane() % 4 * 2, row, lane() / 4, column) + (8 * s + i) * Tile::stride + 8 * n);
        });
    }
    __device__ static Operand left_from(const float (&a)[4], const float (&b)[4]) {
        Operand operand;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int from = i % 2 * 2 + i / 2;
            operand.set(i, a[from]);
            operand.set(4 + i, b[from]);
        }
        return operand;
    }
    __device__ static void add(float (&a)[4], float (&b)[4], const Operand& left, const Operand& right) {
        add_columns(a, left, right, 0);
        add_columns(b, left, right, 4);
    }

  private:
    // To the nearest of 11 bits; a tie away from zero.
    __device__ static uint32_t round_tf32(float value) { return (__float_as_uint(value) + 0x1000U) & ~0x1fffU; }

    // value(columns' half n, depth's half s, i)
    template <class Value>
    __device__ static Operand fill_right(const Value& value) {
        Operand operand;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int s = 0; s < 2; ++s) {
#pragma unroll
                for (int i = 0; i < 2; ++i) operand.set(4 * n + 2 * s + i, value(n, s, i));
            }
        }
        return operand;
    }
    __device__ static void add_columns(float (&sums)[4], const Operand& left, const Operand& right, int columns) {
        float part[4] = {};
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            multiply(part, left.low + 4 * s, right.high + columns + 2 * s);
            multiply(part, left.high + 4 * s, right.low + columns + 2 * s);
        }
#pragma unroll
        for (int s = 0; s < 2; ++s) multiply(part, left.high + 4 * s, right.high + columns + 2 * s);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] += part[i];
    }
    __device__ static void multiply(float (&sums)[4], const uint32_t* left, const uint32_t* right) {
        cute::SM80_16x8x8_F32TF32TF32F32_TN::fma(sums[0], sums[1], sums[2], sums[3], left[0], left[1], left[2], left[3],
                                                 right[0], right[1], sums[0], sums[1], sums[2], sums[3]);
    }
};

// Write a thread's sums of a row, times a factor, to a row of float32.
template <int blocks>
__device__ void write_sums(float* to, int head_dim, const float (&sums)[blocks][4], int half, float factor) {
#pragma unroll
    for (int n = 0; n < blocks; ++n) {
        const int column = 8 * n + lane() % 4 * 2;
        if (column < head_dim) to[column] = sums[n][2 * half] * factor;
        if (column + 1 < head_dim) to[column + 1] = sums[n][2 * half + 1] * factor;
    }
}

// Write them to a row of a tile of 16 bits, from a channel on.
template <class Tile, int blocks>
__device__ void write_sums(Tile tile, int row, const float (&sums)[blocks][4], int half, float factor,
                           int first_channel = 0) {
    using Pair = Packed<typename Tile::Element, 2>;
#pragma unroll
    for (int n = 0; n < blocks; ++n) {
        Pair pair;
        narrow(sums[n][2 * half] * factor, pair.values[0]);
        narrow(sums[n][2 * half + 1] * factor, pair.values[1]);
        *reinterpret_cast<Pair*>(tile.at(row, first_channel + 8 * n + lane() % 4 * 2)) = pair;
    }
}

// What each query of a tile sees, in shared memory: an array for each number, so that neighbours do not share banks.
template <int count>
struct VisibleInTile {
    int prefix[count];
    int first[count];
    int last[count];

    __device__ void set(int i, const VisibleKeysOf<int>& seen) {
        prefix[i] = seen.prefix;
        first[i] = seen.first;
        last[i] = seen.last;
    }
    __device__ VisibleKeysOf<int> get(int i) const { return {prefix[i], first[i], last[i]}; }
};

}  // namespace starflow::cuda
