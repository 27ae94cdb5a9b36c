// jacobi_solve: the sliding-window solver of one block, x[n] = shift(x[< n]) + scale(x[< n]) * z[n] for all n.
//
// A sample's window begins at its frontier, the first token that is not final. A sweep evaluates the windows of all
// samples at once; a token becomes final when all tokens before it in the window moved, since their own last
// evaluation, by less than the tolerance in units of their scale:
//   max over channels |x_new - x_old| / scale < tolerance
// The first token of a window reads final tokens alone, so each sweep makes at least one final. Tokens that enter a
// window are guessed: shift and scale of the token one frame earlier, their own noise.
//
// A sample that is done takes no more rows, and no sample's result depends on the others.
#pragma once
#include <cstdint>
#include <vector>

#include "ops/jacobi_solve/jacobi_rule.h"
#include "ops/jacobi_sweep/sweeper.h"
#include "ops/jacobi_update/jacobi_update.h"

namespace starflow {

// What the sweeps did: tokens made final by each, rows that were evaluated, and the first token that is not finite.
struct SolveCount {
    std::vector<int64_t> accepted;
    int64_t rows = 0;
    int64_t bad_sample = -1;
    int64_t bad_token = -1;
};

// Sweeps until every token is final, `most_sweeps` times, or up to a token that is not finite. No torch: tests run it
// under sanitizers with threads of their own.
SolveCount solve(const SweepBlock& block, Sweeper& sweeper, const JacobiUpdateKernels& update,
                 const SolveOptions& options, const SolveState& state, int64_t most_sweeps);

}  // namespace starflow
