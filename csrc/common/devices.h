// One entry for both devices: the dispatcher's keys, and the kernel of the device that the data is on.
#pragma once
#include "common/check.h"
#include "cuda/launch.h"

namespace starflow {

// Launch on a CUDA device, or call on_cpu(). `name` is the argument that `data` is.
template <class Args, class OnCpu>
void run_on_device(const char* op, const char* name, const Tensor& data, const Args& args,
                   int (*cuda_launcher)(const Args&, void*), const OnCpu& on_cpu) {
    if (!data.is_cuda()) return on_cpu();
    cuda::check_build(op, name, data);
    cuda::launch(op, data, args, cuda_launcher);
}

// Blocks of rows for sums over all rows. A GPU wants several for each of its 100 to 150 multiprocessors.
inline RowBlocks blocks_on(const Tensor& data, int64_t rows) {
    return data.is_cuda() ? blocks_of(rows, 8, 1024) : blocks_of(rows);
}

}  // namespace starflow

// The same entry serves both devices: STARFLOW_IMPLEMENT(m) { m.impl(...); }
#define STARFLOW_IMPLEMENT(m)                                          \
    static void implement(torch::stable::detail::StableLibrary& m);    \
    STABLE_TORCH_LIBRARY_IMPL(starflow_ext, CPU, m) { implement(m); }  \
    STABLE_TORCH_LIBRARY_IMPL(starflow_ext, CUDA, m) { implement(m); } \
    static void implement(torch::stable::detail::StableLibrary& m)
