// A call of linear on CUDA before it is launched: what is copied, how wide accesses are, tiles, parts, workspace. Host
// code, no torch and no CUDA: linear's entry and the sweeps of jacobi_sweep plan their products here.
#pragma once
#include "ops/linear/linear.h"

namespace starflow {

// The device as schedules see it.
struct CudaDevice {
    int64_t multiprocessors;
    bool sm90;            // has attention's kernel for sm_90a
    LinearKernel linear;  // of every weight that has channels (linear_choice.h)
    bool early;           // launches of a chain begin early
};

// Whether an address, and every row from it, takes `width` neighbours; an absent matrix does.
static inline bool takes_neighbours(const Matrix& matrix, int64_t width) {
    const int64_t size = matrix.dtype == Dtype::float32 ? 4 : 2;
    return matrix.data == nullptr ||
           (reinterpret_cast<uintptr_t>(matrix.data) % (width * size) == 0 && matrix.row_stride % width == 0);
}
static inline bool takes_neighbours(const float* vector, int64_t width) {
    return reinterpret_cast<uintptr_t>(vector) % (width * sizeof(float)) == 0;
}

// Whether the product can store its columns as heads: a head lies within the columns of a tile, halves of 4 neighbours
// in each of a power of two of threads, and everything takes accesses of 4 neighbours.
static inline bool takes_heads(const LinearCudaArgs& args, const RopeAppendArgs& heads) {
    constexpr int64_t width = 4;
    constexpr int64_t most = 64;
    const RopeAppendShape& shape = heads.shape;
    if (shape.interleaved || shape.head_dim < 2 * width || most % shape.head_dim != 0) return false;
    for (const RopeTurn* turn : {&heads.query, &heads.key}) {
        for (const Rows* table : {&turn->cos, &turn->sin}) {
            if (!takes_neighbours({table->data, table->token_stride, Dtype::float32}, width) ||
                table->batch_stride % width != 0) {
                return false;
            }
        }
        if (!takes_neighbours(static_cast<const float*>(turn->weight), width)) return false;
    }
    for (const Heads* to : {&heads.q, &heads.k, &heads.v}) {
        if (!takes_neighbours({to->data, to->token_stride, shape.kept}, width) || to->batch_stride % width != 0 ||
            to->head_stride % width != 0) {
            return false;
        }
    }
    return args.wide_result && shape.data == shape.kept && shape.data != Dtype::float64;
}

// All but the workspace, of which `layout.bytes` are needed: see place_workspace.
static inline LinearCudaArgs plan_linear(const LinearArgs& call, const CudaDevice& device) {
    constexpr int64_t width = 4;
    const int64_t channels = call.weights.depth;
    const int64_t columns = call.weights.columns;
    LinearCudaArgs args{};
    args.call = call;
    args.depth = linear_round_up(channels, linear_row_multiple);
    const Dtype dtype = call.weights.storage == MatrixStorage::bfloat16 ? Dtype::bfloat16 : Dtype::float16;
    args.input = call.x;
    if (call.rows == 1) args.input.row_stride = args.depth;  // the stride of a single row does not matter
    // TMA takes no rows on top of each other.
    args.copied = call.x.dtype != dtype || call.norm.kind != NormKind::none || args.depth != channels ||
                  args.input.row_stride < args.depth || !takes_neighbours(args.input, linear_row_multiple);
    args.wide_input = channels % width == 0 && takes_neighbours(call.x, width) &&
                      takes_neighbours(call.norm.weight, width) && takes_neighbours(call.norm.bias, width);
    args.wide_result = columns % width == 0 && takes_neighbours(call.weights.bias, width) &&
                       takes_neighbours(call.multiply, width) && takes_neighbours(call.residual, width) &&
                       takes_neighbours(call.out, width) && takes_neighbours(call.product, width);
    // TMA takes no matrix without columns.
    args.kernel = channels > 0 ? device.linear : LinearKernel::mma_sync;
    args.schedule = linear_schedule(call.rows, columns, channels, device.multiprocessors);
    args.layout = linear_workspace(args.schedule, args.copied ? call.rows * args.depth * 2 : 0);
    if (args.copied) args.input = {nullptr, args.depth, dtype};
    return args;
}

static inline void place_workspace(LinearCudaArgs& args, void* workspace) {
    args.workspace = workspace;
    args.counters = reinterpret_cast<int32_t*>(static_cast<unsigned char*>(workspace) + args.layout.counters);
    if (args.copied) args.input.data = workspace;
}

}  // namespace starflow
