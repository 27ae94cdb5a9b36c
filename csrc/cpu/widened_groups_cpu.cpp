// The table widened_groups of group_products.h. Compiled once for each ISA up to AVX-512.
#include "cpu/matmul.h"

namespace starflow::STARFLOW_ISA {
namespace {

constexpr WidenedGroups all() {
    WidenedGroups groups{};
    fill_groups<WidenedProduct<float>>(groups.float32);
    fill_groups<WidenedProduct<Float16>>(groups.float16);
    fill_groups<WidenedProduct<int8_t>>(groups.int8);
    fill_groups<WidenedPairsProduct<1>>(groups.bfloat16);
    fill_groups<WidenedPairsProduct<2>>(groups.two_bfloat16);
    return groups;
}

}  // namespace

constinit const WidenedGroups widened_groups = all();

}  // namespace starflow::STARFLOW_ISA
