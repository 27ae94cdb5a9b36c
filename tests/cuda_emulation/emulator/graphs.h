// Streams that capture, graphs, and conditional nodes of the device in software. The functions of the CUDA runtime that
// make and launch them are in graphs.cpp, under their own names and by their own rules: csrc/cuda/repeat.cuh runs as it
// is. Launches that are captured are kept with their arguments, and run when the graph is launched, as on a device.
#pragma once
#include "runtime.h"

namespace emulation {

// Run, or keep where the stream captures; arguments as of `launch`. The closure is copied byte by byte.
EMULATION_API int launch_on(void* stream, const Launch& how, void (*run)(const void*), const void* closure,
                            size_t closure_bytes);

EMULATION_API void set_conditional(unsigned long long handle, unsigned value);

}  // namespace emulation

inline void cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned value) {
    emulation::set_conditional(handle, value);
}

extern "C" {
// Streams, graphs and executable graphs that were made and not destroyed.
EMULATION_API int emulation_live_objects();
// The n-th next call of the runtime in graphs.cpp fails; 0: none does.
EMULATION_API void emulation_fail_call(int n);
}
