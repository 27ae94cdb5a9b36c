// An op's kernels by ISA level. Kernel files include this through their op's header: no torch, no std.
#pragma once

// In namespace starflow, one constant named `op` in each level's namespace, which the kernel file defines; and their
// table, in rising order:
// STARFLOW_DECLARE_VARIANTS(Kernels, op), STARFLOW_VARIANTS(op): <op>_cpu.cpp, up to AVX-512.
// STARFLOW_DECLARE_DOT_VARIANTS(Kernels, op), STARFLOW_DOT_VARIANTS(op): <op>_dot.cpp, whose time goes into products of
// matrices, with the levels that have instructions for them too.
#define STARFLOW_DECLARE_VARIANT(Kernels, op, level) \
    namespace level {                                \
    extern const Kernels op;                         \
    }
#if STARFLOW_X86
#define STARFLOW_DECLARE_VARIANTS(Kernels, op)    \
    STARFLOW_DECLARE_VARIANT(Kernels, op, scalar) \
    STARFLOW_DECLARE_VARIANT(Kernels, op, avx2)   \
    STARFLOW_DECLARE_VARIANT(Kernels, op, avx512)
#define STARFLOW_DECLARE_DOT_VARIANTS(Kernels, op)     \
    STARFLOW_DECLARE_VARIANTS(Kernels, op)             \
    STARFLOW_DECLARE_VARIANT(Kernels, op, avx512_bf16) \
    STARFLOW_DECLARE_VARIANT(Kernels, op, amx)
#define STARFLOW_VARIANTS(op) {&starflow::scalar::op, &starflow::avx2::op, &starflow::avx512::op, nullptr, nullptr}
#define STARFLOW_DOT_VARIANTS(op) \
    {&starflow::scalar::op, &starflow::avx2::op, &starflow::avx512::op, &starflow::avx512_bf16::op, &starflow::amx::op}
#else
#define STARFLOW_DECLARE_VARIANTS(Kernels, op) STARFLOW_DECLARE_VARIANT(Kernels, op, scalar)
#define STARFLOW_DECLARE_DOT_VARIANTS(Kernels, op) STARFLOW_DECLARE_VARIANTS(Kernels, op)
#define STARFLOW_VARIANTS(op) {&starflow::scalar::op, nullptr, nullptr, nullptr, nullptr}
#define STARFLOW_DOT_VARIANTS(op) STARFLOW_VARIANTS(op)
#endif
