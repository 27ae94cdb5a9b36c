// How matrices are stored for the products of csrc/cpu/matmul.h: no torch, no std.
//
// A matrix W (out, in) becomes panels of 32 rows of it, which are columns of the product x W^T. Inside a panel the
// depth runs slowest, so that a step of the product reads 32 neighbours:
//   float32, float16, int8   [panel][depth][32]
//   bfloat16                 [panel][depth / 2][32][2]     pairs along the depth, as the instructions take them
//   two_bfloat16             [panel][2][depth / 2][32][2]  the rounded weight, then what rounding left
// Depth is padded to a multiple of 32 and columns to one of 32, with zeros. One layout serves every level: AVX-512
// reads 2 registers a step, AVX2 2 at a time, and 16 steps of 16 columns are a tile of AMX.
//
// Keys and values are cached as panels too: keys as (keys, head_dim), a panel for each 32 keys; values as
// (head_dim, keys), a panel for each 32 channels.
#pragma once
#include <cstdint>

namespace starflow {

enum class MatrixStorage : int32_t { float32, float16, bfloat16, int8, two_bfloat16 };
inline constexpr const char* matrix_storage_names[]{"float32", "float16", "bfloat16", "int8", "two_bfloat16"};

inline constexpr int64_t panel_columns = 32;
inline constexpr int64_t depth_multiple = 32;
inline constexpr int64_t cell_bytes = 64;  // of packed rows: 16 float32 or 32 bfloat16 of a row

static constexpr int64_t round_up(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

// Bytes of one element of a matrix stored so.
static constexpr int64_t storage_bytes(MatrixStorage storage) {
    switch (storage) {
        case MatrixStorage::float32:
        case MatrixStorage::two_bfloat16:
            return 4;
        case MatrixStorage::float16:
        case MatrixStorage::bfloat16:
            return 2;
        case MatrixStorage::int8:
            return 1;
    }
    return 0;
}

// A packed matrix (columns, depth) with what is added after the product.
struct Panels {
    const void* data;
    const float* column_scale;  // (columns,) of int8, else null
    const float* bias;          // (columns,) or null
    int64_t columns;
    int64_t depth;
    MatrixStorage storage;

    int64_t count() const { return (columns + panel_columns - 1) / panel_columns; }
    int64_t padded_depth() const { return round_up(depth, depth_multiple); }
    int64_t panel_bytes() const { return padded_depth() * panel_columns * storage_bytes(storage); }
};

// Keys that attention takes at a time; caches hold whole blocks of them.
inline constexpr int64_t key_block = 64;

// Bytes of the keys, or the values, of one key head.
static constexpr int64_t cache_head_bytes(MatrixStorage storage, int64_t slots, int64_t head_dim) {
    return round_up(slots, key_block) * round_up(head_dim, depth_multiple) * storage_bytes(storage);
}

// The type in which the input of a product with a matrix is multiplied. Where a level has no instruction for products
// of bfloat16, the input stays float32, which is more exact.
enum class ProductInput : int32_t {
    float32,
    bfloat16,      // rounded
    two_bfloat16,  // the rounded value and what rounding left: a product for each
    float16,       // rounded; on CUDA alone
};
inline constexpr const char* product_input_names[]{"float32", "bfloat16", "two_bfloat16", "float16"};

}  // namespace starflow
