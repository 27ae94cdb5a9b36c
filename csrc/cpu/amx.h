// Products of bfloat16 on the tiles of AMX. Included by matmul.h alone, in its middle, for the level `amx`.
//
// Times said here are of two cores of a Xeon (Sapphire Rapids or later). On machines without tiles tests/native runs
// this code in emulation.
//
// A tile is 16 rows of 64 bytes, and one instruction adds the product of two of them to a third: 16 rows, 16 columns
// and 32 deep in 16 cycles, when its operands are in the first-level cache. Two groups of rows times the 32 columns of
// a panel are 2 x 2 tiles of sums, fed by 2 tiles of rows and 2 of weights: all eight. A last single group is 1 x 2.
#pragma once
#include "cpu/matmul.h"

namespace starflow::STARFLOW_ISA {
namespace {

// -- tiles ------------------------------------------------------------------------------------------------------------

inline constexpr int tile_rows = 16;
inline constexpr int tile_row_bytes = 64;
inline constexpr int tile_count = 8;

// The layout of the instruction's operand (Intel SDM, LDTILECFG).
struct alignas(64) TileConfig {
    uint8_t palette;
    uint8_t start_row;
    uint8_t reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

#if defined(STARFLOW_EMULATE_AMX)
// One thread's tiles, in memory.
struct EmulatedTiles {
    TileConfig config;
    uint8_t bytes[tile_count][tile_rows][tile_row_bytes];
};
static thread_local EmulatedTiles emulated;

inline void tile_configure(const TileConfig& config) { emulated = {config, {}}; }
inline void tile_release() { emulated = {}; }
template <int tile>
inline void tile_zero() {
    __builtin_memset(emulated.bytes[tile], 0, sizeof(emulated.bytes[tile]));
}
template <int tile>
inline void tile_load(const void* from, int64_t stride) {
    tile_zero<tile>();
    for (int r = 0; r < emulated.config.rows[tile]; ++r) {
        __builtin_memcpy(emulated.bytes[tile][r], static_cast<const char*>(from) + r * stride,
                         emulated.config.row_bytes[tile]);
    }
}
template <int sums, int rows, int weights>
inline void tile_dot() {
    for (int r = 0; r < emulated.config.rows[sums]; ++r) {
        for (int k = 0; k < emulated.config.rows[weights]; ++k) {
            for (int n = 0; n < emulated.config.row_bytes[sums] / 4; ++n) {
                float sum;
                __builtin_memcpy(&sum, emulated.bytes[sums][r] + 4 * n, 4);
                for (int i = 0; i < 2; ++i) {
                    uint16_t a;
                    uint16_t b;
                    __builtin_memcpy(&a, emulated.bytes[rows][r] + 4 * k + 2 * i, 2);
                    __builtin_memcpy(&b, emulated.bytes[weights][k] + 4 * n + 2 * i, 2);
                    sum +=
                        bits_as<float>(static_cast<uint32_t>(a) << 16) * bits_as<float>(static_cast<uint32_t>(b) << 16);
                }
                __builtin_memcpy(emulated.bytes[sums][r] + 4 * n, &sum, 4);
            }
        }
    }
}
template <int tile>
inline void tile_store(void* to, int64_t stride) {
    for (int r = 0; r < emulated.config.rows[tile]; ++r) {
        __builtin_memcpy(static_cast<char*>(to) + r * stride, emulated.bytes[tile][r], emulated.config.row_bytes[tile]);
    }
}
#else
// The instructions are written in assembler: the compiler's intrinsics are macros that take the number of a tile as a
// literal, and do not tell the compiler which memory they read.
inline void tile_configure(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config)); }
inline void tile_release() { __asm__ volatile("tilerelease" ::: "memory"); }
template <int tile>
inline void tile_zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int tile>
inline void tile_load(const void* from, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int sums, int rows, int weights>
inline void tile_dot() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(rows), "i"(weights));
}
template <int tile>
inline void tile_store(void* to, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
}
#endif

// This thread's tiles while it lives: groups of `rows` rows.
class Tiles {
  public:
    explicit Tiles(int64_t rows) {
        TileConfig config{};
        config.palette = 1;
        for (int tile = 0; tile < tile_count; ++tile) {
            config.row_bytes[tile] = tile_row_bytes;
            config.rows[tile] = static_cast<uint8_t>(tile == weights_0 || tile == weights_1 ? tile_rows : rows);
        }
        tile_configure(config);
    }
    ~Tiles() { tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    // Sums of group 0 or 1 in columns [0, 16) and [16, 32), a group's rows, columns of weights.
    enum : int { sums_00, sums_01, sums_10, sums_11, rows_0, rows_1, weights_0, weights_1 };
};

// -- products ---------------------------------------------------------------------------------------------------------

// Weights and rows as one bfloat16 or as the sum of two. Of the four products of two such sums the product of the two
// small terms is left out: it is 2^-16 of the whole.
template <int weight_terms_, int row_terms>
struct TileProduct {
    using Cell = BFloat16;
    static constexpr int cell = 32;
    static constexpr int terms = row_terms;
    static constexpr int weight_terms = weight_terms_;
    static constexpr int most_rows = tile_rows;
    static constexpr int64_t weight_step = panel_columns * 2;
};

inline constexpr int64_t panel_row_bytes = panel_columns * 4;  // a row of sums, and a pair of rows of weights

// One or two groups times the panel, over `cells` cells of each row: sums += or = the product.
template <class Product, int groups>
inline void multiply_tiles(const char* const (&rows)[2], const int64_t (&strides)[2], const char* panel, int64_t other,
                           int64_t cells, float* const (&sums)[2], bool accumulate, const Ahead& ahead) {
    constexpr int64_t half = 64;  // bytes of 16 columns
    if (accumulate) {
        tile_load<Tiles::sums_00>(sums[0], panel_row_bytes);
        tile_load<Tiles::sums_01>(sums[0] + 16, panel_row_bytes);
        if constexpr (groups == 2) {
            tile_load<Tiles::sums_10>(sums[1], panel_row_bytes);
            tile_load<Tiles::sums_11>(sums[1] + 16, panel_row_bytes);
        }
    } else {
        tile_zero<Tiles::sums_00>();
        tile_zero<Tiles::sums_01>();
        if constexpr (groups == 2) {
            tile_zero<Tiles::sums_10>();
            tile_zero<Tiles::sums_11>();
        }
    }
    constexpr int64_t weight_cell = Product::cell * Product::weight_step;
    // Loads stand between products that do not wait for them: this is 5 % faster than all loads first.
    const auto multiply = [&](int64_t cell, const char* weights) {
        tile_load<Tiles::rows_0>(rows[0] + cell * strides[0], cell_bytes);
        tile_load<Tiles::weights_0>(weights, panel_row_bytes);
        tile_dot<Tiles::sums_00, Tiles::rows_0, Tiles::weights_0>();
        tile_load<Tiles::weights_1>(weights + half, panel_row_bytes);
        tile_dot<Tiles::sums_01, Tiles::rows_0, Tiles::weights_1>();
        if constexpr (groups == 2) {
            tile_load<Tiles::rows_1>(rows[1] + cell * strides[1], cell_bytes);
            tile_dot<Tiles::sums_10, Tiles::rows_1, Tiles::weights_0>();
            tile_dot<Tiles::sums_11, Tiles::rows_1, Tiles::weights_1>();
        }
    };
    const char* next = ahead.next;
    for (int64_t i = 0; i < cells; ++i) {
        const char* weights = panel + i * weight_cell;
        // The small products are added first.
        if constexpr (Product::weight_terms == 2) multiply(2 * i, weights + other);
        if constexpr (Product::terms == 2) multiply(2 * i + 1, weights);
        multiply(Product::terms * i, weights);
        fetch<Product>(next, ahead, other);
    }
    tile_store<Tiles::sums_00>(sums[0], panel_row_bytes);
    tile_store<Tiles::sums_01>(sums[0] + 16, panel_row_bytes);
    if constexpr (groups == 2) {
        tile_store<Tiles::sums_10>(sums[1], panel_row_bytes);
        tile_store<Tiles::sums_11>(sums[1] + 16, panel_row_bytes);
    }
}

template <int weight_terms, int row_terms>
inline constexpr bool on_tiles<TileProduct<weight_terms, row_terms>> = true;

// Groups g and g + 1 (if there is one) over `cells` cells from `cell` on, times the panel from there on. `sums` are
// those of the strip, with room for both groups whole.
template <class Product>
inline void multiply_pair(const PackedRows& rows, int64_t g, int64_t cell, const char* panel, int64_t other,
                          int64_t cells, float* sums, bool accumulate, const Ahead& ahead) {
    const char* data[2] = {};
    int64_t strides[2] = {};
    float* const to[2] = {sums, sums + rows.group * panel_columns};
    const int64_t groups = g + 1 < rows.groups() ? 2 : 1;
    for (int64_t i = 0; i < groups; ++i) {
        strides[i] = rows.rows_in(g + i) * cell_bytes;
        data[i] = rows.group_data(g + i) + cell * Product::terms * strides[i];
    }
    if (groups == 2) {
        multiply_tiles<Product, 2>(data, strides, panel, other, cells, to, accumulate, ahead);
    } else {
        multiply_tiles<Product, 1>(data, strides, panel, other, cells, to, accumulate, ahead);
    }
}

template <class Product, class Epilogue>
inline void multiply_panels_on_tiles(const PackedRows& rows, const Panels& weights, int64_t first, int64_t last,
                                     float* sums, const Epilogue& epilogue) {
    constexpr int64_t weight_cell = Product::cell * Product::weight_step;
    const int64_t all = rows.cells / Product::terms;
    const int64_t pairs = (rows.groups() + 1) / 2;
    // One pair of groups streams the panel; several pass over a part of it that stays in the first-level cache.
    const int64_t block = pairs == 1 ? all : block_bytes / weight_cell;
    const int64_t other = weights.padded_depth() * panel_columns * static_cast<int64_t>(sizeof(BFloat16));
    const FetchShares<Product> ahead(weights, all, pairs);
    const Tiles tiles(rows.group);
    for (int64_t p = first; p < last; ++p) {
        const char* panel = static_cast<const char*>(weights.data) + p * weights.panel_bytes();
        for (int64_t cell = 0; cell < all; cell += block) {
            const int64_t cells = all - cell < block ? all - cell : block;
            const char* part = panel + cell * weight_cell;
            for (int64_t pair = 0; pair < pairs; ++pair) {
                multiply_pair<Product>(rows, 2 * pair, cell, part, other, cells,
                                       sums + 2 * pair * rows.group * panel_columns, cell > 0,
                                       ahead.share(pair, panel, cell, cells));
            }
        }
        epilogue(p, sums);
    }
}

}  // namespace
}  // namespace starflow::STARFLOW_ISA
