// A view of torch's tensors through the stable ABI, in the words of this library.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "common/rows.h"

namespace starflow {

using torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;

std::optional<Dtype> dtype_of(const Tensor& tensor);
std::string type_text(ScalarType type);
std::string dtype_text(const Tensor& tensor);
std::string device_text(const Tensor& tensor);
std::string number_text(double value);
std::string shape_text(const std::vector<int64_t>& shape);
std::vector<int64_t> shape_of(const Tensor& tensor);
ScalarType arithmetic_type(Dtype dtype);
bool same_device(const Tensor& a, const Tensor& b);
bool has_shape(const Tensor& tensor, const std::vector<int64_t>& shape);
Tensor empty_like_shape(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type);

// The tensor itself where its channels lie side by side and its leading dimensions are one stride, else a copy.
Tensor with_rows(const Tensor& tensor);
// A small tensor (weights, tables) side by side and in another type, copied where it must be.
Tensor as_parameter(const Tensor& tensor, ScalarType type);
bool has_rows(const Tensor& tensor);
Rows rows_of(const Tensor& tensor);

}  // namespace starflow
