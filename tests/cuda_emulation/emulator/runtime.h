// A CUDA device in software: one fiber a thread of the kernel, blocks one after another. What device code calls, and
// what tests ask. Kernels are compiled with -fsanitize=thread, whose calls (__tsan_read4, ...) come here in place of
// the sanitizer's own library: so every access of a kernel to memory is seen, checked and counted.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#define EMULATION_API __attribute__((visibility("default")))

// The kernel's own coordinates, set whenever a fiber goes on.
extern EMULATION_API uint3 threadIdx;
extern EMULATION_API uint3 blockIdx;
extern EMULATION_API dim3 blockDim;
extern EMULATION_API dim3 gridDim;

namespace emulation {

struct Region {
    const char* begin;
    const char* end;
};

// `image` is where the kernel's library lies: its constants, which every thread may read.
struct Launch {
    dim3 grid, block;
    size_t shared_bytes;
    bool early;
    Region image;
};

// Run run(closure) once for each thread. Returns an error code of the CUDA runtime.
EMULATION_API int launch(const Launch& how, void (*run)(const void*), const void* closure, size_t closure_bytes);

// griddepcontrol.wait. A thread of an early launch that has not come here yet sees nothing that earlier launches wrote,
// and may write nothing; and an early launch that never comes here would let later ones overtake those before it.
EMULATION_API void await_earlier_launches();

// Ends the launch: the kernel did what a device would punish.
[[noreturn]] EMULATION_API void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

EMULATION_API int lane();
EMULATION_API int warp();
EMULATION_API unsigned char* shared_memory();
// Address in the window of shared memory, as PTX has it.
EMULATION_API uint32_t shared_address(const void* pointer);
EMULATION_API void* shared_pointer(uint32_t address);

// bar.sync: of `threads` threads; 0: of every thread of the block that has not left.
EMULATION_API void barrier(int id, int threads);
// bar.arrive: one of `threads` that come, who does not wait for the others.
EMULATION_API void arrive_at_barrier(int id, int threads);
// __syncthreads_and, _or, _count: how many threads came with a true value; all threads get the same number.
EMULATION_API int barrier_count(bool value, int* arrived);
EMULATION_API void warp_barrier(uint32_t mask);
// Give the others a chance: for a loop that waits for them.
EMULATION_API void pause();

// Copy `bytes` at `value` from lane `source` of the warp.
EMULATION_API void shuffle(uint32_t mask, const char* what, void* value, int bytes, int source);
EMULATION_API uint32_t ballot(uint32_t mask, const char* what, bool value);
// elect.sync: one lane of the warp, all of which come here. Any could be it, as far as the caller knows.
EMULATION_API bool elect();

// cp.async: `valid` bytes copied, the rest of `bytes` zeroed, once the thread has waited for the group. wait_copies
// leaves that many groups pending; -1 waits for what is not committed too.
EMULATION_API void copy_async(void* to, const void* from, int bytes, int valid);
EMULATION_API void commit_copies();
EMULATION_API void wait_copies(int pending);

// Read-modify-write that no other thread divides.
EMULATION_API void note_atomic(const void* address, size_t bytes);
// __threadfence; and ld.acquire.gpu of a count in global memory.
EMULATION_API void fence_memory();
EMULATION_API uint32_t acquire(const int32_t* count);

enum class Format { bfloat16, float16, tf32 };

// ldmatrix of 1, 2 or 4 matrices of 8 x 8 elements of 16 bits.
EMULATION_API void load_matrices(int matrices, bool transposed, const void* row, uint32_t* out);
// mma.sync m16n8k16 of 16-bit types, m16n8k8 and m16n8k4 of tf32: sum += a b in float32.
EMULATION_API void multiply_add(Format format, int depth, float* sum, const uint32_t* a, const uint32_t* b);

// mbarrier: init, fence.mbarrier_init, arrive and expect_tx (0 of either: without it), try_wait by parity.
EMULATION_API void init_mbarrier(const void* mbarrier, uint32_t arrivals);
EMULATION_API void fence_mbarriers();
EMULATION_API void arrive_at(const void* mbarrier, uint32_t arrivals, uint32_t expected_bytes);
EMULATION_API void wait_for_phase(const void* mbarrier, uint32_t parity);
EMULATION_API bool phase_has_ended(const void* mbarrier, uint32_t parity);
// fence.proxy.async: copies of tensors and wgmma see what this thread has written, or knows to be written.
EMULATION_API void fence_proxy();

// cp.async.bulk.tensor: a box of a tensor to shared memory, whose bytes the mbarrier counts.
EMULATION_API void copy_tensor(const void* map, const void* mbarrier, void* to, const int* coordinates, int rank);

// wgmma of one warp of a group, m64nNk16 of 16-bit types. An operand lies in shared memory as its descriptor says, a
// row of it (of a) or a column (of b) running along the depth, or across it.
struct GroupProduct {
    Format format;
    int columns;
    bool left_in_registers;
    bool left_across;
    bool right_across;
    bool accumulate;
    uint64_t left;
    uint64_t right;
    const uint32_t* const* left_registers;  // 4 places
    float* const* sums;                     // columns / 2 places
};
EMULATION_API void fence_products();
EMULATION_API void multiply_group(const GroupProduct& product);
EMULATION_API void commit_products();
EMULATION_API void wait_for_products(int pending);

// tcgen05 of one block (cta_group::1): tensor memory of 128 lanes and 512 columns of 32 bits, whose place has the lane
// in its upper half and the column in its lower. Allocation and loads are of a whole warp; a product and a commit of
// the thread that comes here.
EMULATION_API void allocate_tensor_memory(uint32_t columns, uint32_t* place);
EMULATION_API void free_tensor_memory(uint32_t place, uint32_t columns);
EMULATION_API void relinquish_tensor_memory();
// kind::f16 from shared memory, by descriptors of operands and of the instruction.
EMULATION_API void multiply_in_tensor_memory(uint64_t left, uint64_t right, uint32_t sums, uint32_t instruction,
                                             bool accumulate);
EMULATION_API void commit_tensor_products(const void* mbarrier);
// tcgen05.ld of 16x256b, four registers for each 8 columns, or of 32x32b, one for each column.
EMULATION_API void load_tensor_memory(uint32_t place, bool of_16_lanes, int registers, uint32_t* const* to);
EMULATION_API void wait_for_tensor_loads();
EMULATION_API void fence_tensor_memory_before();
EMULATION_API void fence_tensor_memory_after();

}  // namespace emulation

// What tests/cuda_emulation/emulator.py calls.
extern "C" {
struct EmulationTensor {
    const char* name;
    char* begin;
    char* end;
    int64_t bytes_read;
    int64_t bytes_written;
    int64_t sectors_read;  // of 32 bytes, once for each request of a warp
    int64_t sectors_written;
};

struct EmulationCounts {
    int64_t launches;
    int64_t blocks;
    int64_t barriers;
    int64_t collectives;
    int64_t products;         // mma of a warp
    int64_t matrices;         // 8 x 8 loaded by ldmatrix
    int64_t async_copies;     // of a thread
    int64_t group_products;   // wgmma of a warp
    int64_t tensor_products;  // tcgen05.mma
    int64_t tensor_copies;    // by TMA
    int64_t bank_conflicts;   // further passes over the banks than the bytes of a request need
    int64_t shared_bytes;     // the largest launch's, dynamic
    int64_t threads;          // the largest launch's, of a block
    int64_t early_launches;
};

// The memory that kernels may touch, and the order in which threads and blocks run. With `watch_blocks` a block may
// read and overwrite what other blocks of its launch have written only once it was told: by an atomic on a count in
// memory behind a __threadfence, and an acquiring load, or an atomic and a __threadfence, of it. It is
// watched by words of 4 bytes: blocks that write the halves of one are taken to overwrite each other.
EMULATION_API void emulation_begin(uint64_t seed, EmulationTensor* tensors, int64_t count, int watch_blocks);
// Counts into the tensors of `emulation_begin` too. Returns what a kernel did wrong, or "".
EMULATION_API const char* emulation_end(EmulationCounts* counts);
}
