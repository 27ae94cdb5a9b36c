// What linear's CUDA kernels read from memory, by a model: arguments of rows, out_channels, in_channels,
// multiprocessors and bytes of the second-level cache; each answered by the bytes of x and of the weight that are read,
// and by their sizes.
//
// As many blocks as the device has places walk along the depth in step, in the order of linear_tile; the cache forgets
// what was used least recently, a step of a tile at a time. Results pass through it too.
#include <algorithm>
#include <iostream>
#include <list>
#include <sstream>
#include <unordered_map>

#include "ops/linear/linear_schedule.h"

namespace {

using namespace starflow;

class Cache {
  public:
    explicit Cache(int64_t bytes) : room_(bytes) {}

    // Bytes that this use reads from memory.
    int64_t use(int64_t key, int64_t bytes) {
        if (const auto found = places_.find(key); found != places_.end()) {
            order_.splice(order_.begin(), order_, found->second);
            return 0;
        }
        order_.push_front({key, bytes});
        places_[key] = order_.begin();
        room_ -= bytes;
        while (room_ < 0) {
            room_ += order_.back().bytes;
            places_.erase(order_.back().key);
            order_.pop_back();
        }
        return bytes;
    }

  private:
    struct Entry {
        int64_t key;
        int64_t bytes;
    };
    int64_t room_;
    std::list<Entry> order_;
    std::unordered_map<int64_t, std::list<Entry>::iterator> places_;
};

int64_t bytes_read(const LinearSchedule& s, int64_t rows, int64_t multiprocessors, int64_t cache_bytes) {
    // Of wide tiles one block fits on a multiprocessor of sm_90a.
    const int64_t places = multiprocessors * (s.tile_columns == 64 ? 2 : 1);
    const auto tiles = static_cast<uint32_t>(s.tiles());
    Cache cache(cache_bytes);
    int64_t read = 0;
    for (int64_t first = 0; first < s.blocks(); first += places) {
        const int64_t end = std::min<int64_t>(first + places, s.blocks());
        for (int32_t step = 0; step < s.depth_tiles; ++step) {
            for (int64_t n = first; n < end; ++n) {
                const auto part = static_cast<int32_t>(n / tiles);
                const int32_t at = (s.split ? s.part_begin(part) : 0) + step;
                if (at >= (s.split ? s.part_begin(part + 1) : s.depth_tiles)) continue;
                const LinearTile tile = linear_tile(s, static_cast<uint32_t>(n) % tiles);
                const int64_t high = std::min<int64_t>(s.tile_rows, rows - int64_t{tile.row} * s.tile_rows);
                const auto key = [&](int64_t what, int64_t index) { return (index * s.depth_tiles + at) * 3 + what; };
                read += cache.use(key(0, tile.row), high * linear_depth * 2);
                read += cache.use(key(1, tile.column), s.tile_columns * linear_depth * 2);
            }
        }
        for (int64_t n = first; n < end; ++n) cache.use(n * 3 + 2, s.tile_size() * 2);
    }
    return read;
}

}  // namespace

int main(int count, char** arguments) {
    for (int i = 1; i < count; ++i) {
        std::istringstream words(arguments[i]);
        int64_t rows = 0;
        int64_t out = 0;
        int64_t in = 0;
        int64_t multiprocessors = 0;
        int64_t cache = 0;
        words >> rows >> out >> in >> multiprocessors >> cache;
        const LinearSchedule schedule = linear_schedule(rows, out, in, multiprocessors);
        std::cout << bytes_read(schedule, rows, multiprocessors, cache) << ' ' << (rows + out) * in * 2 << '\n';
    }
}
