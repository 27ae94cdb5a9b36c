"""block_attention and its gradient on the emulated device, against the definition in float64."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from starflow_ext._spec import Sample
from starflow_ext.block_attention import SPEC, FrameMask

from ..ops import battery
from .emulator import CSRC, SEEDS, EmulationError, Kernels, Mutation, Report, emulated

FORWARD = "ops/block_attention/block_attention.cu"
BACKWARD = "ops/block_attention/block_attention_backward.cu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of gradients, relative to the largest: weights and products are rounded before each product.
GRADIENT_BOUNDS = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# Rows of a tile, and parts of the keys. Tiles of 128 rows exist for 16 bits; float32 has one size for each width.
SCHEDULES = ((64, 1), (128, 1), (64, 3), (64, 2), (128, 4))
OPTIONS = ("causal", "q_start", "q_starts", "k_length", "k_lengths", "prefix", "frame_tokens", "look_ahead", "window")


@dataclass(frozen=True)
class Call:
    """What both launchers take, from the arguments of the public function."""

    q: Tensor
    k: Tensor
    v: Tensor
    common: Mapping[str, Any]

    @staticmethod
    def of(arguments: Mapping[str, Any]) -> Call:
        _, (q, k, v, *values) = SPEC.lowered(Sample("", arguments))
        options = dict(zip((*OPTIONS, "temperature", "temperatures"), values, strict=True))
        batch, heads, queries, head_dim = q.shape
        kv_heads, keys = k.shape[1:3]
        start, length = options["q_start"], options["k_length"]
        root, temperatures = head_dim**0.5, options["temperatures"]
        return Call(
            q,
            k,
            v,
            {
                "shape": {
                    "batch": batch,
                    "heads": heads,
                    "kv_heads": kv_heads,
                    "queries": queries,
                    "keys": keys,
                    "head_dim": head_dim,
                    "data": q.dtype,
                },
                "mask": {
                    "causal": options["causal"],
                    "frames": options["frame_tokens"] > 0,
                    "prefix": options["prefix"],
                    "frame_tokens": max(1, options["frame_tokens"]),
                    "look_ahead": options["look_ahead"],
                    "window": options["window"],
                    "start": keys - queries if start is None else start,
                    "starts": options["q_starts"],
                    "length": keys if length is None else length,
                    "lengths": options["k_lengths"],
                },
                "scale": {
                    "scale": 1.0 / (root * options["temperature"]),
                    "root": root,
                    "temperatures": None if temperatures is None else temperatures.double(),
                },
                "q": q,
                "k": k,
                "v": v,
            },
        )

    @property
    def wide(self) -> bool:
        return self.q.shape[-1] % (4 if self.q.dtype == torch.float32 else 8) == 0


def _by_token(like: Tensor) -> Tensor:
    """As the op allocates results, but rows as far apart as those of ``like``; NaN where nothing is written."""
    batch, heads, tokens, head_dim = like.shape
    return like.new_full((batch, tokens, heads, like.stride(2)), torch.nan).transpose(1, 2)[..., :head_dim]


def _forward(kernels: Kernels, seed: int, call: Call, rows: int = 64, splits: int = 1) -> tuple[Report, Tensor, Tensor]:
    out, lse = _by_token(call.q), torch.full(call.q.shape[:3], torch.nan)
    parts = torch.full((splits * call.q.numel() + splits * lse.numel(),), torch.nan) if splits > 1 else None
    report = kernels.launch(
        "block_attention_cuda", seed, **call.common, out=out, lse=lse, tile_rows=rows, splits=splits, parts=parts
    )
    return report, out, lse


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    """Calls of the battery that have a row; of the large one two of the six samples."""
    for sample in battery.samples(SPEC, (dtype,)):
        if sample.arguments["q"].numel() > 0:
            yield sample.map(lambda tensor: tensor[:2]) if sample.label == "large" else sample


@cache
def _exact(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    found = []
    for sample in _samples(dtype):
        doubles = battery.in_float64(sample)
        found.append(SPEC.reference(**{**SPEC.arguments(**doubles.arguments), "return_lse": True}))
    return found


def _assert_forward(dtype: torch.dtype, label: str, got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    battery.assert_near(got[0], want[0], SPEC.bounds[dtype], label)
    battery.assert_near(got[1], want[1], SPEC.bounds[torch.float32], f"{label}, lse")


def _assert_values(kernels: Kernels, dtype: torch.dtype) -> None:
    for i, (sample, want) in enumerate(zip(_samples(dtype), _exact(dtype), strict=True)):
        call = Call.of(sample.arguments)
        rows, splits = SCHEDULES[i % len(SCHEDULES)]
        report, *got = _forward(kernels, i, call, rows, splits)
        _assert_forward(dtype, f"{sample.label}, {rows} rows, {splits} parts", (got[0], got[1]), want)
        assert report.bank_conflicts == 0 or not call.wide, sample.label


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value(dtype: torch.dtype) -> None:
    """Every mask, size and option of the battery, each in another schedule, by other tiles and parts of the keys."""
    _assert_values(emulated(FORWARD), dtype)


def _draw(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _arguments(
    dtype: torch.dtype, head_dim: int = 64, queries: int = 70, keys: int = 150, **options: Any
) -> dict[str, Any]:
    """Two samples, two heads on one of keys, keys of different lengths, a prefix and frames, rows that see nothing."""
    return {
        "q": _draw(2, 2, queries, head_dim, dtype=dtype, seed=1),
        "k": _draw(2, 1, keys, head_dim, dtype=dtype, seed=2),
        "v": _draw(2, 1, keys, head_dim, dtype=dtype, seed=3),
        "causal": True,
        "frames": FrameMask(prefix=20, frame_tokens=30, look_ahead=1, window=2),
        "q_start": torch.tensor([keys - queries, -3]),
        "k_length": torch.tensor([keys, keys - 13]),
        **options,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_schedule_gives_the_same_bits(dtype: torch.dtype, head_dim: int) -> None:
    kernels = emulated(FORWARD)
    call = Call.of(_arguments(dtype, head_dim, queries=35))
    for rows, splits in ((64, 2), (128, 1)):
        _, *expected = _forward(kernels, SEEDS[0], call, rows, splits)
        for seed in SEEDS[1:]:
            _, *got = _forward(kernels, seed, call, rows, splits)
            battery.assert_equal(tuple(got), tuple(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_stand_alone(dtype: torch.dtype) -> None:
    """With the keys in one part, a query's bits are those that it has alone, in a tile of any size."""
    kernels = emulated(FORWARD)
    arguments = {**_arguments(dtype, head_dim=128), "q_start": 60}
    _, together, _ = _forward(kernels, 0, Call.of(arguments), 128)
    for i in (0, 1, 37, 69):
        alone = {**arguments, "q": arguments["q"][:, :, i : i + 1], "q_start": 60 + i}
        _, out, _ = _forward(kernels, 1, Call.of(alone))
        assert torch.equal(out, together[:, :, i : i + 1])


def test_only_visible_keys_are_read() -> None:
    """Each once by the tile of rows that sees them, and nothing of what lies behind the length."""
    kernels = emulated(FORWARD)
    options = {"q_start": torch.tensor([80, 90]), "k_length": torch.tensor([150, 137])}
    arguments = _arguments(torch.bfloat16, queries=32, **options)
    for b, length in enumerate((150, 137)):
        for name in ("k", "v"):
            arguments[name][b, :, length:] = torch.nan
    report, out, _ = _forward(kernels, 0, Call.of(arguments))
    assert out.isfinite().all()
    # The prefix, and keys from the first that the first query sees to the last that the last one does.
    visible = (20 + 112 - 20) + (20 + 122 - 20)
    assert report.read["k"] == report.read["v"] == visible * 64 * 2
    assert report.read["q"] == arguments["q"].nbytes
    assert report.written["out"] == out.nbytes


def test_rows_may_lie_anywhere() -> None:
    """At any address and distance, the bits are those of rows that lie side by side."""
    kernels = emulated(FORWARD)
    arguments = _arguments(torch.bfloat16)
    _, *expected = _forward(kernels, 0, Call.of(arguments))
    for skip, gap in ((1, 0), (0, 3), (8, 8)):

        def moved(tensor: Tensor, skip: int = skip, gap: int = gap) -> Tensor:
            whole = torch.full((*tensor.shape[:-1], skip + tensor.shape[-1] + gap), torch.nan, dtype=tensor.dtype)
            whole[..., skip : skip + tensor.shape[-1]] = tensor
            return whole[..., skip : skip + tensor.shape[-1]]

        elsewhere = {**arguments, **{name: moved(arguments[name]) for name in ("q", "k", "v")}}
        _, *got = _forward(kernels, 1, Call.of(elsewhere))
        battery.assert_equal(tuple(got), tuple(expected))


def _backward(
    kernels: Kernels, seed: int, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Report, tuple[Tensor, ...]]:
    grads = tuple(_by_token(x) for x in (call.q, call.k, call.v))
    dots = torch.full(lse.shape, torch.nan)
    report = kernels.launch(
        "block_attention_backward_cuda",
        seed,
        **call.common,
        out=out,
        lse=lse,
        grad_out=grad_out,
        grad_lse=grad_lse,
        grad_q=grads[0],
        grad_k=grads[1],
        grad_v=grads[2],
        dots=dots,
    )
    return report, grads


@cache
def _exact_gradients(dtype: torch.dtype) -> list[tuple[Sample, Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...]]]:
    """Of each call with a gradient: results and what comes from above, and the gradients by autograd in float64."""
    found = []
    samples = [sample for sample in _samples(dtype) if sample.arguments["q"].shape[-1] <= 128]
    samples += [Sample(f"mixed, head_dim {head_dim}", _arguments(dtype, head_dim)) for head_dim in (64, 128)]
    for sample in samples:
        arguments = SPEC.arguments(**battery.in_float64(sample).arguments)
        leaves = [arguments[name].requires_grad_() for name in ("q", "k", "v")]
        out, lse = SPEC.reference(**{**arguments, "return_lse": True})
        above = _draw(*out.shape, dtype=dtype, seed=4)
        above_lse = _draw(*lse.shape, dtype=torch.float32, seed=5).where(lse.isfinite(), torch.tensor(0.0))
        seen = torch.where(lse.isfinite(), lse, 0.0)
        loss = (out * above.double()).sum() + (seen * above_lse.double()).sum()
        grads = torch.autograd.grad(loss, leaves)
        found.append((sample, out.detach().to(dtype), lse.detach().float(), above, above_lse, grads))
    return found


def _assert_gradients(kernels: Kernels, dtype: torch.dtype) -> None:
    for seed, (sample, out, lse, above, above_lse, expected) in enumerate(_exact_gradients(dtype)):
        call = Call.of(sample.arguments)
        report, grads = _backward(kernels, seed, call, out, lse, above, above_lse)
        for name, got, want in zip("qkv", grads, expected, strict=True):
            largest = max(1.0, 4 * want.abs().max().item()) if want.numel() else 1.0
            bound = SPEC.bounds[dtype]._replace(relative=0.0, absolute=GRADIENT_BOUNDS[dtype] * largest)
            battery.assert_near(got, want, bound, f"{sample.label}, {name}")
        assert report.bank_conflicts == 0 or not call.wide, sample.label


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient(dtype: torch.dtype) -> None:
    """Every mask, size and option of the battery, through both results; each call in another schedule."""
    _assert_gradients(emulated(BACKWARD), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_schedule_gives_the_same_gradient(dtype: torch.dtype, head_dim: int) -> None:
    kernels = emulated(BACKWARD)
    call = Call.of(_arguments(dtype, head_dim, queries=35))
    out, above = (_draw(*call.q.shape, dtype=dtype, seed=seed) for seed in (6, 7))
    lse = _draw(*call.q.shape[:3], dtype=torch.float32, seed=8) + 8
    _, expected = _backward(kernels, SEEDS[0], call, out, lse, above, None)
    for seed in SEEDS[1:]:
        battery.assert_equal(_backward(kernels, seed, call, out, lse, above, None)[1], expected)


# Mutations: each barrier, each wait, each bound taken away in turn. All are in one compiled source, and a global says
# which one is on; a pattern and what stands there instead, `on` being the place's condition.
STATEMENT = "if (!on) {0}"
BOUND = "(on || ({0}))"
TILES = "ops/block_attention/block_attention_tiles.cuh"
SHARED = {
    r"column < head_dim(?= &&|;)": BOUND,  # of a copy
    r"column \+ c < head_dim": BOUND,
    r"(?<=some = )from != nullptr": BOUND,
    r"(?<=to\[c\] = )from != nullptr": BOUND,
    r"(?<=if \()column < head_dim": BOUND,
    r"column \+ 1 < head_dim": BOUND,
    r"to == nullptr": "(!on && {0})",
    r"fits\(all\) && \.\.\.": "on || (fits(all) && ...)",
    r"shape\.head_dim % chunk == 0": BOUND,
}
BARRIERS = {
    r"__sync(threads|warp)\(\);": STATEMENT,
    r"cute::cp_async_wait<0>\(\);": STATEMENT,
    r"1 - stage": "(on ? stage : {0})",
}
FORWARD_MUTATIONS = BARRIERS | {
    r"first \+ row < end(?= \?)": BOUND,
    r"\bany\.has\(begin \+ row\)": BOUND,
    r"!seen\(\)\.every\.all_in\([^;]*?\)(?=\) F::hide)": "(!on && {0})",
    r"(?<=if \()r < end(?= &&|\))": BOUND,
    r"\br < end(?= \? row_at)": BOUND,
    r"index >= all": "(!on && {0})",
}
BACKWARD_MUTATIONS = BARRIERS | {
    r"first \+ row < end(?= \?)": BOUND,
    r"seen\.any\.has\(begin \+ row\)": BOUND,
    r"begin \+ row < row_end": BOUND,
    r"begin \+ c < row_end": BOUND,
    r"\ball \|\|": "all || on ||",
    r"(?<=if \()!all": "!on && {0}",
    r"\br < end(?= \? (row_at|r :))": BOUND,
    r"\bkey < end": BOUND,
    r"index >= shape\.batch \* shape\.heads \* shape\.queries": "(!on && {0})",
}


def _switchable(source: str, changes: Mapping[str, str]) -> tuple[Mutation, list[str]]:
    """A source with all its mutations, for 64 channels alone, and what they are."""
    places: list[str] = []

    def planted(text: str, name: str, changes: Mapping[str, str]) -> str:
        def plant(match: re.Match[str], new: str) -> str:
            places.append(f"{name}:{text.count(chr(10), 0, match.start()) + 1}:{match[0]}")
            return new.replace("{0}", match[0]).replace("on", f"planted_is({len(places) - 1})", 1)

        marks: list[tuple[int, int, str]] = []
        for pattern, new in changes.items():
            matches = list(re.finditer(pattern, text))
            assert matches, f"{pattern} matches nothing in {name}"
            marks += [(match.start(), match.end(), plant(match, new)) for match in matches]
        for begin, end, new in sorted(marks, reverse=True):
            text = text[:begin] + new + text[end:]
        return text

    original = (CSRC / source).read_text()
    text = planted(original, Path(source).name, changes)
    tiles = planted((CSRC / TILES).read_text(), Path(TILES).name, SHARED)
    head = (
        'extern "C" __attribute__((visibility("default"))) int planted;\n'
        "int planted = -1;\nstatic inline bool planted_is(int place) { return planted == place; }\n"
    )
    text = text.replace(f'#include "{TILES}"', head + tiles.replace("#pragma once", ""))
    text = text.replace("launch_by_width<Float16>", "launch_by_width<BFloat16>")
    text = re.sub(r"<Element, (128|256)\b", "<Element, 64", text)
    return Mutation(source, 0, len(original), text), places


def _in_rows(tensor: Tensor, skip: int = 0) -> Tensor:
    """The same in rows of 24 elements where it has less, from a place on, with NaN around it."""
    head_dim = tensor.shape[-1]
    rows = tensor.new_full((*tensor.shape[:-1], skip + max(24, head_dim)), torch.nan)
    rows[..., skip : skip + head_dim] = tensor
    return rows[..., skip : skip + head_dim]


def _small(dtype: torch.dtype, head_dim: int, skip: int = 0) -> dict[str, Any]:
    """Rows and keys that fill no tile, and NaN behind each sample's keys."""
    options = {"q_start": torch.tensor([-3, 103]), "k_length": torch.tensor([140, 131])}
    arguments = _arguments(dtype, head_dim, queries=37, keys=140, **options)
    for name in ("k", "v"):
        arguments[name][1, :, 131:] = torch.nan
    return {**arguments, **{name: _in_rows(arguments[name], skip) for name in ("q", "k", "v")}}


@cache
def _small_exact(dtype: torch.dtype, head_dim: int) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, tuple[Tensor, ...]]:
    arguments = _small(dtype, head_dim)
    finite = {name: arguments[name].nan_to_num(0.0).double().requires_grad_() for name in ("q", "k", "v")}
    out, lse = SPEC.reference(**{**SPEC.arguments(**{**arguments, **finite}), "return_lse": True})
    above = _draw(*out.shape, dtype=dtype, seed=4)
    grads = torch.autograd.grad((out * above.double()).sum(), list(finite.values()))
    return (out.detach(), lse.detach()), above, torch.zeros_like(lse, dtype=torch.float32), grads


def _check_forward(kernels: Kernels) -> None:
    calls = ((64, 64, 1), (40, 128, 1), (17, 64, 1), (24, 64, 2), (17, 64, 2))
    for seed, (head_dim, rows, splits) in enumerate(calls):
        for dtype in (torch.bfloat16, torch.float32)[: 2 if rows == 64 else 1]:
            _, out, lse = _forward(kernels, seed, Call.of(_small(dtype, head_dim)), rows, splits)
            _assert_forward(dtype, f"head_dim {head_dim}", (out, lse), _small_exact(dtype, head_dim)[0])
    _, out, lse = _forward(kernels, 5, Call.of(_small(torch.bfloat16, 64, skip=1)))
    _assert_forward(torch.bfloat16, "moved", (out, lse), _small_exact(torch.bfloat16, 64)[0])


def _check_backward(kernels: Kernels) -> None:
    calls = [(64, 0, torch.bfloat16), (40, 0, torch.bfloat16), (17, 0, torch.bfloat16), (64, 1, torch.bfloat16)]
    for seed, (head_dim, skip, dtype) in enumerate([*calls, (17, 0, torch.float32)]):
        (out, lse), above, above_lse, expected = _small_exact(dtype, head_dim)
        call = Call.of(_small(dtype, head_dim, skip))
        results = (_in_rows(out.to(dtype)), lse.float(), _in_rows(above), above_lse)
        _, grads = _backward(kernels, seed, call, *results)
        for name, got, want in zip("qkv", grads, expected, strict=True):
            bound = GRADIENT_BOUNDS[dtype] * max(1.0, 4 * want.abs().max().item())
            battery.assert_near(got, want, SPEC.bounds[dtype]._replace(relative=0.0, absolute=bound), name)


CHECKS = {FORWARD: _check_forward, BACKWARD: _check_backward}
SWITCHABLE = {
    FORWARD: _switchable(FORWARD, FORWARD_MUTATIONS),
    BACKWARD: _switchable(BACKWARD, BACKWARD_MUTATIONS),
}
PLACES = [
    pytest.param(source, place, id=f"{Path(source).stem}-{what}")
    for source, (_, places) in SWITCHABLE.items()
    for place, what in enumerate(places)
]


@pytest.mark.parametrize("source", list(CHECKS), ids=lambda source: Path(source).stem)
def test_source_without_a_mutation_passes(source: str) -> None:
    kernels = emulated(source, SWITCHABLE[source][0])
    kernels.set_int("planted", -1)
    CHECKS[source](kernels)


def test_large_products_of_long_rows_fused_as_by_nvcc() -> None:
    """Where the largest product stays, what was summed before must stay: errors of 1e-5 a tile would add up."""
    if " fma " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no fused multiply-add")
    kernels = emulated(FORWARD, SWITCHABLE[FORWARD][0], ("-O2", "-mfma", "-ffp-contract=fast"))
    kernels.set_int("planted", -1)
    q, k = (_draw(1, 1, rows, 64, dtype=torch.float32, seed=rows) for rows in (16, 3000))
    q[..., 0] = k[..., 0] = 40.0  # 200 to each product
    v = torch.linspace(0, 1, 3000)[:, None].expand(1, 1, 3000, 64).contiguous()
    arguments = {"q": q, "k": k, "v": v, "causal": False, "return_lse": True}
    want = SPEC.reference(**SPEC.arguments(**battery.in_float64(Sample("", arguments)).arguments))
    _, out, lse = _forward(kernels, 0, Call.of(arguments))
    # Products of 200 have errors of 1e-5.
    battery.assert_near(out, want[0], SPEC.bounds[torch.float32]._replace(absolute=1e-5), "out")
    battery.assert_near(lse, want[1], SPEC.bounds[torch.float32], "lse")


@pytest.mark.parametrize("source, place", PLACES)
def test_mutation_is_caught(source: str, place: int) -> None:
    kernels = emulated(source, SWITCHABLE[source][0])
    kernels.set_int("planted", place)
    with pytest.raises((EmulationError, AssertionError)):
        CHECKS[source](kernels)
