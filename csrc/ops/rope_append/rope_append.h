// rope_append: the fused projection split into heads; queries and keys normalised and rotated; keys and values written
// where they stay: into results, or into the cache.
//
//   n = x * inverse * (1 + weight),  inverse = 1 / sqrt(sum(x^2) / D + 1e-6)     (queries, keys; optional)
//   (u, v) -> (u cos - v sin, v cos + u sin)                                      (queries, keys; optional)
// where plane p of a head is the elements (2p, 2p + 1) when interleaved, else (p, p + D / 2). Gradient: the rotation
// back, then that of the norm,
//   grad_x = inverse * (g - m * sum(g * m) / D),  m = x * inverse,  g = grad_n * (1 + weight)
//   grad_weight = sum over rows and heads of grad_n * m, by blocks of rows (RowBlocks).
//
// qkv (batch, tokens, (heads + 2 kv_heads) * D); cos, sin (batch or 1, tokens, D / 2); q (batch, heads, tokens, D);
// k, v (batch, kv_heads, slots, D): token t of sample b goes to slot start[b] + t, unless that is below final[b].
// Memory: one pass; float32 moves 8 bytes an element of qkv (read, written), and the tables once a token.
#pragma once
#include "common/rows.h"
#include "cpu/variants.h"
#include "cuda/declare.h"

namespace starflow {

// A warp holds a head in registers.
inline constexpr int64_t rope_append_most_head_dim_cuda = 256;

// Which elements of a head form a plane.
enum class Pairing : int32_t { interleaved, half };
inline constexpr const char* pairing_names[]{"interleaved", "half"};

// A tensor (batch, heads, tokens or slots, head_dim) whose head_dim lies side by side; strides in elements.
struct Heads {
    void* data;
    int64_t batch_stride;
    int64_t head_stride;
    int64_t token_stride;
};

// What queries, or keys, go through; null where they do not. All in the type of the arithmetic.
struct RopeTurn {
    Rows cos, sin;
    const void* weight;
};

struct RopeAppendShape {
    int64_t batch;
    int64_t tokens;
    int64_t heads;
    int64_t kv_heads;
    int64_t head_dim;
    Dtype data;  // of qkv and q
    Dtype kept;  // of k and v
    bool interleaved;
};

struct RopeAppendArgs {
    RopeAppendShape shape;
    Rows qkv;
    RopeTurn query, key;
    Heads q, k, v;
    int64_t start;
    const int64_t* starts;  // by sample, in place of start; null: none
    const int64_t* final;   // by sample; null: every slot is written
    bool early;             // CUDA: the launch may begin before the one in front of it has ended
};

struct RopeAppendBackwardArgs {
    RopeAppendShape shape;
    Rows qkv;
    RopeTurn query, key;
    Heads grad_q, grad_k, grad_v;
    Rows grad_qkv;
    void* partial;  // (blocks, 2, head_dim) in the type of the arithmetic: weights of queries, of keys; null: no norm
    void* weights;  // (2, head_dim): the sum of partial over the blocks
    RowBlocks blocks;
};

struct RopeAppendKernels {
    // Rows [begin, end) of the batch * tokens rows.
    void (*forward)(const RopeAppendArgs& args, int64_t begin, int64_t end);
    // Blocks [begin, end) of rows.
    void (*backward)(const RopeAppendBackwardArgs& args, int64_t begin, int64_t end);
    // Adds up the sums of all blocks: the gradients of the weights.
    void (*sum_blocks)(const RopeAppendBackwardArgs& args);
};

STARFLOW_DECLARE_VARIANTS(RopeAppendKernels, rope_append)
STARFLOW_DECLARE_CUDA(RopeAppendArgs, rope_append_cuda)
STARFLOW_DECLARE_CUDA(RopeAppendBackwardArgs, rope_append_backward_cuda)

}  // namespace starflow
