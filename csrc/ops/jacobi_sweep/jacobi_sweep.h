// jacobi_sweep: one block's network over windows of tokens, all layers in one call of one team of threads.
//
//   h = previous W_in^T + b + position[slot] + condition[sample, frame]     row 0 of a clip reads the start token
//   each layer: h += post(attention(rope(norm(h) W_qkv^T)) W_proj^T),  h += post(mlp(norm(h)))
//   raw = norm(h) W_out^T + b
//
// Rows are the tokens of all windows, one behind the other; a window is a run of slots of one row of the caches. Keys
// and values of a window are written at its slots, and a token sees all slots up to its own, or of these the text, its
// own frame and a number of frames before it.
//
// The members of a team work in one of two ways (`Sweeper` chooses); no sum is split over members, so that results
// depend neither on the way nor on how many there are.
//
// All on the same rows: weights and caches are read once. Phases of a layer, with a barrier behind each: queries, keys,
// values, rotation, cache and attention (a member its heads) | projection (its panels) | first half of the MLP (its
// panels) | second half (its panels). Where the members do not divide the key heads the first phase is three:
// projections (its panels) | rotation and cache (its rows) | attention (its samples, heads and tiles of rows). Every
// member packs all rows for itself, normalised: a line that another core wrote costs more than computing it again.
//
// Each on rows of its own: every member reads all weights, but nothing that another wrote except keys and values, and
// there is one barrier a layer, behind them.
#pragma once
#include "common/dtype.h"
#include "cpu/norm_kind.h"
#include "cpu/panels.h"
#include "cpu/team.h"
#include "cpu/variants.h"
#include "ops/block_attention/block_attention.h"

namespace starflow {

struct SweepLayer {
    RowNorm attention_norm;
    Panels qkv;
    RowNorm query_norm;  // over head_dim
    RowNorm key_norm;
    Panels proj;
    RowNorm attention_post;
    RowNorm mlp_norm;
    Panels gate;  // data is null: gelu(up), else gelu_tanh(gate) * up
    Panels up;
    Panels down;
    RowNorm mlp_post;
    char* keys;  // panels (cache rows, kv_heads, head bytes)
    char* values;
};

// What does not change while a clip is decoded. Rotary planes pair element k with k + head_dim / 2: whoever packs the
// weights of an interleaved model orders each head's rows so.
struct SweepBlock {
    int64_t channels;  // of a token
    int64_t width;
    int64_t heads;
    int64_t kv_heads;
    int64_t head_dim;
    int64_t hidden;
    int64_t layer_count;
    const SweepLayer* layers;
    Panels proj_in;
    Panels proj_out;
    RowNorm final_norm;
    const float* start_token;  // (channels,) or null
    const float* position;     // (grid slots, width) or null
    const float* condition;    // (cache rows, condition_rows, width) or null
    int64_t condition_tokens;  // grid slots that share a row of `condition`; 0: all of them
    const float* query_cos;    // (slots, head_dim / 2), text first; null without rotary positions
    const float* query_sin;
    const float* key_cos;
    const float* key_sin;
    const float* temperature;  // (cache rows,) divides the products of queries and keys
    int64_t cache_rows;
    int64_t text_tokens;
    int64_t slots;              // of the caches
    int64_t mask_frame_tokens;  // of a frame, where a slot sees its own and `mask_frames` before it; 0: all
    int64_t mask_frames;
    bool whole_frames;  // a slot sees all of its frame; windows are whole frames
    MatrixStorage cache;
    ProductInput product_input;
};

// Who sees whom; a window's first slot is to be set.
STARFLOW_HOST_DEVICE constexpr AttentionMask mask_of(const SweepBlock& block) {
    AttentionMask mask{};
    mask.causal = !block.whole_frames;
    mask.frames = block.mask_frame_tokens > 0;
    mask.prefix = block.text_tokens;
    mask.frame_tokens = block.mask_frame_tokens;
    mask.look_ahead = 1;
    mask.window = mask.frames ? block.mask_frames : -1;
    mask.length = block.slots;
    return mask;
}

// Rows of `condition` that a row of the caches has.
STARFLOW_HOST_DEVICE constexpr int64_t condition_rows(const SweepBlock& block) {
    if (block.condition_tokens == 0) return 1;
    return (block.slots - block.text_tokens + block.condition_tokens - 1) / block.condition_tokens;
}

// That of a grid slot, counted behind the text.
STARFLOW_HOST_DEVICE constexpr const float* condition_of(const SweepBlock& block, int64_t cache_row, int64_t slot) {
    const int64_t row = block.condition_tokens == 0 ? 0 : slot / block.condition_tokens;
    return block.condition + (cache_row * condition_rows(block) + row) * block.width;
}

// A window: `count` rows from slot `slot` of a row of the caches on; slots below `keep` are not written.
struct SweepWindow {
    int64_t cache_row;
    int64_t slot;
    int64_t count;
    int64_t keep;
    int64_t first_row;  // where its rows begin
};

struct SweepArgs {
    const SweepBlock& block;
    const SweepWindow* windows;
    int64_t window_count;
    const int32_t* window_of_row;  // (rows,)
    int64_t rows;
    const float* previous;  // (rows, channels), or null:
    const float* embedded;  // (rows, width), text
    float* raw;             // (rows, out channels), or null: only keys and values are wanted
    char* shared;           // sweep_shared_bytes
    char* own;              // sweep_own_bytes for each member
};

// Query rows that share a pass over the keys.
inline constexpr int64_t attend_rows = 64;

// Rows of buffers that members share lie an odd number of cache lines apart: at a power of two they would all fall into
// the same sets of a cache.
static inline int64_t row_stride(int64_t width) { return round_up(width, 32) + 16; }

struct SweepKernels {
    int64_t (*shared_bytes)(const SweepBlock& block, int64_t rows);
    int64_t (*own_bytes)(const SweepBlock& block, int64_t rows);
    // One part that all members share, or one for each.
    void (*sweep)(const SweepArgs* parts, int64_t count, const TeamSlice& team);
};

STARFLOW_DECLARE_DOT_VARIANTS(SweepKernels, jacobi_sweep)

}  // namespace starflow
