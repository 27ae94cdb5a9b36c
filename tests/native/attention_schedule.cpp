// Random masks: what csrc/ops/block_attention/block_attention_schedule.h says that tiles see, against every pair of a
// query and a key. Prints what is wrong, and the number of masks.
#include "ops/block_attention/block_attention_schedule.h"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace {

using namespace starflow;

std::mt19937 generator(7);

int64_t draw(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(generator() % static_cast<uint64_t>(high - low + 1));
}

[[noreturn]] void wrong(const char* what, int mask) {
    std::printf("mask %d: %s\n", mask, what);
    std::exit(1);
}

// By the rule in words: no more than a comparison of frames.
bool visible(const AttentionMask& mask, int64_t keys, int64_t query, int64_t key) {
    const int64_t position = mask.start + query;
    const auto frame_of = [&](int64_t at) {
        const int64_t offset = at - mask.prefix;
        int64_t frame = 0;
        while ((frame + 1) * mask.frame_tokens <= offset) ++frame;
        while (frame * mask.frame_tokens > offset) --frame;
        return frame;
    };
    if (key >= mask.length || key >= keys || (mask.causal && key > position)) return false;
    if (!mask.frames || key < mask.prefix) return true;
    const int64_t query_frame = frame_of(position);
    const int64_t frame = frame_of(key);
    return frame < (query_frame < 0 ? 0 : query_frame) + mask.look_ahead &&
           (mask.window < 0 || frame >= query_frame + mask.look_ahead - 1 - mask.window);
}

struct RandomMask {
    AttentionShape shape{};
    AttentionMask mask{};

    static RandomMask draw_one() {
        RandomMask random;
        AttentionShape& shape = random.shape;
        AttentionMask& mask = random.mask;
        shape.batch = 1;
        shape.heads = shape.kv_heads = 1;
        shape.queries = draw(1, 90);
        shape.keys = draw(1, 150);
        mask.causal = draw(0, 1) != 0;
        mask.frames = draw(0, 2) != 0;
        mask.prefix = draw(0, 40);
        mask.frame_tokens = draw(1, 30);
        mask.look_ahead = draw(1, 3);
        mask.window = draw(0, 2) == 0 ? -1 : draw(mask.look_ahead - 1, 4);
        mask.start = draw(-20, 160);
        mask.length = draw(0, 2) == 0 ? draw(-3, 160) : shape.keys;
        return random;
    }
};

void check_mask(int number) {
    const RandomMask random = RandomMask::draw_one();
    const AttentionShape& shape = random.shape;
    const AttentionMask& mask = random.mask;
    const auto queries = static_cast<int>(shape.queries);
    const auto keys = static_cast<int>(shape.keys);
    for (int i = 0; i < queries; ++i) {
        const VisibleKeysOf<int> seen = visible_in_tile(mask, shape, 0, i);
        for (int k = 0; k < keys; ++k) {
            if (seen.has(k) != visible(mask, keys, i, k)) wrong("a query sees other keys", number);
        }
    }
    for (const int rows : {1, 16, 64}) {
        for (int first = 0; first < queries; first += rows) {
            const int end = first + rows < queries ? first + rows : queries;
            const VisibleByRows seen = VisibleByRows::between(visible_in_tile(mask, shape, 0, first),
                                                              visible_in_tile(mask, shape, 0, end - 1));
            for (const int columns : {16, 32, 64}) {
                const KeyTiles tiles = KeyTiles::of(seen.any, columns);
                std::vector<int> passes((keys + columns - 1) / columns);
                for (int t = 0; t < tiles.count; ++t) ++passes.at(tiles.tile(t));
                for (int tile = 0; tile < static_cast<int>(passes.size()); ++tile) {
                    bool any = false;
                    bool all = true;
                    for (int k = tile * columns; k < (tile + 1) * columns; ++k) {
                        for (int i = first; i < end; ++i) {
                            const bool sees = k < keys && visible(mask, keys, i, k);
                            any = any || sees;
                            all = all && sees;
                            if (sees && !seen.any.has(k)) wrong("a key that a row sees is not fetched", number);
                        }
                    }
                    if (passes[tile] > 1) wrong("a tile is passed over twice", number);
                    if (any && passes[tile] == 0) wrong("a visible tile is left out", number);
                    const bool whole = seen.every.all_in(tile * columns, (tile + 1) * columns);
                    if (whole && !all) wrong("a tile with hidden keys counts as wholly visible", number);
                }
            }
        }
    }
    for (int begin = 0; begin < keys; begin += 16) {
        const int end = begin + 16 < keys ? begin + 16 : keys;
        const QueryRange range = visible_queries(mask, shape, 0, begin, end);
        if (range.begin < 0 || range.end > queries || range.begin > range.end) wrong("no range of queries", number);
        for (int i = 0; i < queries; ++i) {
            for (int k = begin; k < end; ++k) {
                if (visible(mask, keys, i, k) && (i < range.begin || i >= range.end)) {
                    wrong("a query that sees a key is left out", number);
                }
            }
        }
    }
}

// The gradient's kernel of sm_90a: tiles of keys come to tiles of queries in an order, each to those that see it and no
// other, by whose number the next ones wait.
void check_turns(int number) {
    const RandomMask random = RandomMask::draw_one();
    const AttentionShape& shape = random.shape;
    AttentionMask mask = random.mask;
    // Runs that leave keys out between two queries, too.
    mask.window = draw(-1, 4);
    if (!mask.frames) mask.first = draw(-3, 60);
    const auto queries = static_cast<int>(shape.queries);
    const auto keys = static_cast<int>(shape.keys);
    for (const int columns : {16, 64}) {
        for (const int rows : {1, 16, 64}) {
            const auto query_tiles = static_cast<int>(divide_up(queries, rows));
            const auto key_tiles = static_cast<int>(divide_up(keys, columns));
            std::vector<int> turns(query_tiles);
            for (int key_tile = key_tiles - 1; key_tile >= 0; --key_tile) {
                const QueryRange range = visible_query_tiles(mask, shape, 0, key_tile * columns, columns, rows);
                if (range.begin < 0 || range.end > query_tiles || range.begin > range.end) {
                    wrong("no range of tiles of queries", number);
                }
                for (int tile = 0; tile < query_tiles; ++tile) {
                    const VisibleByRows seen = visible_by_tile(mask, shape, 0, tile * rows, rows);
                    const KeyTiles tiles = KeyTiles::of(seen.any, columns);
                    const int place = tiles.place_of(key_tile);
                    if (place >= 0 && tiles.tile(place) != key_tile) wrong("the place of another tile", number);
                    const bool comes = tile >= range.begin && tile < range.end && place >= 0;
                    if (!comes && place >= 0) wrong("others wait for a tile of keys that does not come", number);
                    if (comes && tiles.count - 1 - place != turns[tile]++) wrong("a turn of another tile", number);
                    for (int i = tile * rows; i < (tile + 1) * rows && i < queries; ++i) {
                        for (int k = key_tile * columns; k < (key_tile + 1) * columns && k < keys; ++k) {
                            if (!comes && (mask.frames || k >= mask.first) && visible(mask, keys, i, k))
                                wrong("a visible tile does not come", number);
                        }
                    }
                }
            }
            for (int tile = 0; tile < query_tiles; ++tile) {
                const VisibleByRows seen = visible_by_tile(mask, shape, 0, tile * rows, rows);
                if (KeyTiles::of(seen.any, columns).count != turns[tile]) wrong("a turn is left out", number);
            }
        }
    }
}

// Schedules of all sizes: bounds that kernels and memory rely on.
void check_schedules() {
    for (const Dtype data : {Dtype::float32, Dtype::bfloat16, Dtype::float16}) {
        const int bytes = data == Dtype::float32 ? 4 : 2;
        for (const int64_t head_dim : {1, 16, 64, 65, 128, 130, 256}) {
            const int64_t width = tile_width(head_dim);
            if (width < head_dim || width > most_head_dim) wrong("a head does not fit its tile", 0);
            for (const bool large : {false, true}) {
                const AttentionTile tile = forward_tile(bytes, width, large);
                if (tile.columns != forward_tile(bytes, width, !large).columns) wrong("bits depend on the rows", 0);
            }
            for (const int64_t queries : {1, 7, 64, 1000, 32768}) {
                for (const int64_t keys : {1, 511, 512, 4096, 65536}) {
                    for (const int64_t multiprocessors : {1, 46, 108, 132, 148}) {
                        for (const int64_t choice : {1, 4, 48, -1, -4, -48}) {
                            const int64_t heads = choice < 0 ? -choice : choice;
                            const bool wgmma = choice < 0;
                            const AttentionShape shape{2, 2 * heads, heads, queries, keys, head_dim, data};
                            const AttentionSchedule schedule = attention_schedule(shape, multiprocessors, wgmma);
                            const bool large = schedule.tile_rows > forward_tile(bytes, width, false).rows;
                            const int64_t blocks = schedule.row_tiles * 2 * heads;
                            const bool covers = schedule.row_tiles * schedule.tile_rows >= 2 * queries &&
                                                (schedule.row_tiles - 1) * schedule.tile_rows < 2 * queries;
                            if (!covers) wrong("tiles do not cover the rows once", 0);
                            if (schedule.splits < 1) wrong("no part", 0);
                            if (schedule.splits > 1 && keys / schedule.splits < 512) wrong("a part is small", 0);
                            if (schedule.splits > 1 && blocks * schedule.splits > 2 * multiprocessors) {
                                wrong("more parts than there are places", 0);
                            }
                            if (large && 4 * blocks < 3 * multiprocessors) wrong("few large tiles", 0);
                            if (!(wgmma && large) && blocks < multiprocessors && keys >= 1024 * multiprocessors &&
                                multiprocessors <= 64 && 2 * multiprocessors / blocks > 1 &&
                                blocks * schedule.splits < multiprocessors) {
                                wrong("multiprocessors without work", 0);
                            }
                            const int64_t elements = parts_elements(shape, schedule.splits);
                            const int64_t rows = 2 * 2 * heads * queries;
                            if (elements != (schedule.splits > 1 ? schedule.splits * rows * (head_dim + 1) : 0)) {
                                wrong("memory of the parts", 0);
                            }
                        }
                    }
                }
            }
        }
    }
    // A window of the 7B model on A100 and H100 and its long cache: each multiprocessor has two blocks, or nearly.
    const AttentionShape window{1, 48, 48, 64, 32768, 64, Dtype::bfloat16};
    static_assert(2 * 108 / 48 == 4);
    if (attention_schedule(window, 108, false).splits != 4 || attention_schedule(window, 132, true).splits != 5) {
        wrong("parts of the decode shape", 0);
    }
    const AttentionShape training{4, 48, 48, 4096, 4096, 64, Dtype::bfloat16};
    for (const bool wgmma : {false, true}) {
        const AttentionSchedule whole = attention_schedule(training, 132, wgmma);
        if (whole.tile_rows != 128 || whole.splits != 1) wrong("tiles of training", 0);
    }
    // Windows of the deep block with guidance on H200: 128 large tiles for 132 multiprocessors by wgmma, and as many
    // small ones, where large ones would be half empty.
    for (const int64_t queries : {64, 128}) {
        const AttentionShape deep{2, 64, 64, queries, 33646, 64, Dtype::bfloat16};
        if (attention_schedule(deep, 132, true).tile_rows != queries) wrong("tiles of a window by wgmma", 0);
        if (attention_schedule(deep, 132, false).tile_rows != 64) wrong("tiles of a window by mma.sync", 0);
    }
}

// Which kernel runs a forward pass on CUDA: whatever the queries are.
void check_forward_kernels() {
    alignas(16) static uint16_t memory[16];
    const AttentionShape usual{2, 4, 2, 64, 300, 64, Dtype::bfloat16};
    const HeadRows rows{memory, 2 * 300 * 64, 64, 2 * 64};
    const auto check = [&](const char* what, AttentionKernel expected, const AttentionShape& shape, const HeadRows& k,
                           const HeadRows& v, int major = 9, bool built = true) {
        for (const int64_t queries : {1, 64, 4096}) {
            AttentionShape asked = shape;
            asked.queries = queries;
            if (forward_kernel_for(asked, k, v, major, built) != expected) wrong(what, 0);
        }
    };
    const auto with = [](const AttentionShape& shape, const auto& change) {
        AttentionShape changed = shape;
        change(changed);
        return changed;
    };
    const auto moved = [&](const auto& change) {
        HeadRows changed = rows;
        change(changed);
        return changed;
    };
    using enum AttentionKernel;
    check("the usual call", wgmma, usual, rows, rows);
    for (const int major : {8, 10, 12}) check("another device", other_device, usual, rows, rows, major);
    check("a build without sm_90a", not_built, usual, rows, rows, 9, false);
    check("float16", wgmma, with(usual, [](auto& s) { s.data = Dtype::float16; }), rows, rows);
    check("float32", float32, with(usual, [](auto& s) { s.data = Dtype::float32; }), rows, rows);
    for (const int64_t head_dim : {1, 17, 128}) {
        check("a head", wgmma, with(usual, [&](auto& s) { s.head_dim = head_dim; }), rows, rows);
    }
    for (const int64_t head_dim : {129, 256}) {
        check("a wide head", wide_head, with(usual, [&](auto& s) { s.head_dim = head_dim; }), rows, rows);
    }
    check("no keys", no_keys, with(usual, [](auto& s) { s.keys = 0; }), rows, rows);
    const HeadRows shifted = moved([](auto& r) { r.data = memory + 4; });
    check("keys that start anywhere", unaligned, usual, shifted, rows);
    check("values that start anywhere", unaligned, usual, rows, shifted);
    const HeadRows odd_rows = moved([](auto& r) { r.row_stride = 2 * 64 + 4; });
    const HeadRows odd_heads = moved([](auto& r) { r.head_stride = 65; });
    const HeadRows odd_samples = moved([](auto& r) { r.batch_stride += 2; });
    for (const HeadRows& odd : {odd_rows, odd_heads, odd_samples}) check("distances", unaligned, usual, odd, rows);
    const AttentionShape one = with(usual, [](auto& s) { s.batch = s.kv_heads = s.keys = 1; });
    for (const HeadRows& odd : {odd_rows, odd_heads, odd_samples}) check("one of each", wgmma, one, odd, rows);
    const HeadRows same_row = moved([](auto& r) { r.row_stride = 0; });
    const HeadRows same_head = moved([](auto& r) { r.head_stride = 0; });
    const HeadRows same_sample = moved([](auto& r) { r.batch_stride = 0; });
    const HeadRows dense = moved([](auto& r) { r.row_stride = 32; });
    for (const HeadRows& over : {same_row, same_head, same_sample, dense}) {
        check("rows on top of each other", overlapping, usual, rows, over);
    }
    for (const HeadRows& over : {same_row, same_head, same_sample}) check("one of each", wgmma, one, rows, over);
}

// Which kernel runs a gradient on CUDA: as forward, and by the queries.
void check_backward_kernels() {
    alignas(16) static uint16_t memory[16];
    const AttentionShape usual{2, 4, 2, 30, 300, 64, Dtype::bfloat16};
    const HeadRows keys{memory, 2 * 300 * 64, 64, 2 * 64};
    const HeadRows queries{memory, 4 * 30 * 64, 64, 4 * 64};
    const auto check = [&](const char* what, AttentionKernel expected, const AttentionShape& shape, const HeadRows& q,
                           const HeadRows& k, int major = 9) {
        if (backward_kernel_for(shape, q, k, keys, major, true) != expected) wrong(what, 0);
    };
    using enum AttentionKernel;
    check("the usual call", wgmma, usual, queries, keys);
    check("another device", other_device, usual, queries, keys, 8);
    HeadRows changed = keys;
    changed.data = memory + 4;
    check("keys that start anywhere", unaligned, usual, queries, changed);
    AttentionShape none = usual;
    none.queries = 0;
    check("no queries", no_queries, none, queries, keys);
    changed = queries;
    changed.head_stride = 65;
    check("queries that start anywhere", unaligned_queries, usual, changed, keys);
    changed = queries;
    changed.row_stride = 0;
    check("queries on top of each other", overlapping_queries, usual, changed, keys);
    AttentionShape one = usual;
    one.queries = 1;
    check("one query", wgmma, one, changed, keys);
    // The deep block of the published model, a whole clip: sums of every query.
    const AttentionShape clip{1, 64, 64, 33390, 33390, 64, Dtype::bfloat16};
    const GradientMemory memory_of = GradientMemory::of(clip);
    if (memory_of.sums != int64_t{261} * 128 * 64 * 64 || memory_of.turns != 261 * 64 * 2) wrong("memory", 0);
    AttentionShape few = clip;
    few.keys = sm90_columns;
    if (GradientMemory::of(few).sums != 0) wrong("memory of one tile of keys", 0);
}

}  // namespace

int main(int, char** arguments) {
    const int masks = std::atoi(arguments[1]);
    for (int i = 0; i < masks; ++i) check_mask(i);
    for (int i = 0; i < masks; ++i) check_turns(i);
    check_schedules();
    check_forward_kernels();
    check_backward_kernels();
    std::printf("%d masks\n", masks);
}
