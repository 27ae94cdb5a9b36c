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

// Blocks of rows for sums over all rows: first within each block, then over the blocks. They depend on the number of
// rows alone, so that no sum depends on the number of threads.
struct RowBlocks {
    int64_t rows;
    int64_t per_block;
    int64_t count;

    STARFLOW_HOST_DEVICE int64_t begin(int64_t block) const { return block * per_block; }
    STARFLOW_HOST_DEVICE int64_t end(int64_t block) const {
        return (block + 1) * per_block < rows ? (block + 1) * per_block : rows;
    }
};

static inline RowBlocks blocks_of(int64_t rows, int64_t least_rows = 32, int64_t most_blocks = 256) {
    const int64_t needed = (rows + most_blocks - 1) / most_blocks;
    const int64_t per_block = needed > least_rows ? needed : least_rows;
    return {rows, per_block, (rows + per_block - 1) / per_block};
}

}  // namespace starflow
