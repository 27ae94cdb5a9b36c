// A packed weight (starflow_ext.PackedWeight) as the entries of ops see it: its tensors checked, and the kernels' view.
#pragma once
#include <string>
#include <vector>

#include "common/check.h"
#include "common/tensor.h"
#include "cpu/panels.h"
#include "ops/linear/linear_schedule.h"

namespace starflow {

// The name of a storage in quotes, for messages.
std::string quoted(MatrixStorage storage);

ScalarType panels_type(MatrixStorage storage);
std::vector<int64_t> panels_shape(MatrixStorage storage, int64_t out_channels, int64_t in_channels);

// Without a bias. The tensors must live as long as the view.
Panels panels_of(const char* op, const Tensor& panels, const Tensor& column_scale, int64_t out_channels,
                 int64_t in_channels, MatrixStorage storage);

// On CUDA a packed weight has no panels: `panels` is the matrix itself, (out_channels, in_channels) in bfloat16 or
// float16, its rows padded with zeros to a multiple of linear_row_multiple.
std::vector<int64_t> device_rows_shape(int64_t out_channels, int64_t in_channels);
void check_device_storage(const char* op, MatrixStorage storage, const Tensor& on_device);
Panels device_rows_of(const char* op, const Tensor& panels, const Tensor& column_scale, int64_t out_channels,
                      int64_t in_channels, MatrixStorage storage);

}  // namespace starflow
