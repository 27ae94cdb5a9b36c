// jacobi_solve on CUDA: turns of guess, sweep, update and acceptance, repeated on the device; the rule is in
// jacobi_rule.h, the sweep in jacobi_sweep_cuda.h, how turns are repeated in cuda/repeat.h.
//
// Every sample has the same number of rows in each sweep. Near its end, where fewer tokens are left than a window
// holds, its window begins before the frontier: what is computed of final tokens once more is not written anywhere, and
// since a row's bits do not depend on the others, the rest is what a shorter window gives. A sample that is done keeps
// such a window too, until all are.
//
// Launches of a turn: 3, and those of a sweep. Bytes beside a sweep's: the window's x, z, raw and kept once.
#pragma once
#include "cuda/repeat.h"
#include "ops/jacobi_solve/jacobi_rule.h"
#include "ops/jacobi_sweep/jacobi_sweep_cuda.h"

namespace starflow {

using cuda::Repeat;

// Numbers of a report, in front of those of tokens that each sweep made final.
enum SolveReport : int32_t { report_more, report_sweeps, report_bad_sample, report_bad_token, report_accepted };

struct SolveCudaArgs {
    SweepBlock block;  // of halves * batch cache rows
    CudaDevice device;
    int64_t most_rows;  // of a sweep that run together; sweep_most_rows
    SolveOptions options;
    SolveState state;     // on the device; at least one token is not final
    int64_t most_sweeps;  // at least 1
    Repeat repeat;
    int64_t* report;  // (report_accepted + most_sweeps,)
    void* workspace;  // null: nothing is launched, and workspace_bytes gets its size
    int64_t* workspace_bytes;
};

STARFLOW_DECLARE_CUDA(SolveCudaArgs, jacobi_solve_cuda)

// Rows of a sample in every sweep.
static constexpr int64_t window_rows(const SolveOptions& options, const SolveState& state) {
    const int64_t left = state.tokens - options.first;
    return options.window < left ? options.window : left;
}

// Bytes from the start of the workspace.
struct SolveLayout {
    int64_t slots;   // int64 (halves * batch,)
    int64_t keep;    // int64 (halves * batch,)
    int64_t raw;     // float32 (halves, batch, window rows, out channels)
    int64_t change;  // float32 (batch, window rows)
    int64_t sweep;
    int64_t bytes;
};

static inline SolveLayout solve_layout(const SolveCudaArgs& args) {
    constexpr int64_t line = 256;
    const int64_t rows = window_rows(args.options, args.state);
    const int64_t windows = halves_of(args.options.guidance) * args.state.batch;
    SolveLayout layout{};
    const auto take = [&](int64_t bytes) {
        const int64_t offset = layout.bytes;
        layout.bytes += linear_round_up(bytes, line);
        return offset;
    };
    layout.slots = take(windows * 8);
    layout.keep = take(windows * 8);
    layout.raw = take(windows * rows * args.block.proj_out.columns * 4);
    layout.change = take(args.state.batch * rows * 4);
    layout.sweep = take(sweep_workspace(args.block, args.device, args.most_rows, rows));
    return layout;
}

}  // namespace starflow
