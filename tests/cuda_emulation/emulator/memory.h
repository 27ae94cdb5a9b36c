// Who touched which byte of a block's shared memory, and whether barriers order it; how well a warp's addresses fit
// banks and sectors.
#pragma once
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

namespace emulation {

inline constexpr int warp_lanes = 32;

// What a thread knows, or what a barrier passes on: of each agent, up to which of its clocks everything comes before.
struct Knowledge {
    std::vector<uint32_t> seen;
    std::vector<uint32_t> fenced;  // the same of writes that the asynchronous proxy sees
    // The same of what was done with tensor memory: a thread's between tcgen05's fences, a product's that was
    // committed. Empty where nobody uses it.
    std::vector<uint32_t> tensor;
    // Of each count in global memory, how many signals of other blocks were heard. Empty where nobody looks.
    std::vector<uint32_t> heard;

    void join(const Knowledge& other) {
        hear(other.heard);
        if (tensor.size() < other.tensor.size()) tensor.resize(other.tensor.size());
        for (size_t a = 0; a < other.tensor.size(); ++a) {
            tensor[a] = tensor[a] > other.tensor[a] ? tensor[a] : other.tensor[a];
        }
        for (size_t a = 0; a < seen.size(); ++a) {
            seen[a] = seen[a] > other.seen[a] ? seen[a] : other.seen[a];
            fenced[a] = fenced[a] > other.fenced[a] ? fenced[a] : other.fenced[a];
        }
    }
    void hear(const std::vector<uint32_t>& signals) {
        if (heard.size() < signals.size()) heard.resize(signals.size());
        for (size_t c = 0; c < signals.size(); ++c) heard[c] = heard[c] > signals[c] ? heard[c] : signals[c];
    }
    void meet(const Knowledge& other) {
        for (size_t a = 0; a < seen.size(); ++a) {
            seen[a] = seen[a] < other.seen[a] ? seen[a] : other.seen[a];
            fenced[a] = fenced[a] < other.fenced[a] ? fenced[a] : other.fenced[a];
        }
    }
};

// Happens-before by clocks of agents: the threads; for each mbarrier the copies that it counts; for each warp its
// products of wgmma or tcgen05, which read shared memory by themselves until they are waited for. A clock moves on when
// its agent tells others what it has done. Copies of tensors and wgmma are of the asynchronous proxy: they see what a
// thread wrote once there is a proxy fence between.
class Races {
  public:
    static constexpr int most_mbarriers = 64;
    static constexpr size_t chunk = 16;  // what the asynchronous proxy reads and writes

    void reset(size_t bytes, int warps) {
        warps_ = warps;
        threads_ = warps * warp_lanes;
        writes_.assign(bytes, {});
        reads_.assign(bytes * warps, {});
        product_reads_.assign((bytes / chunk + 1) * warps, 0);
        any_products_ = false;
        const size_t agents = threads_ + most_mbarriers + warps;
        now_.assign(agents, 1);
        known_.assign(threads_, nothing());
        tensor_known_.assign(threads_, {});
    }

    Knowledge nothing() const {
        const std::vector<uint32_t> never(threads_ + most_mbarriers + warps_, 0);
        return {never, never, {}, {}};
    }

    // All earlier accesses of these threads before all later ones of them.
    void synchronise(const std::vector<int>& threads) {
        if (threads.empty()) return;
        Knowledge all = known_[threads[0]];
        uint32_t latest = 0;
        for (const int t : threads) {
            all.join(known_[t]);
            latest = latest > now_[t] ? latest : now_[t];
        }
        for (const int t : threads) {
            all.seen[t] = latest;
            now_[t] = latest + 1;
        }
        for (const int t : threads) known_[t] = all;
    }

    // What this thread knows and has done, to a barrier; and from one.
    void publish(int thread, Knowledge& to) {
        known_[thread].seen[thread] = now_[thread];
        to.join(known_[thread]);
        ++now_[thread];
    }
    void learn(int thread, const Knowledge& from) { known_[thread].join(from); }

    // What this thread knows and has done, up to here.
    std::vector<uint32_t> done(int thread) {
        known_[thread].seen[thread] = now_[thread]++;
        return known_[thread].seen;
    }
    uint32_t now(int thread) const { return now_[thread]; }
    void hear(int thread, const std::vector<uint32_t>& signals) { known_[thread].hear(signals); }
    bool has_heard(int thread, uint32_t count, uint32_t number) const {
        const std::vector<uint32_t>& heard = known_[thread].heard;
        return count < heard.size() && heard[count] >= number;
    }

    // The asynchronous proxy sees what this thread knows to be written.
    void fence(int thread) {
        Knowledge& known = known_[thread];
        known.seen[thread] = now_[thread];
        for (size_t a = 0; a < known.seen.size(); ++a) {
            if (known.fenced[a] < known.seen[a]) known.fenced[a] = known.seen[a];
        }
        ++now_[thread];
    }

    // The word for what is wrong, or null.
    const char* read(size_t begin, size_t bytes, int warp, int lane) {
        const int thread = warp * warp_lanes + lane;
        for (size_t i = begin; i < begin + bytes; ++i) {
            if (const char* wrong = after_write(i, thread)) return wrong;
            Read& read = reads_[i * warps_ + warp];
            if (read.lane == lane || comes_before(read, warp, thread)) {
                read = {now_[thread], static_cast<uint8_t>(lane)};
            } else {
                read = {read.clock > now_[thread] ? read.clock : now_[thread], several};
            }
        }
        return nullptr;
    }

    const char* write(size_t begin, size_t bytes, int warp, int lane, bool in_flight) {
        const int thread = warp * warp_lanes + lane;
        for (size_t i = begin; i < begin + bytes; ++i) {
            if (const char* wrong = after_write(i, thread)) return wrong;
            if (const char* wrong = after_reads(i, thread)) return wrong;
            writes_[i] = {now_[thread], static_cast<uint16_t>(thread), in_flight};
        }
        return nullptr;
    }

    // A write in flight has arrived, and is now one of this thread.
    void arrive(size_t begin, size_t bytes, int warp, int lane) {
        const int thread = warp * warp_lanes + lane;
        for (size_t i = begin; i < begin + bytes; ++i) {
            writes_[i] = {now_[thread], static_cast<uint16_t>(thread), false};
        }
    }

    // Whether what lies there was written before all that this thread does now.
    const char* written(size_t begin, size_t bytes, int thread) {
        for (size_t i = begin; i < begin + bytes; ++i) {
            if (const char* wrong = after_write(i, thread)) return wrong;
        }
        return nullptr;
    }

    // A thread begins a copy of a tensor to whole chunks.
    const char* begin_copy(size_t begin, size_t bytes, int thread) {
        for (size_t i = begin; i < begin + bytes; ++i) {
            if (const char* wrong = after_write_by_proxy(i, known_[thread])) return wrong;
            if (const char* wrong = after_reads(i, thread)) return wrong;
            writes_[i] = {now_[thread], static_cast<uint16_t>(thread), true};
        }
        return nullptr;
    }
    // It has arrived: known to those who wait for the mbarrier.
    void end_copy(size_t begin, size_t bytes, int mbarrier) {
        const int agent = threads_ + mbarrier;
        for (size_t i = begin; i < begin + bytes; ++i) writes_[i] = {now_[agent], static_cast<uint16_t>(agent), false};
    }
    void tell_copies(int mbarrier, Knowledge& to) {
        const int agent = threads_ + mbarrier;
        to.seen[agent] = to.fenced[agent] = now_[agent]++;
    }

    // What every lane of a warp knows.
    Knowledge common(int warp) {
        Knowledge all = known_[warp * warp_lanes];
        for (int l = 1; l < warp_lanes; ++l) all.meet(known_[warp * warp_lanes + l]);
        return all;
    }
    // A warp's wgmma begins to read a chunk.
    const char* read_by_product(size_t begin, int warp, const Knowledge& known) {
        for (size_t i = begin; i < begin + chunk; ++i) {
            if (const char* wrong = after_write_by_proxy(i, known)) return wrong;
        }
        product_reads_[begin / chunk * warps_ + warp] = now_[product_agent(warp)];
        any_products_ = true;
        return nullptr;
    }
    // The products that the warp has begun up to here have a number, which is told to its threads when they have
    // waited.
    uint32_t number_of_products(int warp) { return now_[product_agent(warp)]++; }
    void end_products(int warp, uint32_t number) {
        for (int l = 0; l < warp_lanes; ++l) {
            uint32_t& seen = known_[warp * warp_lanes + l].seen[product_agent(warp)];
            seen = seen > number ? seen : number;
        }
    }

    // tcgen05. Products are begun by one thread; what was begun up to a commit has a number, which the mbarrier tells
    // when they have ended: with what the thread knew, as they have read it by then.
    const Knowledge& known(int thread) const { return known_[thread]; }
    void publish_products(int warp, Knowledge& to) {
        const size_t agent = product_agent(warp);
        to.tensor.resize(now_.size());
        to.seen[agent] = to.tensor[agent] = now_[agent]++;
    }
    void fence_tensor_before(int thread) {
        Knowledge& known = known_[thread];
        known.tensor.resize(now_.size());
        known.tensor[thread] = now_[thread]++;
    }
    void fence_tensor_after(int thread) { tensor_known_[thread] = known_[thread].tensor; }

    // Of a word of tensor memory: the last product that wrote it (0: none has), and the reads since.
    struct TensorWord {
        uint32_t written = 0;
        uint8_t by_warp = 0;
        std::vector<std::pair<int, uint32_t>> read;  // by whom and when
    };
    const char* read_tensor(TensorWord& word, int thread) {
        if (word.written > tensor_seen(thread, product_agent(word.by_warp))) {
            return "a product writes that was not waited for, with a fence behind";
        }
        word.read.emplace_back(thread, now_[thread]);
        return nullptr;
    }
    // Products of one warp follow each other as they were begun.
    const char* write_tensor(TensorWord& word, int thread, int warp) {
        if (word.by_warp != warp && word.written > tensor_seen(thread, product_agent(word.by_warp))) {
            return "a product of another warp writes";
        }
        for (const auto& [reader, clock] : word.read) {
            if (clock > tensor_seen(thread, reader))
                return "may still be read: no fence, barrier and fence lie between";
        }
        word = {now_[product_agent(warp)], static_cast<uint8_t>(warp), {}};
        return nullptr;
    }

  private:
    struct Write {
        uint32_t clock = 0;  // 0: never written
        uint16_t agent = 0;
        bool in_flight = false;
    };
    struct Read {
        uint32_t clock = 0;  // 0: never read
        uint8_t lane = 0;
    };
    static constexpr uint8_t several = warp_lanes;

    bool comes_before(const Read& read, int warp, int thread) const {
        if (read.clock == 0) return true;
        const int first = warp * warp_lanes + (read.lane == several ? 0 : read.lane);
        const int end = read.lane == several ? first + warp_lanes : first + 1;
        for (int t = first; t < end; ++t) {
            if (t != thread && read.clock > known_[thread].seen[t]) return false;
        }
        return true;
    }

    int product_agent(int warp) const { return threads_ + most_mbarriers + warp; }
    uint32_t tensor_seen(int thread, int agent) const {
        const std::vector<uint32_t>& seen = tensor_known_[thread];
        return static_cast<size_t>(agent) < seen.size() ? seen[agent] : 0;
    }

    const char* after_write(size_t i, int thread) const {
        const Write& write = writes_[i];
        if (write.clock == 0) return nullptr;
        if (write.in_flight) return "an asynchronous copy still writes";
        if (write.agent == thread || write.clock <= known_[thread].seen[write.agent]) return nullptr;
        return "another thread wrote without a barrier since";
    }

    const char* after_write_by_proxy(size_t i, const Knowledge& known) const {
        const Write& write = writes_[i];
        if (write.in_flight) return "an asynchronous copy still writes";
        if (write.clock == 0) return nullptr;
        if (write.agent >= threads_) {
            return write.clock <= known.seen[write.agent] ? nullptr : "a copy wrote that was not waited for";
        }
        return write.clock <= known.fenced[write.agent] ? nullptr
                                                        : "a thread wrote without a proxy fence and a barrier since";
    }

    const char* after_reads(size_t i, int thread) const {
        for (int v = 0; v < warps_; ++v) {
            if (!comes_before(reads_[i * warps_ + v], v, thread)) return "may still be read by another thread";
            if (!any_products_) continue;
            const uint32_t product = product_reads_[i / chunk * warps_ + v];
            if (product > known_[thread].seen[product_agent(v)]) return "may still be read by a product";
        }
        return nullptr;
    }

    int warps_ = 0;
    int threads_ = 0;
    bool any_products_ = false;
    std::vector<Write> writes_;
    std::vector<Read> reads_;              // of each byte, each warp's last
    std::vector<uint32_t> product_reads_;  // of each chunk, each warp's last by wgmma
    std::vector<uint32_t> now_;
    std::vector<Knowledge> known_;
    std::vector<std::vector<uint32_t>> tensor_known_;  // by each thread's last fence
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

// What the blocks of a launch write to global memory, and what they tell each other of it by counts there: who has
// written a word tells of it by an atomic on a count, behind a fence, or another thread that knows of the write does.
class Blocks {
  public:
    bool watched = false;

    void begin_launch() {
        writes_.clear();
        counts_.clear();
        signals_.clear();
        block_ = 0;
    }
    void begin_block(int threads) {
        ++block_;
        fresh_.clear();
        released_.assign(threads, {});
        hearing_.assign(threads, {});
    }
    // The word for what is wrong, or null.
    const char* read(uint64_t address, size_t bytes, int thread, const Races& races) const {
        for (uint64_t word = address / 4; word <= (address + bytes - 1) / 4; ++word) {
            const auto found = writes_.find(word);
            if (found == writes_.end() || found->second.block == block_) continue;
            const Write& write = found->second;
            if (write.number == 0) return "another block wrote without telling of it";
            if (!races.has_heard(thread, write.count, write.number))
                return "another block wrote, of which it was not told";
        }
        return nullptr;
    }
    const char* write(uint64_t address, size_t bytes, int thread, const Races& races) {
        const char* wrong = read(address, bytes, thread, races);
        for (uint64_t word = address / 4; word <= (address + bytes - 1) / 4; ++word) {
            writes_[word] = {block_, thread, races.now(thread), 0, 0};
            fresh_.push_back(word);
        }
        return wrong;
    }
    // What a thread knows before a fence it tells by atomics behind it; what it has heard by atomics before, it knows.
    void fence(int thread, Races& races) {
        released_[thread] = races.done(thread);
        races.hear(thread, hearing_[thread]);
    }
    void signal(const void* count, int thread) {
        const uint32_t id = id_of(count);
        const uint32_t number = ++signals_[id];
        const std::vector<uint32_t>& known = released_[thread];
        std::erase_if(fresh_, [&](uint64_t word) {
            Write& write = writes_[word];
            if (known.empty() || write.clock > known[write.thread]) return false;
            write.count = id;
            write.number = number;
            return true;
        });
        hear(hearing_[thread], id);
    }
    void acquire(const void* count, int thread, Races& races) {
        std::vector<uint32_t> heard;
        hear(heard, id_of(count));
        races.hear(thread, heard);
    }

  private:
    struct Write {
        uint32_t block;
        int thread;
        uint32_t clock;
        uint32_t count;
        uint32_t number;  // of the signal on the count that told of it; 0: none has
    };

    uint32_t id_of(const void* count) {
        const auto [found, is_new] = counts_.try_emplace(count, static_cast<uint32_t>(signals_.size()));
        if (is_new) signals_.push_back(0);
        return found->second;
    }
    void hear(std::vector<uint32_t>& heard, uint32_t id) const {
        if (heard.size() <= id) heard.resize(id + 1);
        heard[id] = signals_[id];
    }

    uint32_t block_ = 0;
    std::unordered_map<uint64_t, Write> writes_;  // by words of 4 bytes
    std::vector<uint64_t> fresh_;                 // of this block, of which nobody was told
    std::unordered_map<const void*, uint32_t> counts_;
    std::vector<uint32_t> signals_;                // of each count
    std::vector<std::vector<uint32_t>> released_;  // by each thread's last fence
    std::vector<std::vector<uint32_t>> hearing_;   // by atomics of each thread
};

}  // namespace emulation
