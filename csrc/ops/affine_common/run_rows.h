// Run the kernels of an affine op over its rows, on the device of its data.
#pragma once
#include <cstdint>

#include "common/devices.h"
#include "cpu/isa.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "ops/affine_common/affine_check.h"

namespace starflow {

template <class Args>
void run_rows(const char* op, const char* name, const Tensor& data, const AffineShape& shape, const Args& args,
              void (*kernel)(const Args&, int64_t, int64_t), int (*cuda_launcher)(const Args&, void*)) {
    run_on_device(op, name, data, args, cuda_launcher, [&] {
        cpu::parallel_rows(shape.batch * shape.tokens, shape.channels,
                           [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    });
}

}  // namespace starflow
