#include "ops/jacobi_common/sweeper.h"

#include <sched.h>

#include <algorithm>

#include "cpu/scratch.h"

namespace starflow {
namespace {

// Rows that run together at most: their activations stay in the second-level cache.
constexpr int64_t rows_at_once = 256;

}  // namespace

Sweeper::Sweeper(const SweepBlock& block, const SweepKernels& kernels, const Team& team, int64_t rows)
    : block_(block),
      kernels_(kernels),
      team_(team),
      most_rows_(std::max<int64_t>(1, std::min(rows, rows_at_once))),
      window_of_row_(most_rows_) {
    const int64_t shared_bytes = round_up(kernels.shared_bytes(block, most_rows_), 64);
    shared_ =
        static_cast<char*>(cpu::scratch<Sweeper>(shared_bytes + kernels.own_bytes(block, most_rows_) * team.members));
    own_ = shared_ + shared_bytes;
}

void Sweeper::sweep(const std::vector<SweepWindow>& windows, const float* previous, const float* embedded, float* raw) {
    std::vector<SweepWindow> part;
    int64_t rows = 0;
    const auto flush = [&] {
        if (rows == 0) return;
        run(part, rows, previous, embedded, raw);
        previous = previous == nullptr ? nullptr : previous + rows * block_.channels;
        embedded = embedded == nullptr ? nullptr : embedded + rows * block_.width;
        raw = raw == nullptr ? nullptr : raw + rows * block_.proj_out.columns;
        part.clear();
        rows = 0;
    };
    for (SweepWindow window : windows) {
        // What a window's later rows read of its earlier ones is in the caches: its parts may run one after the other.
        while (window.count > 0) {
            SweepWindow piece = window;
            piece.count = std::min(window.count, most_rows_ - rows);
            piece.first_row = rows;
            part.push_back(piece);
            rows += piece.count;
            window.slot += piece.count;
            window.count -= piece.count;
            if (rows == most_rows_) flush();
        }
    }
    flush();
}

void Sweeper::run(const std::vector<SweepWindow>& windows, int64_t rows, const float* previous, const float* embedded,
                  float* raw) {
    for (size_t w = 0; w < windows.size(); ++w) {
        std::fill_n(window_of_row_.begin() + windows[w].first_row, windows[w].count, static_cast<int32_t>(w));
    }
    const SweepArgs args{block_,
                         windows.data(),
                         static_cast<int64_t>(windows.size()),
                         window_of_row_.data(),
                         rows,
                         previous,
                         embedded,
                         raw,
                         shared_,
                         own_};
    Barrier barrier{.members = team_.members, .yield = [] { sched_yield(); }};
    team_.run(team_.members, [&](int64_t begin, int64_t end) { kernels_.sweep(args, TeamSlice{barrier, begin, end}); });
}

}  // namespace starflow
