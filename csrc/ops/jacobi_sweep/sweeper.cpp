#include "ops/jacobi_sweep/sweeper.h"

#include <sched.h>

#include <algorithm>

#include "cpu/scratch.h"

namespace starflow {
namespace {

// Rows that run together at most: their activations stay in the second-level cache.
constexpr int64_t rows_at_once = 256;

// Members with rows of their own do not pack each other's rows, read few lines that another core wrote, and wait for
// each other once a layer instead of four times. On two cores of a Xeon with tiles this saves 63 us a layer of 64 rows
// and width 256, in which a core, at 28 GB/s, reads this many bytes for each element of the residual stream.
constexpr int64_t bytes_saved = 107;
constexpr int64_t least_part_rows = 16;  // of a tile

template <class T>
T* moved(T* rows, int64_t by) {
    return rows == nullptr ? nullptr : rows + by;
}

int64_t bytes_of(const SweepLayer& layer) {
    int64_t bytes = 0;
    for (const Panels* weights : {&layer.qkv, &layer.proj, &layer.gate, &layer.up, &layer.down}) {
        if (weights->data != nullptr) bytes += weights->count() * weights->panel_bytes();
    }
    return bytes;
}

}  // namespace

Sweeper::Sweeper(const SweepBlock& block, const SweepKernels& kernels, const Team& team, int64_t rows)
    : block_(block),
      kernels_(kernels),
      team_(team),
      most_rows_(std::max<int64_t>(1, block.whole_frames ? rows : std::min(rows, rows_at_once))),
      layer_bytes_(block.layer_count == 0 ? 0 : bytes_of(block.layers[0])),
      window_of_row_(most_rows_) {
    const int64_t together = memory_bytes(most_rows_, team.members);
    const int64_t apart = memory_bytes((most_rows_ + team.members - 1) / team.members, 1) * team.members;
    memory_ = static_cast<char*>(cpu::scratch<Sweeper>(std::max(together, apart)));
}

int64_t Sweeper::shared_bytes(int64_t rows) const { return round_up(kernels_.shared_bytes(block_, rows), 64); }

int64_t Sweeper::memory_bytes(int64_t rows, int64_t members) const {
    return shared_bytes(rows) + kernels_.own_bytes(block_, rows) * members;
}

int64_t Sweeper::slots_read(const SweepWindow& window) const {
    const int64_t before = window.slot + window.count;
    if (block_.mask_frame_tokens == 0) return before;
    const int64_t frames = (block_.mask_frames + 1) * block_.mask_frame_tokens;
    return std::min(before, block_.text_tokens + frames);
}

int64_t Sweeper::parts_of(const std::vector<SweepWindow>& windows, int64_t rows) const {
    const int64_t members = team_.members;
    if (rows < members * least_part_rows) return 1;
    // What a member reads that it would leave to others if they shared all rows.
    int64_t bytes = layer_bytes_;
    for (int64_t part = 1; part < members; ++part) {
        const int64_t cut = rows * part / members;
        for (const SweepWindow& window : windows) {
            if (window.first_row >= cut || window.first_row + window.count <= cut) continue;
            bytes += 2 * block_.kv_heads * cache_head_bytes(block_.cache, slots_read(window), block_.head_dim);
        }
    }
    return bytes - bytes / members < rows * block_.width * bytes_saved ? members : 1;
}

void Sweeper::sweep(const std::vector<SweepWindow>& windows, const float* previous, const float* embedded, float* raw) {
    std::vector<SweepWindow> part;
    int64_t rows = 0;
    const auto flush = [&] {
        if (rows == 0) return;
        run(part, rows, previous, embedded, raw);
        previous = moved(previous, rows * block_.channels);
        embedded = moved(embedded, rows * block_.width);
        raw = moved(raw, rows * block_.proj_out.columns);
        part.clear();
        rows = 0;
    };
    for (SweepWindow window : windows) {
        // What a window's later rows read of its earlier ones is in the caches: its parts may run one after the other.
        // Rows of whole frames read later ones too: of these `rows` is a window, which runs as a whole.
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
    const int64_t parts = parts_of(windows, rows);
    const int64_t part_bytes = memory_bytes((rows + parts - 1) / parts, parts == 1 ? team_.members : 1);
    cut_.clear();
    parts_.clear();
    cut_.reserve(windows.size() + parts);
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = rows * part / parts;
        const int64_t last = rows * (part + 1) / parts;
        const size_t first_window = cut_.size();
        for (const SweepWindow& window : windows) {
            const int64_t begin = std::max(first, window.first_row);
            const int64_t end = std::min(last, window.first_row + window.count);
            if (begin >= end) continue;
            std::fill(window_of_row_.begin() + begin, window_of_row_.begin() + end,
                      static_cast<int32_t>(cut_.size() - first_window));
            cut_.push_back(
                {window.cache_row, window.slot + begin - window.first_row, end - begin, window.keep, begin - first});
        }
        char* shared = memory_ + part * part_bytes;
        parts_.push_back({block_, cut_.data() + first_window, static_cast<int64_t>(cut_.size() - first_window),
                          window_of_row_.data() + first, last - first, moved(previous, first * block_.channels),
                          moved(embedded, first * block_.width), moved(raw, first * block_.proj_out.columns), shared,
                          shared + shared_bytes(last - first)});
    }
    Barrier barrier{.members = team_.members, .yield = [] { sched_yield(); }};
    team_.run(team_.members, [&](int64_t begin, int64_t end) {
        kernels_.sweep(parts_.data(), parts, TeamSlice{barrier, begin, end});
    });
}

}  // namespace starflow
