// A team of threads inside one parallel region, with barriers between phases. For kernel files: no torch, no std.
#pragma once
#include <cstdint>

namespace starflow {

// Where the members of a team wait for each other. A wait spins: a barrier costs under 1 us where waking a sleeping
// thread costs 40. Waits that last (more members than cores) give the core away by `yield`.
struct Barrier {
    alignas(64) int64_t arrived = 0;
    alignas(64) int64_t generation = 0;
    int64_t members;
    void (*yield)();

    // `weight` members arrive at once: those that one thread runs.
    void wait(int64_t weight) {
        if (weight == members) return;
        const int64_t now = __atomic_load_n(&generation, __ATOMIC_RELAXED);
        if (__atomic_add_fetch(&arrived, weight, __ATOMIC_ACQ_REL) == members) {
            __atomic_store_n(&arrived, int64_t{0}, __ATOMIC_RELAXED);
            __atomic_store_n(&generation, now + 1, __ATOMIC_RELEASE);
            return;
        }
        constexpr int spins = 2000;  // some 50 us
        for (int i = 0; __atomic_load_n(&generation, __ATOMIC_ACQUIRE) == now; ++i) {
            if (i >= spins) yield();
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
    }
};

// Members [begin, end) of a team, which the calling thread runs one after the other in each phase: however the members
// fall on threads, a phase ends for all of them before the next begins, and what a member computes is the same.
struct TeamSlice {
    Barrier& barrier;
    int64_t begin;
    int64_t end;

    template <class Phase>
    void run(const Phase& phase) const {
        for (int64_t member = begin; member < end; ++member) phase(member);
        barrier.wait(end - begin);
    }
    // The part [first, last) of `items` that a member takes.
    int64_t first(int64_t member, int64_t items) const { return items * member / barrier.members; }
    int64_t last(int64_t member, int64_t items) const { return items * (member + 1) / barrier.members; }
};

}  // namespace starflow
