// Which of linear's CUDA kernels a device runs, and why. Host code, no torch and no CUDA.
//
// A function of the device, of the build and of the weight, and not of the rows: these would else change their bits
// with their number.
#pragma once
#include <cstdint>
#include <string>

#include "common/api.h"
#include "ops/linear/linear.h"

namespace starflow {

// `wgmma` and `tcgen05` run; the other values say why mma.sync does.
enum class LinearChoice : int32_t { wgmma, tcgen05, other_device, not_built, no_channels, unproven, asked };
inline constexpr const char* linear_choice_names[]{"wgmma",       "tcgen05",  "other_device", "not_built",
                                                   "no_channels", "unproven", "asked"};

// What set_linear_kernel was asked for: by_device leaves it to the device; `portable` is mma.sync; `own` is the kernel
// of the device's architecture, where it has one.
enum class LinearRequest : int32_t { by_device, portable, own };

// `major` belongs to the compute capability. The kernel for sm_100f has to be asked for: it has run on no device, and
// neither has any other here, but its promise of equal bits takes more of the hardware than that of mma.sync, and there
// is no day of a GPU with such a device (docs/cuda.md). The first device that passes turns `unproven` into `tcgen05`.
constexpr LinearChoice linear_choice(int major, int64_t channels, LinearRequest request, bool sm90, bool sm100) {
    if (major != 9 && major != 10) return LinearChoice::other_device;
    if (!(major == 9 ? sm90 : sm100)) return LinearChoice::not_built;
    if (channels == 0) return LinearChoice::no_channels;  // TMA takes no matrix without columns
    if (request == LinearRequest::portable) return LinearChoice::asked;
    if (major == 9) return LinearChoice::wgmma;
    return request == LinearRequest::own ? LinearChoice::tcgen05 : LinearChoice::unproven;
}

// The same for this build and what was asked for.
STARFLOW_API LinearChoice linear_choice_of(int major, int64_t channels);

// Of weights that have channels.
LinearKernel linear_kernel(int major);

// Ask for a kernel: "portable", "own", or "" for the one that the device has by itself. Rounding changes
// with it. Throws std::runtime_error for another name.
STARFLOW_API void set_linear_kernel(const std::string& name);

}  // namespace starflow
