"""The figures that this project promises, measured: one JSON line each.

    python benchmarks/targets.py [NAME ...] [--group cpu|cuda|mission|ops|quality|recorded|world] [--list]

A line has `name`, `value`, `unit`, `goal` (what shall hold), `moonshot`, `holds`, the raw medians in seconds, and
other facts that explain it. A ratio divides the medians of the competitor and of this project, which run in turn in
this process; a share is of a ceiling that is measured first, in the same run (benchmarks/ceilings.cpp). A target that
the machine cannot measure is skipped by name, with the reason. The figures of CUDA are counts that need no GPU
(benchmarks/cuda_static.py).
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import importlib.util
import itertools
import json
import os
import re
import resource
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cuda_static  # noqa: F401  (its targets)
import models
import op_speed  # noqa: F401  (its targets)
import published
import quality  # noqa: F401  (its targets)
import recorded  # noqa: F401  (its targets)
import token_order as study
import torch
import world  # noqa: F401  (its targets)
from figures import TARGETS, Figure, Skipped, target
from machine import ceilings, processor, sampled, warning
from timing import interleaved
from torch import Tensor
from torch.nn import functional as F

import starflow_ext
from starflow import decode
from starflow.solver import Chunks, Sequential, Window
from starflow_ext import ops
from starflow_ext._load import native
from starflow_ext.jacobi_sweep import jacobi_sweep
from starflow_ext.rope_append import Cache, Rotation
from starflow_ext.sweep_block import BlockState

# -- linear -----------------------------------------------------------------------------------------------------------


def _weights(out_channels: int, in_channels: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(out_channels + in_channels)
    weight = torch.randn(out_channels, in_channels, generator=generator) * in_channels**-0.5
    return weight, torch.randn(out_channels, generator=generator)


def _linear(rows: int, out_channels: int, in_channels: int, storage: Any, product_input: Any) -> dict[str, float]:
    """Medians of torch in float32 and bfloat16 and of the packed product, and errors relative to float64.

    A product of bfloat16 takes and returns bfloat16, as torch's does.
    """
    weight, bias = _weights(out_channels, in_channels)
    x = torch.randn(rows, in_channels, generator=torch.Generator().manual_seed(rows))
    packed = starflow_ext.pack_weight(weight, storage, keep=False)
    half = (x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    with torch.inference_mode():
        given = half[0] if product_input == "bfloat16" else x
        ours = functools.partial(ops.linear, given, packed, bias, product_input=product_input)
        seconds = interleaved(lambda: F.linear(x, weight, bias), lambda: F.linear(*half), ours)
        exact = F.linear(x.double(), weight.double(), bias.double())
        size = exact.abs().max()
        errors = [float((out - exact).abs().max() / size) for out in (F.linear(x, weight, bias), ours())]
    keys = ("torch_float32", "torch_bfloat16", "ours", "error_torch_float32", "error")
    return dict(zip(keys, [*seconds, *errors], strict=True))


_SHAPES = ((768, 3072), (3072, 768), (3072, 3072))


@target("cpu")
def linear_bf16() -> Iterator[Figure]:
    """Products of bfloat16 against torch's, median over three shapes, by rows."""
    goals = {16: (2.0, 2.1), 32: (2.1, 2.5), 64: (2.5, 3.0), 128: (1.9, 2.5), 256: (1.4, 2.0)}
    for rows, (goal, moonshot) in goals.items():
        runs = [_linear(rows, n, k, "bfloat16", "bfloat16") for n, k in _SHAPES]
        ratio = statistics.median(run["torch_bfloat16"] / run["ours"] for run in runs)
        raw: dict[str, Any] = {
            f"{n}x{k}": [run["torch_bfloat16"], run["ours"]] for (n, k), run in zip(_SHAPES, runs, strict=True)
        }
        raw["points"] = [
            [f"linear {rows} rows, {n}x{k}, bfloat16", 2.0 * rows * n * k, 2.0 * n * k, run["ours"]]
            for (n, k), run in zip(_SHAPES, runs, strict=True)
        ]
        yield Figure(f"linear_bf16_{rows}", ratio, "x torch bfloat16", goal, moonshot, raw=raw)


@target("cpu")
def linear_bf16_share() -> Iterator[Figure]:
    """Products of bfloat16: share of the processor's peak."""
    for rows, goal, moonshot in ((64, 0.40, 0.50), (128, 0.45, 0.60)):
        run = _linear(rows, 3072, 3072, "bfloat16", "bfloat16")
        rate = 2.0 * rows * 3072 * 3072 / run["ours"]
        raw = {"ours": run["ours"], "FLOP/s": rate, "peak": ceilings()["bf16"]}
        yield Figure(f"linear_bf16_share_{rows}", rate / ceilings()["bf16"], "of the peak", goal, moonshot, raw=raw)


@target("cpu")
def linear_small() -> Iterator[Figure]:
    """Small weights in bfloat16 against torch's."""
    runs = [_linear(rows, n, k, "bfloat16", "bfloat16") for rows in (16, 64) for n, k in ((1024, 256), (256, 1024))]
    ratio = statistics.median(run["torch_bfloat16"] / run["ours"] for run in runs)
    yield Figure("linear_small", ratio, "x torch bfloat16", 3.5, 6.0, raw={"ours": [run["ours"] for run in runs]})


@target("cpu")
def linear_stream() -> Iterator[Figure]:
    """16 rows over weights of 64 MB: share of the bandwidth of reading 64 MB."""
    run = _linear(16, 8192, 4096, "bfloat16", "bfloat16")
    rate = 2.0 * 8192 * 4096 / run["ours"]
    raw = {"ours": run["ours"], "bytes/s": rate, "read": ceilings()["read_64MB"]}
    yield Figure("linear_stream", rate / ceilings()["read_64MB"], "of the bandwidth", 0.90, 0.97, raw=raw)


@target("cpu")
def linear_two() -> Iterator[Figure]:
    """Activations in two terms (below AMX: in float32) times weights in bfloat16, against torch in float32."""
    runs = [_linear(rows, 3072, 768, "bfloat16", "two_bfloat16") for rows in (16, 64)]
    ratio = statistics.median(run["torch_float32"] / run["ours"] for run in runs)
    raw = {"error": runs[0]["error"], "computed": "float32" if native.selected_isa() != "amx" else "two products"}
    yield Figure("linear_two", ratio, "x torch float32", 4.5, 6.0, raw=raw)


@target("cpu")
def linear_three() -> Iterator[Figure]:
    """Both operands in two terms (below AMX: sums in float32), against torch's float32; error over float32's."""
    runs = [_linear(rows, 3072, 768, "two_bfloat16", "two_bfloat16") for rows in (16, 64)]
    ratio = statistics.median(run["torch_float32"] / run["ours"] for run in runs)
    raw = {"error_over_float32": max(run["error"] / run["error_torch_float32"] for run in runs)}
    yield Figure("linear_three", ratio, "x torch float32", 2.3, 3.5, raw=raw)


def float32_runs() -> dict[str, dict[str, float]]:
    """Products of float32 at the level that runs, by rows and shape."""
    return {
        f"{rows} rows, {n}x{k}": _linear(rows, n, k, "float32", "float32") for rows in (16, 64, 256) for n, k in _SHAPES
    }


@target("cpu")
def linear_f32() -> Iterator[Figure]:
    """Float32 products against torch's, both at the highest level and both at AVX2: the smallest ratio over rows."""
    runs = {native.selected_isa(): float32_runs()}
    if not native.isa_levels()["avx2"] and native.selected_isa() != "avx2":
        # Another process, because torch's libraries read their limits once.
        limits = {"STARFLOW_ISA": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
        script = "import json, targets; print(json.dumps(targets.float32_runs()))"
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=Path(__file__).parent,
            env={**os.environ, **limits, "ONEDNN_MAX_CPU_ISA": "AVX2"},
            check=True,
            capture_output=True,
            text=True,
        )
        runs["avx2"] = json.loads(done.stdout)
    ratios: dict[str, Any] = {
        f"{level}_{rows}": statistics.median(
            run["torch_float32"] / run["ours"] for case, run in found.items() if case.startswith(f"{rows} rows")
        )
        for level, found in runs.items()
        for rows in (16, 64, 256)
    }
    sizes = {f"{rows} rows, {n}x{k}": (rows, n, k) for rows in (16, 64, 256) for n, k in _SHAPES}
    points = [
        [f"linear {case}, float32", 2.0 * rows * n * k, 4.0 * n * k, runs[native.selected_isa()][case]["ours"]]
        for case, (rows, n, k) in sizes.items()
    ]
    yield Figure(
        "linear_f32", min(ratios.values()), "x torch float32, worst", 1.1, 1.5, raw={**ratios, "points": points}
    )


# -- attention --------------------------------------------------------------------------------------------------------


@target("cpu")
def attention_window() -> Iterator[Figure]:
    """64 queries, 16 heads of 64, caches of 1k, 4k and 16k, against torch with the mask that it needs."""
    for dtype, goal, moonshot in ((torch.bfloat16, 3.0, 6.0), (torch.float32, 2.0, 3.0)):
        raw = {}
        for keys in (1024, 4096, 16384):
            q, k, v = (torch.randn(1, 16, n, 64).to(dtype) for n in (64, keys, keys))
            mask = torch.ones(64, keys, dtype=torch.bool).tril(keys - 64)
            with torch.inference_mode():
                theirs, ours = interleaved(
                    functools.partial(F.scaled_dot_product_attention, q, k, v, attn_mask=mask),
                    functools.partial(ops.block_attention, q, k, v),
                )
            raw[str(keys)] = theirs / ours
        name = str(dtype).removeprefix("torch.")
        yield Figure(
            f"attention_window_{name}", statistics.median(raw.values()), f"x torch {name}", goal, moonshot, raw=raw
        )


@target("cpu")
def attention_frame_causal() -> Iterator[Figure]:
    """The denoiser's mask over 21 frames of 256 tokens, look-ahead 2, window 10, against torch with a boolean mask."""
    frames = starflow_ext.block_attention.FrameMask(0, 256, 2, 10)
    tokens = 21 * 256
    q, k, v = (torch.randn(1, 8, tokens, 64) for _ in range(3))
    index = torch.arange(tokens)
    mask = frames.visible(index, index)
    with torch.inference_mode():
        theirs, ours = interleaved(
            functools.partial(F.scaled_dot_product_attention, q, k, v, attn_mask=mask),
            functools.partial(ops.block_attention, q, k, v, causal=False, frames=frames),
            rounds=3,
        )
    raw = {"torch": theirs, "ours": ours, "mask_bytes": mask.nbytes}
    yield Figure("attention_frame_causal", theirs / ours, "x torch float32", 3.0, 5.0, raw=raw)


# -- sweeps -----------------------------------------------------------------------------------------------------------


def _sweep(width: int, positions: int) -> dict[str, Any]:
    """Medians of 8 layers over the last 64 of `positions` tokens, eager and in one sweep, in two precisions each."""
    flow = models.flow(width, (8,), frames=positions // 64)
    conditioner = flow.blocks[-1].conditioner
    rotation = Rotation(torch.randn(positions, 32).cos(), torch.randn(positions, 32).sin())
    shape = (1, conditioner.kv_heads, positions, 64)
    rows, start = torch.randn(1, 64, flow.config.token_channels), torch.tensor([positions - 64])
    window = Rotation(*(table[-64:] for table in rotation))

    def eager(dtype: torch.dtype) -> Callable[[], Tensor]:
        layers = copy.deepcopy(conditioner).to(dtype)
        caches = tuple(Cache(*(torch.zeros(shape, dtype=dtype) for _ in range(2))) for _ in layers.layers)

        def run() -> Tensor:
            with starflow_ext.reference_mode():
                return models.eager_window(layers, rows, window, caches, positions - 64)

        return run

    read = 0

    def native_sweep(precision: Any) -> Callable[[], Tensor]:
        nonlocal read
        block = models.packed(conditioner, precision)
        state = BlockState.allocate(
            block, 1, positions, storage=precision, query_rotation=rotation, key_rotation=rotation
        )
        read = block.nbytes + state.nbytes
        return functools.partial(jacobi_sweep, block, state, rows, start, product_input=precision)

    with torch.inference_mode():
        calls = (eager(torch.float32), eager(torch.bfloat16), native_sweep("float32"), native_sweep("bfloat16"))
        medians = dict(
            zip(("torch_float32", "torch_bfloat16", "float32", "bfloat16"), interleaved(*calls), strict=True)
        )
    return {**medians, "flops": 2.0 * 64 * 8 * (12 * width * width + 2 * positions * width), "bytes": read}


@target("cpu")
def sweep() -> Iterator[Figure]:
    """A sweep in bfloat16 in one call against eager layers with a preallocated cache, at 320 and 2048 positions."""
    for width, goals in ((256, ((10.0, 15.0), (6.0, 10.0))), (768, ((7.0, 11.0), (3.0, 4.5)))):
        runs = {positions: _sweep(width, positions) for positions in (320, 2048)}
        for theirs, (goal, moonshot) in zip(("float32", "bfloat16"), goals, strict=True):
            raw: dict[str, Any] = {str(p): [run[f"torch_{theirs}"], run["bfloat16"]] for p, run in runs.items()}
            if theirs == "float32":
                raw["in float32"] = {str(p): run["float32"] for p, run in runs.items()}
            else:
                raw["share of peak"] = runs[320]["flops"] / runs[320]["bfloat16"] / ceilings()["bf16"]
                raw["points"] = [
                    [f"sweep, width {width}, {p} positions, bfloat16", run["flops"], run["bytes"], run["bfloat16"]]
                    for p, run in runs.items()
                ]
            ratio = statistics.median(run[f"torch_{theirs}"] / run["bfloat16"] for run in runs.values())
            yield Figure(f"sweep_{width}_{theirs}", ratio, f"x eager {theirs}", goal, moonshot, raw=raw)


# -- sampling ---------------------------------------------------------------------------------------------------------


def _noise(seed: int) -> Tensor:
    return torch.randn(1, *models.LATENTS, generator=torch.Generator().manual_seed(seed))


def _decode(precision: str, schedule: Any, seed: int = 0) -> Any:
    flow, y, _ = models.trained()
    return decode(flow, _noise(seed), y, schedule=schedule, precision=precision)


def _published(schedule: Any) -> Tensor:
    flow, y, _ = models.trained()
    return published.decode(flow, _noise(0), y, schedule)


def _window(tolerance: float) -> Window:
    """The fastest window: AMX tiles take 96 rows in little more time than 32, AVX2 registers hold 6 rows at a time."""
    return Window({"amx": 96, "avx2": 12}.get(native.selected_isa(), 32), tolerance)


def _sample(name: str, precision: str, window: Window, goal: float, moonshot: float, most: float) -> Iterator[Figure]:
    theirs, ours = interleaved(
        functools.partial(_published, Chunks()), functools.partial(_decode, precision, window), rounds=7
    )
    certified = Window(window.size, window.tolerance, certificate=True)
    errors = [_decode(precision, certified, seed).backward_error for seed in range(8)]
    flow, reports = models.trained()[0], _decode(precision, window).reports
    # Only products with weights count: no attention, no GELU.
    flops = sum(
        2.0 * report.rows * sum(weight.numel() for weight in block.parameters() if weight.dim() == 2)
        for block, report in zip(reversed(flow.blocks), reports, strict=True)
    )
    raw = {
        "share of peak": flops / ours / ceilings()["bf16" if precision == "bfloat16" else "fma"],
        "published": theirs,
        "ours": ours,
        "backward_error_median": statistics.median(errors),
        "backward_error_worst": max(errors),
        "backward_error_goal": most,
    }
    yield Figure(name, theirs / ours, "x the published scheme in eager float32", goal, moonshot, raw=raw)


@target("cpu")
def sample_fast() -> Iterator[Figure]:
    """A whole clip of a trained model in bfloat16 against the published chunks in eager float32."""
    yield from _sample("sample_fast", "bfloat16", _window(0.02), 12.0, 25.0, 0.15)


@target("cpu")
def sample_exact() -> Iterator[Figure]:
    """A whole clip in float32 (with AMX, three products of bfloat16) against the published chunks in eager float32."""
    precision = "two_bfloat16" if native.selected_isa() == "amx" else "float32"
    yield from _sample("sample_exact", precision, _window(0.005), 5.0, 10.0, 0.02)


@target("cpu")
def sample_sequential() -> Iterator[Figure]:
    """A whole clip in bfloat16 against token-by-token decoding with a cache in eager float32."""
    eager = functools.partial(_published, Sequential())
    theirs, ours = interleaved(eager, functools.partial(_decode, "bfloat16", _window(0.02)), rounds=3)
    raw = {"sequential": theirs, "ours": ours}
    yield Figure("sample_sequential", theirs / ours, "x token by token in eager float32", 50.0, 100.0, raw=raw)


@target("cpu")
def solver() -> Iterator[Figure]:
    """Calls, evaluations and backward error of the deep block over 12 clips, against the published chunks.

    Models in raster order, which the published scheme is made for, and in spread order, which needs only two sweeps.
    """
    for order, weight in itertools.product(("raster", "spread"), (0.0, 2.0)):
        flow, y, null = models.trained(order)
        counts: dict[str, list[tuple[float, int, float]]] = {}
        for name, schedule in (
            ("published", Chunks()),
            *((f"window_{size}", Window(size, 0.01)) for size in (8, 16, 32, 64, 128)),
        ):
            counts[name] = [models.deep_block(flow, y, null, weight, schedule, seed) for seed in range(12)]
        raw: dict[str, Any] = {
            name: {
                "evaluations": statistics.median(row[0] for row in rows),
                "calls": statistics.median(row[1] for row in rows),
                "error_worst": max(row[2] for row in rows),
            }
            for name, rows in counts.items()
        }
        best = min(
            (name for name in raw if name != "published"),
            key=lambda n: (raw[n]["calls"] > raw["published"]["calls"], raw[n]["evaluations"]),
        )
        fewer = min(raw["published"][k] / raw[best][k] for k in ("evaluations", "calls"))
        raw["best"] = best
        raw["error_smaller"] = raw["published"]["error_worst"] / raw[best]["error_worst"]
        yield Figure(f"solver_{order}_guidance_{weight:g}", fewer, "x fewer evaluations and calls", 1.0, 1.2, raw=raw)


@target("cpu")
def train_step() -> Iterator[Figure]:
    """Forward, backward and optimiser of the sampled model, batch 4, against the eager torch layers."""
    for precision, goal, moonshot in (("float32", 1.5, 2.5), ("bfloat16", 2.0, 4.0)):
        step = models.training_step(precision)

        def eager(step: Callable[[], Any] = step) -> None:
            with starflow_ext.reference_mode():
                step()

        theirs, ours = interleaved(eager, step, rounds=5)
        raw = {"torch": theirs, "ours": ours}
        yield Figure(f"train_step_{precision}", theirs / ours, f"x eager {precision}", goal, moonshot, raw=raw)


@target("cpu")
def long_video() -> Iterator[Figure]:
    """Seconds a frame around frame 80 over those around frame 20, with a sliding window."""
    flow = models.flow(128, (2, 4), frames=4, local_attn_window=8)

    def clip_of(frames: int) -> Callable[[], Any]:
        z = torch.randn(1, frames, *models.LATENTS[1:], generator=torch.Generator().manual_seed(0))
        y = torch.randn(1, 16, models.TEXT_DIM, generator=torch.Generator().manual_seed(1))
        return lambda: decode(flow, z, y, schedule=Window(64, 0.01), context_frames=4)

    times = interleaved(*(clip_of(frames) for frames in (12, 28, 72, 88)), rounds=5)
    early, late = (times[1] - times[0]) / 16, (times[3] - times[2]) / 16
    raw = {"frame_20": early, "frame_80": late}
    yield Figure("long_video", late / early, "seconds a frame, late over early", 1.1, 1.0, lower=True, raw=raw)


@target("cpu")
def big() -> Iterator[Figure]:
    """The published 7B configuration with random bfloat16 weights: rows a second, memory, share of the roofline."""
    facts = models.big(ceilings())
    yield Figure("big", facts.pop("share of the roofline"), "of the roofline", 0.0, 0.70, raw=facts)


# -- streaming --------------------------------------------------------------------------------------------------------


def _resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _stream(size: int, frames: int, **options: Any) -> dict[str, float]:
    """Seconds to the first frame, and medians over stretches of a clip of the seconds a frame takes."""
    pipeline = models.streaming(size)
    next(pipeline.session("a three", **options).extend())  # weights are packed, windows measured
    begin = time.perf_counter()
    stream = pipeline.session("a three", **options).extend()
    next(stream)
    first = time.perf_counter() - begin
    stretches = []
    for _ in range(frames // 12):
        begin = time.perf_counter()
        for _ in range(12):
            next(stream)
        stretches.append((time.perf_counter() - begin) / 12)
    return {"first": first, "frame": statistics.median(stretches)}


@target("mission")
def first_frame() -> Iterator[Figure]:
    """Time to the first decoded frame, over the time of a later frame times the frames that the first one needs.

    The denoiser looks one frame ahead, so the first frame takes two frames of the flow; without look-ahead, one.
    """
    for ahead, name in ((0, "first_frame"), (1, "first_frame_look_ahead")):
        runs = [_stream(32, 24, look_ahead=ahead) for _ in range(5)]
        first, frame = (statistics.median(run[key] for run in runs) for key in ("first", "frame"))
        raw = {"first": first, "frame": frame, "frames_needed": 1 + ahead}
        yield Figure(name, first / (frame * (1 + ahead)), "x a frame", 1.3, 1.0, lower=True, raw=raw)


def _frames_a_second(size: int, goal: float, moonshot: float) -> Iterator[Figure]:
    ways: dict[str, dict[str, Any]] = {
        "as trained": {},
        "no guidance": {"guidance": 0.0},
        "no look-ahead": {"look_ahead": 0},
        "bfloat16": {"precision": "bfloat16", "solver": "window:64:0.05"},
    }
    rates: dict[str, Any] = {name: 1.0 / _stream(size, 72, **options)["frame"] for name, options in ways.items()}
    raw = rates | {"threads": torch.get_num_threads(), "isa": native.selected_isa()}
    yield Figure(f"stream_fps_{size}", rates["as trained"], "decoded frames/s", goal, moonshot, raw=raw)


@target("mission")
def stream_fps_32() -> Iterator[Figure]:
    """Decoded frames a second of the demo's model at 32 x 32, guided, denoised, one clip."""
    yield from _frames_a_second(32, 60.0, 120.0)


@target("mission")
def stream_fps_64() -> Iterator[Figure]:
    """Decoded frames a second at 64 x 64, with patches of 8 pixels, guided, denoised, one clip."""
    yield from _frames_a_second(64, 16.0, 60.0)


@target("mission")
def stream_memory() -> Iterator[Figure]:
    """Memory of the process at frame 200 of a stream over that at frame 20."""
    pipeline = models.streaming(32)
    held = {}
    for number, _ in enumerate(pipeline.session("a three").extend(201), 1):
        if number in (20, 200):
            gc.collect()
            held[number] = _resident()
    raw = {f"bytes_{number}": float(size) for number, size in held.items()}
    yield Figure("stream_memory", held[200] / held[20], "x frame 20", 1.05, 1.0, lower=True, raw=raw)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def _peak(command: list[str]) -> tuple[float, int]:
    """Seconds of a command and the most bytes that were resident, mapped files included."""
    begin = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    most = 0
    while child.poll() is None:
        # getrusage would not do: the peak of a child begins at that of its parent.
        found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{child.pid}/status").read_text())
        most = int(found[1]) * 1024 if found else most
        time.sleep(0.1)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {child.returncode}")
    return time.perf_counter() - begin, most


@target("mission")
def convert_3b() -> Iterator[Figure]:
    """Resident memory of converting the published 3B checkpoint, random weights, from float32; needs 35 GB of disk."""
    with tempfile.TemporaryDirectory() as folder:
        if shutil.disk_usage(folder).free < 40e9:
            raise Skipped(f"disk: {shutil.disk_usage(folder).free / 1e9:.0f} GB free in {folder}, expected 40")
        source = Path(folder) / "published.pth"
        size = models.published_checkpoint(source, "starflow_3B_t2i_256x256")
        for dtype in ("bfloat16", "int8"):
            out = Path(folder) / dtype
            command = [sys.executable, "-m", "starflow", "convert", "starflow_3B_t2i_256x256", str(source), str(out)]
            seconds, most = _peak([*command, "--dtype", dtype])
            written = sum(file.stat().st_size for file in out.iterdir())
            raw = {"seconds": seconds, "GB read": size / 1e9, "GB written": written / 1e9}
            yield Figure(f"convert_3b_{dtype}", most / 2**30, "GiB resident", 8.0, 1.0, lower=True, raw=raw)
            shutil.rmtree(out)


# -- elsewhere --------------------------------------------------------------------------------------------------------


@target("mission")
def token_order() -> Iterator[Figure]:
    """Sweeps a frame of the spread order at 64 tokens a frame, and its loss of bits to raster; trains twelve flows.

    On digits and on footage in clips of 3 and 8 frames, three seeds; the solver's window is of three frames.
    """
    recipes = [
        study.Recipe(order, 8, seed, steps, data, frames)
        for data, steps, frames in (("digits", 400, 3), ("footage", 800, 8))
        for seed in range(3)
        for order in ("raster", "spread")
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runs = {recipe: study.measure(recipe) for recipe in recipes}
    finally:
        torch.set_num_threads(threads)
    for data in ("digits", "footage"):
        spread, raster = (
            [run for recipe, run in runs.items() if (recipe.data, recipe.order) == (data, order)]
            for order in ("spread", "raster")
        )
        raw: dict[str, Any] = {"raster": [run.sweeps for run in raster], "spread": [run.sweeps for run in spread]}
        sweeps = statistics.mean(run.sweeps[-1] for run in spread)
        yield Figure(f"token_order_{data}_sweeps", sweeps, "sweeps a frame", 2.5, 2.0, lower=True, raw=raw)
        losses = [a.bits_per_dim - b.bits_per_dim for a, b in zip(spread, raster, strict=True)]
        raw = {"by seed": losses, "steps": spread[0].recipe.steps}
        unit = "bits a dimension above raster"
        yield Figure(f"token_order_{data}_bits", statistics.mean(losses), unit, 0.005, 0.0, lower=True, raw=raw)


@target("mission")
def zuko() -> Iterator[Figure]:
    """A trained masked autoregressive flow of zuko: its own inverse against starflow.solve, as in the example."""
    if importlib.util.find_spec("zuko") is None:
        raise Skipped("zuko is not installed: pip install 'starflow-ext[examples]'")
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "zuko_inverse.py"))
    for side, steps in ((8, 400), (16, 200)):
        flow = example["train"](side, steps)
        runs = {batch: example["compare"](flow, batch) for batch in (1, 64)}
        raw = {
            f"batch {batch}": {
                "x": run.speedup,
                "zuko": run.zuko_seconds,
                "ours": run.seconds,
                "sweeps": run.sweeps,
                "error": run.error,
                "zuko_error": run.zuko_error,
            }
            for batch, run in runs.items()
        }
        worst = min(run.speedup for run in runs.values())
        yield Figure(f"zuko_{side * side}", worst, "x zuko's inverse, worst batch", 5.0, 10.0, raw=raw)


def main() -> int:
    """Print the lines that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(TARGETS)} (default: all)")
    parser.add_argument(
        "--group",
        choices=("cpu", "cuda", "mission", "ops", "quality", "recorded", "world"),
        help="only those of one group",
    )
    parser.add_argument("--list", action="store_true", help="print the names and what they measure")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in TARGETS]
    if unknown:
        parser.error(f"NAME is {unknown[0]!r}, expected one of {', '.join(TARGETS)}")
    # Nothing would be measured, with status 0.
    outside = [name for name in args.names if args.group and TARGETS[name][0] != args.group]
    if outside:
        parser.error(
            f"NAME is {outside[0]!r} of the group {TARGETS[outside[0]][0]}, expected one of the group {args.group}"
        )
    if not args.list:
        busy = sampled()
        # The log of a run shows it at once; the lines keep it.
        if warning(busy):
            print(f"warning: {warning(busy)}", file=sys.stderr)
        facts = {"processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        facts |= {"isa": native.selected_isa(), "cores": os.cpu_count(), "cores busy with other work": round(busy, 2)}
        print(json.dumps({"name": "machine", **facts}), flush=True)
    started = False
    for name, (group, function) in TARGETS.items():
        if (args.names and name not in args.names) or (args.group and group != args.group):
            continue
        # The targets of CUDA run on no GPU and have no ceilings, those of ops are ratios, and those of quality and
        # world bring their own counts.
        if not args.list and not started and group not in ("cuda", "ops", "quality", "recorded", "world"):
            print(json.dumps({"name": "ceilings", "isa": native.selected_isa(), **ceilings()}), flush=True)
            started = True
        if args.list:
            print(f"{name} ({group}): {function.__doc__}")
            continue
        try:
            for figure in function():
                print(figure.line(), flush=True)
        except Skipped as reason:
            print(json.dumps({"name": name, "skipped": str(reason)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
