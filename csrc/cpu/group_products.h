// Products of a group of rows with a panel (matmul.h), called by pointer: most of the time of compiling a kernel that
// multiplies goes into these products, and every kernel of a level uses the same ones. For kernel files.
#pragma once
#include <cstdint>

namespace starflow {

// Lines to fetch while rows are multiplied.
struct Ahead {
    const char* next;  // or null
    int64_t lines;     // lines to fetch for each cell
};

// (cells of the rows, panel, bytes to the second term of the weights, what to fetch, cells, sums, accumulate)
using MultiplyGroup = void (*)(const void*, const char*, int64_t, const Ahead&, int64_t, float*, bool);

// The entry [rows - 1] multiplies `rows` rows, up to the most rows whose sums stay in the registers of a level.
inline constexpr int most_group_rows = 14;
using MultiplyGroups = MultiplyGroup[most_group_rows];

// Products of float32 inputs with weights of each storage, widened to float32 (widened_groups_cpu.cpp).
struct WidenedGroups {
    MultiplyGroups float32, float16, int8, bfloat16, two_bfloat16;
};
// Products of inputs and weights that are both bfloat16 (pair_groups_bf16.cpp).
struct PairGroups {
    MultiplyGroups pairs;
};

namespace scalar {
extern const WidenedGroups widened_groups;
}
#if STARFLOW_X86
namespace avx2 {
extern const WidenedGroups widened_groups;
}
namespace avx512 {
extern const WidenedGroups widened_groups;
}
// Levels whose additional instructions serve other products take these tables from the level below.
namespace avx512_bf16 {
using avx512::widened_groups;
extern const PairGroups pair_groups;
}  // namespace avx512_bf16
namespace amx {
using avx512::widened_groups;
using avx512_bf16::pair_groups;
}  // namespace amx
#endif
// The programs of tests/native, which have one level.
namespace tested {
extern const WidenedGroups widened_groups;
extern const PairGroups pair_groups;
}  // namespace tested

}  // namespace starflow
