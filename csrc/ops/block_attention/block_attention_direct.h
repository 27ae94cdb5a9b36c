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
    BlockRows<T> keys;
    BlockRows<T> values;

    static constexpr int registers = panel_columns / Vec<float>::lanes;

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
    // lanes, turned from rows of keys a register of channels at a time.
    template <int rows>
    void turn_and_multiply(const PackedRows& queries, int64_t half, float* sums) const {
        using V = Vec<float>;
        const int64_t steps = queries.cells * float_cell / V::lanes;
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
            for (int64_t step = 0; step < steps; ++step) {
                // As many rows as there are keys, spread over the steps.
                for (due += groups * V::lanes; due >= steps; due -= steps, ++ahead) {
                    ask_for(keys, ahead, 0, keys.depth);
                }
                const int64_t c = step * V::lanes;
                const float* x = cell_of(queries, c / float_cell) + c % float_cell;
                STARFLOW_UNROLL
                for (int g = 0; g < groups; ++g) {
                    V turned[V::lanes];
                    load_turned(keys, key + g * V::lanes, c, turned);
                    STARFLOW_UNROLL
                    for (int i = 0; i < V::lanes; ++i) {
                        STARFLOW_UNROLL
                        for (int r = 0; r < rows; ++r) {
                            sum[g][r] = multiply_add(V(x[r * (cell_bytes / 4) + i]), turned[i], sum[g][r]);
                        }
                    }
                }
            }
            for (int g = 0; g < groups; ++g) {
                for (int r = 0; r < rows; ++r) {
                    store(sums + r * panel_columns + (begin + g) * V::lanes, sum[g][r], AllLanes{});
                }
            }
        }
    }

    // sums (rows, 32) += weights times channels [32 panel, 32 panel + 32) of the values,
    // and the same of further panels. Values of the gap and behind the last have the weight zero, and are not read.
    template <int rows, int panels>
    void add_values(const PackedRows& weights, int64_t panel, float* sums, int64_t panel_sums) const {
        using V = Vec<float>;
        constexpr int columns = panels * registers;
        const auto place = [&](int r, int v) {
            return sums + v / registers * panel_sums + r * panel_columns + v % registers * V::lanes;
        };
        V sum[rows][columns];
        for (int r = 0; r < rows; ++r) {
            for (int v = 0; v < columns; ++v) sum[r][v] = load(place(r, v), AllLanes{});
        }
        const int64_t c = panel * panel_columns;
        const bool whole = c + panels * panel_columns <= values.depth;
        const auto add = [&](int64_t key, const auto& load_value) {
            V x[rows];
            const float* from = cell_of(weights, key / float_cell) + key % float_cell;
            for (int r = 0; r < rows; ++r) x[r] = V(from[r * (cell_bytes / 4)]);
            STARFLOW_UNROLL
            for (int v = 0; v < columns; ++v) {
                const V value = load_value(key, c + v * V::lanes);
                STARFLOW_UNROLL
                for (int r = 0; r < rows; ++r) sum[r][v] = multiply_add(x[r], value, sum[r][v]);
            }
        };
        const auto add_all = [&](int64_t key, int64_t end) {
            if (whole) {
                const T* from = values.data + key * values.stride;
                for (; key < end; ++key, from += values.stride) {
                    ask_for(values, key + rows_ahead, c, panels * panel_columns);
                    add(key, [&](int64_t, int64_t channel) { return load(from + channel, AllLanes{}); });
                }
            } else {
                for (; key < end; ++key) add(key, [&](int64_t k, int64_t ch) { return load_padded(values, k, ch); });
            }
        };
        if (values.gap_begin < values.gap_end) {
            add_all(0, values.gap_begin);
            add_all(values.gap_end, values.count);
        } else {
            add_all(0, values.count);
        }
        for (int r = 0; r < rows; ++r) {
            for (int v = 0; v < columns; ++v) store(place(r, v), sum[r][v], AllLanes{});
        }
    }
};

}  // namespace
}  // namespace starflow::STARFLOW_ISA
