// STARFLOW_DECLARE_CUDA(Args, name): the launcher that <op>.cu defines; null in a build without CUDA. It enqueues on
// the stream and returns the runtime's error code.
#pragma once

#if STARFLOW_CUDA
#define STARFLOW_DECLARE_CUDA(Args, name) int name(const Args& args, void* stream);
#else
#define STARFLOW_DECLARE_CUDA(Args, name) inline constexpr int (*name)(const Args& args, void* stream) = nullptr;
#endif
