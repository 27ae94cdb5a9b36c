// The gradient of block_attention on CUDA; the formula is in block_attention.h.
//
// Two kernels with one loop: a block holds a tile of rows and passes over the columns that matter to it, and computes
// the products of both once more. No two blocks add to one place, so that the same bits come every time.
//   grad_q:          rows are queries (Q, dO), columns keys (K, V)      dQ = scale dS K
//   grad_k, grad_v:  rows are keys (K, V), columns queries (Q, dO)      dV = P^T dO,  dK = scale dS^T Q
// Before them, D of each row is computed into the workspace.
#include "ops/block_attention/block_attention_backward.cuh"

namespace starflow {
namespace {

using namespace cuda;

template <class Element>
__global__ void dots_kernel(AttentionBackwardArgs args) {
    if (const DotRow row = DotRow::here(args); row.exists) write_dot<Element>(args, row);
}

template <class Element_, int width_>
struct Backward {
    using Element = Element_;
    using Products = cuda::Products<Element>;
    using Operand = typename Products::Operand;
    using Tile = cuda::Tile<Element, width_>;
    static constexpr AttentionTile tile = backward_tile(sizeof(Element), width_);
    static constexpr int rows = tile.rows;
    static constexpr int columns = tile.columns;
    static constexpr int threads = tile.threads();
    static constexpr int column_blocks = columns / 16;
    static constexpr int width_blocks = width_ / 16;
    // Warps that share 16 rows: each computes their products, and sums a part of the channels.
    static constexpr int row_warps = rows / 16;
    static constexpr int parts = tile.warps / row_warps;
    static constexpr int part_width = width_ / parts;
    static constexpr int part_blocks = width_blocks / parts;
    static_assert(tile.warps % row_warps == 0 && width_blocks % parts == 0);
    // Blocks of grad_queries_kernel on a multiprocessor; 0 leaves it to ptxas, which of float32 makes room for three on
    // sm_100f, and spills.
    static constexpr int query_blocks = sizeof(Element) == 4 && width_ == 64 ? 2 : 0;

    using Sums = float[2 * part_blocks][4];
    using Weights = float[2 * column_blocks][4];

    // Queries as columns: of each its logarithm, its D, and what it sees.
    struct Queries {
        float logs[columns];
        float dots[columns];
        VisibleInTile<columns> visible;
    };
    static constexpr int tiles_bytes = 2 * Tile::bytes(rows) + 4 * Tile::bytes(columns);
    static constexpr int shared_bytes = tiles_bytes + 2 * static_cast<int>(sizeof(Queries));

    // Shared memory: two tiles of rows, then two stages of two tiles of columns.
    struct Memory {
        unsigned char* bytes;

        __device__ Tile rows_of(int operand) const { return tile_at(operand * Tile::bytes(rows)); }
        __device__ Tile columns_of(int stage, int operand) const {
            return tile_at(2 * Tile::bytes(rows) + (2 * stage + operand) * Tile::bytes(columns));
        }
        __device__ Queries& queries(int stage) const { return reinterpret_cast<Queries*>(bytes + tiles_bytes)[stage]; }

      private:
        __device__ Tile tile_at(int offset) const { return {reinterpret_cast<Element*>(bytes + offset)}; }
    };

    __device__ static int warp_row() { return warp() % row_warps * 16; }
    __device__ static int part() { return parts == 1 ? 0 : warp() / row_warps; }

    // Multiplies a warp's 16 rows by all columns.
    __device__ static void multiply(Tile rows_tile, int row, Tile columns_tile, Weights& products) {
#pragma unroll
        for (int d = 0; d < width_blocks; ++d) {
            const Operand left = Products::left(rows_tile, row, 0, 16 * d);
#pragma unroll
            for (int n = 0; n < column_blocks; ++n) {
                Products::add(products[2 * n], products[2 * n + 1], left,
                              Products::right(columns_tile, 16 * n, 16 * d));
            }
        }
    }
    // sums += weights times this warp's channels of the columns.
    __device__ static void accumulate(const Weights& weights, Tile columns_tile, Sums& sums) {
#pragma unroll
        for (int k = 0; k < column_blocks; ++k) {
            const Operand left = Products::left_from(weights[2 * k], weights[2 * k + 1]);
#pragma unroll
            for (int n = 0; n < part_blocks; ++n) {
                if (n % 4 == 0) hold_loads();
                Products::add(sums[2 * n], sums[2 * n + 1], left,
                              Products::right_by_rows(columns_tile, 16 * k, part() * part_width + 16 * n));
            }
        }
    }
    // Writes a warp's sums to global memory, by way of tile rows that only the warps sharing these rows still use.
    template <class Target>
    __device__ static void write(Tile through, const Sums& sums, float factor, int head_dim, bool wide,
                                 const Target& target) {
        const int first_channel = part() * part_width;
        if constexpr (sizeof(Element) == 2) {
            sync_rows();
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                write_sums(through, warp_row() + 8 * h + lane() / 4, sums, h, factor, first_channel);
            }
            sync_rows();
            constexpr int share = 16 / parts;
            const int first_row = part() * share;
            flush<share>(through, warp_row() + first_row, head_dim, wide,
                         [&](int row) { return target(first_row + row); });
        } else {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                if (Element* to = target(8 * h + lane() / 4)) {
                    write_sums(to + first_channel, head_dim - first_channel, sums, h, factor);
                }
            }
        }
    }

  private:
    // A barrier of the warps that share rows.
    __device__ static void sync_rows() {
        if constexpr (parts == 1) {
            __syncwarp();
        } else {
            __syncthreads();
        }
    }
};

template <class B>
__global__ void __launch_bounds__(B::threads, B::query_blocks)
    grad_queries_kernel(AttentionBackwardArgs args, bool wide) {
    using Element = typename B::Element;
    STARFLOW_SHARED_MEMORY(bytes);
    const typename B::Memory memory{bytes};
    const AttentionShape& shape = args.shape;
    const auto head_dim = static_cast<int>(shape.head_dim);
    const auto group = static_cast<unsigned>(group_of(shape));
    const auto all_rows = static_cast<unsigned>(rows_of(shape));
    const unsigned row_tiles = (all_rows + B::rows - 1) / B::rows;
    const auto kv_heads = static_cast<unsigned>(shape.kv_heads);
    // The last rows see the most keys where there is a causal mask: the longest tiles come first.
    const unsigned first = (row_tiles - 1 - blockIdx.x % row_tiles) * B::rows;
    const unsigned head = blockIdx.x / row_tiles;
    const unsigned b = head / kv_heads;
    const unsigned kv_head = head % kv_heads;
    const unsigned end = first + B::rows < all_rows ? first + B::rows : all_rows;

    const auto visible = [&](unsigned r) { return visible_in_tile(args.mask, shape, b, r / group); };
    const VisibleByRows seen = VisibleByRows::between(visible(first), visible(end - 1));
    const KeyTiles tiles = KeyTiles::of(seen.any, B::columns);
    const auto* keys = head_at<const Element>(args.k, b, kv_head);
    const auto* values = head_at<const Element>(args.v, b, kv_head);
    const auto fetch_keys = [&](int i, int stage) {
        const int begin = tiles.tile(i) * B::columns;
        fetch<B::columns, B::threads>(memory.columns_of(stage, 0), keys, head_dim, wide, [&](int row) {
            return seen.any.has(begin + row) ? keys + (begin + row) * args.k.row_stride : nullptr;
        });
        fetch<B::columns, B::threads>(memory.columns_of(stage, 1), values, head_dim, wide, [&](int row) {
            return seen.any.has(begin + row) ? values + (begin + row) * args.v.row_stride : nullptr;
        });
    };
    const auto fetch_rows = [&](int operand, const HeadRows& from) {
        fetch<B::rows, B::threads>(memory.rows_of(operand), from.data, head_dim, wide, [&](int row) {
            return first + row < end ? row_at<const Element>(from, shape, b, kv_head, first + row) : nullptr;
        });
    };

    const int warp_row = B::warp_row();
    const float scale = scale_of(args.scale, b);
    const float slope = scale * log2_of_e;
    VisibleKeysOf<int> sees[2];
    float logs[2];
    float dots[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const unsigned r = first + warp_row + 8 * h + lane() / 4;
        const unsigned known = r < end ? r : end - 1;
        const int64_t index = index_of(shape, b, kv_head, known);
        sees[h] = visible(known);
        logs[h] = args.lse[index] * log2_of_e;
        dots[h] = args.dots[index];
    }
    typename B::Sums sums = {};
    if (tiles.count > 0) {
        fetch_rows(0, args.q);
        fetch_rows(1, args.grad_out);
        fetch_keys(0, 0);
    }
    for (int i = 0; i < tiles.count; ++i) {
        const int stage = i % 2;
        cute::cp_async_wait<0>();
        // From here on all threads see this tile, and none computes with the tile before it any more.
        __syncthreads();
        if (i + 1 < tiles.count) fetch_keys(i + 1, 1 - stage);
        typename B::Weights weights = {};
        typename B::Weights grads = {};
        B::multiply(memory.rows_of(0), warp_row, memory.columns_of(stage, 0), weights);
        B::multiply(memory.rows_of(1), warp_row, memory.columns_of(stage, 1), grads);
        const int key = tiles.tile(i) * B::columns;
        const bool all = seen.every.all_in(key, key + B::columns);
#pragma unroll
        for (int n = 0; n < 2 * B::column_blocks; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float weight = power_of_two(weights[n][e] * slope - logs[e / 2]);
                const float grad = weight * (grads[n][e] - dots[e / 2]);
                const bool visible_key = all || sees[e / 2].has(key + 8 * n + lane() % 4 * 2 + e % 2);
                grads[n][e] = visible_key ? grad : 0.0F;
            }
        }
        B::accumulate(grads, memory.columns_of(stage, 0), sums);
    }
    B::write(memory.rows_of(0), sums, scale, head_dim, wide, [&](int row) {
        const unsigned r = first + warp_row + row;
        return r < end ? row_at<Element>(args.grad_q, shape, b, kv_head, r) : nullptr;
    });
}

template <class B>
__global__ void __launch_bounds__(B::threads) grad_keys_kernel(AttentionBackwardArgs args, bool wide) {
    using Element = typename B::Element;
    STARFLOW_SHARED_MEMORY(bytes);
    const typename B::Memory memory{bytes};
    const AttentionShape& shape = args.shape;
    const auto head_dim = static_cast<int>(shape.head_dim);
    const auto keys = static_cast<int>(shape.keys);
    const auto kv_heads = static_cast<unsigned>(shape.kv_heads);
    const unsigned key_tiles = (keys + B::rows - 1) / B::rows;
    // The first keys are seen by the most queries where there is a causal mask: the longest tiles come first.
    const int first = static_cast<int>(blockIdx.x % key_tiles) * B::rows;
    const unsigned head = blockIdx.x / key_tiles;
    const unsigned b = head / kv_heads;
    const unsigned kv_head = head % kv_heads;
    const int end = first + B::rows < keys ? first + B::rows : keys;

    const auto group = static_cast<int>(group_of(shape));
    const QueryRange range = visible_queries(args.mask, shape, b, first, end);
    const int row_begin = range.begin * group;
    const int row_end = range.end * group;
    const int count = (row_end - row_begin + B::columns - 1) / B::columns;
    const auto visible = [&](int r) { return visible_in_tile(args.mask, shape, b, r / group); };
    // Whether each query of a tile sees each key of this block's. Rows behind the last are zeros and add nothing.
    const auto all_see = [&](int begin) {
        const VisibleByRows seen = VisibleByRows::between(visible(begin), visible(begin + B::columns - 1));
        return seen.every.all_in(first, first + B::rows);
    };
    const auto fetch_queries = [&](int i, int stage) {
        const int begin = row_begin + i * B::columns;
        const auto fetch_operand = [&](int operand, const HeadRows& from) {
            fetch<B::columns, B::threads>(memory.columns_of(stage, operand), from.data, head_dim, wide, [&](int row) {
                return begin + row < row_end ? row_at<const Element>(from, shape, b, kv_head, begin + row) : nullptr;
            });
        };
        fetch_operand(0, args.q);
        fetch_operand(1, args.grad_out);
        typename B::Queries& queries = memory.queries(stage);
        for (int c = static_cast<int>(threadIdx.x); c < B::columns; c += B::threads) {
            const bool some = begin + c < row_end;
            const int64_t index = some ? index_of(shape, b, kv_head, begin + c) : 0;
            using Copy = cute::SM80_CP_ASYNC_CACHEALWAYS_ZFILL<float>;
            Copy::copy(args.lse[index], queries.logs[c], some);
            Copy::copy(args.dots[index], queries.dots[c], some);
            queries.visible.set(c, some ? visible(begin + c) : VisibleKeysOf<int>{0, 0, 0});
        }
    };
    const auto fetch_rows = [&](int operand, const HeadRows& from) {
        const auto* rows = head_at<const Element>(from, b, kv_head);
        fetch<B::rows, B::threads>(memory.rows_of(operand), from.data, head_dim, wide, [&](int row) {
            return first + row < end ? rows + (first + row) * from.row_stride : nullptr;
        });
    };

    const int warp_row = B::warp_row();
    const float scale = scale_of(args.scale, b);
    const float slope = scale * log2_of_e;
    typename B::Sums key_sums = {};
    typename B::Sums value_sums = {};
    if (count > 0) {
        fetch_rows(0, args.k);
        fetch_rows(1, args.v);
        fetch_queries(0, 0);
    }
    for (int i = 0; i < count; ++i) {
        const int stage = i % 2;
        cute::cp_async_wait<0>();
        // From here on all threads see this tile, and none computes with the tile before it any more.
        __syncthreads();
        if (i + 1 < count) fetch_queries(i + 1, 1 - stage);
        typename B::Weights weights = {};
        typename B::Weights grads = {};
        B::multiply(memory.rows_of(0), warp_row, memory.columns_of(stage, 0), weights);
        B::multiply(memory.rows_of(1), warp_row, memory.columns_of(stage, 1), grads);
        const typename B::Queries& queries = memory.queries(stage);
        const bool all = all_see(row_begin + i * B::columns);
#pragma unroll
        for (int n = 0; n < 2 * B::column_blocks; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int column = 8 * n + lane() % 4 * 2 + e;
                const float log = queries.logs[column] * log2_of_e;
                const float dot = queries.dots[column];
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    float& weight = weights[n][2 * h + e];
                    float& grad = grads[n][2 * h + e];
                    weight = power_of_two(weight * slope - log);
                    grad = weight * (grad - dot);
                    if (!all) {
                        const bool visible_key = queries.visible.get(column).has(first + warp_row + 8 * h + lane() / 4);
                        weight = visible_key ? weight : 0.0F;
                        grad = visible_key ? grad : 0.0F;
                    }
                }
            }
        }
        B::accumulate(weights, memory.columns_of(stage, 1), value_sums);
        B::accumulate(grads, memory.columns_of(stage, 0), key_sums);
    }
    const auto write = [&](int operand, const typename B::Sums& sums, float factor, const HeadRows& to) {
        auto* rows = head_at<Element>(to, b, kv_head);
        B::write(memory.rows_of(operand), sums, factor, head_dim, wide, [&](int row) {
            const int key = first + warp_row + row;
            return key < end ? rows + key * to.row_stride : nullptr;
        });
    };
    write(0, key_sums, scale, args.grad_k);
    write(1, value_sums, 1.0F, args.grad_v);
}

template <class Element, int width>
int launch_backward(const AttentionBackwardArgs& args, void* stream) {
    using B = Backward<Element, width>;
    const AttentionShape& shape = args.shape;
    const bool wide = whole_chunks(shape, args.q, args.k, args.v, args.grad_out, args.grad_q, args.grad_k, args.grad_v);
    const int64_t heads = shape.batch * shape.kv_heads;
    const int64_t rows = shape.batch * shape.heads * shape.queries;
    if (rows > 0) {
        int code = enqueue(dots_kernel<Element>, dot_blocks(shape), dot_threads, 0, stream, args);
        if (code != 0) return code;
        code = enqueue(grad_queries_kernel<B>, static_cast<unsigned>(divide_up(rows_of(shape), B::rows) * heads),
                       B::threads, B::tiles_bytes, stream, args, wide);
        if (code != 0) return code;
    }
    if (shape.keys * heads == 0) return 0;
    return enqueue(grad_keys_kernel<B>, static_cast<unsigned>(divide_up(shape.keys, B::rows) * heads), B::threads,
                   B::shared_bytes, stream, args, wide);
}

template <class Element>
int launch_by_width(const AttentionBackwardArgs& args, void* stream) {
    switch (tile_width(args.shape.head_dim)) {
        case 64:
            return launch_backward<Element, 64>(args, stream);
        case 128:
            return launch_backward<Element, 128>(args, stream);
        default:
            return launch_backward<Element, 256>(args, stream);
    }
}

}  // namespace

int block_attention_backward_cuda(const AttentionBackwardArgs& args, void* stream) {
    if (args.sm90) return block_attention_backward_sm90_cuda(args, stream);
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
