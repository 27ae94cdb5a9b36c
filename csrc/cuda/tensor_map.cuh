// Tensor maps, by which TMA brings boxes of rows from anywhere in memory to tiles of shared memory.
#pragma once
#include <cuda.h>

#include <cstdint>
#include <cutlass/cuda_host_adapter.hpp>

#include "common/dtype.h"

namespace starflow::cuda {

// A box of a map: `box_rows` rows of 128 bytes, whose 8 chunks of 16 bytes are xored with the row's number modulo 8.
inline constexpr int box_channels = 64;

// The map of (batch, heads, rows, channels) of 16 bits, coordinates in the order channel, row, head, sample; beyond the
// tensor zeros are brought. Address and strides (in elements) are multiples of 16 bytes; where a dimension has one
// entry, its stride does not matter. Returns an error code of the CUDA runtime, whose numbers are the driver's too.
inline int map_rows(CUtensorMap& map, Dtype dtype, const void* data, const int64_t (&sizes)[4],
                    const int64_t (&strides)[3], int box_rows) {
    cuuint64_t extents[4];
    cuuint64_t bytes[3];
    for (int d = 0; d < 4; ++d) extents[d] = static_cast<cuuint64_t>(sizes[3 - d]);
    for (int d = 0; d < 3; ++d) {
        // The coordinate of a dimension of one entry is always 0: any stride that the driver takes will do.
        bytes[d] = sizes[2 - d] > 1 ? static_cast<cuuint64_t>(strides[2 - d]) * 2 : 16;
    }
    if (sizes[2] == 1) bytes[0] = (extents[0] * 2 + 15) / 16 * 16;
    const cuuint32_t box[] = {box_channels, static_cast<cuuint32_t>(box_rows), 1, 1};
    const cuuint32_t steps[] = {1, 1, 1, 1};
    const CUresult code = CUTLASS_CUDA_DRIVER_WRAPPER_CALL(cuTensorMapEncodeTiled)(
        &map, dtype == Dtype::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
        const_cast<void*>(data), extents, bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return static_cast<int>(code);
}

}  // namespace starflow::cuda
