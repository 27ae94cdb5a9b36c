// Of CUTLASS's collectives the one of sm_90 that takes both operands from shared memory: g++ refuses the sources of
// others.
#pragma once
#include <cuda_runtime.h>
#include <cutlass/gemm/collective/collective_builder_decl.hpp>
#include <cutlass/gemm/collective/collective_mma_decl.hpp>
#include <cutlass/gemm/collective/sm90_mma_tma_gmma_ss_warpspecialized.hpp>

#include <cutlass/gemm/collective/builders/sm90_gmma_builder.inl>
