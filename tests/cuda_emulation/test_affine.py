"""affine_forward, affine_inverse and jacobi_update on the emulated device, against their references in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from starflow_ext import ops
from starflow_ext._check import arithmetic_dtype
from starflow_ext._spec import Bound, Dtypes, Sample, Spec

from ..ops import battery
from .affine import CALLS, OPS, rows_of, run, shape_of, source_of, traffic
from .emulator import SEEDS, Kernels, Mutation, assert_caught, emulated, mutations

SPECS = [ops.SPECS[name] for name in OPS]
DIFFERENTIABLE = [spec for spec in SPECS if spec.differentiable]


def _values(spec: Spec, kernels: Kernels, dtypes: Dtypes) -> None:
    """Every sample of the op, each in another schedule."""
    pairs = zip(battery.samples(spec, dtypes), battery.exact(spec.name, dtypes), strict=True)
    for seed, (sample, expected) in enumerate(pairs):
        _, results = run(spec, kernels, seed, sample)
        for got, want in zip(results, expected, strict=True):
            battery.assert_near(got, want, battery.bound_of(spec, sample, got.dtype), sample.label)


@battery.with_dtypes(SPECS)
def test_value(spec: Spec, dtypes: Dtypes) -> None:
    _values(spec, emulated(source_of(spec.name)), dtypes)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_schedule_gives_the_same_bits(spec: Spec) -> None:
    kernels = emulated(source_of(spec.name))
    sample = battery.plain(spec)
    _, expected = run(spec, kernels, SEEDS[0], sample)
    for seed in SEEDS[1:]:
        battery.assert_equal(run(spec, kernels, seed, sample)[1], expected)


def _gradients(spec: Spec, kernels: Kernels, seed: int, sample: Sample) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Along a random direction: of the kernel, and by autograd of the reference in float64."""
    arguments = spec.arguments(**sample.arguments)
    data, raw = arguments[spec.differentiable[0]], arguments["raw"]
    exact = {**arguments, **{name: arguments[name].double().requires_grad_() for name in spec.differentiable}}
    results = spec.reference(**exact)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(seed)
    types = (data.dtype, arithmetic_dtype(data.dtype))
    upstream = [torch.randn(r.shape, generator=generator).to(dtype) for r, dtype in zip(results, types, strict=False)]
    # Without a scale the log-determinant is a constant.
    weighed = sum((result * grad.double()).sum() for result, grad in zip(results, upstream, strict=True))
    expected = torch.autograd.grad(weighed, [exact[name] for name in spec.differentiable])
    rows, raws = rows_of(data), rows_of(raw)
    grad_data, grad_raw = torch.empty_like(rows), torch.empty_like(raws)
    fields = {"raw": raws, "grad_raw": grad_raw}
    if spec.name == "affine_forward":
        fields |= {"x": rows, "grad_z": rows_of(upstream[0]), "grad_log_det": upstream[1], "grad_x": grad_data}
    else:
        fields |= {"z": rows, "grad_x": rows_of(upstream[0]), "grad_z": grad_data}
    shape = shape_of(rows, raws, *list(arguments.values())[2:])
    kernels.launch(f"{spec.name}_backward_cuda", seed, shape=shape, **fields)
    got = (grad_data.reshape(data.shape), grad_raw.reshape(raw.shape))
    yield from zip(spec.differentiable, got, expected, strict=True)


def _gradient_bound(spec: Spec, sample: Sample, got: Tensor, want: Tensor) -> Bound:
    """A gradient is a product of two chains within the bound, of terms as large as the largest result that cancel."""
    relative, absolute = battery.bound_of(spec, sample, got.dtype)
    arithmetic = battery.bound_of(spec, sample, arithmetic_dtype(got.dtype))
    largest = float(want.abs().max()) if want.numel() else 0.0
    return Bound(2 * relative, absolute + 2 * arithmetic.relative * largest)


def _gradients_near(spec: Spec, kernels: Kernels, dtypes: Dtypes) -> None:
    for seed, sample in enumerate(battery.samples(spec, dtypes)):
        for name, got, want in _gradients(spec, kernels, seed, sample):
            battery.assert_near(got, want, _gradient_bound(spec, sample, got, want), f"{sample.label}, {name}")


@battery.with_dtypes(DIFFERENTIABLE)
def test_gradient(spec: Spec, dtypes: Dtypes) -> None:
    _gradients_near(spec, emulated(source_of(spec.name)), dtypes)


def _moved(spec: Spec, kernels: Kernels, dtypes: Dtypes, channels: int) -> None:
    """Every byte of an argument is read once, every byte of a result written once, and nothing else is touched."""
    moved = traffic(spec, kernels, dtypes, channels)
    assert moved.read == moved.given
    assert moved.written == moved.made


@battery.with_dtypes(SPECS)
@pytest.mark.parametrize("channels", [64, 61])
def test_each_input_is_read_once_and_each_result_written_once(spec: Spec, dtypes: Dtypes, channels: int) -> None:
    _moved(spec, emulated(source_of(spec.name)), dtypes, channels)


def test_a_warp_reads_whole_sectors() -> None:
    """16 bytes a lane: a row of 128 floats is 16 sectors of 32 bytes, no more."""
    x = torch.randn(2, 3, 128)
    report, _ = CALLS["affine_inverse"](
        emulated(source_of("affine_inverse")), 0, x, torch.cat([x, x], -1), "softplus", 0.0, False
    )
    assert report.sectors_read == {"z": 6 * 16, "raw": 6 * 32, "x": 0}
    assert report.sectors_written == {"z": 0, "raw": 0, "x": 6 * 16}


def _anywhere(spec: Spec, kernels: Kernels, skip: int, gap: int) -> None:
    """Rows may begin at any address and lie at any distance; what lies between them is left alone."""

    def four_tokens(tensor: Tensor) -> Tensor:
        return tensor[:, :4].contiguous()

    def moved(tensor: Tensor) -> Tensor:
        *shape, channels = tensor.shape
        whole = tensor.new_full((*shape, skip + channels + gap), float("nan"))
        whole[..., skip : skip + channels] = tensor
        return whole[..., skip : skip + channels]

    sample = battery.plain(spec).map(four_tokens)
    _, expected = run(spec, kernels, 0, sample)
    # Not through battery.copied, which would put them side by side.
    _, results = CALLS[spec.name](kernels, 1, **spec.arguments(**sample.map(moved).arguments))
    for got, want in zip(results, expected, strict=True):
        battery.assert_near(got, want.double(), battery.bound_of(spec, sample, got.dtype), f"{skip}, {gap}")


def _not_a_number(kernels: Kernels) -> None:
    """A token with NaN in any channel has changed by NaN: it is never taken for settled."""
    x = torch.randn(2, 3, 48)
    x[1, 1, 17] = float("nan")
    _, (change, _) = CALLS["jacobi_update"](
        kernels, 0, x, torch.randn(2, 3, 48), torch.randn(2, 3, 96), "softplus", 0.0, 0.0
    )
    assert change.isnan().nonzero().tolist() == [[1, 1]]


def test_a_token_that_is_not_a_number_never_settles() -> None:
    _not_a_number(emulated(source_of("jacobi_update")))


@pytest.mark.parametrize("skip, gap", [(0, 1), (1, 0), (1, 3), (4, 4)])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_rows_may_lie_anywhere(spec: Spec, skip: int, gap: int) -> None:
    _anywhere(spec, emulated(source_of(spec.name)), skip, gap)


PACKED = "cuda/packed.cuh"
ALIGNMENT = {
    r"reinterpret_cast<uintptr_t>\(data\) % bytes == 0": "true",
    r"\(\(strides \* size % bytes == 0\) && \.\.\.\)": "true",
    r", rows\.token_stride": "",
}
BOUNDS = {r"row >= shape\.batch \* shape\.tokens": "false"}
SHIFTED = {r"t < behind": "false", r" - behind": ""}
REDUCED = {r"if \(lane\(\) == 0\)": ""}
MUTATIONS = {
    "affine_forward": [
        *mutations(source_of("affine_forward"), BOUNDS | SHIFTED | REDUCED),
        *mutations(
            "cuda/reduce.cuh", {r"(?<=\n    for \(int offset = )warp_size / 2(?=[^}]*value \+=)": "warp_size / 4"}
        ),
    ],
    "affine_inverse": [*mutations(source_of("affine_inverse"), BOUNDS | SHIFTED), *mutations(PACKED, ALIGNMENT)],
    "jacobi_update": [
        *mutations(source_of("jacobi_update"), BOUNDS | REDUCED),
        *mutations("cuda/reduce.cuh", {"a > b \\|\\| a != a": "a > b"}),
    ],
}
MUTATED = [(name, mutation) for name, found in MUTATIONS.items() for mutation in found]


@pytest.mark.parametrize("name, mutation", MUTATED, ids=str)
def test_mutation_is_caught(name: str, mutation: Mutation) -> None:
    spec = ops.SPECS[name]

    def check(kernels: Kernels) -> None:
        _values(spec, kernels, (torch.float32,) * 2)
        _moved(spec, kernels, (torch.float32,) * 2, 61)
        _anywhere(spec, kernels, 0, 1)
        _anywhere(spec, kernels, 1, 3)
        if spec.differentiable:
            _gradients_near(spec, kernels, (torch.float32,) * 2)
        else:
            _not_a_number(kernels)

    assert_caught(source_of(name), mutation, check)
