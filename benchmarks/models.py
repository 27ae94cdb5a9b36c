"""Models that the benchmarks measure: untrained, trained once and kept, or as large as the published one."""

from __future__ import annotations

import functools
import math
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from starflow import Flow, FlowConfig, Guidance
from starflow.cli.options import make_config
from starflow.config import RunConfig
from starflow.data import DIGITS, Clip, MovingDigits
from starflow.mapped import release
from starflow.model import Conditioner, FlowBlock, nll_of, pack_conditioner, to_sequence
from starflow.model.layers import Attending
from starflow.sampling import Pipeline
from starflow.solver import BlockDecoder, Schedule, certify
from starflow.solver.loop import invert
from starflow.storage import published_state
from starflow.training import train
from starflow_ext import ops, pack_weight
from starflow_ext.rope_append import Cache, Rotation
from starflow_ext.sweep_block import BlockState, BlockWeights, LayerWeights, LinearWeights

HERE = Path(__file__).parent
LATENTS = (5, 48, 8, 8)  # frames, channels, height, width: 320 tokens
TEXT_DIM = 64


def flow(width: int, layers: tuple[int, ...], *, frames: int, **options: Any) -> Flow:
    """An untrained flow of 64 tokens a frame with 16 text tokens."""
    torch.manual_seed(0)
    config = FlowConfig(
        in_channels=48,
        img_size=8,
        channels=width,
        layers_per_block=layers,
        head_dim=64,
        txt_size=16,
        txt_dim=TEXT_DIM,
        cond_top_only=True,
        soft_clip=4.0,
        use_final_norm=True,
        seq_order="L2R",
        temporal_causal=2,
        shallow_block_local=True,
        top_order="spread",
        **options,
    )
    built = Flow(config).eval()
    for block in built.blocks:
        # Training starts from zero; other weights make tokens depend on each other.
        torch.nn.init.normal_(block.conditioner.proj_out.weight, 0.0, 0.02)
    return built


def packed(conditioner: Conditioner, storage: Any) -> BlockWeights:
    """The packed network of a block."""
    return pack_conditioner(conditioner, storage).block


def eager_window(
    conditioner: Conditioner, rows: Tensor, rotation: Rotation, caches: tuple[Cache, ...], start: int
) -> Tensor:
    """One call of the layers in eager torch, over a window behind `start` cached tokens."""
    h = conditioner.embed(rows.to(conditioner.dtype))
    attending = Attending(rotation, rotation, caches=caches, start=start)
    return conditioner.put_out(conditioner.run(h, attending))


@functools.cache
def trained(order: str = "spread") -> tuple[Flow, Tensor, Tensor]:
    """The model of digits48.yaml, trained at the first call (minutes), with a prompt and the empty one.

    Kept in `.cache` beside the benchmarks; remove that folder to train again.

    Args:
        order: token order of the deep block: "spread", that of our models, or "raster", the published one, without the
            embeddings of positions and text that our models add to spread order.
    """
    config = RunConfig.load(HERE / "digits48.yaml")
    folder = HERE / ".cache" / "digits48"
    if order == "raster":
        raster = replace(config.flow, top_order="raster", position_embed=False, text_embed=False)
        config, folder = replace(config, flow=raster), folder.with_name("digits48_raster")
    if not (folder / "done").exists():
        print(f"training the {order} model of the benchmarks, once ...", file=sys.stderr)
        train(config, folder)
        (folder / "done").touch()
    pipeline = Pipeline.load(folder)
    prompt, null = (pipeline.condition([text]) for text in ("a three moving up and left", ""))
    assert prompt is not None
    assert null is not None
    return pipeline.flow, prompt, null


class CutDigits:
    """Clips cut anywhere from long ones of `MovingDigits`, captioned by the digit alone.

    A clip of `MovingDigits` begins in the middle of the frame and ends before the digit comes back from a wall. A model
    that is trained on these clips can continue a clip to any length.
    """

    length = 10000
    parent = 64

    def __init__(self, frames: int, size: int, split: Literal["train", "test"] = "train") -> None:
        self.frames = frames
        self._long = MovingDigits(frames=self.parent, size=size, split=split, length=self.length)

    def __len__(self) -> int:
        return self.length

    def item(self, index: int, *, epoch: int = 0, seed: int = 0) -> Clip:
        """One clip, cut at a place that follows from the arguments."""
        clip = self._long.item(index, epoch=epoch, seed=seed)
        start = int(np.random.default_rng([index, epoch, seed, 1]).integers(self.parent - self.frames + 1))
        digit = next(word for word in clip.caption.split() if word in DIGITS)
        return Clip(clip.pixels[start : start + self.frames], f"a {digit}", clip.name)


@functools.cache
def streaming(size: int, steps: int = 900) -> Pipeline:
    """The demo's model on `CutDigits` of `size` pixels, trained at the first call (minutes) and kept like `trained`.

    At 32 pixels it is the demo's model; at 64 it has patches of 8 pixels, so that a frame has as many tokens.
    """
    patch = size // 8
    folder = HERE / ".cache" / f"cut{size}"
    settings: list[tuple[list[str], Any]] = [
        (["flow", "in_channels"], patch**2),
        (["flow", "img_size"], 8),
        (["flow", "pt_seq_len"], 16),
        (["codec", "patch"], patch),
        (["data", "height"], size),
        (["data", "width"], size),
        (["train", "steps"], steps),
        (["sample", "solver"], "window:64"),
    ]
    config = make_config("digits", settings)
    if not (folder / "done").exists():
        print(f"training the model of the benchmarks at {size} pixels, once ...", file=sys.stderr)
        train(config, folder, dataset=CutDigits(config.data.frames, size))
        (folder / "done").touch()
    return Pipeline.load(folder)


def deep_block(
    model: Flow, y: Tensor, null: Tensor, weight: float, schedule: Schedule, seed: int
) -> tuple[float, int, float]:
    """Evaluations per token, calls and backward error of solving the deep block for one clip."""
    block = model.blocks[-1]
    assert isinstance(block, FlowBlock)
    frames, channels, height, width = LATENTS
    layout = block.layout(frames, height, width, y, image=False)
    grid = torch.randn(1, frames, height, width, channels, generator=torch.Generator().manual_seed(100 + seed))
    z = to_sequence(grid, layout.order)
    guidance = Guidance(weight)
    with torch.inference_mode():
        x, report = invert(BlockDecoder(block, layout, 1, y, null, guidance), z, schedule)
        error = certify(BlockDecoder(block, layout, 1, y, null, guidance), x, z)
    return report.evaluations_per_token / (2 if weight else 1), report.sweeps, error


def training_step(precision: str) -> Callable[[], None]:
    """A training step (forward, backward, optimiser) of the trained model's architecture on a batch of 4."""
    config = RunConfig.load(HERE / "digits48.yaml").flow
    torch.manual_seed(0)
    model = Flow(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x, y = torch.randn(4, *LATENTS), torch.randn(4, config.txt_size, config.txt_dim)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            loss = nll_of(model.encode(x, y)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def big(ceilings: dict[str, float], *, tokens: int = 64, most_seconds: float = 120.0) -> dict[str, Any]:
    """Time sweeps of the published 7B video model's deep block, with random bfloat16 weights, guidance on.

    24 layers of width 4096 are 4.8 billion parameters: 9.7 GB, packed layer by layer, so that no second copy exists. A
    frame of 480p is 30 x 53 tokens behind 256 of text. The shallow blocks and the denoiser are as large as 11 of these
    layers and are not built.

    Args:
        ceilings: peaks and bandwidths of this machine.
        tokens: tokens of the window.
        most_seconds: time after which sweeps are not repeated.
    """
    config = RunConfig.load("starflow-v_7B_t2v_caus_480p").flow
    width, heads = config.width(config.num_blocks - 1), config.heads(config.num_blocks - 1)
    kv_heads, layers = config.kv_heads(config.num_blocks - 1), config.layers_per_block[-1]
    generator = torch.Generator().manual_seed(0)

    def linear(out_channels: int, in_channels: int) -> LinearWeights:
        weight = torch.empty(out_channels, in_channels, dtype=torch.bfloat16)
        weight.normal_(0.0, in_channels**-0.5, generator=generator)
        return LinearWeights(pack_weight(weight, keep=False), torch.zeros(out_channels))

    def layer() -> LayerWeights:
        one = torch.ones(width), torch.zeros(width)
        return LayerWeights(
            qkv=linear((heads + 2 * kv_heads) * config.head_dim, width),
            proj=linear(width, heads * config.head_dim),
            up=linear(4 * width, width),
            down=linear(width, 4 * width),
            attention_norm=one,
            mlp_norm=one,
        )

    channels = config.token_channels
    weights = BlockWeights(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=config.head_dim,
        proj_in=linear(width, channels),
        proj_out=linear(2 * channels, width),
        layers=tuple(layer() for _ in range(layers)),
        norm="layer_norm",
        start_token=torch.zeros(channels),
        final_norm=torch.zeros(width),
    )
    text, frame = config.txt_size, 30 * 53
    angles = torch.rand(text + frame, config.head_dim // 2, generator=generator) * math.tau
    rotation = Rotation(angles.cos(), angles.sin())
    state = BlockState.allocate(
        weights, 2, text + frame, text_tokens=text, storage="bfloat16", query_rotation=rotation, key_rotation=rotation
    )
    with torch.inference_mode():
        begin = time.perf_counter()
        embedded = torch.randn(2, text, width, generator=generator)
        start = torch.zeros(2, dtype=torch.int64)
        ops.jacobi_sweep(weights, state, embedded, start, product_input="bfloat16", text=True)
        prefill = time.perf_counter() - begin
        rows = torch.randn(2, tokens, channels, generator=generator)
        slots = torch.full((2,), text + frame // 2)
        times: list[float] = []
        while not times or (sum(times) < most_seconds and len(times) < 7):
            begin = time.perf_counter()
            ops.jacobi_sweep(weights, state, rows, slots, product_input="bfloat16")
            times.append(time.perf_counter() - begin)
    seconds = min(times)
    flops = 2.0 * 2 * tokens * (weights.nbytes / 2 + layers * width * 2 * (text + frame // 2 + tokens))
    least = max(flops / ceilings["bf16"], weights.nbytes / ceilings["read_256MB"])
    return {
        "share of the roofline": least / seconds,
        "seconds a sweep": seconds,
        "rows": 2 * tokens,
        "rows a second": 2 * tokens / seconds,
        "text prefill": prefill,
        "weights GB": weights.nbytes / 1e9,
        "caches GB": state.nbytes / 1e9,
        "peak resident GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def published_checkpoint(path: Path, name: str) -> int:
    """Writes random float32 weights of a packaged configuration as the published code saves them; returns the bytes.

    The weights are drawn into files beside `path`, which are removed: memory holds one of them at a time.
    """
    config = RunConfig.load(name).flow
    with torch.device("meta"):
        flow = Flow(config)
    generator = torch.Generator().manual_seed(0)
    state = {}
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        for number, (key, tensor) in enumerate(published_state(flow).items()):
            size = tensor.numel() * 4
            storage = torch.UntypedStorage.from_file(f"{folder}/{number}", shared=True, nbytes=size)
            drawn = torch.empty(0).set_(storage).view(tensor.shape)
            drawn.normal_(0.0, 0.02, generator=generator)
            release([drawn])
            state[key] = drawn
        torch.save(state, path)
    return sum(tensor.nbytes for tensor in state.values())
