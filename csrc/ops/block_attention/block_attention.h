// block_attention: out = softmax(scale * q k^T) v over the keys that a query sees, and the log of the sum of
// exp(scale * q k^T) over them (lse). scale = 1 / (sqrt(head_dim) * temperature).
//
// q, out (batch, heads, queries, head_dim); k, v (batch, kv_heads, keys, head_dim); key head j serves the query heads
// [j r, j r + r), r = heads / kv_heads; lse (batch, heads, queries) float32.
// The mask is a rule of positions (`visible_keys`): each query sees a prefix and one run of keys. It is never stored.
// What lies at keys that no query sees, and in queries that see no key, may be NaN: it is not read, or read as zeros.
// Gradient, with P = exp(scale * q k^T - lse) and D = sum over channels of grad_out * out - grad_lse:
//   grad_v = P^T grad_out,  dS = P * (grad_out v^T - D),  grad_q = scale * dS k,  grad_k = scale * dS^T q
//
// Arithmetic: 4 * head_dim operations for each visible (query, key), in gradients 10; products of float32, or of
// bfloat16 where q is bfloat16 and the level has them, sums and softmax of float32.
// Memory: k and v once for each tile of 56 to 196 rows of queries, packed into 16 to 32 KB of panels that stay in the
// first-level cache while the tile passes over them.
// 64 queries on 4096 keys of 64 float32: 67 MFLOP for 2 MB read, 32 FLOP a byte, so arithmetic is the bound.
// On CUDA the passes are the same, with tiles of 64 or 128 rows and of 16 to 64 keys in shared memory
// (block_attention_schedule.h).
#pragma once
#include "common/dtype.h"
#include "cpu/panels.h"
#include "cpu/variants.h"
#include "cuda/declare.h"

namespace starflow {

// A tensor (batch, heads, rows, head_dim) whose channels lie side by side; strides in elements. Constness is by use.
struct HeadRows {
    void* data;
    int64_t batch_stride;
    int64_t head_stride;
    int64_t row_stride;
};

// Who sees whom. Query i of sample b stands at position p = start + i; keys from the length on are hidden.
struct AttentionMask {
    bool causal;             // keys up to p
    bool frames;             // and (or) whole frames, after an always visible prefix:
    int64_t prefix;          //   keys of the prefix
    int64_t frame_tokens;    //   T; frame of a token f(p) = floor((p - prefix) / T)
    int64_t look_ahead;      //   A: frames up to max(f(p), 0) + A - 1
    int64_t window;          //   G: frames from f(p) + A - 1 - G on; negative: all
    int64_t first;           // keys before it are hidden, where firsts is null; not with frames
    const int64_t* firsts;   // (batch,)
    int64_t start;           // where starts is null
    const int64_t* starts;   // (batch,)
    int64_t length;          // where lengths is null
    const int64_t* lengths;  // (batch,)
};

struct AttentionShape {
    int64_t batch;
    int64_t heads;
    int64_t kv_heads;
    int64_t queries;
    int64_t keys;
    int64_t head_dim;
    Dtype data;  // of q, k, v, out and gradients: float32, bfloat16 or float16
};

// The factor of the products of queries and keys: 1 / (root * temperature), root = sqrt(head_dim).
struct AttentionScale {
    float scale;  // where temperatures is null
    double root;
    const double* temperatures;  // (batch,)
};

struct AttentionArgs {
    AttentionShape shape;
    AttentionMask mask;
    AttentionScale scale;
    HeadRows q, k, v, out;
    float* lse;  // (batch, heads, queries)
    int64_t tile_rows;
    // CUDA: the visible keys in `splits` parts, each with results of its own, which are joined afterwards:
    // float32 (splits, batch, heads, queries, head_dim), then their lse (splits, batch, heads, queries). Null with one.
    int64_t splits;
    float* parts;
    bool sm90;   // CUDA: the kernel of block_attention_sm90.cu runs (`forward_kernel_for` is wgmma)
    bool early;  // CUDA: the launch may begin before the one in front of it has ended
};

struct AttentionBackwardArgs {
    AttentionShape shape;
    AttentionMask mask;
    AttentionScale scale;
    HeadRows q, k, v, out, grad_out;
    const float* lse;       // (batch, heads, queries), like grad_lse
    const float* grad_lse;  // null: none
    HeadRows grad_q, grad_k, grad_v;
    float* dots;  // CUDA: D of each row, (batch, heads, queries)
    bool sm90;    // CUDA: the kernel of block_attention_backward_sm90.cu runs (`backward_kernel_for` is wgmma)
    // Its memory (`GradientMemory`): sums of grad_q, and how many blocks have added to each.
    float* sums;
    int32_t* turns;
};

struct AttentionKernels {
    int64_t (*forward_scratch)(const AttentionArgs& args);
    // Items [begin, end): a tile of rows of a key head of a sample.
    void (*forward)(const AttentionArgs& args, int64_t begin, int64_t end, void* scratch);
    int64_t (*row_multiple)(Dtype data);  // rows of a good tile are a multiple of this
};

struct AttentionBackwardKernels {
    int64_t (*scratch)(const AttentionBackwardArgs& args);
    // Items [begin, end): a key head of a sample. Each is summed by one thread, in one order.
    void (*backward)(const AttentionBackwardArgs& args, int64_t begin, int64_t end, void* scratch);
};

STARFLOW_DECLARE_DOT_VARIANTS(AttentionKernels, block_attention)
STARFLOW_DECLARE_DOT_VARIANTS(AttentionBackwardKernels, block_attention_backward)
STARFLOW_DECLARE_CUDA(AttentionArgs, block_attention_cuda)
STARFLOW_DECLARE_SM90(AttentionArgs, block_attention_sm90_cuda)
STARFLOW_DECLARE_CUDA(AttentionBackwardArgs, block_attention_backward_cuda)
STARFLOW_DECLARE_SM90(AttentionBackwardArgs, block_attention_backward_sm90_cuda)

}  // namespace starflow
