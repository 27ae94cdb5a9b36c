// linear: out = residual + epilogue(norm(x) W^T + bias) * multiply, with W in packed panels (csrc/cpu/panels.h).
//
// x (rows, in_channels); W (out_channels, in_channels); multiply, residual, out (rows, out_channels). Sums, epilogue
// and norm are float32; x enters the product as `activations` says.
// Memory: the panels once for each block of rows, x and out once. Up to a few hundred rows the panels are nearly all of
// it: 16 rows times 3072 x 3072 in bfloat16 read 19 MB for 0.3 GFLOP.
#pragma once
#include "common/dtype.h"
#include "cpu/norm_kind.h"
#include "cpu/panels.h"
#include "cpu/variants.h"

namespace starflow {

enum class Epilogue : int32_t { none, gelu, gelu_tanh };

// Rows whose channels lie side by side; the stride in elements. No data: not there.
struct Matrix {
    void* data;
    int64_t row_stride;
    Dtype dtype;  // float32, bfloat16 or float16
};

struct LinearArgs {
    Panels weights;  // with its bias
    Matrix x;
    int64_t rows;
    RowNorm norm;
    Activations activations;
    Epilogue epilogue;
    Matrix multiply;
    Matrix residual;
    Matrix out;
    Matrix product;     // gets x W^T + bias, for the gradient
    int64_t row_block;  // rows that pass over the panels together
};

// Items [begin, end): a block of rows times a panel, panels running fastest.
struct LinearKernels {
    int64_t (*scratch_bytes)(const LinearArgs& args);
    void (*multiply)(const LinearArgs& args, int64_t begin, int64_t end, void* scratch);
};

STARFLOW_DECLARE_DOT_VARIANTS(LinearKernels, linear)

}  // namespace starflow
