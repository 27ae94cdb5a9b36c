// A block as jacobi_sweep and jacobi_solve take it, read into the kernel's structs.
#pragma once
#include <vector>

#include "common/tensor.h"
#include "ops/jacobi_sweep/sweep_order.h"
#include "ops/jacobi_sweep/sweeper.h"
#include "ops/linear/linear_plan.h"

namespace starflow {

// A block as the ops take it: numbers in the order of BlockSize, and tensors in that of BlockTensor, those of each
// layer behind them in that of LayerTensor (an empty one is absent). Python reads the orders from `_C.orders`.
struct BlockTensors {
    Tensor keys;    // (layers, cache rows, kv_heads, elements of a head): panels; on CUDA slots times head_dim
    Tensor values;  // like keys
    std::vector<Tensor> weights;
    std::vector<int64_t> sizes;
    int64_t product_input;
};

// Checks the tensors against the numbers, and holds what the kernel's struct points to.
class Block {
  public:
    Block(const char* op, const BlockTensors& tensors);
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;

    const SweepBlock& args() const { return args_; }
    int64_t out_channels() const { return args_.proj_out.columns; }

  private:
    std::vector<SweepLayer> layers_;
    SweepBlock args_{};
};

// The device of a tensor, as schedules of CUDA kernels see it.
CudaDevice cuda_device(const Tensor& data);

// The tensor in memory of the host. For a tensor on a CUDA device the host waits for the stream.
Tensor on_host(const Tensor& tensor);

// The kernels of the selected level, and a team of torch's own threads, for a Sweeper.
const SweepKernels& sweep_kernels();
void run_on_torch_threads(int64_t members, const TeamWork& work);
int64_t torch_threads();

}  // namespace starflow
