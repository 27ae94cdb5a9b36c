// Tensor memory and tcgen05 of the emulated device, of one block; behind hopper.cpp.

namespace emulation {
namespace {

TensorMemory& tensor_memory() { return device.hopper.tensor; }

uint32_t lane_at(uint32_t place) { return place >> 16; }
uint32_t column_at(uint32_t place) { return place & 0xffff; }
size_t word_at(uint32_t lane, uint32_t column) { return size_t{column} * tensor_lanes + lane; }

// Of a product of 64 rows each quarter of the lanes has 16, of one of 128 all lanes are rows.
uint32_t lane_of_row(const TensorProduct& product, int row) {
    const auto r = static_cast<uint32_t>(row);
    return lane_at(product.sums) + (product.rows == 64 ? r / 16 * 32 + r % 16 : r);
}

void check_allocated(const char* what, uint32_t column, uint32_t columns) {
    const TensorMemory& memory = tensor_memory();
    if (column < memory.first || column + columns > memory.first + memory.columns) {
        fail("%s columns %u to %u of tensor memory, of which the block has %u to %u", what, column, column + columns,
             memory.first, memory.first + memory.columns);
    }
}

// As the lanes of tcgen05.ld see tensor memory: the word of a register.
size_t word_of(const TensorLoad& load, int lane, int reg) {
    const auto l = static_cast<uint32_t>(lane);
    const auto r = static_cast<uint32_t>(reg);
    if (!load.of_16_lanes) return word_at(lane_at(load.place) + l, column_at(load.place) + r);
    const uint32_t row = l / 4 + r / 2 % 2 * 8;
    return word_at(lane_at(load.place) + row, column_at(load.place) + r / 4 * 8 + l % 4 * 2 + r % 2);
}

void run_product(const TensorProduct& product) {
    const Operand left = Operand::of_tcgen05(product.left, product.left_across);
    const Operand right = Operand::of_tcgen05(product.right, product.right_across);
    const auto read = [&](const Operand& operand, int rows) {
        std::vector<std::array<double, product_depth>> values(rows);
        for (int row = 0; row < rows; ++row) {
            for (int k = 0; k < product_depth; ++k) values[row][k] = half_of(operand.word(row, k), 0, product.format);
        }
        return values;
    };
    const auto a = read(left, product.rows);
    const auto b = read(right, product.columns);
    std::vector<uint32_t>& words = tensor_memory().words;
    for (int column = 0; column < product.columns; ++column) {
        for (int row = 0; row < product.rows; ++row) {
            uint32_t& word = words[word_at(lane_of_row(product, row), column_at(product.sums) + column)];
            double sum = product.accumulate ? std::bit_cast<float>(word) : 0.0F;
            for (int k = 0; k < product_depth; ++k) sum += a[row][k] * b[column][k];
            word = std::bit_cast<uint32_t>(static_cast<float>(sum));
        }
    }
}

size_t multiplying_warps() {
    size_t busy = 0;
    for (const auto& queue : tensor_memory().products) busy += queue.empty() ? 0 : 1;
    return busy;
}

void end_tensor_product(size_t which) {
    auto& queues = tensor_memory().products;
    size_t w = 0;
    for (;; ++w) {
        if (!queues[w].empty() && which-- == 0) break;
    }
    const TensorProduct product = std::move(queues[w].front());
    queues[w].erase(queues[w].begin());
    if (product.mbarrier < 0) return run_product(product);
    Mbarrier& mbarrier = device.hopper.mbarriers[product.mbarrier];
    if (mbarrier.pending == 0) {
        device.error = "a commit of tcgen05 arrives at an mbarrier that expects no more arrivals in this phase";
        return;
    }
    mbarrier.arriving.join(product.told);
    --mbarrier.pending;
    end_phase_if_complete(mbarrier);
}

std::string left_in_tensor_memory() {
    const TensorMemory& memory = tensor_memory();
    if (memory.left_late) return "the block ends while tcgen05 still multiplies, or has not told so";
    for (const auto& loads : memory.loads) {
        if (!loads.empty()) return "a warp ends before it has waited for its loads from tensor memory";
    }
    if (memory.columns > 0)
        return "the block ends with " + std::to_string(memory.columns) + " columns of tensor memory";
    if (!memory.words.empty() && !memory.relinquished) return "the block never lets others allocate tensor memory";
    return "";
}

}  // namespace

void allocate_tensor_memory(uint32_t columns, uint32_t* place) {
    struct Asked {
        uint32_t columns;
        uint32_t* place;
    } asked{columns, place};
    meet(~0U, "tcgen05.alloc", asked, [](void** lanes, uint32_t) {
        const Asked& asked = *static_cast<Asked*>(lanes[0]);
        TensorMemory& memory = tensor_memory();
        if (device.current->lets_next) {
            fail("tcgen05.alloc waits for tensor memory that the next launch, which may begin, would hold");
        }
        if (asked.columns < 32 || asked.columns > tensor_columns || (asked.columns & (asked.columns - 1)) != 0) {
            fail("tcgen05.alloc of %u columns, expected a power of two from 32 to 512", asked.columns);
        }
        if (memory.columns > 0) fail("tcgen05.alloc of a block that has tensor memory is not modelled");
        if (memory.relinquished) fail("tcgen05.alloc after the block has given up the right to it");
        const char* to = reinterpret_cast<const char*>(asked.place);
        const int64_t where = shared_place(to);
        if (where < 0 || reinterpret_cast<uintptr_t>(to) % 4 != 0) fail("tcgen05.alloc to what is no shared word");
        touch_shared(to, where, sizeof(uint32_t), true, false);
        memory.words.assign(size_t{tensor_lanes} * tensor_columns, 0xffffffffU);
        memory.races.assign(memory.words.size(), {});
        memory.columns = asked.columns;
        memory.first = static_cast<uint32_t>(draw() % ((tensor_columns - asked.columns) / 32 + 1)) * 32;
        *asked.place = memory.first;
    });
}

void free_tensor_memory(uint32_t place, uint32_t columns) {
    std::array<uint32_t, 2> given{place, columns};
    meet(~0U, "tcgen05.dealloc", given, [](void** lanes, uint32_t) {
        const auto& [place, columns] = *static_cast<std::array<uint32_t, 2>*>(lanes[0]);
        TensorMemory& memory = tensor_memory();
        if (columns == 0 || place != memory.first || columns != memory.columns) {
            fail("tcgen05.dealloc of %u columns at %x, of %u at %x", columns, place, memory.columns, memory.first);
        }
        for (const auto& queue : memory.products) {
            for (const TensorProduct& product : queue) {
                if (product.mbarrier < 0) fail("tcgen05.dealloc while products still write to tensor memory");
            }
        }
        const int warp = warp_of(*device.current);
        for (uint32_t column = memory.first; column < memory.first + memory.columns; ++column) {
            for (uint32_t lane = 0; lane < tensor_lanes; ++lane) {
                Races::TensorWord& word = memory.races[word_at(lane, column)];
                if (const char* wrong = device.races.write_tensor(word, device.current->number, warp)) {
                    fail("race: tcgen05.dealloc of tensor memory, which %s", wrong);
                }
            }
        }
        memory.columns = 0;
    });
}

void relinquish_tensor_memory() {
    int nothing = 0;
    meet(~0U, "tcgen05.relinquish_alloc_permit", nothing,
         [](void**, uint32_t) { tensor_memory().relinquished = true; });
}

void multiply_in_tensor_memory(uint64_t left, uint64_t right, uint32_t sums, uint32_t instruction, bool accumulate) {
    const auto field = [&](int bit, int bits) { return instruction >> bit & ((1U << bits) - 1); };
    TensorProduct product;
    product.left = left;
    product.right = right;
    product.sums = sums;
    product.rows = static_cast<int>(field(24, 5) * 16);
    product.columns = static_cast<int>(field(17, 6) * 8);
    product.format = field(7, 3) == 1 ? Format::bfloat16 : Format::float16;
    product.accumulate = accumulate;
    product.left_across = field(15, 1) != 0;
    product.right_across = field(16, 1) != 0;
    // Dense, sums of float32, both operands of one type of 16 bits, nothing negated and no shift.
    constexpr uint32_t zero = 0b1110'0000'1000'0000'0110'0000'0100'1111;
    if ((instruction & zero) != 0 || field(4, 2) != 1 || field(7, 3) > 1 || field(10, 3) != field(7, 3)) {
        fail("tcgen05.mma by the instruction descriptor %08x, of a kind that is not modelled", instruction);
    }
    const bool high = product.rows == 128;
    if ((product.rows != 64 && !high) || product.columns == 0 || product.columns > 256 ||
        product.columns % (high ? 16 : 8) != 0) {
        fail("tcgen05.mma of %d x %d", product.rows, product.columns);
    }
    if (lane_at(sums) != 0 && (high || lane_at(sums) != 16)) fail("tcgen05.mma to lane %u", lane_at(sums));
    check_allocated("tcgen05.mma to", column_at(sums), static_cast<uint32_t>(product.columns));
    for (const uint64_t descriptor : {left, right}) {
        // Version 1, offsets of the old mode, no base offset, and a swizzle of whole chunks.
        const uint64_t type = descriptor >> 61;
        if ((descriptor >> 46 & 3) != 1 || (descriptor >> 49 & 0xfff) != 0 || type % 2 != 0) {
            fail("tcgen05.mma by the descriptor %016lx of shared memory, of a kind that is not modelled", descriptor);
        }
    }
    const int warp = warp_of(*device.current);
    const Knowledge& known = device.races.known(device.current->number);
    Operand::of_tcgen05(left, product.left_across).begin_to_read(product.rows, warp, known);
    Operand::of_tcgen05(right, product.right_across).begin_to_read(product.columns, warp, known);
    TensorMemory& memory = tensor_memory();
    for (int column = 0; column < product.columns; ++column) {
        for (int row = 0; row < product.rows; ++row) {
            const size_t place = word_at(lane_of_row(product, row), column_at(sums) + column);
            if (const char* wrong = device.races.write_tensor(memory.races[place], device.current->number, warp)) {
                fail("race: tcgen05.mma writes tensor memory, which %s", wrong);
            }
        }
    }
    ++device.counts.tensor_products;
    memory.products[warp].push_back(std::move(product));
}

void commit_tensor_products(const void* pointer) {
    TensorProduct commit;
    commit.mbarrier = mbarrier_at(pointer, "a commit of tcgen05");
    if (!device.hopper.mbarriers[commit.mbarrier].fenced) {
        fail("a commit of tcgen05 to an mbarrier that was set up without a fence");
    }
    commit.told = device.races.known(device.current->number);
    device.races.publish_products(warp_of(*device.current), commit.told);
    tensor_memory().products[warp_of(*device.current)].push_back(std::move(commit));
}

void load_tensor_memory(uint32_t place, bool of_16_lanes, int registers, uint32_t* const* to) {
    struct Asked {
        uint32_t place;
        bool of_16_lanes;
        int registers;
        uint32_t* const* to;
    } asked{place, of_16_lanes, registers, to};
    meet(~0U, "tcgen05.ld", asked, [](void** lanes, uint32_t arrived) {
        if (~arrived != 0) fail("tcgen05.ld of lanes %08x, expected all 32", arrived);
        const Asked& first = *static_cast<Asked*>(lanes[0]);
        const int warp = warp_of(*device.current);
        const uint32_t columns = first.of_16_lanes ? first.registers / 4 * 8 : first.registers;
        // A warp reaches the lanes of its place among four, and of 16 lanes either half.
        const uint32_t within = lane_at(first.place) - static_cast<uint32_t>(warp % warps_of_group) * 32;
        if (within != 0 && !(first.of_16_lanes && within == 16)) {
            fail("tcgen05.ld of warp %d from lane %u of tensor memory", warp, lane_at(first.place));
        }
        check_allocated("tcgen05.ld from", column_at(first.place), columns);
        TensorMemory& memory = tensor_memory();
        TensorLoad load{first.place, first.of_16_lanes, {}};
        for (int l = 0; l < warp_lanes; ++l) {
            const Asked& mine = *static_cast<Asked*>(lanes[l]);
            if (mine.place != first.place) fail("lanes of a warp come to tcgen05.ld with different places");
            for (int r = 0; r < mine.registers; ++r) {
                Races::TensorWord& word = memory.races[word_of(load, l, r)];
                if (const char* wrong = device.races.read_tensor(word, warp * warp_lanes + l)) {
                    fail("race: tcgen05.ld reads tensor memory, which %s", wrong);
                }
                // Until it is waited for.
                *mine.to[r] = 0xffffffffU;
                load.to[l].push_back(mine.to[r]);
            }
        }
        memory.loads[warp].push_back(std::move(load));
    });
}

void wait_for_tensor_loads() {
    int nothing = 0;
    meet(~0U, "tcgen05.wait::ld", nothing, [](void**, uint32_t) {
        TensorMemory& memory = tensor_memory();
        auto& loads = memory.loads[warp_of(*device.current)];
        for (const TensorLoad& load : loads) {
            for (int l = 0; l < warp_lanes; ++l) {
                for (size_t r = 0; r < load.to[l].size(); ++r) {
                    *load.to[l][r] = memory.words[word_of(load, l, static_cast<int>(r))];
                }
            }
        }
        loads.clear();
    });
}

void fence_tensor_memory_before() { device.races.fence_tensor_before(device.current->number); }
void fence_tensor_memory_after() { device.races.fence_tensor_after(device.current->number); }

}  // namespace emulation
