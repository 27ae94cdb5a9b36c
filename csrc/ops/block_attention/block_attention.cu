// Attention on CUDA, on tensor cores of every architecture from sm_80 on; formula and mask are in block_attention.h,
// tiles and parts in block_attention_schedule.h. sm_90a has a kernel of its own, block_attention_sm90.cu.
//
// A block holds a tile of rows of one key head and passes over the tiles of keys that it sees, two in shared memory:
// while one is computed with, the next one comes. Each warp has 16 or 32 rows to itself: products, online softmax and
// sums stay in its registers, where the weights are the left operand of the next product.
#include "ops/block_attention/block_attention_forward.cuh"

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
    // Shared memory holds the queries, two stages of keys and values, and what each row sees.
    static constexpr int tiles_bytes = Tile::bytes(rows) + 4 * Tile::bytes(columns);
    static constexpr int shared_bytes = tiles_bytes + static_cast<int>(sizeof(VisibleInTile<rows>));
    // Queries stay in registers where there is room beside the sums.
    static constexpr bool keeps_queries = sizeof(Element) == 2 && row_blocks * width_blocks <= 8;

    // Operands of float32 take four times as many registers, so fewer of them are loaded ahead.
    static constexpr int depth_unroll = sizeof(Element) == 2 ? width_blocks : width == 256 ? 1 : 2;

    using Sums = float[row_blocks][2 * width_blocks][4];
    using Weights = float[row_blocks][2 * column_blocks][4];
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
    const auto block = ForwardBlock<F::rows>::here(args);
    auto& visible_to = *reinterpret_cast<VisibleInTile<F::rows>*>(memory + F::tiles_bytes);
    await_earlier_launches();
    block.template see<F::threads>(args, visible_to);
    __syncthreads();
    // What the rows see is read again wherever it is needed: registers are for the sums.
    const auto seen = [&] { return block.seen(visible_to); };
    const KeyTiles tiles = KeyTiles::of(seen().any, F::columns);
    const int tile_begin = block.part_begin(args, tiles, 0);
    const int tile_end = block.part_begin(args, tiles, 1);

    // Keys that no row of the tile sees are not read: what lies there may be NaN.
    const auto* keys = head_at<const Element>(args.k, block.b, block.kv_head);
    const auto* values = head_at<const Element>(args.v, block.b, block.kv_head);
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
    SoftmaxRow state[F::row_blocks][2];
    typename F::Sums sums = {};
    const float scale = scale_of(args.scale, block.b);

    if (tile_begin < tile_end) {
        fetch<F::rows, F::threads>(queries, args.q.data, head_dim, wide,
                                   [&](int row) { return block.template row<const Element>(args.q, shape, row); });
        fetch_keys(tile_begin, 0);
    }
    typename F::Operand kept[F::keeps_queries ? F::row_blocks : 1][F::keeps_queries ? F::width_blocks : 1];
    for (int i = tile_begin; i < tile_end; ++i) {
        const int stage = (i - tile_begin) % 2;
        cute::cp_async_wait<0>();
        // From here on all threads see this tile, and none computes with the tile before it any more.
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
        if (!seen().every.all_in(key, key + F::columns)) hide(visible_to, warp_row, key, weights);
        weigh(scale * log2_of_e, state, weights, [&](int m, int h, float shrink) { scale_sums(sums[m], h, shrink); });
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

    // A warp's rows of the queries, which it alone has read, become those of the result.
    __syncwarp();
    finish_rows<F::rows>(args, queries, warp_row, wide, scale, state, sums);
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
    return enqueue_early(args.early, forward_kernel<F>, static_cast<unsigned>(blocks), F::threads, F::shared_bytes,
                         stream, args, wide);
}

// Large tiles exist for types of 16 bits, up to a width of 128.
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

template <class Element>
int launch(const AttentionArgs& args, void* stream) {
    const int code = args.sm90 ? block_attention_sm90_cuda(args, stream) : launch_by_width<Element>(args, stream);
    if (code != 0 || args.splits == 1) return code;
    constexpr int threads = 256;
    const int64_t rows = args.shape.batch * args.shape.heads * args.shape.queries;
    return enqueue(join_kernel<Element>, static_cast<unsigned>(divide_up(rows * warp_size, threads)), threads, 0,
                   stream, args);
}

}  // namespace

int block_attention_cuda(const AttentionArgs& args, void* stream) {
    switch (args.shape.data) {
        case Dtype::bfloat16:
            return launch<BFloat16>(args, stream);
        case Dtype::float16:
            return launch<Float16>(args, stream);
        default:
            return launch<float>(args, stream);
    }
}

}  // namespace starflow
