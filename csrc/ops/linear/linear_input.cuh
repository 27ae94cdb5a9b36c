// What comes before the product in linear's CUDA kernels: x in the type of the weight, and no block arrived anywhere.
#pragma once
#include "cuda/enqueue.cuh"
#include "ops/linear/linear_copy.cuh"

namespace starflow::cuda {
namespace {

constexpr int prepare_threads = 2 * copy_threads;

// Four blocks a multiprocessor leave 64 registers; without this launch bound ptxas takes 32 and spills.
__global__ void __launch_bounds__(prepare_threads, 4) prepare(LinearCudaArgs args) {
    __shared__ CopyBlock<prepare_threads> block;
    block.copy(args, blockIdx.x);
}

// Sets the counters of all tiles to zero: no block has arrived.
__global__ void clear_counters(LinearCudaArgs args) {
    const int64_t tile = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
    if (tile < args.schedule.tiles()) args.counters[tile] = 0;
}

// Enqueue what must be done before the product of a call.
int prepare_linear(const LinearCudaArgs& args, void* stream) {
    if (args.chained) return 0;
    int code = 0;
    if (args.copied) {
        const dim3 blocks(
            static_cast<unsigned>(linear_divide_up(args.call.rows, int64_t{CopyBlock<prepare_threads>::rows})));
        code = enqueue(prepare, blocks, dim3(prepare_threads), 0, stream, args);
    }
    if (code == 0 && args.schedule.split) {
        constexpr int64_t threads = 256;
        const dim3 blocks(static_cast<unsigned>(linear_divide_up(args.schedule.tiles(), threads)));
        code = enqueue(clear_counters, blocks, dim3(threads), 0, stream, args);
    }
    return code;
}

}  // namespace
}  // namespace starflow::cuda
