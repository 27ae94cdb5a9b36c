"""Packed blocks as the CUDA kernels of jacobi_sweep and jacobi_solve take them, in the CPU's memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from starflow_ext.jacobi_solve import SolveProgress
from starflow_ext.linear_pack import device_rows_shape
from starflow_ext.norm import EPSILON, OFFSET
from starflow_ext.sweep_block import BlockState, BlockWeights, LayerWeights, LinearWeights

from .emulator import Kernels, Mutation, Report, emulated

SWEEP = "ops/jacobi_sweep/jacobi_sweep.cu"
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
MULTIPROCESSORS = 4


SOLVE = "ops/jacobi_solve/jacobi_solve.cu"


def solve_kernels(mutation: Mutation | None = None) -> Kernels:
    return emulated(SOLVE, mutation)


def sweep_kernels(mutation: Mutation | None = None) -> Kernels:
    return emulated(SWEEP, mutation)


def _matrix(linear: LinearWeights | None) -> Mapping[str, Any]:
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
    return {"kind": name, "weight": weight, "bias": bias, "epsilon": EPSILON[kind], "weight_offset": OFFSET[kind]}


def workspace(kernels: Kernels, launcher: str, call: Mapping[str, Any]) -> Tensor:
    """The workspace that a call asks for, full of what is no number."""
    size = torch.zeros(1, dtype=torch.int64)
    kernels.launch(launcher, 0, **call, workspace_bytes=size)
    return torch.full((int(size),), 255, dtype=torch.uint8)


@dataclass
class DeviceBlock:
    """A block and its state on a device of some architecture; the caches are rows of head_dim elements."""

    weights: BlockWeights
    state: BlockState
    keys: Tensor
    values: Tensor
    sm90: bool = False
    sm100: bool = False
    early: bool = True

    @classmethod
    def of(
        cls, weights: BlockWeights, state: BlockState, *, sm90: bool = False, sm100: bool = False, early: bool = True
    ) -> DeviceBlock:
        shape = (*state.keys.shape[:3], state.slots, weights.head_dim)
        # What was never written must not be read.
        keys, values = (torch.full(shape, torch.nan, dtype=state.keys.dtype) for _ in range(2))
        return cls(weights, state, keys, values, sm90, sm100, early)

    def rows(self, caches: Tensor) -> DeviceBlock:
        """A copy of some rows of the caches."""
        state = self.state.select(caches)
        keys, values = (cache[:, caches].contiguous() for cache in (self.keys, self.values))
        return DeviceBlock(self.weights, state, keys, values, self.sm90, self.sm100, self.early)

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
            "condition_tokens": state.condition_tokens,
            "query_cos": query[0],
            "query_sin": query[1],
            "key_cos": key[0],
            "key_sin": key[1],
            "temperature": state.temperature,
            "cache_rows": state.keys.shape[1],
            "text_tokens": state.text_tokens,
            "slots": state.slots,
            "mask_frame_tokens": state.frame_tokens,
            "mask_frames": state.frames_behind,
            "whole_frames": int(state.whole_frames),
            "cache": str(state.keys.dtype).removeprefix("torch."),
        }

    @property
    def device(self) -> Mapping[str, Any]:
        linear = "wgmma" if self.sm90 else "tcgen05" if self.sm100 else "mma_sync"
        return {"multiprocessors": MULTIPROCESSORS, "sm90": self.sm90, "linear": linear, "early": self.early}

    def sweep(
        self,
        kernels: Kernels,
        rows: Tensor,
        start: Tensor,
        keep: Tensor | None = None,
        *,
        text: bool = False,
        seed: int = 0,
        most_rows: int = 4096,
    ) -> tuple[Report, Tensor]:
        """As starflow_ext.ops.jacobi_sweep, so many rows together."""
        samples, tokens, _ = rows.shape
        out = self.weights.proj_out.weight.out_channels
        raw = torch.full((len(start), tokens, out), torch.nan)
        call = {
            "block": self.fields(),
            "device": self.device,
            "most_rows": most_rows,
            "tokens": tokens,
            "source": rows,
            "samples": samples,
            "embedded": text,
            "slots": start,
            "keep": torch.zeros_like(start) if keep is None else keep,
            "raw": None if text else raw,
        }
        report = kernels.launch(
            "jacobi_sweep_cuda", seed, **call, workspace=workspace(kernels, "jacobi_sweep_cuda", call)
        )
        return report, raw[:, : 0 if text else None]


@dataclass(frozen=True)
class Options:
    """How to solve; as of starflow_ext.ops.jacobi_solve."""

    first: int = 1
    first_token: int = 0
    frame_tokens: int = 8
    window: int = 7
    tolerance: float = 0.02
    activation: str = "softplus"
    soft_clip: float = 3.0
    guidance: float = 0.0
    guided: str = "gaussian"

    @property
    def halves(self) -> int:
        return 2 if self.guidance > 0.0 else 1

    def fields(self) -> Mapping[str, Any]:
        """The fields of SolveOptions."""
        activation = {"softplus": "softplus", "exp": "exponential", "none": "none"}[self.activation]
        guidance = {"weight": self.guidance, "linear": self.guided != "gaussian"}
        parts = {"log_scale": "a", "shift": "b", "annealed": "+"}
        return {
            **{name: getattr(self, name) for name in ("first", "first_token", "frame_tokens", "window", "tolerance")},
            "affine": {"activation": activation, "soft_clip": self.soft_clip},
            "guidance": guidance | {name: part in self.guided for name, part in parts.items()},
        }


@dataclass(frozen=True)
class Solved:
    """What a call reports."""

    report: Report
    accepted: list[int]
    bad: tuple[int, int]
    more: bool


def solve(
    kernels: Kernels,
    device: DeviceBlock,
    progress: SolveProgress,
    z: Tensor,
    options: Options,
    *,
    most_sweeps: int = 64,
    repeat: str = "graph",
    seed: int = 0,
    most_rows: int = 4096,
) -> Solved:
    """As starflow_ext.ops.jacobi_solve."""
    head = 4
    # What was there before is no report.
    report = torch.full((head + most_sweeps,), 77, dtype=torch.int64)
    call = {
        "block": device.fields(),
        "device": device.device,
        "most_rows": most_rows,
        "options": options.fields(),
        "state": {
            "batch": z.shape[0],
            "tokens": z.shape[1],
            "x": progress.x,
            "z": z,
            "frontier": progress.frontier,
            "fresh": progress.fresh,
            "kept": progress.kept,
        },
        "most_sweeps": most_sweeps,
        "repeat": repeat,
        "report": report,
    }
    done = kernels.launch("jacobi_solve_cuda", seed, **call, workspace=workspace(kernels, "jacobi_solve_cuda", call))
    more, sweeps, sample, token, *accepted = report.tolist()
    assert accepted[sweeps:] == [0] * (most_sweeps - sweeps)
    return Solved(done, accepted[:sweeps], (sample, token), bool(more))


def reference_caches(weights: BlockWeights, state: BlockState) -> tuple[Tensor, Tensor]:
    """Keys and values of panels, as (layers, cache rows, kv_heads, slots, head_dim)."""
    layers = [state.layer_cache(index, weights.head_dim) for index in range(len(weights.layers))]
    return tuple(torch.stack([getattr(layer, name).float() for layer in layers]) for name in ("keys", "values"))
