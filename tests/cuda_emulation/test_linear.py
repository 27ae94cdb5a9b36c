"""linear on the emulated device, against float64: every tile, type, epilogue, edge, and parts of the depth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product as combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from starflow_ext._check import dtype_text
from starflow_ext.linear import EPILOGUES, InputNorm
from starflow_ext.linear_pack import device_rows_shape
from starflow_ext.norm import EPSILON, OFFSET, norm_reference

from .emulator import SEEDS, Kernels, Mutation, Report, assert_caught, emulated, mutations, some

SOURCE = "ops/linear/linear.cu"
# Two of its tiles, compiled in a moment.
SMALL = "linear_small.cu"
TILES = ((16, 64), (32, 64), (64, 64), (128, 64), (128, 128))
HALVES = (torch.bfloat16, torch.float16)
OUT = (torch.float32, *HALVES)
# Half the last bit that a type keeps, relative to the value.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DEPTH = 64
GAP = 4


@dataclass(frozen=True)
class Call:
    """A call of the op, and how it is cut."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    epilogue: str = "none"
    multiply: Tensor | None = None
    residual: Tensor | None = None
    norm: InputNorm | None = None
    stored: torch.dtype = torch.float32
    product: bool = False
    tile: tuple[int, int] = (16, 64)
    parts: int = 1
    group: int = 2
    split: bool = False
    chained: bool = False


@dataclass(frozen=True)
class Result:
    report: Report
    out: Tensor
    product: Tensor | None


@dataclass(frozen=True)
class ByCutlass:
    """The kernels of one architecture, by CUTLASS's own collective: "wgmma" of sm_90a, "tcgen05" of sm_100f."""

    kernels: Kernels
    kernel: str

    def launch(self, launcher: str, seed: int, **values: Any) -> Report:
        report = self.kernels.launch(launcher, seed, **values, kernel=self.kernel)
        assert report.products == 0
        assert report.launches == 0 or (report.tensor_products > 0) == (self.kernel == "tcgen05")
        return report


Launching = Kernels | ByCutlass


def _ceil(value: int, by: int) -> int:
    return -(-value // by)


def _draw(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def _call(rows: int, channels: int, out: int, weight: torch.dtype = torch.bfloat16, **options: Any) -> Call:
    """Drawn values; True for an optional tensor draws it too."""
    given = {"x": _draw(rows, channels), "bias": True, **options}
    for seed, name in enumerate(("multiply", "residual")):
        if given.get(name) is True:
            given[name] = _draw(rows, out, seed=20 + seed)
    if given["bias"] is True:
        given["bias"] = _draw(out, seed=7)
    return Call(weight=(_draw(out, channels, seed=6) / max(1, channels) ** 0.5).to(weight), **given)


def _aligned(tensor: Tensor | None, width: int) -> bool:
    if tensor is None:
        return True
    strides = tensor.stride()[:-1]
    return tensor.data_ptr() % (width * tensor.element_size()) == 0 and all(s % width == 0 for s in strides)


def _view(tensor: Tensor | None) -> Any:
    return {} if tensor is None else tensor


def _launch(
    kernels: Launching, call: Call, seed: int = 0, gap: int = GAP, heads: Mapping[str, Any] | None = None
) -> Result:
    """As csrc/ops/linear/linear.cpp does; results have `gap` more columns, which must stay as they are.

    With `heads`, the fields of RopeAppendArgs, the columns go there.
    """
    (rows, channels), out_channels = call.x.shape, call.weight.shape[0]
    packed = call.weight.new_zeros(device_rows_shape(out_channels, channels))
    packed[:, :channels] = call.weight
    depth = packed.shape[1]
    wide_out = call.x.new_full((rows, out_channels + gap), torch.nan, dtype=call.stored)
    wide_product = wide_out.clone() if call.product else None
    out = wide_out[:, :out_channels]
    product = None if wide_product is None else wide_product[:, :out_channels]
    norm_tensors = () if call.norm is None else (call.norm.weight, call.norm.bias)

    copied = call.x.dtype != call.weight.dtype or call.norm is not None or depth != channels or not _aligned(call.x, 8)
    tile_rows, tile_columns = call.tile
    schedule = {
        "tile_rows": tile_rows,
        "tile_columns": tile_columns,
        "row_tiles": _ceil(rows, tile_rows),
        "column_tiles": _ceil(out_channels, tile_columns),
        "depth_tiles": _ceil(channels, DEPTH),
        "parts": call.parts,
        "group": call.group,
        "split": call.split,
    }
    tiles = schedule["row_tiles"] * schedule["column_tiles"]
    counters = _ceil(rows * depth * 2 if copied else 0, 128) * 128
    partials = counters + _ceil(4 * (tiles + schedule["row_tiles"]), 128) * 128
    size = partials + (4 * tiles * call.parts * tile_rows * tile_columns if call.split else 0)
    # What was there before is no count, and no number.
    workspace = torch.full((size,), 255, dtype=torch.uint8)
    copy = workspace[: rows * depth * 2].view(call.weight.dtype).view(rows, depth) if copied else call.x
    counts = workspace[counters:partials].view(torch.int32)
    if call.chained:
        counts.zero_()
    kinds = {"layer_norm": "layer", "rms_norm": "rms"}
    report = kernels.launch(
        "linear_cuda",
        seed,
        call={
            "weights": {
                "data": packed,
                "bias": call.bias,
                "columns": out_channels,
                "depth": channels,
                "storage": dtype_text(call.weight.dtype),
            },
            "x": call.x,
            "rows": rows,
            "norm": {}
            if call.norm is None
            else {
                "kind": kinds[call.norm.kind],
                "weight": call.norm.weight,
                "bias": call.norm.bias,
                "epsilon": EPSILON[call.norm.kind],
                "weight_offset": OFFSET[call.norm.kind],
            },
            "epilogue": call.epilogue,
            "multiply": _view(call.multiply),
            "residual": _view(call.residual),
            "out": out,
            "product": _view(product),
        },
        input=copy,
        depth=depth,
        copied=copied,
        wide_input=channels % 4 == 0 and all(_aligned(tensor, 4) for tensor in (call.x, *norm_tensors)),
        wide_result=out_channels % 4 == 0
        and all(_aligned(tensor, 4) for tensor in (call.bias, call.multiply, call.residual, out, product)),
        chained=call.chained,
        into_heads=heads is not None,
        heads=heads,
        schedule=schedule,
        counters=counts,
        layout={"counters": counters, "partials": partials, "bytes": size},
        workspace=workspace,
    )
    for whole in (wide_out, wide_product):
        assert whole is None or whole[:, out_channels:].isnan().all()
    return Result(report, out, product)


def _check(call: Call, result: Result, label: str = "") -> None:
    """Against float64: sums are off by float32's rounding of their terms, a normalised x by the weight's type."""
    optional = {name: getattr(call, name) for name in ("bias", "multiply", "residual")}
    bias, multiply, residual = (None if t is None else t.double() for t in optional.values())
    if call.norm is None:
        x, rounding = call.x.to(call.weight.dtype).double(), 1e-6
    else:
        weight, shift = (None if t is None else t.double() for t in call.norm[:2])
        assert weight is not None
        x, rounding = (
            norm_reference(call.x.double(), weight, shift, call.norm.kind, None, None, None),
            ROUNDING[call.weight.dtype],
        )
        assert isinstance(x, Tensor)
    weight = call.weight.double()
    product = F.linear(x, weight, bias)
    bound = rounding * (F.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())) + 1e-6
    if result.product is not None:
        _near(result.product, product, bound + ROUNDING[call.stored] * product.abs(), f"product, {label}")
    out = product
    if call.epilogue != "none":
        # Of which no slope is above 1.13.
        activated = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "silu": F.silu}[call.epilogue]
        out, bound = activated(out), 1.13 * bound
    if multiply is not None:
        out, bound = out * multiply, bound * multiply.abs()
    if residual is not None:
        out = out + residual
    _near(result.out, out, bound + (ROUNDING[call.stored] + 2.0**-23) * out.abs() + 1e-6, label)


def _near(got: Tensor, expected: Tensor, bound: Tensor, label: str) -> None:
    distance = (got.double() - expected).abs()
    wrong = ~(distance <= bound)
    assert not wrong.any(), f"{label}: {got[wrong][:4].tolist()} instead of {expected[wrong][:4].tolist()}"


def _run(kernels: Launching, call: Call, seed: int = 0) -> Result:
    result = _launch(kernels, call, seed)
    _check(call, result, f"{list(call.x.shape)} to {call.weight.shape[0]}, tile {call.tile}, {call.parts} parts")
    return result


BY_CUTLASS = {"sm_90a": "wgmma", "sm_100f": "tcgen05"}


@pytest.fixture(scope="module", params=["sm_80", *BY_CUTLASS])
def kernels(request: pytest.FixtureRequest) -> Launching:
    kernel = BY_CUTLASS.get(request.param)
    return emulated(SOURCE) if kernel is None else ByCutlass(emulated(SOURCE), kernel)


@pytest.fixture(scope="module", params=["sm_80", *BY_CUTLASS])
def small(request: pytest.FixtureRequest) -> Launching:
    kernel = BY_CUTLASS.get(request.param)
    return emulated(SMALL) if kernel is None else ByCutlass(emulated(SOURCE), kernel)


@pytest.mark.parametrize("weight", HALVES, ids=dtype_text)
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("split", [False, True], ids=["in turn", "split"])
def test_every_tile(tile: tuple[int, int], weight: torch.dtype, split: bool, kernels: Launching) -> None:
    """Two tiles of rows and of columns, the second ones nearly empty; three parts of unequal length.

    Steps of the depth go round the stages of every pipeline, of which the longest has eight; split, those of a part
    round most.
    """
    rows, columns = tile
    call = _call(rows + 3, 10 * DEPTH + 24, columns + 4, weight, tile=tile, parts=3, split=split, epilogue="gelu")
    _run(kernels, replace(call, residual=_draw(rows + 3, columns + 4, seed=9)))


def _epilogues(small: Launching) -> None:
    for epilogue, multiply, residual, stored in combinations(EPILOGUES, (None, True), (None, True), OUT):
        call = _call(5, 40, 20, epilogue=epilogue, multiply=multiply, residual=residual, stored=stored, product=True)
        _run(small, call)


def test_epilogues(small: Launching) -> None:
    _epilogues(small)
    for dtype in HALVES:
        call = _call(17, 40, 21, multiply=True, residual=True, bias=None)
        assert call.multiply is not None
        assert call.residual is not None
        _run(small, replace(call, multiply=call.multiply.to(dtype), residual=call.residual.to(dtype), stored=dtype))


def _edges(small: Launching) -> None:
    seeds = 0
    for rows, out, channels in (
        *((rows, 9, 20) for rows in (1, 15, 16, 17, 33)),
        *((3, out, 20) for out in (1, 7, 63, 64, 65, 68, 130)),
        *((3, 9, channels) for channels in (1, 7, 8, 63, 64, 65, 130, 320)),
    ):
        for tile in TILES[:2]:
            seeds += 1
            _run(small, _call(rows, channels, out, tile=tile), seeds)


def test_edges(small: Launching) -> None:
    _edges(small)


def test_nothing_in() -> None:
    """Which the kernels of sm_90a and sm_100f are not asked for: TMA takes no matrix without columns."""
    for tile in TILES[:2]:
        _run(emulated(SMALL), _call(3, 0, 9, tile=tile))


def test_nothing(kernels: Launching) -> None:
    for rows, out in ((0, 5), (5, 0), (0, 0)):
        assert _launch(kernels, _call(rows, 40, out)).report.launches == 0


def _bits(result: Result) -> Tensor:
    return result.out.contiguous().view(torch.int32)


def _parts(small: Launching) -> None:
    """Split or in turn, in any tile, and whatever the other rows are: the same bits."""
    for parts, steps in ((2, 2), (3, 7), (5, 9)):
        call = _call(19, steps * DEPTH - 8, 70, parts=parts, tile=(32, 64))
        expected = _run(small, call)
        for tile, split in combinations(TILES[:2], (False, True)):
            result = _run(small, replace(call, tile=tile, split=split), parts)
            assert torch.equal(_bits(result), _bits(expected))
        alone = _run(small, replace(call, x=call.x[18:], tile=(16, 64), split=True))
        assert torch.equal(_bits(alone), _bits(expected)[18:])


@pytest.mark.parametrize("split", [False, True], ids=["in turn", "split"])
def test_a_part_goes_round_the_widest_tiles_stages(split: bool, kernels: Launching) -> None:
    """Of which those of 128 x 128 have up to six."""
    _run(kernels, _call(7, 26 * DEPTH - 8, 70, tile=(128, 128), parts=2, split=split))


def test_tiles_in_groups_of_any_height(small: Launching) -> None:
    """Each tile once, in whatever order: the same bits."""
    call = _call(67, 2 * DEPTH, 130, parts=2, split=True)
    expected = _bits(_run(small, replace(call, group=1)))
    for group in (2, 3, 4, 5):
        assert torch.equal(_bits(_run(small, replace(call, group=group))), expected)


def test_parts_of_the_depth(small: Launching) -> None:
    _parts(small)


def _chained(small: Launching) -> None:
    """One launch, whose first blocks copy the rows: the same bits."""
    for channels, norm in ((3 * DEPTH, "layer_norm"), (3 * DEPTH - 14, "rms_norm"), (5 * DEPTH, None)):
        call = _call(37, channels, 130, parts=2, residual=True)
        if norm:
            call = replace(call, norm=InputNorm(_draw(channels, seed=8), kind=norm))
        for split, tile in combinations((False, True), TILES[:2]):
            call = replace(call, split=split, tile=tile)
            before, result = _run(small, call), _run(small, replace(call, chained=True))
            assert (before.report.launches, result.report.launches) == (2 + split, 1)
            assert torch.equal(_bits(result), _bits(before))
            # Each value of x is read once more for each pass of the norm.
            assert result.report.read["call.x"] == before.report.read["call.x"]


@dataclass(frozen=True)
class _Heads:
    """Queries, keys and values of some tokens of each sample, at slots of their own; some slots are final."""

    head_dim: int
    dtype: torch.dtype
    heads: int = 2
    kv_heads: int = 1
    normed: bool = True
    rotated: bool = True
    batch: int = 3
    tokens: int = 7
    slots: int = 20

    @property
    def columns(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def run(self, kernels: Launching, call: Call, seed: int = 0) -> tuple[Tensor, ...]:
        """q, k and v, near float64, and NaN wherever nothing is to be written."""
        kept = torch.full((2, self.batch, self.kv_heads, self.slots, self.head_dim), torch.nan, dtype=self.dtype)
        q = torch.full((self.batch, self.tokens, self.heads, self.head_dim), torch.nan, dtype=self.dtype)
        angles = 6 * _draw(2, self.batch, self.tokens, self.head_dim // 2, seed=11)
        weights = 0.3 * _draw(2, self.head_dim, seed=12)
        starts, final = torch.tensor([4, 0, 9]), torch.tensor([0, 3, 12])
        turns = [
            ({"cos": turn.cos(), "sin": turn.sin()} if self.rotated else {})
            | ({"weight": weight} if self.normed else {})
            for turn, weight in zip(angles, weights, strict=True)
        ]
        shape = {name: getattr(self, name) for name in ("batch", "tokens", "heads", "kv_heads", "head_dim")}
        heads = {
            "shape": {**shape, "data": self.dtype, "kept": self.dtype},
            "query": turns[0],
            "key": turns[1],
            "q": q.transpose(1, 2),
            "k": kept[0],
            "v": kept[1],
            "starts": starts,
            "final": final,
        }
        result = _launch(kernels, call, seed, heads=heads)
        assert result.out.isnan().all()
        self._check(call, q, kept, angles, weights, starts, final)
        return q, *kept

    def _check(
        self, call: Call, q: Tensor, kept: Tensor, angles: Tensor, weights: Tensor, starts: Tensor, final: Tensor
    ) -> None:
        bias = None if call.bias is None else call.bias.double()
        product = F.linear(call.x.to(call.weight.dtype).double(), call.weight.double(), bias)
        parts = product.view(self.batch, self.tokens, -1, self.head_dim).split(
            [self.heads, self.kv_heads, self.kv_heads], 2
        )
        wanted = []
        for part, turn, weight in zip(parts, angles.double(), weights.double(), strict=False):
            if self.normed:
                part = part * (part.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + weight)
            if self.rotated:
                (u, v), cos, sin = part.chunk(2, -1), turn.cos()[:, :, None], turn.sin()[:, :, None]
                part = torch.cat((u * cos - v * sin, v * cos + u * sin), -1)
            wanted.append(part)
        bound = ROUNDING[self.dtype] * 1.01
        label = f"{self}, tile {call.tile}, {call.parts} parts"
        _near(q, wanted[0], bound * wanted[0].abs() + 2e-5, label)
        for cache, want in zip(kept, (wanted[1], parts[2]), strict=True):
            expected = torch.full_like(cache, torch.nan, dtype=torch.float64)
            for b in range(self.batch):
                for t in range(self.tokens):
                    slot = int(starts[b]) + t
                    if slot >= int(final[b]):
                        expected[b, :, slot] = want[b, t]
            written = ~expected.isnan()
            assert cache[~written].isnan().all(), label
            _near(cache[written], expected[written], bound * expected[written].abs() + 2e-5, label)


def _into_heads(small: Launching) -> None:
    """The product's columns as heads, whole and split by the depth, in every tile: the same bits."""
    for head_dim, dtype in ((8, torch.float32), (16, torch.bfloat16), (32, torch.float16), (64, torch.float32)):
        for normed, rotated in ((True, True), (False, True), (True, False), (False, False)):
            kind = _Heads(head_dim, dtype, normed=normed, rotated=rotated, heads=3 if head_dim < 64 else 2)
            call = _call(21, 2 * DEPTH, kind.columns, parts=2, bias=normed)
            call = replace(call, bias=call.bias if normed else None)
            expected = kind.run(small, call)
            for tile, split in ((TILES[0], True), (TILES[1], False)):
                results = kind.run(small, replace(call, tile=tile, split=split), 1)
                for got, want in zip(results, expected, strict=True):
                    assert torch.equal(got.nan_to_num(), want.nan_to_num())


def test_columns_as_heads(small: Launching) -> None:
    _into_heads(small)


@pytest.mark.parametrize("tile", TILES[2:], ids=str)
def test_columns_as_heads_in_large_tiles(tile: tuple[int, int], kernels: Launching) -> None:
    kind = _Heads(32, torch.bfloat16, heads=3)
    for split in (False, True):
        kind.run(kernels, _call(21, 2 * DEPTH, kind.columns, parts=2, tile=tile, split=split))


def test_one_launch_of_a_chain(small: Launching) -> None:
    _chained(small)


@pytest.mark.parametrize("tile", TILES[2:], ids=str)
def test_one_launch_of_a_chain_in_large_tiles(tile: tuple[int, int], kernels: Launching) -> None:
    """Whose blocks copy one, two or three rows, the last of them fewer."""
    call = _call(tile[0] + 3, 2 * DEPTH, 70, tile=tile, norm=InputNorm(_draw(2 * DEPTH, seed=8)))
    result = _run(kernels, replace(call, chained=True))
    assert result.report.launches == 1
    assert torch.equal(_bits(result), _bits(_run(kernels, call)))


def test_no_copy_in_a_chain(small: Launching) -> None:
    call = _call(19, 64, 70, parts=1, chained=True)
    call = replace(call, x=call.x.bfloat16())
    assert _run(small, call).report.blocks == 4


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_a_row_has_the_same_bits_in_every_tile(tile: tuple[int, int], kernels: Launching) -> None:
    call = _call(3, 2 * DEPTH, 70, parts=2)
    assert torch.equal(_bits(_run(kernels, replace(call, tile=tile))), _bits(_run(kernels, call)))


def _places(small: Launching) -> None:
    """x, what the epilogue reads and what it writes at any address and distance: the same bits."""
    call = _call(5, 64, 20, multiply=True, residual=True, epilogue="gelu")
    call = replace(call, x=call.x.bfloat16())
    expected = _run(small, call)
    # Multiplied where it lies.
    assert expected.report.launches == 1

    def moved(tensor: Tensor, skip: int, gap: int) -> Tensor:
        whole = tensor.new_full((tensor.shape[0], skip + tensor.shape[1] + gap), torch.nan)
        whole[:, skip : skip + tensor.shape[1]] = tensor
        return whole[:, skip : skip + tensor.shape[1]]

    assert call.bias is not None
    shifted = call.bias.new_zeros(21)
    shifted[1:] = call.bias
    for skip, gap in ((0, 8), (8, 0), (0, 4), (4, 4), (1, 3), (0, 1)):
        for name in ("x", "multiply", "residual"):
            result = _launch(small, replace(call, **{name: moved(getattr(call, name), skip, gap)}))
            assert torch.equal(_bits(result), _bits(expected)), (name, skip, gap)
    assert torch.equal(_bits(_launch(small, replace(call, bias=shifted[1:]))), _bits(expected))
    assert torch.equal(_bits(_launch(small, call, gap=1)), _bits(expected))


def test_any_place_in_memory(small: Launching) -> None:
    _places(small)


def _norms(small: Launching) -> None:
    for channels, dtype in combinations((64, 50, 1, 600), OUT):
        for norm in (
            InputNorm(_draw(channels, seed=8), _draw(channels, seed=9)),
            InputNorm(_draw(channels, seed=8)),
            InputNorm(0.2 * _draw(channels, seed=8), kind="rms_norm"),
        ):
            call = _call(6, channels, 9, norm=norm)
            _run(small, replace(call, x=(2 + call.x).to(dtype)))


def test_norm_on_the_way_in(small: Launching) -> None:
    _norms(small)


def test_float32_enters_rounded_to_the_nearest(kernels: Launching) -> None:
    """Ties to even: as torch rounds."""
    x = torch.tensor([[1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 0, 0, 0, 0]])
    for dtype in HALVES:
        result = _launch(kernels, Call(x, torch.eye(8, dtype=dtype)))
        assert torch.equal(result.out, x.to(dtype).float())


def test_a_nan_stays_in_its_row_and_an_infinity_of_the_weight_in_its_column(small: Launching) -> None:
    call = _call(9, 80, 50)
    call.x[4, 79] = torch.nan
    call.weight[33, 0] = torch.inf
    wrong = ~_launch(small, call).out.isfinite()
    assert wrong[4].all()
    assert wrong[:, 33].all()
    assert wrong.sum() == 50 + 9 - 1


@pytest.mark.parametrize("split", [False, True], ids=["in turn", "split"])
def test_every_schedule_gives_the_same_bits(split: bool, small: Launching) -> None:
    call = _call(20, 5 * DEPTH, 72, tile=(32, 64), parts=2, split=split, norm=InputNorm(_draw(5 * DEPTH)))
    expected = _run(small, call, SEEDS[0])
    for seed in SEEDS[1:]:
        assert torch.equal(_bits(_run(small, call, seed)), _bits(expected))


def _traffic(small: Launching, split: bool) -> None:
    """The weight once for each tile of rows, x once for each of columns, the rest once; and no bank met twice."""
    call = _call(33, 4 * DEPTH, 128, tile=(32, 64), parts=2, split=split, multiply=True, residual=True)
    report = _launch(small, replace(call, x=call.x.bfloat16())).report
    weight, x = call.weight.nbytes, call.x.nbytes // 2
    assert report.read["call.weights.data"] == 2 * weight
    assert report.read["call.x"] + report.read["input"] == 2 * x
    for name in ("multiply", "residual"):
        assert report.read[f"call.{name}"] == 33 * 128 * 4
    assert report.written["call.out"] == 33 * 128 * 4
    partials = 2 * 33 * 128 * 4 if split else 0
    # Set to zero, and counted.
    assert report.written["counters"] == 4 * ((report.blocks - 1 + 4) if split else 0)
    assert report.written["workspace"] == partials
    assert report.bank_conflicts == 0
    # Of 16 x 8 x 16 each, by wgmma a warp's quarter of 64 x 32 x 16, or by tcgen05 the whole; edges are multiplied too.
    tiles = 2 * 2 * (4 * DEPTH // 16)
    each = {(tiles * (32 // 16) * (64 // 8), 0, 0), (0, tiles * 4, 0), (0, 0, tiles)}
    assert (report.products, report.group_products, report.tensor_products) in each
    assert (report.products == 0) == (report.tensor_copies > 0)


@pytest.mark.parametrize("split", [False, True], ids=["in turn", "split"])
def test_bytes_moved_and_banks(split: bool, small: Launching) -> None:
    _traffic(small, split)


# What keeps the kernels right, taken away one by one, with the test that must see it: every barrier, wait and check of
# an edge. Not here, because blocks run one after another: what orders memory between blocks (both __threadfence and the
# barrier before the count of blocks; the barriers around the count of rows that are copied).
MULTIPLY, FINISH, INPUT, COPY = (f"ops/linear/linear_{name}.cuh" for name in ("multiply", "finish", "input", "copy"))


def _split(small: Launching) -> None:
    _traffic(small, True)
    _parts(small)


CAUGHT: list[tuple[str, dict[str, str], Any]] = [
    (
        MULTIPLY,
        {
            r"(?<!row_tile\);\n        )__syncthreads\(\);": "",
            r"cute::cp_async_(wait<Tile::stages - 2>|fence)\(\);": "",
        },
        _parts,
    ),
    (MULTIPLY, {r"stages - 2>\(\)": "stages - 1>()", r"step < steps\) \{": "true) {"}, _parts),
    (MULTIPLY, {r"first_row \+ row < rows": "true", r"column < depth": "true"}, _edges),
    (MULTIPLY, {r"piece \^ \(row % step_pieces\)": "piece"}, _split),
    (FINISH, {r"first_column \+ column( \+ i)? >= call\.weights\.columns": "false"}, _edges),
    (FINISH, {r"first_row \+ row >= call\.rows": "false"}, _split),
    (
        FINISH,
        {r"tile\.arrived != schedule\.parts - 1": "false", r"(?<=\}\n        )sync\(\);(?=\n        if \(tile)": ""},
        _split,
    ),
    (FINISH, {r"(?<=tile_size\(\);\n    )sync\(\);": ""}, _edges),
    (COPY, {r"c < channels": "c < channels + width", r"sync\(\);(?=\n        float sum)": ""}, _norms),
    (COPY, {r"c < args\.depth": "false"}, _edges),
    (
        FINISH,
        {
            r"row < args\.call\.rows && column": "column",
            r" && column < args\.call\.weights\.columns": "",
            r"squares = group_sum\(squares, lanes\);": "",
            r"slot < heads\.final\[b\]": "false",
            r"\? heads\.start : heads\.starts\[b\]": "? heads.start : heads.start",
            r"/ lanes \* layout\.head_dim;": "/ lanes * 0;",
            r"(?<=load_planes<width>\()bias \+ column": "bias",
            r"row \* Tile::columns \+ column\);": "column);",
        },
        _into_heads,
    ),
    (
        COPY,
        {
            r"row >= args\.call\.rows": "false",
            r"/ args\.schedule\.tile_rows;": "/ 128;",
            r"args\.call\.rows - int64_t\{row_tile\}": "args.call.rows - int64_t{0}",
            r"left < schedule\.tile_rows \? left : ": "",
            r"args\.schedule\.first_copied\(\) \+ tile": "tile",
            r"args\.chained && args\.copied": "args.copied",
        },
        _chained,
    ),
    (INPUT, {r"args\.schedule\.split": "false", r"tile < args\.schedule\.tiles\(\)": "true"}, _split),
]
SCHEDULE = "ops/linear/linear_schedule.h"
CAUGHT.append(
    (SCHEDULE, {r"row_tiles - first < group \?[^:]*: group": "group", r"place % high": "place % group"}, _edges)
)
MUTATIONS = some([(mutation, check) for file, changes, check in CAUGHT for mutation in mutations(file, changes)])


@pytest.mark.parametrize("mutation, check", MUTATIONS, ids=lambda part: str(part) if isinstance(part, Mutation) else "")
def test_mutation_is_caught(mutation: Mutation, check: Any) -> None:
    assert_caught(SMALL, mutation, check)
