// Who touched which byte of a block's shared memory, and whether barriers order it; how well a warp's addresses fit
// banks and sectors.
#pragma once
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <tuple>
#include <vector>

namespace emulation {

inline constexpr int warp_lanes = 32;

// Happens-before by clocks of warps. A warp's clock moves on when it synchronises; within one tick of it only accesses
// of the same lane are ordered. Of another warp, everything before the clock that was last learned of it is.
class Races {
  public:
    void reset(size_t bytes, int warps) {
        warps_ = warps;
        writes_.assign(bytes, {});
        reads_.assign(bytes * warps, {});
        now_.assign(warps, 1);
        seen_.assign(static_cast<size_t>(warps) * warps, 0);
    }

    // All earlier accesses of these warps before all later ones of them.
    void synchronise(const std::vector<int>& warps) {
        for (const int w : warps) ++now_[w];
        for (int v = 0; v < warps_; ++v) {
            uint32_t newest = 0;
            for (const int w : warps) newest = newest > seen(w, v) ? newest : seen(w, v);
            for (const int w : warps) seen(w, v) = newest;
        }
        for (const int w : warps) {
            for (const int v : warps) seen(w, v) = now_[v];
        }
    }

    // The word for what is wrong, or null.
    const char* read(size_t begin, size_t bytes, int warp, int lane) {
        for (size_t i = begin; i < begin + bytes; ++i) {
            if (const char* wrong = after_write(i, warp, lane)) return wrong;
            Read& read = reads_[i * warps_ + warp];
            if (read.clock == now_[warp] && read.lane != lane) {
                read.lane = several;
            } else {
                read = {now_[warp], static_cast<uint8_t>(lane)};
            }
        }
        return nullptr;
    }

    const char* write(size_t begin, size_t bytes, int warp, int lane, bool in_flight) {
        for (size_t i = begin; i < begin + bytes; ++i) {
            if (const char* wrong = after_write(i, warp, lane)) return wrong;
            for (int v = 0; v < warps_; ++v) {
                const Read& read = reads_[i * warps_ + v];
                if (read.clock != 0 && !ordered(read.clock, v, read.lane, warp, lane)) {
                    return "may still be read by another thread";
                }
            }
            writes_[i] = {now_[warp], static_cast<uint8_t>(warp), static_cast<uint8_t>(lane), in_flight};
        }
        return nullptr;
    }

    // A write in flight has arrived, and is now one of this thread.
    void arrive(size_t begin, size_t bytes, int warp, int lane) {
        for (size_t i = begin; i < begin + bytes; ++i) {
            writes_[i] = {now_[warp], static_cast<uint8_t>(warp), static_cast<uint8_t>(lane), false};
        }
    }

  private:
    struct Write {
        uint32_t clock = 0;  // 0: never written
        uint8_t warp = 0;
        uint8_t lane = 0;
        bool in_flight = false;
    };
    struct Read {
        uint32_t clock = 0;  // 0: never read
        uint8_t lane = 0;
    };
    static constexpr uint8_t several = warp_lanes;

    uint32_t& seen(int warp, int of) { return seen_[static_cast<size_t>(warp) * warps_ + of]; }

    bool ordered(uint32_t clock, int by_warp, int by_lane, int warp, int lane) {
        return by_warp == warp ? by_lane == lane || clock < now_[warp] : clock < seen(warp, by_warp);
    }

    const char* after_write(size_t i, int warp, int lane) {
        const Write& write = writes_[i];
        if (write.in_flight) return "an asynchronous copy still writes";
        if (write.clock != 0 && !ordered(write.clock, write.warp, write.lane, warp, lane)) {
            return "another thread wrote without a barrier since";
        }
        return nullptr;
    }

    int warps_ = 0;
    std::vector<Write> writes_;
    std::vector<Read> reads_;  // of each byte, each warp's last
    std::vector<uint32_t> now_;
    std::vector<uint32_t> seen_;
};

// One instruction of a warp: the addresses of those lanes that take part.
struct Request {
    uint32_t lanes = 0;  // a bit each
    int bytes = 0;       // of a lane
    uint64_t address[warp_lanes] = {};
};

// Passes over the 32 banks of 4 bytes beyond those that the bytes of the request need: lanes go in groups of 128 bytes,
// equal words are one.
inline int extra_passes(const Request& request) {
    const int together = request.bytes <= 4 ? 32 : 128 / request.bytes;
    int extra = 0;
    for (int first = 0; first < warp_lanes; first += together) {
        uint64_t words[warp_lanes][warp_lanes];
        int used[warp_lanes] = {};
        int worst = 1;
        for (int i = first; i < first + together; ++i) {
            if ((request.lanes >> i & 1) == 0) continue;
            for (uint64_t word = request.address[i] / 4; word <= (request.address[i] + request.bytes - 1) / 4; ++word) {
                const int bank = static_cast<int>(word % warp_lanes);
                bool known = false;
                for (int k = 0; k < used[bank]; ++k) known = known || words[bank][k] == word;
                if (!known) words[bank][used[bank]++] = word;
                worst = worst > used[bank] ? worst : used[bank];
            }
        }
        extra += worst - 1;
    }
    return extra;
}

// Distinct sectors of 32 bytes.
inline int sectors(const Request& request) {
    uint64_t found[warp_lanes * 2];
    int count = 0;
    for (int i = 0; i < warp_lanes; ++i) {
        if ((request.lanes >> i & 1) == 0) continue;
        for (uint64_t sector = request.address[i] / 32; sector <= (request.address[i] + request.bytes - 1) / 32;
             ++sector) {
            bool known = false;
            for (int k = 0; k < count; ++k) known = known || found[k] == sector;
            if (!known) found[count++] = sector;
        }
    }
    return count;
}

// Accesses of single lanes put together to requests: the n-th of each lane at one place of the code are one.
template <class Done>
class Requests {
  public:
    // `target` is the tensor, or the number that stands for shared memory; `live` the lanes that have not left.
    void add(const void* site, int warp, int lane, int target, bool write, uint64_t address, int bytes, uint32_t live,
             const Done& done) {
        Stream& stream = streams_[{site, warp, target, write}];
        // Where lanes have left the kernel, others may have finished what this one comes to now.
        if (stream.times[lane] < stream.finished) stream.times[lane] = stream.finished;
        const size_t place = stream.times[lane]++ - stream.finished;
        if (place >= stream.open.size()) stream.open.resize(place + 1);
        Request& request = stream.open[place];
        request.bytes = bytes;
        request.address[lane] = address;
        request.lanes |= 1U << lane;
        while (!stream.open.empty() && (live & ~stream.open.front().lanes) == 0) {
            done(target, write, stream.open.front());
            stream.open.pop_front();
            ++stream.finished;
        }
    }

    // What lanes that went another way have left open.
    void finish(const Done& done) {
        for (const auto& [key, stream] : streams_) {
            for (const Request& request : stream.open) {
                if (request.lanes != 0) done(std::get<2>(key), std::get<3>(key), request);
            }
        }
        streams_.clear();
    }

  private:
    struct Stream {
        size_t times[warp_lanes] = {};
        size_t finished = 0;
        std::deque<Request> open;
    };
    std::map<std::tuple<const void*, int, int, bool>, Stream> streams_;
};

}  // namespace emulation
