"""linear_pack: a weight rearranged once into what the products of ``linear`` read: panels, on CUDA padded rows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final, Literal

import torch
from torch import Tensor

from starflow_ext._check import require
from starflow_ext._load import operators
from starflow_ext._options import CONSTANTS, WEIGHT_STORAGES, code_of, name_of
from starflow_ext._stamp import Stamp

WeightStorage = Literal["float32", "float16", "bfloat16", "int8", "two_bfloat16"]

_DTYPES: Final[dict[str, torch.dtype]] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "two_bfloat16": torch.bfloat16,
}
_OWN: Final[dict[torch.dtype, WeightStorage]] = {
    torch.float64: "float32",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}

# Output channels of a panel, and the multiple that its depth is padded to (csrc/cpu/panels.h).
PANEL_COLUMNS: Final = CONSTANTS["panel_columns"]
DEPTH_MULTIPLE: Final = CONSTANTS["depth_multiple"]

# On CUDA: storages that tensor cores take, and the multiple that rows are padded to
# (csrc/ops/linear/linear_schedule.h).
DEVICE_STORAGES: Final = ("float16", "bfloat16")
ROW_MULTIPLE: Final = CONSTANTS["linear_row_multiple"]


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight of ``linear`` in the order that its kernels read; made by ``pack_weight``.

    Attributes:
        panels: the packed values; layout in ``csrc/cpu/panels.h``. On CUDA the matrix itself, its rows padded with
            zeros to a multiple of 16 bytes.
        column_scale: (out_channels,) float32 for storage "int8", else empty.
        out_channels, in_channels: shape of the weight.
        storage: format of the packed values.
        weight: the original, for state dicts and gradients; None where it was dropped.
        stamp: what the original held, where it is kept.
    """

    panels: Tensor
    column_scale: Tensor
    out_channels: int
    in_channels: int
    storage: WeightStorage
    weight: Tensor | None = None
    stamp: Stamp | None = field(default=None, repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_channels, in_channels)."""
        return self.out_channels, self.in_channels

    @property
    def device(self) -> torch.device:
        """The device that holds the packed weight, and that its operands must be on."""
        return self.panels.device

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight that a product reads, without the original where that is kept."""
        return self.panels.nbytes + self.column_scale.nbytes

    def is_fresh(self, *, exact: bool = True) -> bool:
        """Return whether the original, where it is kept, still holds the values that were packed.

        Args:
            exact: read the original whole (some 20 GB/s on the CPU). With False its version, a few lines of its values
                and the steps of torch's optimisers decide: a write to few values that counts no version is missed.
        """
        return self.weight is None or self.stamp is None or self.stamp.holds(self.weight, exact=exact)

    def unpack(self) -> Tensor:
        """Return the weight as products see it, rounded to the storage: (out_channels, in_channels), float32."""
        return unpack(self.panels, self.column_scale, self.out_channels, self.in_channels, self.storage)


def pack_weight(weight: Tensor, storage: WeightStorage | None = None, *, keep: bool = True) -> PackedWeight:
    """Rearrange a weight for ``linear``, once for many calls.

    Args:
        weight: (out_channels, in_channels), on the CPU or a CUDA device, any strides; float32, bfloat16, float16 or
            float64.
        storage: "float32", "float16" and "bfloat16" round to that type; "two_bfloat16" keeps the sum of two, 16 of
            float32's 24 bits; "int8" keeps 255 steps an output channel, from ``-max |weight|`` to ``max |weight|``.
            None: the dtype of the weight (float32 for float64). On CUDA "bfloat16" and "float16" alone, which are what
            tensor cores multiply: weights of another dtype are rounded by asking for it.
        keep: hold on to ``weight``, for state dicts and its gradient. With False only the packed copy remains.

    Returns:
        The packed weight. It is a copy that does not follow later changes of ``weight``: ``linear`` refuses it once a
        ``weight`` that it keeps has changed. ``PackedLinear`` packs again by itself.

    Raises:
        RuntimeError: if a dtype, a shape or the device is wrong, or "int8" meets NaN or infinity.

    Examples:
        >>> import torch, starflow_ext
        >>> packed = starflow_ext.pack_weight(torch.eye(3, 5), "bfloat16")
        >>> packed.shape, torch.equal(packed.unpack(), torch.eye(3, 5))
        ((3, 5), True)
    """
    packed = pack_for_call(weight, storage)
    if not keep:
        return replace(packed, weight=None)
    # A compiled graph cannot read values.
    return packed if torch.compiler.is_compiling() else replace(packed, stamp=Stamp(weight))


def pack_for_call(weight: Tensor, storage: WeightStorage | None = None) -> PackedWeight:
    """Pack a weight for one call: it keeps the original and does not see whether that changes; see ``pack_weight``."""
    require(weight.device.type in ("cpu", "cuda"), "linear_pack", "weight is on", weight.device, "cpu or cuda")
    if storage is None:
        storage = _OWN.get(weight.dtype, "float32")
    code = code_of("linear_pack", "storage", storage, WEIGHT_STORAGES)
    panels, column_scale = _native(weight.detach(), code)
    return PackedWeight(panels, column_scale, weight.shape[0], weight.shape[1], storage, weight)


def unpack(panels: Tensor, column_scale: Tensor, out_channels: int, in_channels: int, storage: str) -> Tensor:
    """Turn panels back into (out_channels, in_channels) float32, in plain torch; arguments as of ``PackedWeight``."""
    values = panels.float()
    if panels.dim() == 2:
        return values.narrow(1, 0, in_channels).contiguous()
    if storage == "two_bfloat16":
        values = values.sum(dim=1)
    if storage in ("bfloat16", "two_bfloat16"):
        values = values.transpose(2, 3).flatten(1, 2)
    weight = values.transpose(1, 2).flatten(0, 1)[:out_channels, :in_channels]
    return weight * column_scale[:, None] if storage == "int8" else weight.contiguous()


def panels_shape(storage: str, out_channels: int, in_channels: int) -> list[int]:
    """Return the shape of the panels, as ``csrc/ops/linear/packed_weight.cpp`` does."""
    count = -(-out_channels // PANEL_COLUMNS)
    depth = -(-in_channels // DEPTH_MULTIPLE) * DEPTH_MULTIPLE
    if storage == "bfloat16":
        return [count, depth // 2, PANEL_COLUMNS, 2]
    if storage == "two_bfloat16":
        return [count, 2, depth // 2, PANEL_COLUMNS, 2]
    return [count, depth, PANEL_COLUMNS]


def device_rows_shape(out_channels: int, in_channels: int) -> list[int]:
    """Return the shape of a weight packed on CUDA, as ``csrc/ops/linear/packed_weight.cpp`` does."""
    return [out_channels, -(-in_channels // ROW_MULTIPLE) * ROW_MULTIPLE]


def check_device_storage(storage: str, device: torch.device) -> None:
    """Check that products on the device take this storage."""
    expected = f'"bfloat16" or "float16" for a weight on {device}'
    require(storage in DEVICE_STORAGES, "linear_pack", "storage is", f'"{storage}"', expected)


_native = operators().linear_pack.default


def _fake(weight: Tensor, code: int) -> tuple[Tensor, Tensor]:
    storage = name_of("linear_pack", "storage", code, WEIGHT_STORAGES)
    out_channels, in_channels = weight.shape
    if weight.is_cuda:
        check_device_storage(storage, weight.device)
        shape = device_rows_shape(out_channels, in_channels)
    else:
        shape = panels_shape(storage, out_channels, in_channels)
    panels = weight.new_empty(shape, dtype=_DTYPES[storage])
    return panels, weight.new_empty([out_channels if storage == "int8" else 0], dtype=torch.float32)


torch.library.register_fake("starflow_ext::linear_pack", _fake)
