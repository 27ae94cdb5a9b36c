// What the kernels of sm_90a, the forward pass's and the gradient's, share: tiles as TMA brings them and wgmma takes
// them, and stages that tiles take in turn.
#pragma once
#include <cutlass/arch/barrier.h>

#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "cuda/named_barrier.cuh"
#include "cuda/tensor_map.cuh"
#include "ops/block_attention/block_attention_tiles.cuh"

namespace starflow::cuda {

using Empty = cutlass::arch::ClusterBarrier;
using Full = cutlass::arch::ClusterTransactionBarrier;

// CuTe's name of a type of 16 bits.
template <class Element>
using ValueOf = cute::conditional_t<cute::is_same_v<Element, BFloat16>, cute::bfloat16_t, cute::half_t>;

// (rows, width) in shared memory as TMA brings boxes and wgmma takes operands: 64 channels of all rows, then the next
// 64; rows of 128 bytes, whose chunks of 16 bytes are xored with the row's number. The interface of Tile.
template <class Element_, int rows, int width_>
struct Boxes {
    using Element = Element_;
    static constexpr int width = width_;
    static constexpr int chunk = 16 / static_cast<int>(sizeof(Element));

    Element* data;

    __device__ Element* at(int row, int column) const {
        return data + (column / box_channels * rows + row) * box_channels + (column % box_channels ^ row % 8 * chunk);
    }
    // The same address as at(row + row_block, column + column_block), where the blocks are multiples of a chunk that
    // the compiler knows and column < chunk; `line` is row % 8 * chunk. Two operations of integers for each column,
    // none for a row.
    __device__ Element* at(int row, int line, int row_block, int column, int column_block) const {
        return data + (column_block / box_channels * rows + row_block) * box_channels + row * box_channels + column +
               (column_block % box_channels ^ line);
    }
};

// Two stages, which the n-th tile takes in turn.
inline constexpr int stages = 2;
__device__ inline int stage_of(int n) { return n % stages; }
// The parity of the times that the stage was used before.
__device__ inline uint32_t phase_of(int n) { return static_cast<uint32_t>(n / stages % 2); }

// The map of all keys, or of their values, in boxes of a tile.
inline int map_keys(CUtensorMap& map, const HeadRows& rows, const AttentionShape& shape) {
    return map_rows(map, shape.data, rows.data, {shape.batch, shape.kv_heads, shape.keys, shape.head_dim},
                    {rows.batch_stride, rows.head_stride, rows.row_stride}, sm90_columns);
}
// The map of all queries, or of what comes from above, in boxes of so many.
inline int map_queries(CUtensorMap& map, const HeadRows& rows, const AttentionShape& shape, int box_rows) {
    return map_rows(map, shape.data, rows.data, {shape.batch, shape.heads, shape.queries, shape.head_dim},
                    {rows.batch_stride, rows.head_stride, rows.row_stride}, box_rows);
}

}  // namespace starflow::cuda
