// Softmax attention of a few query rows over keys and values stored as panels, for one key head. For kernel files.
//
//   out[r] = sum_k p[r, k] v[k] / sum_k p[r, k],   p[r, k] = exp(q[r] . k - m[r]) for the visible k,
//   m[r] the largest product so far: the sums are rescaled where it grows (online softmax), so that no row of products
//   longer than a block of 64 keys exists.
//
// Row r sees the keys [0, prefix) and [first[r], last[r]); queries come scaled by 1 / sqrt(head_dim). Blocks of keys
// begin at multiples of 64 whatever the queries are, so that a row's result does not depend on the rows beside it.
#pragma once
#include "cpu/matmul.h"

namespace starflow::STARFLOW_ISA {
namespace {

// Keys and values of one key head: panels of a (slots, head_dim) matrix and of a (head_dim, slots) one.
template <class Product>
struct PanelCache {
    char* keys;
    char* values;
    int64_t head_depth;  // head_dim, padded
    int64_t slots;       // padded to key_block

    static constexpr int64_t element_bytes = Product::weight_step / panel_columns;
    const char* key_panel(int64_t key) const { return keys + key * head_depth * element_bytes; }
    const char* value_panel(int64_t p, int64_t key) const {
        return values + (p * slots + key) * panel_columns * element_bytes;
    }
    // The whole of a block in this layout; caches are.
    const PanelCache& block(int64_t) const { return *this; }
};

// Store element (column c of panel `panel`, depth k), whatever the layout of the storage.
inline void put_element(float* panel, int64_t k, int64_t c, float value) { panel[k * panel_columns + c] = value; }
template <class Half>
inline void put_half(Half* to, float value) {
#if defined(__AVX2__)
    store(to, Vec<float>(value), FirstLanes{1});
#else
    narrow(value, to);
#endif
}
inline void put_element(Float16* panel, int64_t k, int64_t c, float value) {
    put_half(panel + k * panel_columns + c, value);
}
inline void put_element(BFloat16* panel, int64_t k, int64_t c, float value) {
    put_half(panel + (k / 2 * panel_columns + c) * 2 + k % 2, value);
}

// A key's and a value's row into the cache.
template <class Element>
inline void put_key(char* keys, int64_t slot, int64_t head_dim, int64_t head_depth, const float* key) {
    auto* panel = reinterpret_cast<Element*>(keys) + slot / panel_columns * head_depth * panel_columns;
    for (int64_t c = 0; c < head_dim; ++c) put_element(panel, c, slot % panel_columns, key[c]);
}
template <class Element>
inline void put_value(char* values, int64_t slot, int64_t slots, int64_t head_dim, const float* value) {
    for (int64_t c = 0; c < head_dim; ++c) {
        auto* panel = reinterpret_cast<Element*>(values) + c / panel_columns * slots * panel_columns;
        put_element(panel, slot, c % panel_columns, value[c]);
    }
}

// What a tile of query rows needs while it runs, in floats: products, probabilities and what the row sums to so far.
struct AttendScratch {
    float* products;  // (most_rows, 64), as two panels
    char* weights;    // packed rows of 64
    float* out;       // (value panels, rows, 32)
    float* largest;   // (rows,)
    float* total;     // (rows,)

    static constexpr int64_t bytes(int64_t rows, int64_t head_dim) {
        return most_product_rows * key_block * 8 + rows * (round_up(head_dim, depth_multiple) + 2) * 4 + 5 * 64;
    }
    static AttendScratch in(char* memory, int64_t rows, int64_t head_dim) {
        AttendScratch s;
        const auto take = [&memory](int64_t size) {
            char* taken = memory;
            memory += round_up(size, 64);
            return taken;
        };
        s.products = reinterpret_cast<float*>(take(most_product_rows * key_block * 4));
        s.weights = take(most_product_rows * key_block * 4);
        s.out = reinterpret_cast<float*>(take(rows * round_up(head_dim, depth_multiple) * 4));
        s.largest = reinterpret_cast<float*>(take(rows * 4));
        s.total = reinterpret_cast<float*>(take(rows * 4));
        return s;
    }
};

inline constexpr float no_product = -3.0e38F;  // below every product; what a hidden key counts as

// A register at a time of one row's products with a block of keys: (group row, key).
inline float* products_at(const AttendScratch& s, int64_t rows, int64_t row, int64_t key) {
    return s.products + (key / panel_columns * rows + row) * panel_columns + key % panel_columns;
}

// Softmax weights of one row over one block, packed; `scale` by which its earlier sums shrink.
template <class Product>
inline float weigh(const AttendScratch& s, int64_t rows, int64_t row, int64_t index, int64_t block, int64_t prefix,
                   int64_t first, int64_t last) {
    using V = Vec<float>;
    const int64_t end = block + key_block;
    const auto hide = [&](int64_t from, int64_t to) {
        for (int64_t k = from; k < to; ++k) *products_at(s, rows, row, k) = no_product;
    };
    if (prefix < end) {
        const int64_t shown = prefix > block ? prefix - block : 0;
        const int64_t low = first > block ? (first < end ? first - block : key_block) : 0;
        const int64_t high = last < end ? (last > block ? last - block : 0) : key_block;
        if (low > shown) hide(shown, low);
        if (high < key_block) hide(high > shown ? high : shown, key_block);
    }
    V largest(no_product);
    for (int64_t k = 0; k < key_block; k += V::lanes) {
        largest = maximum(load(products_at(s, rows, row, k), AllLanes{}), largest);
    }
    const float before = s.largest[index];
    float now = before;
    alignas(64) float lanes[V::lanes];
    store(lanes, largest, AllLanes{});
    for (int i = 0; i < V::lanes; ++i) now = now > lanes[i] ? now : lanes[i];
    s.largest[index] = now;
    V total(0.0F);
    const PackedRows packed{s.weights, rows, key_block / Product::cell, rows};
    pack_row<Product>(packed, row, key_block, [&](int64_t k, auto) {
        const V product = load(products_at(s, rows, row, k), AllLanes{});
        // A hidden key weighs nothing; NaN is no hidden key and stays.
        const V weight =
            select_greater(V(0.5F * no_product), product, V(0.0F), exponential(maximum(V(-87.0F), product - V(now))));
        total = total + weight;
        return weight;
    });
    const V shrink = exponential(maximum(V(-87.0F), V(before - now)));
    store(lanes, shrink, AllLanes{});
    const float scale = before <= 0.5F * no_product ? 0.0F : lanes[0];
    s.total[index] = s.total[index] * scale + sum(total);
    return scale;
}

// One tile of query rows. `cache.block(b)` gives a PanelCache that holds the block of keys from b on.
// Leaves out (value panels, rows, 32), not yet divided by total, largest and total in the scratch.
template <class Product, class Cache>
inline void attend(const PackedRows& queries, const Cache& cache, int64_t head_dim, int64_t prefix,
                   const int64_t* first, const int64_t* last, const AttendScratch& s) {
    using V = Vec<float>;
    const int64_t rows = queries.rows;
    const int64_t panels = round_up(head_dim, panel_columns) / panel_columns;
    const int64_t cells = queries.cells;
    int64_t lowest = rows > 0 ? first[0] : 0;
    int64_t highest = prefix;
    for (int64_t r = 0; r < rows; ++r) {
        lowest = first[r] < lowest ? first[r] : lowest;
        highest = last[r] > highest ? last[r] : highest;
        s.largest[r] = no_product;
        s.total[r] = 0.0F;
    }
    for (int64_t i = 0; i < panels * rows * panel_columns; i += V::lanes) store(s.out + i, V(0.0F), AllLanes{});
    for (int64_t block = 0; block < highest; block += key_block) {
        if (block >= prefix && block + key_block <= lowest) continue;
        const auto& held = cache.block(block);
        for (int64_t g = 0; g < queries.groups(); ++g) {
            const int64_t count = queries.rows_in(g);
            const int64_t begin = g * queries.group;
            bool any = block < prefix;
            for (int64_t r = begin; r < begin + count; ++r) any |= first[r] < block + key_block && last[r] > block;
            if (!any) continue;
            const MultiplyGroup multiply = GroupTable<Product, Product::most_rows>::pick(count);
            for (int64_t half = 0; half < key_block; half += panel_columns) {
                multiply(queries.group_data(g), held.key_panel(block + half), 0, cells, s.products + half * count,
                         false);
            }
            float scale[most_product_rows];
            bool shrinks = false;
            for (int64_t r = 0; r < count; ++r) {
                scale[r] = weigh<Product>(s, count, r, begin + r, block, prefix, first[begin + r], last[begin + r]);
                shrinks |= scale[r] != 1.0F;
            }
            for (int64_t p = 0; p < panels; ++p) {
                float* out = s.out + (p * rows + begin) * panel_columns;
                if (shrinks) {
                    for (int64_t r = 0; r < count; ++r) {
                        for (int64_t c = 0; c < panel_columns; c += V::lanes) {
                            float* at = out + r * panel_columns + c;
                            store(at, load(at, AllLanes{}) * V(scale[r]), AllLanes{});
                        }
                    }
                }
                multiply(s.weights, held.value_panel(p, block), 0, key_block / Product::cell, out, true);
            }
        }
    }
}

// 1 / total of a row, zero where it saw no key.
inline float attended_scale(const AttendScratch& s, int64_t r) { return s.total[r] > 0.0F ? 1.0F / s.total[r] : 0.0F; }

}  // namespace
}  // namespace starflow::STARFLOW_ISA
