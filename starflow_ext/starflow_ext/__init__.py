"""The ops of starflow: kernels behind plain functions of torch tensors."""

from starflow_ext import ops
from starflow_ext._explain import Explanation, explain
from starflow_ext._info import Info, info
from starflow_ext._load import native
from starflow_ext._mode import reference_mode
from starflow_ext.block_attention import FrameMask
from starflow_ext.linear import InputNorm
from starflow_ext.linear_pack import PackedWeight, pack_weight
from starflow_ext.packed_linear import PackedLinear, swap_linears
from starflow_ext.rope_append import Cache, Rotation

__version__: str = str(native.build_info()["version"])

__all__ = [
    "Cache",
    "Explanation",
    "FrameMask",
    "Info",
    "InputNorm",
    "PackedLinear",
    "PackedWeight",
    "Rotation",
    "__version__",
    "explain",
    "info",
    "ops",
    "pack_weight",
    "reference_mode",
    "swap_linears",
]
