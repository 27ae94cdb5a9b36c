// The product of linear's CUDA kernel for every architecture from sm_80: cp.async, ldmatrix, and mma of 16-bit values
// with float32 sums, by the instructions of CuTe.
//
// A block has a tile of the result and walks along the depth in steps of 64, of which the next ones are on their way:
// W passes through shared memory once for each tile of rows, so tiles are as high as the rows, up to 128.
#pragma once
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <cute/numeric/numeric_types.hpp>

#include "cuda/enqueue.cuh"
#include "cuda/reduce.cuh"
#include "ops/linear/linear_copy.cuh"

namespace starflow::cuda {
namespace {

// 16 bytes: what cp.async copies, and a row of the 8 x 8 matrices that ldmatrix loads.
using Piece = cute::uint128_t;
constexpr int piece_values = sizeof(Piece) / sizeof(uint16_t);
constexpr int step_pieces = linear_depth / piece_values;
static_assert(piece_values == linear_row_multiple && step_pieces == 8);

// rows x columns of the result by row_warps x column_warps warps; `stages` steps of the depth in shared memory. A
// product of the tensor cores has 16 rows, 8 columns and 16 of the depth.
template <class Product_, int rows_, int columns_, int row_warps_, int column_warps, int stages_>
struct Tile {
    using Product = Product_;
    static constexpr int rows = rows_;
    static constexpr int columns = columns_;
    static constexpr int stages = stages_;
    static constexpr int row_warps = row_warps_;
    static constexpr int threads = row_warps * column_warps * warp_size;
    // Blocks that run on a multiprocessor; without this launch bound ptxas keeps to 128 registers and spills.
    static constexpr int blocks = threads == 128 ? 2 : 1;
    static constexpr int warp_rows = rows / row_warps;
    static constexpr int warp_columns = columns / column_warps;
    static_assert(warp_rows % 16 == 0 && warp_columns % 16 == 0);

    // The sums take the place of the operands, which are used by then.
    union Shared {
        CopyBlock<threads> copy;
        struct {
            Piece input[stages][rows][step_pieces];
            Piece weight[stages][columns][step_pieces];
        } operands;
        // Rows 8 banks apart: the fragments of a warp are pairs of columns in 8 rows.
        Staged<rows, columns, threads, 8> staged;
    };
};

// Where a piece of a row lies in shared memory: the same piece of 8 rows in turn covers all banks.
__device__ int swizzled(int row, int piece) { return piece ^ (row % step_pieces); }

// `size` rows of a step of a matrix (rows, depth), from `first_row` and `begin`, into shared memory; zeros past its
// edges.
template <int size, int threads>
__device__ void load_step(const Matrix& matrix, int64_t rows, int64_t depth, int64_t first_row, int64_t begin,
                          Piece (&to)[size][step_pieces]) {
    static_assert(size * step_pieces % threads == 0);
    const int piece = static_cast<int>(threadIdx.x) % step_pieces;
    const int64_t column = begin + piece * piece_values;
    const auto* data = static_cast<const uint16_t*>(matrix.data);
#pragma unroll
    for (int i = 0; i < size; i += threads / step_pieces) {
        const int row = i + static_cast<int>(threadIdx.x) / step_pieces;
        const bool inside = first_row + row < rows && column < depth;
        const uint16_t* from = data + (inside ? (first_row + row) * matrix.row_stride + column : 0);
        cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<Piece>::copy(*reinterpret_cast<const Piece*>(from),
                                                           to[row][swizzled(row, piece)], inside);
    }
}

// The sums of a warp: products of 16 x 8, of which each lane holds 2 x 2 values.
template <class Tile>
struct WarpSums {
    static constexpr int high = Tile::warp_rows / 16;
    static constexpr int wide = Tile::warp_columns / 8;
    float values[high][wide][4] = {};

    // One step of the depth from shared memory.
    __device__ void add_step(const Piece (&input)[Tile::rows][step_pieces],
                             const Piece (&weight)[Tile::columns][step_pieces], int first_row, int first_column) {
        const int lane = cuda::lane();
        // ldmatrix takes the address of a row from each lane: of four 8 x 8 matrices, lanes of the same lane / 8.
        const int input_row = first_row + lane % 16;
        const int weight_row = first_column + lane % 8 + lane / 16 * 8;
#pragma unroll
        for (int pair = 0; pair < step_pieces; pair += 2) {
            uint32_t a[high][4];
            uint32_t b[wide][2];
#pragma unroll
            for (int i = 0; i < high; ++i) {
                const int row = input_row + 16 * i;
                cute::SM75_U32x4_LDSM_N::copy(input[row][swizzled(row, pair + lane / 16)], a[i][0], a[i][1], a[i][2],
                                              a[i][3]);
            }
#pragma unroll
            for (int j = 0; j < wide; j += 2) {
                const int row = weight_row + 8 * j;
                cute::SM75_U32x4_LDSM_N::copy(weight[row][swizzled(row, pair + lane / 8 % 2)], b[j][0], b[j][1],
                                              b[j + 1][0], b[j + 1][1]);
            }
#pragma unroll
            for (int i = 0; i < high; ++i) {
#pragma unroll
                for (int j = 0; j < wide; ++j) {
                    float (&sum)[4] = values[i][j];
                    Tile::Product::fma(sum[0], sum[1], sum[2], sum[3], a[i][0], a[i][1], a[i][2], a[i][3], b[j][0],
                                       b[j][1], sum[0], sum[1], sum[2], sum[3]);
                }
            }
        }
    }

    __device__ void take(WarpSums& part) {
#pragma unroll
        for (int i = 0; i < high; ++i) {
#pragma unroll
            for (int j = 0; j < wide; ++j) {
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    values[i][j][k] += part.values[i][j][k];
                    part.values[i][j][k] = 0.0F;
                }
            }
        }
    }

    template <class Staged>
    __device__ void put(Staged& staged, int first_row, int first_column) const {
        const int lane = cuda::lane();
#pragma unroll
        for (int i = 0; i < high; ++i) {
#pragma unroll
            for (int j = 0; j < wide; ++j) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float& place =
                        staged.at(first_row + 16 * i + 8 * half + lane / 4, first_column + 8 * j + lane % 4 * 2);
                    *reinterpret_cast<float2*>(&place) =
                        make_float2(values[i][j][2 * half], values[i][j][2 * half + 1]);
                }
            }
        }
    }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks) multiply(LinearCudaArgs args) {
    STARFLOW_SHARED_MEMORY(memory);
    auto& shared = *reinterpret_cast<typename Tile::Shared*>(memory);
    auto& operands = shared.operands;
    const LinearSchedule& schedule = args.schedule;
    const uint32_t copying = copying_blocks<Tile::threads>(args);
    await_earlier_launches();
    if (blockIdx.x < copying) return shared.copy.copy(args, blockIdx.x);
    const LinearBlock block = LinearBlock::at(schedule, blockIdx.x - copying);
    if (copying > 0) {
        if (threadIdx.x == 0) wait_for_copy(args, block.row_tile);
        __syncthreads();
    }
    const int64_t columns = args.call.weights.columns;
    const Matrix weight{const_cast<void*>(args.call.weights.data), args.depth, args.input.dtype};
    const int64_t first_row = int64_t{block.row_tile} * Tile::rows;
    const int64_t first_column = int64_t{block.column_tile} * Tile::columns;
    const int warp = static_cast<int>(threadIdx.x) / warp_size;
    const int warp_row = warp % Tile::row_warps * Tile::warp_rows;
    const int warp_column = warp / Tile::row_warps * Tile::warp_columns;

    int32_t part = block.part;
    const int32_t last_part = schedule.split ? part + 1 : schedule.parts;
    const int32_t begin = schedule.part_begin(part);
    const int32_t steps = schedule.part_begin(last_part) - begin;
    int32_t part_end = schedule.part_begin(part + 1) - begin;

    const auto load = [&](int step, int stage) {
        if (step < steps) {
            const int64_t from = (begin + step) * linear_depth;
            load_step<Tile::rows, Tile::threads>(args.input, args.call.rows, args.depth, first_row, from,
                                                 operands.input[stage]);
            load_step<Tile::columns, Tile::threads>(weight, columns, args.depth, first_column, from,
                                                    operands.weight[stage]);
        }
        // An empty group is committed too, so that the number of groups says which step has come.
        cute::cp_async_fence();
    };
#pragma unroll
    for (int stage = 0; stage < Tile::stages - 1; ++stage) load(stage, stage);

    WarpSums<Tile> sums;
    WarpSums<Tile> part_sums;
    int stage = 0;
    for (int step = 0; step < steps; ++step) {
        cute::cp_async_wait<Tile::stages - 2>();
        // All threads see this step, and all are done with the one before, whose stage is loaded next.
        __syncthreads();
        load(step + Tile::stages - 1, stage == 0 ? Tile::stages - 1 : stage - 1);
        part_sums.add_step(operands.input[stage], operands.weight[stage], warp_row, warp_column);
        stage = stage + 1 == Tile::stages ? 0 : stage + 1;
        if (step + 1 == part_end) {
            sums.take(part_sums);
            ++part;
            part_end = schedule.part_begin(part + 1) - begin;
        }
    }

    // No thread reads the operands after this barrier.
    __syncthreads();
    sums.put(shared.staged, warp_row, warp_column);
    finish_tile(args, block, shared.staged, static_cast<int>(threadIdx.x), [] { __syncthreads(); });
}

template <class Tile>
int multiply_tiles(const LinearCudaArgs& args, void* stream) {
    return enqueue_early(args.early, multiply<Tile>, linear_grid<Tile::threads>(args), dim3(Tile::threads),
                         sizeof(typename Tile::Shared), stream, args);
}

}  // namespace
}  // namespace starflow::cuda
