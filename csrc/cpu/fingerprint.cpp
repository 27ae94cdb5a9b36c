#include "cpu/fingerprint.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "cpu/parallel.h"

namespace starflow::cpu {
namespace {

constexpr int64_t lanes = 8;
constexpr int64_t line_bytes = lanes * 8;
constexpr int64_t part_bytes = int64_t{1024} * 1024;
constexpr uint64_t odd = 0x9e3779b97f4a7c15;  // 2^64 / golden ratio

uint64_t step(uint64_t state, uint64_t word) { return std::rotl((state ^ word) * odd, 31); }

struct Lanes {
    uint64_t value[lanes]{1, 2, 3, 4, 5, 6, 7, 8};

    void read(const char* line) {
        for (int64_t lane = 0; lane < lanes; ++lane) {
            uint64_t word;
            std::memcpy(&word, line + 8 * lane, 8);
            value[lane] = step(value[lane], word);
        }
    }

    // The last bytes of a block, filled up with zeros; sizes enter the result elsewhere.
    void read_tail(const char* data, int64_t bytes) {
        if (bytes == 0) return;
        char line[line_bytes]{};
        std::memcpy(line, data, bytes);
        read(line);
    }

    uint64_t joined() const {
        uint64_t state = 0;
        for (const uint64_t lane : value) state = step(state, lane);
        return state;
    }
};

uint64_t of_part(const char* data, int64_t bytes) {
    Lanes state;
    const int64_t whole = bytes / line_bytes * line_bytes;
    for (int64_t at = 0; at < whole; at += line_bytes) state.read(data + at);
    state.read_tail(data + whole, bytes - whole);
    return state.joined();
}

uint64_t of_spread_lines(const char* data, int64_t bytes, int64_t most_lines) {
    Lanes state;
    const int64_t whole = bytes / line_bytes;
    const int64_t count = std::min(whole, most_lines);
    for (int64_t line = 0; line < count; ++line) {
        const int64_t at = count == 1 ? 0 : line * (whole - 1) / (count - 1);
        state.read(data + at * line_bytes);
    }
    state.read_tail(data + whole * line_bytes, bytes - whole * line_bytes);
    return state.joined();
}

}  // namespace

uint64_t fingerprint(const MemoryBlock* blocks, int64_t count, int64_t most_lines) {
    uint64_t state = 0;
    if (most_lines > 0) {
        for (int64_t block = 0; block < count; ++block) {
            const auto* data = static_cast<const char*>(blocks[block].data);
            state = step(step(state, blocks[block].bytes), of_spread_lines(data, blocks[block].bytes, most_lines));
        }
        return state;
    }
    std::vector<MemoryBlock> parts;
    for (int64_t block = 0; block < count; ++block) {
        const auto [data, bytes] = blocks[block];
        state = step(state, bytes);
        for (int64_t at = 0; at < bytes; at += part_bytes) {
            parts.push_back({static_cast<const char*>(data) + at, std::min(part_bytes, bytes - at)});
        }
    }
    std::vector<uint64_t> found(parts.size());
    // Parts of small tensors share a thread: a grain of elements is 64 kB or more.
    const int64_t items = static_cast<int64_t>(parts.size());
    int64_t total = 0;
    for (const MemoryBlock& part : parts) total += part.bytes;
    parallel_rows(
        items, total / std::max<int64_t>(1, items) / 8,
        [&](int64_t begin, int64_t end) {
            for (int64_t part = begin; part < end; ++part) {
                found[part] = of_part(static_cast<const char*>(parts[part].data), parts[part].bytes);
            }
        },
        light_grain_elements);
    for (const uint64_t part : found) state = step(state, part);
    return state;
}

}  // namespace starflow::cpu
