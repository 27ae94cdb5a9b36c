// The copy of x that linear's CUDA kernels multiply, in the type of the weight: by a launch of its own
// (linear_input.cuh), or by blocks of the product's launch, in front of the others.
#pragma once
#include "cuda/named_barrier.cuh"
#include "cuda/reduce.cuh"
#include "cuda/signal.cuh"
#include "ops/linear/linear_finish.cuh"

namespace starflow::cuda {
namespace {

// Threads that copy a row together. Always as many, in a launch of their own or in the product's, of whatever tiles:
// the sums of a norm are added in their order.
constexpr int copy_threads = 128;

// Sums over the threads of a row, of which every one gets the result. Rows of `scratch` serve in turn: what one call
// still reads, the next one does not write.
class RowSums {
  public:
    using Scratch = float[2][copy_threads / warp_size];

    __device__ RowSums(Scratch& scratch, int group) : scratch_(scratch), group_(group) {}

    __device__ float operator()(float value) {
        value = warp_sum(value);
        if (lane() == 0) scratch_[turn_][threadIdx.x % copy_threads / warp_size] = value;
        sync();
        float sum = 0.0F;
#pragma unroll
        for (int warp = 0; warp < copy_threads / warp_size; ++warp) sum += scratch_[turn_][warp];
        turn_ = 1 - turn_;
        return sum;
    }
    // By numbers that the compiler knows: a barrier of any number would take all sixteen of a block.
    __device__ void sync() const {
        switch (group_) {
            case 0:
                return sync_named<copy_threads>(1);
            case 1:
                return sync_named<copy_threads>(2);
            default:
                return sync_named<copy_threads>(3);
        }
    }

  private:
    Scratch& scratch_;
    int group_;
    int turn_ = 0;
};

// norm(x) of a row, rounded to the type of the weight and padded with zeros: what is multiplied. The formula of the
// norm is in ops/norm/norm.h; its second and third pass over the row find it in the first-level cache. __fdividef and
// rsqrtf are off by 2 units in the last place at most, a ten-thousandth of the error of the rounding.
template <int width>
__device__ void copy_row(const LinearCudaArgs& args, int64_t row, RowSums& sums) {
    const LinearArgs& call = args.call;
    const int64_t channels = call.weights.depth;
    const int thread = static_cast<int>(threadIdx.x) % copy_threads;
    const bool centred = call.norm.kind == NormKind::layer;
    const auto over_channels = [&](const auto& visit) {
        for (int64_t c = thread * width; c < channels; c += copy_threads * width) {
            float x[width];
            load_row<width>(call.x, row, c, x);
            visit(c, x);
        }
    };
    const auto sum_of = [&](const auto& term) {
        float sum = 0.0F;
        over_channels([&](int64_t, const float (&x)[width]) {
#pragma unroll
            for (int i = 0; i < width; ++i) sum += term(x[i]);
        });
        return sums(sum);
    };
    const auto count = static_cast<float>(channels);
    float mean = 0.0F;
    float inverse = 1.0F;
    if (centred) mean = __fdividef(sum_of([](float x) { return x; }), count);
    if (call.norm.kind != NormKind::none) {
        const auto squared = [&](float x) { return (x - mean) * (x - mean); };
        float squares = sum_of(squared);
        if (mean * mean * count > static_cast<float>(far_mean_squared) * squares) {
            mean += __fdividef(sum_of([&](float x) { return x - mean; }), count);
            squares = sum_of(squared);
        }
        inverse = rsqrtf(__fdividef(squares, count) + call.norm.epsilon);
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
    for (int64_t c = channels + thread; c < args.depth; c += copy_threads) {
        const float zero[1] = {0.0F};
        store_row<1>(args.input, row, c, zero);
    }
}

// Rows that a block of `threads` copies, and scratch for them.
template <int threads>
struct CopyBlock {
    static constexpr int rows = threads / copy_threads;
    static_assert(rows <= 3 && threads % copy_threads == 0);
    RowSums::Scratch scratch[rows];

    // Rows of the n-th block.
    __device__ void copy(const LinearCudaArgs& args, uint32_t n) {
        const int group = static_cast<int>(threadIdx.x) / copy_threads;
        const int64_t row = int64_t{n} * rows + group;
        if (row >= args.call.rows) return;
        RowSums sums(scratch[group], group);
        if (args.wide_input) {
            copy_row<finish_width>(args, row, sums);
        } else {
            copy_row<1>(args, row, sums);
        }
        if (!args.chained) return;
        // The threads that signal have seen that all have written, and TMA reads what they wrote.
        fence_proxy_of_memory();
        sums.sync();
        if (threadIdx.x % copy_threads == 0) {
            // In 32 bits, as in finish_heads.
            const int32_t tile = static_cast<int32_t>(row) / args.schedule.tile_rows;
            signal(args.counters + args.schedule.first_copied() + tile);
        }
    }
};

// Blocks in front of those of the product, in its own launch, of as many threads.
template <int threads>
STARFLOW_HOST_DEVICE constexpr uint32_t copying_blocks(const LinearCudaArgs& args) {
    constexpr int rows = CopyBlock<threads>::rows;
    return args.chained && args.copied ? static_cast<uint32_t>((args.call.rows + rows - 1) / rows) : 0;
}

// Wait for the copy of the rows of a tile, from blocks that have begun before this one.
__device__ void wait_for_copy(const LinearCudaArgs& args, int32_t row_tile) {
    const LinearSchedule& schedule = args.schedule;
    const int64_t left = args.call.rows - int64_t{row_tile} * schedule.tile_rows;
    wait_for_signals(args.counters + schedule.first_copied() + row_tile,
                     static_cast<int32_t>(left < schedule.tile_rows ? left : schedule.tile_rows));
}

// Along x, of which a grid has up to 2^31 - 1 blocks.
template <int threads>
dim3 linear_grid(const LinearCudaArgs& args) {
    return dim3(copying_blocks<threads>(args) + static_cast<unsigned>(args.schedule.blocks()));
}

}  // namespace
}  // namespace starflow::cuda
