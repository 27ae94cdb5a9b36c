// Products x W^T of few rows with packed matrices (csrc/cpu/panels.h), on the registers or the tiles of this level.
// For kernel files (<op>_dot.cpp).
//
// Rows are packed too: groups of at most `most_rows` of them, and inside a group cells of 64 bytes along the depth (16
// float32 or 32 bfloat16), [depth / cell][rows of the group][cell]. Packing is a copy of whole registers, the product
// reads each group front to back, and a cell of 16 rows is a tile of AMX.
//
// A group's rows times a panel's 32 columns stay in registers while the depth runs by; a row's sum is taken in the same
// order whatever rows stand beside it, so that a row's result does not depend on them: that is why samples do not
// depend on their batch, nor on the solver's window.
#pragma once
#include "cpu/group_products.h"
#include "cpu/panels.h"
#include "cpu/vec.h"

namespace starflow::STARFLOW_ISA {
namespace {

#define STARFLOW_UNROLL _Pragma("GCC unroll 16")

#if defined(__AVX512F__)
inline constexpr int product_vectors = 2;  // registers of columns at a time; sums take product_vectors * rows of the 32
inline constexpr int most_product_rows = 14;
#elif defined(__AVX2__)
inline constexpr int product_vectors = 2;
inline constexpr int most_product_rows = 6;
#else
inline constexpr int product_vectors = 4;
inline constexpr int most_product_rows = 2;
#endif

// -- how one step reads its operands ----------------------------------------------------------------------------------

inline const MultiplyGroups& widened_groups_of(float) { return widened_groups.float32; }
inline const MultiplyGroups& widened_groups_of(Float16) { return widened_groups.float16; }
inline const MultiplyGroups& widened_groups_of(int8_t) { return widened_groups.int8; }

// Inputs of float32, weights widened to float32 one row of the panel at a time.
template <class Weight>
struct WidenedProduct {
    using Cell = float;
    static constexpr int cell = 16;  // depth of a cell
    static constexpr int terms = 1;  // cells that hold the same depth: their sum is the activation
    static constexpr int weight_terms = 1;
    static constexpr int most_rows = most_product_rows;
    static constexpr int64_t weight_step = panel_columns * static_cast<int64_t>(sizeof(Weight));  // bytes a depth

    static const MultiplyGroups& groups() { return widened_groups_of(Weight{}); }

    template <int rows>
    static void step(const float* a, const char* b, int64_t, int column, Vec<float> (&sums)[rows][product_vectors]) {
        using V = Vec<float>;
        STARFLOW_UNROLL
        for (int k = 0; k < cell; ++k) {
            const Weight* row = reinterpret_cast<const Weight*>(b + k * weight_step) + column;
            V w[product_vectors];
            for (int v = 0; v < product_vectors; ++v) w[v] = load(row + v * V::lanes, AllLanes{});
            STARFLOW_UNROLL
            for (int r = 0; r < rows; ++r) {
                const V x(a[r * cell + k]);
                for (int v = 0; v < product_vectors; ++v) sums[r][v] = multiply_add(x, w[v], sums[r][v]);
            }
        }
    }
};

// Inputs of float32, weights in bfloat16, or as the sum of two of them.
template <int weight_terms_>
struct WidenedPairsProduct {
    using Cell = float;
    static constexpr int cell = 16;
    static constexpr int terms = 1;
    static constexpr int weight_terms = weight_terms_;
    static constexpr int most_rows = most_product_rows;
    static constexpr int64_t weight_step = panel_columns * 2;

    static const MultiplyGroups& groups() {
        return weight_terms == 1 ? widened_groups.bfloat16 : widened_groups.two_bfloat16;
    }

    template <int rows>
    static void step(const float* a, const char* b, int64_t other, int column,
                     Vec<float> (&sums)[rows][product_vectors]) {
        using V = Vec<float>;
        // One depth at a time, so that a pair is loaded twice: both halves of it would take two registers more than
        // AVX2 has beside the sums (70 GFLOP/s in place of 95 on a Zen 3).
        STARFLOW_UNROLL
        for (int k = 0; k < cell; ++k) {
            const char* pairs = b + k / 2 * 2 * weight_step + column * 4;
            const auto half = [k](const char* from) {
                const Pairs pair = load_pairs(reinterpret_cast<const BFloat16*>(from));
                return k % 2 == 0 ? first_of(pair) : second_of(pair);
            };
            V w[product_vectors];
            for (int v = 0; v < product_vectors; ++v) {
                w[v] = half(pairs + v * V::lanes * 4);
                if constexpr (weight_terms == 2) w[v] = w[v] + half(pairs + other + v * V::lanes * 4);
            }
            STARFLOW_UNROLL
            for (int r = 0; r < rows; ++r) {
                const V x(a[r * cell + k]);
                for (int v = 0; v < product_vectors; ++v) sums[r][v] = multiply_add(x, w[v], sums[r][v]);
            }
        }
    }
};

#if defined(__AVX512BF16__)
// Both in bfloat16, two products an instruction.
struct PairsProduct {
    using Cell = BFloat16;
    static constexpr int cell = 32;
    static constexpr int terms = 1;
    static constexpr int weight_terms = 1;
    static constexpr int most_rows = most_product_rows;
    static constexpr int64_t weight_step = panel_columns * 2;

    static const MultiplyGroups& groups() { return pair_groups.pairs; }

    template <int rows>
    static void step(const BFloat16* a, const char* b, int64_t, int column, Vec<float> (&sums)[rows][product_vectors]) {
        using V = Vec<float>;
        STARFLOW_UNROLL
        for (int k = 0; k < cell; k += 2) {
            const BFloat16* pairs = reinterpret_cast<const BFloat16*>(b + k * weight_step) + 2 * column;
            Pairs w[product_vectors];
            for (int v = 0; v < product_vectors; ++v) w[v] = load_pairs(pairs + 2 * v * V::lanes);
            STARFLOW_UNROLL
            for (int r = 0; r < rows; ++r) {
                const Pairs x = broadcast_pair(a + r * cell + k);
                for (int v = 0; v < product_vectors; ++v) sums[r][v] = multiply_add_pairs(x, w[v], sums[r][v]);
            }
        }
    }
};
#endif

// -- what to fetch of the weights that come next ----------------------------------------------------------------------

// Depth of the part of a panel that all groups of rows pass over before the next part: 16 KB, half of the first-level
// cache, the other half being the rows'.
inline constexpr int64_t block_bytes = 16 * 1024;

// Prefetches into the second-level cache, as the first is full. `other` is the distance to the weights' second term.
template <class Product>
inline void fetch(const char*& next, const Ahead& ahead, int64_t other) {
    if (next == nullptr) return;
    for (int64_t l = 0; l < ahead.lines; ++l, next += 64) {
        __builtin_prefetch(next, 0, 2);
        if constexpr (Product::weight_terms == 2) __builtin_prefetch(next + other, 0, 2);
    }
}

// The lines two parts ahead, fetched in equal shares by the groups that pass over the present part. One group that
// fetched all would hold the buffers that loads need: 64 rows on tiles of a Xeon, weights in the third-level cache and
// in memory, 2.3 and 1.2 TFLOP/s, with shares 2.65 and 1.75, without fetches 1.0 and 1.0; 16 rows on a core of a Zen 3,
// float32, weights in memory: 67 GFLOP/s where the last group fetches all, with shares 87, without fetches 62.
template <class Product>
class FetchShares {
  public:
    // `cells` is the number of cells along the weights' depth.
    FetchShares(const Panels& weights, int64_t cells, int64_t shares)
        : panel_bytes_(weights.panel_bytes()),
          depth_bytes_(cells * cell_weight),
          lines_((lines + shares - 1) / shares) {}

    // What share number `share` fetches while `cells` cells from `cell` on are multiplied.
    Ahead share(int64_t share, const char* panel, int64_t cell, int64_t cells) const {
        if (share * lines_ >= lines) return {nullptr, 0};
        const int64_t at = cell * cell_weight + 2 * block_bytes;
        // The lines are those of the next panel where this one ends before them.
        const char* next = panel + (at < depth_bytes_ ? at : panel_bytes_ + at - depth_bytes_);
        return {next + share * lines_ * cells * 64, lines_};
    }

  private:
    static constexpr int64_t cell_weight = Product::cell * Product::weight_step;
    static constexpr int64_t lines = cell_weight / 64;
    int64_t panel_bytes_;
    int64_t depth_bytes_;
    int64_t lines_;
};

// -- a group of rows times a panel ------------------------------------------------------------------------------------

// sums (rows, 32) += or = the product over `cells` cells. `other`: bytes to the second term of the weights.
template <class Product, int rows>
void multiply_group(const void* cells_of_rows, const char* panel, int64_t other, const Ahead& ahead, int64_t cells,
                    float* sums, bool accumulate) {
    using V = Vec<float>;
    using Cell = typename Product::Cell;
    const char* next = ahead.next;
    for (int column = 0; column < panel_columns; column += product_vectors * V::lanes) {
        V sum[rows][product_vectors];
        STARFLOW_UNROLL
        for (int r = 0; r < rows; ++r) {
            for (int v = 0; v < product_vectors; ++v) {
                const float* from = sums + r * panel_columns + column + v * V::lanes;
                sum[r][v] = accumulate ? load(from, AllLanes{}) : V(0.0F);
            }
        }
        const auto* a = static_cast<const Cell*>(cells_of_rows);
        const char* b = panel;
        for (int64_t i = 0; i < cells; ++i) {
            fetch<Product>(next, ahead, other);
            Product::template step<rows>(a, b, other, column, sum);
            a += rows * Product::cell;
            b += Product::cell * Product::weight_step;
        }
        STARFLOW_UNROLL
        for (int r = 0; r < rows; ++r) {
            for (int v = 0; v < product_vectors; ++v) {
                store(sums + r * panel_columns + column + v * V::lanes, sum[r][v], AllLanes{});
            }
        }
    }
}

// The function that multiplies `rows` rows at a time.
template <class Product>
inline MultiplyGroup group_product(int64_t rows) {
    return Product::groups()[rows - 1];
}

// For the files that define the tables.
template <class Product, int rows = Product::most_rows>
constexpr void fill_groups(MultiplyGroups& groups) {
    static_assert(rows <= most_group_rows);
    if constexpr (rows > 0) {
        groups[rows - 1] = multiply_group<Product, rows>;
        fill_groups<Product, rows - 1>(groups);
    }
}

// -- packed rows ------------------------------------------------------------------------------------------------------

// The rows of a product: `rows` of depth `cells / terms * cell`, in groups of `group` (the last may be smaller).
struct PackedRows {
    char* data;
    int64_t rows;
    int64_t cells;  // of a row; terms of the same depth side by side
    int64_t group;

    int64_t groups() const { return (rows + group - 1) / group; }
    int64_t rows_in(int64_t g) const { return g * group + group <= rows ? group : rows - g * group; }
    char* group_data(int64_t g) const { return data + g * group * cells * cell_bytes; }
    // Cell `index` of a row; the next is `stride(row)` bytes further.
    char* row(int64_t r) const { return group_data(r / group) + r % group * cell_bytes; }
    int64_t stride(int64_t r) const { return rows_in(r / group) * cell_bytes; }
};

// Groups of nearly the same size.
inline int64_t even_groups(int64_t rows, int64_t most) {
    const int64_t groups = (rows + most - 1) / most;
    return groups == 0 ? 1 : (rows + groups - 1) / groups;
}

template <class Product>
inline PackedRows packed_rows(void* data, int64_t rows, int64_t depth) {
    return {static_cast<char*>(data), rows, round_up(depth, depth_multiple) / Product::cell * Product::terms,
            even_groups(rows, Product::most_rows)};
}

// Bytes of the sums of a panel. On tiles a smaller last group is summed whole: up to 15 rows behind the last.
inline constexpr int64_t sums_bytes(int64_t rows) {
    return (rows + 15) * panel_columns * static_cast<int64_t>(sizeof(float));
}

// Most bytes that packed rows take, in any product of this level. A tile of a smaller last group is read whole: up to
// 16 cells behind the rows.
inline constexpr int64_t packed_bytes(int64_t rows, int64_t depth) {
    return rows * round_up(depth, depth_multiple) * static_cast<int64_t>(sizeof(float)) + 16 * cell_bytes;
}

// Cells [first, last) of row r from `value(channel, lanes)`, a register of 'lanes' channels at a time; zeros behind the
// depth. `first` and `last` are multiples of the terms.
template <class Product, class Value>
inline void pack_cells(const PackedRows& packed, int64_t r, int64_t first, int64_t last, int64_t depth,
                       const Value& value) {
    using V = Vec<float>;
    using Cell = typename Product::Cell;
    const int64_t stride = packed.stride(r);
    char* to = packed.row(r) + first * stride;
    for (int64_t i = first; i < last; i += Product::terms, to += Product::terms * stride) {
        auto* cell = reinterpret_cast<Cell*>(to);
        for (int k = 0; k < Product::cell; k += V::lanes) {
            const int64_t c = i / Product::terms * Product::cell + k;
            V a(0.0F);
            if (c + V::lanes <= depth) {
                a = value(c, AllLanes{});
            } else if (c < depth) {
                const FirstLanes left{static_cast<int>(depth - c)};
                a = keep(value(c, left), left, 0.0F);
            }
            store(cell + k, a, AllLanes{});
            if constexpr (Product::terms == 2) {
                const V high = load(cell + k, AllLanes{});
                // The rest of infinity and of NaN is zero, so that both stay what they are.
                const V rest = select_greater(V(__builtin_inff()), absolute(high), a - high, V(0.0F));
                store(reinterpret_cast<Cell*>(to + stride) + k, rest, AllLanes{});
            }
        }
    }
}

// A whole row.
template <class Product, class Value>
inline void pack_row(const PackedRows& packed, int64_t r, int64_t depth, const Value& value) {
    pack_cells<Product>(packed, r, 0, packed.cells, depth, value);
}

// -- the whole product ------------------------------------------------------------------------------------------------

// Where the weights have more bytes than this, they come from beyond the second-level cache.
inline constexpr int64_t second_level_bytes = 1 << 20;

// Whether a product runs on tiles instead of registers: such a product has its own multiply_panels, in amx.h.
template <class Product>
inline constexpr bool on_tiles = false;

}  // namespace
}  // namespace starflow::STARFLOW_ISA

#if defined(__AMX_BF16__) || defined(STARFLOW_EMULATE_AMX)
#define STARFLOW_TILES 1
#include "cpu/amx.h"
#endif

namespace starflow::STARFLOW_ISA {
namespace {

// Rows that multiply_strip multiplies at a time: one group in registers, two on tiles.
template <class Product>
inline constexpr int64_t strip_groups = on_tiles<Product> ? 2 : 1;
template <class Product>
inline constexpr int64_t most_strip_rows = strip_groups<Product> * Product::most_rows;

// The strip that begins with group g times one panel over the whole depth: sums (its rows, 32) += or = the product. For
// loops that do something else between products; tiles must be configured for the group (`Strips`).
template <class Product>
inline void multiply_strip(const PackedRows& rows, int64_t g, const char* panel, float* sums, bool accumulate) {
    if constexpr (on_tiles<Product>) {
        multiply_pair<Product>(rows, g, 0, panel, 0, rows.cells, sums, accumulate, {nullptr, 0});
    } else {
        group_product<Product>(rows.rows_in(g))(rows.group_data(g), panel, 0, {nullptr, 0}, rows.cells, sums,
                                                accumulate);
    }
}

// What must live while strips of groups of `group` rows are multiplied.
template <bool tiles>
struct StripUnit {
    explicit StripUnit(int64_t) {}
};
#if defined(STARFLOW_TILES)
template <>
struct StripUnit<true> {
    explicit StripUnit(int64_t group) : tiles(group) {}
    Tiles tiles;
};
#endif
template <class Product>
using Strips = StripUnit<on_tiles<Product>>;

// Computes the sums (rows, 32) of each of the panels [first, last) of `weights`, then calls epilogue(panel, sums).
template <class Product, class Epilogue>
inline void multiply_panels(const PackedRows& rows, const Panels& weights, int64_t first, int64_t last, float* sums,
                            const Epilogue& epilogue) {
    if (rows.cells == 0) {
        for (int64_t i = 0; i < rows.rows * panel_columns; ++i) sums[i] = 0.0F;
    }
    if constexpr (on_tiles<Product>) {
        multiply_panels_on_tiles<Product>(rows, weights, first, last, sums, epilogue);
    } else {
        constexpr int64_t cell_weight = Product::cell * Product::weight_step;
        constexpr int64_t passes = panel_columns / (product_vectors * Vec<float>::lanes);
        const int64_t groups = rows.groups();
        // One group that finds its weights in the second-level cache is a tenth faster without fetches and parts.
        const bool parted = groups > 1 || (last - first) * weights.panel_bytes() > second_level_bytes;
        const int64_t block = parted ? block_bytes / cell_weight : rows.cells;
        const int64_t other = weights.padded_depth() * panel_columns * 2;
        const FetchShares<Product> ahead(weights, rows.cells, groups * passes);
        for (int64_t p = first; p < last; ++p) {
            const char* panel = static_cast<const char*>(weights.data) + p * weights.panel_bytes();
            for (int64_t cell = 0; cell < rows.cells; cell += block) {
                const int64_t cells = rows.cells - cell < block ? rows.cells - cell : block;
                for (int64_t g = 0; g < groups; ++g) {
                    const int64_t count = rows.rows_in(g);
                    group_product<Product>(count)(
                        rows.group_data(g) + cell * count * cell_bytes, panel + cell * cell_weight, other,
                        parted ? ahead.share(g * passes, panel, cell, cells) : Ahead{nullptr, 0}, cells,
                        sums + g * rows.group * panel_columns, cell > 0);
                }
            }
            epilogue(p, sums);
        }
    }
}

// Calls visitor(Product{}) with the product, in the registers of this level, of weights of this storage and inputs of
// this type: all products that multiply_group takes.
template <class Visitor>
inline void visit_register_product(MatrixStorage storage, [[maybe_unused]] ProductInput product_input,
                                   const Visitor& visitor) {
    switch (storage) {
        case MatrixStorage::float32:
            return visitor(WidenedProduct<float>{});
        case MatrixStorage::float16:
            return visitor(WidenedProduct<Float16>{});
        case MatrixStorage::int8:
            return visitor(WidenedProduct<int8_t>{});
        case MatrixStorage::two_bfloat16:
            return visitor(WidenedPairsProduct<2>{});
        case MatrixStorage::bfloat16:
#if defined(__AVX512BF16__)
            if (product_input == ProductInput::bfloat16) return visitor(PairsProduct{});
#endif
            return visitor(WidenedPairsProduct<1>{});
    }
}

// The same with the tiles of this level, where it has them.
template <class Visitor>
inline void visit_product(MatrixStorage storage, ProductInput product_input, const Visitor& visitor) {
#if defined(STARFLOW_TILES)
    if (storage == MatrixStorage::two_bfloat16 && product_input == ProductInput::two_bfloat16) {
        return visitor(TileProduct<2, 2>{});
    }
    if (storage == MatrixStorage::bfloat16) {
        if (product_input == ProductInput::bfloat16) return visitor(TileProduct<1, 1>{});
        if (product_input == ProductInput::two_bfloat16) return visitor(TileProduct<1, 2>{});
    }
#endif
    visit_register_product(storage, product_input, visitor);
}

}  // namespace
}  // namespace starflow::STARFLOW_ISA
