// linear's kernels of sm_90a, with the pass in front of them, for test_linear.py: as linear.cu launches them.
#include "ops/linear/linear_sm90.cu"

#include "ops/linear/linear_input.cuh"

namespace starflow {

int linear_cuda(const LinearCudaArgs& args, void* stream) {
    if (args.schedule.tiles() == 0) return 0;
    const int code = cuda::prepare_linear(args, stream);
    return code != 0 ? code : linear_sm90_cuda(args, stream);
}

}  // namespace starflow
