// x = shift + scale * z and its gradient on CUDA; the formula and the bytes are in affine_inverse.h. One warp a row,
// every architecture.
#include "ops/affine_inverse/affine_inverse.h"

#include "ops/affine_common/affine_terms.cuh"

namespace starflow {
namespace {

using namespace cuda;

template <class Data, class Raw, int width>
__global__ void forward_kernel(AffineInverseArgs args) {
    using T = typename Arithmetic<Data>::type;
    const AffineShape& shape = args.shape;
    const int64_t row = row_of_warp();
    if (row >= shape.batch * shape.tokens) return;
    const int64_t b = row / shape.tokens;
    const int64_t t = row % shape.tokens;
    const int64_t behind = shape.options.shifted ? 1 : 0;
    const Data* z = row_of<const Data>(args.z, b, t);
    Data* x = row_of<Data>(args.x, b, t);
    if (t < behind) {
        copy_row<width>(z, x, shape.channels);
        return;
    }
    const Raw* raw = row_of<const Raw>(args.raw, b, t - behind);
    for (int64_t c = lane() * width; c < shape.channels; c += warp_size * width) {
        const RawTerms<T, width> terms(raw, shape, c);
        T values[width];
        load<width>(z + c, values);
#pragma unroll
        for (int i = 0; i < width; ++i) values[i] = terms.shift[i] + terms.scale[i].scale * values[i];
        store<width>(x + c, values);
    }
}

template <class Data, class Raw, int width>
__global__ void backward_kernel(AffineInverseBackwardArgs args) {
    using T = typename Arithmetic<Data>::type;
    const AffineShape& shape = args.shape;
    const int64_t row = row_of_warp();
    if (row >= shape.batch * shape.tokens) return;
    const int64_t b = row / shape.tokens;
    const int64_t t = row % shape.tokens;
    const int64_t behind = shape.options.shifted ? 1 : 0;
    const bool shift_only = shape.options.activation == ScaleActivation::none;
    const Data* grad_x = row_of<const Data>(args.grad_x, b, t);
    Data* grad_z = row_of<Data>(args.grad_z, b, t);
    if (t < behind) {
        copy_row<width>(grad_x, grad_z, shape.channels);
        zero_row<width>(row_of<Raw>(args.grad_raw, b, shape.tokens - 1),
                        shift_only ? shape.channels : 2 * shape.channels);
        return;
    }
    const Data* z = row_of<const Data>(args.z, b, t);
    const Raw* raw = row_of<const Raw>(args.raw, b, t - behind);
    Raw* grad_raw = row_of<Raw>(args.grad_raw, b, t - behind);
    for (int64_t c = lane() * width; c < shape.channels; c += warp_size * width) {
        const RawTerms<T, width> terms(raw, shape, c);
        T values[width];
        T gradient[width];
        T grad_log_half[width];
        T grad_shift[width];
        load<width>(z + c, values);
        load<width>(grad_x + c, gradient);
#pragma unroll
        for (int i = 0; i < width; ++i) {
            const Scale<T>& scale = terms.scale[i];
            grad_shift[i] = gradient[i] * terms.shift_slope[i];
            grad_log_half[i] =
                through_clamp(gradient[i] * values[i] * scale.scale, scale.log_slope) * terms.log_half_slope[i];
            gradient[i] *= scale.scale;
        }
        store<width>(grad_z + c, gradient);
        if (!shift_only) store<width>(grad_raw + c, grad_log_half);
        store<width>(grad_raw + c + (shift_only ? 0 : shape.channels), grad_shift);
    }
}

}  // namespace

int affine_inverse_cuda(const AffineInverseArgs& args, void* stream) {
    const auto all_aligned = [&](int64_t width, int64_t data_size, int64_t raw_size) {
        return aligned(args.z, width, data_size) && aligned(args.x, width, data_size) &&
               aligned(args.raw, width, raw_size);
    };
    return launch_affine(args.shape, all_aligned, [&](auto data, auto raw, auto width, unsigned blocks, int threads) {
        return enqueue(forward_kernel<typename decltype(data)::type, typename decltype(raw)::type, width.get()>, blocks,
                       threads, 0, stream, args);
    });
}

int affine_inverse_backward_cuda(const AffineInverseBackwardArgs& args, void* stream) {
    const auto all_aligned = [&](int64_t width, int64_t data_size, int64_t raw_size) {
        return aligned(args.z, width, data_size) && aligned(args.grad_x, width, data_size) &&
               aligned(args.grad_z, width, data_size) && aligned(args.raw, width, raw_size) &&
               aligned(args.grad_raw, width, raw_size);
    };
    return launch_affine(args.shape, all_aligned, [&](auto data, auto raw, auto width, unsigned blocks, int threads) {
        return enqueue(backward_kernel<typename decltype(data)::type, typename decltype(raw)::type, width.get()>,
                       blocks, threads, 0, stream, args);
    });
}

}  // namespace starflow
