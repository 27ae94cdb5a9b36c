// Schema, checks and choice of variant; the formula is in affine_forward.h.
#include "ops/affine_forward/affine_forward.h"

#include "ops/affine_common/affine_check.h"
#include "ops/affine_common/run_rows.h"

namespace starflow {
namespace {

constexpr const char* op = "affine_forward";
constexpr const char* backward_op = "affine_forward_backward";

const cpu::Variants<AffineForwardKernels> variants{STARFLOW_VARIANTS(affine_forward)};

std::tuple<Tensor, Tensor> run_forward(Tensor x, Tensor raw, int64_t activation, double soft_clip, bool shifted) {
    check_data(op, "x", x, false);
    const AffineShape shape = check_raw(op, "x", x, raw, activation, soft_clip, shifted);
    x = with_rows(x);
    raw = with_rows(raw);
    const std::vector<int64_t> sizes = shape_of(x);
    const Tensor z = new_result(x);
    const Tensor log_det = empty_like_shape(x, {sizes.begin(), sizes.end() - 1}, arithmetic_type(shape.data));
    const AffineForwardArgs args{shape, rows_of(x), rows_of(raw), rows_of(z), log_det.data_ptr(), worth_streaming(z)};
    run_rows(op, "x", x, shape, args, variants.pick().forward, affine_forward_cuda);
    return {z, log_det};
}

std::tuple<Tensor, Tensor> run_backward(Tensor grad_z, Tensor grad_log_det, Tensor x, Tensor raw, int64_t activation,
                                        double soft_clip, bool shifted) {
    check_data(backward_op, "x", x, false);
    const AffineShape shape = check_raw(backward_op, "x", x, raw, activation, soft_clip, shifted);
    check_like(backward_op, "grad_z", grad_z, "x", x);
    check_log_det(backward_op, grad_log_det, x, shape);
    x = with_rows(x);
    raw = with_rows(raw);
    grad_z = with_rows(grad_z);
    grad_log_det = torch::stable::contiguous(grad_log_det);
    const Tensor grad_x = new_result(x);
    const Tensor grad_raw = new_result(raw);
    const AffineForwardBackwardArgs args{shape,
                                         rows_of(x),
                                         rows_of(raw),
                                         rows_of(grad_z),
                                         grad_log_det.data_ptr(),
                                         rows_of(grad_x),
                                         rows_of(grad_raw),
                                         worth_streaming(grad_x) && worth_streaming(grad_raw)};
    run_rows(backward_op, "x", x, shape, args, variants.pick().backward, affine_forward_backward_cuda);
    return {grad_x, grad_raw};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(starflow_ext, m) {
    m.def("affine_forward(Tensor x, Tensor raw, int activation, float soft_clip, bool shifted) -> (Tensor, Tensor)");
    m.def(
        "affine_forward_backward(Tensor grad_z, Tensor grad_log_det, Tensor x, Tensor raw, int activation, "
        "float soft_clip, bool shifted) -> (Tensor, Tensor)");
}

STARFLOW_IMPLEMENT(m) {
    m.impl("affine_forward", TORCH_BOX(&run_forward));
    m.impl("affine_forward_backward", TORCH_BOX(&run_backward));
}

}  // namespace starflow
