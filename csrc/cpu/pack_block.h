// Rows of a matrix in memory as operands of the products of csrc/cpu/matmul.h, packed while a kernel runs: keys, values
// and gradients of attention. For kernel files.
//
// Of a block X of `count` rows of `depth` channels, padded with zeros:
//   pack_columns   panels whose columns are the rows:      products Y X^T    (keys)
//   pack_depth     panels whose depth runs along the rows: products Y X      (values)
//   pack_channels  packed rows that are the channels:      products X^T Y
// Turning 16 rows of 16 channels takes 64 shuffles of registers; a product of 64 rows with them takes 1024.
#pragma once
#include "cpu/matmul.h"

namespace starflow::STARFLOW_ISA {
namespace {

// Consecutive rows whose channels lie side by side. pack_depth writes zeros for the rows of the gap: their weights are
// zero, and zero times what lies there may be NaN.
template <class T>
struct BlockRows {
    const T* data;
    int64_t stride;
    int64_t count;
    int64_t depth;
    int64_t gap_begin = 0;
    int64_t gap_end = 0;

    bool in_gap(int64_t r) const { return r >= gap_begin && r < gap_end; }
};

// One register of channels, zeros outside of the block.
template <class T>
inline Vec<float> load_padded(const BlockRows<T>& rows, int64_t r, int64_t c) {
    using V = Vec<float>;
    const int64_t left = rows.depth - c;
    if (r >= rows.count || left <= 0) return V(0.0F);
    const T* from = rows.data + r * rows.stride + c;
    if (left >= V::lanes) return load(from, AllLanes{});
    const FirstLanes some{static_cast<int>(left)};
    return keep(load(from, some), some, 0.0F);
}

// Channels [c, c + lanes) of rows [r, r + lanes): turned[i] holds channel c + i of each.
template <class T>
inline void load_turned(const BlockRows<T>& rows, int64_t r, int64_t c, Vec<float> (&turned)[Vec<float>::lanes]) {
    using V = Vec<float>;
    if (r + V::lanes <= rows.count && c + V::lanes <= rows.depth) {
        const T* from = rows.data + r * rows.stride + c;
        for (int64_t i = 0; i < V::lanes; ++i) turned[i] = load(from + i * rows.stride, AllLanes{});
    } else {
        for (int64_t i = 0; i < V::lanes; ++i) turned[i] = load_padded(rows, r + i, c);
    }
    transpose(turned);
}

// How a product's panels are written: the same steps for each of its layouts.
template <class Product>
struct BlockPacking;

template <>
struct BlockPacking<WidenedProduct<float>> {
    using V = Vec<float>;

    template <class T>
    static void columns(const BlockRows<T>& rows, int64_t padded_rows, int64_t panel_depth, char* panels) {
        auto* to = reinterpret_cast<float*>(panels);
        for (int64_t r = 0; r < padded_rows; r += V::lanes) {
            float* panel = to + r / panel_columns * panel_depth * panel_columns + r % panel_columns;
            for (int64_t c = 0; c < panel_depth; c += V::lanes) {
                V turned[V::lanes];
                load_turned(rows, r, c, turned);
                for (int64_t i = 0; i < V::lanes; ++i) store(panel + (c + i) * panel_columns, turned[i], AllLanes{});
            }
        }
    }

    template <class T>
    static void depth(const BlockRows<T>& rows, int64_t padded_rows, int64_t panel_rows, char* panels) {
        const int64_t padded = round_up(rows.depth, panel_columns);
        for (int64_t c = 0; c < padded; c += panel_columns) {
            float* to = reinterpret_cast<float*>(panels) + c * panel_rows;
            int64_t r = 0;
            if (c + panel_columns <= rows.depth) {
                const T* from = rows.data + c;
                const auto copy = [&](int64_t end) {
                    for (; r < end; ++r, from += rows.stride, to += panel_columns) {
                        for (int64_t i = 0; i < panel_columns; i += V::lanes)
                            store(to + i, load(from + i, AllLanes{}), AllLanes{});
                    }
                };
                if (rows.gap_begin < rows.gap_end) {
                    copy(rows.gap_begin);
                    for (; r < rows.gap_end; ++r, from += rows.stride, to += panel_columns) {
                        for (int64_t i = 0; i < panel_columns; i += V::lanes) store(to + i, V(0.0F), AllLanes{});
                    }
                }
                copy(rows.count);
            }
            for (; r < padded_rows; ++r, to += panel_columns) {
                for (int64_t i = 0; i < panel_columns; i += V::lanes) {
                    store(to + i, rows.in_gap(r) ? V(0.0F) : load_padded(rows, r, c + i), AllLanes{});
                }
            }
        }
    }
};

#if defined(__AVX512BF16__)
// Pairs of bfloat16, which shuffles move as one float: values are bfloat16 already.
template <>
struct BlockPacking<PairsProduct> {
    using V = Vec<float>;

    static Pairs load_row(const BlockRows<BFloat16>& rows, int64_t r, int64_t c) {
        const int64_t left = rows.depth - c;
        if (r >= rows.count || left <= 0) return load_pairs(rows.data, 0);
        const BFloat16* from = rows.data + r * rows.stride + c;
        return left >= 2 * V::lanes ? load_pairs(from) : load_pairs(from, static_cast<int>(left));
    }

    static void columns(const BlockRows<BFloat16>& rows, int64_t padded_rows, int64_t panel_depth, char* panels) {
        auto* to = reinterpret_cast<float*>(panels);
        for (int64_t r = 0; r < padded_rows; r += V::lanes) {
            float* panel = to + r / panel_columns * panel_depth / 2 * panel_columns + r % panel_columns;
            for (int64_t c = 0; c < panel_depth; c += 2 * V::lanes) {
                V turned[V::lanes];
                if (r + V::lanes <= rows.count && c + 2 * V::lanes <= rows.depth) {
                    const BFloat16* from = rows.data + r * rows.stride + c;
                    for (int64_t i = 0; i < V::lanes; ++i) turned[i] = as_floats(load_pairs(from + i * rows.stride));
                } else {
                    for (int64_t i = 0; i < V::lanes; ++i) turned[i] = as_floats(load_row(rows, r + i, c));
                }
                transpose(turned);
                for (int64_t i = 0; i < V::lanes; ++i) {
                    store(panel + (c / 2 + i) * panel_columns, turned[i], AllLanes{});
                }
            }
        }
    }

    static void depth(const BlockRows<BFloat16>& rows, int64_t padded_rows, int64_t panel_rows, char* panels) {
        const auto row_of = [&](int64_t r, int64_t c) {
            return rows.in_gap(r) ? load_pairs(rows.data, 0) : load_row(rows, r, c);
        };
        auto* to = reinterpret_cast<BFloat16*>(panels);
        const int64_t padded = round_up(rows.depth, panel_columns);
        for (int64_t r = 0; r < padded_rows; r += 2) {
            for (int64_t c = 0; c < padded; c += panel_columns) {
                Pairs first;
                Pairs last;
                interleave(row_of(r, c), row_of(r + 1, c), first, last);
                BFloat16* at = to + c * panel_rows + r * panel_columns;
                store_pairs(at, first);
                store_pairs(at + panel_columns, last);
            }
        }
    }
};
#endif

#if defined(STARFLOW_TILES) && defined(__AVX512BF16__)
template <>
struct BlockPacking<TileProduct<1, 1>> : BlockPacking<PairsProduct> {};
#endif

// Writes panels (padded_rows / 32) of depth `panel_depth`.
template <class Product, class T>
inline void pack_columns(const BlockRows<T>& rows, int64_t padded_rows, int64_t panel_depth, char* panels) {
    BlockPacking<Product>::columns(rows, padded_rows, panel_depth, panels);
}

// Writes `padded_rows` of the `panel_rows` rows of each panel; there is a panel for each 32 channels.
template <class Product, class T>
inline void pack_depth(const BlockRows<T>& rows, int64_t padded_rows, int64_t panel_rows, char* panels) {
    BlockPacking<Product>::depth(rows, padded_rows, panel_rows, panels);
}

// Writes packed rows: `packed.rows` channels, of which `rows.depth` exist.
template <class Product, class T>
inline void pack_channels(const BlockRows<T>& rows, const PackedRows& packed) {
    using V = Vec<float>;
    using Cell = typename Product::Cell;
    for (int64_t r = 0; r < packed.cells * Product::cell; r += V::lanes) {
        for (int64_t c = 0; c < packed.rows; c += V::lanes) {
            V turned[V::lanes];
            load_turned(rows, r, c, turned);
            for (int64_t i = 0; i < V::lanes && c + i < packed.rows; ++i) {
                char* cell = packed.row(c + i) + r / Product::cell * packed.stride(c + i);
                store(reinterpret_cast<Cell*>(cell) + r % Product::cell, turned[i], AllLanes{});
            }
        }
    }
}

}  // namespace
}  // namespace starflow::STARFLOW_ISA
