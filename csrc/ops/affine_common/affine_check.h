// Checks and views that the entries of the affine ops share.
#pragma once
#include <string>

#include "common/check.h"
#include "common/tensor.h"
#include "ops/affine_common/affine_args.h"

namespace starflow {

// Checks dtype, dimensions and device of the tensor that is transformed.
void check_data(const char* op, const char* name, const Tensor& data, bool three_dimensional);

void check_soft_clip(const char* op, double soft_clip);

// Checks raw and the options against the transformed tensor; `halves` is 2 with guidance. Returns the kernels' view.
AffineShape check_raw(const char* op, const char* name, const Tensor& data, const Tensor& raw, int64_t activation,
                      double soft_clip, bool shifted, int64_t halves = 1);

// Checks the gradient of log_det: (..., tokens) in the type of the arithmetic.
void check_log_det(const char* op, const Tensor& grad_log_det, const Tensor& data, const AffineShape& shape);

}  // namespace starflow
