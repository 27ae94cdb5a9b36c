"""Every op of the extension: native where it can run, plain torch in ``starflow_ext.reference_mode()``."""

from starflow_ext.affine_forward import affine_forward
from starflow_ext.affine_inverse import affine_inverse
from starflow_ext.jacobi_update import jacobi_update

__all__ = ["affine_forward", "affine_inverse", "jacobi_update"]
