// The kernel of jacobi_sweep; formula, phases and bytes are in jacobi_sweep.h. Compiled once for each ISA.
#include "ops/jacobi_sweep/jacobi_sweep.h"

#include "cpu/attend.h"
#include "cpu/row_norm.h"

namespace starflow::STARFLOW_ISA {
namespace {

// Buffers that the team shares.
struct Shared {
    float* h;         // (rows, width): the residual stream
    float* qkv;       // (rows, (heads + 2 kv_heads) * head_dim)
    float* attended;  // (rows, heads * head_dim); before a post-norm, the branch of the MLP
    float* hidden;    // (rows, hidden); before a post-norm, the branch of the attention
    int64_t h_stride, qkv_stride, attended_stride, hidden_stride;
    int64_t bytes;

    Shared(const SweepBlock& block, int64_t rows, char* memory) {
        const int64_t heads = block.heads * block.head_dim;
        h_stride = row_stride(block.width);
        qkv_stride = row_stride(heads + 2 * block.kv_heads * block.head_dim);
        attended_stride = row_stride(heads > block.width ? heads : block.width);
        hidden_stride = row_stride(block.hidden > block.width ? block.hidden : block.width);
        int64_t offset = 0;
        const auto take = [&](int64_t stride) {
            auto* taken = reinterpret_cast<float*>(memory + offset);
            offset += round_up(rows * stride * 4, 64);
            return taken;
        };
        h = take(h_stride);
        qkv = take(qkv_stride);
        attended = take(attended_stride);
        hidden = take(hidden_stride);
        bytes = offset;
    }
};

inline int64_t deepest(const SweepBlock& block) {
    int64_t depth = block.channels;
    const int64_t others[] = {block.width, block.hidden, block.heads * block.head_dim};
    for (const int64_t other : others) depth = other > depth ? other : depth;
    return depth;
}

// Buffers of one member.
struct Own {
    char* packed;  // rows of a product
    float* sums;   // (rows, 32)
    char* queries;
    char* scratch;
    int64_t bytes;

    Own(const SweepBlock& block, int64_t rows, char* memory) {
        int64_t offset = 0;
        const auto take = [&](int64_t size) {
            char* taken = memory + offset;
            offset += round_up(size, 64);
            return taken;
        };
        packed = take(packed_bytes(rows, deepest(block)));
        sums = reinterpret_cast<float*>(take(rows * panel_columns * 4));
        queries = take(packed_bytes(attend_rows, block.head_dim));
        scratch = take(AttendScratch::bytes(attend_rows, block.head_dim));
        // Members' memory ends in an odd line, so that they do not share sets of a cache.
        bytes = round_up(offset, 128) + 64;
    }
};

int64_t shared_bytes(const SweepBlock& block, int64_t rows) { return Shared(block, rows, nullptr).bytes; }
int64_t own_bytes(const SweepBlock& block, int64_t rows) { return Own(block, rows, nullptr).bytes; }

// Run visitor(to + column, value, lanes) for the columns of panel p that exist, a register at a time.
template <class Visitor>
inline void over_panel(const Panels& weights, int64_t p, int64_t r, const float* sums, const Visitor& visitor) {
    using V = Vec<float>;
    const float* row = sums + r * panel_columns;
    for (int64_t c = 0; c < panel_columns; c += V::lanes) {
        const int64_t column = p * panel_columns + c;
        const int64_t left = weights.columns - column;
        if (left <= 0) return;
        const auto finish = [&](auto lanes) {
            V value = load(row + c, lanes);
            if (weights.column_scale != nullptr) value = value * load(weights.column_scale + column, lanes);
            if (weights.bias != nullptr) value = value + load(weights.bias + column, lanes);
            visitor(column, value, lanes);
        };
        if (left >= V::lanes) {
            finish(AllLanes{});
        } else {
            finish(FirstLanes{static_cast<int>(left)});
        }
    }
}

struct Sweep {
    const SweepArgs& args;
    const TeamSlice& team;
    const SweepBlock& block;
    Shared shared;

    Sweep(const SweepArgs& a, const TeamSlice& t)
        : args(a), team(t), block(a.block), shared(a.block, a.rows, a.shared) {}

    Own own(int64_t member) const {
        const Own sized(block, args.rows, nullptr);
        return Own(block, args.rows, args.own + member * sized.bytes);
    }

    // rows W^T for a member's panels. pack(product, packed rows, r) packs one row; write(column, r, value, lanes).
    template <class Pack, class Write>
    void multiply(int64_t member, const Panels& weights, const Pack& pack, const Write& write) const {
        const int64_t first = team.first(member, weights.count());
        const int64_t last = team.last(member, weights.count());
        if (first == last) return;
        const Own mine = own(member);
        visit_product(weights.storage, block.activations, [&](auto product) {
            using Product = decltype(product);
            const PackedRows packed = packed_rows<Product>(mine.packed, args.rows, weights.depth);
            for (int64_t r = 0; r < args.rows; ++r) pack(product, packed, r);
            multiply_panels<Product>(packed, weights, first, last, mine.sums, [&](int64_t p, const float* sums) {
                for (int64_t r = 0; r < args.rows; ++r) {
                    over_panel(weights, p, r, sums,
                               [&](int64_t column, Vec<float> value, auto lanes) { write(column, r, value, lanes); });
                }
            });
        });
    }

    template <class Product>
    static void pack_plain(const PackedRows& packed, int64_t r, const float* row, int64_t depth) {
        pack_row<Product>(packed, r, depth, [&](int64_t c, auto lanes) { return load(row + c, lanes); });
    }

    void embed(int64_t member) const {
        if (args.previous == nullptr) {
            for (int64_t r = team.first(member, args.rows); r < team.last(member, args.rows); ++r) {
                over_channels(block.width, [&](int64_t c, auto lanes) {
                    store(shared.h + r * shared.h_stride + c, load(args.embedded + r * block.width + c, lanes), lanes);
                });
            }
            return;
        }
        multiply(
            member, block.proj_in,
            [&](auto product, const PackedRows& packed, int64_t r) {
                const SweepWindow& window = args.windows[args.window_of_row[r]];
                const bool start = window.slot + r - window.first_row == block.text_tokens;
                const float* row =
                    start && block.start_token != nullptr ? block.start_token : args.previous + r * block.channels;
                pack_plain<decltype(product)>(packed, r, row, block.channels);
            },
            [&](int64_t column, int64_t r, Vec<float> value, auto lanes) {
                const SweepWindow& window = args.windows[args.window_of_row[r]];
                if (block.position != nullptr) {
                    const int64_t slot = window.slot + r - window.first_row - block.text_tokens;
                    value = value + load(block.position + slot * block.width + column, lanes);
                }
                if (block.condition != nullptr) {
                    value = value + load(block.condition + window.cache_row * block.width + column, lanes);
                }
                store(shared.h + r * shared.h_stride + column, value, lanes);
            });
    }

    // Norm (none too) of one head in place, then its rotation by the tables at `slot`.
    void turn(float* head, const RowNorm& norm, const float* cos, const float* sin, int64_t slot) const {
        normalise_row(head, block.head_dim, norm);
        if (cos == nullptr) return;
        const int64_t half = block.head_dim / 2;
        cos += slot * half;
        sin += slot * half;
        over_channels(half, [&](int64_t c, auto lanes) {
            const Vec<float> u = load(head + c, lanes);
            const Vec<float> v = load(head + half + c, lanes);
            const Vec<float> cosine = load(cos + c, lanes);
            const Vec<float> sine = load(sin + c, lanes);
            store(head + c, u * cosine - v * sine, lanes);
            store(head + half + c, v * cosine + u * sine, lanes);
        });
    }

    template <class Visitor>
    void visit_cache(const Visitor& visitor) const {
        switch (block.cache) {
            case Storage::float16:
                return visitor(Float16{});
            case Storage::bfloat16:
                return visitor(BFloat16{});
            default:
                return visitor(float{});
        }
    }

    int64_t head_size() const { return cache_head_bytes(block.cache, block.slots, block.head_dim); }

    // Queries are turned where they lie; keys and values go into the caches.
    void append(int64_t member, const SweepLayer& layer) const {
        const int64_t parts = block.heads + block.kv_heads;
        const int64_t items = args.rows * parts;
        const int64_t head_depth = round_up(block.head_dim, depth_multiple);
        const int64_t slots = round_up(block.slots, key_block);
        visit_cache([&](auto element) {
            using Element = decltype(element);
            for (int64_t i = team.first(member, items); i < team.last(member, items); ++i) {
                const int64_t r = i / parts;
                const int64_t part = i % parts;
                const SweepWindow& window = args.windows[args.window_of_row[r]];
                const int64_t slot = window.slot + r - window.first_row;
                float* row = shared.qkv + r * shared.qkv_stride;
                if (part < block.heads) {
                    turn(row + part * block.head_dim, layer.query_norm, block.query_cos, block.query_sin, slot);
                    continue;
                }
                if (slot < window.keep) continue;
                const int64_t head = part - block.heads;
                float* key = row + part * block.head_dim;
                turn(key, layer.key_norm, block.key_cos, block.key_sin, slot);
                const int64_t offset = (window.cache_row * block.kv_heads + head) * head_size();
                put_key<Element>(layer.keys + offset, slot, block.head_dim, head_depth, key);
                put_value<Element>(layer.values + offset, slot, slots, block.head_dim,
                                   key + block.kv_heads * block.head_dim);
            }
        });
    }

    // Tiles of a window's query rows: (token, head of the group), whole tokens.
    int64_t tile_tokens() const {
        const int64_t group = block.heads / block.kv_heads;
        return group >= attend_rows ? 1 : attend_rows / group;
    }

    void attend_all(int64_t member, const SweepLayer& layer) const {
        visit_attention_product(block.cache, block.activations, [&](auto product) {
            using Product = decltype(product);
            int64_t item = 0;
            const int64_t tokens = tile_tokens();
            for (int64_t w = 0; w < args.window_count; ++w) {
                const SweepWindow& window = args.windows[w];
                for (int64_t head = 0; head < block.kv_heads; ++head) {
                    for (int64_t begin = 0; begin < window.count; begin += tokens, ++item) {
                        if (item % team.barrier.members != member) continue;
                        const int64_t left = window.count - begin;
                        attend_tile<Product>(member, layer, window, head, begin, left < tokens ? left : tokens);
                    }
                }
            }
        });
    }

    template <class Product>
    void attend_tile(int64_t member, const SweepLayer& layer, const SweepWindow& window, int64_t head, int64_t begin,
                     int64_t tokens) const {
        const Own mine = own(member);
        const int64_t group = block.heads / block.kv_heads;
        // More heads in a group than a tile has rows: some heads at a time.
        for (int64_t some = 0; some < group; some += attend_rows) {
            const int64_t heads = group - some < attend_rows ? group - some : attend_rows;
            const int64_t rows = tokens * heads;
            const PackedRows queries = packed_rows<Product>(mine.queries, rows, block.head_dim);
            VisibleKeys visible[attend_rows];
            const float scale =
                1.0F / (__builtin_sqrtf(static_cast<float>(block.head_dim)) * block.temperature[window.cache_row]);
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t token = begin + r / heads;
                const float* query = shared.qkv + (window.first_row + token) * shared.qkv_stride +
                                     (head * group + some + r % heads) * block.head_dim;
                pack_row<Product>(queries, r, block.head_dim,
                                  [&](int64_t c, auto lanes) { return load(query + c, lanes); });
                visible[r] = {0, 0, window.slot + token + 1};
            }
            const int64_t offset = (window.cache_row * block.kv_heads + head) * head_size();
            const PanelCache<Product> cache{layer.keys + offset, layer.values + offset,
                                            round_up(block.head_dim, depth_multiple), round_up(block.slots, key_block)};
            const AttendScratch scratch = AttendScratch::in(mine.scratch, rows, block.head_dim);
            attend<Product>(queries, cache, block.head_dim, visible, scale, scratch);
            for (int64_t r = 0; r < rows; ++r) {
                float* out = shared.attended + (window.first_row + begin + r / heads) * shared.attended_stride +
                             (head * group + some + r % heads) * block.head_dim;
                const Vec<float> inverse(attended_scale(scratch, r));
                over_channels(block.head_dim, [&](int64_t c, auto lanes) {
                    const float* from =
                        scratch.out + (c / panel_columns * rows + r) * panel_columns + c % panel_columns;
                    store(out + c, load(from, lanes) * inverse, lanes);
                });
            }
        }
    }

    // A branch's last product, added to the residual stream: at once, or after its norm (a phase more).
    template <class Pack>
    void add_branch(const Panels& weights, const RowNorm& post, float* branch, int64_t branch_stride,
                    const Pack& pack) const {
        const bool normed = post.kind != NormKind::none;
        team.run([&](int64_t member) {
            multiply(member, weights, pack, [&](int64_t column, int64_t r, Vec<float> value, auto lanes) {
                if (normed) {
                    store(branch + r * branch_stride + column, value, lanes);
                } else {
                    float* at = shared.h + r * shared.h_stride + column;
                    store(at, load(at, lanes) + value, lanes);
                }
            });
        });
        if (!normed) return;
        team.run([&](int64_t member) {
            for (int64_t r = team.first(member, args.rows); r < team.last(member, args.rows); ++r) {
                float* row = branch + r * branch_stride;
                normalise_row(row, block.width, post);
                float* at = shared.h + r * shared.h_stride;
                over_channels(block.width, [&](int64_t c, auto lanes) {
                    store(at + c, load(at + c, lanes) + load(row + c, lanes), lanes);
                });
            }
        });
    }

    void run_layer(const SweepLayer& layer) const {
        const auto pack_stream = [&](const RowNorm& norm) {
            return [this, &norm](auto product, const PackedRows& packed, int64_t r) {
                pack_normalised_row<decltype(product)>(packed, r, shared.h + r * shared.h_stride, block.width, norm);
            };
        };
        team.run([&](int64_t member) {
            multiply(member, layer.qkv, pack_stream(layer.attention_norm),
                     [&](int64_t column, int64_t r, Vec<float> value, auto lanes) {
                         store(shared.qkv + r * shared.qkv_stride + column, value, lanes);
                     });
        });
        team.run([&](int64_t member) { append(member, layer); });
        team.run([&](int64_t member) { attend_all(member, layer); });
        add_branch(layer.proj, layer.attention_post, shared.hidden, shared.hidden_stride,
                   [&](auto product, const PackedRows& packed, int64_t r) {
                       pack_plain<decltype(product)>(packed, r, shared.attended + r * shared.attended_stride,
                                                     layer.proj.depth);
                   });
        team.run([&](int64_t member) {
            const bool gated = layer.gate.data != nullptr;
            multiply(member, layer.up, pack_stream(layer.mlp_norm),
                     [&](int64_t column, int64_t r, Vec<float> value, auto lanes) {
                         store(shared.hidden + r * shared.hidden_stride + column, gated ? value : gelu(value), lanes);
                     });
            if (!gated) return;
            multiply(member, layer.gate, pack_stream(layer.mlp_norm),
                     [&](int64_t column, int64_t r, Vec<float> value, auto lanes) {
                         float* at = shared.hidden + r * shared.hidden_stride + column;
                         store(at, gelu_tanh(value) * load(at, lanes), lanes);
                     });
        });
        add_branch(layer.down, layer.mlp_post, shared.attended, shared.attended_stride,
                   [&](auto product, const PackedRows& packed, int64_t r) {
                       pack_plain<decltype(product)>(packed, r, shared.hidden + r * shared.hidden_stride, block.hidden);
                   });
    }

    void run() const {
        team.run([&](int64_t member) { embed(member); });
        for (int64_t l = 0; l < block.layer_count; ++l) run_layer(block.layers[l]);
        if (args.raw == nullptr) return;
        team.run([&](int64_t member) {
            multiply(
                member, block.proj_out,
                [&](auto product, const PackedRows& packed, int64_t r) {
                    pack_normalised_row<decltype(product)>(packed, r, shared.h + r * shared.h_stride, block.width,
                                                           block.final_norm);
                },
                [&](int64_t column, int64_t r, Vec<float> value, auto lanes) {
                    store(args.raw + r * block.proj_out.columns + column, value, lanes);
                });
        });
    }
};

void sweep(const SweepArgs& args, const TeamSlice& team) { Sweep(args, team).run(); }

}  // namespace

const SweepKernels jacobi_sweep{shared_bytes, own_bytes, sweep};

}  // namespace starflow::STARFLOW_ISA
