// A packed weight (starflow_ext.PackedWeight) as the entries of ops see it: its tensors checked, and the kernels' view.
#pragma once
#include <string>
#include <vector>

#include "common/check.h"
#include "common/tensor.h"
#include "cpu/panels.h"

namespace starflow {

// One of "float32", "float16", "bfloat16", "int8", "two_bfloat16".
Storage storage_of(const char* op, const std::string& name);

ScalarType panels_type(Storage storage);
std::vector<int64_t> panels_shape(Storage storage, int64_t out_channels, int64_t in_channels);

// Without a bias. The tensors must live as long as the view.
Panels panels_of(const char* op, const Tensor& panels, const Tensor& column_scale, int64_t out_channels,
                 int64_t in_channels, const std::string& storage);

}  // namespace starflow
