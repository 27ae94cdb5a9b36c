// Schema, checks and choice of variant; the formula is in jacobi_update.h.
#include "ops/jacobi_update/jacobi_update.h"

#include <cmath>

#include "ops/affine_common/affine_check.h"
#include "ops/affine_common/run_rows.h"

namespace starflow {
namespace {

constexpr const char* op = "jacobi_update";

const cpu::Variants<JacobiUpdateKernels> variants{STARFLOW_VARIANTS(jacobi_update)};

Tensor run_update(Tensor x, Tensor z, Tensor raw, int64_t activation, double soft_clip, double guidance) {
    check_data(op, "x", x, true);
    check_like(op, "z", z, "x", x);
    require(
        guidance >= 0.0 && std::isfinite(guidance), op, "guidance is", [&] { return number_text(guidance); },
        [] { return "a finite number >= 0"; });
    const AffineShape shape = check_raw(op, "x", x, raw, activation, soft_clip, false, guidance > 0.0 ? 2 : 1);
    check_own_memory(op, "x", x);
    // The noise itself may be overwritten: an element is read before it is written.
    if (!is_same_view(x, z)) check_apart(op, "x", x, "z", z);
    check_apart(op, "x", x, "raw", raw);
    const Tensor target = with_rows(x);
    z = with_rows(z);
    raw = with_rows(raw);
    const Tensor change = empty_like_shape(x, {x.size(0), x.size(1)}, ScalarType::Float);
    const JacobiUpdateArgs args{
        shape, rows_of(target), rows_of(z), rows_of(raw), static_cast<float*>(change.data_ptr()), guidance};
    run_rows(op, "x", x, shape, args, variants.pick().update, jacobi_update_cuda);
    if (!has_rows(x)) torch::stable::copy_(x, target);
    return change;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(starflow_ext, m) {
    m.def(
        "jacobi_update(Tensor(a!) x, Tensor z, Tensor raw, int activation, float soft_clip, float guidance) -> Tensor");
}

STARFLOW_IMPLEMENT(m) { m.impl("jacobi_update", TORCH_BOX(&run_update)); }

}  // namespace starflow
