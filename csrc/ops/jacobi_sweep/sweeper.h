// Sweeps of a block over any number of rows. No torch: tests run it under sanitizers with threads of their own.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "ops/jacobi_sweep/jacobi_sweep.h"

namespace starflow {

// Work of the members [begin, end) of a team, and what runs the whole team, all members at once.
using TeamWork = std::function<void(int64_t begin, int64_t end)>;
struct Team {
    int64_t members;
    void (*run)(int64_t members, const TeamWork& work);
};

// Sweeps in the calling thread's scratch memory, one Sweeper at a time; those of more rows than fit run in parts.
class Sweeper {
  public:
    // For so many rows, which may run in pieces; for whole frames, those of a window.
    Sweeper(const SweepBlock& block, const SweepKernels& kernels, const Team& team, int64_t rows);

    // Rows of the windows lie one behind the other in `previous` (rows, channels) or `embedded` (rows, width), and in
    // `raw` (rows, out channels), which may be null. A window's `first_row` is set here.
    void sweep(const std::vector<SweepWindow>& windows, const float* previous, const float* embedded, float* raw);

  private:
    void run(const std::vector<SweepWindow>& windows, int64_t rows, const float* previous, const float* embedded,
             float* raw);

    int64_t shared_bytes(int64_t rows) const;
    int64_t memory_bytes(int64_t rows, int64_t members) const;
    // The members of the team, which each take rows of their own, or 1: all rows, of which they share out the work.
    int64_t parts_of(const std::vector<SweepWindow>& windows, int64_t rows) const;
    // Slots whose keys the last row of a window sees.
    int64_t slots_read(const SweepWindow& window) const;

    const SweepBlock& block_;
    const SweepKernels& kernels_;
    Team team_;
    int64_t most_rows_;
    int64_t layer_bytes_;  // weights
    char* memory_;
    std::vector<int32_t> window_of_row_;
    std::vector<SweepWindow> cut_;
    std::vector<SweepArgs> parts_;
};

}  // namespace starflow
