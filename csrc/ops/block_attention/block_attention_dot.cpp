// Online-softmax attention; formula, mask and bytes are in block_attention.h, the loop over keys in csrc/cpu/attend.h.
// Compiled once for each ISA.
#include "ops/block_attention/block_attention.h"

#include "ops/block_attention/block_attention_direct.h"
#include "ops/block_attention/block_attention_product.h"

namespace starflow::STARFLOW_ISA {
namespace {

struct Scratch {
    char* queries;
    char* keys;
    char* values;
    VisibleKeys* visible;
    char* attend;
    int64_t bytes;

    Scratch(const AttentionArgs& args, char* memory) {
        int64_t offset = 0;
        const auto take = [&](int64_t size) {
            char* taken = memory + offset;
            // Whole lines, an odd number of them: buffers of the same size would fall into the same sets of a cache.
            offset += round_up(size, 128) + 64;
            return taken;
        };
        const int64_t head_dim = args.shape.head_dim;
        queries = take(packed_bytes(args.tile_rows, head_dim));
        keys = take(panels_bytes(key_block, head_dim));
        values = take(panels_bytes(key_block, head_dim));
        visible = reinterpret_cast<VisibleKeys*>(take(args.tile_rows * static_cast<int64_t>(sizeof(VisibleKeys))));
        attend = take(AttendScratch::bytes(args.tile_rows, head_dim));
        bytes = offset;
    }
};

// Keys and values of one key head in memory.
template <class T>
struct KeysAndValues {
    const T* keys;
    int64_t key_stride;
    const T* values;
    int64_t value_stride;
    int64_t end;        // keys from here on are seen by no row, and not read
    int64_t gap_begin;  // nor keys between these, whose values are zeros in the panels
    int64_t gap_end;
    int64_t head_dim;
    T* part;  // room for a block of keys

    BlockRows<T> keys_of(int64_t begin) const {
        return {keys + begin * key_stride, key_stride, count_of(begin), head_dim};
    }
    BlockRows<T> values_of(int64_t begin) const {
        const int64_t count = count_of(begin);
        const auto within = [&](int64_t key) { return key < begin ? 0 : key > begin + count ? count : key - begin; };
        return {values + begin * value_stride, value_stride, count, head_dim, within(gap_begin), within(gap_end)};
    }

    // The rows of a block, used as they lie. What is less than a block, or than whole cells, is padded with zeros in a
    // copy.
    DirectBlock<T> block(int64_t begin) const {
        constexpr int64_t cell = WidenedProduct<T>::cell;
        BlockRows<T> rows = keys_of(begin);
        if (rows.count < key_block || head_dim % cell != 0) {
            const int64_t depth = round_up(head_dim, cell);
            zero_row<Vec<float>>(part, key_block * depth);
            for (int64_t r = 0; r < rows.count; ++r) {
                copy_row<Vec<float>>(rows.data + r * rows.stride, part + r * depth, head_dim);
            }
            rows = {part, depth, key_block, depth};
        }
        return {rows, values_of(begin)};
    }

    // Calls fetch(from) with the lines of one of `parts` shares of the block of keys from `begin` on.
    template <class Fetch>
    void over_lines(int64_t begin, int64_t part, int64_t parts, const Fetch& fetch) const {
        const int64_t bytes = head_dim * static_cast<int64_t>(sizeof(T));
        // Neighbouring rows: what fetches ahead by itself in a processor follows lines in their order.
        const int64_t last = begin + (part + 1) * key_block / parts;
        for (int64_t row = begin + part * key_block / parts; row < last && row < end; ++row) {
            fetch(keys + row * key_stride, bytes);
            fetch(values + row * value_stride, bytes);
        }
    }

    // The products ask for the next rows themselves.
    void touch_part(int64_t, int64_t, int64_t) const {}

  private:
    int64_t count_of(int64_t begin) const { return end - begin < key_block ? end - begin : key_block; }
};

// The same, packed block by block as the tile comes to them.
template <class Product, class T>
struct PackedWhenUsed {
    KeysAndValues<T> source;
    char* key_panels;
    char* value_panels;

    BlockPanels block(int64_t begin) const {
        constexpr int64_t row_bytes = Product::weight_step;
        const int64_t depth = round_up(source.head_dim, depth_multiple);
        pack_columns<Product>(source.keys_of(begin), key_block, depth, key_panels);
        pack_depth<Product>(source.values_of(begin), key_block, key_block, value_panels);
        return {key_panels, depth * row_bytes, value_panels, key_block * row_bytes};
    }

    void touch_part(int64_t begin, int64_t part, int64_t parts) const {
        source.over_lines(begin, part, parts, [](const T* from, int64_t bytes) { touch(from, bytes); });
    }
};

template <class Product, class T>
inline constexpr bool multiplies_in_place = false;
template <>
inline constexpr bool multiplies_in_place<WidenedProduct<float>, float> = true;

template <class Product, class T>
void attend_tile(const AttentionArgs& args, int64_t b, int64_t kv_head, int64_t first, int64_t rows,
                 const Scratch& scratch) {
    const AttentionShape& shape = args.shape;
    const int64_t head_dim = shape.head_dim;
    const float scale = scale_of(args.scale, b);
    PackedRows queries = packed_rows<Product>(scratch.queries, rows, head_dim);
    bool in_place = false;
    if constexpr (multiplies_in_place<Product, T>) in_place = rows <= most_direct_rows;
    if (in_place) queries.group = rows;
    int64_t end = 0;
    for (int64_t r = 0; r < rows; ++r) {
        const T* query = row_at<const T>(args.q, shape, b, kv_head, first + r);
        pack_row<Product>(queries, r, head_dim, [&](int64_t c, auto lanes) { return load(query + c, lanes); });
        const VisibleKeys seen = visible_keys(args.mask, shape, b, (first + r) / group_of(shape));
        scratch.visible[r] = seen;
        end = seen.prefix > end ? seen.prefix : end;
        end = seen.last > end ? seen.last : end;
    }
    // No row sees what lies between the last row's prefix and the first row's run, as both grow with the position.
    const int64_t gap_begin = scratch.visible[rows - 1].prefix;
    const int64_t gap_end = scratch.visible[0].first;
    const KeysAndValues<T> source{head_at<const T>(args.k, b, kv_head),
                                  args.k.row_stride,
                                  head_at<const T>(args.v, b, kv_head),
                                  args.v.row_stride,
                                  end,
                                  gap_begin,
                                  gap_end,
                                  head_dim,
                                  reinterpret_cast<T*>(scratch.keys)};
    const AttendScratch attended = AttendScratch::in(scratch.attend, rows, head_dim);
    const auto attend_to = [&](const auto& cache) {
        attend<Product>(queries, cache, head_dim, scratch.visible, scale, attended);
    };
    if constexpr (multiplies_in_place<Product, T>) {
        if (in_place) attend_to(source);
    }
    if (!in_place) attend_to(PackedWhenUsed<Product, T>{source, scratch.keys, scratch.values});
    for (int64_t r = 0; r < rows; ++r) {
        T* out = row_at<T>(args.out, shape, b, kv_head, first + r);
        const Vec<float> inverse(attended_scale(attended, r));
        over_channels<Vec<float>>(head_dim, [&](int64_t c, auto lanes) {
            store(out + c, load(attended.result(r, c), lanes) * inverse, lanes);
        });
        args.lse[index_of(shape, b, kv_head, first + r)] = attended_log(attended, r, scale);
    }
}

int64_t row_multiple(Dtype data) {
    int64_t rows = 1;
    visit_attention(data, [&](auto, auto product) { rows = most_strip_rows<decltype(product)>; });
    return rows;
}

int64_t forward_scratch(const AttentionArgs& args) { return Scratch(args, nullptr).bytes; }

void forward(const AttentionArgs& args, int64_t begin, int64_t end, void* memory) {
    const Scratch scratch(args, static_cast<char*>(memory));
    const int64_t rows = rows_of(args.shape);
    const int64_t tiles = (rows + args.tile_rows - 1) / args.tile_rows;
    visit_attention(args.shape.data, [&](auto element, auto product) {
        for (int64_t item = begin; item < end; ++item) {
            const int64_t head = item / tiles;
            // First and last tiles are taken in turn: with a causal mask later tiles have more to do, and threads take
            // neighbouring items.
            const int64_t turn = item % tiles;
            const int64_t first = (turn % 2 == 0 ? turn / 2 : tiles - 1 - turn / 2) * args.tile_rows;
            const int64_t left = rows - first;
            attend_tile<decltype(product), decltype(element)>(args, head / args.shape.kv_heads,
                                                              head % args.shape.kv_heads, first,
                                                              left < args.tile_rows ? left : args.tile_rows, scratch);
        }
    });
}

}  // namespace

const AttentionKernels block_attention{forward_scratch, forward, row_multiple};

}  // namespace starflow::STARFLOW_ISA
