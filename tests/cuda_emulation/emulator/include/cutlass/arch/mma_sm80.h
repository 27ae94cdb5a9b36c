// CUTLASS's mma.sync on the emulated device: the hardware's are renamed away.
#pragma once
#include <cuda_runtime.h>
#include <cutlass/arch/mma.h>
#include <cutlass/layout/matrix.h>
#include <cutlass/numeric_types.h>

namespace cutlass {
namespace arch {
template <typename Shape, int threads, typename A, typename LayoutA, typename B, typename LayoutB, typename C,
          typename LayoutC, typename Operation>
struct MmaOfHardware;
}  // namespace arch
}  // namespace cutlass

#define Mma MmaOfHardware
#include_next <cutlass/arch/mma_sm80.h>
#undef Mma

namespace cutlass {
namespace arch {

template <class Element, emulation::Format format>
struct EmulatedMma16x8x16 {
    using Shape = gemm::GemmShape<16, 8, 16>;
    using ElementA = Element;
    using LayoutA = layout::RowMajor;
    using FragmentA = Array<Element, 8>;
    using ElementB = Element;
    using LayoutB = layout::ColumnMajor;
    using FragmentB = Array<Element, 4>;
    using ElementC = float;
    using LayoutC = layout::RowMajor;
    using FragmentC = Array<float, 4>;
    using Operator = OpMultiplyAdd;
    using ArchTag = Sm80;

    void operator()(FragmentC& d, const FragmentA& a, const FragmentB& b, const FragmentC& c) const {
        FragmentC sum = c;
        emulation::multiply_add(format, 16, reinterpret_cast<float*>(&sum), reinterpret_cast<const uint32_t*>(&a),
                                reinterpret_cast<const uint32_t*>(&b));
        d = sum;
    }
};

template <>
struct Mma<gemm::GemmShape<16, 8, 16>, 32, bfloat16_t, layout::RowMajor, bfloat16_t, layout::ColumnMajor, float,
           layout::RowMajor, OpMultiplyAdd> : EmulatedMma16x8x16<bfloat16_t, emulation::Format::bfloat16> {};
template <>
struct Mma<gemm::GemmShape<16, 8, 16>, 32, half_t, layout::RowMajor, half_t, layout::ColumnMajor, float,
           layout::RowMajor, OpMultiplyAdd> : EmulatedMma16x8x16<half_t, emulation::Format::float16> {};

}  // namespace arch
}  // namespace cutlass
