"""jacobi_sweep: one block's network over windows of tokens, all layers in one native call."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from starflow_ext._check import check_device, refuse_types, types_of
from starflow_ext._load import operators
from starflow_ext._mode import in_reference_mode, reference_mode
from starflow_ext.block_attention import block_attention
from starflow_ext.linear import InputNorm, ProductInput, linear
from starflow_ext.norm import NormKind, norm
from starflow_ext.rope_append import Rotation, rope_append
from starflow_ext.sweep_block import (
    BlockState,
    BlockWeights,
    LayerWeights,
    LinearWeights,
    block_sizes,
    block_tensors,
    product_input_of,
    require_no_derivative,
    size_of,
)


def jacobi_sweep(
    weights: BlockWeights,
    state: BlockState,
    rows: Tensor,
    start: Tensor,
    *,
    keep: Tensor | None = None,
    product_input: ProductInput | None = None,
    text: bool = False,
) -> Tensor:
    """Run a block's network over a window of tokens of each cache row, behind the cached tokens before it.

    Writes keys and values of the window into ``state``; running a window again overwrites them. A row's result does not
    depend on the other rows, on the width of the window or on the number of threads, to the last bit.

    Args:
        weights: packed network.
        state: caches; written.
        rows: (cache rows, tokens, channels) float32: the network's input at slots ``start ..``; with ``text`` (cache
            rows, tokens, width): text in the residual stream.
        start: (cache rows,) int64 first slot of each window. The host checks it: with ``rows`` on a CUDA device it is
            best kept on the CPU; reading it from the device waits for the stream.
        keep: (cache rows,) int64; slots below it are not written; None writes all. On a CUDA device as for ``start``.
        product_input: how activations enter products with the weights (see ``linear``); None: "float32", on CUDA
            the storage of the weights, the only choice there.
        text: ``rows`` is embedded text; only keys and values are wanted.

    Returns:
        raw: (cache rows, tokens, out channels) float32; with ``text``, no tokens.

    Raises:
        RuntimeError: if a type, a shape or a dtype is wrong, a derivative is asked for, or the caches are too short
            (the message says how long they must be); on CUDA also while the current stream is captured into a graph.

    Reference:
        Gu et al., STARFlow-V (2025), parallel Jacobi iteration; the network is that of ``starflow.conditioner``.
    """
    given = (weights, state, rows, start, keep, product_input, text)
    if not all(map(isinstance, given, _TYPES)):
        refuse_types("jacobi_sweep", jacobi_sweep, given)
    require_no_derivative("jacobi_sweep", weights, state, rows)
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
        product_input_of("jacobi_sweep", weights, product_input),
        text,
    )
    return raw


@reference_mode()
def jacobi_sweep_reference(
    weights: BlockWeights, state: BlockState, rows: Tensor, start: Tensor, keep: Tensor, text: bool
) -> Tensor:
    """Compute ``jacobi_sweep`` by the references of the ops that it fuses, in float32; arguments as there."""
    start, keep = start.to(rows.device), keep.to(rows.device)
    slots = start[:, None] + torch.arange(rows.shape[1], device=rows.device)
    h = rows
    if not text:
        if weights.start_token is not None:
            h = torch.where((slots == state.text_tokens)[..., None], weights.start_token, h)
        h = linear(h, weights.proj_in.weight, weights.proj_in.bias)
        if state.position is not None:
            h = h + state.position[slots - state.text_tokens]
        if state.condition is not None:
            h = h + _conditions(state, slots - state.text_tokens)
    query, key = (
        None if tables is None else Rotation(tables.cos[slots], tables.sin[slots])
        for tables in (state.query_rotation, state.key_rotation)
    )
    for index, layer in enumerate(weights.layers):
        cache = state.layer_cache(index, weights.head_dim)
        q, k, v = rope_append(
            _projected(h, layer.qkv, _input_norm(weights.norm, *layer.attention_norm)),
            heads=weights.heads,
            kv_heads=weights.kv_heads,
            query_rotation=query,
            key_rotation=key,
            query_norm=layer.query_norm,
            key_norm=layer.key_norm,
            pairing="half",
            cache=cache,
            start=start,
            final=keep,
        )
        state.store(index, cache)
        attended = block_attention(
            q, k, v, causal=not state.whole_frames, q_start=start, frames=state.frames, temperature=state.temperature
        )
        h = _added(h, attended.transpose(1, 2).flatten(2), layer.proj, layer.attention_post)
        h = _added(h, _hidden(weights.norm, layer, h), layer.down, layer.mlp_post)
    raw = _projected(h, weights.proj_out, _input_norm("rms_norm", weights.final_norm))
    return raw[:, :0] if text else raw


def _conditions(state: BlockState, slots: Tensor) -> Tensor:
    """What is added to the tokens of each row at its grid slots (rows, tokens): (rows, tokens or 1, width)."""
    assert state.condition is not None
    if state.condition_tokens == 0:
        return state.condition[:, None]
    rows = torch.arange(slots.shape[0], device=slots.device)
    return state.condition[rows[:, None], slots // state.condition_tokens]


def _hidden(kind: NormKind | None, layer: LayerWeights, h: Tensor) -> Tensor:
    """The hidden activations of the MLP."""
    before = _input_norm(kind, *layer.mlp_norm)
    if layer.gate is None:
        return linear(h, layer.up.weight, layer.up.bias, norm=before, epilogue="gelu")
    up = _projected(h, layer.up, before)
    return linear(h, layer.gate.weight, layer.gate.bias, norm=before, epilogue="gelu_tanh", multiply=up)


def _input_norm(kind: NormKind | None, weight: Tensor | None, bias: Tensor | None = None) -> InputNorm | None:
    if weight is None or kind is None:
        return None
    return InputNorm(weight, bias if kind == "layer_norm" else None, kind)


def _projected(x: Tensor, weights: LinearWeights, before: InputNorm | None = None) -> Tensor:
    return linear(x, weights.weight, weights.bias, norm=before)


def _added(h: Tensor, x: Tensor, weights: LinearWeights, post: Tensor | None) -> Tensor:
    """The residual stream ``x`` plus a branch, which ``post`` normalises where it is given."""
    if post is None:
        return linear(x, weights.weight, weights.bias, residual=h)
    return h + norm(_projected(x, weights), post, kind="rms_norm")


# The types that each argument may have.
_TYPES: Final = types_of(jacobi_sweep)

_native = operators().jacobi_sweep.default


def _fake(
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    start: Tensor,
    keep: Tensor,
    weights: list[Tensor],
    sizes: list[int],
    product_input: int,
    text: bool,
) -> Tensor:
    # A call of which a part alone is on meta comes here, and would leave the caches as they are.
    for name, tensor in (("values", values), ("rows", rows), ("start", start), ("keep", keep)):
        if name in ("values", "rows") or not tensor.is_cpu:
            check_device("jacobi_sweep", name, tensor, "keys", keys)
    return rows.new_empty(rows.shape[0], 0 if text else rows.shape[1], size_of(sizes, "out_channels"))


torch.library.register_fake("starflow_ext::jacobi_sweep", _fake)
