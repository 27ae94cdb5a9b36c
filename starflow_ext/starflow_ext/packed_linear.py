"""PackedLinear: a linear layer whose weight is packed for ``linear`` where no gradient of it is wanted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from starflow_ext._check import check_floating
from starflow_ext._options import WEIGHT_STORAGES, code_of
from starflow_ext._stamp import is_readable
from starflow_ext.linear import linear
from starflow_ext.linear_pack import DEVICE_STORAGES, PackedWeight, WeightStorage, pack_weight


class PackedLinear(nn.Linear):
    """``torch.nn.Linear`` that multiplies by a packed weight.

    The parameters are those of ``nn.Linear``, and so is the state dict. Packed values are made at the first call that
    needs them and again once the weight was replaced, moved, or holds something else: after ``load_state_dict``, a step
    of an optimiser, ``to``. A call looks at the version of the weight, at a few lines of its values, and at whether an
    optimiser made a step; ``repack`` is for a write to few values that counts no version (through ``.data`` or numpy).

    Where a gradient of the weight is wanted, in a compiled or exported graph, and for dtypes and devices that have no
    packed products, the layer computes what ``nn.Linear`` does, from the weight itself.

    Args:
        in_features, out_features, bias, device, dtype: as of ``nn.Linear``.
        storage: of the packed weight, as of ``pack_weight``; None keeps the dtype of the weight.

    Raises:
        RuntimeError: ``storage`` is unknown.

    Examples:
        >>> import torch, starflow_ext
        >>> layer = starflow_ext.PackedLinear.from_linear(torch.nn.Linear(3, 5))
        >>> with torch.no_grad():
        ...     out = layer(torch.ones(2, 3))
        >>> out.shape, sorted(layer.state_dict())
        (torch.Size([2, 5]), ['bias', 'weight'])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        storage: WeightStorage | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        if storage is not None:
            code_of("PackedLinear", "storage", storage, WEIGHT_STORAGES)
        self.storage = storage
        self._packed: PackedWeight | None = None

    @classmethod
    def from_linear(cls, layer: nn.Linear, storage: WeightStorage | None = None) -> PackedLinear:
        """Make the layer that has the parameters of another one, the tensors themselves.

        Args:
            layer: of class ``nn.Linear`` itself, without hooks, a ``forward`` of its own, or parameters, buffers and
                modules beside its weight and bias, which would be lost. Other attributes are taken over.
            storage: as of the class.

        Raises:
            RuntimeError: another layer, or an unknown storage.
        """
        if (why := _why_not(layer)) is not None:
            raise RuntimeError(f"PackedLinear: layer {why}, expected a plain torch.nn.Linear")
        made = cls(layer.in_features, layer.out_features, layer.bias is not None, "meta", storage=storage)
        made.weight, made.bias = layer.weight, layer.bias
        # What others put on a layer to find it there again.
        for name, held in vars(layer).items():
            vars(made).setdefault(name, held)
        return made.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), in the dtype of the weight or of autocast.

        Raises:
            RuntimeError: `input` is not floating point.
        """
        check_floating("PackedLinear", "input", input)
        packed = self._fresh()
        if packed is None:
            return linear(input, self.weight, self.bias)
        kind = input.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else self.weight.dtype
        return linear(input.to(dtype), packed, self.bias)

    def repack(self) -> None:
        """Drop the packed weight; the next call packs anew."""
        self._packed = None

    def _fresh(self) -> PackedWeight | None:
        weight = self.weight
        if torch.compiler.is_compiling() or (weight.requires_grad and torch.is_grad_enabled()):
            return None
        if not is_readable(weight) or weight.dtype == torch.float64:
            return None
        if weight.is_cuda and (self.storage or str(weight.dtype).removeprefix("torch.")) not in DEVICE_STORAGES:
            return None
        packed = self._packed
        if packed is None or packed.weight is not weight or not packed.is_fresh(exact=False):
            packed = self._packed = pack_weight(weight, self.storage)
        return packed

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and files hold: no packed values."""
        return {**self.__dict__, "_packed": None}

    def extra_repr(self) -> str:
        """Return the sizes and the storage."""
        return super().extra_repr() + ("" if self.storage is None else f", storage={self.storage!r}")


def swap_linears(model: nn.Module, storage: WeightStorage | None = None) -> list[str]:
    """Put a ``PackedLinear`` with the same parameters in the place of every plain ``torch.nn.Linear`` of a model.

    Args:
        model: changed in place. Layers of a class derived from ``nn.Linear``, and those with hooks, a ``forward`` or
            tensors of their own, stay as they are. A layer in several places becomes one.
        storage: as of ``PackedLinear``.

    Returns:
        Names of the layers that were replaced, as of ``named_modules``.

    Raises:
        RuntimeError: ``model`` is itself a linear layer (see ``PackedLinear.from_linear``), or an unknown storage.

    Examples:
        >>> import torch, starflow_ext
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> starflow_ext.swap_linears(model)
        ['0', '2']
    """
    if type(model) is nn.Linear:
        raise RuntimeError("swap_linears: model is a linear layer itself, expected one that holds such layers")
    made: dict[nn.Module, PackedLinear] = {}
    names = []
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) is not nn.Linear or _why_not(module) is not None:
            continue
        if module not in made:
            made[module] = PackedLinear.from_linear(module, storage)
        model.set_submodule(name, made[module])
        names.append(name)
    return names


def _why_not(layer: nn.Module) -> str | None:
    """What a layer has that a ``PackedLinear`` in its place would lose."""
    if type(layer) is not nn.Linear:
        return f"is of class {type(layer).__name__}"
    if "forward" in vars(layer):
        return "has a forward of its own"
    if any(held for name, held in vars(layer).items() if "_hooks" in name and isinstance(held, dict)):
        return "has hooks"
    if layer._buffers or layer._modules or set(layer._parameters) != {"weight", "bias"}:
        return "has parameters, buffers or modules beside weight and bias"
    return None
