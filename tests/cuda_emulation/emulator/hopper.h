// What a block has on sm_90 beside threads: mbarriers, copies of tensors (TMA) and products of warpgroups (wgmma). And
// on sm_100: tensor memory (tcgen05).
#pragma once
#include <array>
#include <cstdint>
#include <vector>

#include "memory.h"
#include "runtime.h"

namespace emulation {

inline constexpr int warps_of_group = 4;
inline constexpr int product_rows = 64;   // of a group; a warp has a quarter of them
inline constexpr int product_depth = 16;  // of 16-bit types

struct Mbarrier {
    int64_t place = 0;
    int by = 0;           // the thread that set it up
    bool fenced = false;  // and has told the asynchronous proxy
    int64_t arrivals = 0;
    int64_t pending = 0;
    int64_t bytes = 0;  // expected and not there yet
    uint32_t phase = 0;
    Knowledge arriving;   // of those who have come in this phase
    Knowledge completed;  // of those who came in the last one
    std::vector<int> waiting;
};

// What cuTensorMapEncodeTiled leaves in the 128 bytes of a map.
struct TensorMap {
    static constexpr uint32_t valid = 0x7e9507a9;
    uint32_t mark;
    uint8_t rank;
    uint8_t element_bytes;
    uint8_t swizzle;  // bits of the chunk that are xored: 0 to 3
    const char* data;
    uint32_t sizes[5];
    uint64_t strides[4];  // bytes, of the second dimension on
    uint16_t box[5];
};
static_assert(sizeof(TensorMap) <= 128);

struct TensorCopy {
    struct Chunk {
        char* to;
        const char* from;
        int valid;  // bytes; zeros follow
    };
    int mbarrier = 0;
    std::vector<Chunk> chunks;
};

// One wgmma of a warp, with what each lane brought.
struct PendingProduct {
    GroupProduct what;
    std::array<std::array<uint32_t, 4>, warp_lanes> left{};                // registers of a, as they were
    std::array<std::array<const uint32_t*, 4>, warp_lanes> left_places{};  // where they must stay
    std::array<std::vector<float*>, warp_lanes> sums;
    std::array<std::vector<float>, warp_lanes> saved;  // what stood in the sums before
};

struct ProductQueue {
    bool fenced = false;  // wgmma.fence since registers may have changed
    size_t made = 0;
    std::vector<PendingProduct> open;                    // not committed
    std::vector<std::vector<PendingProduct>> committed;  // groups in order
    std::vector<uint32_t> numbers;                       // of the groups, by Races
};

inline constexpr uint32_t tensor_lanes = 128;
inline constexpr uint32_t tensor_columns = 512;

// tcgen05.mma, or a commit of what was begun before it.
struct TensorProduct {
    uint64_t left = 0;
    uint64_t right = 0;
    uint32_t sums = 0;
    int rows = 0;
    int columns = 0;
    Format format = Format::bfloat16;
    bool accumulate = false;
    bool left_across = false;
    bool right_across = false;
    int mbarrier = -1;  // of a commit
    Knowledge told;     // by a commit
};

struct TensorLoad {
    uint32_t place = 0;
    bool of_16_lanes = false;
    std::array<std::vector<uint32_t*>, warp_lanes> to;
};

// Another block of the multiprocessor has some columns, so those of this one may begin anywhere.
struct TensorMemory {
    std::vector<uint32_t> words;  // of lanes, column by column; empty before anybody asked for columns
    std::vector<Races::TensorWord> races;
    uint32_t first = 0;
    uint32_t columns = 0;
    bool relinquished = false;
    bool left_late = false;                            // the last thread left before all products had ended
    std::vector<std::vector<TensorProduct>> products;  // of each warp, in the order in which they end
    std::vector<std::vector<TensorLoad>> loads;        // of each warp
};

struct Hopper {
    TensorMemory tensor;
    std::vector<Mbarrier> mbarriers;
    std::vector<TensorCopy> copies;
    bool left_late = false;                                         // the last thread left before a copy had arrived
    std::vector<ProductQueue> products;                             // of each warp
    std::vector<std::vector<std::array<uint64_t, 2>>> descriptors;  // of each group, by its products in order
};

}  // namespace emulation
