// How the CUDA kernels of block_attention cut their work: sizes of tiles, parts of the keys, and which tiles a tile
// sees. Plain arithmetic, no CUDA.
#pragma once
#include "ops/block_attention/block_attention_rows.h"

namespace starflow {
namespace {

inline constexpr int64_t most_head_dim = 256;

STARFLOW_HOST_DEVICE constexpr int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Channels of a tile: head_dim, padded with zeros to a size that there is a kernel for.
constexpr int64_t tile_width(int64_t head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }

// A block of threads holds `rows` rows, 16 or 32 of them a warp, and passes over the others `columns` at a time.
struct AttentionTile {
    int rows;
    int columns;
    int warps;

    constexpr int rows_of_warp() const { return rows / warps; }
    constexpr int threads() const { return warps * 32; }
};

// Rows are queries and columns are keys. `columns` must not depend on the number of rows: with one part of the keys, a
// row's bits are those that it has alone. 32 rows a warp halve what is read of shared memory for each product, which
// bounds 16 rows on sm_80 (256 bytes in the two cycles of an m16n8k16, 128 a cycle); their sums take 128 registers, so
// that columns, whose products take registers too, are few. All tiles of shared memory fit the 99 KB of sm_86 and
// sm_120. float32 holds its operands in two parts.
constexpr AttentionTile forward_tile(int element_bytes, int64_t width, bool large) {
    if (element_bytes == 4) {
        return width == 64    ? AttentionTile{64, 32, 4}
               : width == 128 ? AttentionTile{64, 16, 4}
                              : AttentionTile{32, 16, 2};
    }
    const int columns = width == 64 ? 64 : 32;
    return large && width <= 128 ? AttentionTile{128, columns, 4} : AttentionTile{64, columns, 4};
}

// Keys of a tile of the kernel of sm_90a, whose rows are 64 or 128 as above: products of wgmma with fewer columns wait
// for shared memory.
inline constexpr int sm90_columns = 128;

// Which kernel a forward pass or a gradient on CUDA runs: `wgmma` is that of sm_90a, the other values say why that one
// does not run; those of queries are of the gradient alone.
enum class AttentionKernel : int32_t {
    wgmma,
    other_device,
    not_built,
    float32,
    wide_head,
    no_keys,
    unaligned,
    overlapping,
    no_queries,
    unaligned_queries,
    overlapping_queries
};
inline constexpr const char* attention_kernel_names[]{
    "wgmma",     "other_device", "not_built",  "float32",           "wide_head",          "no_keys",
    "unaligned", "overlapping",  "no_queries", "unaligned_queries", "overlapping_queries"};

// Whether TMA brings these (batch, heads, count, head_dim): it takes distances of whole 16 bytes, none of them 0.
inline AttentionKernel kernel_by_rows(const AttentionShape& shape, int64_t heads, int64_t count, const HeadRows& rows) {
    constexpr int64_t chunk = 8;
    bool aligned = reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
    bool apart = count == 1 || rows.row_stride >= shape.head_dim;
    const auto check = [&](int64_t entries, int64_t stride) {
        aligned = aligned && (entries == 1 || stride % chunk == 0);
        apart = apart && (entries == 1 || stride > 0);
    };
    check(count, rows.row_stride);
    check(heads, rows.head_stride);
    check(shape.batch, rows.batch_stride);
    return !aligned ? AttentionKernel::unaligned : !apart ? AttentionKernel::overlapping : AttentionKernel::wgmma;
}
inline AttentionKernel kernel_by_keys(const AttentionShape& shape, const HeadRows& rows) {
    return kernel_by_rows(shape, shape.kv_heads, shape.keys, rows);
}
inline AttentionKernel kernel_by_queries(const AttentionShape& shape, const HeadRows& rows) {
    return kernel_by_rows(shape, shape.heads, shape.queries, rows);
}

// `major` belongs to the device's compute capability. The queries have no say: a row has the bits that it has alone.
inline AttentionKernel forward_kernel_for(const AttentionShape& shape, const HeadRows& k, const HeadRows& v, int major,
                                          bool built) {
    if (major != 9) return AttentionKernel::other_device;
    if (!built) return AttentionKernel::not_built;
    if (shape.data == Dtype::float32) return AttentionKernel::float32;
    if (tile_width(shape.head_dim) > 128) return AttentionKernel::wide_head;
    if (shape.keys == 0) return AttentionKernel::no_keys;
    const AttentionKernel by_keys = kernel_by_keys(shape, k);
    return by_keys != AttentionKernel::wgmma ? by_keys : kernel_by_keys(shape, v);
}

// The gradient's, which reads queries by TMA too. What comes from above has no say: the op copies it where TMA does not
// take it.
inline AttentionKernel backward_kernel_for(const AttentionShape& shape, const HeadRows& q, const HeadRows& k,
                                           const HeadRows& v, int major, bool built) {
    const AttentionKernel forward = forward_kernel_for(shape, k, v, major, built);
    if (forward != AttentionKernel::wgmma) return forward;
    if (shape.batch * shape.heads * shape.queries == 0) return AttentionKernel::no_queries;
    switch (kernel_by_queries(shape, q)) {
        case AttentionKernel::unaligned:
            return AttentionKernel::unaligned_queries;
        case AttentionKernel::overlapping:
            return AttentionKernel::overlapping_queries;
        default:
            return AttentionKernel::wgmma;
    }
}

// The gradient of the queries (rows: queries) or of keys and values (rows: keys), which has two sums. For 256 channels
// these do not fit the registers of a warp, and two or four warps share 16 rows.
constexpr AttentionTile backward_tile(int element_bytes, int64_t width) {
    if (width == 256) return element_bytes == 4 ? AttentionTile{16, 16, 4} : AttentionTile{64, 16, 8};
    if (element_bytes == 4) return width == 64 ? AttentionTile{64, 32, 4} : AttentionTile{32, 16, 2};
    return width == 64 ? AttentionTile{64, 64, 4} : AttentionTile{64, 32, 4};
}

// Queries of a tile of the gradient's kernel of sm_90a, whose blocks have sm90_columns keys: as many as the registers
// hold the products of, beside the sums of keys and values. Two groups of warps share the sums of such a tile's grad_q,
// 64 queries by 64 channels each.
inline constexpr int sm90_groups = 2;
constexpr int sm90_gradient_rows(int64_t width) { return width == 64 ? 128 : 64; }

// What the blocks of the gradient on sm_90a leave for each other, of each tile of queries of a head: sums of grad_q,
// and of each group of warps how many blocks have added to them. Nothing where there is one tile of keys.
struct GradientMemory {
    int64_t sums;   // float32
    int64_t turns;  // int32

    static constexpr GradientMemory of(const AttentionShape& shape) {
        if (shape.keys <= sm90_columns) return {0, 0};
        const int64_t width = tile_width(shape.head_dim);
        const int64_t rows = sm90_gradient_rows(width);
        const int64_t tiles = divide_up(shape.queries, rows) * shape.batch * shape.heads;
        return {tiles * rows * width, tiles * sm90_groups};
    }
};

struct AttentionSchedule {
    int64_t tile_rows;
    int64_t row_tiles;
    int64_t splits;  // parts of the keys that a tile of rows sees
};

// Whether tiles of rows are large. Of mma.sync where they alone give each multiprocessor two blocks. Of wgmma a large
// tile has the warps of two small ones and pulls keys and values through the second-level cache once where they do it
// twice, so it is large where there are nearly as many as multiprocessors, unless half of the last one would be empty
// and count.
constexpr bool large_tiles(const AttentionShape& shape, int64_t multiprocessors, bool wgmma, int64_t small,
                           int64_t large) {
    const int64_t rows = rows_of(shape);
    const int64_t tiles = divide_up(rows, large);
    const int64_t blocks = tiles * shape.batch * shape.kv_heads;
    if (!wgmma) return blocks >= 2 * multiprocessors;
    const bool filled = tiles * (large / small) == divide_up(rows, small) || tiles >= 4;
    return filled && 4 * blocks >= 3 * multiprocessors;
}

// Where even small tiles do not give every multiprocessor a block, as with few queries and a long cache, the keys are
// split: into parts of at least 512, so that the float32 results of the parts, which pass through memory twice, are a
// small share of the keys and values that a part reads. `wgmma`: the kernel of sm_90a runs.
constexpr AttentionSchedule attention_schedule(const AttentionShape& shape, int64_t multiprocessors, bool wgmma) {
    constexpr int64_t least_keys = 512;
    constexpr int64_t most_splits = 64;
    const int bytes = shape.data == Dtype::float32 ? 4 : 2;
    const int64_t width = tile_width(shape.head_dim);
    const int64_t heads = shape.batch * shape.kv_heads;
    const int64_t small = forward_tile(bytes, width, false).rows;
    const int64_t large = forward_tile(bytes, width, true).rows;
    const bool is_large = large_tiles(shape, multiprocessors, wgmma, small, large);
    AttentionSchedule schedule{is_large ? large : small, 0, 1};
    schedule.row_tiles = divide_up(rows_of(shape), schedule.tile_rows);
    const int64_t blocks = schedule.row_tiles * heads;
    if (is_large || blocks == 0 || blocks >= multiprocessors) return schedule;
    const int64_t wanted = 2 * multiprocessors / blocks;
    const int64_t possible = shape.keys / least_keys;
    schedule.splits = wanted < possible ? wanted : possible;
    schedule.splits = schedule.splits > most_splits ? most_splits : schedule.splits < 1 ? 1 : schedule.splits;
    return schedule;
}

// Elements of the results of the parts, float32: of each row and part, and their logarithms.
constexpr int64_t parts_elements(const AttentionShape& shape, int64_t splits) {
    return splits > 1 ? splits * shape.batch * shape.heads * shape.queries * (shape.head_dim + 1) : 0;
}

// What a query sees, in the integers of the device: within the keys that there are.
STARFLOW_HOST_DEVICE constexpr VisibleKeysOf<int> visible_in_tile(const AttentionMask& mask,
                                                                  const AttentionShape& shape, int64_t b,
                                                                  int64_t query) {
    const VisibleKeys seen = visible_keys(mask, shape, b, query);
    const auto within = [&](int64_t key) {
        return static_cast<int>(key < 0 ? 0 : key > shape.keys ? shape.keys : key);
    };
    return {within(seen.prefix), within(seen.first), within(seen.last)};
}

// What the queries of a range see. Each query sees all keys of `every`, and none sees a key outside of `any`.
struct VisibleByRows {
    VisibleKeysOf<int> every;
    VisibleKeysOf<int> any;

    STARFLOW_HOST_DEVICE static constexpr VisibleByRows between(const VisibleKeysOf<int>& least,
                                                                const VisibleKeysOf<int>& most) {
        return {{least.prefix, most.first, least.last}, {most.prefix, least.first, most.last}};
    }
};

// Tiles of keys that a tile of rows has to pass over, in their order: those of the prefix, then those of the run.
struct KeyTiles {
    int prefix;  // tiles
    int first;   // of the run
    int count;

    STARFLOW_HOST_DEVICE static constexpr KeyTiles of(const VisibleKeysOf<int>& any, int columns) {
        const int prefix = (any.prefix + columns - 1) / columns;
        const int first = any.first / columns > prefix ? any.first / columns : prefix;
        const int end = any.first < any.last ? (any.last + columns - 1) / columns : 0;
        return {prefix, first, prefix + (end > first ? end - first : 0)};
    }
    STARFLOW_HOST_DEVICE constexpr int tile(int i) const { return i < prefix ? i : first + i - prefix; }
    // The number i of a tile, or -1 of one that is not passed over.
    STARFLOW_HOST_DEVICE constexpr int place_of(int tile) const {
        if (tile < prefix) return tile;
        const int place = tile - first + prefix;
        return tile >= first && place < count ? place : -1;
    }
};

struct QueryRange {
    int begin;
    int end;
};

// The first number of [0, end) for which a condition that stays true is true, or `end`.
template <class Condition>
STARFLOW_HOST_DEVICE constexpr int first_for(int end, const Condition& condition) {
    int low = 0;
    int high = end;
    while (low < high) {
        const int middle = low + (high - low) / 2;
        if (condition(middle)) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

// What a tile of queries sees, from its first query on.
STARFLOW_HOST_DEVICE constexpr VisibleByRows visible_by_tile(const AttentionMask& mask, const AttentionShape& shape,
                                                             int64_t b, int first, int rows) {
    const auto queries = static_cast<int>(shape.queries);
    const int last = rows < queries - first ? first + rows - 1 : queries - 1;
    return VisibleByRows::between(visible_in_tile(mask, shape, b, first), visible_in_tile(mask, shape, b, last));
}

// Tiles of `rows` queries, outside of which none passes over the tile of keys from `begin` on (`KeyTiles::place_of`).
STARFLOW_HOST_DEVICE constexpr QueryRange visible_query_tiles(const AttentionMask& mask, const AttentionShape& shape,
                                                              int64_t b, int begin, int columns, int rows) {
    const auto tiles = static_cast<int>(divide_up(shape.queries, rows));
    const auto first_tile = [&](const auto& condition) {
        return first_for(tiles,
                         [&](int tile) { return condition(visible_by_tile(mask, shape, b, tile * rows, rows).any); });
    };
    const int reached =
        first_tile([&](const VisibleKeysOf<int>& any) { return any.prefix > begin || any.last > begin; });
    const int in_prefix = first_tile([&](const VisibleKeysOf<int>& any) { return any.prefix > begin; });
    const int left = in_prefix < tiles
                         ? tiles
                         : first_tile([&](const VisibleKeysOf<int>& any) { return any.first >= begin + columns; });
    return {reached, left > reached ? left : reached};
}

// The queries that may see a key of [begin, end): a run of them, as what they see grows with their position.
STARFLOW_HOST_DEVICE constexpr QueryRange visible_queries(const AttentionMask& mask, const AttentionShape& shape,
                                                          int64_t b, int begin, int end) {
    const auto queries = static_cast<int>(shape.queries);
    const auto first_query = [&](const auto& condition) {
        return first_for(queries, [&](int query) { return condition(visible_in_tile(mask, shape, b, query)); });
    };
    const int reached =
        first_query([&](const VisibleKeysOf<int>& seen) { return seen.prefix > begin || seen.last > begin; });
    const int in_prefix = first_query([&](const VisibleKeysOf<int>& seen) { return seen.prefix > begin; });
    const int left =
        in_prefix < queries ? queries : first_query([&](const VisibleKeysOf<int>& seen) { return seen.first >= end; });
    return {reached, left > reached ? left : reached};
}

}  // namespace
}  // namespace starflow
