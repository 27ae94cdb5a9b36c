// Schema, checks and choice of variant; the formula is in affine_inverse.h.
#include "ops/affine_inverse/affine_inverse.h"

#include "ops/affine_common/affine_check.h"
#include "ops/affine_common/run_rows.h"

namespace starflow {
namespace {

constexpr const char* op = "affine_inverse";
constexpr const char* backward_op = "affine_inverse_backward";

const cpu::Variants<AffineInverseKernels> variants{STARFLOW_VARIANTS(affine_inverse)};

Tensor run_forward(Tensor z, Tensor raw, int64_t activation, double soft_clip, bool shifted) {
    check_data(op, "z", z, false);
    const AffineShape shape = check_raw(op, "z", z, raw, activation, soft_clip, shifted);
    z = with_rows(z);
    raw = with_rows(raw);
    const Tensor x = new_result(z);
    const AffineInverseArgs args{shape, rows_of(z), rows_of(raw), rows_of(x), worth_streaming(x)};
    run_rows(op, "z", z, shape, args, variants.pick().forward, affine_inverse_cuda);
    return x;
}

std::tuple<Tensor, Tensor> run_backward(Tensor grad_x, Tensor z, Tensor raw, int64_t activation, double soft_clip,
                                        bool shifted) {
    check_data(backward_op, "z", z, false);
    const AffineShape shape = check_raw(backward_op, "z", z, raw, activation, soft_clip, shifted);
    check_like(backward_op, "grad_x", grad_x, "z", z);
    z = with_rows(z);
    raw = with_rows(raw);
    grad_x = with_rows(grad_x);
    const Tensor grad_z = new_result(z);
    const Tensor grad_raw = new_result(raw);
    const AffineInverseBackwardArgs args{shape,
                                         rows_of(z),
                                         rows_of(raw),
                                         rows_of(grad_x),
                                         rows_of(grad_z),
                                         rows_of(grad_raw),
                                         worth_streaming(grad_z) && worth_streaming(grad_raw)};
    run_rows(backward_op, "z", z, shape, args, variants.pick().backward, affine_inverse_backward_cuda);
    return {grad_z, grad_raw};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(starflow_ext, m) {
    m.def("affine_inverse(Tensor z, Tensor raw, int activation, float soft_clip, bool shifted) -> Tensor");
    m.def(
        "affine_inverse_backward(Tensor grad_x, Tensor z, Tensor raw, int activation, float soft_clip, bool shifted) "
        "-> (Tensor, Tensor)");
}

STARFLOW_IMPLEMENT(m) {
    m.impl("affine_inverse", TORCH_BOX(&run_forward));
    m.impl("affine_inverse_backward", TORCH_BOX(&run_backward));
}

}  // namespace starflow
