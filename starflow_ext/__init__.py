"""The ops of starflow: kernels behind plain functions of torch tensors."""

from starflow_ext import ops
from starflow_ext._mode import reference_mode

__all__ = ["ops", "reference_mode"]
