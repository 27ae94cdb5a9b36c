"""Operands of ``jacobi_sweep`` and ``jacobi_solve``: the packed network of a block, and the state of one decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter
from typing import Final, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from starflow_ext._check import require
from starflow_ext._load import native
from starflow_ext._mode import require_no_transform
from starflow_ext._options import CONSTANTS, NORM_KINDS, PRODUCT_INPUTS, check_name
from starflow_ext.block_attention import FrameMask
from starflow_ext.linear import CPU_PRODUCT_INPUTS, ProductInput
from starflow_ext.linear_pack import DEPTH_MULTIPLE, PANEL_COLUMNS, PackedWeight, WeightStorage, pack_weight
from starflow_ext.norm import NormKind
from starflow_ext.rope_append import Cache, Pairing, Rotation

CacheLayout = Literal["panels", "rows"]
CacheStorage = Literal["float32", "float16", "bfloat16"]

# Caches on the CPU hold whole blocks of keys (csrc/cpu/panels.h).
KEY_BLOCK: Final = CONSTANTS["key_block"]
_CACHE_DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_ABSENT: Final = torch.empty(0, dtype=torch.float32, device="cpu")

# In which order the native ops take the numbers and tensors of a block, by name.
_BLOCK_SIZES: Final = tuple(native.orders()["block_sizes"])
_sizes_in_order: Final = itemgetter(*_BLOCK_SIZES)
_block_in_order: Final = itemgetter(*native.orders()["block_tensors"])
_layer_in_order: Final = itemgetter(*native.orders()["layer_tensors"])

Named = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class LinearWeights:
    """A packed weight and its bias (out_channels,), float32 or None."""

    weight: PackedWeight
    bias: Tensor | None = None

    def named(self, name: str) -> Named:
        """Return panels, column scale and bias by name, for a block in which it is called ``name``."""
        parts = {name: self.weight.panels, f"{name}.column_scale": self.weight.column_scale, f"{name}.bias": self.bias}
        return _present(parts)


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One transformer layer; all norm weights float32.

    Attributes:
        qkv, proj: of the attention; see ``pack_qkv`` for the order of the rows of ``qkv``.
        up, gate, down: of the MLP; without a gate it is ``down(gelu(up))``, with one ``down(gelu_tanh(gate) * up)``.
        attention_norm, mlp_norm: weight and bias of the pre-norms (width,); None where there is none.
        query_norm, key_norm: (head_dim,) weights of RMSNorm, ordered like the rows of ``qkv``.
        attention_post, mlp_post: (width,) weights of RMSNorm on the branches.
    """

    qkv: LinearWeights
    proj: LinearWeights
    up: LinearWeights
    down: LinearWeights
    gate: LinearWeights | None = None
    attention_norm: tuple[Tensor | None, Tensor | None] = (None, None)
    mlp_norm: tuple[Tensor | None, Tensor | None] = (None, None)
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    attention_post: Tensor | None = None
    mlp_post: Tensor | None = None

    def named(self) -> Named:
        """Return the tensors by the names of csrc/ops/jacobi_sweep/sweep_order.h."""
        linears = {"qkv": self.qkv, "proj": self.proj, "up": self.up, "gate": self.gate, "down": self.down}
        found: dict[str, Tensor | None] = {
            "attention_norm.weight": self.attention_norm[0],
            "attention_norm.bias": self.attention_norm[1],
            "query_norm.weight": self.query_norm,
            "key_norm.weight": self.key_norm,
            "attention_post.weight": self.attention_post,
            "mlp_norm.weight": self.mlp_norm[0],
            "mlp_norm.bias": self.mlp_norm[1],
            "mlp_post.weight": self.mlp_post,
        }
        for name, linear in linears.items():
            found |= (
                dict.fromkeys((name, f"{name}.column_scale", f"{name}.bias")) if linear is None else linear.named(name)
            )
        return _present(found)


@dataclass(frozen=True, eq=False)
class BlockWeights:
    """The packed network of one block.

    Attributes:
        heads, kv_heads, head_dim: shape of the attention.
        proj_in, proj_out: maps from tokens to the residual stream, and from the stream to the output.
        layers: at least one layer.
        norm: kind of the pre-norms; None without pre-norms.
        start_token: (channels,) input of slot 0; None for a block without a start token.
        final_norm: (width,) weight of RMSNorm in front of ``proj_out``.
    """

    heads: int
    kv_heads: int
    head_dim: int
    proj_in: LinearWeights
    proj_out: LinearWeights
    layers: tuple[LayerWeights, ...]
    norm: NormKind | None
    start_token: Tensor | None = None
    final_norm: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """The device that holds the packed weights and runs the block."""
        return self.proj_in.weight.device

    @cached_property
    def named(self) -> Named:
        """The tensors beside the layers, by the names of csrc/ops/jacobi_sweep/sweep_order.h."""
        own = {"start_token": self.start_token, "final_norm.weight": self.final_norm}
        return {**_present(own), **self.proj_in.named("proj_in"), **self.proj_out.named("proj_out")}

    @cached_property
    def layer_tensors(self) -> tuple[Tensor, ...]:
        """The tensors of all layers, as the native ops take them."""
        return tuple(tensor for layer in self.layers for tensor in _layer_in_order(layer.named()))

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """The numbers of the network, by the names of csrc/ops/jacobi_sweep/sweep_order.h."""
        width, channels = self.proj_in.weight.shape
        return {
            "channels": channels,
            "width": width,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden": self.layers[0].up.weight.out_channels if self.layers else 1,
            "out_channels": self.proj_out.weight.out_channels,
            "norm": NORM_KINDS["none" if self.norm is None else self.norm],
        }

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        return sum(tensor.nbytes for tensor in self.layer_tensors)


def pack_qkv(
    weight: Tensor,
    bias: Tensor | None,
    *,
    heads: int,
    kv_heads: int,
    pairing: Pairing,
    storage: WeightStorage | None = None,
    keep: bool = True,
) -> LinearWeights:
    """Pack the fused projection of queries, keys and values for the sweep, whose planes are always half-split.

    Elements 2k and 2k + 1 of an interleaved head become k and k + head_dim / 2. Products of queries and keys do not
    change, since both are reordered alike.

    Args:
        weight: ((heads + 2 * kv_heads) * head_dim, width).
        bias: one for each row of ``weight``, or None.
        heads, kv_heads: numbers of heads.
        pairing: which elements form a rotary plane in the model.
        storage, keep: as of ``pack_weight``.
    """
    if pairing == "interleaved":
        order = head_order(weight.shape[0] // (heads + 2 * kv_heads), pairing)
        turned = (heads + kv_heads) * len(order)
        rows = torch.arange(weight.shape[0], device=weight.device)
        rows[:turned] = (rows[:turned].view(-1, len(order))[:, order]).flatten()
        weight = weight[rows]
        bias = None if bias is None else bias[rows]
    return LinearWeights(pack_weight(weight, storage, keep=keep), None if bias is None else bias.detach().float())


def head_order(head_dim: int, pairing: Pairing) -> Tensor:
    """Return which element of a head stands at each place of a packed head."""
    order = torch.arange(head_dim, device="cpu")
    return torch.cat([order[0::2], order[1::2]]) if pairing == "interleaved" else order


@dataclass(frozen=True, eq=False)
class BlockState:
    """State of one decoding of a clip: caches, and the conditioning of every row.

    Slots are positions of the network's input: text first, then the grid.

    Attributes:
        keys, values: (layers, cache rows, kv_heads, elements of a head); keys are rotated.
        slots: slots of each cache row.
        text_tokens: slots taken by text.
        temperature: (cache rows,) divides the products of queries and keys.
        position: (grid slots, width) added to the embedded tokens, or None.
        condition: (cache rows, width) added to the embedded tokens, or None; with ``condition_tokens``
            (cache rows, frames, width), of which each is added to the tokens of a frame. It may be written in place.
        query_rotation, key_rotation: tables (slots, head_dim / 2), or None.
        layout: layout of a head: "panels" (csrc/cpu/panels.h), which the CPU's kernels read, or "rows", contiguous
            (slots, head_dim), which those of CUDA read.
        condition_tokens: grid slots that share a row of ``condition``; 0 where all do.
        frame_tokens: tokens of a frame, where a token sees the text, its own frame and ``frames_behind`` before it; 0
            where it sees all before it.
        frames_behind: see ``frame_tokens``.
        whole_frames: whether a token sees all of its own frame, and not only up to itself; windows are whole frames
            then, there is no text, nothing is solved, and the device is the CPU.
    """

    keys: Tensor
    values: Tensor
    slots: int
    text_tokens: int
    temperature: Tensor
    position: Tensor | None = None
    condition: Tensor | None = None
    query_rotation: Rotation | None = None
    key_rotation: Rotation | None = None
    layout: CacheLayout = "panels"
    condition_tokens: int = 0
    frame_tokens: int = 0
    frames_behind: int = 0
    whole_frames: bool = False

    @classmethod
    def allocate(
        cls,
        weights: BlockWeights,
        rows: int,
        slots: int,
        *,
        text_tokens: int = 0,
        storage: CacheStorage = "float32",
        temperature: Tensor | None = None,
        position: Tensor | None = None,
        condition: Tensor | None = None,
        query_rotation: Rotation | None = None,
        key_rotation: Rotation | None = None,
        condition_tokens: int = 0,
        frame_tokens: int = 0,
        frames_behind: int = 0,
        whole_frames: bool = False,
    ) -> BlockState:
        """Allocate caches of ``slots`` slots for ``rows`` rows on the weights' device; the rest as the attributes.

        Raises:
            RuntimeError: if ``storage`` is none of "float32", "float16" and "bfloat16".
        """
        check_name("jacobi_sweep", "storage", storage, _CACHE_DTYPES)
        device = weights.device
        layout: CacheLayout = "rows" if device.type == "cuda" else "panels"
        elements = slots * weights.head_dim
        if layout == "panels":
            elements = _round_up(slots, KEY_BLOCK) * _round_up(weights.head_dim, DEPTH_MULTIPLE)
        shape = (len(weights.layers), rows, weights.kv_heads, elements)
        keys, values = torch.zeros((2, *shape), dtype=_CACHE_DTYPES[storage], device=device)
        temperature = torch.ones(rows, device=device) if temperature is None else temperature
        return cls(
            keys,
            values,
            slots,
            text_tokens,
            temperature,
            position,
            condition,
            query_rotation,
            key_rotation,
            layout,
            condition_tokens,
            frame_tokens,
            frames_behind,
            whole_frames,
        )

    @property
    def frames(self) -> FrameMask | None:
        """Which frames a token sees; None for all before it."""
        if self.frame_tokens == 0:
            return None
        return FrameMask(self.text_tokens, self.frame_tokens, look_ahead=1, window=self.frames_behind)

    @property
    def nbytes(self) -> int:
        """Bytes of the caches."""
        return self.keys.nbytes + self.values.nbytes

    @cached_property
    def named(self) -> Named:
        """The tensors beside the caches, by the names of csrc/ops/jacobi_sweep/sweep_order.h."""
        query, key = self.query_rotation, self.key_rotation
        given = {
            "position": self.position,
            "condition": self.condition,
            "query_cos": None if query is None else query.cos,
            "query_sin": None if query is None else query.sin,
            "key_cos": None if key is None else key.cos,
            "key_sin": None if key is None else key.sin,
            "temperature": self.temperature,
        }
        return _present(given)

    def select(self, rows: Tensor) -> BlockState:
        """Return a state with copies of some rows of the caches and their conditioning."""
        return replace(
            self,
            keys=self.keys[:, rows],
            values=self.values[:, rows],
            temperature=self.temperature[rows],
            condition=None if self.condition is None else self.condition[rows],
        )

    def layer_cache(self, layer: int, head_dim: int) -> Cache:
        """Return keys and values of a layer as (cache rows, kv_heads, slots, head_dim); panels are copied."""
        if self.layout == "rows":
            return Cache(*(stored[layer].unflatten(-1, (-1, head_dim)) for stored in (self.keys, self.values)))
        keys, values = self._columns(layer, head_dim)
        lead = keys.shape[:2]
        return Cache(
            keys.reshape(*lead, -1, _round_up(head_dim, DEPTH_MULTIPLE))[:, :, : self.slots, :head_dim],
            values.reshape(*lead, -1, _round_up(self.slots, KEY_BLOCK))[:, :, :head_dim, : self.slots].transpose(
                -2, -1
            ),
        )

    def store(self, layer: int, cache: Cache) -> None:
        """Write keys and values that ``layer_cache`` returned back into the caches."""
        if self.layout == "rows":
            return
        slots, head_dim = cache.keys.shape[-2:]
        keys, values = self._columns(layer, head_dim)
        more_slots, more_depth = _round_up(slots, KEY_BLOCK) - slots, _round_up(head_dim, DEPTH_MULTIPLE) - head_dim
        keys.copy_(F.pad(cache.keys, (0, more_depth, 0, more_slots)).reshape(keys.shape))
        values.copy_(F.pad(cache.values.transpose(-2, -1), (0, more_slots, 0, more_depth)).reshape(values.shape))

    def forget(self, head_dim: int, count: int) -> None:
        """Move the caches by ``count`` slots to the front, over the first ones: slot n + count becomes slot n.

        Args:
            head_dim: elements of a head.
            count: slots that are forgotten.

        Raises:
            RuntimeError: if the caches hold text, which stands at the front, or ``count`` is more than their slots.
        """
        op = "jacobi_sweep"
        require(self.text_tokens == 0, op, "text_tokens is", self.text_tokens, "0 where slots are forgotten")
        require(0 <= count <= self.slots, op, "count is", count, f"0 to the {self.slots} slots")
        if self.layout == "rows":
            for stored in (self.keys, self.values):
                _move(stored, count * head_dim)
            return
        depth, slots = _round_up(head_dim, DEPTH_MULTIPLE), _round_up(self.slots, KEY_BLOCK)
        if count % PANEL_COLUMNS == 0:
            _move(self.keys, count * depth)
            _move(self.values.unflatten(-1, (-1, slots * PANEL_COLUMNS)), count * PANEL_COLUMNS)
            return
        # Inside of a panel the keys of neighbouring slots lie interleaved.
        for layer in range(self.keys.shape[0]):
            keys, values = self.layer_cache(layer, head_dim)
            self.store(layer, Cache(*(F.pad(held[:, :, count:], (0, 0, 0, count)) for held in (keys, values))))

    def _columns(self, layer: int, head_dim: int) -> tuple[Tensor, Tensor]:
        """Views of the panels of a layer: keys have a column for each slot, values a column for each channel."""
        depth = _round_up(head_dim, DEPTH_MULTIPLE)
        return _columns(self.keys[layer], depth), _columns(self.values[layer], _round_up(self.slots, KEY_BLOCK))


def _move(stored: Tensor, count: int) -> None:
    """Move the elements of the last axis by ``count`` to the front, layer by layer."""
    kept = stored.shape[-1] - count
    for layer in stored:
        layer[..., :kept] = layer[..., count:].clone()


def _columns(panels: Tensor, depth: int) -> Tensor:
    """View panels (..., elements) of a cache as (..., panel, column, depth); bfloat16 splits the depth into pairs."""
    pairs = (2,) if panels.dtype == torch.bfloat16 else ()
    cut: Tensor = panels.unflatten(-1, (-1, depth // 2 if pairs else depth, PANEL_COLUMNS, *pairs))
    return cut.transpose(-3, -2) if pairs else cut.transpose(-2, -1)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _present(named: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Replace absent tensors by empty ones, as the native ops take them."""
    return {name: _ABSENT if tensor is None else tensor for name, tensor in named.items()}


def product_input_of(op: str, weights: BlockWeights, product_input: ProductInput | None) -> int:
    """Return the number of a product's input; on CUDA by default the storage of the weights."""
    if product_input is None:
        stored = weights.device.type == "cuda"
        return PRODUCT_INPUTS[weights.proj_in.weight.storage if stored else "float32"]
    known = PRODUCT_INPUTS if weights.device.type == "cuda" else CPU_PRODUCT_INPUTS
    check_name(op, "product_input", product_input, known)
    return PRODUCT_INPUTS[product_input]


def require_no_derivative(op: str, weights: BlockWeights, state: BlockState, *tensors: Tensor) -> None:
    """Refuse a call of a sweep that a derivative is asked of: the results would be none of it, without a word."""
    require_no_transform(op, "the caches are overwritten")
    if not torch.is_grad_enabled():
        return
    asked = any(tensor.requires_grad for tensor in (*tensors, *block_tensors(weights, state)))
    require(
        not asked,
        op,
        "gradient mode is",
        "on for a tensor that requires a gradient",
        "a call under torch.no_grad() or torch.inference_mode()",
    )


def block_tensors(weights: BlockWeights, state: BlockState) -> list[Tensor]:
    """Return the tensors of a block as the native ops take them."""
    return [*_block_in_order({**weights.named, **state.named}), *weights.layer_tensors]


def block_sizes(weights: BlockWeights, state: BlockState) -> list[int]:
    """Return the numbers of a block as the native ops take them."""
    own = {
        "text_tokens": state.text_tokens,
        "slots": state.slots,
        "mask_frame_tokens": state.frame_tokens,
        "mask_frames": state.frames_behind,
        "condition_tokens": state.condition_tokens,
        "whole_frames": int(state.whole_frames),
    }
    return list(_sizes_in_order({**weights.sizes, **own}))


def size_of(sizes: Sequence[int], name: str) -> int:
    """Return the number called ``name`` of those that ``block_sizes`` returned."""
    return sizes[_BLOCK_SIZES.index(name)]
