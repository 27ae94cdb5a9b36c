// Run the kernels of an affine op over its rows, on the device of its data.
#pragma once
#include <cstdint>

#include "cpu/isa.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "cuda/launch.h"
#include "ops/affine_common/affine_check.h"

namespace starflow {

template <class Args>
void run_rows(const char* op, const char* name, const Tensor& data, const AffineShape& shape, const Args& args,
              void (*kernel)(const Args&, int64_t, int64_t), int (*cuda_launcher)(const Args&, void*)) {
    if (data.is_cuda()) {
        cuda::check_build(op, name, data);
        cuda::launch(op, data, args, cuda_launcher);
        return;
    }
    cpu::parallel_rows(shape.batch * shape.tokens, shape.channels,
                       [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace starflow

// The same entry serves both devices: STARFLOW_IMPLEMENT(m) { m.impl(...); }
#define STARFLOW_IMPLEMENT(m)                                          \
    static void implement(torch::stable::detail::StableLibrary& m);    \
    STABLE_TORCH_LIBRARY_IMPL(starflow_ext, CPU, m) { implement(m); }  \
    STABLE_TORCH_LIBRARY_IMPL(starflow_ext, CUDA, m) { implement(m); } \
    static void implement(torch::stable::detail::StableLibrary& m)
