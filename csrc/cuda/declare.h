// STARFLOW_DECLARE_CUDA(Args, name): the launcher that <op>.cu defines; null in a build without CUDA. It enqueues on
// the stream and returns the runtime's error code. STARFLOW_DECLARE_SM90 is the same for <op>_sm90.cu, which a build
// without sm_90a lacks, and STARFLOW_DECLARE_SM100 for <op>_sm100.cu, which one without sm_100f lacks.
#pragma once

#if STARFLOW_CUDA
#define STARFLOW_DECLARE_CUDA(Args, name) int name(const Args& args, void* stream);
#else
#define STARFLOW_DECLARE_CUDA(Args, name) inline constexpr int (*name)(const Args& args, void* stream) = nullptr;
#endif

#if STARFLOW_SM90
#define STARFLOW_DECLARE_SM90(Args, name) int name(const Args& args, void* stream);
#else
#define STARFLOW_DECLARE_SM90(Args, name) inline constexpr int (*name)(const Args& args, void* stream) = nullptr;
#endif

#if STARFLOW_SM100
#define STARFLOW_DECLARE_SM100(Args, name) int name(const Args& args, void* stream);
#else
#define STARFLOW_DECLARE_SM100(Args, name) inline constexpr int (*name)(const Args& args, void* stream) = nullptr;
#endif
