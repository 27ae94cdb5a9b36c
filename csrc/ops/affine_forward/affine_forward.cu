// z = (x - shift) / scale and its gradient on CUDA; the formula and the bytes are in affine_forward.h. One warp a row,
// every architecture.
#include "ops/affine_forward/affine_forward.h"

#include "ops/affine_common/affine_terms.cuh"

namespace starflow {
namespace {

using namespace cuda;

template <class Data, class Raw, int width>
__global__ void forward_kernel(AffineForwardArgs args) {
    using T = typename Arithmetic<Data>::type;
    const AffineShape& shape = args.shape;
    const int64_t row = row_of_warp();
    if (row >= shape.batch * shape.tokens) return;
    const int64_t b = row / shape.tokens;
    const int64_t t = row % shape.tokens;
    const int64_t behind = shape.options.shifted ? 1 : 0;
    const Data* x = row_of<const Data>(args.x, b, t);
    Data* z = row_of<Data>(args.z, b, t);
    T log_scale = 0;
    if (t < behind) {
        copy_row<width>(x, z, shape.channels);
    } else {
        const Raw* raw = row_of<const Raw>(args.raw, b, t - behind);
        for (int64_t c = lane() * width; c < shape.channels; c += warp_size * width) {
            const RawTerms<T, width> terms(raw, shape, c);
            T values[width];
            load<width>(x + c, values);
#pragma unroll
            for (int i = 0; i < width; ++i) {
                values[i] = (values[i] - terms.shift[i]) / terms.scale[i].scale;
                log_scale += terms.scale[i].log_scale;
            }
            store<width>(z + c, values);
        }
    }
    log_scale = warp_sum(log_scale);
    if (lane() == 0) static_cast<T*>(args.log_det)[row] = -log_scale;
}

template <class Data, class Raw, int width>
__global__ void backward_kernel(AffineForwardBackwardArgs args) {
    using T = typename Arithmetic<Data>::type;
    const AffineShape& shape = args.shape;
    const int64_t row = row_of_warp();
    if (row >= shape.batch * shape.tokens) return;
    const int64_t b = row / shape.tokens;
    const int64_t t = row % shape.tokens;
    const int64_t behind = shape.options.shifted ? 1 : 0;
    const bool shift_only = shape.options.activation == ScaleActivation::none;
    const Data* grad_z = row_of<const Data>(args.grad_z, b, t);
    Data* grad_x = row_of<Data>(args.grad_x, b, t);
    if (t < behind) {
        copy_row<width>(grad_z, grad_x, shape.channels);
        zero_row<width>(row_of<Raw>(args.grad_raw, b, shape.tokens - 1),
                        shift_only ? shape.channels : 2 * shape.channels);
        return;
    }
    const Data* x = row_of<const Data>(args.x, b, t);
    const Raw* raw = row_of<const Raw>(args.raw, b, t - behind);
    Raw* grad_raw = row_of<Raw>(args.grad_raw, b, t - behind);
    const T grad_log_det = static_cast<const T*>(args.grad_log_det)[row];
    for (int64_t c = lane() * width; c < shape.channels; c += warp_size * width) {
        const RawTerms<T, width> terms(raw, shape, c);
        T values[width];
        T gradient[width];
        T grad_log_half[width];
        T grad_shift[width];
        load<width>(x + c, values);
        load<width>(grad_z + c, gradient);
#pragma unroll
        for (int i = 0; i < width; ++i) {
            const Scale<T>& scale = terms.scale[i];
            const T z = (values[i] - terms.shift[i]) / scale.scale;
            // d z / d log(scale) = -z, and log_det counts -log(scale).
            grad_log_half[i] =
                through_clamp(-(gradient[i] * z + grad_log_det), scale.log_slope) * terms.log_half_slope[i];
            gradient[i] /= scale.scale;
            grad_shift[i] = -gradient[i] * terms.shift_slope[i];
        }
        store<width>(grad_x + c, gradient);
        if (!shift_only) store<width>(grad_raw + c, grad_log_half);
        store<width>(grad_raw + c + (shift_only ? 0 : shape.channels), grad_shift);
    }
}

}  // namespace

int affine_forward_cuda(const AffineForwardArgs& args, void* stream) {
    const auto all_aligned = [&](int64_t width, int64_t data_size, int64_t raw_size) {
        return aligned(args.x, width, data_size) && aligned(args.z, width, data_size) &&
               aligned(args.raw, width, raw_size);
    };
    return launch_affine(args.shape, all_aligned, [&](auto data, auto raw, auto width, unsigned blocks, int threads) {
        return enqueue(forward_kernel<typename decltype(data)::type, typename decltype(raw)::type, width.get()>, blocks,
                       threads, 0, stream, args);
    });
}

int affine_forward_backward_cuda(const AffineForwardBackwardArgs& args, void* stream) {
    const auto all_aligned = [&](int64_t width, int64_t data_size, int64_t raw_size) {
        return aligned(args.x, width, data_size) && aligned(args.grad_z, width, data_size) &&
               aligned(args.grad_x, width, data_size) && aligned(args.raw, width, raw_size) &&
               aligned(args.grad_raw, width, raw_size);
    };
    return launch_affine(args.shape, all_aligned, [&](auto data, auto raw, auto width, unsigned blocks, int threads) {
        return enqueue(backward_kernel<typename decltype(data)::type, typename decltype(raw)::type, width.get()>,
                       blocks, threads, 0, stream, args);
    });
}

}  // namespace starflow
