// csrc/ops/linear/linear_schedule.h for test_linear_schedule.py: lines of rows, out_channels, in_channels,
// multiprocessors and bytes of input; each answered by the schedule, the workspace, whether the order of the tiles has
// each of them once, and the bounds of its parts.
#include "ops/linear/linear_schedule.h"
#include "ops/linear/linear_choice.h"

#include <iostream>
#include <vector>

// Known while compiling: no CUDA and no memory in it.
static_assert(starflow::linear_schedule(16, 3072, 3072, 132).parts == 3);

// Which kernel runs, for every device, build and request.
constexpr bool choices_are_right() {
    using enum starflow::LinearChoice;
    using enum starflow::LinearRequest;
    bool right = true;
    for (const bool sm90 : {false, true}) {
        for (const bool sm100 : {false, true}) {
            for (const auto request : {by_device, portable, own}) {
                const auto choice = [&](int major, int64_t channels) {
                    return starflow::linear_choice(major, channels, request, sm90, sm100);
                };
                for (const int major : {8, 11, 12}) right = right && choice(major, 64) == other_device;
                right = right && choice(9, 0) == (sm90 ? no_channels : not_built);
                right = right && choice(10, 0) == (sm100 ? no_channels : not_built);
                right = right && choice(9, 64) == (!sm90 ? not_built : request == portable ? asked : wgmma);
                right = right && choice(10, 64) == (!sm100                ? not_built
                                                    : request == portable ? asked
                                                    : request == own      ? tcgen05
                                                                          : unproven);
            }
        }
    }
    return right;
}
static_assert(choices_are_right());

namespace {

bool each_tile_once(const starflow::LinearSchedule& s) {
    std::vector<bool> seen(s.tiles());
    for (uint32_t n = 0; n < seen.size(); ++n) {
        const starflow::LinearTile tile = starflow::linear_tile(s, n);
        if (tile.row < 0 || tile.row >= s.row_tiles || tile.column < 0 || tile.column >= s.column_tiles) return false;
        seen[int64_t{tile.row} * s.column_tiles + tile.column] = true;
    }
    for (const bool one : seen) {
        if (!one) return false;
    }
    return true;
}

}  // namespace

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
                  << s.depth_tiles << ' ' << s.parts << ' ' << s.group << ' ' << s.split << ' ' << s.blocks() << ' '
                  << w.counters << ' ' << w.partials << ' ' << w.bytes << ' ' << each_tile_once(s);
        for (int64_t part = 0; part <= s.parts; ++part) std::cout << ' ' << s.part_begin(part);
        std::cout << '\n';
    }
}
