// What the CUDA kernels of block_attention's gradient share: D of each row, which is computed before them.
#pragma once
#include "ops/block_attention/block_attention_tiles.cuh"

namespace starflow::cuda {

// One warp a row.
inline constexpr int dot_threads = 256;
inline unsigned dot_blocks(const AttentionShape& shape) {
    return static_cast<unsigned>(divide_up(shape.batch * shape.heads * shape.queries * warp_size, dot_threads));
}

struct DotRow {
    int64_t index;  // in (batch, heads, queries)
    int64_t b;
    int64_t head;
    int64_t query;
    bool exists;

    __device__ static DotRow here(const AttentionBackwardArgs& args) {
        const AttentionShape& shape = args.shape;
        const int64_t index = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / warp_size;
        const int64_t head = index / shape.queries;
        return {index, head / shape.heads, head % shape.heads, index % shape.queries,
                index < shape.batch * shape.heads * shape.queries};
    }
    template <class Element>
    __device__ Element* of(const HeadRows& rows) const {
        return head_at<Element>(rows, b, head) + query * rows.row_stride;
    }
};

// D = sum over channels of grad_out * out - grad_lse.
template <class Element>
__device__ void write_dot(const AttentionBackwardArgs& args, const DotRow& row) {
    const auto* out = row.of<const Element>(args.out);
    const auto* grad = row.of<const Element>(args.grad_out);
    float sum = 0.0F;
    for (int64_t c = lane(); c < args.shape.head_dim; c += warp_size) sum += widen(out[c]) * widen(grad[c]);
    sum = warp_sum(sum);
    if (lane() == 0) args.dots[row.index] = sum - (args.grad_lse != nullptr ? args.grad_lse[row.index] : 0.0F);
}

}  // namespace starflow::cuda
