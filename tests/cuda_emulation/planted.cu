// Kernels with mistakes in them, which the emulated device must notice.
#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"
#include "cuda/declare.h"
#include "cuda/enqueue.cuh"
#include "cuda/named_barrier.cuh"
#include "cuda/signal.cuh"

namespace starflow {

enum class Mistake : int32_t {
    none,
    no_barrier,
    no_second_barrier,
    half_barrier,
    past_shared,
    past_tensor,
    before_tensor,
    lane_not_in_mask,
    two_masks,
    lane_that_left,
    misaligned,
    too_many_threads,
    past_own_array,
};

struct ReverseArgs {
    const float* x;
    float* out;
    int64_t blocks;
    int32_t threads;
    Mistake mistake;
};

enum class ChainMistake : int32_t { none, reads_at_once, writes_at_once, never_waits, waits_for_itself };

struct ChainArgs {
    const float* x;
    float* out;
    int32_t* counts;
    int64_t blocks;
    ChainMistake mistake;
};

enum class HandMistake : int32_t {
    none,
    no_arrival,
    early_arrival,
    no_wait_for_full,
    no_wait_for_empty,
    one_too_many,
    nobody_waits,
    other_count,
};

struct HandArgs {
    const float* x;
    float* out;
    HandMistake mistake;
};

enum class TurnMistake : int32_t {
    none,
    no_wait,
    no_barrier_behind_the_wait,
    no_barrier_before_the_signal,
    no_fence,
    no_signal,
};

struct TurnArgs {
    const float* x;
    float* out;
    int32_t* counts;
    int64_t blocks;
    TurnMistake mistake;
};

// out = 64 numbers x times the blocks, each of which adds them to out behind those before it.
STARFLOW_DECLARE_CUDA(TurnArgs, turns_cuda)

// out = x, 3 times 32 numbers, by two warps: one puts them into shared memory, the other takes them from there.
STARFLOW_DECLARE_CUDA(HandArgs, hand_cuda)

// out = x + 1 by two launches of 32 threads a block, of which the second begins early and each of its blocks follows
// those before it.
STARFLOW_DECLARE_CUDA(ChainArgs, chain_cuda)

// out = x backwards within each block, twice: by dynamic and by static shared memory.
STARFLOW_DECLARE_CUDA(ReverseArgs, reverse_cuda)

namespace {

using namespace cuda;

__global__ void reverse_kernel(ReverseArgs args) {
    STARFLOW_SHARED_MEMORY(bytes);
    __shared__ float again[1024];
    float* values = reinterpret_cast<float*>(bytes);
    const int t = static_cast<int>(threadIdx.x);
    const int n = static_cast<int>(blockDim.x);
    const Mistake mistake = args.mistake;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * n;
    const int64_t from = first + t + (mistake == Mistake::past_tensor ? 1 : mistake == Mistake::before_tensor ? -1 : 0);
    values[mistake == Mistake::past_shared ? t + 1 : t] = args.x[from];
    if (mistake == Mistake::half_barrier) {
        if (t % 2 == 0) {
            __syncwarp();
        } else {
            __syncthreads();
        }
        return;
    }
    if (mistake != Mistake::no_barrier) __syncthreads();
    again[t] = values[n - 1 - t];
    __syncthreads();
    const float value = again[n - 1 - t];
    if (mistake != Mistake::no_second_barrier) __syncthreads();
    again[t] = values[t];
    float out = value + again[t] - again[t] - value + values[n - 1 - t];
    if (mistake == Mistake::lane_not_in_mask) out = __shfl_sync(1U, out, 0);
    if (mistake == Mistake::two_masks) out = __shfl_sync(t % 32 < 16 ? ~0U : 0xffff0000U, out, t % 32);
    if (mistake == Mistake::lane_that_left) {
        if (t % 32 == 3) return;
        out = __shfl_sync(~0U, out, 3);
    }
    if (mistake == Mistake::misaligned) {
        *reinterpret_cast<float4*>(args.out + first + 1) = float4{};
    }
    if (mistake == Mistake::past_own_array) {
        float own[4];
        for (int i = 0; i <= 4; ++i) *(volatile float*)(own + i) = out;
        out = own[t % 4];
    }
    args.out[first + t] = out;
}

__global__ void hand_kernel(HandArgs args) {
    constexpr int full = 1;
    constexpr int empty = 2;
    constexpr int turns = 3;
    constexpr int both = 64;
    STARFLOW_SHARED_MEMORY(bytes);
    float* const value = reinterpret_cast<float*>(bytes) + threadIdx.x % 32;
    const HandMistake mistake = args.mistake;
    for (int turn = 0; turn < turns; ++turn) {
        const int64_t i = turn * 32 + threadIdx.x % 32;
        if (threadIdx.x < 32) {
            if (turn > 0 && mistake != HandMistake::no_wait_for_empty) sync_named<both>(empty);
            if (mistake == HandMistake::early_arrival) arrive_named<both>(full);
            *value = args.x[i];
            if (mistake == HandMistake::other_count) {
                arrive_named<96>(full);
            } else if (mistake != HandMistake::no_arrival && mistake != HandMistake::early_arrival) {
                arrive_named<both>(full);
            }
        } else {
            if (mistake == HandMistake::nobody_waits) {
                arrive_named<both>(full);
            } else if (mistake != HandMistake::no_wait_for_full) {
                sync_named<both>(full);
            }
            args.out[i] = *value;
            if (turn + 1 < turns || mistake == HandMistake::one_too_many) arrive_named<both>(empty);
        }
    }
}

__global__ void copy_kernel(ChainArgs args) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    args.out[i] = args.x[i];
    if (i == 0) *args.counts = 0;
}

__global__ void add_one_kernel(ChainArgs args) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    float value = args.x[i];  // which no launch writes
    if (args.mistake == ChainMistake::reads_at_once) value = args.out[i];
    if (args.mistake == ChainMistake::writes_at_once) args.out[i] = value;
    if (args.mistake == ChainMistake::never_waits) return;
    await_earlier_launches();
    const auto before = static_cast<int32_t>(blockIdx.x);
    if (threadIdx.x == 0)
        wait_for_signals(args.counts, before + (args.mistake == ChainMistake::waits_for_itself ? 1 : 0));
    __syncthreads();
    args.out[i] += value - args.x[i] + 1.0F;
    __syncthreads();
    if (threadIdx.x == 0) signal(args.counts);
}

__global__ void turns_kernel(TurnArgs args) {
    const TurnMistake mistake = args.mistake;
    const auto turn = static_cast<int32_t>(blockIdx.x);
    float sum = args.x[threadIdx.x];
    if (turn > 0) {
        if (threadIdx.x == 0 && mistake != TurnMistake::no_wait) wait_for_signals(args.counts, turn);
        if (mistake != TurnMistake::no_barrier_behind_the_wait) __syncthreads();
        sum += args.out[threadIdx.x];
    }
    args.out[threadIdx.x] = sum;
    if (mistake != TurnMistake::no_barrier_before_the_signal) __syncthreads();
    if (threadIdx.x > 0 || mistake == TurnMistake::no_signal) return;
    if (mistake == TurnMistake::no_fence) {
        atomicAdd(args.counts, 1);
    } else {
        signal(args.counts);
    }
}

}  // namespace

int turns_cuda(const TurnArgs& args, void* stream) {
    return enqueue(turns_kernel, static_cast<unsigned>(args.blocks), 64, 0, stream, args);
}

int hand_cuda(const HandArgs& args, void* stream) {
    return enqueue(hand_kernel, 1, 64, 32 * sizeof(float), stream, args);
}

int chain_cuda(const ChainArgs& args, void* stream) {
    const auto blocks = static_cast<unsigned>(args.blocks);
    const int code = enqueue(copy_kernel, blocks, 32, 0, stream, args);
    return code != 0 ? code : enqueue_early(true, add_one_kernel, blocks, 32, 0, stream, args);
}

int reverse_cuda(const ReverseArgs& args, void* stream) {
    const unsigned threads = args.mistake == Mistake::too_many_threads ? 2048 : args.threads;
    return enqueue(reverse_kernel, static_cast<unsigned>(args.blocks), threads, args.threads * sizeof(float), stream,
                   args);
}

}  // namespace starflow
