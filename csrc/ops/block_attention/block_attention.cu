// Attention on CUDA, on tensor cores of every architecture from sm_80 on; formula and mask are in block_attention.h,
// tiles and parts in block_attention_schedule.h.
//
// A block holds a tile of rows of one key head and passes over the tiles of keys that it sees, two in shared memory:
// while one is computed with, the next one comes. Each warp has 16 or 32 rows to itself: products, online softmax and
// sums stay in its registers, where the weights are the left operand of the next product.
#include "ops/block_attention/block_attention_tiles.cuh"

namespace starflow {
namespace {

using namespace cuda;

template <class Element_, int width_, bool large>
struct Forward {
    using Element = Element_;
    using Products = cuda::Products<Element>;
    using Operand = typename Products::Operand;
    using Tile = cuda::Tile<Element, width_>;
    static constexpr AttentionTile tile = forward_tile(sizeof(Element), width_, large);
    static constexpr int width = width_;
    static constexpr int rows = tile.rows;
    static constexpr int columns = tile.columns;
    static constexpr int threads = tile.threads();
    static constexpr int warp_rows = tile.rows_of_warp();
    static constexpr int row_blocks = warp_rows / 16;
    static constexpr int column_blocks = columns / 16;
    static constexpr int width_blocks = width / 16;
    // Queries; keys and values, twice; what each row sees.
    static constexpr int tiles_bytes = Tile::bytes(rows) + 4 * Tile::bytes(columns);
    static constexpr int shared_bytes = tiles_bytes + static_cast<int>(sizeof(VisibleInTile<rows>));
    // Queries stay in registers where there is room beside the sums.
    static constexpr bool keeps_queries = sizeof(Element) == 2 && row_blocks * width_blocks <= 8;

    // Operands of float32 are four times as many registers: fewer on their way.
    static constexpr int depth_unroll = sizeof(Element) == 2 ? width_blocks : width == 256 ? 1 : 2;

    using Sums = float[row_blocks][2 * width_blocks][4];
    using Weights = float[row_blocks][2 * column_blocks][4];

    // What a thread knows of its rows: g and g + 8 of each 16.
    struct Row {
        float largest;
        float total;  // of this thread's columns
    };

    // Hidden keys of the tile from `key` on weigh nothing.
    __device__ static void hide(const VisibleInTile<rows>& seen, int warp_row, int key, Weights& weights) {
#pragma unroll
        for (int m = 0; m < row_blocks; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const VisibleKeysOf<int> visible = seen.get(warp_row + 16 * m + 8 * h + lane() / 4);
#pragma unroll
                for (int n = 0; n < 2 * column_blocks; ++n) {
#pragma unroll
                    for (int i = 2 * h; i < 2 * h + 2; ++i) {
                        if (!visible.has(key + 8 * n + lane() % 4 * 2 + i % 2)) weights[m][n][i] = -INFINITY;
                    }
                }
            }
        }
    }

    // Products to weights relative to each row's largest product so far; what was summed before shrinks to it.
    __device__ static void weigh(float slope, Row (&state)[row_blocks][2], Weights& weights, Sums& sums) {
#pragma unroll
        for (int m = 0; m < row_blocks; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                Row& row = state[m][h];
                float most = row.largest;
#pragma unroll
                for (int n = 0; n < 2 * column_blocks; ++n) {
                    most = fmaxf(most, fmaxf(weights[m][n][2 * h], weights[m][n][2 * h + 1]));
                }
                most = quad_largest(most);
                // Of a row that has seen no key yet, any finite number makes all weights 0.
                const float known = most == -INFINITY ? 0.0F : most;
                // Subtracted first: exactly 1 where the largest stays. A fused product and difference would not be, and
                // thousands of keys would add that up.
                const float shrink = power_of_two((row.largest - known) * slope);
                const float offset = known * slope;
                row.largest = most;
                row.total *= shrink;
#pragma unroll
                for (int n = 0; n < 2 * column_blocks; ++n) {
#pragma unroll
                    for (int i = 2 * h; i < 2 * h + 2; ++i) {
                        weights[m][n][i] = power_of_two(weights[m][n][i] * slope - offset);
                        row.total += weights[m][n][i];
                    }
                }
#pragma unroll
                for (int n = 0; n < 2 * width_blocks; ++n) {
                    sums[m][n][2 * h] *= shrink;
                    sums[m][n][2 * h + 1] *= shrink;
                }
            }
        }
    }
};

template <class F>
__global__ void __launch_bounds__(F::threads) forward_kernel(AttentionArgs args, bool wide) {
    using Element = typename F::Element;
    using Products = typename F::Products;
    STARFLOW_SHARED_MEMORY(memory);
    const typename F::Tile queries{reinterpret_cast<Element*>(memory)};
    const auto keys_of = [&](int stage) {
        return typename F::Tile{
            reinterpret_cast<Element*>(memory + F::Tile::bytes(F::rows) + 2 * stage * F::Tile::bytes(F::columns))};
    };
    const auto values_of = [&](int stage) {
        return typename F::Tile{keys_of(stage).data + F::Tile::bytes(F::columns) / sizeof(Element)};
    };

    const AttentionShape& shape = args.shape;
    const auto head_dim = static_cast<int>(shape.head_dim);
    const auto group = static_cast<unsigned>(group_of(shape));
    const auto all_rows = static_cast<unsigned>(rows_of(shape));
    const unsigned row_tiles = (all_rows + F::rows - 1) / F::rows;
    const auto splits = static_cast<unsigned>(args.splits);
    const auto kv_heads = static_cast<unsigned>(shape.kv_heads);
    const unsigned split = blockIdx.x % splits;
    // The last rows see the most keys where there is a causal mask: longest first.
    const unsigned first = (row_tiles - 1 - blockIdx.x / splits % row_tiles) * F::rows;
    const unsigned head = blockIdx.x / splits / row_tiles;
    const unsigned b = head / kv_heads;
    const unsigned kv_head = head % kv_heads;
    const unsigned end = first + F::rows < all_rows ? first + F::rows : all_rows;

    auto& visible_to = *reinterpret_cast<VisibleInTile<F::rows>*>(memory + F::tiles_bytes);
    for (unsigned row = threadIdx.x; row < F::rows; row += F::threads) {
        visible_to.set(row, visible_in_tile(args.mask, shape, b, (first + row) / group));
    }
    __syncthreads();
    // Read again where it is needed: registers are for the sums.
    const auto seen = [&] { return VisibleByRows::between(visible_to.get(0), visible_to.get(end - 1 - first)); };
    const KeyTiles tiles = KeyTiles::of(seen().any, F::columns);
    const int tile_begin = static_cast<int>(static_cast<int64_t>(tiles.count) * split / splits);
    const int tile_end = static_cast<int>(static_cast<int64_t>(tiles.count) * (split + 1) / splits);

    // Keys that no row of the tile sees are not read: what lies there may be NaN.
    const auto* keys = head_at<const Element>(args.k, b, kv_head);
    const auto* values = head_at<const Element>(args.v, b, kv_head);
    const auto fetch_keys = [&](int i, int stage) {
        const VisibleKeysOf<int> any = seen().any;
        const int begin = tiles.tile(i) * F::columns;
        fetch<F::columns, F::threads>(keys_of(stage), keys, head_dim, wide, [&](int row) {
            return any.has(begin + row) ? keys + (begin + row) * args.k.row_stride : nullptr;
        });
        fetch<F::columns, F::threads>(values_of(stage), values, head_dim, wide, [&](int row) {
            return any.has(begin + row) ? values + (begin + row) * args.v.row_stride : nullptr;
        });
    };

    const int warp_row = warp() * F::warp_rows;
    typename F::Row state[F::row_blocks][2];
#pragma unroll
    for (int m = 0; m < F::row_blocks; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) state[m][h] = {-INFINITY, 0.0F};
    }
    typename F::Sums sums = {};
    const float scale = scale_of(args.scale, b);

    if (tile_begin < tile_end) {
        fetch<F::rows, F::threads>(queries, args.q.data, head_dim, wide, [&](int row) {
            return first + row < end ? row_at<const Element>(args.q, shape, b, kv_head, first + row) : nullptr;
        });
        fetch_keys(tile_begin, 0);
    }
    typename F::Operand kept[F::keeps_queries ? F::row_blocks : 1][F::keeps_queries ? F::width_blocks : 1];
    for (int i = tile_begin; i < tile_end; ++i) {
        const int stage = (i - tile_begin) % 2;
        cute::cp_async_wait<0>();
        // This tile is there for all, and nobody computes with the one before any more.
        __syncthreads();
        if (i + 1 < tile_end) fetch_keys(i + 1, 1 - stage);
        if constexpr (F::keeps_queries) {
            if (i == tile_begin) {
#pragma unroll
                for (int m = 0; m < F::row_blocks; ++m) {
#pragma unroll
                    for (int d = 0; d < F::width_blocks; ++d) {
                        kept[m][d] = Products::left(queries, warp_row, 16 * m, 16 * d);
                    }
                }
            }
        }
        typename F::Weights weights = {};
#pragma unroll F::depth_unroll
        for (int d = 0; d < F::width_blocks; ++d) {
            typename F::Operand left[F::row_blocks];
#pragma unroll
            for (int m = 0; m < F::row_blocks; ++m) {
                if constexpr (F::keeps_queries) {
                    left[m] = kept[m][d];
                } else {
                    left[m] = Products::left(queries, warp_row, 16 * m, 16 * d);
                }
            }
#pragma unroll
            for (int n = 0; n < F::column_blocks; ++n) {
                const auto right = Products::right(keys_of(stage), 16 * n, 16 * d);
#pragma unroll
                for (int m = 0; m < F::row_blocks; ++m) {
                    Products::add(weights[m][2 * n], weights[m][2 * n + 1], left[m], right);
                }
            }
        }
        const int key = tiles.tile(i) * F::columns;
        if (!seen().every.all_in(key, key + F::columns)) F::hide(visible_to, warp_row, key, weights);
        F::weigh(scale * log2_of_e, state, weights, sums);
#pragma unroll
        for (int k = 0; k < F::column_blocks; ++k) {
            typename F::Operand left[F::row_blocks];
#pragma unroll
            for (int m = 0; m < F::row_blocks; ++m) {
                left[m] = Products::left_from(weights[m][2 * k], weights[m][2 * k + 1]);
            }
#pragma unroll
            for (int n = 0; n < F::width_blocks; ++n) {
                if (sizeof(Element) == 4 && n % 4 == 0) hold_loads();
                const auto right = Products::right_by_rows(values_of(stage), 16 * k, 16 * n);
#pragma unroll
                for (int m = 0; m < F::row_blocks; ++m)
                    Products::add(sums[m][2 * n], sums[m][2 * n + 1], left[m], right);
            }
        }
    }

    const int64_t all = shape.batch * shape.heads * shape.queries;
    float* const logs = args.splits > 1 ? args.parts + splits * all * shape.head_dim + split * all : args.lse;
    // A warp's rows of the queries, which it alone has read, become those of the result.
    __syncwarp();
#pragma unroll
    for (int m = 0; m < F::row_blocks; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const typename F::Row& row = state[m][h];
            const int in_tile = warp_row + 16 * m + 8 * h + lane() / 4;
            const unsigned r = first + in_tile;
            const float total = quad_sum(row.total);
            const float inverse = total == 0.0F ? 0.0F : 1.0F / total;
            const int64_t index = index_of(shape, b, kv_head, r);
            if (r < end && lane() % 4 == 0) {
                logs[index] = total == 0.0F ? -INFINITY : row.largest * scale + logf(total);
            }
            if (args.splits > 1) {
                if (r < end) {
                    write_sums(args.parts + (split * all + index) * shape.head_dim, head_dim, sums[m], h, inverse);
                }
            } else if constexpr (sizeof(Element) == 2) {
                write_sums(queries, in_tile, sums[m], h, inverse);
            } else if (r < end) {
                write_sums(row_at<Element>(args.out, shape, b, kv_head, r), head_dim, sums[m], h, inverse);
            }
        }
    }
    if constexpr (sizeof(Element) == 2) {
        if (args.splits > 1) return;
        __syncwarp();
        flush<F::warp_rows>(queries, warp_row, head_dim, wide, [&](int row) {
            const unsigned r = first + warp_row + row;
            return r < end ? row_at<Element>(args.out, shape, b, kv_head, r) : nullptr;
        });
    }
}

// The results of the parts of the keys, joined by their logarithms: out = sum of exp(lse[s] - lse) out[s]. One warp a
// row.
template <class Element>
__global__ void join_kernel(AttentionArgs args) {
    const AttentionShape& shape = args.shape;
    const int64_t all = shape.batch * shape.heads * shape.queries;
    const int64_t index = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / warp_size;
    if (index >= all) return;
    const float* logs = args.parts + args.splits * all * shape.head_dim + index;
    float most = -INFINITY;
    for (int64_t s = 0; s < args.splits; ++s) most = larger(most, logs[s * all]);
    const float offset = most == -INFINITY ? 0.0F : most;
    float total = 0.0F;
    for (int64_t s = 0; s < args.splits; ++s) total += expf(logs[s * all] - offset);
    const float inverse = total == 0.0F ? 0.0F : 1.0F / total;
    const int64_t row = index / shape.queries;
    Element* out = static_cast<Element*>(args.out.data) + row / shape.heads * args.out.batch_stride +
                   row % shape.heads * args.out.head_stride + index % shape.queries * args.out.row_stride;
    for (int64_t c = lane(); c < shape.head_dim; c += warp_size) {
        float sum = 0.0F;
        for (int64_t s = 0; s < args.splits; ++s) {
            sum += expf(logs[s * all] - offset) * args.parts[(s * all + index) * shape.head_dim + c];
        }
        narrow(sum * inverse, out[c]);
    }
    if (lane() == 0) args.lse[index] = total == 0.0F ? -INFINITY : offset + logf(total);
}

template <class Element, int width, bool large>
int launch_forward(const AttentionArgs& args, void* stream) {
    using F = Forward<Element, width, large>;
    const AttentionShape& shape = args.shape;
    const int64_t blocks = divide_up(rows_of(shape), F::rows) * shape.batch * shape.kv_heads * args.splits;
    const bool wide = whole_chunks(shape, args.q, args.k, args.v, args.out);
    const int code =
        enqueue(forward_kernel<F>, static_cast<unsigned>(blocks), F::threads, F::shared_bytes, stream, args, wide);
    if (code != 0 || args.splits == 1) return code;
    constexpr int threads = 256;
    const int64_t rows = shape.batch * shape.heads * shape.queries;
    return enqueue(join_kernel<Element>, static_cast<unsigned>(divide_up(rows * warp_size, threads)), threads, 0,
                   stream, args);
}

// Large tiles exist for 16 bits, up to a width of 128.
template <class Element>
int launch_by_width(const AttentionArgs& args, void* stream) {
    const int64_t width = tile_width(args.shape.head_dim);
    if constexpr (sizeof(Element) == 2) {
        const bool large = args.tile_rows == forward_tile(sizeof(Element), width, true).rows;
        if (width == 64 && large) return launch_forward<Element, 64, true>(args, stream);
        if (width == 128 && large) return launch_forward<Element, 128, true>(args, stream);
    }
    if (width == 64) return launch_forward<Element, 64, false>(args, stream);
    if (width == 128) return launch_forward<Element, 128, false>(args, stream);
    return launch_forward<Element, 256, false>(args, stream);
}

}  // namespace

int block_attention_cuda(const AttentionArgs& args, void* stream) {
    switch (args.shape.data) {
        case Dtype::bfloat16:
            return launch_by_width<BFloat16>(args, stream);
        case Dtype::float16:
            return launch_by_width<Float16>(args, stream);
        default:
            return launch_by_width<float>(args, stream);
    }
}

}  // namespace starflow
