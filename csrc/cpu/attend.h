// Softmax attention of a few query rows over keys and values stored as panels, for one key head. For kernel files.
//
//   out[r] = sum_k p[r, k] v[k] / sum_k p[r, k],   p[r, k] = exp(scale * (q[r] . k - m[r])) for the visible k,
//   m[r] the largest product so far: the sums are rescaled where it grows (online softmax), so that no row of products
//   longer than a block of 64 keys exists.
//
// Blocks of keys begin at multiples of 64 whatever the queries are, so that a row's result does not depend on the rows
// beside it. A block that no row of a group sees is not touched.
#pragma once
#include "common/visible_keys.h"
#include "cpu/matmul.h"
#include "cpu/rows.h"

namespace starflow::STARFLOW_ISA {
namespace {

// Reads a byte of each line, so that it is in the caches later. Processors drop prefetches when many wait for memory
// already (measured on a Zen 4: prefetching everything changed nothing, reads took a sixth off attention's time).
inline void touch(const void* from, int64_t bytes) {
    for (int64_t line = 0; line < bytes; line += 64) {
        (void)static_cast<const volatile char*>(from)[line];
    }
}

// Keys and values of one block of keys: panels of a (64, head_dim) matrix and of a (head_dim, 64) one.
struct BlockPanels {
    const char* keys;
    int64_t key_panel_bytes;
    const char* values;
    int64_t value_panel_bytes;

    // sums (rows of the strip from group g on, 32) = the strip times keys [32 half, 32 half + 32).
    template <class Product>
    void multiply_keys(const PackedRows& queries, int64_t g, int64_t half, float* sums) const {
        multiply_strip<Product>(queries, g, keys + half * key_panel_bytes, sums, false);
    }
    // Panels of the values that multiply_values takes at once.
    static int64_t panels_at_once(int64_t) { return 1; }
    // sums (rows, 32) += weights times channels [32 panel, 32 panel + 32) of the values; those of further panels would
    // lie `panel_sums` floats apart.
    template <class Product>
    void multiply_values(const PackedRows& weights, int64_t panel, int64_t, float* sums, int64_t) const {
        multiply_strip<Product>(weights, 0, values + panel * value_panel_bytes, sums, true);
    }
};

// Keys and values of one key head: panels of a (slots, head_dim) matrix and of a (head_dim, slots) one.
template <class Product>
struct PanelCache {
    char* keys;
    char* values;
    int64_t head_depth;  // head_dim, padded
    int64_t slots;       // padded to key_block

    BlockPanels block(int64_t begin) const {
        constexpr int64_t element_bytes = Product::weight_step / panel_columns;
        constexpr int64_t row_bytes = panel_columns * element_bytes;
        return {keys + begin * head_depth * element_bytes, head_depth * row_bytes, values + begin * row_bytes,
                slots * row_bytes};
    }

    // Brings one of `parts` shares of the block of keys from `begin` on into the second-level cache.
    void touch_part(int64_t begin, int64_t part, int64_t parts) const {
        if (begin >= slots) return;
        const BlockPanels ahead = block(begin);
        for (int64_t panel = part; panel < key_block / panel_columns; panel += parts) {
            touch(ahead.keys + panel * ahead.key_panel_bytes, ahead.key_panel_bytes);
        }
        const int64_t value_bytes = key_block * Product::weight_step;
        for (int64_t panel = part; panel < head_depth / panel_columns; panel += parts) {
            touch(ahead.values + panel * ahead.value_panel_bytes, value_bytes);
        }
    }
};

// Calls visitor(Product{}) with the product that attention uses for keys and values of this storage.
template <class Visitor>
inline void visit_attention_product(MatrixStorage storage, [[maybe_unused]] ProductInput product_input,
                                    const Visitor& visitor) {
    switch (storage) {
        case MatrixStorage::bfloat16:
#if defined(STARFLOW_TILES)
            if (product_input == ProductInput::bfloat16) return visitor(TileProduct<1, 1>{});
#elif defined(__AVX512BF16__)
            if (product_input == ProductInput::bfloat16) return visitor(PairsProduct{});
#endif
            return visitor(WidenedPairsProduct<1>{});
        case MatrixStorage::float16:
            return visitor(WidenedProduct<Float16>{});
        default:
            return visitor(WidenedProduct<float>{});
    }
}

template <class Element>
inline constexpr bool is_bfloat16 = false;
template <>
inline constexpr bool is_bfloat16<BFloat16> = true;

// A row in the type of a cache, to be spread over its panels: one element a panel row, so by scalar stores.
template <class Element>
struct CacheRow {
    static constexpr int64_t most = 256;  // channels at a time
    alignas(64) Element elements[most];

    // Channels [c, c + count) of the row, and a zero behind an odd count.
    void read(const float* row, int64_t c, int64_t count) {
        using V = Vec<float>;
        for (int64_t i = 0; i < count; i += V::lanes) {
            const FirstLanes left{static_cast<int>(count - i)};
            store(elements + i,
                  i + V::lanes <= count ? load(row + c + i, AllLanes{}) : keep(load(row + c + i, left), left, 0.0F),
                  AllLanes{});
        }
    }
};

// Writes the rows of a key and of its value into the cache. bfloat16 lies in pairs along the depth (csrc/cpu/panels.h),
// which for keys is the channels, for values the slots.
template <class Element>
inline void put_key(char* keys, int64_t slot, int64_t head_dim, int64_t head_depth, const float* key) {
    auto* panel = reinterpret_cast<Element*>(keys) + slot / panel_columns * head_depth * panel_columns;
    const int64_t column = slot % panel_columns;
    CacheRow<Element> row;
    for (int64_t begin = 0; begin < head_dim; begin += row.most) {
        const int64_t count = head_dim - begin < row.most ? head_dim - begin : row.most;
        row.read(key, begin, count);
        Element* to = panel + begin * panel_columns;
        if constexpr (is_bfloat16<Element>) {
            for (int64_t c = 0; c < count; c += 2) {
                __builtin_memcpy(to + (c / 2 * panel_columns + column) * 2, row.elements + c, 2 * sizeof(Element));
            }
        } else {
            for (int64_t c = 0; c < count; ++c) to[c * panel_columns + column] = row.elements[c];
        }
    }
}
template <class Element>
inline void put_value(char* values, int64_t slot, int64_t slots, int64_t head_dim, const float* value) {
    for (int64_t begin = 0; begin < head_dim; begin += panel_columns) {
        const int64_t count = head_dim - begin < panel_columns ? head_dim - begin : panel_columns;
        Element* panel = reinterpret_cast<Element*>(values) + begin * slots;
        over_channels<Vec<float>>(count, [&](int64_t c, auto lanes) {
            const Vec<float> a = load(value + begin + c, lanes);
            if constexpr (is_bfloat16<Element>) {
                const int64_t left = count - c;
                store_into_pairs(panel + (slot / 2 * panel_columns + c) * 2, static_cast<int>(slot % 2), a,
                                 left < Vec<float>::lanes ? static_cast<int>(left) : Vec<float>::lanes);
            } else {
                store(panel + slot * panel_columns + c, a, lanes);
            }
        });
    }
}

// What a tile of query rows needs while it runs.
struct AttendScratch {
    float* products;  // (rows of a strip, 64), as two panels
    char* weights;    // packed rows of 64
    float* out;       // (value panels, rows, 32)
    float* largest;   // (rows,)
    float* total;     // (rows, lanes): what a row's weights sum to so far, by lane
    int64_t rows;

    static constexpr int64_t lanes = Vec<float>::lanes;
    static constexpr int64_t strip_rows = 32;  // at least most_strip_rows of every product
    // On tiles a smaller last group is multiplied whole: sums lie up to 15 rows behind the last.
    static constexpr int64_t room(int64_t rows) { return rows + 15; }
    static constexpr int64_t out_bytes(int64_t rows, int64_t head_dim) {
        return room(rows) * round_up(head_dim, depth_multiple) * 4;
    }
    static constexpr int64_t products_bytes = strip_rows * key_block * 4;
    static constexpr int64_t weights_bytes = packed_bytes(strip_rows, key_block);
    static constexpr int64_t bytes(int64_t rows, int64_t head_dim) {
        return products_bytes + weights_bytes + out_bytes(rows, head_dim) + rows * (lanes + 1) * 4 + 5 * 64;
    }
    static AttendScratch in(char* memory, int64_t rows, int64_t head_dim) {
        AttendScratch s;
        const auto take = [&memory](int64_t size) {
            char* taken = memory;
            memory += round_up(size, 64);
            return taken;
        };
        s.products = reinterpret_cast<float*>(take(products_bytes));
        s.weights = take(weights_bytes);
        s.out = reinterpret_cast<float*>(take(out_bytes(rows, head_dim)));
        s.largest = reinterpret_cast<float*>(take(rows * 4));
        s.total = reinterpret_cast<float*>(take(rows * lanes * 4));
        s.rows = rows;
        return s;
    }

    // Channel c of a row's result, not yet divided by its total.
    float* result(int64_t r, int64_t c) const {
        return out + (c / panel_columns * room(rows) + r) * panel_columns + c % panel_columns;
    }
};

inline constexpr float no_product = -3.0e38F;  // below every product; it stands for the product of a hidden key
inline constexpr float log2_of_e = 1.44269504F;
inline constexpr float least_power = -125.0F;  // 2^least_power is nothing beside the largest weight

// The largest product of a row is updated only where another exceeds it by this many powers of two: finding the largest
// takes shuffles, and sums that were scaled by an earlier one must be scaled again.
inline constexpr float most_power = 6.0F;

// Softmax weights of a strip, rows [begin, begin + weights.rows) of the tile, over the block of keys at `block`, from
// its products, whose panels hold `room` rows. `shrink` gets the factor by which each row's earlier sums are to be
// multiplied; the result is false where those sums stay as they are.
template <class Product>
inline bool weigh(const AttendScratch& s, const PackedRows& weights, int64_t begin, int64_t room, int64_t block,
                  const VisibleKeys* visible, float scale, float (&shrink)[AttendScratch::strip_rows]) {
    using V = Vec<float>;
    using Cell = typename Product::Cell;
    constexpr int registers = key_block / V::lanes;
    const int64_t count = weights.rows;
    const V slope(scale * log2_of_e);
    const float slack = most_power / (scale * log2_of_e);
    const auto products = [&](int64_t row, int64_t key) {
        return s.products + (key / panel_columns * room + row) * panel_columns + key % panel_columns;
    };
    bool grows = false;
    for (int64_t r = 0; r < count; ++r) {
        const VisibleKeys& seen = visible[begin + r];
        if (!seen.all_in(block, block + key_block)) {
            const auto within = [block](int64_t key) {
                return key < block ? 0 : key > block + key_block ? key_block : key - block;
            };
            const int64_t low = within(seen.first);
            for (int64_t k = within(seen.prefix); k < low; ++k) *products(r, k) = no_product;
            const int64_t high = within(seen.last > seen.prefix ? seen.last : seen.prefix);
            for (int64_t k = high; k < key_block; ++k) *products(r, k) = no_product;
        }
        V most = load(products(r, 0), AllLanes{});
        for (int64_t k = V::lanes; k < key_block; k += V::lanes) most = maximum(load(products(r, k), AllLanes{}), most);
        const float before = s.largest[begin + r];
        const float now = any_greater(most, V(before + slack)) ? largest(most) : before;
        s.largest[begin + r] = now;
        shrink[r] = before - now;
        grows |= now != before;
    }
    if (grows) {
        for (int64_t r = 0; r < count; r += V::lanes) {
            store(shrink + r, power_of_two(maximum(V(least_power), load(shrink + r, AllLanes{}) * slope)), AllLanes{});
        }
    }
    for (int64_t r = 0; r < count; ++r) {
        const V offset(0.0F - s.largest[begin + r]);
        const V power_offset = offset * slope;
        // A weight on its way into a product of bfloat16 keeps 8 bits.
        const auto weight_of = [&](V product) {
            if constexpr (is_bfloat16<Cell>) {
                return coarse_power_of_two(maximum(V(least_power), multiply_add(product, slope, power_offset)));
            } else {
                return power_of_two(maximum(V(least_power), (product + offset) * slope));
            }
        };
        char* packed = weights.row(r);
        const int64_t stride = weights.stride(r);
        V total(0.0F);
        const auto weigh_row = [&](const auto& hide) {
            STARFLOW_UNROLL
            for (int i = 0; i < registers; ++i) {
                const int64_t k = i * V::lanes;
                const V product = load(products(r, k), AllLanes{});
                const V weight = hide(product, weight_of(product));
                total = total + weight;
                store(reinterpret_cast<Cell*>(packed + k / Product::cell * stride) + k % Product::cell, weight,
                      AllLanes{});
            }
        };
        if (visible[begin + r].all_in(block, block + key_block)) {
            weigh_row([](V, V weight) { return weight; });
        } else {
            // A hidden key weighs nothing; NaN is no hidden key and stays.
            weigh_row(
                [](V product, V weight) { return select_greater(V(0.5F * no_product), product, V(0.0F), weight); });
        }
        float* sum = s.total + (begin + r) * V::lanes;
        const V earlier = load(sum, AllLanes{});
        store(sum, total + (grows ? earlier * V(shrink[r]) : earlier), AllLanes{});
    }
    return grows;
}

// One tile of query rows. `cache.block(b)` gives the keys and values from b on, a multiple of 64, with the functions of
// BlockPanels.
// Leaves result, largest and total in the scratch.
template <class Product, class Cache>
inline void attend(const PackedRows& queries, const Cache& cache, int64_t head_dim, const VisibleKeys* visible,
                   float scale, const AttendScratch& s) {
    using V = Vec<float>;
    static_assert(Product::terms == 1 && most_strip_rows<Product> <= AttendScratch::strip_rows);
    const int64_t rows = queries.rows;
    const int64_t panels = round_up(head_dim, panel_columns) / panel_columns;
    int64_t highest = 0;
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t last = visible[r].last > visible[r].prefix ? visible[r].last : visible[r].prefix;
        highest = last > highest ? last : highest;
        s.largest[r] = no_product;
        store(s.total + r * V::lanes, V(0.0F), AllLanes{});
    }
    for (int64_t i = 0; i < AttendScratch::out_bytes(rows, head_dim) / 4; i += V::lanes) {
        store(s.out + i, V(0.0F), AllLanes{});
    }
    const Strips<Product> strips(queries.group);
    const int64_t parts = 4 * ((queries.groups() + strip_groups<Product> - 1) / strip_groups<Product>);
    for (int64_t block = 0; block < highest; block += key_block) {
        const auto seen_by = [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; ++r) {
                if (visible[r].any_in(block, block + key_block)) return true;
            }
            return false;
        };
        if (!seen_by(0, rows)) continue;
        const auto held = cache.block(block);
        int64_t part = 0;
        for (int64_t g = 0; g < queries.groups(); g += strip_groups<Product>, part += 4) {
            const int64_t begin = g * queries.group;
            const int64_t most = strip_groups<Product> * queries.group;
            const int64_t count = rows - begin < most ? rows - begin : most;
            // Panels of tiles have room for whole groups.
            const int64_t room = on_tiles<Product> ? most : count;
            // While this block is computed with, the next one comes: a core alone waits for memory as long as it
            // computes with 64 rows.
            const auto fetch = [&](int64_t step) { cache.touch_part(block + key_block, part + step, parts); };
            if (!seen_by(begin, begin + count)) continue;
            for (int64_t half = 0; half < key_block / panel_columns; ++half) {
                fetch(half);
                held.template multiply_keys<Product>(queries, g, half, s.products + half * panel_columns * room);
            }
            const PackedRows weights{s.weights, count, key_block / Product::cell,
                                     on_tiles<Product> ? queries.group : count};
            alignas(64) float shrink[AttendScratch::strip_rows] = {};
            const bool shrinks = weigh<Product>(s, weights, begin, room, block, visible, scale, shrink);
            const int64_t most_panels = held.panels_at_once(count);
            for (int64_t p = 0; p < panels;) {
                const int64_t taken = panels - p < most_panels ? 1 : most_panels;
                for (int64_t q = p; shrinks && q < p + taken; ++q) {
                    float* out = s.result(begin, q * panel_columns);
                    for (int64_t r = 0; r < count; ++r) {
                        for (int64_t c = 0; c < panel_columns; c += V::lanes) {
                            float* at = out + r * panel_columns + c;
                            store(at, load(at, AllLanes{}) * V(shrink[r]), AllLanes{});
                        }
                    }
                }
                if (p < 2) fetch(2 + p);
                held.template multiply_values<Product>(weights, p, taken, s.result(begin, p * panel_columns),
                                                       s.room(s.rows) * panel_columns);
                p += taken;
            }
        }
    }
}

// The sum of a row's weights, and its inverse, which is zero where the row saw no key.
inline float attended_total(const AttendScratch& s, int64_t r) {
    return sum(load(s.total + r * Vec<float>::lanes, AllLanes{}));
}
inline float attended_scale(const AttendScratch& s, int64_t r) {
    const float total = attended_total(s, r);
    return total > 0.0F ? 1.0F / total : 0.0F;
}
// log of the sum of exp(scale * product) over the visible keys; minus infinity where there are none.
inline float attended_log(const AttendScratch& s, int64_t r, float scale) {
    const float total = attended_total(s, r);
    if (total == 0.0F) return -__builtin_inff();
    float lanes[Vec<float>::lanes];
    store(lanes, logarithm(Vec<float>(total)), AllLanes{});
    return s.largest[r] * scale + (total > 0.0F ? lanes[0] : total);
}

}  // namespace
}  // namespace starflow::STARFLOW_ISA
