// jacobi_sweep on CUDA: the launches of linear, rope_append, block_attention and norm for all layers, back to back on
// one stream, with a kernel in front that gathers what the windows read. Nothing here or behind it asks the host.
//
// Matrices are those of linear on CUDA: rows of bfloat16 or float16. The cache of a layer is (cache rows, kv_heads,
// slots, head_dim), side by side, in float32, float16 or bfloat16: what block_attention reads as it is.
// Every cache row has as many tokens in its window. The residual stream, norms and raw are float32; what enters a
// product is rounded to the type of its weight; queries, keys, values and what attention puts out are of the cache's
// type, projected and rotated.
//
// Launches of a sweep: 1, proj_in, for each layer 5, proj_out. Of a layer: queries, keys and values, normalised,
// rotated and written where they stay by the product that makes them (one more launch for heads that takes_heads
// refuses); attention; its projection; the two halves of the MLP (one more with a gate). 2 more for each post-norm.
// What rounds or normalises the input of a product are blocks of the product's own launch, and the counters of all
// products are cleared by the sweep's first. Each launch begins before the one in front of it has ended, where the
// device can.
#pragma once
#include "ops/jacobi_sweep/jacobi_sweep.h"
#include "ops/linear/linear_plan.h"

namespace starflow {

// Rows that run together at most: far above what fills a GPU, and half a gigabyte of workspace for the largest
// published block.
inline constexpr int64_t sweep_most_rows = 4096;

struct SweepCudaArgs {
    SweepBlock block;
    CudaDevice device;
    int64_t most_rows;  // that run together; sweep_most_rows
    int64_t tokens;     // of each window
    Rows source;        // (samples, tokens, channels), or (samples, tokens, width) if embedded; float32
    int64_t samples;    // cache row r reads those of sample r % samples
    bool embedded;      // text, in the residual stream
    bool by_slot;       // row 0 of a window is token slot + shift of the source, else token 0
    int64_t shift;
    const int64_t* slots;  // (cache rows,) where windows begin
    const int64_t* keep;   // (cache rows,) slots below it are not written
    float* raw;            // (cache rows, tokens, out channels), or null: only keys and values are wanted
    void* workspace;       // null: nothing is launched, and workspace_bytes gets its size
    int64_t* workspace_bytes;
};

STARFLOW_DECLARE_CUDA(SweepCudaArgs, jacobi_sweep_cuda)

// What runs together: all tokens of some cache rows, or some tokens of one. Later tokens read what earlier ones left in
// the caches, so that pieces may run one after the other.
struct SweepPiece {
    int64_t first_window;
    int64_t windows;
    int64_t first_token;
    int64_t tokens;

    STARFLOW_HOST_DEVICE constexpr int64_t rows() const { return windows * tokens; }
};

template <class Visitor>
static inline void over_sweep_pieces(int64_t most_rows, int64_t windows, int64_t tokens, const Visitor& visitor) {
    if (tokens == 0) return;
    const int64_t together = tokens < most_rows ? most_rows / tokens : 1;
    const int64_t most_tokens = tokens < most_rows ? tokens : most_rows;
    for (int64_t w = 0; w < windows; w += together) {
        for (int64_t t = 0; t < tokens; t += most_tokens) {
            visitor(SweepPiece{w, together < windows - w ? together : windows - w, t,
                               most_tokens < tokens - t ? most_tokens : tokens - t});
        }
    }
}

static constexpr Dtype dtype_of_storage(MatrixStorage storage) {
    return storage == MatrixStorage::bfloat16  ? Dtype::bfloat16
           : storage == MatrixStorage::float16 ? Dtype::float16
                                               : Dtype::float32;
}

// Bytes from the start of the workspace of a piece.
struct SweepLayout {
    int64_t slots;         // int64 (windows,)
    int64_t temperatures;  // float64 (windows,)
    int64_t tables;        // float32 (4, rows, head_dim / 2): cosines and sines of queries, of keys
    int64_t input;         // (rows, channels), of the type of proj_in
    int64_t h;             // float32 (rows, width): the residual stream
    int64_t qkv;           // (rows, (heads + 2 kv_heads) * head_dim), of the type of the cache
    int64_t queries;       // (rows, heads * head_dim), of the type of the cache, like attended
    int64_t attended;
    int64_t lse;       // float32 (windows, heads, tokens)
    int64_t hidden;    // (rows, hidden), of the type of down
    int64_t up;        // float32 (rows, hidden), with a gate
    int64_t branch;    // float32 (rows, width), with a post-norm
    int64_t counters;  // int32: those of all products, one after another
    int64_t counter_count;
    int64_t product;
    int64_t bytes;
};

static inline SweepLayout sweep_layout(const SweepBlock& block, const CudaDevice& device, const SweepPiece& piece) {
    constexpr int64_t line = 256;
    const int64_t rows = piece.rows();
    const int64_t cache_bytes = storage_bytes(block.cache);
    const int64_t attended = block.heads * block.head_dim;
    SweepLayout layout{};
    const auto take = [&](int64_t bytes) {
        const int64_t offset = layout.bytes;
        layout.bytes += linear_round_up(bytes, line);
        return offset;
    };
    int64_t product = 0;
    const auto with = [&](const Panels& weights) {
        const LinearSchedule schedule = linear_schedule(rows, weights.columns, weights.depth, device.multiprocessors);
        const int64_t copy = rows * linear_round_up(weights.depth, linear_row_multiple) * 2;
        const int64_t bytes = linear_workspace(schedule, copy).bytes;
        product = bytes > product ? bytes : product;
        layout.counter_count += schedule.counters();
    };
    bool gated = false;
    bool normed = false;
    for (int64_t l = 0; l < block.layer_count; ++l) {
        const SweepLayer& layer = block.layers[l];
        for (const Panels* weights : {&layer.qkv, &layer.proj, &layer.up, &layer.down}) with(*weights);
        if (layer.gate.data != nullptr) {
            with(layer.gate);
            gated = true;
        }
        normed = normed || layer.attention_post.kind != NormKind::none || layer.mlp_post.kind != NormKind::none;
    }
    with(block.proj_in);
    with(block.proj_out);
    layout.slots = take(piece.windows * 8);
    layout.temperatures = take(piece.windows * 8);
    layout.tables = take(4 * rows * (block.head_dim / 2) * 4);
    layout.input = take(rows * block.channels * 2);
    layout.h = take(rows * block.width * 4);
    layout.qkv = take(rows * (attended + 2 * block.kv_heads * block.head_dim) * cache_bytes);
    layout.queries = take(rows * attended * cache_bytes);
    layout.attended = take(rows * attended * cache_bytes);
    layout.lse = take(rows * block.heads * 4);
    layout.hidden = take(rows * block.hidden * 2);
    layout.up = take(gated ? rows * block.hidden * 4 : 0);
    layout.branch = take(normed ? rows * block.width * 4 : 0);
    layout.counters = take(layout.counter_count * 4);
    layout.product = take(product);
    return layout;
}

static inline int64_t sweep_workspace(const SweepBlock& block, const CudaDevice& device, int64_t most_rows,
                                      int64_t tokens) {
    int64_t most = 0;
    over_sweep_pieces(most_rows, block.cache_rows, tokens, [&](const SweepPiece& piece) {
        const int64_t bytes = sweep_layout(block, device, piece).bytes;
        most = bytes > most ? bytes : most;
    });
    return most;
}

}  // namespace starflow
