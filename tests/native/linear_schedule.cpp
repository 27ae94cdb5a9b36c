// csrc/ops/linear/linear_schedule.h for test_linear_schedule.py: lines of rows, out_channels, in_channels,
// multiprocessors and bytes of input; each answered by the schedule, the workspace and the bounds of its parts.
#include "ops/linear/linear_schedule.h"

#include <iostream>

// Known while compiling: no CUDA and no memory in it.
static_assert(starflow::linear_schedule(16, 3072, 3072, 132).parts == 3);

int main() {
    int64_t rows = 0;
    int64_t out_channels = 0;
    int64_t in_channels = 0;
    int64_t multiprocessors = 0;
    int64_t input_bytes = 0;
    while (std::cin >> rows >> out_channels >> in_channels >> multiprocessors >> input_bytes) {
        const auto s = starflow::linear_schedule(rows, out_channels, in_channels, multiprocessors);
        const auto w = starflow::linear_workspace(s, input_bytes);
        std::cout << s.tile_rows << ' ' << s.tile_columns << ' ' << s.row_tiles << ' ' << s.column_tiles << ' '
                  << s.depth_tiles << ' ' << s.parts << ' ' << s.split << ' ' << s.blocks() << ' ' << w.counters << ' '
                  << w.partials << ' ' << w.bytes;
        for (int64_t part = 0; part <= s.parts; ++part) std::cout << ' ' << s.part_begin(part);
        std::cout << '\n';
    }
}
