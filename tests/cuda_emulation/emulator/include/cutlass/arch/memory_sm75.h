// CUTLASS's ldmatrix on the emulated device.
#pragma once
#include <cuda_runtime.h>
#include <cutlass/array.h>
#include <cutlass/layout/matrix.h>

#include <type_traits>

namespace cutlass {
namespace arch {

inline unsigned cutlass_get_smem_pointer(const void* pointer) { return emulation::shared_address(pointer); }

template <typename Layout, int matrices>
void ldsm(Array<unsigned, matrices>& out, const void* row) {
    emulation::load_matrices(matrices, std::is_same_v<Layout, layout::ColumnMajor>, row,
                             reinterpret_cast<uint32_t*>(&out));
}

}  // namespace arch
}  // namespace cutlass
