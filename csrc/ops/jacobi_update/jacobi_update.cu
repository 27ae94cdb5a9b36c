// One sweep's update on CUDA; the formula and the bytes are in jacobi_update.h. One warp a row, every architecture.
#include "ops/jacobi_update/jacobi_update.h"

#include "ops/jacobi_update/jacobi_update_row.cuh"

namespace starflow {
namespace {

using namespace cuda;

template <class Data, class Raw, int width>
__global__ void update_kernel(JacobiUpdateArgs args) {
    using T = typename Arithmetic<Data>::type;
    const AffineShape& shape = args.shape;
    const int64_t row = row_of_warp();
    if (row >= shape.batch * shape.tokens) return;
    const int64_t b = row / shape.tokens;
    const int64_t t = row % shape.tokens;
    const T weight = static_cast<T>(args.guidance);
    Data* x = row_of<Data>(args.x, b, t);
    const Data* z = row_of<const Data>(args.z, b, t);
    const Raw* raw = row_of<const Raw>(args.raw, b, t);
    const Raw* free = weight > T(0) ? row_of<const Raw>(args.raw, shape.batch + b, t) : nullptr;
    T change = 0;
    for (int64_t c = lane() * width; c < shape.channels; c += warp_size * width) {
        const GuidedTerms<T, width> terms(raw, free, weight, shape, c);
        T old[width];
        T updated[width];
        load<width>(x + c, old);
        load<width>(z + c, updated);
#pragma unroll
        for (int i = 0; i < width; ++i) {
            updated[i] = terms.shift[i] + terms.scale[i] * updated[i];
            change = larger(change, abs(updated[i] - old[i]) / terms.scale[i]);
        }
        store<width>(x + c, updated);
    }
    change = warp_largest(change);
    if (lane() == 0) args.change[row] = static_cast<float>(change);
}

}  // namespace

int jacobi_update_cuda(const JacobiUpdateArgs& args, void* stream) {
    const auto all_aligned = [&](int64_t width, int64_t data_size, int64_t raw_size) {
        return aligned(args.x, width, data_size) && aligned(args.z, width, data_size) &&
               aligned(args.raw, width, raw_size);
    };
    return launch_affine(args.shape, all_aligned, [&](auto data, auto raw, auto width, unsigned blocks, int threads) {
        return enqueue(update_kernel<typename decltype(data)::type, typename decltype(raw)::type, width.get()>, blocks,
                       threads, 0, stream, args);
    });
}

}  // namespace starflow
