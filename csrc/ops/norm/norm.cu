// LayerNorm, RMSNorm and their gradient on CUDA; the formula and the bytes are in norm.h. One row at a time for a
// block, held in registers: x is read once. Every architecture.
#include "ops/norm/norm.h"

#include <cuda_runtime.h>

#include "common/visit.h"
#include "cuda/enqueue.cuh"
#include "cuda/packed.cuh"
#include "cuda/reduce.cuh"

namespace starflow {
namespace {

using namespace cuda;

// Channels that a thread holds in registers, in pieces of `width`.
constexpr int held_channels = 16;
constexpr int most_threads = static_cast<int>(norm_most_channels_cuda) / held_channels;

// Call step(c, piece) for the pieces of a row that this thread holds; channels c to c + width are side by side.
template <int width, class Step>
__device__ void over_pieces(int channels, const Step& step) {
#pragma unroll
    for (int piece = 0; piece < held_channels / width; ++piece) {
        const int c = static_cast<int>(piece * blockDim.x + threadIdx.x) * width;
        if (c < channels) step(c, piece);
    }
}

template <class T, int width>
using Held = T[held_channels / width][width];

template <class T>
struct Statistics {
    T mean;
    T inverse;  // of the standard deviation, or of the root of the mean square
};

// The variance is that of the centred values: the difference of two large sums would lose it.
template <int width, class T, class Sums>
__device__ Statistics<T> statistics(const NormShape& shape, const Held<T, width>& values, Sums& sums) {
    const int channels = static_cast<int>(shape.channels);
    const T count = static_cast<T>(channels);
    T sum[1] = {};
    if (shape.centred) {
        over_pieces<width>(channels, [&](int, int piece) {
#pragma unroll
            for (int i = 0; i < width; ++i) sum[0] += values[piece][i];
        });
        sums(sum);
    }
    T mean = sum[0] / count;
    T squares[1];
    const auto sum_squares = [&] {
        squares[0] = T(0);
        over_pieces<width>(channels, [&](int, int piece) {
#pragma unroll
            for (int i = 0; i < width; ++i) {
                const T centred = values[piece][i] - mean;
                squares[0] += centred * centred;
            }
        });
        sums(squares);
    };
    sum_squares();
    if (mean * mean * count > static_cast<T>(far_mean_squared) * squares[0]) {
        T rest[1] = {};
        over_pieces<width>(channels, [&](int, int piece) {
#pragma unroll
            for (int i = 0; i < width; ++i) rest[0] += values[piece][i] - mean;
        });
        sums(rest);
        mean += rest[0] / count;
        sum_squares();
    }
    return {mean, T(1) / sqrt(squares[0] / count + static_cast<T>(shape.epsilon))};
}

template <class Data, int width>
__global__ void __launch_bounds__(most_threads, 1) forward_kernel(NormArgs args) {
    await_earlier_launches();
    using T = typename Arithmetic<Data>::type;
    __shared__ T scratch[2][1][warp_size];
    BlockSums<T, 1> sums(scratch);
    const NormShape& shape = args.shape;
    const int channels = static_cast<int>(shape.channels);
    const int64_t row = blockIdx.x;
    const int64_t b = row / shape.tokens;
    const int64_t t = row % shape.tokens;
    const Data* x = row_of<const Data>(args.x, b, t);
    const T* weight = static_cast<const T*>(args.weight);
    const T* bias = static_cast<const T*>(args.bias);
    T* out = static_cast<T*>(args.out) + row * channels;
    Held<T, width> values;
    over_pieces<width>(channels, [&](int c, int piece) { load<width>(x + c, values[piece]); });
    if (args.sum != nullptr) {
        const T* residual = row_of<const T>(args.residual, b, t);
        T* total = static_cast<T*>(args.sum) + row * channels;
        over_pieces<width>(channels, [&](int c, int piece) {
            T added[width];
            load<width>(residual + c, added);
#pragma unroll
            for (int i = 0; i < width; ++i) values[piece][i] += added[i];
            store<width>(total + c, values[piece]);
        });
    }
    const Statistics<T> found = statistics<width>(shape, values, sums);
    const T offset = static_cast<T>(shape.weight_offset);
    over_pieces<width>(channels, [&](int c, int piece) {
        T scale[width];
        T shift[width] = {};
        T result[width];
        load<width>(weight + c, scale);
        if (bias != nullptr) load<width>(bias + c, shift);
#pragma unroll
        for (int i = 0; i < width; ++i) {
            result[i] = (values[piece][i] - found.mean) * found.inverse * (offset + scale[i]) + shift[i];
        }
        store<width>(out + c, result);
    });
}

// A block of threads for each block of rows. Each thread sums its channels over them, in its own part of shared memory:
// in registers there would be no room beside the row.
template <class Data, int width>
__global__ void __launch_bounds__(most_threads, 1) backward_kernel(NormBackwardArgs args) {
    using T = typename Arithmetic<Data>::type;
    STARFLOW_SHARED_MEMORY(bytes);
    __shared__ T scratch[2][2][warp_size];
    BlockSums<T, 2> sums(scratch);
    const NormShape& shape = args.shape;
    const int channels = static_cast<int>(shape.channels);
    T* weight_sum = reinterpret_cast<T*>(bytes);
    T* bias_sum = weight_sum + channels;
    const int64_t block = blockIdx.x;
    const T* weight = static_cast<const T*>(args.weight);
    const T offset = static_cast<T>(shape.weight_offset);
    over_pieces<width>(channels, [&](int c, int) {
        constexpr T zero[width] = {};
        store<width>(weight_sum + c, zero);
        if (args.with_bias) store<width>(bias_sum + c, zero);
    });
    for (int64_t row = args.blocks.begin(block); row < args.blocks.end(block); ++row) {
        const int64_t b = row / shape.tokens;
        const int64_t t = row % shape.tokens;
        const Data* x = row_of<const Data>(args.x, b, t);
        const T* grad_out = row_of<const T>(args.grad_out, b, t);
        const T* grad_sum = args.grad_sum.data == nullptr ? nullptr : row_of<const T>(args.grad_sum, b, t);
        Data* grad_x = static_cast<Data*>(args.grad_x) + row * channels;
        Held<T, width> normed;
        Held<T, width> gradient;
        over_pieces<width>(channels, [&](int c, int piece) {
            load<width>(x + c, normed[piece]);
            load<width>(grad_out + c, gradient[piece]);
        });
        const Statistics<T> found = statistics<width>(shape, normed, sums);
        T along[2] = {};  // sums of the gradient along ones, and along the normed values
        over_pieces<width>(channels, [&](int c, int piece) {
            T scale[width];
            T sum[width];
            load<width>(weight + c, scale);
            if (args.with_bias) {
                load<width>(bias_sum + c, sum);
#pragma unroll
                for (int i = 0; i < width; ++i) sum[i] += gradient[piece][i];
                store<width>(bias_sum + c, sum);
            }
            load<width>(weight_sum + c, sum);
#pragma unroll
            for (int i = 0; i < width; ++i) {
                T& n = normed[piece][i];
                T& g = gradient[piece][i];
                n = (n - found.mean) * found.inverse;
                sum[i] += g * n;
                g *= offset + scale[i];
                along[0] += g;
                along[1] += g * n;
            }
            store<width>(weight_sum + c, sum);
        });
        sums(along);
        const T one_part = shape.centred ? along[0] / static_cast<T>(channels) : T(0);
        const T normed_part = along[1] / static_cast<T>(channels);
        over_pieces<width>(channels, [&](int c, int piece) {
            T result[width];
            T added[width] = {};
            if (grad_sum != nullptr) load<width>(grad_sum + c, added);
#pragma unroll
            for (int i = 0; i < width; ++i) {
                result[i] = found.inverse * (gradient[piece][i] - one_part - normed[piece][i] * normed_part) + added[i];
            }
            store<width>(grad_x + c, result);
        });
    }
    T* partial = static_cast<T*>(args.partial) + block * channels * (args.with_bias ? 2 : 1);
    over_pieces<width>(channels, [&](int c, int) {
        T sum[width];
        load<width>(weight_sum + c, sum);
        store<width>(partial + c, sum);
        if (!args.with_bias) return;
        load<width>(bias_sum + c, sum);
        store<width>(partial + channels + c, sum);
    });
}

// Threads that hold a row of `channels`, in whole warps.
unsigned threads_of(int64_t channels) {
    const int64_t needed = (channels + held_channels - 1) / held_channels;
    return static_cast<unsigned>((needed + warp_size - 1) / warp_size * warp_size);
}

// Call launch(data type, width) with 16 bytes a thread where all_aligned(width, bytes of data, bytes of the
// arithmetic).
template <class AllAligned, class Launch>
int launch_norm(const NormShape& shape, const AllAligned& all_aligned, const Launch& launch) {
    int code = 0;
    visit_dtype(shape.data, [&](auto data) {
        using Data = typename decltype(data)::type;
        constexpr int width = widest_access / sizeof(Data);
        if (shape.channels % width == 0 && all_aligned(width, sizeof(Data), sizeof(typename Arithmetic<Data>::type))) {
            code = launch(data, Constant<width>{});
        } else {
            code = launch(data, Constant<1>{});
        }
    });
    return code;
}

}  // namespace

int norm_cuda(const NormArgs& args, void* stream) {
    const int64_t rows = args.shape.batch * args.shape.tokens;
    if (rows == 0 || args.shape.channels == 0) return 0;
    const auto all_aligned = [&](int64_t width, int64_t data_size, int64_t size) {
        return aligned(args.x, width, data_size) && aligned(args.residual, width, size) &&
               aligned(args.weight, width, size) && aligned(args.bias, width, size) && aligned(args.out, width, size) &&
               aligned(args.sum, width, size);
    };
    return launch_norm(args.shape, all_aligned, [&](auto data, auto width) {
        return enqueue_early(args.early, forward_kernel<typename decltype(data)::type, width.get()>,
                             static_cast<unsigned>(rows), threads_of(args.shape.channels), 0, stream, args);
    });
}

int norm_backward_cuda(const NormBackwardArgs& args, void* stream) {
    const NormShape& shape = args.shape;
    const int64_t parameters = shape.channels * (args.with_bias ? 2 : 1);
    if (parameters == 0) return 0;
    const auto all_aligned = [&](int64_t width, int64_t data_size, int64_t size) {
        return aligned(args.x, width, data_size) && aligned(args.grad_out, width, size) &&
               aligned(args.grad_sum, width, size) && aligned(args.weight, width, size) &&
               aligned(args.grad_x, width, data_size) && aligned(args.partial, width, size);
    };
    int code = 0;
    if (args.blocks.count > 0) {
        code = launch_norm(shape, all_aligned, [&](auto data, auto width) {
            const size_t shared = parameters * sizeof(typename Arithmetic<typename decltype(data)::type>::type);
            return enqueue(backward_kernel<typename decltype(data)::type, width.get()>,
                           static_cast<unsigned>(args.blocks.count), threads_of(shape.channels), shared, stream, args);
        });
    }
    if (code != 0) return code;
    return shape.data == Dtype::float64
               ? sum_rows<double>(args.partial, args.parameters, args.blocks.count, parameters, stream)
               : sum_rows<float>(args.partial, args.parameters, args.blocks.count, parameters, stream);
}

}  // namespace starflow
