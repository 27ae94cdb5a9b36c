"""Packed weights of a network, made once and kept while the weights stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from starflow.mapped import MappedFile, is_as_mapped, is_mapped, release, require_unchanged, watch
from starflow.model.conditioner import Conditioner
from starflow.model.layers import MLP, Attention, Int8Linear, Layer, Norm, Transformer
from starflow_ext._stamp import fingerprint
from starflow_ext.linear_pack import PackedWeight, WeightStorage, pack_weight
from starflow_ext.rope_append import Pairing
from starflow_ext.sweep_block import BlockWeights, LayerWeights, LinearWeights, head_order, pack_qkv


@dataclass(frozen=True)
class PackedNetwork:
    """The weights of a conditioner.

    Args:
        block: weights that every sweep reads. text, position, summary: projections that are computed once for a clip,
            previous: once for a frame; None where the network lacks one.
    """

    block: BlockWeights
    text: LinearWeights | None
    position: LinearWeights | None
    summary: LinearWeights | None
    previous: LinearWeights | None


class _Contents:
    """The tensors of a network and what they hold, to see whether one was changed since.

    It lists them once and is compared before each clip: walking the tree of modules again takes three times as long.
    """

    def __init__(self, network: Transformer) -> None:
        holders = list(network.modules())
        self._places: list[tuple[dict[str, Any], str, Any]] = [
            (place, name, held)
            for holder in holders
            for place in (holder._modules, holder._parameters, holder._buffers)
            for name, held in place.items()
        ]
        # Those of each layer, then the rest.
        self._parts = [[*layer.parameters(), *layer.buffers()] for layer in network.layers]
        of_layers = {id(tensor) for part in self._parts for tensor in part}
        tensors = (held for _, _, held in self._places if isinstance(held, Tensor))
        self._parts.append([tensor for tensor in tensors if id(tensor) not in of_layers])
        self._found: list[_Found | None] = [None] * len(self._parts)
        self._mapped = is_mapped(network)

    def read(self, part: int) -> None:
        """Notes what a part, a layer or with -1 the rest, holds once it is packed; mapped weights leave the memory."""
        self._found[part] = _Found.of(self._parts[part], mapped=self._mapped)

    def are_the_same(self) -> bool:
        """Whether everything is in its place and every tensor holds what it held."""
        if any(place.get(name) is not held for place, name, held in self._places):
            return False
        return all(
            found is not None and found.is_in(part) for part, found in zip(self._parts, self._found, strict=True)
        )


@dataclass(frozen=True)
class _Found:
    """What tensors held.

    Args:
        content: fingerprint of all. other: of those that are not as they were mapped from a file.
        mapped: addresses of those that are, which need no reading as long as nobody writes to them; by index.
    """

    content: int | None
    other: int | None
    mapped: dict[int, int]

    @classmethod
    def of(cls, tensors: list[Tensor], *, mapped: bool) -> _Found:
        """Reads tensors; weights that are mapped from a file leave the memory again."""
        content = fingerprint(tensors)
        if not mapped:
            return cls(content, content, {})
        places = {index: tensor.data_ptr() for index, tensor in enumerate(tensors) if is_as_mapped([tensor])}
        release(tensors)
        return cls(content, fingerprint(_others(tensors, places)), places)

    def is_in(self, tensors: list[Tensor]) -> bool:
        """Whether tensors hold it; what could not be read is in none."""
        if self.content is None:
            return False
        if not self.mapped:
            return fingerprint(tensors) == self.content
        in_place = all(tensors[index].data_ptr() == address for index, address in self.mapped.items())
        if in_place and is_as_mapped(tensors[index] for index in self.mapped):
            return fingerprint(_others(tensors, self.mapped)) == self.other
        same = fingerprint(tensors) == self.content
        release(tensors)
        return same


def _others(tensors: list[Tensor], indices: Collection[int]) -> list[Tensor]:
    """Those that have none of the indices."""
    return [tensor for index, tensor in enumerate(tensors) if index not in indices]


# Packed weights of each network by kind of packing, each with what they were made from.
_kept: WeakKeyDictionary[Transformer, dict[str | None, tuple[_Contents, Any]]] = WeakKeyDictionary()


_Packed = TypeVar("_Packed")


# Networks that were compared within `compared_once`, each with its kind of packing; None outside.
_compared: ContextVar[set[tuple[int, str | None]] | None] = ContextVar("compared", default=None)


@contextmanager
def compared_once() -> Iterator[None]:
    """Weights are compared with what was packed of them at their first use within it, and not at the next ones.

    For frames that are cleaned one after the other in one call, between which nobody changes weights: to compare takes
    a tenth of what a frame of a small model takes.
    """
    token = _compared.set(set())
    try:
        yield
    finally:
        _compared.reset(token)


def _keep(network: Transformer, how: str | None, pack: Callable[[Callable[[int], None]], _Packed]) -> _Packed:
    """What `pack` made of the weights as they are; it calls what it is given after each layer, with its index."""
    by_way = _kept.setdefault(network, {})
    kept, compared, key = by_way.get(how), _compared.get(), (id(network), how)
    known = compared is not None and key in compared
    if not known:
        require_unchanged(network)
    if kept is None or not (known or kept[0].are_the_same()):
        contents = _Contents(network)
        made = pack(contents.read)
        contents.read(-1)
        kept = by_way[how] = contents, made
    if compared is not None:
        compared.add(key)
    packed: _Packed = kept[1]
    return packed


def pack_conditioner(conditioner: Conditioner, storage: WeightStorage | None = None) -> PackedNetwork:
    """The network of a block as native decoding reads it.

    The result is kept with the module and made again when a weight was replaced or holds something else, however it was
    written: the weights are read (some 20 GB/s), which takes a tenth of packing them; of weights that are mapped from a
    file the table of pages tells. What a clip was begun with stays until its window ends.

    Args:
        conditioner: the network; its packed weights are on its device.
        storage: of the weights (see `starflow_ext.pack_weight`); None keeps their own dtype.
    """
    return _keep(conditioner, storage, lambda packed: _pack(conditioner, storage, packed))


def pack_network(network: Transformer) -> BlockWeights:
    """The layers of a network and its projections in their own dtype, as `starflow_ext.ops.jacobi_sweep` runs them in
    one call; kept like those of `pack_conditioner`.
    """
    return _keep(network, "block", lambda packed: _pack_block(network, None, packed))


def pack_linears(network: Transformer) -> dict[nn.Module, PackedWeight]:
    """The weights of all linear layers of a network in their own dtype, kept like those of `pack_conditioner`."""
    return _keep(network, "linears", lambda packed: _pack_linears(network, packed))


def keep_mapped(module: nn.Module, files: Sequence[MappedFile]) -> None:
    """Marks a module and the networks in it as mapped from files: packing leaves one copy in memory, and a file that is
    written to ends the next call.
    """
    for mapped in (module, *(network for network in module.modules() if isinstance(network, Transformer))):
        watch(mapped, files)


@torch.no_grad()
def _pack_linears(network: Transformer, done: Callable[[int], None]) -> dict[nn.Module, PackedWeight]:
    packed: dict[nn.Module, PackedWeight] = {}

    def pack(module: nn.Module) -> None:
        for linear in module.modules():
            if isinstance(linear, nn.Linear | Int8Linear) and linear not in packed:
                storage: WeightStorage | None = "int8" if isinstance(linear, Int8Linear) else None
                packed[linear] = pack_weight(linear.weight, storage, keep=False)

    for index, layer in enumerate(network.layers):
        pack(layer)
        done(index)
    pack(network)
    return packed


@torch.no_grad()
def _pack(conditioner: Conditioner, storage: WeightStorage | None, done: Callable[[int], None]) -> PackedNetwork:
    block = _pack_block(conditioner, storage, done)
    text, position, summary, previous = (
        None if linear is None else _linear(linear, storage)
        for linear in (
            conditioner.proj_text,
            conditioner.proj_position,
            conditioner.proj_summary,
            conditioner.proj_previous,
        )
    )
    return PackedNetwork(block, text, position, summary, previous)


@torch.no_grad()
def _pack_block(network: Transformer, storage: WeightStorage | None, done: Callable[[int], None]) -> BlockWeights:
    layers = []
    for index, layer in enumerate(network.layers):
        assert isinstance(layer, Layer)
        layers.append(_layer(layer, storage))
        done(index)
    start = network.sos_embed if isinstance(network, Conditioner) else None
    return BlockWeights(
        heads=network.heads,
        kv_heads=network.kv_heads,
        head_dim=network.head_dim,
        proj_in=_linear(network.proj_in, storage),
        proj_out=_linear(network.proj_out, storage),
        layers=tuple(layers),
        norm=None if network.config.norm_type == "none" else network.config.norm_type,
        start_token=None if start is None else _float(start.flatten()),
        final_norm=_weight(network.final_norm),
    )


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


def _linear(linear: nn.Linear | Int8Linear, storage: WeightStorage | None) -> LinearWeights:
    bias = None if linear.bias is None else _float(linear.bias)
    return LinearWeights(pack_weight(linear.weight, storage, keep=False), bias)


def _affine(norm: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    if not isinstance(norm, Norm):
        return None, None
    return _float(norm.weight), None if norm.bias is None else _float(norm.bias)


def _weight(norm: nn.Module | None) -> Tensor | None:
    return _float(norm.weight) if isinstance(norm, Norm) else None


def _float(tensor: Tensor) -> Tensor:
    return tensor.detach().float().contiguous()
