#include "cpu/isa.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if STARFLOW_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace starflow::cpu {
namespace {

struct Machine {
    std::vector<Feature> features;
    std::array<std::string, isa_count> missing;
};

#if STARFLOW_X86
struct Registers {
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
    Registers r;
    __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
    return r;
}

// Which register states the operating system saves: bits 1-2 SSE and AVX, 5-7 AVX-512, 17-18 AMX.
uint64_t saved_states(bool osxsave) {
    if (!osxsave) return 0;
    uint32_t low = 0;
    uint32_t high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<uint64_t>(high) << 32U) | low;
}

bool bit(uint32_t word, unsigned index) { return ((word >> index) & 1U) != 0; }

Machine look() {
    const Registers one = cpuid(1, 0);
    const Registers seven = cpuid(7, 0);
    const Registers seven_one = cpuid(7, 1);
    const uint64_t states = saved_states(bit(one.ecx, 27));
    const bool avx_state = (states & 0x6U) == 0x6U;
    const bool avx512_state = (states & 0xe6U) == 0xe6U;
    const bool amx_state = (states & 0x60000U) == 0x60000U;

    Machine machine;
    const auto add = [&machine](const char* name, bool cpu, bool state) {
        std::string reason;
        if (!cpu) {
            reason = "this processor has no " + std::string(name);
        } else if (!state) {
            reason = "the operating system does not save the registers of " + std::string(name);
        }
        machine.features.push_back({name, reason.empty(), reason});
        return reason;
    };
    const auto level = [&machine](Isa isa, const std::vector<std::string>& reasons) {
        for (const std::string& reason : reasons) {
            if (!reason.empty() && machine.missing[static_cast<int>(isa)].empty()) {
                machine.missing[static_cast<int>(isa)] = reason;
            }
        }
    };
    const std::string avx2 = add("avx2", bit(seven.ebx, 5), avx_state);
    const std::string fma = add("fma", bit(one.ecx, 12), avx_state);
    const std::string f16c = add("f16c", bit(one.ecx, 29), avx_state);
    level(Isa::avx2, {avx2, fma, f16c});
    std::vector<std::string> reasons{avx2,
                                     fma,
                                     f16c,
                                     add("avx512f", bit(seven.ebx, 16), avx512_state),
                                     add("avx512bw", bit(seven.ebx, 30), avx512_state),
                                     add("avx512vl", bit(seven.ebx, 31), avx512_state),
                                     add("avx512dq", bit(seven.ebx, 17), avx512_state)};
    level(Isa::avx512, reasons);
    reasons.push_back(add("avx512_bf16", bit(seven_one.eax, 5), avx512_state));
    level(Isa::avx512_bf16, reasons);
    reasons.push_back(add("amx_tile", bit(seven.edx, 24), amx_state));
    reasons.push_back(add("amx_bf16", bit(seven.edx, 22), amx_state));
    level(Isa::amx, reasons);
    add("amx_int8", bit(seven.edx, 25), amx_state);
    return machine;
}

// Linux saves the tiles (8 KB) only for processes that asked for them; containers may refuse.
std::string ask_for_amx() {
    constexpr long request_permission = 0x1023;  // ARCH_REQ_XCOMP_PERM
    constexpr long tile_data = 18;               // XFEATURE_XTILEDATA
    if (syscall(SYS_arch_prctl, request_permission, tile_data) == 0) return "";
    return "the operating system refuses this process the registers of amx_tile";
}
#else
Machine look() {
    Machine machine;
    machine.missing.fill("this build is not for x86-64");
    machine.missing[static_cast<int>(Isa::scalar)].clear();
    return machine;
}

std::string ask_for_amx() { return ""; }
#endif

const Machine& machine() {
    static const Machine found = look();
    return found;
}

Isa best() {
    int level = isa_count - 1;
    while (!why_not(static_cast<Isa>(level)).empty()) --level;
    return static_cast<Isa>(level);
}

// "scalar, avx2, ... or amx"
std::string all_names() {
    std::string names;
    for (int level = 0; level < isa_count; ++level) {
        if (level > 0) names += level == isa_count - 1 ? " or " : ", ";
        names += isa_names[level];
    }
    return names;
}

Isa parse(const std::string& name, const char* source) {
    for (int level = 0; level < isa_count; ++level) {
        if (name != isa_names[level]) continue;
        const std::string& reason = why_not(static_cast<Isa>(level));
        if (!reason.empty()) {
            throw std::runtime_error(std::string(source) + " is \"" + name +
                                     "\", expected a level of this machine: " + reason);
        }
        return static_cast<Isa>(level);
    }
    throw std::runtime_error(std::string(source) + " is \"" + name + "\", expected " + all_names());
}

Isa from_environment() {
    const char* name = std::getenv("STARFLOW_ISA");
    return name == nullptr || *name == '\0' ? best() : parse(name, "STARFLOW_ISA");
}

constexpr int unset = -1;
std::atomic<int> override_level{unset};

}  // namespace

const std::string& why_not(Isa isa) {
    const std::string& missing = machine().missing[static_cast<int>(isa)];
    if (isa != Isa::amx || !missing.empty()) return missing;
    static const std::string refused = ask_for_amx();
    return refused;
}

const std::vector<Feature>& features() { return machine().features; }

Isa selected() {
    const int level = override_level.load(std::memory_order_relaxed);
    if (level != unset) return static_cast<Isa>(level);
    static const Isa chosen = from_environment();
    return chosen;
}

void set_override(const std::string& name) {
    override_level.store(name.empty() ? unset : static_cast<int>(parse(name, "the ISA override")),
                         std::memory_order_relaxed);
}

}  // namespace starflow::cpu
