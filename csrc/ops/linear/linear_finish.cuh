// From the sums of a tile to the result, for every CUDA kernel of linear: parts of the depth added, epilogue, store.
#pragma once
#include <cuda_runtime.h>

#include "cuda/packed.cuh"
#include "cuda/reduce.cuh"
#include "ops/linear/linear.h"
#include "ops/rope_append/rope_append_planes.cuh"

namespace starflow::cuda {

// `width` neighbours of a row, of a type that is known at run time only: the same for all threads.
template <int width>
__device__ void load_row(const Matrix& matrix, int64_t row, int64_t column, float (&out)[width]) {
    const int64_t offset = row * matrix.row_stride + column;
    switch (matrix.dtype) {
        case Dtype::bfloat16:
            return load<width>(static_cast<const BFloat16*>(matrix.data) + offset, out);
        case Dtype::float16:
            return load<width>(static_cast<const Float16*>(matrix.data) + offset, out);
        default:
            return load<width>(static_cast<const float*>(matrix.data) + offset, out);
    }
}

template <int width>
__device__ void store_row(const Matrix& matrix, int64_t row, int64_t column, const float (&values)[width]) {
    const int64_t offset = row * matrix.row_stride + column;
    switch (matrix.dtype) {
        case Dtype::bfloat16:
            return store<width>(static_cast<BFloat16*>(matrix.data) + offset, values);
        case Dtype::float16:
            return store<width>(static_cast<Float16*>(matrix.data) + offset, values);
        default:
            return store<width>(static_cast<float*>(matrix.data) + offset, values);
    }
}

__device__ inline float activated(Epilogue epilogue, float x) {
    switch (epilogue) {
        case Epilogue::gelu:
            return 0.5F * x * (1.0F + erff(x * 0.70710678F));  // sqrt(1 / 2)
        case Epilogue::gelu_tanh:
            return 0.5F * x * (1.0F + tanhf(0.79788456F * (x + 0.044715F * x * x * x)));  // sqrt(2 / pi)
        case Epilogue::silu:
            return x / (1.0F + expf(-x));
        default:
            return x;
    }
}

// What is left to do for `width` sums of a row.
template <int width>
__device__ void finish(const LinearArgs& call, int64_t row, int64_t column, float (&sums)[width]) {
    float other[width];
    if (call.weights.bias != nullptr) {
        load<width>(call.weights.bias + column, other);
#pragma unroll
        for (int i = 0; i < width; ++i) sums[i] += other[i];
    }
    if (call.product.data != nullptr) store_row<width>(call.product, row, column, sums);
    if (call.epilogue != Epilogue::none) {
#pragma unroll
        for (int i = 0; i < width; ++i) sums[i] = activated(call.epilogue, sums[i]);
    }
    if (call.multiply.data != nullptr) {
        load_row<width>(call.multiply, row, column, other);
#pragma unroll
        for (int i = 0; i < width; ++i) sums[i] *= other[i];
    }
    if (call.residual.data != nullptr) {
        load_row<width>(call.residual, row, column, other);
#pragma unroll
        for (int i = 0; i < width; ++i) sums[i] += other[i];
    }
    store_row<width>(call.out, row, column, sums);
}

// Columns that a thread takes at a time: 16 bytes of float32.
inline constexpr int finish_width = 4;

// The sums of a tile in shared memory, rows `padding` values further apart than they are long: by the fragments that
// are stored here, so that they meet no bank twice.
template <int rows_, int columns_, int threads_, int padding>
struct Staged {
    static constexpr int rows = rows_;
    static constexpr int columns = columns_;
    static constexpr int threads = threads_;

    alignas(16) float sums[rows * (columns + padding)];
    int arrived;  // blocks of the same tile that came before

    __device__ float& at(int row, int column) { return sums[row * (columns + padding) + column]; }
    __device__ const float& at(int row, int column) const { return sums[row * (columns + padding) + column]; }
};

// Where a block works.
struct LinearBlock {
    int32_t column_tile;
    int32_t row_tile;
    int32_t part;  // 0 where one block does them all

    // The n-th in the order in which blocks begin: tiles first, parts behind.
    __device__ static LinearBlock at(const LinearSchedule& schedule, uint32_t n) {
        const auto tiles = static_cast<uint32_t>(schedule.tiles());
        const LinearTile tile = linear_tile(schedule, n % tiles);
        return {tile.column, tile.row, static_cast<int32_t>(n / tiles)};
    }
};

// The sums of `finish_width` columns of a row of a tile: those in shared memory, or of all parts in their order.
template <class Tile>
__device__ float4 sums_of(const LinearSchedule& schedule, const Tile& tile, const float* partials, int row,
                          int column) {
    if (!schedule.split) return *reinterpret_cast<const float4*>(&tile.at(row, column));
    float4 sums = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
#pragma unroll 4
    for (int32_t part = 0; part < schedule.parts; ++part) {
        const float4 more =
            *reinterpret_cast<const float4*>(partials + part * schedule.tile_size() + row * Tile::columns + column);
        sums.x += more.x;
        sums.y += more.y;
        sums.z += more.z;
        sums.w += more.w;
    }
    return sums;
}

// The columns of a tile as heads. Threads side by side hold a head of a row, each of them four planes.
template <class Tile>
__device__ void finish_heads(const LinearCudaArgs& args, const LinearBlock& block, const Tile& tile,
                             const float* partials, int thread) {
    constexpr int width = finish_width;
    constexpr int pieces_of_row = Tile::columns / (2 * width);
    // Every lane comes to the sums of each head.
    static_assert(Tile::rows * pieces_of_row % Tile::threads == 0 && Tile::threads % warp_size == 0);
    const RopeAppendArgs& heads = args.heads;
    const RopeAppendShape& shape = heads.shape;
    const HeadLayout layout(shape.head_dim, false);
    const int lanes = layout.planes / width;
    for (int piece = thread; piece < Tile::rows * pieces_of_row; piece += Tile::threads) {
        const int in_tile = piece / pieces_of_row;
        const int p = piece % lanes * width;
        const int first = piece % pieces_of_row / lanes * layout.head_dim;
        const int64_t row = int64_t{block.row_tile} * Tile::rows + in_tile;
        const int64_t column = int64_t{block.column_tile} * Tile::columns + first;
        const bool here = row < args.call.rows && column < args.call.weights.columns;
        Planes<float, width> x = {};
        if (here) {
            const float4 u = sums_of(args.schedule, tile, partials, in_tile, first + layout.u(p));
            const float4 v = sums_of(args.schedule, tile, partials, in_tile, first + layout.v(p));
            x = {{u.x, u.y, u.z, u.w}, {v.x, v.y, v.z, v.w}};
            if (const float* bias = args.call.weights.bias; bias != nullptr) {
                Planes<float, width> more;
                load_planes<width>(bias + column, layout, p, more);
#pragma unroll
                for (int i = 0; i < width; ++i) {
                    x.u[i] += more.u[i];
                    x.v[i] += more.v[i];
                }
            }
        }
        float squares = 0.0F;
#pragma unroll
        for (int i = 0; i < width; ++i) squares += x.u[i] * x.u[i] + x.v[i] * x.v[i];
        squares = group_sum(squares, lanes);
        if (!here) continue;
        // In 32 bits, and roots and quotients below by fast intrinsics, off by 2 units in the last place: other
        // divisions and roots call functions, for which ptxas may serialise products of wgmma.
        const int head = static_cast<int>(column) / layout.head_dim;
        const auto tokens = static_cast<uint32_t>(shape.tokens);
        const int64_t b = static_cast<uint32_t>(row) / tokens;
        const int64_t t = static_cast<uint32_t>(row) % tokens;
        const bool is_query = head < shape.heads;
        const bool is_value = head >= shape.heads + shape.kv_heads;
        const int64_t slot = (heads.starts == nullptr ? heads.start : heads.starts[b]) + t;
        if (!is_query && heads.final != nullptr && slot < heads.final[b]) continue;
        const HeadTurn<float> turn(heads.query, heads.key, is_query, is_value, b, t);
        if (turn.weight != nullptr) {
            const float mean = __fdividef(squares, static_cast<float>(layout.head_dim));
            const float inverse = rsqrtf(mean + static_cast<float>(head_epsilon));
            Planes<float, width> weight;
            load_planes<width>(turn.weight, layout, p, weight);
#pragma unroll
            for (int i = 0; i < width; ++i) {
                x.u[i] *= inverse * (1.0F + weight.u[i]);
                x.v[i] *= inverse * (1.0F + weight.v[i]);
            }
        }
        if (turn.cos != nullptr) rotate<width>(x, turn.cos, turn.sin, p, 1.0F);
        if (is_query) {
            store_kept<width>(heads.q, shape.kept, b, head, t, layout, p, x);
        } else if (is_value) {
            store_kept<width>(heads.v, shape.kept, b, head - shape.heads - shape.kv_heads, slot, layout, p, x);
        } else {
            store_kept<width>(heads.k, shape.kept, b, head - shape.heads, slot, layout, p, x);
        }
    }
}

// Called by the threads that hold sums, `thread` of Tile::threads, once the sums of a part, or of the depth, are in
// `tile`; sync() is a barrier of these threads, which this function calls before it reads the tile.
template <class Tile, class Sync>
__device__ void finish_tile(const LinearCudaArgs& args, const LinearBlock& block, Tile& tile, int thread,
                            const Sync& sync) {
    constexpr int vectors_of_row = Tile::columns / finish_width;
    constexpr int vectors = Tile::rows * vectors_of_row;
    const LinearArgs& call = args.call;
    const LinearSchedule& schedule = args.schedule;
    const int64_t first_row = int64_t{block.row_tile} * Tile::rows;
    const int64_t first_column = int64_t{block.column_tile} * Tile::columns;
    const int64_t number = int64_t{block.row_tile} * schedule.column_tiles + block.column_tile;
    auto* workspace = static_cast<unsigned char*>(args.workspace);
    float* partials =
        reinterpret_cast<float*>(workspace + args.layout.partials) + number * schedule.parts * schedule.tile_size();
    sync();
    if (schedule.split) {
        float* own = partials + block.part * schedule.tile_size();
        for (int v = thread; v < vectors; v += Tile::threads) {
            const int row = v / vectors_of_row;
            const int column = v % vectors_of_row * finish_width;
            if (first_row + row >= call.rows) break;
            *reinterpret_cast<float4*>(own + v * finish_width) =
                *reinterpret_cast<const float4*>(&tile.at(row, column));
        }
        sync();
        if (thread == 0) {
            // On the whole device: the sums of this block before its count, and the counts before the others' sums.
            __threadfence();
            tile.arrived = atomicAdd(args.counters + number, 1);
            __threadfence();
        }
        sync();
        if (tile.arrived != schedule.parts - 1) return;
    }
    if (args.into_heads) return finish_heads(args, block, tile, partials, thread);
    for (int v = thread; v < vectors; v += Tile::threads) {
        const int row = v / vectors_of_row;
        const int column = v % vectors_of_row * finish_width;
        if (first_row + row >= call.rows) break;
        if (first_column + column >= call.weights.columns) continue;
        const float4 sums = sums_of(schedule, tile, partials, row, column);
        float values[finish_width] = {sums.x, sums.y, sums.z, sums.w};
        if (args.wide_result) {
            finish<finish_width>(call, first_row + row, first_column + column, values);
            continue;
        }
#pragma unroll
        for (int i = 0; i < finish_width; ++i) {
            if (first_column + column + i >= call.weights.columns) break;
            float value[1] = {values[i]};
            finish<1>(call, first_row + row, first_column + column + i, value);
        }
    }
}

}  // namespace starflow::cuda
