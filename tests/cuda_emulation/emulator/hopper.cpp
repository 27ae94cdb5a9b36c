// mbarriers, TMA and wgmma of the emulated device; a part of runtime.cpp.
#include <cuda.h>

#include <bit>

#include "runtime.cpp"

namespace emulation {
namespace {

// Of a swizzle of 32 << (bits - 1) bytes: chunks of 16 bytes, xored with the address seven bits and more above.
uint32_t swizzled(uint32_t address, int bits) { return address ^ ((address >> 3) & (((1U << bits) - 1) << 4)); }

int mbarrier_at(const void* pointer, const char* what) {
    const int64_t place = shared_place(static_cast<const char*>(pointer));
    auto& all = device.hopper.mbarriers;
    for (size_t i = 0; i < all.size(); ++i) {
        if (all[i].place != place) continue;
        if (device.races.written(place, sizeof(uint64_t), device.current->number) != nullptr) {
            fail("%s on an mbarrier that another thread set up without a barrier since", what);
        }
        return static_cast<int>(i);
    }
    fail("%s at %p, where no mbarrier was set up", what, pointer);
}

void end_phase_if_complete(Mbarrier& mbarrier) {
    if (mbarrier.pending != 0 || mbarrier.bytes != 0) return;
    ++mbarrier.phase;
    mbarrier.pending = mbarrier.arrivals;
    mbarrier.completed = mbarrier.arriving;
    mbarrier.arriving = device.races.nothing();
    for (const int number : mbarrier.waiting) wake(number);
    mbarrier.waiting.clear();
}

void land_tensor_copy(size_t which) {
    auto& copies = device.hopper.copies;
    const TensorCopy copy = std::move(copies[which]);
    copies.erase(copies.begin() + static_cast<std::ptrdiff_t>(which));
    Mbarrier& mbarrier = device.hopper.mbarriers[copy.mbarrier];
    for (const TensorCopy::Chunk& chunk : copy.chunks) {
        std::memcpy(chunk.to, chunk.from, chunk.valid);
        std::memset(chunk.to + chunk.valid, 0, Races::chunk - chunk.valid);
        device.races.end_copy(shared_place(chunk.to), Races::chunk, copy.mbarrier);
    }
    device.races.tell_copies(copy.mbarrier, mbarrier.arriving);
    mbarrier.bytes -= static_cast<int64_t>(copy.chunks.size() * Races::chunk);
    end_phase_if_complete(mbarrier);
}

std::string left_in_tensor_memory();  // of blackwell.cpp

std::string left_in_flight() {
    if (device.hopper.left_late) return "the block ends while TMA still writes to its shared memory";
    if (std::string wrong = left_in_tensor_memory(); !wrong.empty()) return wrong;
    for (size_t w = 0; w < device.hopper.products.size(); ++w) {
        const ProductQueue& queue = device.hopper.products[w];
        if (!queue.open.empty() || !queue.committed.empty()) {
            return "warp " + std::to_string(w) + " ends with a wgmma in flight";
        }
        if (queue.made != device.hopper.descriptors[w / warps_of_group].size()) {
            return "warp " + std::to_string(w) + " made fewer wgmma than others of its group";
        }
    }
    return "";
}

// What of a 16-bit operand lies where: 8 elements of the depth or of the rows are a chunk of 16 bytes.
struct Operand {
    uint32_t start;
    uint32_t leading;
    uint32_t stride;
    int swizzle;
    bool across;

    Operand(uint64_t descriptor, bool across, int swizzle) : swizzle(swizzle), across(across) {
        const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
        start = field(0);
        leading = field(16);
        stride = field(32);
    }
    static Operand of_wgmma(uint64_t descriptor, bool across) {
        const auto type = static_cast<int>(descriptor >> 62);
        return {descriptor, across, type == 0 ? 0 : 4 - type};
    }
    // That of tcgen05 has other numbers of swizzles, and a version.
    static Operand of_tcgen05(uint64_t descriptor, bool across) {
        const auto type = static_cast<int>(descriptor >> 61);
        return {descriptor, across, type == 0 ? 0 : 4 - type / 2};
    }
    const char* at(int row, int depth) const {
        const uint32_t line = 16U << swizzle;  // bytes of a swizzle's row
        uint32_t offset = 0;
        if (!across && swizzle > 0) {
            offset = row % 8 * line + row / 8 * stride + depth * 2;
        } else if (!across) {
            offset = row % 8 * 16 + row / 8 * stride + depth / 8 * leading + depth % 8 * 2;
        } else if (swizzle > 0) {
            const int wide = static_cast<int>(line) / 2;
            offset = row % wide * 2 + row / wide * leading + depth % 8 * line + depth / 8 * stride;
        } else {
            offset = row % 8 * 2 + row / 8 * stride + depth % 8 * 16 + depth / 8 * leading;
        }
        return device.arena + swizzled(start + offset, swizzle);
    }
    uint32_t word(int row, int depth) const {
        uint16_t bits;
        std::memcpy(&bits, at(row, depth), 2);
        return bits;
    }
    // Each chunk once, in the eights that shared memory gives at a time.
    void begin_to_read(int rows, int warp, const Knowledge& known) const {
        for (int row = 0; row < rows; row += 8) {
            for (int depth = 0; depth < product_depth; depth += 8) {
                Request request{0xff, 16, {}};
                for (int i = 0; i < 8; ++i) {
                    const char* chunk = across ? at(row, depth + i) : at(row + i, depth);
                    const int64_t place = chunk - device.arena;
                    if (place < 0 || place + Races::chunk > device.shared_bytes) {
                        fail("a product reads at %ld of %zu bytes of shared memory", place, device.shared_bytes);
                    }
                    request.address[i] = reinterpret_cast<uint64_t>(chunk);
                    if (const char* wrong = device.races.read_by_product(shared_place(chunk), warp, known)) {
                        fail("race: a product reads shared memory at %ld, which %s", place, wrong);
                    }
                }
                device.counts.bank_conflicts += extra_passes(request);
            }
        }
    }
};

void run_product(PendingProduct& product, int warp, std::array<std::vector<float>, warp_lanes>& results) {
    const GroupProduct& what = product.what;
    constexpr int rows = product_rows / warps_of_group;
    const int first = warp % warps_of_group * rows;
    const Operand left = Operand::of_wgmma(what.left, what.left_across);
    const Operand right = Operand::of_wgmma(what.right, what.right_across);
    double a[rows][product_depth];
    for (int l = 0; l < warp_lanes && what.left_in_registers; ++l) {
        for (int i = 0; i < 4; ++i) {
            if (*product.left_places[l][i] != product.left[l][i]) {
                device.error = "registers of a wgmma changed while it was in flight";
            }
        }
        for (int i = 0; i < 8; ++i) {
            a[l / 4 + 8 * (i / 2 % 2)][2 * (l % 4) + i % 2 + 8 * (i / 4)] =
                half_of(product.left[l][i / 2], i % 2, what.format);
        }
    }
    for (int row = 0; row < rows && !what.left_in_registers; ++row) {
        for (int k = 0; k < product_depth; ++k) a[row][k] = half_of(left.word(first + row, k), 0, what.format);
    }
    std::vector<std::array<double, product_depth>> b(what.columns);
    for (int column = 0; column < what.columns; ++column) {
        for (int k = 0; k < product_depth; ++k) b[column][k] = half_of(right.word(column, k), 0, what.format);
    }
    for (int l = 0; l < warp_lanes; ++l) {
        results[l].resize(what.columns / 2);
        for (int i = 0; i < what.columns / 2; ++i) {
            const auto& of_row = a[l / 4 + 8 * (i / 2 % 2)];
            const auto& of_column = b[i / 4 * 8 + 2 * (l % 4) + i % 2];
            double sum = what.accumulate ? product.saved[l][i] : 0.0;
            for (int k = 0; k < product_depth; ++k) sum += of_row[k] * of_column[k];
            results[l][i] = static_cast<float>(sum);
        }
    }
}

// The products of the oldest group, in order. Sums go to the next product in flight that adds to them, or to registers.
void finish_oldest_group(int warp) {
    ProductQueue& queue = device.hopper.products[warp];
    std::vector<PendingProduct> group = std::move(queue.committed.front());
    queue.committed.erase(queue.committed.begin());
    for (size_t p = 0; p < group.size(); ++p) {
        std::array<std::vector<float>, warp_lanes> results;
        run_product(group[p], warp, results);
        PendingProduct* next = nullptr;
        const auto look = [&](PendingProduct& later) {
            if (next == nullptr && later.sums[0][0] == group[p].sums[0][0]) next = &later;
        };
        for (size_t later = p + 1; later < group.size(); ++later) look(group[later]);
        for (auto& later : queue.committed) {
            for (PendingProduct& product : later) look(product);
        }
        for (PendingProduct& product : queue.open) look(product);
        for (int l = 0; l < warp_lanes; ++l) {
            for (size_t i = 0; i < results[l].size(); ++i) {
                (next != nullptr ? next->saved[l][i] : *group[p].sums[l][i]) = results[l][i];
            }
        }
    }
    device.races.end_products(warp, queue.numbers.front());
    queue.numbers.erase(queue.numbers.begin());
}

}  // namespace

void init_mbarrier(const void* pointer, uint32_t arrivals) {
    const char* p = static_cast<const char*>(pointer);
    const int64_t place = shared_place(p);
    if (place < 0 || reinterpret_cast<uintptr_t>(p) % sizeof(uint64_t) != 0) {
        fail("an mbarrier at %p, which is no multiple of 8 bytes in shared memory", pointer);
    }
    if (arrivals == 0) fail("an mbarrier for no arrival");
    touch_shared(p, place, sizeof(uint64_t), true, false);
    auto& all = device.hopper.mbarriers;
    if (all.size() == Races::most_mbarriers) fail("more than %d mbarriers", Races::most_mbarriers);
    const Knowledge nothing = device.races.nothing();
    all.push_back({place, device.current->number, false, arrivals, arrivals, 0, 0, nothing, nothing, {}});
}

void fence_mbarriers() {
    for (Mbarrier& mbarrier : device.hopper.mbarriers) {
        mbarrier.fenced = mbarrier.fenced || mbarrier.by == device.current->number;
    }
}

void fence_proxy() { device.races.fence(device.current->number); }

void arrive_at(const void* pointer, uint32_t arrivals, uint32_t expected_bytes) {
    Mbarrier& mbarrier = device.hopper.mbarriers[mbarrier_at(pointer, "an arrival")];
    mbarrier.bytes += expected_bytes;
    if (arrivals == 0) return;
    if (mbarrier.pending < arrivals) fail("more than %ld arrivals at an mbarrier in one phase", mbarrier.arrivals);
    device.races.publish(device.current->number, mbarrier.arriving);
    mbarrier.pending -= arrivals;
    end_phase_if_complete(mbarrier);
}

bool phase_has_ended(const void* pointer, uint32_t parity) {
    const Mbarrier& mbarrier = device.hopper.mbarriers[mbarrier_at(pointer, "a wait")];
    if ((mbarrier.phase & 1U) == parity) {
        pause();
        return false;
    }
    device.races.learn(device.current->number, mbarrier.completed);
    return true;
}

void wait_for_phase(const void* pointer, uint32_t parity) {
    if (parity > 1) fail("a wait for parity %u", parity);
    const int which = mbarrier_at(pointer, "a wait");
    while ((device.hopper.mbarriers[which].phase & 1U) == parity) {
        device.hopper.mbarriers[which].waiting.push_back(device.current->number);
        wait("a phase of an mbarrier");
    }
    device.races.learn(device.current->number, device.hopper.mbarriers[which].completed);
}

void copy_tensor(const void* map, const void* pointer, void* to, const int* coordinates, int rank) {
    TensorMap tensor;
    std::memcpy(&tensor, map, sizeof(tensor));
    if (reinterpret_cast<uintptr_t>(map) % 64 != 0 || tensor.mark != TensorMap::valid) fail("TMA without a tensor map");
    if (tensor.rank != rank) fail("TMA of rank %d by a map of rank %d", rank, tensor.rank);
    char* target = static_cast<char*>(to);
    const uint32_t first = shared_address(to);
    if (shared_place(target) < 0 || first % 128 != 0) fail("TMA to %p, no multiple of 128 in shared memory", to);
    const int which = mbarrier_at(pointer, "TMA");
    if (!device.hopper.mbarriers[which].fenced) fail("TMA on an mbarrier that was set up without a fence");
    ++device.counts.tensor_copies;
    TensorCopy copy{which, {}};
    int64_t lines = 1;
    for (int d = 1; d < rank; ++d) lines *= tensor.box[d];
    const int64_t line_bytes = int64_t{tensor.box[0]} * tensor.element_bytes;
    for (int64_t line = 0; line < lines; ++line) {
        int64_t rest = line;
        bool inside = true;
        const char* from = tensor.data;
        for (int d = 1; d < rank; ++d) {
            const int64_t place = coordinates[d] + rest % tensor.box[d];
            rest /= tensor.box[d];
            inside = inside && place >= 0 && place < tensor.sizes[d];
            from += place * static_cast<int64_t>(tensor.strides[d - 1]);
        }
        const int64_t begin = int64_t{coordinates[0]} * tensor.element_bytes;
        const int64_t row_bytes = int64_t{tensor.sizes[0]} * tensor.element_bytes;
        if (begin < 0) fail("TMA from channel %d: a part of a chunk before a row is not modelled", coordinates[0]);
        const int64_t there = inside ? std::clamp<int64_t>(row_bytes - begin, 0, line_bytes) : 0;
        if (there > 0) {
            const int found = tensor_at(from + begin, there, false);
            const auto address = reinterpret_cast<uint64_t>(from + begin);
            device.tensors[found].sectors_read += static_cast<int64_t>((address + there - 1) / 32 - address / 32 + 1);
        }
        for (int64_t at = 0; at < line_bytes; at += Races::chunk) {
            const auto offset = static_cast<uint32_t>(line * line_bytes + at);
            char* chunk = device.arena + swizzled(first + offset, tensor.swizzle);
            if (chunk + Races::chunk > device.arena + device.shared_bytes) {
                fail("TMA writes at %td of %zu bytes of shared memory", chunk - device.arena, device.shared_bytes);
            }
            const int64_t place = shared_place(chunk);
            if (const char* wrong = device.races.begin_copy(place, Races::chunk, device.current->number)) {
                fail("race: TMA writes shared memory at %ld, which %s", place, wrong);
            }
            const int64_t valid = std::clamp<int64_t>(there - at, 0, Races::chunk);
            copy.chunks.push_back({chunk, valid > 0 ? from + begin + at : chunk, static_cast<int>(valid)});
        }
    }
    device.hopper.copies.push_back(std::move(copy));
}

void fence_products() {
    int nothing = 0;
    meet(~0U, "wgmma.fence", nothing,
         [](void**, uint32_t) { device.hopper.products[warp_of(*device.current)].fenced = true; });
}

void multiply_group(const GroupProduct& product) {
    GroupProduct argument = product;
    meet(~0U, "wgmma", argument, [](void** lanes, uint32_t arrived) {
        if (~arrived != 0) fail("wgmma of lanes %08x, expected all 32", arrived);
        const int warp = warp_of(*device.current);
        ProductQueue& queue = device.hopper.products[warp];
        if (!queue.fenced) fail("wgmma without a wgmma.fence since the last wait");
        ++device.counts.group_products;
        PendingProduct pending;
        pending.what = *static_cast<GroupProduct*>(lanes[0]);
        const GroupProduct& what = pending.what;
        auto& all = device.hopper.descriptors[warp / warps_of_group];
        const std::array<uint64_t, 2> mine{what.left_in_registers ? 0 : what.left, what.right};
        if (queue.made == all.size()) all.push_back(mine);
        if (all[queue.made++] != mine) fail("warps of a group come to different wgmma");
        const Knowledge known = device.races.common(warp);
        if (!what.left_in_registers)
            Operand::of_wgmma(what.left, what.left_across).begin_to_read(product_rows, warp, known);
        Operand::of_wgmma(what.right, what.right_across).begin_to_read(what.columns, warp, known);
        for (int l = 0; l < warp_lanes; ++l) {
            const GroupProduct& of_lane = *static_cast<GroupProduct*>(lanes[l]);
            if (of_lane.right != what.right || of_lane.accumulate != what.accumulate ||
                (!what.left_in_registers && of_lane.left != what.left)) {
                fail("lanes of a warp come to wgmma with different operands");
            }
            for (int i = 0; i < 4 && what.left_in_registers; ++i) {
                pending.left_places[l][i] = of_lane.left_registers[i];
                pending.left[l][i] = *of_lane.left_registers[i];
            }
            for (int i = 0; i < what.columns / 2; ++i) {
                float* sum = of_lane.sums[i];
                pending.sums[l].push_back(sum);
                pending.saved[l].push_back(*sum);
                // Until it is waited for.
                *sum = std::bit_cast<float>(0xffffffffU);
            }
        }
        queue.open.push_back(std::move(pending));
    });
}

void commit_products() {
    int nothing = 0;
    meet(~0U, "wgmma.commit_group", nothing, [](void**, uint32_t) {
        const int warp = warp_of(*device.current);
        ProductQueue& queue = device.hopper.products[warp];
        queue.committed.push_back(std::move(queue.open));
        queue.open.clear();
        queue.numbers.push_back(device.races.number_of_products(warp));
    });
}

void wait_for_products(int pending) {
    int left = pending;
    meet(~0U, "wgmma.wait_group", left, [](void** lanes, uint32_t) {
        const int warp = warp_of(*device.current);
        ProductQueue& queue = device.hopper.products[warp];
        while (static_cast<int>(queue.committed.size()) > *static_cast<int*>(lanes[0])) finish_oldest_group(warp);
        queue.fenced = false;
    });
    if (!device.error.empty()) leave();
}

}  // namespace emulation

// The driver's, with what it refuses.
extern "C" EMULATION_API CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                                         void* data, const cuuint64_t* sizes, const cuuint64_t* strides,
                                                         const cuuint32_t* box, const cuuint32_t* steps,
                                                         CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                                         CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
    const bool half = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ||
                      type == CU_TENSOR_MAP_DATA_TYPE_UINT16;
    bool taken = half && rank >= 1 && rank <= 5 && reinterpret_cast<uintptr_t>(map) % 64 == 0 &&
                 reinterpret_cast<uintptr_t>(data) % 16 == 0 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
                 swizzle <= CU_TENSOR_MAP_SWIZZLE_128B && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
    if (!taken) return CUDA_ERROR_INVALID_VALUE;
    emulation::TensorMap tensor{};
    tensor.mark = emulation::TensorMap::valid;
    tensor.rank = static_cast<uint8_t>(rank);
    tensor.element_bytes = 2;
    tensor.swizzle = static_cast<uint8_t>(swizzle);
    tensor.data = static_cast<const char*>(data);
    for (cuuint32_t d = 0; d < rank; ++d) {
        taken =
            taken && sizes[d] >= 1 && sizes[d] <= uint64_t{1} << 32 && box[d] >= 1 && box[d] <= 256 && steps[d] == 1;
        tensor.sizes[d] = static_cast<uint32_t>(sizes[d]);
        tensor.box[d] = static_cast<uint16_t>(box[d]);
        if (d == 0) continue;
        const uint64_t least = sizes[d] == 1 ? 0 : d == 1 ? sizes[0] * 2 : 1;
        taken = taken && strides[d - 1] % 16 == 0 && strides[d - 1] >= least && strides[d - 1] < uint64_t{1} << 40;
        tensor.strides[d - 1] = strides[d - 1];
    }
    const uint64_t line = uint64_t{box[0]} * 2;
    taken = taken && line % 16 == 0 && (swizzle == CU_TENSOR_MAP_SWIZZLE_NONE || line <= uint64_t{16} << swizzle);
    if (!taken) return CUDA_ERROR_INVALID_VALUE;
    std::memcpy(static_cast<void*>(map), &tensor, sizeof(tensor));
    return CUDA_SUCCESS;
}
