// The table pair_groups of group_products.h. Compiled for AVX-512 with products of bfloat16.
#include "cpu/matmul.h"

namespace starflow::STARFLOW_ISA {
namespace {

constexpr PairGroups all() {
    PairGroups groups{};
#if defined(__AVX512BF16__)
    fill_groups<PairsProduct>(groups.pairs);
#endif
    return groups;
}

}  // namespace

constinit const PairGroups pair_groups = all();

}  // namespace starflow::STARFLOW_ISA
