// What this processor can do at most, for benchmarks/machine.py, which compiles it with -march=native: prints one JSON
// line. Peaks are loops over registers, bandwidths read memory front to back; each runs on every thread at once.
//
//     ceilings THREADS                  peaks, and bandwidths of reading
//     ceilings THREADS READ WRITTEN     bytes a second of reading and writing so many bytes again and again
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <thread>
#include <vector>

namespace {

// Seconds that this thread has run: other work on the machine takes a thread's turn, which is not the processor's
// limit.
double running() {
    timespec now{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Most work a second over `rounds` tries of all threads together. work(thread) returns what it did.
template <class Work>
double most(int threads, int rounds, const Work& work) {
    double best = 0.0;
    for (int round = 0; round < rounds; ++round) {
        std::atomic<int> ready{0};
        std::vector<double> rates(threads);
        std::vector<std::thread> pool;
        for (int t = 0; t < threads; ++t) {
            pool.emplace_back([&, t] {
                ++ready;
                while (ready.load() < threads) _mm_pause();
                const double begin = running();
                const double done = work(t);
                rates[t] = done / (running() - begin);
            });
        }
        for (auto& thread : pool) thread.join();
        double rate = 0.0;
        for (const double each : rates) rate += each;
        best = rate > best ? rate : best;
    }
    return best;
}

constexpr int chains = 12;
constexpr int64_t steps = 4'000'000;
volatile float sink;

#if defined(__AVX512F__)
double fma_peak(int threads) {
    return most(threads, 5, [](int) {
        __m512 sums[chains];
        for (auto& s : sums) s = _mm512_set1_ps(1.0F);
        const __m512 a = _mm512_set1_ps(0.9999999F);
        for (int64_t i = 0; i < steps; ++i) {
            for (auto& s : sums) s = _mm512_fmadd_ps(s, a, a);
        }
        for (auto& s : sums) sink = _mm512_reduce_add_ps(s);
        return 2.0 * 16 * chains * steps;
    });
}
#else
double fma_peak(int threads) {
    return most(threads, 5, [](int) {
        __m256 sums[chains];
        for (auto& s : sums) s = _mm256_set1_ps(1.0F);
        const __m256 a = _mm256_set1_ps(0.9999999F);
        for (int64_t i = 0; i < steps; ++i) {
            for (auto& s : sums) s = _mm256_fmadd_ps(s, a, a);
        }
        for (auto& s : sums) sink = _mm256_cvtss_f32(s);
        return 2.0 * 8 * chains * steps;
    });
}
#endif

double bf16_peak([[maybe_unused]] int threads) {
#if defined(__AVX512BF16__)
    return most(threads, 5, [](int) {
        __m512 sums[chains];
        for (auto& s : sums) s = _mm512_set1_ps(1.0F);
        const auto a = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3c00));
        for (int64_t i = 0; i < steps; ++i) {
            for (auto& s : sums) s = _mm512_dpbf16_ps(s, a, a);
        }
        for (auto& s : sums) sink = _mm512_reduce_add_ps(s);
        return 4.0 * 16 * chains * steps;
    });
#else
    return 0.0;
#endif
}

// Products of tiles of bfloat16: four of sums, two of rows, two of weights, as a product of matrices has them. Zero
// where the operating system refuses the tiles.
double tile_peak([[maybe_unused]] int threads) {
#if defined(__AMX_BF16__)
    constexpr long request_permission = 0x1023;  // ARCH_REQ_XCOMP_PERM
    constexpr long tile_data = 18;               // XFEATURE_XTILEDATA
    if (syscall(SYS_arch_prctl, request_permission, tile_data) != 0) return 0.0;
    return most(threads, 5, [](int) {
        alignas(64) struct {
            uint8_t palette, start_row, reserved[14];
            uint16_t row_bytes[16];
            uint8_t rows[16];
        } config{};
        config.palette = 1;
        for (int tile = 0; tile < 8; ++tile) {
            config.row_bytes[tile] = 64;
            config.rows[tile] = 16;
        }
        // GCC's intrinsics do not say which memory they read.
        __asm__ volatile("" ::: "memory");
        _tile_loadconfig(&config);
        // Values as products have them: with zeros the same processor clocks a quarter higher.
        alignas(64) uint16_t values[4][16 * 32];
        uint32_t state = 1;
        for (auto& tile : values) {
            for (uint16_t& value : tile) {
                state = state * 1664525U + 1013904223U;
                // Sign and mantissa at random, between 1/2 and 2.
                value = static_cast<uint16_t>((state >> 16 & 0x80ffU) | 0x3f00U);
            }
        }
        __asm__ volatile("" ::: "memory");
        _tile_loadd(4, values[0], 64);
        _tile_loadd(5, values[1], 64);
        _tile_loadd(6, values[2], 64);
        _tile_loadd(7, values[3], 64);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t i = 0; i < steps; ++i) {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_release();
        return 4.0 * 2 * 16 * 16 * 32 * steps;
    });
#else
    return 0.0;
#endif
}

double read_bandwidth(int threads, int64_t bytes) {
    const int64_t floats = bytes / 4;
    auto* data = static_cast<float*>(std::aligned_alloc(1 << 21, bytes));
    for (int64_t i = 0; i < floats; ++i) data[i] = 1.0F;
    const int64_t share = floats / threads / 64 * 64;
    const int64_t passes = (int64_t{1} << 30) / bytes + 1;
    const double rate = most(threads, 7, [&](int t) {
        const float* from = data + t * share;
        __m256 sums[8];
        for (auto& s : sums) s = _mm256_setzero_ps();
        for (int64_t pass = 0; pass < passes; ++pass) {
            for (int64_t i = 0; i < share; i += 64) {
                for (int v = 0; v < 8; ++v) sums[v] = _mm256_add_ps(sums[v], _mm256_load_ps(from + i + 8 * v));
            }
        }
        for (auto& s : sums) sink = _mm256_cvtss_f32(s);
        return 4.0 * share * passes;
    });
    std::free(data);
    return rate;
}

#if defined(__AVX512F__)
using Register = __m512i;
Register load(const char* from) { return _mm512_load_si512(from); }
Register either(Register a, Register b) { return _mm512_or_si512(a, b); }
void store(char* to, Register value) { _mm512_store_si512(to, value); }
void stream(char* to, Register value) { _mm512_stream_si512(reinterpret_cast<Register*>(to), value); }
#else
using Register = __m256i;
Register load(const char* from) { return _mm256_load_si256(reinterpret_cast<const Register*>(from)); }
Register either(Register a, Register b) { return _mm256_or_si256(a, b); }
void store(char* to, Register value) { _mm256_store_si256(reinterpret_cast<Register*>(to), value); }
void stream(char* to, Register value) { _mm256_stream_si256(reinterpret_cast<Register*>(to), value); }
#endif

// Bytes a second where each thread reads its share of `read` bytes and writes that of `written`, a page of each in
// turn. Stores past the caches are faster where nothing fits, so that the better of both is the ceiling.
double traffic(int threads, int64_t read, int64_t written) {
    constexpr int64_t unit = 8 * sizeof(Register);
    const auto share_of = [&](int64_t bytes) { return (bytes / threads + unit - 1) / unit * unit; };
    const int64_t reads = share_of(read), writes = share_of(written);
    // Threads do not share a page, nor do all of them begin at the same lines of a cache.
    const int64_t room = (reads + writes + 8191) / 4096 * 4096 + 4096 + 1024;
    auto* data = static_cast<char*>(std::aligned_alloc(1 << 21, ((room * threads >> 21) + 1) << 21));
    for (int64_t i = 0; i < room * threads; ++i) data[i] = 1;
    const int64_t steps = std::max<int64_t>(1, std::max(reads, writes) / 4096);
    const int64_t passes = (int64_t{1} << 28) / (threads * (reads + writes) + 1) + 1;
    double best = 0.0;
    for (const bool past : {false, true}) {
        const double rate = most(threads, 7, [&](int t) {
            const char* from = data + t * room;
            char* to = data + t * room + (reads + 4095) / 4096 * 4096 + 512;
            Register sums[8] = {};
            for (int64_t pass = 0; pass < passes; ++pass) {
                int64_t i = 0, o = 0;
                for (int64_t step = 1; step <= steps; ++step) {
                    const int64_t until = step * (reads / unit) / steps * unit;
                    for (; i < until; i += unit) {
                        for (int v = 0; v < 8; ++v) sums[v] = either(sums[v], load(from + i + v * sizeof(Register)));
                    }
                    const int64_t end = step * (writes / unit) / steps * unit;
                    for (; o < end; o += unit) {
                        char* place = to + o;
                        for (int v = 0; v < 8; ++v) {
                            past ? stream(place + v * sizeof(Register), sums[v])
                                 : store(place + v * sizeof(Register), sums[v]);
                        }
                    }
                }
            }
            for (const auto& s : sums) sink = static_cast<float>(reinterpret_cast<const int*>(&s)[0]);
            return static_cast<double>((reads + writes) * passes);
        });
        best = std::max(best, rate);
    }
    std::free(data);
    return best;
}

}  // namespace

int main(int argc, char** argv) {
    const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
    if (argc > 3) {
        std::printf("{\"traffic\": %.4g}\n", traffic(threads, std::atoll(argv[2]), std::atoll(argv[3])));
        return 0;
    }
    std::printf(
        "{\"fma\": %.4g, \"bf16_registers\": %.4g, \"bf16_tiles\": %.4g, \"read_2MB\": %.4g, \"read_16MB\": %.4g, "
        "\"read_64MB\": %.4g, "
        "\"read_256MB\": %.4g}\n",
        fma_peak(threads), bf16_peak(threads), tile_peak(threads), read_bandwidth(threads, 2 << 20),
        read_bandwidth(threads, 16 << 20), read_bandwidth(threads, 64 << 20), read_bandwidth(threads, 256 << 20));
    return 0;
}
