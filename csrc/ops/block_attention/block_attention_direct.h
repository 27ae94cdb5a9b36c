// Keys and values read where they lie, for tiles of few rows, which would wait for packing more than they multiply. The
// sums are those of products with panels, in the same order, so that a row's bits do not depend on the way. For kernel
// files.
//
// Few rows wait for memory most of the time. A core has few buffers for lines that it misses (16 in the first-level
// cache of a Xeon: 7 GB/s at the 141 ns of its third level); what reads faster is the unit that fetches the next lines
// of a page by itself, once it sees them asked for one after the other. So lines are asked for in the order in which
// they lie, `rows_ahead` rows in front of those that are multiplied, some at each step.
#pragma once
#include "cpu/attend.h"
#include "cpu/pack_block.h"

namespace starflow::STARFLOW_ISA {
namespace {

// Most rows that are multiplied with keys and values in place.
inline constexpr int64_t most_direct_rows = 4;

inline constexpr int64_t rows_ahead = 32;

// Asks for channels of a row, which may lie behind the end of the matrix.
template <class T>
inline void ask_for(const BlockRows<T>& rows, int64_t r, int64_t channel, int64_t channels) {
    constexpr auto size = static_cast<int64_t>(sizeof(T));
    const auto from =
        reinterpret_cast<uintptr_t>(rows.data) + static_cast<uintptr_t>((r * rows.stride + channel) * size);
    for (int64_t line = 0; line < channels * size; line += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(from + static_cast<uintptr_t>(line)));
    }
}

// A block of keys and values in memory, as `attend` takes it. Its strips are whole tiles.
template <class T>
struct DirectBlock {
    BlockRows<T> keys;  // key_block whole rows, of whole cells
    BlockRows<T> values;

    using V = Vec<float>;

    static constexpr int registers = panel_columns / V::lanes;

    template <class Product>
    void multiply_keys(const PackedRows& queries, int64_t, int64_t half, float* sums) const {
        with_rows(queries.rows, [&](auto rows) { turn_and_multiply<decltype(rows)::value>(queries, half, sums); });
    }

    // One or two rows have too few sums of a panel for the latency of an addition.
    static int64_t panels_at_once(int64_t rows) { return rows * registers <= 4 ? 2 : 1; }

    template <class Product>
    void multiply_values(const PackedRows& weights, int64_t panel, int64_t panels, float* sums,
                         int64_t panel_sums) const {
        with_rows(weights.rows, [&](auto rows) {
            if constexpr (decltype(rows)::value * registers <= 4) {
                if (panels == 2) return add_values<decltype(rows)::value, 2>(weights, panel, sums, panel_sums);
            }
            add_values<decltype(rows)::value, 1>(weights, panel, sums, panel_sums);
        });
    }

  private:
    static constexpr int64_t float_cell = WidenedProduct<float>::cell;

    template <int rows>
    struct Count {
        static constexpr int value = rows;
    };

    template <class Function>
    static void with_rows(int64_t rows, const Function& function) {
        static_assert(most_direct_rows == 4);
        switch (rows) {
            case 1:
                return function(Count<1>{});
            case 2:
                return function(Count<2>{});
            case 3:
                return function(Count<3>{});
            default:
                return function(Count<4>{});
        }
    }

    static const float* cell_of(const PackedRows& packed, int64_t index) {
        return reinterpret_cast<const float*>(packed.data + index * packed.rows * cell_bytes);
    }

    // sums (rows, 32) = queries times keys [32 half, 32 half + 32): registers of as many keys as
    // lanes, turned from rows of keys some channels at a time.
    template <int rows>
    void turn_and_multiply(const PackedRows& queries, int64_t half, float* sums) const {
        constexpr int columns = turned_columns<T>;
        const int64_t steps = keys.depth / columns;
        // One row's sums wait for one another: more keys at once.
        constexpr int groups = rows <= 2 && V::lanes > 1 ? 2 : 1;
        for (int begin = 0; begin < registers; begin += groups) {
            const int64_t key = half * panel_columns + begin * V::lanes;
            V sum[groups][rows];
            for (int g = 0; g < groups; ++g) {
                for (int r = 0; r < rows; ++r) sum[g][r] = V(0.0F);
            }
            int64_t ahead = key + rows_ahead;
            int64_t due = 0;
            const T* from = keys.data + key * keys.stride;
            const float* x = cell_of(queries, 0);
            for (int64_t c = 0; c < keys.depth; c += columns, from += columns) {
                // As many rows as there are keys, spread over the steps.
                for (due += groups * V::lanes; due >= steps; due -= steps, ++ahead) {
                    ask_for(keys, ahead, 0, keys.depth);
                }
                STARFLOW_UNROLL
                for (int g = 0; g < groups; ++g) {
                    V turned[columns];
                    load_turned(from + g * V::lanes * keys.stride, keys.stride, turned);
                    STARFLOW_UNROLL
                    for (int i = 0; i < columns; ++i) {
                        STARFLOW_UNROLL
                        for (int r = 0; r < rows; ++r) {
                            sum[g][r] = multiply_add(V(x[r * float_cell + i]), turned[i], sum[g][r]);
                        }
                    }
                }
                // A cell holds channels of every row.
                x += (c + columns) % float_cell == 0 ? (rows - 1) * float_cell + columns : columns;
            }
            for (int g = 0; g < groups; ++g) {
                for (int r = 0; r < rows; ++r) {
                    store(sums + r * panel_columns + (begin + g) * V::lanes, sum[g][r], AllLanes{});
                }
            }
        }
    }

    // sums (rows, 32) += weights times channels [32 panel, 32 panel + 32) of the values, and the same of further
    // panels. Values of the gap and behind the last have the weight zero, and are not read.
    template <int rows, int panels>
    void add_values(const PackedRows& weights, int64_t panel, float* sums, int64_t panel_sums) const {
        // As many sums as hide the latency of an addition, and all of them in the registers of AVX2: in memory each
        // took as long again.
        constexpr int most = 8;
        constexpr int columns = rows * panels * registers <= most ? panels * registers : registers / 2;
        for (int v = 0; v < panels * registers; v += columns) {
            float* at = sums + v / registers * panel_sums + v % registers * V::lanes;
            const int64_t c = panel * panel_columns + v * V::lanes;
            const auto add = [&](int64_t begin, int64_t end) {
                if (c + columns * V::lanes <= values.depth) {
                    add_range<rows, columns, true>(weights, begin, end, c, at, panel_sums);
                } else {
                    add_range<rows, columns, false>(weights, begin, end, c, at, panel_sums);
                }
            };
            if (values.gap_begin < values.gap_end) {
                add(0, values.gap_begin);
                add(values.gap_end, values.count);
            } else {
                add(0, values.count);
            }
        }
    }

    // The same of keys [key, end) and of some registers of channels from c on. `whole`: all these channels exist.
    template <int rows, int columns, bool whole>
    void add_range(const PackedRows& weights, int64_t key, int64_t end, int64_t c, float* sums,
                   int64_t panel_sums) const {
        const auto place = [&](int r, int v) {
            return sums + v / registers * panel_sums + r * panel_columns + v % registers * V::lanes;
        };
        V sum[rows][columns];
        for (int r = 0; r < rows; ++r) {
            for (int v = 0; v < columns; ++v) sum[r][v] = load(place(r, v), AllLanes{});
        }
        const T* from = values.data + key * values.stride + c;
        for (; key < end; ++key, from += values.stride) {
            const float* weight = cell_of(weights, key / float_cell) + key % float_cell;
            if constexpr (whole) ask_for(values, key + rows_ahead, c, columns * V::lanes);
            V value[columns];
            for (int v = 0; v < columns; ++v) {
                if constexpr (whole) {
                    value[v] = load(from + v * V::lanes, AllLanes{});
                } else {
                    value[v] = load_padded(values, key, c + v * V::lanes);
                }
            }
            STARFLOW_UNROLL
            for (int r = 0; r < rows; ++r) {
                const V x(weight[r * float_cell]);
                for (int v = 0; v < columns; ++v) sum[r][v] = multiply_add(x, value[v], sum[r][v]);
            }
        }
        for (int r = 0; r < rows; ++r) {
            for (int v = 0; v < columns; ++v) store(place(r, v), sum[r][v], AllLanes{});
        }
    }
};

}  // namespace
}  // namespace starflow::STARFLOW_ISA
