"""jacobi_sweep: one block's network over windows of tokens, all layers in one native call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

import torch
from torch import Tensor

from starflow_ext._check import require
from starflow_ext._load import operators
from starflow_ext._mode import in_reference_mode
from starflow_ext._sweep_reference import jacobi_sweep_reference
from starflow_ext.linear_pack import PackedWeight, Storage, pack_weight
from starflow_ext.norm import NormKind
from starflow_ext.rope_append import Pairing, Rotation

Activations = Literal["float32", "float16", "bfloat16", "two_bfloat16"]
CacheLayout = Literal["panels", "rows"]
CacheStorage = Literal["float32", "float16", "bfloat16"]

KEY_BLOCK: Final = 64  # csrc/cpu/panels.h: caches hold whole blocks of keys
_DEPTH_MULTIPLE: Final = 32
_CACHE_DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_KINDS: Final[dict[str | None, int]] = {None: 0, "layer_norm": 1, "rms_norm": 2}
_ABSENT: Final = torch.empty(0)


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """A packed weight and its bias (out_channels,), float32 or None."""

    weight: PackedWeight
    bias: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Return panels, column scale and bias; what is absent is empty."""
        return [self.weight.panels, self.weight.column_scale, _ABSENT if self.bias is None else self.bias]


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

    qkv: PackedLinear
    proj: PackedLinear
    up: PackedLinear
    down: PackedLinear
    gate: PackedLinear | None = None
    attention_norm: tuple[Tensor | None, Tensor | None] = (None, None)
    mlp_norm: tuple[Tensor | None, Tensor | None] = (None, None)
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    attention_post: Tensor | None = None
    mlp_post: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Return the tensors in the order of csrc/ops/jacobi_common/sweep_block.h."""
        linears = [self.qkv, self.proj, self.up]
        found = [tensor for linear in linears for tensor in linear.tensors()]
        found += [_ABSENT] * 3 if self.gate is None else self.gate.tensors()
        found += self.down.tensors()
        norms = (*self.attention_norm, self.query_norm, self.key_norm, self.attention_post, *self.mlp_norm)
        return found + [_ABSENT if tensor is None else tensor for tensor in (*norms, self.mlp_post)]


@dataclass(frozen=True, eq=False)
class BlockWeights:
    """The packed network of one block.

    Attributes:
        heads, kv_heads, head_dim: of the attention.
        proj_in, proj_out: tokens to the residual stream, and it to the output.
        layers: at least one.
        norm: kind of the pre-norms; None without.
        start_token: (channels,) what slot 0 reads; None for a block without a start token.
        final_norm: (width,) weight of RMSNorm in front of ``proj_out``.
    """

    heads: int
    kv_heads: int
    head_dim: int
    proj_in: PackedLinear
    proj_out: PackedLinear
    layers: tuple[LayerWeights, ...]
    norm: NormKind | None
    start_token: Tensor | None = None
    final_norm: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where they are packed, and the block runs."""
        return self.proj_in.weight.device

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of projections and layers in the order of csrc/ops/jacobi_common/sweep_block.h."""
        found = self.proj_in.tensors() + self.proj_out.tensors()
        return (*found, *(tensor for layer in self.layers for tensor in layer.tensors()))

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors())


def pack_qkv(
    weight: Tensor,
    bias: Tensor | None,
    *,
    heads: int,
    kv_heads: int,
    pairing: Pairing,
    storage: Storage | None = None,
    keep: bool = True,
) -> PackedLinear:
    """Pack the fused projection of queries, keys and values for the sweep, whose planes are always half-split.

    Elements 2k and 2k + 1 of an interleaved head become k and k + head_dim / 2. Products of queries and keys do not see
    it, since both are reordered alike.

    Args:
        weight: ((heads + 2 * kv_heads) * head_dim, width).
        bias: as many, or None.
        heads, kv_heads: numbers of heads.
        pairing: which elements form a rotary plane in the model.
        storage, keep: of ``pack_weight``.
    """
    if pairing == "interleaved":
        order = head_order(weight.shape[0] // (heads + 2 * kv_heads), pairing)
        turned = (heads + kv_heads) * len(order)
        rows = torch.arange(weight.shape[0])
        rows[:turned] = (rows[:turned].view(-1, len(order))[:, order]).flatten()
        weight = weight[rows]
        bias = None if bias is None else bias[rows]
    return PackedLinear(pack_weight(weight, storage, keep=keep), None if bias is None else bias.detach().float())


def head_order(head_dim: int, pairing: Pairing) -> Tensor:
    """Element of a head that stands at each place of a packed one."""
    order = torch.arange(head_dim)
    return torch.cat([order[0::2], order[1::2]]) if pairing == "interleaved" else order


@dataclass(frozen=True, eq=False)
class BlockState:
    """What one decoding of a clip holds: caches, and what is added to or asked of every row.

    Slots are positions of the network's input: text first, then the grid.

    Attributes:
        keys, values: (layers, cache rows, kv_heads, elements of a head); keys are rotated.
        slots: of each cache row.
        text_tokens: slots taken by text.
        temperature: (cache rows,) divides the products of queries and keys.
        position: (grid slots, width) added to the embedded tokens, or None.
        condition: (cache rows, width) added to the embedded tokens, or None.
        query_rotation, key_rotation: tables (slots, head_dim / 2), or None.
        layout: of a head: "panels" (csrc/cpu/panels.h), which the CPU's kernels read, or "rows", (slots, head_dim) side
            by side, which those of CUDA do.
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
    ) -> BlockState:
        """Allocate caches of ``slots`` slots for ``rows`` rows, where the weights are; the others as the attributes.

        Raises:
            RuntimeError: if ``storage`` is none of "float32", "float16", "bfloat16".
        """
        require(
            storage in _CACHE_DTYPES,
            "jacobi_sweep",
            "storage is",
            f'"{storage}"',
            " or ".join(map(repr, _CACHE_DTYPES)),
        )
        device = weights.device
        layout: CacheLayout = "rows" if device.type == "cuda" else "panels"
        elements = slots * weights.head_dim
        if layout == "panels":
            depth = -(-weights.head_dim // _DEPTH_MULTIPLE) * _DEPTH_MULTIPLE
            elements = -(-slots // KEY_BLOCK) * KEY_BLOCK * depth
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
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the caches."""
        return self.keys.nbytes + self.values.nbytes


def jacobi_sweep(
    weights: BlockWeights,
    state: BlockState,
    rows: Tensor,
    start: Tensor,
    *,
    keep: Tensor | None = None,
    activations: Activations | None = None,
    text: bool = False,
) -> Tensor:
    """Run a block's network over a window of tokens of each cache row, with what is cached before them.

    Writes keys and values of the window into ``state``; running a window again overwrites them. A row's result does not
    depend on the other rows, on the width of the window or on the number of threads, to the last bit.

    Args:
        weights: packed network.
        state: caches; written.
        rows: (cache rows, tokens, channels) float32: the network's input at slots ``start ..``; with ``text`` (cache
            rows, tokens, width): text in the residual stream.
        start: (cache rows,) int64 first slot of each window. The host checks it: with ``rows`` on a CUDA device it is
            best on the CPU; from the device it is read, which waits for the stream.
        keep: (cache rows,) int64 slots below it are not written; None writes all. On a device like ``start``.
        activations: how activations enter products (see ``linear``); None: "float32", on CUDA the storage of the
            weights, which is all that there is.
        text: ``rows`` is embedded text; only keys and values are wanted.

    Returns:
        raw: (cache rows, tokens, out channels) float32; with ``text``, no tokens.

    Raises:
        RuntimeError: if a shape or dtype is wrong, or the caches are too short; the message says how long they must be;
            on CUDA also while the current stream is captured into a graph.

    Reference:
        Gu et al., STARFlow-V (2025), parallel Jacobi iteration; the network is that of ``starflow.conditioner``.
    """
    keep = torch.zeros_like(start) if keep is None else keep
    if in_reference_mode():
        return jacobi_sweep_reference(weights, state, rows, start, keep, text)
    raw: Tensor = _native(
        state.keys,
        state.values,
        rows.contiguous(),
        start,
        keep,
        block_tensors(weights, state),
        block_sizes(weights, state),
        activations_of(weights, activations),
        text,
    )
    return raw


def activations_of(weights: BlockWeights, activations: Activations | None) -> str:
    """Return how activations enter products where the caller left it open."""
    if activations is not None:
        return activations
    return weights.proj_in.weight.storage if weights.device.type == "cuda" else "float32"


def block_tensors(weights: BlockWeights, state: BlockState) -> list[Tensor]:
    """Return the tensors of a block in the order of csrc/ops/jacobi_common/sweep_block.h."""
    tables: Sequence[Tensor | None] = (
        *(state.query_rotation or (None, None)),
        *(state.key_rotation or (None, None)),
    )
    fixed = (weights.start_token, state.position, state.condition, *tables, state.temperature, weights.final_norm)
    return [*(_ABSENT if tensor is None else tensor for tensor in fixed), *weights.tensors]


def block_sizes(weights: BlockWeights, state: BlockState) -> list[int]:
    """Return the numbers of a block in the order of csrc/ops/jacobi_common/sweep_block.h."""
    width, channels = weights.proj_in.weight.shape
    return [
        channels,
        width,
        weights.heads,
        weights.kv_heads,
        weights.head_dim,
        weights.layers[0].up.weight.out_channels if weights.layers else 1,
        weights.proj_out.weight.out_channels,
        state.text_tokens,
        state.slots,
        _KINDS[weights.norm],
    ]


_native = operators().jacobi_sweep.default


def _fake(
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    start: Tensor,
    keep: Tensor,
    weights: list[Tensor],
    sizes: list[int],
    activations: str,
    text: bool,
) -> Tensor:
    return rows.new_empty(rows.shape[0], 0 if text else rows.shape[1], sizes[6])


torch.library.register_fake("starflow_ext::jacobi_sweep", _fake)
