// Of CUTLASS's collectives the one of sm_90 that takes both operands from shared memory, or the one of sm_100: g++
// refuses the sources of others.
#pragma once
#include <cuda_runtime.h>
#include <cutlass/gemm/collective/collective_builder_decl.hpp>
#include <cutlass/gemm/collective/collective_mma_decl.hpp>
#ifdef EMULATION_SM100
#include <cutlass/gemm/collective/sm100_mma_warpspecialized.hpp>

#include <cutlass/gemm/collective/builders/sm100_umma_builder.inl>
#else
#include <cutlass/gemm/collective/sm90_mma_tma_gmma_ss_warpspecialized.hpp>

#include <cutlass/gemm/collective/builders/sm90_gmma_builder.inl>
#endif
