// Keys and values read where they lie, for tiles of few rows, which would wait for packing more than they multiply. The
// sums are those of products with panels, in the same order, so that a row's bits do not depend on the way. For kernel
// files.
//
// One row on 1024 keys of 8 heads of 64 (4 MB) on a core of a Zen 5: 126 us with panels, 66 so (64 GB/s); 4 rows 137
// and 108.
#pragma once
#include "cpu/attend.h"
#include "cpu/pack_block.h"

namespace starflow::STARFLOW_ISA {
namespace {

// Most rows that are multiplied with keys and values in place.
inline constexpr int64_t most_direct_rows = 4;

// A block of keys and values in memory, as `attend` takes it.
template <class T>
struct DirectBlock {
    BlockRows<T> keys;
    BlockRows<T> values;

    template <class Product>
    void multiply_keys(const PackedRows& queries, int64_t, int64_t half, float* sums) const {
        with_rows(queries.rows, [&](auto rows) { turn_and_multiply<decltype(rows)::value>(queries, half, sums); });
    }
    template <class Product>
    void multiply_values(const PackedRows& weights, int64_t panel, float* sums) const {
        with_rows(weights.rows, [&](auto rows) { add_values<decltype(rows)::value>(weights, panel, sums); });
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

    static const float* cell_of(const PackedRows& packed, int64_t index, int64_t r) {
        return reinterpret_cast<const float*>(packed.data + (index * packed.rows + r) * cell_bytes);
    }

    // sums (rows, 32) = queries times keys [32 half, 32 half + 32): registers of as many keys as lanes, turned from
    // rows of keys a register of channels at a time.
    template <int rows>
    void turn_and_multiply(const PackedRows& queries, int64_t half, float* sums) const {
        using V = Vec<float>;
        constexpr int groups = panel_columns / V::lanes;
        V sum[groups][rows];
        for (int g = 0; g < groups; ++g) {
            for (int r = 0; r < rows; ++r) sum[g][r] = V(0.0F);
        }
        for (int64_t c = 0; c < queries.cells * float_cell; c += V::lanes) {
            STARFLOW_UNROLL
            for (int g = 0; g < groups; ++g) {
                V turned[V::lanes];
                load_turned(keys, half * panel_columns + g * V::lanes, c, turned);
                STARFLOW_UNROLL
                for (int r = 0; r < rows; ++r) {
                    const float* x = cell_of(queries, c / float_cell, r) + c % float_cell;
                    STARFLOW_UNROLL
                    for (int i = 0; i < V::lanes; ++i) sum[g][r] = multiply_add(V(x[i]), turned[i], sum[g][r]);
                }
            }
        }
        for (int r = 0; r < rows; ++r) {
            for (int g = 0; g < groups; ++g) store(sums + r * panel_columns + g * V::lanes, sum[g][r], AllLanes{});
        }
    }

    // sums (rows, 32) += weights times channels [32 panel, 32 panel + 32) of the values. Values of the gap and behind
    // the last have the weight zero, and are not read.
    template <int rows>
    void add_values(const PackedRows& weights, int64_t panel, float* sums) const {
        using V = Vec<float>;
        constexpr int registers = panel_columns / V::lanes;
        V sum[rows][registers];
        for (int r = 0; r < rows; ++r) {
            for (int v = 0; v < registers; ++v) sum[r][v] = load(sums + r * panel_columns + v * V::lanes, AllLanes{});
        }
        const int64_t c = panel * panel_columns;
        const bool whole = c + panel_columns <= values.depth;
        const auto add = [&](int64_t key, const auto& load_value) {
            V x[rows];
            for (int r = 0; r < rows; ++r) x[r] = V(cell_of(weights, key / float_cell, r)[key % float_cell]);
            STARFLOW_UNROLL
            for (int v = 0; v < registers; ++v) {
                const V value = load_value(key, c + v * V::lanes);
                STARFLOW_UNROLL
                for (int r = 0; r < rows; ++r) sum[r][v] = multiply_add(x[r], value, sum[r][v]);
            }
        };
        const auto add_all = [&](int64_t key, int64_t end) {
            if (whole) {
                const T* from = values.data + key * values.stride;
                for (; key < end; ++key, from += values.stride) {
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
            for (int v = 0; v < registers; ++v) store(sums + r * panel_columns + v * V::lanes, sum[r][v], AllLanes{});
        }
    }
};

}  // namespace
}  // namespace starflow::STARFLOW_ISA
