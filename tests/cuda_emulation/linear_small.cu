// linear's kernel with two tiles alone, for test_linear.py to compile many times: one of a row of warps, and one of
// several that does parts of the depth in turn.
#include "ops/linear/linear_input.cuh"
#include "ops/linear/linear_multiply.cuh"

namespace starflow {

int linear_cuda(const LinearCudaArgs& args, void* stream) {
    using Product = cute::SM80_16x8x16_F32BF16BF16F32_TN;
    const int code = cuda::prepare_linear(args, stream);
    if (code != 0) return code;
    return args.schedule.tile_rows == 16 ? cuda::multiply_tiles<cuda::Tile<Product, 16, 64, 1, 4, 4>>(args, stream)
                                         : cuda::multiply_tiles<cuda::Tile<Product, 32, 64, 2, 2, 4>>(args, stream);
}

}  // namespace starflow
