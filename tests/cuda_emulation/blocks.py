"""Packed blocks as the CUDA kernels of jacobi_sweep and jacobi_solve take them, in the CPU's memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from starflow_ext import _sweep_reference
from starflow_ext.jacobi_sweep import BlockState, BlockWeights, LayerWeights, PackedLinear
from starflow_ext.linear_pack import device_rows_shape
from starflow_ext.norm import EPSILON

from .emulator import Kernels, Mutation, Report, emulated

SWEEP = "ops/jacobi_sweep/jacobi_sweep.cu"
# What a sweep launches.
BESIDE = (
    "ops/linear/linear.cu",
    "ops/rope_append/rope_append.cu",
    "ops/block_attention/block_attention.cu",
    "ops/norm/norm.cu",
)
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
MULTIPROCESSORS = 4


def sweep_kernels(mutation: Mutation | None = None) -> Kernels:
    return emulated(SWEEP, mutation, beside=BESIDE)


def _matrix(linear: PackedLinear | None) -> Mapping[str, Any]:
    """A weight in rows of its storage, padded with zeros, with its bias."""
    if linear is None:
        return {}
    weight = linear.weight
    rows = torch.zeros(device_rows_shape(*weight.shape), dtype=HALVES[weight.storage])
    rows[:, : weight.in_channels] = weight.unpack()
    shape = {"columns": weight.out_channels, "depth": weight.in_channels, "storage": weight.storage}
    return {"data": rows, "bias": linear.bias, **shape}


def _norm(kind: str | None, weight: Tensor | None, bias: Tensor | None = None) -> Mapping[str, Any]:
    if kind is None or weight is None:
        return {}
    name = {"layer_norm": "layer", "rms_norm": "rms"}[kind]
    bias = bias if kind == "layer_norm" else None
    return {"kind": name, "weight": weight, "bias": bias, "epsilon": EPSILON[kind]}


def workspace(kernels: Kernels, launcher: str, call: Mapping[str, Any]) -> Tensor:
    """The workspace that a call asks for, full of what is no number."""
    size = torch.zeros(1, dtype=torch.int64)
    kernels.launch(launcher, 0, **call, workspace_bytes=size)
    return torch.full((int(size),), 255, dtype=torch.uint8)


@dataclass
class DeviceBlock:
    """A block and its state; the caches are rows of head_dim elements."""

    weights: BlockWeights
    state: BlockState
    keys: Tensor
    values: Tensor

    @classmethod
    def of(cls, weights: BlockWeights, state: BlockState) -> DeviceBlock:
        shape = (*state.keys.shape[:3], state.slots, weights.head_dim)
        # What was never written must not be read.
        keys, values = (torch.full(shape, torch.nan, dtype=state.keys.dtype) for _ in range(2))
        return cls(weights, state, keys, values)

    def _layer(self, index: int, layer: LayerWeights) -> Mapping[str, Any]:
        kind = self.weights.norm
        linears = {name: _matrix(getattr(layer, name)) for name in ("qkv", "proj", "gate", "up", "down")}
        return linears | {
            "attention_norm": _norm(kind, *layer.attention_norm),
            "query_norm": _norm("rms_norm", layer.query_norm),
            "key_norm": _norm("rms_norm", layer.key_norm),
            "attention_post": _norm("rms_norm", layer.attention_post),
            "mlp_norm": _norm(kind, *layer.mlp_norm),
            "mlp_post": _norm("rms_norm", layer.mlp_post),
            "keys": self.keys[index],
            "values": self.values[index],
        }

    def fields(self) -> Mapping[str, Any]:
        """The fields of SweepBlock."""
        weights, state = self.weights, self.state
        width, channels = weights.proj_in.weight.shape
        query, key = (rotation or (None, None) for rotation in (state.query_rotation, state.key_rotation))
        return {
            "channels": channels,
            "width": width,
            "heads": weights.heads,
            "kv_heads": weights.kv_heads,
            "head_dim": weights.head_dim,
            "hidden": weights.layers[0].up.weight.out_channels,
            "layer_count": len(weights.layers),
            "layers": [self._layer(i, layer) for i, layer in enumerate(weights.layers)],
            "proj_in": _matrix(weights.proj_in),
            "proj_out": _matrix(weights.proj_out),
            "final_norm": _norm("rms_norm", weights.final_norm),
            "start_token": weights.start_token,
            "position": state.position,
            "condition": state.condition,
            "query_cos": query[0],
            "query_sin": query[1],
            "key_cos": key[0],
            "key_sin": key[1],
            "temperature": state.temperature,
            "cache_rows": state.keys.shape[1],
            "text_tokens": state.text_tokens,
            "slots": state.slots,
            "cache": str(state.keys.dtype).removeprefix("torch."),
        }

    @property
    def device(self) -> Mapping[str, Any]:
        return {"multiprocessors": MULTIPROCESSORS}

    def sweep(
        self,
        kernels: Kernels,
        rows: Tensor,
        start: Tensor,
        keep: Tensor | None = None,
        *,
        text: bool = False,
        seed: int = 0,
        gap: int = 0,
    ) -> tuple[Report, Tensor]:
        """As starflow_ext.ops.jacobi_sweep; rows of the result lie among NaN."""
        batch, tokens, _ = rows.shape
        out = self.weights.proj_out.weight.out_channels
        whole = torch.full((batch * tokens * out + gap,), torch.nan)
        raw = whole[: batch * tokens * out]
        call = {
            "block": self.fields(),
            "device": self.device,
            "tokens": tokens,
            "source": rows,
            "samples": batch,
            "embedded": text,
            "slots": start,
            "keep": torch.zeros_like(start) if keep is None else keep,
            "raw": None if text else raw,
        }
        report = kernels.launch(
            "jacobi_sweep_cuda", seed, **call, workspace=workspace(kernels, "jacobi_sweep_cuda", call)
        )
        return report, raw.view(batch, tokens, out)[:, : 0 if text else None]


def reference_caches(weights: BlockWeights, state: BlockState) -> tuple[Tensor, Tensor]:
    """Keys and values of panels, as (layers, cache rows, kv_heads, slots, head_dim)."""
    layers = [_sweep_reference._Heads(state, i, weights.head_dim, torch.float32) for i in range(len(weights.layers))]
    return tuple(
        torch.stack([getattr(layer, name)[:, :, : state.slots] for layer in layers]) for name in ("keys", "values")
    )
