// CUTLASS's pipelines of sm_100, for sources of sm_100 alone: g++ takes them with -fpermissive.
#pragma once
#ifdef EMULATION_SM100
#include <cuda_runtime.h>
#include_next <cutlass/pipeline/sm100_pipeline.hpp>
#endif
