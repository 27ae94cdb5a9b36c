// What comes before the product in linear's CUDA kernels: x in the type of the weight, and no block arrived anywhere.
#pragma once
#include "cuda/enqueue.cuh"
#include "cuda/reduce.cuh"
#include "ops/linear/linear_finish.cuh"

namespace starflow::cuda {
namespace {

constexpr int prepare_threads = 256;

// norm(x), rounded to the type of the weight and padded with zeros: what is multiplied. A block a row. The formula of
// the norm is in ops/norm/norm.h; its second and third pass over the row find it in the first-level cache. __fdividef
// and rsqrtf are off by 2 units in the last place at most, a ten-thousandth of the error of the rounding. Four blocks a
// multiprocessor leave 64 registers; without this launch bound ptxas takes 32 and spills.
template <int width>
__global__ void __launch_bounds__(prepare_threads, 4) prepare(LinearCudaArgs args) {
    __shared__ BlockSums<float, 1>::Scratch scratch;
    BlockSums<float, 1> sums(scratch);
    const LinearArgs& call = args.call;
    const int64_t channels = call.weights.depth;
    const int64_t row = blockIdx.x;
    const bool centred = call.norm.kind == NormKind::layer;
    const auto over_channels = [&](const auto& visit) {
        for (int64_t c = threadIdx.x * width; c < channels; c += prepare_threads * width) {
            float x[width];
            load_row<width>(call.x, row, c, x);
            visit(c, x);
        }
    };
    float mean = 0.0F;
    float inverse = 1.0F;
    if (centred) {
        float sum[1] = {};
        over_channels([&](int64_t, const float (&x)[width]) {
#pragma unroll
            for (int i = 0; i < width; ++i) sum[0] += x[i];
        });
        sums(sum);
        mean = __fdividef(sum[0], static_cast<float>(channels));
    }
    if (call.norm.kind != NormKind::none) {
        float squares[1] = {};
        over_channels([&](int64_t, const float (&x)[width]) {
#pragma unroll
            for (int i = 0; i < width; ++i) squares[0] += (x[i] - mean) * (x[i] - mean);
        });
        sums(squares);
        const float count = static_cast<float>(channels);
        if (mean * mean * count > static_cast<float>(far_mean_squared) * squares[0]) {
            float rest[1] = {};
            squares[0] = 0.0F;
            over_channels([&](int64_t, const float (&x)[width]) {
#pragma unroll
                for (int i = 0; i < width; ++i) rest[0] += x[i] - mean;
            });
            sums(rest);
            mean += __fdividef(rest[0], count);
            over_channels([&](int64_t, const float (&x)[width]) {
#pragma unroll
                for (int i = 0; i < width; ++i) squares[0] += (x[i] - mean) * (x[i] - mean);
            });
            sums(squares);
        }
        inverse = rsqrtf(__fdividef(squares[0], static_cast<float>(channels)) + call.norm.epsilon);
    }
    over_channels([&](int64_t c, float (&x)[width]) {
        if (call.norm.kind != NormKind::none) {
            float weight[width];
            float bias[width] = {};
            load<width>(call.norm.weight + c, weight);
            if (call.norm.bias != nullptr) load<width>(call.norm.bias + c, bias);
#pragma unroll
            for (int i = 0; i < width; ++i) {
                x[i] = (x[i] - mean) * inverse * (call.norm.weight_offset + weight[i]) + bias[i];
            }
        }
        store_row<width>(args.input, row, c, x);
    });
    for (int64_t c = channels + threadIdx.x; c < args.depth; c += prepare_threads) {
        const float zero[1] = {0.0F};
        store_row<1>(args.input, row, c, zero);
    }
}

// Sets the counters of all tiles to zero: no block has arrived.
__global__ void clear_counters(LinearCudaArgs args) {
    const int64_t tile = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
    auto* workspace = static_cast<unsigned char*>(args.workspace);
    if (tile < args.schedule.tiles()) reinterpret_cast<int*>(workspace + args.layout.counters)[tile] = 0;
}

// Enqueue what must be done before the product of a call.
int prepare_linear(const LinearCudaArgs& args, void* stream) {
    int code = 0;
    if (args.copied) {
        const dim3 rows(static_cast<unsigned>(args.call.rows));
        code =
            enqueue(args.wide_input ? prepare<finish_width> : prepare<1>, rows, dim3(prepare_threads), 0, stream, args);
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
