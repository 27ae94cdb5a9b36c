// CUTLASS's turn-taking of blocks on the emulated device, where blocks run in order: a turn that has not come never
// will.
#pragma once
#include <cuda_runtime.h>
#include <cutlass/cutlass.h>

namespace cutlass {

class Semaphore {
  public:
    Semaphore(int* lock, int thread) : lock_(lock), first_(thread <= 0) {}

    void fetch() {
        if (first_) state_ = *lock_;
    }
    int get_state() const { return state_; }
    void wait(int status = 0) {
        fetch();
        if (first_ && state_ != status) emulation::fail("a block waits for the turn %d, at %d", status, state_);
        __syncthreads();
    }
    void release(int status = 0) {
        __syncthreads();
        if (first_) *lock_ = status;
    }

  private:
    int* lock_;
    bool first_;
    int state_ = -1;
};

}  // namespace cutlass
