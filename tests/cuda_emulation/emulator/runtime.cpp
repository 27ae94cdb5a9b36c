#include "runtime.h"

#include <link.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "hopper.h"
#include "memory.h"
#include "products.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

// Save the registers that a call preserves on this stack, and go on with another stack.
extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.text
.type emulation_switch, @function
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulation_switch, . - emulation_switch
)");

struct TlsIndex {
    unsigned long module;
    unsigned long offset;
};

extern "C" {
void* __tls_get_addr(TlsIndex* index);
extern const char __ehdr_start[] __attribute__((visibility("hidden")));
extern const char _end[] __attribute__((visibility("hidden")));
}

namespace emulation {
namespace {

// AddressSanitizer puts room around every variable, and knows nothing of fibers that never return.
#ifdef __SANITIZE_ADDRESS__
constexpr size_t stack_bytes = 2 << 20;
void sanitize(const char* begin, size_t valid, size_t bytes) {
    ASAN_UNPOISON_MEMORY_REGION(begin, valid);
    ASAN_POISON_MEMORY_REGION(begin + valid, bytes - valid);
}
#else
constexpr size_t stack_bytes = 256 << 10;
void sanitize(const char*, size_t, size_t) {}
#endif
constexpr size_t page_bytes = 4096;
constexpr size_t largest_shared = 227 << 10;
constexpr int most_barriers = 16;
constexpr int shared_target = -1;

enum class State : uint8_t { ready, waiting, finished };

struct AsyncCopy {
    char* to;
    const char* from;
    int bytes;
    int valid;
};

struct Thread {
    void* stack_pointer = nullptr;
    char* stack = nullptr;
    uint3 index{};
    int number = 0;
    bool may_touch = false;  // memory that other launches write
    bool lets_next = false;  // launch begin
    State state = State::ready;
    const char* waits_for = "";
    std::vector<std::vector<AsyncCopy>> copies;  // groups in order; the last one is open
};

// Lanes of a warp that meet: the last to come acts for all.
struct Meeting {
    uint32_t mask;
    uint32_t arrived;
    const char* what;
    void* arguments[warp_lanes];
    void (*act)(void** arguments, uint32_t mask);
};

struct Warp {
    uint64_t priority = 0;
    uint32_t live = 0;
    std::vector<int> ready;
    std::vector<Meeting> meetings;
};

struct Barrier {
    int count = 0;
    std::vector<int> waiting;
    std::vector<int> arrived;  // who wait for nobody
    Knowledge arriving;        // of those
};

struct Device {
    uint64_t random = 0;
    EmulationTensor* tensors = nullptr;
    int64_t tensor_count = 0;
    EmulationCounts counts{};
    std::string error;

    std::vector<Thread> threads;  // as many as a block ever had: stacks are kept
    std::vector<Warp> warps;
    Barrier barriers[most_barriers];
    Hopper hopper;
    int block_threads = 0;
    int live = 0;
    int ready = 0;
    int votes = 0;
    bool one_warp_ahead = false;
    bool awaited = false;  // by some thread of the launch
    bool early = false;
    Thread* current = nullptr;
    void* scheduler = nullptr;

    void (*run)(const void*) = nullptr;
    Region closure{};
    Region image{};
    Region fixed{};         // static shared memory
    char* arena = nullptr;  // dynamic shared memory
    size_t shared_bytes = 0;
    Races races;
    Blocks blocks;
    struct CountRequest {
        void operator()(int target, bool write, const Request& request) const;
    };
    Requests<CountRequest> requests;
};

Device device;

void Device::CountRequest::operator()(int target, bool write, const Request& request) const {
    if (target == shared_target) {
        device.counts.bank_conflicts += extra_passes(request);
    } else {
        (write ? device.tensors[target].sectors_written : device.tensors[target].sectors_read) += sectors(request);
    }
}

uint64_t draw() {
    device.random += 0x9e3779b97f4a7c15ULL;
    uint64_t z = device.random;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return z ^ (z >> 31);
}

int warp_of(const Thread& thread) { return thread.number / warp_lanes; }
int lane_of(const Thread& thread) { return thread.number % warp_lanes; }

void wake(int number) {
    Thread& thread = device.threads[number];
    thread.state = State::ready;
    device.warps[warp_of(thread)].ready.push_back(number);
    ++device.ready;
}

void leave() { emulation_switch(&device.current->stack_pointer, device.scheduler); }

void wait(const char* what) {
    device.current->state = State::waiting;
    device.current->waits_for = what;
    leave();
}

void release(Barrier& barrier) {
    device.races.synchronise(barrier.waiting);
    for (const int number : barrier.waiting) {
        if (!barrier.arrived.empty()) device.races.learn(number, barrier.arriving);
        wake(number);
    }
    barrier.waiting.clear();
    barrier.arrived.clear();
}

// The current thread comes to a barrier.
Barrier& come_to(int id, int threads) {
    ++device.counts.barriers;
    Barrier& barrier = device.barriers[id];
    if (std::ranges::find(barrier.arrived, device.current->number) != barrier.arrived.end()) {
        fail("a thread comes twice to barrier %d, where others have not been yet", id);
    }
    if (!(barrier.waiting.empty() && barrier.arrived.empty()) && barrier.count != threads) {
        fail("barrier %d of %d threads, where others expect %d", id, threads, barrier.count);
    }
    barrier.count = threads;
    return barrier;
}

bool complete(const Barrier& barrier) {
    return barrier.count > 0 && static_cast<int>(barrier.waiting.size() + barrier.arrived.size()) == barrier.count;
}

// A barrier of all threads waits for nobody who has left.
void release_if_all_came() {
    Barrier& barrier = device.barriers[0];
    if (barrier.count == 0 && device.live > 0 && static_cast<int>(barrier.waiting.size()) == device.live) {
        release(barrier);
    }
}

void complete(Warp& warp, size_t place) {
    const Meeting meeting = warp.meetings[place];
    warp.meetings.erase(warp.meetings.begin() + static_cast<std::ptrdiff_t>(place));
    meeting.act(const_cast<void**>(meeting.arguments), meeting.arrived);
    const int first = static_cast<int>(&warp - device.warps.data()) * warp_lanes;
    for (int l = 0; l < warp_lanes; ++l) {
        if ((meeting.arrived >> l & 1) != 0 && device.threads[first + l].state == State::waiting) wake(first + l);
    }
}

template <class Argument>
void meet(uint32_t mask, const char* what, Argument& argument, void (*act)(void**, uint32_t)) {
    ++device.counts.collectives;
    Warp& warp = device.warps[warp_of(*device.current)];
    const int l = lane_of(*device.current);
    if ((mask >> l & 1) == 0) fail("%s: lane %d is not in its own mask %08x", what, l, mask);
    size_t place = 0;
    while (place < warp.meetings.size() && (warp.meetings[place].mask & mask) == 0) ++place;
    if (place == warp.meetings.size()) {
        warp.meetings.push_back({mask, 0, what, {}, act});
    } else if (warp.meetings[place].mask != mask || std::strcmp(warp.meetings[place].what, what) != 0) {
        fail("%s of mask %08x meets %s of mask %08x", what, mask, warp.meetings[place].what, warp.meetings[place].mask);
    }
    Meeting& meeting = warp.meetings[place];
    meeting.arrived |= 1U << l;
    meeting.arguments[l] = &argument;
    if (meeting.arrived == (mask & warp.live)) {
        complete(warp, place);
    } else {
        wait(what);
    }
}

bool inside(const Region& region, const char* p) { return p >= region.begin && p < region.end; }

// Where a byte of shared memory stands: the static part first. Negative: not shared memory.
int64_t shared_place(const char* p) {
    if (inside(device.fixed, p)) return p - device.fixed.begin;
    if (p < device.arena || p >= device.arena + largest_shared) return -1;
    return (p - device.arena) + (device.fixed.end - device.fixed.begin);
}

const char* plural(bool write) { return write ? "writes" : "reads"; }

void touch_shared(const char* p, int64_t place, size_t bytes, bool write, bool in_flight) {
    if (!inside(device.fixed, p) && p + bytes > device.arena + device.shared_bytes) {
        fail("%s %zu bytes at %td of %zu bytes of shared memory", plural(write), bytes, p - device.arena,
             device.shared_bytes);
    }
    const int warp = warp_of(*device.current);
    const int lane = lane_of(*device.current);
    const char* wrong =
        write ? device.races.write(place, bytes, warp, lane, in_flight) : device.races.read(place, bytes, warp, lane);
    if (wrong != nullptr) {
        fail("race: %s %zu bytes of shared memory at %ld, which %s", plural(write), bytes, place, wrong);
    }
}

void request(const void* site, int target, const char* p, size_t bytes, bool write) {
    const Thread& thread = *device.current;
    const uint32_t live = device.warps[warp_of(thread)].live;
    for (size_t done = 0; done < bytes; done += 16) {
        device.requests.add(site, warp_of(thread), lane_of(thread), target, write, reinterpret_cast<uint64_t>(p) + done,
                            static_cast<int>(std::min<size_t>(bytes - done, 16)), live, {});
    }
}

// Global memory is the tensors that the test gave.
int tensor_at(const char* p, size_t bytes, bool write) {
    for (int i = 0; i < device.tensor_count; ++i) {
        EmulationTensor& tensor = device.tensors[i];
        if (p >= tensor.begin && p + bytes <= tensor.end) {
            if (!device.current->may_touch && (write || tensor.bytes_written > 0)) {
                fail("%s %s before the launches in front have ended", plural(write), tensor.name);
            }
            (write ? tensor.bytes_written : tensor.bytes_read) += static_cast<int64_t>(bytes);
            return i;
        }
    }
    const EmulationTensor* nearest = nullptr;
    const auto distance = [&](const EmulationTensor& tensor) {
        return p < tensor.begin ? tensor.begin - p : p - tensor.end;
    };
    for (int i = 0; i < device.tensor_count; ++i) {
        const EmulationTensor& tensor = device.tensors[i];
        if (nearest == nullptr || distance(tensor) < distance(*nearest)) nearest = &tensor;
    }
    if (nearest == nullptr)
        fail("%s %zu bytes of global memory at %p, but no tensor was given", plural(write), bytes, p);
    fail("%s %zu bytes at offset %td of %s, which has %td bytes", plural(write), bytes, p - nearest->begin,
         nearest->name, nearest->end - nearest->begin);
}

void touch_global(const void* site, const char* p, size_t bytes, bool write) {
    request(site, tensor_at(p, bytes, write), p, bytes, write);
}

void touch(const void* site, const void* address, size_t bytes, bool write, bool whole) {
    if (device.current == nullptr) return;  // host code
    const char* p = static_cast<const char*>(address);
    if (p >= device.current->stack && p < device.current->stack + stack_bytes) return;
    if (whole && reinterpret_cast<uintptr_t>(p) % bytes != 0) {
        fail("%s %zu bytes at a misaligned address", plural(write), bytes);
    }
    if (const int64_t place = shared_place(p); place >= 0) {
        touch_shared(p, place, bytes, write, false);
        request(site, shared_target, p, bytes, write);
    } else if (write || !(inside(device.image, p) || inside(device.closure, p) || inside({__ehdr_start, _end}, p))) {
        touch_global(site, p, bytes, write);
        if (!device.blocks.watched) return;
        const auto at = reinterpret_cast<uint64_t>(p);
        const int thread = device.current->number;
        const char* wrong = write ? device.blocks.write(at, bytes, thread, device.races)
                                  : device.blocks.read(at, bytes, thread, device.races);
        if (wrong != nullptr) fail("%s %zu bytes of global memory, which %s", plural(write), bytes, wrong);
    }
}

void land(std::vector<AsyncCopy>& group) {
    for (const AsyncCopy& copy : group) {
        std::memcpy(copy.to, copy.from, copy.valid);
        std::memset(copy.to + copy.valid, 0, copy.bytes - copy.valid);
        device.races.arrive(shared_place(copy.to), copy.bytes, warp_of(*device.current), lane_of(*device.current));
    }
    group.clear();
}

// Of blackwell.cpp: how many warps have products of tcgen05 in flight, and the end of the oldest of one of them.
size_t multiplying_warps();
void end_tensor_product(size_t which);

void finish_thread() {
    Thread& thread = *device.current;
    for (auto& group : thread.copies) land(group);
    thread.state = State::finished;
    --device.live;
    device.hopper.left_late = device.hopper.left_late || (device.live == 0 && !device.hopper.copies.empty());
    device.hopper.tensor.left_late = device.hopper.tensor.left_late || (device.live == 0 && multiplying_warps() > 0);
    Warp& warp = device.warps[warp_of(thread)];
    warp.live &= ~(1U << lane_of(thread));
    release_if_all_came();
    for (size_t place = 0; place < warp.meetings.size();) {
        const Meeting& meeting = warp.meetings[place];
        if (meeting.arrived == (meeting.mask & warp.live)) {
            complete(warp, place);
        } else {
            ++place;
        }
    }
}

[[noreturn]] void enter() {
    device.run(device.closure.begin);
    finish_thread();
    leave();
    std::abort();
}

void prepare(Thread& thread, int number, dim3 block) {
    thread.number = number;
    thread.may_touch = !device.early;
    thread.lets_next = false;
    thread.index = {number % block.x, number / block.x % block.y, number / block.x / block.y};
    thread.copies.clear();
    sanitize(thread.stack, stack_bytes, stack_bytes);
    // What emulation_switch pops: six registers, then the address to go to, with the stack as after a call.
    void** top = reinterpret_cast<void**>(thread.stack + stack_bytes - 64);
    std::fill(top, top + 8, nullptr);
    top[6] = reinterpret_cast<void*>(&enter);
    thread.stack_pointer = top;
}

// Any ready thread; or one of the ready warp with the highest priority, so that one warp runs far ahead.
int choose() {
    size_t w = 0;
    if (device.one_warp_ahead) {
        if (draw() % 256 == 0) {
            for (Warp& warp : device.warps) warp.priority = draw();
        }
        size_t best = device.warps.size();
        for (; w < device.warps.size(); ++w) {
            const Warp& warp = device.warps[w];
            if (!warp.ready.empty() && (best == device.warps.size() || warp.priority > device.warps[best].priority)) {
                best = w;
            }
        }
        w = best;
    } else {
        size_t k = draw() % device.ready;
        while (k >= device.warps[w].ready.size()) k -= device.warps[w++].ready.size();
    }
    std::vector<int>& ready = device.warps[w].ready;
    std::swap(ready[draw() % ready.size()], ready.back());
    const int number = ready.back();
    ready.pop_back();
    --device.ready;
    return number;
}

// Of hopper.cpp. What is wrong with what a block has left behind, or "".
void land_tensor_copy(size_t which);
std::string left_in_flight();

void diagnose_deadlock() {
    device.error = "deadlock:";
    int listed = 0;
    for (int i = 0; i < device.block_threads && listed < 4; ++i) {
        const Thread& thread = device.threads[i];
        if (thread.state != State::waiting) continue;
        device.error += " thread " + std::to_string(i) + " waits in " + thread.waits_for + ';';
        ++listed;
    }
    device.error.pop_back();
}

void run_block(dim3 block) {
    device.block_threads = device.live = static_cast<int>(block.x * block.y * block.z);
    while (static_cast<int>(device.threads.size()) < device.block_threads) {
        Thread thread;
        void* memory = mmap(nullptr, stack_bytes + page_bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        mprotect(memory, page_bytes, PROT_NONE);
        thread.stack = static_cast<char*>(memory) + page_bytes;
        device.threads.push_back(std::move(thread));
    }
    const int warps = (device.block_threads + warp_lanes - 1) / warp_lanes;
    device.warps.assign(warps, {});
    for (Barrier& barrier : device.barriers) barrier = {};
    device.hopper = {};
    device.hopper.products.resize(warps);
    device.hopper.tensor.products.resize(warps);
    device.hopper.tensor.loads.resize(warps);
    device.hopper.descriptors.resize((warps + warps_of_group - 1) / warps_of_group);
    device.ready = device.votes = 0;
    // NaN in every floating type.
    std::memset(device.arena, 0xff, device.shared_bytes);
    const size_t fixed = device.fixed.end - device.fixed.begin;
    if (fixed > 0) std::memset(const_cast<char*>(device.fixed.begin), 0xff, fixed);
    device.races.reset(fixed + device.shared_bytes, warps);
    if (device.blocks.watched) device.blocks.begin_block(warps * warp_lanes);
    for (Warp& warp : device.warps) warp.priority = draw();
    for (int i = 0; i < device.block_threads; ++i) {
        prepare(device.threads[i], i, block);
        device.warps[i / warp_lanes].live |= 1U << (i % warp_lanes);
        wake(i);
    }
    while ((device.ready > 0 || !device.hopper.copies.empty() || multiplying_warps() > 0) && device.error.empty()) {
        if (const size_t busy = multiplying_warps(); busy > 0 && (device.ready == 0 || draw() % 16 == 0)) {
            end_tensor_product(draw() % busy);
            continue;
        }
        // Copies of tensors arrive in any order, and late.
        if (!device.hopper.copies.empty() && (device.ready == 0 || draw() % 64 == 0)) {
            land_tensor_copy(draw() % device.hopper.copies.size());
            continue;
        }
        device.current = &device.threads[choose()];
        threadIdx = device.current->index;
        emulation_switch(&device.scheduler, device.current->stack_pointer);
    }
    device.current = nullptr;
    if (device.error.empty() && device.live > 0) diagnose_deadlock();
    if (device.error.empty()) device.error = left_in_flight();
    for (int id = 0; id < most_barriers && device.error.empty(); ++id) {
        if (device.barriers[id].arrived.empty()) continue;
        device.error = "the block ends after arrivals at barrier " + std::to_string(id) + " that nobody waited for";
    }
    device.requests.finish({});
}

// Of the library that lies at `image`: its block of this thread.
Region thread_local_memory(const Region& image) {
    struct Search {
        Region image;
        Region found;
    } search{image, {}};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* argument) {
            Search& search = *static_cast<Search*>(argument);
            for (int i = 0; i < info->dlpi_phnum; ++i) {
                const ElfW(Phdr) & part = info->dlpi_phdr[i];
                if (part.p_type != PT_TLS) continue;
                const char* constants = reinterpret_cast<const char*>(info->dlpi_addr) + part.p_vaddr;
                if (constants < search.image.begin || constants > search.image.end) continue;
                TlsIndex index{info->dlpi_tls_modid, 0};
                const char* begin = static_cast<const char*>(__tls_get_addr(&index));
                search.found = {begin, begin + part.p_memsz};
            }
            return search.found.begin != nullptr ? 1 : 0;
        },
        &search);
    return search.found;
}

bool launchable(const Launch& how) {
    const dim3 grid = how.grid;
    const dim3 block = how.block;
    const uint64_t threads = uint64_t(block.x) * block.y * block.z;
    return threads >= 1 && threads <= 1024 && block.z <= 64 && grid.x >= 1 && grid.y >= 1 && grid.z >= 1 &&
           grid.x <= 0x7fffffffU && grid.y <= 0xffffU && grid.z <= 0xffffU && how.shared_bytes <= largest_shared;
}

}  // namespace

int launch(const Launch& how, void (*run)(const void*), const void* closure, size_t closure_bytes) {
    if (!launchable(how)) return cudaErrorInvalidConfiguration;
    const dim3 grid = how.grid;
    const dim3 block = how.block;
    const size_t shared_bytes = how.shared_bytes;
    if (device.arena == nullptr) {
        device.arena = static_cast<char*>(std::aligned_alloc(1024, (largest_shared + 1023) / 1024 * 1024));
    }
    device.run = run;
    device.closure = {static_cast<const char*>(closure), static_cast<const char*>(closure) + closure_bytes};
    device.image = how.image;
    device.fixed = thread_local_memory(how.image);
    device.early = how.early;
    device.awaited = false;
    device.shared_bytes = shared_bytes;
    sanitize(device.arena, shared_bytes, largest_shared);
    gridDim = grid;
    blockDim = block;
    ++device.counts.launches;
    device.counts.shared_bytes = std::max<int64_t>(device.counts.shared_bytes, shared_bytes);
    device.counts.threads = std::max<int64_t>(device.counts.threads, block.x * block.y * block.z);
    device.blocks.begin_launch();
    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    for (uint64_t i = 0; i < blocks && device.error.empty(); ++i) {
        blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                    static_cast<unsigned>(i / grid.x / grid.y)};
        device.one_warp_ahead = draw() % 2 == 0;
        ++device.counts.blocks;
        run_block(block);
    }
    if (how.early && !device.awaited && device.error.empty()) {
        device.error = "an early launch did not wait for those in front";
    }
    if (how.early) ++device.counts.early_launches;
    return device.error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

void fail(const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    char place[96];
    snprintf(place, sizeof(place), " (block %u,%u,%u, thread %d)", blockIdx.x, blockIdx.y, blockIdx.z,
             device.current->number);
    device.error = std::string(text) + place;
    leave();  // for good
    std::abort();
}

int lane() { return lane_of(*device.current); }
int warp() { return warp_of(*device.current); }
unsigned char* shared_memory() { return reinterpret_cast<unsigned char*>(device.arena); }
uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(static_cast<const char*>(pointer) - device.arena);
}
void* shared_pointer(uint32_t address) { return device.arena + address; }

void barrier(int id, int threads) {
    Barrier& barrier = come_to(id, threads);
    barrier.waiting.push_back(device.current->number);
    device.current->state = State::waiting;
    device.current->waits_for = "a barrier";
    if (threads == 0) {
        release_if_all_came();
    } else if (complete(barrier)) {
        release(barrier);
    }
    leave();
}

void arrive_at_barrier(int id, int threads) {
    Barrier& barrier = come_to(id, threads);
    if (barrier.arrived.empty()) barrier.arriving = device.races.nothing();
    barrier.arrived.push_back(device.current->number);
    device.races.publish(device.current->number, barrier.arriving);
    if (!complete(barrier)) return;
    if (barrier.waiting.empty()) fail("all threads have come to barrier %d and none waits there", id);
    release(barrier);
}

int barrier_count(bool value, int* arrived) {
    if (value) ++device.votes;
    barrier(0, 0);
    const int votes = device.votes;
    *arrived = device.live;
    barrier(0, 0);
    device.votes = 0;
    return votes;
}

void warp_barrier(uint32_t mask) {
    int nothing = 0;
    meet(mask, "__syncwarp", nothing, [](void**, uint32_t arrived) {
        std::vector<int> came;
        for (int l = 0; l < warp_lanes; ++l) {
            if ((arrived >> l & 1) != 0) came.push_back(warp_of(*device.current) * warp_lanes + l);
        }
        device.races.synchronise(came);
    });
}

void await_earlier_launches() {
    device.current->may_touch = true;
    device.current->lets_next = true;
    device.awaited = true;
}

void pause() {
    wake(device.current->number);
    leave();
}

namespace {
struct Shuffled {
    const void* value;
    char result[16];
    int bytes;
    int source;
};

struct Vote {
    bool value;
    uint32_t result;
};
}  // namespace

void shuffle(uint32_t mask, const char* what, void* value, int bytes, int source) {
    Shuffled argument{value, {}, bytes, source};
    meet(mask, what, argument, [](void** lanes, uint32_t arrived) {
        for (int l = 0; l < warp_lanes; ++l) {
            if ((arrived >> l & 1) == 0) continue;
            Shuffled& mine = *static_cast<Shuffled*>(lanes[l]);
            if ((arrived >> mine.source & 1) == 0) {
                fail("lane %d reads lane %d by a shuffle that lane %d takes no part in", l, mine.source, mine.source);
            }
            std::memcpy(mine.result, static_cast<Shuffled*>(lanes[mine.source])->value, mine.bytes);
        }
    });
    std::memcpy(value, argument.result, bytes);
}

uint32_t ballot(uint32_t mask, const char* what, bool value) {
    Vote argument{value, 0};
    meet(mask, what, argument, [](void** lanes, uint32_t arrived) {
        uint32_t result = 0;
        for (int l = 0; l < warp_lanes; ++l) {
            if ((arrived >> l & 1) != 0 && static_cast<Vote*>(lanes[l])->value) result |= 1U << l;
        }
        for (int l = 0; l < warp_lanes; ++l) {
            if ((arrived >> l & 1) != 0) static_cast<Vote*>(lanes[l])->result = result;
        }
    });
    return argument.result;
}

bool elect() {
    int nothing = 0;
    meet(~0U, "elect.sync", nothing, [](void**, uint32_t) {});
    return lane() == 0;
}

void copy_async(void* to, const void* from, int bytes, int valid) {
    const void* site = __builtin_return_address(0);
    char* target = static_cast<char*>(to);
    const int64_t place = shared_place(target);
    if (place < 0) fail("cp.async writes to %p, which is not shared memory", to);
    if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || (valid > 0 && reinterpret_cast<uintptr_t>(from) % bytes != 0)) {
        fail("cp.async of %d bytes at a misaligned address", bytes);
    }
    ++device.counts.async_copies;
    touch_shared(target, place, bytes, true, true);
    request(site, shared_target, target, bytes, true);
    if (valid > 0) touch_global(site, static_cast<const char*>(from), valid, false);
    auto& groups = device.current->copies;
    if (groups.empty()) groups.emplace_back();
    groups.back().push_back({target, static_cast<const char*>(from), bytes, valid});
}

void commit_copies() {
    auto& groups = device.current->copies;
    if (groups.empty()) groups.emplace_back();
    groups.emplace_back();
}

void wait_copies(int pending) {
    auto& groups = device.current->copies;
    while (static_cast<int>(groups.size()) > pending + 1) {
        land(groups.front());
        groups.erase(groups.begin());
    }
}

void note_atomic(const void* address, size_t bytes) {
    const char* p = static_cast<const char*>(address);
    // Atomics of several threads on one word of shared memory are no race.
    if (shared_place(p) >= 0) return;
    touch_global(__builtin_return_address(0), p, bytes, false);
    touch_global(__builtin_return_address(0), p, bytes, true);
    if (device.blocks.watched) device.blocks.signal(address, device.current->number);
}

void fence_memory() {
    if (device.current != nullptr && device.blocks.watched) device.blocks.fence(device.current->number, device.races);
}

uint32_t acquire(const int32_t* count) {
    touch_global(__builtin_return_address(0), reinterpret_cast<const char*>(count), sizeof(*count), false);
    if (device.blocks.watched) device.blocks.acquire(count, device.current->number, device.races);
    return static_cast<uint32_t>(*count);
}

namespace {
struct MatrixLoad {
    const char* row;
    uint32_t* out;
    int matrices;
    bool transposed;
};

uint32_t element(const void* lane_argument, int column) {
    uint16_t bits;
    std::memcpy(&bits, static_cast<const MatrixLoad*>(lane_argument)->row + 2 * column, 2);
    return bits;
}

void load_for_warp(void** lanes, uint32_t arrived) {
    if (~arrived != 0) fail("ldmatrix of lanes %08x, expected all 32", arrived);
    const MatrixLoad first = *static_cast<MatrixLoad*>(lanes[0]);
    for (int m = 0; m < first.matrices; ++m) {
        void** rows = lanes + 8 * m;
        ++device.counts.matrices;
        Request request{0xff, 16, {}};
        for (int r = 0; r < 8; ++r) {
            const char* row = static_cast<MatrixLoad*>(rows[r])->row;
            const int64_t place = shared_place(row);
            if (place < 0) fail("ldmatrix reads %p, which is not shared memory", static_cast<const void*>(row));
            if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("ldmatrix of a row at a misaligned address");
            touch_shared(row, place, 16, false, false);
            request.address[r] = reinterpret_cast<uint64_t>(row);
        }
        device.counts.bank_conflicts += extra_passes(request);
        for (int l = 0; l < warp_lanes; ++l) {
            const int row = l / 4;
            const int column = 2 * (l % 4);
            const uint32_t low = first.transposed ? element(rows[column], row) : element(rows[row], column);
            const uint32_t high = first.transposed ? element(rows[column + 1], row) : element(rows[row], column + 1);
            static_cast<MatrixLoad*>(lanes[l])->out[m] = low | high << 16;
        }
    }
}
}  // namespace

void load_matrices(int matrices, bool transposed, const void* row, uint32_t* out) {
    MatrixLoad argument{static_cast<const char*>(row), out, matrices, transposed};
    meet(~0U, transposed ? "ldmatrix.trans" : "ldmatrix", argument, load_for_warp);
}

void multiply_add(Format format, int depth, float* sum, const uint32_t* a, const uint32_t* b) {
    Fragments argument{format, depth, sum, a, b};
    meet(~0U, "mma.sync", argument, [](void** lanes, uint32_t arrived) {
        if (~arrived != 0) fail("mma.sync of lanes %08x, expected all 32", arrived);
        ++device.counts.products;
        multiply_fragments(reinterpret_cast<Fragments**>(lanes));
    });
}

}  // namespace emulation

void emulation_begin(uint64_t seed, EmulationTensor* tensors, int64_t count, int watch_blocks) {
    using emulation::device;
    device.random = seed;
    device.blocks.watched = watch_blocks != 0;
    device.tensors = tensors;
    device.tensor_count = count;
    device.counts = {};
    device.error.clear();
}

const char* emulation_end(EmulationCounts* counts) {
    using emulation::device;
    *counts = device.counts;
    device.tensors = nullptr;
    device.tensor_count = 0;
    return device.error.c_str();
}

// What the compiler calls before each access of a kernel.
#define EMULATION_ACCESS(bytes)                                               \
    EMULATION_API void __tsan_read##bytes(void* p) {                          \
        emulation::touch(__builtin_return_address(0), p, bytes, false, true); \
    }                                                                         \
    EMULATION_API void __tsan_write##bytes(void* p) {                         \
        emulation::touch(__builtin_return_address(0), p, bytes, true, true);  \
    }
extern "C" {
EMULATION_ACCESS(1)
EMULATION_ACCESS(2)
EMULATION_ACCESS(4)
EMULATION_ACCESS(8)
EMULATION_ACCESS(16)
EMULATION_API void __tsan_read_range(void* p, size_t bytes) {
    emulation::touch(__builtin_return_address(0), p, bytes, false, false);
}
EMULATION_API void __tsan_write_range(void* p, size_t bytes) {
    emulation::touch(__builtin_return_address(0), p, bytes, true, false);
}
EMULATION_API void __tsan_vptr_update(void*, void*) {}
EMULATION_API void __tsan_func_entry(void*) {}
EMULATION_API void __tsan_func_exit(void*) {}
EMULATION_API void __tsan_init() {}
}
