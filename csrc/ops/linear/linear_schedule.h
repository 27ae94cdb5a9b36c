// How the CUDA kernels of linear cut a product: tiles of the result, and parts of the depth. Plain arithmetic, no CUDA.
//
// Each part of the depth is summed by itself, in steps of 64, and the parts are added in their order. Their number
// depends on the weight and on the device and not on the rows, so the bits of a row do not depend on the others. With
// few rows each part has a block of its own (split), which leaves its sums in the workspace, and the last block of a
// tile to arrive adds them; with many rows one block does the parts in turn.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace starflow {

// 64 values of 16 bits are 128 bytes: a row of a tile fills every bank of shared memory once.
inline constexpr int64_t linear_depth = 64;
// Rows of a weight on CUDA, and of what is multiplied by it, start at multiples of 16 bytes.
inline constexpr int64_t linear_row_multiple = 8;

// A tile of the result, by its place among those of rows and of columns.
struct LinearTile {
    int32_t row;
    int32_t column;
};

struct LinearSchedule {
    int32_t tile_rows;
    int32_t tile_columns;
    int32_t row_tiles;
    int32_t column_tiles;
    int32_t depth_tiles;
    int32_t parts;
    int32_t group;  // tiles of rows that pass over the columns together, see linear_tile
    bool split;

    STARFLOW_HOST_DEVICE constexpr int64_t tiles() const { return int64_t{row_tiles} * column_tiles; }
    STARFLOW_HOST_DEVICE constexpr int64_t tile_size() const { return int64_t{tile_rows} * tile_columns; }
    STARFLOW_HOST_DEVICE constexpr int64_t blocks() const { return tiles() * (split ? parts : 1); }
    // Counters of a product, int32 each: where the depth is split, the blocks that have arrived at each tile; then, of
    // each tile of rows, the rows that are copied.
    STARFLOW_HOST_DEVICE constexpr int64_t first_copied() const { return split ? tiles() : 0; }
    STARFLOW_HOST_DEVICE constexpr int64_t counters() const { return first_copied() + row_tiles; }
    // First step of a part; that of part `parts` is the end. In 32 bits, whose division is no function call: one
    // between products of wgmma would serialise them.
    STARFLOW_HOST_DEVICE constexpr int32_t part_begin(int32_t part) const { return part * depth_tiles / parts; }
};

// The n-th tile, in the order in which blocks begin. Within a group rows run fastest: blocks side by side share columns
// of the weight, and the rows of the group stay in the second-level cache while the weight passes.
STARFLOW_HOST_DEVICE constexpr LinearTile linear_tile(const LinearSchedule& schedule, uint32_t n) {
    const auto group = static_cast<uint32_t>(schedule.group);
    const auto row_tiles = static_cast<uint32_t>(schedule.row_tiles);
    const uint32_t in_group = group * static_cast<uint32_t>(schedule.column_tiles);
    const uint32_t first = n / in_group * group;
    const uint32_t high = row_tiles - first < group ? row_tiles - first : group;
    const uint32_t place = n % in_group;
    return {static_cast<int32_t>(first + place % high), static_cast<int32_t>(place / high)};
}

// Bytes from the start of the workspace.
struct LinearWorkspace {
    int64_t counters;  // int32, of which a call by itself needs those of split depth
    int64_t partials;  // float32 (tiles, parts, tile_rows, tile_columns)
    int64_t bytes;
};

static constexpr int64_t linear_divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }
static constexpr int64_t linear_round_up(int64_t value, int64_t multiple) {
    return linear_divide_up(value, multiple) * multiple;
}

// One or two blocks of 64 columns for each multiprocessor, which runs them side by side: more would only pass more sums
// through memory. No part below four steps, which is what a pipeline takes to fill.
static constexpr int64_t linear_parts(int64_t out_channels, int64_t in_channels, int64_t multiprocessors) {
    constexpr int64_t columns = 64;
    constexpr int64_t least_steps = 4;
    constexpr int64_t most = 16;
    const int64_t tiles = out_channels > columns ? linear_divide_up(out_channels, columns) : 1;
    const int64_t wanted = linear_divide_up(multiprocessors, tiles);
    const int64_t possible = linear_divide_up(in_channels, linear_depth) / least_steps;
    const int64_t parts = wanted < possible ? wanted : possible;
    return parts < 1 ? 1 : parts < most ? parts : most;
}

// Tiles of rows that pass over the columns together, in groups of nearly one height: as many as a second-level cache of
// 40 MB and more holds beside what passes. Of deep weights the cache holds few; eleven, with as many columns as there
// are multiprocessors for, are nearly a square of tiles, which reads least.
static constexpr int64_t linear_group(int64_t row_tiles, int64_t tile_rows, int64_t in_channels) {
    constexpr int64_t cached_bytes = int64_t{32} * 1024 * 1024;
    constexpr int64_t least = 11;
    const int64_t tile_bytes = tile_rows * in_channels * 2;
    const int64_t fit = tile_bytes > 0 ? cached_bytes / tile_bytes : row_tiles;
    const int64_t most = fit > least ? fit : least;
    const int64_t groups = linear_divide_up(row_tiles, most);
    return groups > 0 ? linear_divide_up(row_tiles, groups) : 1;
}

static constexpr LinearSchedule linear_schedule(int64_t rows, int64_t out_channels, int64_t in_channels,
                                                int64_t multiprocessors) {
    LinearSchedule schedule{};
    schedule.tile_rows = rows <= 16 ? 16 : rows <= 32 ? 32 : rows <= 64 ? 64 : 128;
    schedule.row_tiles = static_cast<int32_t>(linear_divide_up(rows, schedule.tile_rows));
    // Wide tiles read x half as often, where there are enough of them for all multiprocessors to end together.
    const bool wide = rows > 64 && schedule.row_tiles * linear_divide_up(out_channels, 128) >= 2 * multiprocessors;
    schedule.tile_columns = wide ? 128 : 64;
    schedule.column_tiles = static_cast<int32_t>(linear_divide_up(out_channels, schedule.tile_columns));
    schedule.depth_tiles = static_cast<int32_t>(linear_divide_up(in_channels, linear_depth));
    schedule.parts = static_cast<int32_t>(linear_parts(out_channels, in_channels, multiprocessors));
    schedule.group = static_cast<int32_t>(linear_group(schedule.row_tiles, schedule.tile_rows, in_channels));
    // Where the tiles alone give every multiprocessor one, sums that pass through memory gain nothing.
    schedule.split = schedule.parts > 1 && schedule.tiles() < multiprocessors;
    return schedule;
}

// `input_bytes` of a copy of x come first; 0 where x is multiplied as it is.
static constexpr LinearWorkspace linear_workspace(const LinearSchedule& schedule, int64_t input_bytes) {
    constexpr int64_t line = 128;
    LinearWorkspace workspace{};
    workspace.counters = linear_round_up(input_bytes, line);
    workspace.partials = workspace.counters + (schedule.split ? linear_round_up(schedule.tiles() * 4, line) : 0);
    workspace.bytes = workspace.partials + (schedule.split ? schedule.blocks() * schedule.tile_size() * 4 : 0);
    return workspace;
}

}  // namespace starflow
