// CUTLASS's own kernel on the emulated device, where nobody launches it.
#pragma once

namespace cutlass {
template <class Operator>
void device_kernel(const typename Operator::Params params);
}  // namespace cutlass
