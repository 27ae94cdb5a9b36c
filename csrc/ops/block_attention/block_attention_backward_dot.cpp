// The gradient of block_attention; the formula is in block_attention.h. Compiled once for each ISA.
//
// For one key head, all its keys are packed once; then tiles of 64 rows of queries pass over the blocks of 64 keys that
// they see. P and dS of a tile and a block come as sums of a product, (64 rows, 32 keys) twice, which is what a panel
// of depth 64 looks like: they are operands of the next products where they lie.
//   S  = Q K^T           rows Q,      panels K by keys          P = exp(scale * S - lse)
//   dP = dO V^T          rows dO,     panels V by keys          dS = P * (dP - D)
//   dQ += dS K           rows dS,     panels K by channels
//   dV^T += dO^T P       rows dO^T,   panels P
//   dK^T += Q^T dS       rows Q^T,    panels dS
// Scratch: five matrices of (keys, head_dim).
#include "ops/block_attention/block_attention.h"

#include "ops/block_attention/block_attention_product.h"

namespace starflow::STARFLOW_ISA {
namespace {

inline constexpr int64_t tile = 64;
static_assert(tile % depth_multiple == 0);
inline constexpr int64_t halves = key_block / panel_columns;

struct Scratch {
    // Of all keys: panels by keys of K and V, panels by channels of K, transposed gradients (keys / 32, head_dim, 32).
    char* key_columns;
    char* value_columns;
    char* key_depth;
    float* grad_key;
    float* grad_value;
    // Of a tile: packed rows, and packed channels.
    char* query_rows;
    char* grad_rows;
    char* query_channels;
    char* grad_channels;
    char* gathered;
    float* grad_query;    // (panels, 64, 32)
    float* products;      // (2, 64, 32): S, then P
    float* grad_weight;   // (2, 64, 32): dP, then dS
    char* weight_panels;  // P and dS as panels of the product's storage, where that is not float32
    char* grad_weight_panels;
    char* grad_weight_rows;
    float* logs;
    float* dots;
    VisibleKeys* visible;
    int64_t bytes;

    Scratch(const AttentionBackwardArgs& args, char* memory) {
        int64_t offset = 0;
        const auto take = [&](int64_t size) {
            char* taken = memory + offset;
            // An odd number of lines: buffers of the same size would fall into the same sets of a cache.
            offset += round_up(size, 128) + 64;
            return taken;
        };
        const auto floats = [&](int64_t count) { return reinterpret_cast<float*>(take(count * 4)); };
        const int64_t head_dim = round_up(args.shape.head_dim, depth_multiple);
        const int64_t keys = round_up(args.shape.keys, key_block);
        key_columns = take(panels_bytes(keys, head_dim));
        value_columns = take(panels_bytes(keys, head_dim));
        key_depth = take(panels_bytes(keys, head_dim));
        grad_key = floats(keys * head_dim);
        grad_value = floats(keys * head_dim);
        query_rows = take(packed_bytes(tile, head_dim));
        grad_rows = take(packed_bytes(tile, head_dim));
        query_channels = take(packed_bytes(head_dim, tile));
        grad_channels = take(packed_bytes(head_dim, tile));
        gathered = take(tile * head_dim * 4);
        grad_query = floats(tile * head_dim);
        products = floats(tile * key_block);
        grad_weight = floats(tile * key_block);
        weight_panels = take(tile * key_block * 4);
        grad_weight_panels = take(tile * key_block * 4);
        grad_weight_rows = take(packed_bytes(tile, key_block));
        logs = floats(tile);
        dots = floats(tile);
        visible = reinterpret_cast<VisibleKeys*>(take(tile * static_cast<int64_t>(sizeof(VisibleKeys))));
        bytes = offset;
    }
};

// sums += or = rows times one panel. All rows here are multiples of 32: on tiles every group is whole.
template <class Product>
inline void multiply_rows(const PackedRows& rows, const char* panel, float* sums, bool accumulate) {
    for (int64_t g = 0; g < rows.groups(); g += strip_groups<Product>) {
        multiply_strip<Product>(rows, g, panel, sums + g * rows.group * panel_columns, accumulate);
    }
}

// Two rows of sums, 32 columns, as a pair of rows of a panel of depth.
template <class Product>
inline void put_pair_of_rows([[maybe_unused]] char* panel, [[maybe_unused]] int64_t row,
                             [[maybe_unused]] const float* sums) {
#if defined(__AVX512BF16__)
    if constexpr (Product::weight_step != panel_columns * 4) {
        alignas(64) BFloat16 rounded[2][panel_columns];
        for (int64_t i = 0; i < 2; ++i) {
            for (int64_t c = 0; c < panel_columns; c += Vec<float>::lanes) {
                store(rounded[i] + c, load(sums + i * panel_columns + c, AllLanes{}), AllLanes{});
            }
        }
        Pairs first;
        Pairs last;
        interleave(load_pairs(rounded[0]), load_pairs(rounded[1]), first, last);
        auto* to = reinterpret_cast<BFloat16*>(panel) + row * panel_columns;
        store_pairs(to, first);
        store_pairs(to + panel_columns, last);
    }
#endif
}

template <class Product, class T>
struct Head {
    const AttentionBackwardArgs& args;
    const AttentionShape& shape;
    const Scratch& scratch;
    int64_t b;
    int64_t kv_head;
    int64_t head_dim;  // padded
    int64_t keys;      // padded
    float scale;

    static constexpr bool as_sums = Product::weight_step == panel_columns * 4;  // panels of float32
    static constexpr int64_t row_bytes = Product::weight_step;

    Head(const AttentionBackwardArgs& a, const Scratch& s, int64_t sample, int64_t head)
        : args(a),
          shape(a.shape),
          scratch(s),
          b(sample),
          kv_head(head),
          head_dim(round_up(a.shape.head_dim, depth_multiple)),
          keys(round_up(a.shape.keys, key_block)),
          scale(scale_of(a.scale, sample)) {}

    void pack_keys() const {
        // What any query sees: its bounds grow with the position. Elsewhere there are zeros in place of keys and
        // values.
        const VisibleKeys least = visible_keys(args.mask, shape, b, 0);
        const VisibleKeys most = visible_keys(args.mask, shape, b, shape.queries - 1);
        const int64_t last = most.last > most.prefix ? most.last : most.prefix;
        const int64_t end = last < 0 ? 0 : last;
        const int64_t gap_end = least.first < end ? least.first : end;
        const auto seen_rows = [&](const HeadRows& rows) {
            return BlockRows<T>{
                head_at<const T>(rows, b, kv_head), rows.row_stride, end, shape.head_dim, most.prefix, gap_end};
        };
        const BlockRows<T> k = seen_rows(args.k);
        const BlockRows<T> v = seen_rows(args.v);
        pack_columns<Product>(k, keys, head_dim, scratch.key_columns);
        pack_columns<Product>(v, keys, head_dim, scratch.value_columns);
        pack_depth<Product>(k, keys, keys, scratch.key_depth);
        zero_row<Vec<float>>(scratch.grad_key, keys * head_dim);
        zero_row<Vec<float>>(scratch.grad_value, keys * head_dim);
    }

    // Copies rows [first, first + rows) of the key head into neighbouring rows of head_dim elements; zeros for queries
    // that see no key.
    BlockRows<T> gather(const HeadRows& from, int64_t first, int64_t rows) const {
        auto* to = reinterpret_cast<T*>(scratch.gathered);
        for (int64_t r = 0; r < rows; ++r) {
            T* const copy = to + r * head_dim;
            if (sees_any(scratch.visible[r])) {
                copy_row<Vec<float>>(row_at<const T>(from, shape, b, kv_head, first + r), copy, shape.head_dim);
            } else {
                zero_row<Vec<float>>(copy, shape.head_dim);
            }
        }
        return {to, head_dim, rows, shape.head_dim};
    }

    void pack_rows(const BlockRows<T>& rows, char* to) const {
        const PackedRows packed = packed_rows<Product>(to, tile, shape.head_dim);
        for (int64_t r = 0; r < tile; ++r) {
            pack_row<Product>(packed, r, head_dim, [&](int64_t c, auto) { return load_padded(rows, r, c); });
        }
    }

    static bool sees_any(const VisibleKeys& seen) { return seen.prefix > 0 || seen.first < seen.last; }

    void pack_tile(int64_t first, int64_t rows) const {
        for (int64_t r = 0; r < tile; ++r) {
            scratch.visible[r] = {0, 0, 0};
            if (r < rows) scratch.visible[r] = visible_keys(args.mask, shape, b, (first + r) / group_of(shape));
        }
        const BlockRows<T> queries = gather(args.q, first, rows);
        pack_rows(queries, scratch.query_rows);
        pack_channels<Product>(queries, packed_rows<Product>(scratch.query_channels, head_dim, tile));
        const BlockRows<T> grads = gather(args.grad_out, first, rows);
        pack_rows(grads, scratch.grad_rows);
        pack_channels<Product>(grads, packed_rows<Product>(scratch.grad_channels, head_dim, tile));
        for (int64_t r = 0; r < rows; ++r) {
            const T* grad = grads.data + r * grads.stride;
            const T* out = row_at<const T>(args.out, shape, b, kv_head, first + r);
            const int64_t index = index_of(shape, b, kv_head, first + r);
            const float dot = sum_over<Vec<float>>(
                shape.head_dim, [&](int64_t c, auto lanes) { return load(grad + c, lanes) * load(out + c, lanes); });
            scratch.dots[r] = dot - (args.grad_lse != nullptr ? args.grad_lse[index] : 0.0F);
            scratch.logs[r] = args.lse[index] * log2_of_e;
        }
        zero_row<Vec<float>>(scratch.grad_query, tile * head_dim);
    }

    // Computes P and dS of the tile from S and dP, in place; dS also as packed rows.
    void weigh_tile(int64_t block) const {
        using V = Vec<float>;
        using Cell = typename Product::Cell;
        const PackedRows packed = packed_rows<Product>(scratch.grad_weight_rows, tile, key_block);
        const V slope(scale * log2_of_e);
        for (int64_t r = 0; r < tile; ++r) {
            const VisibleKeys& seen = scratch.visible[r];
            const bool any = seen.any_in(block, block + key_block);
            const bool all = seen.all_in(block, block + key_block);
            const V log(scratch.logs[r]);
            const V dot(scratch.dots[r]);
            char* cell = packed.row(r);
            const int64_t stride = packed.stride(r);
            for (int64_t k = 0; k < key_block; k += V::lanes) {
                const int64_t at = (k / panel_columns * tile + r) * panel_columns + k % panel_columns;
                float* weight = scratch.products + at;
                float* grad = scratch.grad_weight + at;
                V p(0.0F);
                V ds(0.0F);
                if (any) {
                    p = power_of_two(maximum(V(least_power), load(weight, AllLanes{}) * slope - log));
                    ds = p * (load(grad, AllLanes{}) - dot);
                }
                store(weight, p, AllLanes{});
                store(grad, ds, AllLanes{});
                if (any && !all) {
                    for (int64_t i = 0; i < V::lanes; ++i) {
                        if (!seen.any_in(block + k + i, block + k + i + 1)) weight[i] = grad[i] = 0.0F;
                    }
                    ds = load(grad, AllLanes{});
                }
                auto* to = reinterpret_cast<Cell*>(cell + k / Product::cell * stride);
                store(to + k % Product::cell, ds, AllLanes{});
            }
        }
    }

    // The panels by which a product reads P or dS.
    const char* panels_of(const float* sums, char* panels) const {
        if constexpr (as_sums) return reinterpret_cast<const char*>(sums);
        for (int64_t half = 0; half < halves; ++half) {
            for (int64_t r = 0; r < tile; r += 2) {
                put_pair_of_rows<Product>(panels + half * tile * row_bytes, r,
                                          sums + (half * tile + r) * panel_columns);
            }
        }
        return panels;
    }

    void pass(int64_t block) const {
        const int64_t panel = block / panel_columns;
        const PackedRows queries = packed_rows<Product>(scratch.query_rows, tile, shape.head_dim);
        const PackedRows grads = packed_rows<Product>(scratch.grad_rows, tile, shape.head_dim);
        for (int64_t half = 0; half < halves; ++half) {
            const int64_t at = (panel + half) * head_dim * row_bytes;
            float* const products = scratch.products + half * tile * panel_columns;
            float* const grad_weight = scratch.grad_weight + half * tile * panel_columns;
            multiply_rows<Product>(queries, scratch.key_columns + at, products, false);
            multiply_rows<Product>(grads, scratch.value_columns + at, grad_weight, false);
        }
        weigh_tile(block);
        const PackedRows grad_weights = packed_rows<Product>(scratch.grad_weight_rows, tile, key_block);
        for (int64_t p = 0; p < head_dim / panel_columns; ++p) {
            multiply_rows<Product>(grad_weights, scratch.key_depth + (p * keys + block) * row_bytes,
                                   scratch.grad_query + p * tile * panel_columns, true);
        }
        const PackedRows query_channels = packed_rows<Product>(scratch.query_channels, head_dim, tile);
        const PackedRows grad_channels = packed_rows<Product>(scratch.grad_channels, head_dim, tile);
        const char* weights = panels_of(scratch.products, scratch.weight_panels);
        const char* slopes = panels_of(scratch.grad_weight, scratch.grad_weight_panels);
        for (int64_t half = 0; half < halves; ++half) {
            const int64_t at = (panel + half) * head_dim * panel_columns;
            multiply_rows<Product>(grad_channels, weights + half * tile * row_bytes, scratch.grad_value + at, true);
            multiply_rows<Product>(query_channels, slopes + half * tile * row_bytes, scratch.grad_key + at, true);
        }
    }

    void write_grad_query(int64_t first, int64_t rows) const {
        for (int64_t r = 0; r < rows; ++r) {
            T* to = row_at<T>(args.grad_q, shape, b, kv_head, first + r);
            over_channels<Vec<float>>(shape.head_dim, [&](int64_t c, auto lanes) {
                const float* from =
                    scratch.grad_query + (c / panel_columns * tile + r) * panel_columns + c % panel_columns;
                store(to + c, load(from, lanes) * Vec<float>(scale), lanes);
            });
        }
    }

    // Writes rows of keys from sums (keys / 32, head_dim, 32).
    void write_grad_keys(const float* sums, const HeadRows& rows, float factor) const {
        using V = Vec<float>;
        T* const to = head_at<T>(rows, b, kv_head);
        for (int64_t key = 0; key < shape.keys; key += V::lanes) {
            const float* panel = sums + key / panel_columns * head_dim * panel_columns + key % panel_columns;
            for (int64_t c = 0; c < shape.head_dim; c += V::lanes) {
                V turned[V::lanes];
                for (int64_t i = 0; i < V::lanes; ++i) turned[i] = load(panel + (c + i) * panel_columns, AllLanes{});
                transpose(turned);
                const int64_t left = shape.head_dim - c;
                for (int64_t i = 0; i < V::lanes && key + i < shape.keys; ++i) {
                    T* at = to + (key + i) * rows.row_stride + c;
                    const V value = turned[i] * V(factor);
                    if (left >= V::lanes) {
                        store(at, value, AllLanes{});
                    } else {
                        store(at, value, FirstLanes{static_cast<int>(left)});
                    }
                }
            }
        }
    }

    void run() const {
        pack_keys();
        const int64_t all = rows_of(shape);
        for (int64_t first = 0; first < all; first += tile) {
            const int64_t rows = all - first < tile ? all - first : tile;
            pack_tile(first, rows);
            for (int64_t block = 0; block < shape.keys; block += key_block) {
                bool any = false;
                for (int64_t r = 0; r < rows; ++r) any |= scratch.visible[r].any_in(block, block + key_block);
                if (any) pass(block);
            }
            write_grad_query(first, rows);
        }
        write_grad_keys(scratch.grad_key, args.grad_k, scale);
        write_grad_keys(scratch.grad_value, args.grad_v, 1.0F);
    }
};

int64_t scratch_bytes(const AttentionBackwardArgs& args) { return Scratch(args, nullptr).bytes; }

void backward(const AttentionBackwardArgs& args, int64_t begin, int64_t end, void* memory) {
    const Scratch scratch(args, static_cast<char*>(memory));
    visit_attention(args.shape.data, [&](auto element, auto product) {
        using Product = decltype(product);
        const Strips<Product> strips(even_groups(tile, Product::most_rows));
        for (int64_t item = begin; item < end; ++item) {
            Head<Product, decltype(element)>(args, scratch, item / args.shape.kv_heads, item % args.shape.kv_heads)
                .run();
        }
    });
}

}  // namespace

const AttentionBackwardKernels block_attention_backward{scratch_bytes, backward};

}  // namespace starflow::STARFLOW_ISA
