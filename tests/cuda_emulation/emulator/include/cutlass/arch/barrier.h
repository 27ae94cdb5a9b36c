// CUTLASS's mbarriers, named barriers, fences and commits on the emulated device: the hardware's are renamed away. A cluster is
// one block.
#pragma once
#include <cuda_runtime.h>

#define NamedBarrier NamedBarrier_of_hardware
#define ClusterBarrier ClusterBarrier_of_hardware
#define ClusterTransactionBarrier ClusterTransactionBarrier_of_hardware
#define fence_barrier_init fence_barrier_init_of_hardware
#define fence_view_async_shared fence_view_async_shared_of_hardware
#define umma_arrive umma_arrive_of_hardware
#define fence_view_async_tmem_load fence_view_async_tmem_load_of_hardware
#include_next <cutlass/arch/barrier.h>
#undef NamedBarrier
#undef ClusterBarrier
#undef ClusterTransactionBarrier
#undef fence_barrier_init
#undef fence_view_async_shared
#undef umma_arrive
#undef fence_view_async_tmem_load

namespace cutlass {
namespace arch {

class NamedBarrier {
  public:
    static constexpr uint32_t ReservedNamedBarrierCount =
        static_cast<uint32_t>(ReservedNamedBarriers::FirstUserBarrier);

    NamedBarrier(uint32_t threads, uint32_t id = 0) : threads_(threads), id_(id + ReservedNamedBarrierCount) {}
    NamedBarrier(uint32_t threads, ReservedNamedBarriers id) : threads_(threads), id_(static_cast<uint32_t>(id)) {}
    void arrive_and_wait() const { emulation::barrier(static_cast<int>(id_), static_cast<int>(threads_)); }
    void sync() const { arrive_and_wait(); }
    static void sync(uint32_t threads, uint32_t id) { NamedBarrier(threads, id).sync(); }
    static void sync(uint32_t threads, ReservedNamedBarriers id) { NamedBarrier(threads, id).sync(); }

  private:
    uint32_t threads_;
    uint32_t id_;
};

struct ClusterBarrier {
    using ValueType = uint64_t;

    ClusterBarrier() = delete;
    void init(uint32_t arrivals) const { init(&barrier_, arrivals); }
    bool test_wait(uint32_t parity, uint32_t = true) const { return test_wait(&barrier_, parity, true); }
    bool try_wait(uint32_t parity) const { return try_wait(&barrier_, parity); }
    void wait(uint32_t parity) const { wait(&barrier_, parity); }
    void arrive() const { arrive(&barrier_); }
    void arrive(uint32_t block, uint32_t wanted = true) const { arrive(&barrier_, block, wanted); }

    static void init(const ValueType* barrier, uint32_t arrivals) { emulation::init_mbarrier(barrier, arrivals); }
    static void wait(const ValueType* barrier, uint32_t parity) { emulation::wait_for_phase(barrier, parity); }
    static bool test_wait(const ValueType* barrier, uint32_t parity, uint32_t) {
        return emulation::phase_has_ended(barrier, parity);
    }
    static bool try_wait(const ValueType* barrier, uint32_t parity) {
        return emulation::phase_has_ended(barrier, parity);
    }
    static void arrive(const ValueType* barrier, uint32_t, uint32_t wanted) {
        if (wanted != 0) emulation::arrive_at(barrier, 1, 0);
    }
    static void arrive(const ValueType* barrier) { emulation::arrive_at(barrier, 1, 0); }

  protected:
    ValueType barrier_;
};

struct ClusterTransactionBarrier : ClusterBarrier {
    void arrive_and_expect_tx(uint32_t bytes) const { arrive_and_expect_tx(&barrier_, bytes); }
    void arrive_and_expect_tx(uint32_t bytes, uint32_t, uint32_t wanted = 1) const {
        if (wanted != 0) arrive_and_expect_tx(&barrier_, bytes);
    }
    void expect_transaction(uint32_t bytes) const { expect_transaction(&barrier_, bytes); }
    static void arrive_and_expect_tx(const ValueType* barrier, uint32_t bytes) {
        emulation::arrive_at(barrier, 1, bytes);
    }
    static void expect_transaction(const ValueType* barrier, uint32_t bytes) {
        emulation::arrive_at(barrier, 0, bytes);
    }
};

inline void fence_barrier_init() { emulation::fence_mbarriers(); }
inline void fence_view_async_shared() { emulation::fence_proxy(); }
inline void umma_arrive(const uint64_t* barrier) {
    if (emulation::elect()) emulation::commit_tensor_products(barrier);
}
inline void fence_view_async_tmem_load() { emulation::wait_for_tensor_loads(); }

}  // namespace arch
}  // namespace cutlass
