// linear on CUDA; the formula and the bytes are in linear.h. Every architecture from sm_80; sm_90a and sm_100f have
// products of their own, linear_sm90.cu and linear_sm100.cu.
#include "ops/linear/linear_input.cuh"
#include "ops/linear/linear_multiply.cuh"

namespace starflow {
namespace {

using namespace cuda;

template <class Product>
int multiply_by(const LinearCudaArgs& args, void* stream) {
    // Of the tiles of 64 columns two blocks fit on a multiprocessor of sm_80, with 60 to 80 KB each. What is on its way
    // to them, 8 KB of the weight for each stage but one, covers the latency of the memory.
    switch (args.schedule.tile_rows) {
        case 16:
            return multiply_tiles<Tile<Product, 16, 64, 1, 4, 6>>(args, stream);
        case 32:
            return multiply_tiles<Tile<Product, 32, 64, 2, 2, 6>>(args, stream);
        case 64:
            return multiply_tiles<Tile<Product, 64, 64, 2, 2, 5>>(args, stream);
        default:
            if (args.schedule.tile_columns == 64) return multiply_tiles<Tile<Product, 128, 64, 2, 2, 3>>(args, stream);
            // 96 KB: what a block of sm_86, sm_89 and sm_120 can have at most.
            return multiply_tiles<Tile<Product, 128, 128, 2, 4, 3>>(args, stream);
    }
}

}  // namespace

int linear_cuda(const LinearCudaArgs& args, void* stream) {
    if (args.schedule.tiles() == 0) return 0;
    const int code = prepare_linear(args, stream);
    if (code != 0) return code;
    if (args.kernel == LinearKernel::wgmma) return linear_sm90_cuda(args, stream);
    if (args.kernel == LinearKernel::tcgen05) return linear_sm100_cuda(args, stream);
    return args.input.dtype == Dtype::bfloat16 ? multiply_by<cute::SM80_16x8x16_F32BF16BF16F32_TN>(args, stream)
                                               : multiply_by<cute::SM80_16x8x16_F32F16F16F32_TN>(args, stream);
}

}  // namespace starflow
