"""Packed weights of a network, made once and kept while the weights stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from starflow.mapped import release
from starflow.model.conditioner import Conditioner
from starflow.model.layers import MLP, Attention, Int8Linear, Layer, Norm, Transformer
from starflow_ext.linear_pack import PackedWeight, WeightStorage, pack_weight
from starflow_ext.rope_append import Pairing
from starflow_ext.sweep_block import BlockWeights, LayerWeights, PackedLinear, head_order, pack_qkv


@dataclass(frozen=True)
class PackedNetwork:
    """The weights of a conditioner.

    Args:
        block: weights that every sweep reads. text, position, summary: projections that are computed once for a clip;
            None where the network lacks one.
    """

    block: BlockWeights
    text: PackedLinear | None
    position: PackedLinear | None
    summary: PackedLinear | None


class _Stamp:
    """A snapshot of the parameters of a module and of all modules in it, which shows whether one was changed since.

    It lists them once and is compared before each clip: walking the tree of modules again takes three times as long.
    """

    def __init__(self, module: nn.Module) -> None:
        holders = list(module.modules())
        self._modules = [(held._modules, name, child) for held in holders for name, child in held._modules.items()]
        self._parameters = [
            (held._parameters, name, parameter, *_state(parameter))
            for held in holders
            for name, parameter in held._parameters.items()
        ]

    def holds(self) -> bool:
        """Whether every module and parameter is in its place and no value was changed in place."""
        for modules, name, child in self._modules:
            if modules.get(name) is not child:
                return False
        for parameters, name, parameter, pointer, version in self._parameters:
            if parameters.get(name) is not parameter:
                return False
            if parameter is None:
                continue
            if parameter.data_ptr() != pointer or (version is not None and parameter._version != version):
                return False
        return True


def _state(parameter: nn.Parameter | None) -> tuple[int, int | None]:
    """Address and version of a parameter's values; tensors made in inference mode have no version (None)."""
    if parameter is None:
        return 0, None
    return parameter.data_ptr(), None if parameter.is_inference() else parameter._version


# Packed weights of each network by kind of packing, each with the snapshot that they were made from.
_kept: WeakKeyDictionary[Transformer, dict[str | None, tuple[_Stamp, Any]]] = WeakKeyDictionary()
# Networks whose weights are mapped from a file: once a layer is packed, its own pages go back to the system.
_mapped: WeakSet[Transformer] = WeakSet()


_Packed = TypeVar("_Packed")


def _keep(network: Transformer, how: str | None, pack: Callable[[], _Packed]) -> _Packed:
    by_way = _kept.setdefault(network, {})
    kept = by_way.get(how)
    if kept is None or not kept[0].holds():
        kept = by_way[how] = _Stamp(network), pack()
    packed: _Packed = kept[1]
    return packed


def pack_conditioner(conditioner: Conditioner, storage: WeightStorage | None = None) -> PackedNetwork:
    """The network of a block as native decoding reads it.

    Packing reads every weight once, so the result is kept with the module and made again only when a parameter was
    changed or replaced. A write through a parameter's `.data` is not noticed; call `forget` after one.

    Args:
        conditioner: the network; its packed weights are on its device.
        storage: of the weights (see `starflow_ext.pack_weight`); None keeps their own dtype.
    """
    return _keep(conditioner, storage, lambda: _pack(conditioner, storage))


def pack_linears(network: Transformer) -> dict[nn.Module, PackedWeight]:
    """The weights of all linear layers of a network in their own dtype, kept like those of `pack_conditioner`."""
    return _keep(network, "linears", lambda: _pack_linears(network))


def forget(network: Transformer) -> None:
    """Drops the packed weights of a network."""
    _kept.pop(network, None)


def keep_mapped(module: nn.Module) -> None:
    """Marks the networks in a module as mapped from a file, so that packing leaves one copy in memory."""
    _mapped.update(network for network in module.modules() if isinstance(network, Transformer))


@torch.no_grad()
def _pack_linears(network: Transformer) -> dict[nn.Module, PackedWeight]:
    packed: dict[nn.Module, PackedWeight] = {}
    for linear in network.modules():
        if isinstance(linear, nn.Linear | Int8Linear):
            packed[linear] = pack_weight(linear.weight, "int8" if isinstance(linear, Int8Linear) else None, keep=False)
            if network in _mapped:
                release([*linear.parameters(), *linear.buffers()])
    return packed


@torch.no_grad()
def _pack(conditioner: Conditioner, storage: WeightStorage | None) -> PackedNetwork:
    layers = []
    for layer in conditioner.layers:
        assert isinstance(layer, Layer)
        layers.append(_layer(layer, storage))
        if conditioner in _mapped:
            release([*layer.parameters(), *layer.buffers()])
    config = conditioner.config
    text, position, summary = (
        None if linear is None else _linear(linear, storage)
        for linear in (conditioner.proj_text, conditioner.proj_position, conditioner.proj_summary)
    )
    block = BlockWeights(
        heads=conditioner.heads,
        kv_heads=conditioner.kv_heads,
        head_dim=conditioner.head_dim,
        proj_in=_linear(conditioner.proj_in, storage),
        proj_out=_linear(conditioner.proj_out, storage),
        layers=tuple(layers),
        norm=None if config.norm_type == "none" else config.norm_type,
        start_token=None if conditioner.sos_embed is None else _float(conditioner.sos_embed.flatten()),
        final_norm=_weight(conditioner.final_norm),
    )
    return PackedNetwork(block, text, position, summary)


def _layer(layer: Layer, storage: WeightStorage | None) -> LayerWeights:
    attention, mlp = layer.attention, layer.mlp
    assert isinstance(attention, Attention)
    assert isinstance(mlp, MLP)
    pairing: Pairing = "half" if attention.half_pairs else "interleaved"
    order = head_order(attention.head_dim, pairing)
    query_norm, key_norm = (_weight(norm) for norm in (attention.query_norm, attention.key_norm))
    return LayerWeights(
        qkv=pack_qkv(
            attention.qkv.weight,
            attention.qkv.bias,
            heads=attention.heads,
            kv_heads=attention.kv_heads,
            pairing=pairing,
            storage=storage,
            keep=False,
        ),
        proj=_linear(attention.proj, storage),
        up=_linear(mlp.up, storage),
        gate=None if mlp.gate is None else _linear(mlp.gate, storage),
        down=_linear(mlp.down, storage),
        attention_norm=_affine(attention.norm),
        mlp_norm=_affine(mlp.norm),
        query_norm=None if query_norm is None else query_norm[order].contiguous(),
        key_norm=None if key_norm is None else key_norm[order].contiguous(),
        attention_post=_weight(attention.post_norm),
        mlp_post=_weight(mlp.post_norm),
    )


def _linear(linear: nn.Linear | Int8Linear, storage: WeightStorage | None) -> PackedLinear:
    bias = None if linear.bias is None else _float(linear.bias)
    return PackedLinear(pack_weight(linear.weight, storage, keep=False), bias)


def _affine(norm: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    if not isinstance(norm, Norm):
        return None, None
    return _float(norm.weight), None if norm.bias is None else _float(norm.bias)


def _weight(norm: nn.Module | None) -> Tensor | None:
    return _float(norm.weight) if isinstance(norm, Norm) else None


def _float(tensor: Tensor) -> Tensor:
    return tensor.detach().float().contiguous()
