// A tensor as rows, as kernels see it: no torch, no std.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace starflow {

// A tensor (batch, tokens, channels) whose channels lie side by side; strides in elements. Constness is by use.
struct Rows {
    void* data;
    int64_t batch_stride;
    int64_t token_stride;
};

// Where token t of sample b starts. Device code uses it too.
template <class T>
STARFLOW_HOST_DEVICE static inline T* row_of(const Rows& rows, int64_t b, int64_t t) {
    return static_cast<T*>(rows.data) + b * rows.batch_stride + t * rows.token_stride;
}

}  // namespace starflow
