"""Every op of the extension: native where it can run, plain torch in ``starflow_ext.reference_mode()``."""

from collections.abc import Mapping
from typing import Final

from starflow_ext import affine_forward as _affine_forward
from starflow_ext import affine_inverse as _affine_inverse
from starflow_ext import block_attention as _block_attention
from starflow_ext import jacobi_update as _jacobi_update
from starflow_ext import linear as _linear
from starflow_ext import norm as _norm
from starflow_ext import rope_append as _rope_append
from starflow_ext._spec import Spec
from starflow_ext.affine_forward import affine_forward
from starflow_ext.affine_inverse import affine_inverse
from starflow_ext.block_attention import block_attention
from starflow_ext.jacobi_solve import jacobi_solve
from starflow_ext.jacobi_sweep import jacobi_sweep
from starflow_ext.jacobi_update import jacobi_update
from starflow_ext.linear import linear
from starflow_ext.norm import norm
from starflow_ext.rope_append import rope_append

__all__ = [
    "affine_forward",
    "affine_inverse",
    "block_attention",
    "jacobi_solve",
    "jacobi_sweep",
    "jacobi_update",
    "linear",
    "norm",
    "rope_append",
]

# Variants of the solver's ops, which run on packed weights and caches of their own: too much state for a Spec.
LOOPS: Final[Mapping[str, tuple[str, ...]]] = dict.fromkeys(("jacobi_solve", "jacobi_sweep"), _linear.SPEC.variants)

# The ops that are functions of their tensors.
SPECS: Final[Mapping[str, Spec]] = {
    module.SPEC.name: module.SPEC
    for module in (
        _affine_forward,
        _affine_inverse,
        _block_attention,
        _jacobi_update,
        _linear,
        _norm,
        _rope_append,
    )
}
