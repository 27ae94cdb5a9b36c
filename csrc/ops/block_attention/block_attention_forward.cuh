// What the CUDA kernels of block_attention's forward pass share: the rows of a block, the online softmax of sums as
// m16n8k16 and wgmma have them, and the way of the results out.
#pragma once
#include "ops/block_attention/block_attention_tiles.cuh"

namespace starflow::cuda {

// A block of threads: `rows` rows of a key head, and a part of the keys.
template <int rows>
struct ForwardBlock {
    unsigned split;
    unsigned first;  // row
    unsigned end;
    unsigned b;
    unsigned kv_head;

    __device__ static ForwardBlock here(const AttentionArgs& args) {
        const auto all_rows = static_cast<unsigned>(rows_of(args.shape));
        const unsigned row_tiles = (all_rows + rows - 1) / rows;
        const auto splits = static_cast<unsigned>(args.splits);
        const auto kv_heads = static_cast<unsigned>(args.shape.kv_heads);
        // The last rows see the most keys where there is a causal mask: the longest tiles come first.
        const unsigned first = (row_tiles - 1 - blockIdx.x / splits % row_tiles) * rows;
        const unsigned head = blockIdx.x / splits / row_tiles;
        return {blockIdx.x % splits, first, first + rows < all_rows ? first + rows : all_rows, head / kv_heads,
                head % kv_heads};
    }
    // A row of the tile, or null.
    template <class Element>
    __device__ Element* row(const HeadRows& all, const AttentionShape& shape, unsigned in_tile) const {
        return first + in_tile < end ? row_at<Element>(all, shape, b, kv_head, first + in_tile) : nullptr;
    }
    // Writes what each row sees, by `threads` threads.
    template <int threads>
    __device__ void see(const AttentionArgs& args, VisibleInTile<rows>& visible) const {
        const auto group = static_cast<unsigned>(group_of(args.shape));
        for (unsigned row = threadIdx.x; row < rows; row += threads) {
            visible.set(row, visible_in_tile(args.mask, args.shape, b, (first + row) / group));
        }
    }
    __device__ VisibleByRows seen(const VisibleInTile<rows>& visible) const {
        return VisibleByRows::between(visible.get(0), visible.get(end - 1 - first));
    }
    // The first tile of this part of the keys, or with `next` = 1 of the next one.
    __device__ int part_begin(const AttentionArgs& args, const KeyTiles& tiles, unsigned next) const {
        return static_cast<int>(static_cast<int64_t>(tiles.count) * (split + next) /
                                static_cast<unsigned>(args.splits));
    }
};

// What a thread knows of a row. It has rows g and g + 8 of each 16, [.][0] and [.][1] below.
struct SoftmaxRow {
    float largest = -INFINITY;
    float total = 0.0F;  // of this thread's columns
};

// Hidden keys of the tile from `key` on weigh nothing.
template <int rows, int row_blocks, int blocks>
__device__ void hide(const VisibleInTile<rows>& seen, int warp_row, int key, float (&weights)[row_blocks][blocks][4]) {
#pragma unroll
    for (int m = 0; m < row_blocks; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const VisibleKeysOf<int> visible = seen.get(warp_row + 16 * m + 8 * h + lane() / 4);
#pragma unroll
            for (int n = 0; n < blocks; ++n) {
#pragma unroll
                for (int i = 2 * h; i < 2 * h + 2; ++i) {
                    if (!visible.has(key + 8 * n + lane() % 4 * 2 + i % 2)) weights[m][n][i] = -INFINITY;
                }
            }
        }
    }
}

// Turns products into weights relative to each row's largest product so far. Earlier sums are rescaled to it by
// shrink(m, h, factor).
template <int row_blocks, int blocks, class Shrink>
__device__ void weigh(float slope, SoftmaxRow (&state)[row_blocks][2], float (&weights)[row_blocks][blocks][4],
                      const Shrink& shrink_sums) {
#pragma unroll
    for (int m = 0; m < row_blocks; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            SoftmaxRow& row = state[m][h];
            float most = row.largest;
#pragma unroll
            for (int n = 0; n < blocks; ++n) {
                most = fmaxf(most, fmaxf(weights[m][n][2 * h], weights[m][n][2 * h + 1]));
            }
            most = quad_largest(most);
            // For a row that has seen no key yet, any finite number makes all weights 0.
            const float known = most == -INFINITY ? 0.0F : most;
            // The difference is taken first, so that the factor is exactly 1 where the largest stays. A fused
            // multiply-add would be slightly off, and over thousands of keys that error would grow.
            const float shrink = power_of_two((row.largest - known) * slope);
            const float offset = known * slope;
            row.largest = most;
            row.total *= shrink;
#pragma unroll
            for (int n = 0; n < blocks; ++n) {
#pragma unroll
                for (int i = 2 * h; i < 2 * h + 2; ++i) {
                    weights[m][n][i] = power_of_two(weights[m][n][i] * slope - offset);
                    row.total += weights[m][n][i];
                }
            }
            shrink_sums(m, h, shrink);
        }
    }
}

template <int blocks>
__device__ void scale_sums(float (&sums)[blocks][4], int h, float factor) {
#pragma unroll
    for (int n = 0; n < blocks; ++n) {
        sums[n][2 * h] *= factor;
        sums[n][2 * h + 1] *= factor;
    }
}

// Writes a warp's results and logarithms, from row `warp_row` of the tile on; with several parts of the keys, into the
// results of this part. 16 bits go by way of `tile`, whose rows the warp has to itself.
template <int rows, class Tile, int row_blocks, int blocks>
__device__ void finish_rows(const AttentionArgs& args, Tile tile, int warp_row, bool wide, float scale,
                            const SoftmaxRow (&state)[row_blocks][2], const float (&sums)[row_blocks][blocks][4]) {
    using Element = typename Tile::Element;
    // The block is computed again: kept from the start, it would take registers that sums need.
    const auto block = ForwardBlock<rows>::here(args);
    const AttentionShape& shape = args.shape;
    const auto head_dim = static_cast<int>(shape.head_dim);
    const int64_t all = shape.batch * shape.heads * shape.queries;
    float* const logs =
        args.splits > 1 ? args.parts + args.splits * all * shape.head_dim + block.split * all : args.lse;
#pragma unroll
    for (int m = 0; m < row_blocks; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const SoftmaxRow& row = state[m][h];
            const int in_tile = warp_row + 16 * m + 8 * h + lane() / 4;
            const unsigned r = block.first + in_tile;
            const float total = quad_sum(row.total);
            const float inverse = total == 0.0F ? 0.0F : 1.0F / total;
            const int64_t index = index_of(shape, block.b, block.kv_head, r);
            if (r < block.end && lane() % 4 == 0) {
                logs[index] = total == 0.0F ? -INFINITY : row.largest * scale + logf(total);
            }
            if (args.splits > 1) {
                if (r < block.end) {
                    write_sums(args.parts + (block.split * all + index) * shape.head_dim, head_dim, sums[m], h,
                               inverse);
                }
            } else if constexpr (sizeof(Element) == 2) {
                write_sums(tile, in_tile, sums[m], h, inverse);
            } else if (r < block.end) {
                write_sums(row_at<Element>(args.out, shape, block.b, block.kv_head, r), head_dim, sums[m], h, inverse);
            }
        }
    }
    if constexpr (sizeof(Element) == 2) {
        if (args.splits > 1) return;
        __syncwarp();
        flush<16 * row_blocks>(tile, warp_row, head_dim, wide,
                               [&](int row) { return block.template row<Element>(args.out, shape, warp_row + row); });
    }
}

}  // namespace starflow::cuda
