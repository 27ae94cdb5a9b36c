// The kernel of jacobi_sweep; formula, phases and bytes are in jacobi_sweep.h. Compiled once for each ISA.
#include "ops/jacobi_sweep/jacobi_sweep.h"

#include "cpu/attend.h"
#include "cpu/row_norm.h"
#include "ops/block_attention/block_attention_rows.h"

namespace starflow::STARFLOW_ISA {
namespace {

// Buffers that the team shares.
struct Shared {
    float* h;         // (rows, width): the residual stream
    float* qkv;       // (rows, (heads + 2 kv_heads) * head_dim)
    float* attended;  // (rows, heads * head_dim)
    char* hidden;     // packed rows of `hidden`, as the second product of the MLP takes them
    float* gated;     // (rows, hidden): what a gate multiplies
    float* branch;    // (rows, width): before a post-norm
    int64_t h_stride, qkv_stride, attended_stride, gated_stride;
    int64_t bytes;

    Shared(const SweepBlock& block, int64_t rows, char* memory) {
        const int64_t heads = block.heads * block.head_dim;
        h_stride = row_stride(block.width);
        qkv_stride = row_stride(heads + 2 * block.kv_heads * block.head_dim);
        attended_stride = row_stride(heads);
        gated_stride = row_stride(block.hidden);
        int64_t offset = 0;
        const auto take = [&](int64_t size) {
            char* taken = memory + offset;
            offset += round_up(size, 64);
            return taken;
        };
        const auto take_rows = [&](int64_t stride) { return reinterpret_cast<float*>(take(rows * stride * 4)); };
        h = take_rows(h_stride);
        qkv = take_rows(qkv_stride);
        attended = take_rows(attended_stride);
        hidden = take(packed_bytes(rows, block.hidden));
        bool gates = false;
        bool norms = false;
        for (int64_t l = 0; l < block.layer_count; ++l) {
            const SweepLayer& layer = block.layers[l];
            gates |= layer.gate.data != nullptr;
            norms |= layer.attention_post.kind != NormKind::none || layer.mlp_post.kind != NormKind::none;
        }
        gated = take_rows(gates ? gated_stride : 0);
        branch = take_rows(norms ? h_stride : 0);
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
        sums = reinterpret_cast<float*>(take(sums_bytes(rows)));
        queries = take(packed_bytes(attend_rows, block.head_dim));
        scratch = take(AttendScratch::bytes(attend_rows, block.head_dim));
        // Members' memory ends in an odd line, so that they do not share sets of a cache.
        bytes = round_up(offset, 128) + 64;
    }
};

int64_t shared_bytes(const SweepBlock& block, int64_t rows) { return Shared(block, rows, nullptr).bytes; }
int64_t own_bytes(const SweepBlock& block, int64_t rows) { return Own(block, rows, nullptr).bytes; }

// The columns of panel p that exist, of rows of sums, with what a product adds to them.
class PanelColumns {
    using V = Vec<float>;
    static constexpr int registers = panel_columns / V::lanes;

  public:
    PanelColumns(const Panels& weights, int64_t p)
        : begin_(p * panel_columns),
          width_(weights.columns - begin_ < panel_columns ? weights.columns - begin_ : panel_columns),
          scaled_(weights.column_scale != nullptr) {
        for (int i = 0; i < registers; ++i) {
            scale_[i] = of(weights.column_scale, i, 1.0F);
            bias_[i] = of(weights.bias, i, 0.0F);
        }
    }

    bool whole() const { return width_ == panel_columns; }

    // Run visitor(column, value, lanes) over row r, a register at a time.
    template <class Visitor>
    void row(int64_t r, const float* sums, const Visitor& visitor) const {
        const float* from = sums + r * panel_columns;
        if (whole()) {
            STARFLOW_UNROLL
            for (int i = 0; i < registers; ++i) {
                visitor(begin_ + i * V::lanes, finished(from, i), AllLanes{});
            }
            return;
        }
        for (int i = 0; i < registers; ++i) {
            const int64_t left = width_ - i * V::lanes;
            if (left >= V::lanes) {
                visitor(begin_ + i * V::lanes, finished(from, i), AllLanes{});
            } else if (left > 0) {
                visitor(begin_ + i * V::lanes, finished(from, i), FirstLanes{static_cast<int>(left)});
            }
        }
    }

  private:
    V of(const float* values, int i, float none) const {
        const int64_t left = width_ - i * V::lanes;
        if (values == nullptr || left <= 0) return V(none);
        const float* from = values + begin_ + i * V::lanes;
        return left >= V::lanes ? load(from, AllLanes{}) : load(from, FirstLanes{static_cast<int>(left)});
    }
    V finished(const float* from, int i) const {
        const V sum = load(from + i * V::lanes, AllLanes{});
        return (scaled_ ? sum * scale_[i] : sum) + bias_[i];
    }

    int64_t begin_;
    int64_t width_;
    bool scaled_;
    V scale_[registers];
    V bias_[registers];
};

inline constexpr RowNorm no_norm{NormKind::none, nullptr, nullptr, 0.0F, 0.0F};

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

    // Panels [first, last).
    struct PanelRange {
        int64_t first, last;
    };
    PanelRange share_of(int64_t member, const Panels& weights) const {
        return {team.first(member, weights.count()), team.last(member, weights.count())};
    }

    // Multiplies the rows row_of(r), normalised, by some panels of W and calls finish(panel, sums) for each.
    template <int count, class RowOf, class Finish>
    void multiply(int64_t member, const Panels& weights, const PanelRange (&ranges)[count], const RowNorm& norm,
                  const RowOf& row_of, const Finish& finish) const {
        const Own mine = own(member);
        visit_product(weights.storage, block.product_input, [&](auto product) {
            using Product = decltype(product);
            const PackedRows packed = packed_rows<Product>(mine.packed, args.rows, weights.depth);
            pack_normalised_rows<Product>(packed, weights.depth, norm, row_of);
            for (const PanelRange& range : ranges) {
                multiply_panels<Product>(packed, weights, range.first, range.last, mine.sums, finish);
            }
        });
    }

    // Computes a member's share of the columns of rows W^T and calls write(column, r, value, lanes).
    template <class RowOf, class Write>
    void multiply_share(int64_t member, const Panels& weights, const RowNorm& norm, const RowOf& row_of,
                        const Write& write) const {
        const PanelRange share = share_of(member, weights);
        if (share.first == share.last) return;
        multiply(member, weights, {share}, norm, row_of, written(weights, write));
    }

    // Returns a finish(panel, sums) that calls write(column, r, value, lanes).
    template <class Write>
    auto written(const Panels& weights, const Write& write) const {
        return [this, &weights, &write](int64_t p, const float* sums) {
            const PanelColumns columns(weights, p);
            for (int64_t r = 0; r < args.rows; ++r) {
                columns.row(r, sums,
                            [&](int64_t column, Vec<float> value, auto lanes) { write(column, r, value, lanes); });
            }
        };
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
        multiply_share(
            member, block.proj_in, no_norm,
            [&](int64_t r) {
                const SweepWindow& window = args.windows[args.window_of_row[r]];
                const bool start = window.slot + r - window.first_row == block.text_tokens;
                return start && block.start_token != nullptr ? block.start_token : args.previous + r * block.channels;
            },
            [&](int64_t column, int64_t r, Vec<float> value, auto lanes) {
                const SweepWindow& window = args.windows[args.window_of_row[r]];
                const int64_t slot = window.slot + r - window.first_row - block.text_tokens;
                if (block.position != nullptr) {
                    value = value + load(block.position + slot * block.width + column, lanes);
                }
                if (block.condition != nullptr) {
                    value = value + load(condition_of(block, window.cache_row, slot) + column, lanes);
                }
                store(shared.h + r * shared.h_stride + column, value, lanes);
            });
    }

    // Normalises (or not, by its kind) one head in place and rotates it by the tables at `slot`.
    void turn(float* head, const RowNorm& norm, const float* cos, const float* sin, int64_t slot) const {
        if (cos == nullptr) return normalise_row(head, block.head_dim, norm);
        const bool normed = norm.kind != NormKind::none;
        const RowMoments moments = normed ? row_moments(head, block.head_dim, norm) : RowMoments{0.0F, 1.0F};
        const auto value = [&](int64_t c, auto lanes) {
            return normed ? normalised(head, c, lanes, moments, norm) : load(head + c, lanes);
        };
        const int64_t half = block.head_dim / 2;
        cos += slot * half;
        sin += slot * half;
        over_channels(half, [&](int64_t c, auto lanes) {
            const Vec<float> u = value(c, lanes);
            const Vec<float> v = value(half + c, lanes);
            const Vec<float> cosine = load(cos + c, lanes);
            const Vec<float> sine = load(sin + c, lanes);
            store(head + c, u * cosine - v * sine, lanes);
            store(head + half + c, v * cosine + u * sine, lanes);
        });
    }

    template <class Visitor>
    void visit_cache(const Visitor& visitor) const {
        switch (block.cache) {
            case MatrixStorage::float16:
                return visitor(Float16{});
            case MatrixStorage::bfloat16:
                return visitor(BFloat16{});
            default:
                return visitor(float{});
        }
    }

    int64_t head_size() const { return cache_head_bytes(block.cache, block.slots, block.head_dim); }

    // For rows [first, last) and key heads [head, end): turns queries where they lie, and writes keys and values into
    // the caches.
    void append(const SweepLayer& layer, int64_t first, int64_t last, int64_t head, int64_t end) const {
        const int64_t group = block.heads / block.kv_heads;
        const int64_t head_depth = round_up(block.head_dim, depth_multiple);
        const int64_t slots = round_up(block.slots, key_block);
        visit_cache([&](auto element) {
            using Element = decltype(element);
            for (int64_t r = first; r < last; ++r) {
                const SweepWindow& window = args.windows[args.window_of_row[r]];
                const int64_t slot = window.slot + r - window.first_row;
                float* row = shared.qkv + r * shared.qkv_stride;
                for (int64_t q = head * group; q < end * group; ++q) {
                    turn(row + q * block.head_dim, layer.query_norm, block.query_cos, block.query_sin, slot);
                }
                if (slot < window.keep) continue;
                for (int64_t k = head; k < end; ++k) {
                    float* key = row + (block.heads + k) * block.head_dim;
                    turn(key, layer.key_norm, block.key_cos, block.key_sin, slot);
                    const int64_t offset = (window.cache_row * block.kv_heads + k) * head_size();
                    put_key<Element>(layer.keys + offset, slot, block.head_dim, head_depth, key);
                    put_value<Element>(layer.values + offset, slot, slots, block.head_dim,
                                       key + block.kv_heads * block.head_dim);
                }
            }
        });
    }

    // Tokens of a tile of a window's query rows, which are (token, head of the group); a tile holds whole tokens.
    int64_t tile_tokens() const {
        const int64_t group = block.heads / block.kv_heads;
        return group >= attend_rows ? 1 : attend_rows / group;
    }

    // Attention of key heads [head, end) of all windows, for the tiles whose number `takes` accepts.
    template <class Takes>
    void attend_heads(int64_t member, const SweepLayer& layer, int64_t head, int64_t end, const Takes& takes) const {
        visit_attention_product(block.cache, block.product_input, [&](auto product) {
            using Product = decltype(product);
            int64_t item = 0;
            const int64_t tokens = tile_tokens();
            for (int64_t w = 0; w < args.window_count; ++w) {
                const SweepWindow& window = args.windows[w];
                for (int64_t k = head; k < end; ++k) {
                    for (int64_t begin = 0; begin < window.count; begin += tokens, ++item) {
                        if (!takes(item)) continue;
                        const int64_t left = window.count - begin;
                        attend_tile<Product>(member, layer, window, k, begin, left < tokens ? left : tokens);
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
        // Where a group has more heads than a tile has rows, some heads are taken at a time.
        for (int64_t some = 0; some < group; some += attend_rows) {
            const int64_t heads = group - some < attend_rows ? group - some : attend_rows;
            const int64_t rows = tokens * heads;
            const PackedRows queries = packed_rows<Product>(mine.queries, rows, block.head_dim);
            VisibleKeys visible[attend_rows];
            AttentionMask mask = mask_of(block);
            mask.start = window.slot;
            const AttentionShape shape{.keys = block.slots};
            const float scale =
                1.0F / (__builtin_sqrtf(static_cast<float>(block.head_dim)) * block.temperature[window.cache_row]);
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t token = begin + r / heads;
                const float* query = shared.qkv + (window.first_row + token) * shared.qkv_stride +
                                     (head * group + some + r % heads) * block.head_dim;
                pack_row<Product>(queries, r, block.head_dim,
                                  [&](int64_t c, auto lanes) { return load(query + c, lanes); });
                visible[r] = visible_keys(mask, shape, 0, token);
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
                    store(out + c, load(scratch.result(r, c), lanes) * inverse, lanes);
                });
            }
        }
    }

    // A row of the residual stream.
    auto stream() const {
        return [this](int64_t r) { return shared.h + r * shared.h_stride; };
    }
    // Writes queries, keys and values to where they lie before they are turned.
    auto put_projected() const {
        return [this](int64_t column, int64_t r, Vec<float> value, auto lanes) {
            store(shared.qkv + r * shared.qkv_stride + column, value, lanes);
        };
    }
    void project_share(int64_t member, const SweepLayer& layer) const {
        multiply_share(member, layer.qkv, layer.attention_norm, stream(), put_projected());
    }

    // Queries, keys, values and attention. Where the key heads are shared out evenly, a member goes from the projection
    // to the results of its own heads without waiting for the others, and what it wrote stays in its caches.
    void attention(const SweepLayer& layer) const {
        const int64_t members = team.barrier.members;
        const int64_t own_heads = block.kv_heads / members;
        const int64_t own_channels = own_heads * block.head_dim;
        if (block.kv_heads % members == 0 && own_channels % panel_columns == 0) {
            team.run([&](int64_t member) {
                const int64_t group = block.heads / block.kv_heads;
                const int64_t panels = own_channels / panel_columns;
                const int64_t queries = panels * group;
                const int64_t keys = members * queries;
                const int64_t values = keys + members * panels;
                const PanelRange ranges[] = {{member * queries, member * queries + queries},
                                             {keys + member * panels, keys + member * panels + panels},
                                             {values + member * panels, values + member * panels + panels}};
                const auto put = put_projected();
                multiply(member, layer.qkv, ranges, layer.attention_norm, stream(), written(layer.qkv, put));
                const int64_t head = member * own_heads;
                append(layer, 0, args.rows, head, head + own_heads);
                attend_heads(member, layer, head, head + own_heads, [](int64_t) { return true; });
            });
            return;
        }
        team.run([&](int64_t member) { project_share(member, layer); });
        team.run([&](int64_t member) {
            append(layer, team.first(member, args.rows), team.last(member, args.rows), 0, block.kv_heads);
        });
        team.run([&](int64_t member) {
            attend_heads(member, layer, 0, block.kv_heads, [&](int64_t item) { return item % members == member; });
        });
    }

    // A branch's last product, added to the residual stream: at once, or after its norm (a phase more).
    // multiply_branch(member, write) is the product.
    template <class Multiply>
    void add_branch(const RowNorm& post, const Multiply& multiply_branch) const {
        const bool normed = post.kind != NormKind::none;
        team.run([&](int64_t member) {
            multiply_branch(member, [&](int64_t column, int64_t r, Vec<float> value, auto lanes) {
                const int64_t at = r * shared.h_stride + column;
                if (normed) {
                    store(shared.branch + at, value, lanes);
                } else {
                    store(shared.h + at, load(shared.h + at, lanes) + value, lanes);
                }
            });
        });
        if (!normed) return;
        team.run([&](int64_t member) {
            for (int64_t r = team.first(member, args.rows); r < team.last(member, args.rows); ++r) {
                float* row = shared.branch + r * shared.h_stride;
                normalise_row(row, block.width, post);
                float* at = shared.h + r * shared.h_stride;
                over_channels(block.width, [&](int64_t c, auto lanes) {
                    store(at + c, load(at + c, lanes) + load(row + c, lanes), lanes);
                });
            }
        });
    }

    // Panel p of the hidden rows, from the sums of the product `last` of the first half, becomes part of the packed
    // rows of the second.
    void pack_hidden(const SweepLayer& layer, const Panels& last, int64_t p, const float* sums) const {
        visit_product(layer.down.storage, block.product_input, [&](auto product) {
            using Product = decltype(product);
            constexpr int64_t cells = panel_columns / Product::cell * Product::terms;
            const PackedRows packed = packed_rows<Product>(shared.hidden, args.rows, block.hidden);
            const bool gated = layer.gate.data != nullptr;
            const PanelColumns columns(last, p);
            constexpr bool rounded = is_bfloat16<typename Product::Cell> && Product::terms == 1;
            const auto activated = [&](int64_t r, int64_t column, Vec<float> value, auto lanes) {
                if (gated) return gelu_tanh(value) * load(shared.gated + r * shared.gated_stride + column, lanes);
                if constexpr (rounded) return coarse_gelu(value);
                return gelu(value);
            };
            if constexpr (rounded && Product::cell == panel_columns) {
                // A whole panel is one cell of each row.
                if (columns.whole()) {
                    for (int64_t r = 0; r < args.rows; ++r) {
                        auto* cell = reinterpret_cast<typename Product::Cell*>(packed.row(r) + p * packed.stride(r));
                        columns.row(r, sums, [&](int64_t column, Vec<float> value, auto lanes) {
                            store(cell + column % panel_columns, activated(r, column, value, lanes), lanes);
                        });
                    }
                    return;
                }
            }
            for (int64_t r = 0; r < args.rows; ++r) {
                alignas(64) float row[panel_columns];
                columns.row(r, sums, [&](int64_t column, Vec<float> value, auto lanes) {
                    store(row + column % panel_columns, activated(r, column, value, lanes), lanes);
                });
                pack_cells<Product>(packed, r, p * cells, (p + 1) * cells, block.hidden,
                                    [&](int64_t c, auto lanes) { return load(row + c % panel_columns, lanes); });
            }
        });
    }

    void mlp(const SweepLayer& layer) const {
        team.run([&](int64_t member) {
            const bool gated = layer.gate.data != nullptr;
            if (gated) {
                multiply_share(member, layer.up, layer.mlp_norm, stream(),
                               [&](int64_t column, int64_t r, Vec<float> value, auto lanes) {
                                   store(shared.gated + r * shared.gated_stride + column, value, lanes);
                               });
            }
            const Panels& last = gated ? layer.gate : layer.up;
            const PanelRange share = share_of(member, last);
            if (share.first == share.last) return;
            multiply(member, last, {share}, layer.mlp_norm, stream(),
                     [&](int64_t p, const float* sums) { pack_hidden(layer, last, p, sums); });
        });
        add_branch(layer.mlp_post, [&](int64_t member, const auto& write) {
            const PanelRange share = share_of(member, layer.down);
            visit_product(layer.down.storage, block.product_input, [&](auto product) {
                using Product = decltype(product);
                multiply_panels<Product>(packed_rows<Product>(shared.hidden, args.rows, block.hidden), layer.down,
                                         share.first, share.last, own(member).sums, written(layer.down, write));
            });
        });
    }

    void after_attention(const SweepLayer& layer) const {
        add_branch(layer.attention_post, [&](int64_t member, const auto& write) {
            multiply_share(
                member, layer.proj, no_norm, [&](int64_t r) { return shared.attended + r * shared.attended_stride; },
                write);
        });
        mlp(layer);
    }

    void begin() const {
        team.run([&](int64_t member) { embed(member); });
    }

    void finish() const {
        if (args.raw == nullptr) return;
        team.run([&](int64_t member) {
            multiply_share(member, block.proj_out, block.final_norm, stream(),
                           [&](int64_t column, int64_t r, Vec<float> value, auto lanes) {
                               store(args.raw + r * block.proj_out.columns + column, value, lanes);
                           });
        });
    }

    // The whole sweep, all members on the same rows.
    void run() const {
        begin();
        for (int64_t l = 0; l < block.layer_count; ++l) {
            attention(block.layers[l]);
            after_attention(block.layers[l]);
        }
        finish();
    }

    // A team of one, on its own rows: from the attention of layer l - 1 up to the keys and values of layer l.
    void run_between(int64_t l) const {
        if (l == 0) {
            begin();
        } else {
            attend_heads(0, block.layers[l - 1], 0, block.kv_heads, [](int64_t) { return true; });
            after_attention(block.layers[l - 1]);
        }
        if (l == block.layer_count) return finish();
        project_share(0, block.layers[l]);
        append(block.layers[l], 0, args.rows, 0, block.kv_heads);
    }
};

void sweep(const SweepArgs* parts, int64_t count, const TeamSlice& team) {
    if (count == 1) return Sweep(parts[0], team).run();
    Barrier nobody{.members = 1, .yield = nullptr};
    const TeamSlice alone{nobody, 0, 1};
    for (int64_t l = 0; l <= parts[0].block.layer_count; ++l) {
        team.run([&](int64_t member) { Sweep(parts[member], alone).run_between(l); });
    }
}

}  // namespace

const SweepKernels jacobi_sweep{shared_bytes, own_bytes, sweep};

}  // namespace starflow::STARFLOW_ISA
