"""What packing keeps of a weight: any shape and strides, each storage within its rounding, NaN and infinity."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from starflow_ext import pack_weight
from starflow_ext._load import operators
from starflow_ext._options import WEIGHT_STORAGES
from starflow_ext.linear_pack import PackedWeight, device_rows_shape, panels_shape

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 1), (0, 5), (5, 0), (3, 5), (32, 32), (33, 31), (64, 96), (31, 130), (100, 17)]
# Half a step of the last bit that each storage keeps, relative to the value (of int8: to the row's largest).
STEPS = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8, "two_bfloat16": 2.0**-16, "int8": 0.5 / 127}


def _draw(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("storage", WEIGHT_STORAGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unpacked_is_the_rounded_weight(storage: str, dtype: torch.dtype, isa: str) -> None:
    for shape in SHAPES:
        weight = _draw(shape, dtype)
        packed = pack_weight(weight, storage)
        assert (packed.shape, packed.storage, list(packed.panels.shape)) == (
            shape,
            storage,
            panels_shape(storage, *shape),
        )
        got = packed.unpack()
        size = weight.double().abs()
        if storage == "int8" and weight.numel():
            size = size.amax(1, keepdim=True).expand(shape)
        assert (
            (got.double() - weight.double()).abs() <= 1.01 * STEPS[storage] * size + 1e-7 * (storage == "float16")
        ).all()
        if storage in ("float32", "float16", "bfloat16"):
            assert torch.equal(got, weight.float().to(getattr(torch, storage)).float())
        if storage == "two_bfloat16":
            high = weight.float().bfloat16().float()
            assert torch.equal(got, high + (weight.float() - high).bfloat16().float())


@pytest.mark.parametrize("storage", WEIGHT_STORAGES)
def test_levels_pack_the_same_bits(storage: str, isa: str) -> None:
    """A weight packed at one level may be used at another; what is padded is zero."""
    weight = _draw((45, 70))
    packed = pack_weight(weight, storage)
    padded = torch.zeros(64, 96)
    padded[:45, :70] = packed.unpack() if storage == "int8" else weight
    if storage == "int8":
        expected = (padded[:45] / packed.column_scale[:, None]).round()
        assert torch.equal(packed.panels.transpose(1, 2).flatten(0, 1)[:45].float(), expected)
        assert not packed.panels.transpose(1, 2).flatten(0, 1)[45:].any()
        return
    whole = pack_weight(padded, storage)
    assert torch.equal(packed.panels.view(torch.int16), whole.panels.view(torch.int16))


def test_any_strides(isa: str) -> None:
    weight = _draw((40, 70))
    expected = pack_weight(weight).panels
    wide = torch.full((40, 77), torch.nan)
    wide[:, 3:73] = weight
    for strided in (wide[:, 3:73], weight.t().contiguous().t(), torch.stack([weight, 0 * weight], -1)[..., 0]):
        assert torch.equal(pack_weight(strided).panels, expected)
    assert torch.equal(pack_weight(weight[:1].expand(5, -1)).unpack(), weight[:1].expand(5, -1))


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16", "two_bfloat16"])
def test_nan_and_infinity_stay(storage: str, isa: str) -> None:
    weight = _draw((3, 40))
    weight[0, 1], weight[1, 2], weight[2, 39] = torch.nan, torch.inf, -torch.inf
    got = pack_weight(weight, storage).unpack()
    assert got[0, 1].isnan()
    assert (got[1, 2], got[2, 39]) == (torch.inf, -torch.inf)
    assert got.isfinite().sum() == 117


def test_int8_refuses_what_is_not_finite(isa: str) -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        weight = _draw((40, 40))
        weight[33, 39] = bad
        sentence = (
            '^linear_pack: weight has NaN or infinity in output channel 33, expected finite values for storage "int8"$'
        )
        with pytest.raises(RuntimeError, match=sentence):
            pack_weight(weight, "int8")
    assert not pack_weight(torch.zeros(2, 3), "int8").unpack().any()


def test_the_original_is_kept_or_dropped() -> None:
    weight = torch.nn.Parameter(_draw((4, 6)))
    packed = pack_weight(weight)
    assert packed.weight is weight
    assert not packed.panels.requires_grad
    assert pack_weight(weight, keep=False).weight is None
    assert pack_weight(weight.bfloat16()).storage == "bfloat16"
    assert pack_weight(weight.double()).storage == "float32"
    assert pack_weight(weight, "int8").nbytes == 32 * 32 + 4 * 4


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 70), st.integers(0, 130), st.sampled_from(list(WEIGHT_STORAGES)), st.integers(1, 3))
def test_any_shape(out_channels: int, in_channels: int, storage: str, threads: int) -> None:
    weight = _draw((out_channels, in_channels))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        got = pack_weight(weight, storage).unpack()
    finally:
        torch.set_num_threads(before)
    size = weight.abs().amax(1, keepdim=True) if storage == "int8" and in_channels else weight.abs()
    assert ((got - weight).abs() <= 1.01 * STEPS[storage] * size + 1e-7).all()


def test_wrong_arguments() -> None:
    with pytest.raises(
        RuntimeError, match=r"^linear_pack: weight has dtype int64, expected float32, bfloat16, float16 or"
    ):
        pack_weight(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(
        RuntimeError, match=r"^linear_pack: weight has shape \[3\], expected \(out_channels, in_channels\)$"
    ):
        pack_weight(torch.zeros(3))
    with pytest.raises(
        RuntimeError, match=r'^linear_pack: storage is "int4", expected "float32", "float16", "bfloat16", '
    ):
        pack_weight(torch.zeros(2, 3), "int4")
    with pytest.raises(RuntimeError, match=r"^linear_pack: weight is on meta, expected cpu or cuda$"):
        pack_weight(torch.zeros(2, 3, device="meta"))


def test_opcheck() -> None:
    for storage in WEIGHT_STORAGES.values():
        torch.library.opcheck(operators().linear_pack.default, (_draw((33, 40)), storage))


def test_rows_packed_for_tensor_cores_unpack_to_the_weight() -> None:
    """What a weight on CUDA becomes: the matrix itself, its rows padded."""
    weight = _draw((5, 13), torch.bfloat16)
    rows = torch.nn.functional.pad(weight, (0, 3))
    assert list(rows.shape) == device_rows_shape(5, 13)
    packed = PackedWeight(rows, torch.empty(0), 5, 13, "bfloat16")
    assert torch.equal(packed.unpack(), weight.float())
    assert packed.device == weight.device
