// An op's kernels by ISA level. Kernel files include this through their op's header: no torch, no std.
#pragma once

// STARFLOW_DECLARE_VARIANTS(Kernels, op), in namespace starflow: one constant named `op` in each level's namespace,
// which <op>_cpu.cpp defines. STARFLOW_VARIANTS(op): their table, in rising order.
#if STARFLOW_X86
#define STARFLOW_DECLARE_VARIANTS(Kernels, op) \
    namespace scalar {                         \
    extern const Kernels op;                   \
    }                                          \
    namespace avx2 {                           \
    extern const Kernels op;                   \
    }                                          \
    namespace avx512 {                         \
    extern const Kernels op;                   \
    }
#define STARFLOW_VARIANTS(op) {&starflow::scalar::op, &starflow::avx2::op, &starflow::avx512::op}
#else
#define STARFLOW_DECLARE_VARIANTS(Kernels, op) \
    namespace scalar {                         \
    extern const Kernels op;                   \
    }
#define STARFLOW_VARIANTS(op) {&starflow::scalar::op, nullptr, nullptr}
#endif
