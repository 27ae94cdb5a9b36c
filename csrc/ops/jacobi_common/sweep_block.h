// A block as jacobi_sweep and jacobi_solve take it: lists of tensors and numbers, read into the kernel's structs.
#pragma once
#include <string>
#include <vector>

#include "common/tensor.h"
#include "ops/jacobi_common/sweeper.h"
#include "ops/linear/linear_plan.h"

namespace starflow {

// The tensors of a block, in the order in which starflow_ext/starflow_ext/jacobi_sweep.py lists them (an empty one is absent):
//   start token (channels,) · position (grid slots, width) · condition (cache rows, width) · cosines and sines of
//   queries, then of keys (slots, head_dim / 2) · temperature (cache rows,) · weight of the final norm (width,) ·
//   input, output projection: panels, column scale, bias ·
//   each layer: qkv, proj, up, gate, down as panels, column scale, bias; weight and bias of the attention's norm;
//   weights of query norm, key norm, attention's post-norm; weight and bias of the MLP's norm; weight of the MLP's
//   post-norm
// and the numbers: channels, width, heads, kv_heads, head_dim, hidden, out channels, text tokens, slots, kind of the
// norms (0 none, 1 layer, 2 rms).
struct BlockTensors {
    Tensor keys;    // (layers, cache rows, kv_heads, elements of a head): panels; on CUDA slots times head_dim
    Tensor values;  // like keys
    std::vector<Tensor> weights;
    std::vector<int64_t> sizes;
    std::string activations;
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

// The tensor in memory of the host. Of one on a CUDA device that takes the stream to come here.
Tensor on_host(const Tensor& tensor);

// The kernels of the selected level, and a team of torch's own threads, for a Sweeper.
const SweepKernels& sweep_kernels();
void run_on_torch_threads(int64_t members, const TeamWork& work);
int64_t torch_threads();

}  // namespace starflow
