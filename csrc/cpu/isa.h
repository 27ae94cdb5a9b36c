// What this machine can run, and which variant of an op does run: no torch.
#pragma once
#include <array>
#include <string>
#include <vector>

#include "common/api.h"

namespace starflow::cpu {

// In rising order; a variant runs on every machine that has its level.
enum class Isa : int { scalar, avx2, avx512, avx512_bf16, amx };
inline constexpr int isa_count = 5;
inline constexpr std::array<const char*, isa_count> isa_names{"scalar", "avx2", "avx512", "avx512_bf16", "amx"};
// Levels that <op>_cpu.cpp is compiled for; <op>_dot.cpp is for all.
inline constexpr int cpu_isa_count = static_cast<int>(Isa::avx512) + 1;

// A feature of this machine, used by a variant yet or not; `reason` is empty where it is present.
struct Feature {
    std::string name;
    bool present;
    std::string reason;
};

// Why a level cannot run here; empty where it can. Asking for amx asks the kernel, once, to let this process use it.
STARFLOW_API const std::string& why_not(Isa isa);

// Everything that was looked for, read off CPUID and the saved register states alone.
STARFLOW_API const std::vector<Feature>& features();

// The level that runs: the override (set here, or the environment's STARFLOW_ISA), else the highest supported one.
// Throws std::runtime_error if the override names no level or one that cannot run here.
STARFLOW_API Isa selected();

// Set the override; an empty name takes it away. Throws as selected() does.
STARFLOW_API void set_override(const std::string& name);

// One op's kernels, one entry for each level; null where this build has none.
template <class Kernels>
struct Variants {
    std::array<const Kernels*, isa_count> table;

    // The best entry at or below the selected level. The scalar one is always there.
    const Kernels& pick() const {
        int level = static_cast<int>(selected());
        while (level > 0 && table[level] == nullptr) --level;
        return *table[level];
    }
};

}  // namespace starflow::cpu
