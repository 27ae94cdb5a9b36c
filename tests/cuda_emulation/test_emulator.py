"""The emulated device itself: right kernels give right values, and planted mistakes are noticed in every schedule."""

from __future__ import annotations

import pytest
import torch

from .emulator import SEEDS, CompileError, EmulationError, Mutation, Report, assert_caught, emulated, mutations

# Whichever of the two comes first.
RACE = (
    "(reads 4 bytes of shared memory at .*, which another thread wrote without a barrier since"
    "|writes 4 bytes of shared memory at .*, which (may still be read by another thread|another thread wrote))"
)
NOTICED = {
    "no_barrier": f"race: {RACE}",
    "no_second_barrier": f"race: {RACE}",
    "half_barrier": "deadlock: thread 0 waits in __syncwarp",
    "past_shared": "writes 4 bytes at 384 of 384 bytes of shared memory",
    "past_tensor": "reads 4 bytes at offset 768 of x, which has 768 bytes",
    "before_tensor": "reads 4 bytes at offset -4 of x, which has 768 bytes",
    "lane_not_in_mask": "__shfl_sync: lane .* is not in its own mask 00000001",
    "two_masks": "__shfl_sync of mask .* meets __shfl_sync of mask ",
    "lane_that_left": "lane .* reads lane 3 by a shuffle that lane 3 takes no part in",
    "misaligned": "writes 16 bytes at a misaligned address",
    "too_many_threads": "error 9 of the CUDA runtime",
}


def _reverse(seed: int, mistake: str) -> tuple[Report, torch.Tensor, torch.Tensor]:
    x, out = torch.randn(2, 96), torch.empty(2, 96)
    given = {"x": x, "out": out, "blocks": 2, "threads": 96, "mistake": mistake}
    return emulated("planted.cu").launch("reverse_cuda", seed, **given), x, out


@pytest.mark.parametrize("seed", SEEDS)
def test_a_right_kernel(seed: int) -> None:
    report, x, out = _reverse(seed, "none")
    assert torch.equal(out, x.flip(1))
    assert report.read == {"x": x.nbytes, "out": 0}
    assert report.written == {"x": 0, "out": out.nbytes}
    assert (report.launches, report.blocks, report.threads, report.shared_bytes) == (1, 2, 96, 384)
    assert report.barriers == 2 * 3 * 96
    assert report.bank_conflicts == 0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mistake", list(NOTICED))
def test_a_planted_mistake(mistake: str, seed: int) -> None:
    with pytest.raises(EmulationError, match=NOTICED[mistake]):
        _reverse(seed, mistake)


def _hand(seed: int, mistake: str) -> tuple[Report, torch.Tensor, torch.Tensor]:
    x, out = torch.randn(96), torch.empty(96)
    return emulated("planted.cu").launch("hand_cuda", seed, x=x, out=out, mistake=mistake), x, out


@pytest.mark.parametrize("seed", SEEDS)
def test_arrivals_at_a_barrier_wait_for_nobody(seed: int) -> None:
    report, x, out = _hand(seed, "none")
    assert torch.equal(out, x)
    assert report.barriers == (3 + 2) * 64


# Whichever of them comes first.
ALONE = f"race: {RACE}|comes twice to barrier|none waits there|the block ends after arrivals at barrier"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "mistake, noticed",
    [
        ("no_arrival", "deadlock: thread .* waits in a barrier"),
        ("early_arrival", f"race: {RACE}"),
        ("no_wait_for_full", ALONE),
        ("no_wait_for_empty", ALONE),
        ("one_too_many", "the block ends after arrivals at barrier 2 that nobody waited for"),
        ("nobody_waits", ALONE),
        ("other_count", "barrier 1 of (64|96) threads, where others expect (96|64)"),
    ],
)
def test_a_mistake_with_arrivals(mistake: str, noticed: str, seed: int) -> None:
    with pytest.raises(EmulationError, match=noticed):
        _hand(seed, mistake)


def _turns(seed: int, mistake: str) -> tuple[torch.Tensor, torch.Tensor]:
    x, out, counts = torch.randn(64), torch.full((64,), torch.nan), torch.zeros(1, dtype=torch.int32)
    given = {"x": x, "out": out, "counts": counts, "blocks": 3, "mistake": mistake}
    emulated("planted.cu").launch("turns_cuda", seed, watch_blocks=True, **given)
    return x, out


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_that_tell_each_other_what_they_wrote(seed: int) -> None:
    x, out = _turns(seed, "none")
    assert torch.equal(out, x + x + x)


NOT_TOLD = "reads 4 bytes of global memory, which another block wrote, of which it was not told"
TURNS_NOTICED = {
    "no_wait": NOT_TOLD,
    "no_barrier_behind_the_wait": NOT_TOLD,
    "no_barrier_before_the_signal": "reads 4 bytes of global memory, which another block wrote without telling of it",
    "no_fence": "reads 4 bytes of global memory, which another block wrote without telling of it",
    "no_signal": "waits for 1 signals of earlier blocks, of which 0 have come",
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mistake", list(TURNS_NOTICED))
def test_a_mistake_between_blocks(mistake: str, seed: int) -> None:
    with pytest.raises(EmulationError, match=TURNS_NOTICED[mistake]):
        _turns(seed, mistake)


def _chain(seed: int, mistake: str) -> tuple[Report, torch.Tensor, torch.Tensor]:
    x, out, counts = torch.randn(96), torch.empty(96), torch.full((1,), 7, dtype=torch.int32)
    given = {"x": x, "out": out, "counts": counts, "blocks": 3, "mistake": mistake}
    return emulated("planted.cu").launch("chain_cuda", seed, **given), x, out


@pytest.mark.parametrize("seed", SEEDS)
def test_a_launch_that_begins_early(seed: int) -> None:
    report, x, out = _chain(seed, "none")
    assert torch.equal(out, x + 1)
    assert (report.launches, report.early_launches) == (2, 1)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "mistake, noticed",
    [
        ("reads_at_once", "reads out before the launches in front have ended"),
        ("writes_at_once", "writes out before the launches in front have ended"),
        ("never_waits", "an early launch did not wait for those in front"),
        ("waits_for_itself", r"waits for 1 signals of earlier blocks, of which 0 have come \(block 0,0,0"),
    ],
)
def test_a_planted_mistake_of_an_early_launch(mistake: str, noticed: str, seed: int) -> None:
    with pytest.raises(EmulationError, match=noticed):
        _chain(seed, mistake)


def _product(
    seed: int, *, dtype: torch.dtype = torch.bfloat16, swizzled: bool = True, mistake: str = "none"
) -> tuple[Report, float]:
    a, b = torch.randn(64, 192).to(dtype), torch.randn(64, 192).to(dtype)
    out = torch.empty(64, 64)
    given = {"a": a, "b": b, "out": out, "depth": 192, "data": dtype, "swizzled": swizzled, "mistake": mistake}
    report = emulated("planted_tiles.cu").launch("product_cuda", seed, **given)
    return report, float((out - a.double() @ b.double().T).abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_product_of_tiles(seed: int, dtype: torch.dtype) -> None:
    """Products of 16-bit types are exact in float32, and 192 of them are summed."""
    report, error = _product(seed, dtype=dtype)
    assert error < 192 * 2.0**-24 * 64
    assert report.products == 3 * 4 * 8 * 4  # steps, warps, and tiles of 8 columns and of depth 16
    assert report.bank_conflicts == 0
    assert report.read == {"a": 64 * 192 * 2, "b": 64 * 192 * 2, "out": 0}
    assert report.written["out"] == 64 * 64 * 4


def test_rows_of_128_bytes_conflict_without_a_swizzle() -> None:
    report, error = _product(0, swizzled=False)
    assert error < 1e-3
    # Eight rows of a matrix lie in the same banks: seven further passes for each.
    assert report.bank_conflicts == 7 * report.matrices


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "mistake, noticed",
    [
        ("no_wait", "which an asynchronous copy still writes"),
        ("wait_for_one_less", "which an asynchronous copy still writes"),
        ("no_barrier", "which (another thread wrote without a barrier since|an asynchronous copy still writes)"),
        ("no_second_barrier", "which (may still be read by another thread|an asynchronous copy still writes)"),
    ],
)
def test_a_mistake_in_a_pipeline(mistake: str, noticed: str, seed: int) -> None:
    with pytest.raises(EmulationError, match=noticed):
        _product(seed, mistake=mistake)


def _group_product(
    seed: int, *, swizzle: int = 128, across: bool = False, rows: int = 64, mistake: str = "none"
) -> tuple[Report, float]:
    a, b = torch.randn(rows, 192).bfloat16(), torch.randn(192, 64).bfloat16()
    right = b if across else b.T.contiguous()
    out = torch.empty(64, 64)
    given = {"a": a, "b": right, "out": out, "rows": rows, "depth": 192, "swizzle": swizzle, "across": across}
    report = emulated("planted_sm90.cu").launch("group_product_cuda", seed, **given, mistake=mistake)
    expected = torch.zeros(64, 64, dtype=torch.float64)
    expected[:rows] = a.double() @ b.double()
    return report, float((out - expected).abs().max())


@pytest.mark.parametrize("across", [False, True], ids=["along", "across"])
@pytest.mark.parametrize("swizzle", [32, 64, 128])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_product_of_a_group(seed: int, swizzle: int, across: bool) -> None:
    """CuTe's descriptors of each layout, on tiles that TMA brought; rows that the tensor lacks are zeros."""
    rows = (64, 37)[seed % 2]
    report, error = _group_product(seed, swizzle=swizzle, across=across, rows=rows)
    assert error < 192 * 2.0**-24 * 64
    assert report.group_products == 3 * 4 * 4  # steps, warps, and depths of 16
    assert report.tensor_copies == 3 * 2 * (128 // swizzle)
    assert report.read == {"a": rows * 192 * 2, "b": 64 * 192 * 2, "out": 0}
    assert report.bank_conflicts == 0


# Whichever of the two comes first.
TOO_EARLY = (
    "race: (a product reads shared memory at .*, which "
    "(an asynchronous copy still writes|a copy wrote that was not waited)"
    "|TMA writes shared memory at .*, which may still be read by a product)"
)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "mistake, noticed",
    [
        ("no_mbarrier_fence", "TMA on an mbarrier that was set up without a fence"),
        (
            "no_barrier",
            "on an mbarrier that another thread set up without a barrier since|where no mbarrier was set up",
        ),
        ("no_wait_for_tma", TOO_EARLY),
        ("other_parity", f"{TOO_EARLY}|deadlock"),
        ("no_wait_for_readers", "more than 1 arrivals at an mbarrier in one phase"),
        ("too_many_bytes", "deadlock: thread .* waits in a phase of an mbarrier"),
        ("too_few_bytes", "deadlock: thread .* waits in a phase of an mbarrier"),
        ("two_arrivals", "more than 1 arrivals at an mbarrier in one phase"),
        ("misaligned", "TMA to .*, no multiple of 128 in shared memory"),
        ("no_mbarrier", "where no mbarrier was set up"),
        ("no_fence_of_wgmma", "wgmma without a wgmma.fence since the last wait"),
        ("no_commit", "race: TMA writes shared memory at .*, which may still be read by a product"),
        ("no_wait_for_wgmma", "race: TMA writes shared memory at .*, which may still be read by a product"),
        (
            "written_by_a_thread",
            "which a thread wrote without a proxy fence and a barrier since"
            "|writes 2 bytes of shared memory at .*, which may still be read by a product",
        ),
        ("other_operands", "warps of a group come to different wgmma"),
    ],
)
def test_a_mistake_with_tma_and_wgmma(mistake: str, noticed: str, seed: int) -> None:
    with pytest.raises(EmulationError, match=noticed):
        _group_product(seed, mistake=mistake)


def _tensor_product(
    seed: int, *, rows: int = 128, swizzle: int = 128, across: bool = False, slip: str = "none"
) -> tuple[Report, float]:
    a, b = torch.randn(128, 192).bfloat16(), torch.randn(192, 64).bfloat16()
    right = b if across else b.T.contiguous()
    out = torch.full((3, rows, 64), torch.nan)
    given = {"a": a, "b": right, "out": out, "rows": rows, "depth": 192, "swizzle": swizzle, "across": across}
    report = emulated("planted_sm100.cu").launch("tensor_product_cuda", seed, **given, slip=slip)
    steps = zip(a[:rows].double().split(64, 1), b.double().split(64), strict=True)
    expected = torch.stack([left @ right for left, right in steps])
    return report, float((out - expected).abs().nan_to_num(torch.inf).max())


@pytest.mark.parametrize("across", [False, True], ids=["along", "across"])
@pytest.mark.parametrize("swizzle", [32, 64, 128])
@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("seed", SEEDS[:4])
def test_a_product_in_tensor_memory(seed: int, rows: int, swizzle: int, across: bool) -> None:
    """CuTe's descriptors of each layout; sums that lie in all lanes, or in half of those of each warp."""
    report, error = _tensor_product(seed, rows=rows, swizzle=swizzle, across=across)
    assert error < 64 * 2.0**-24 * 64
    assert report.tensor_products == 3 * 4  # steps, and depths of 16
    assert report.tensor_copies == 3 * 2 * (128 // swizzle)
    assert report.bank_conflicts == 0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "slip, noticed",
    [
        ("odd_columns", r"tcgen05\.alloc of 48 columns, expected a power of two from 32 to 512"),
        (
            "late_allocation",
            r"tcgen05\.alloc waits for tensor memory that the next launch, which may begin, would hold",
        ),
        ("no_barrier", "another thread (wrote|set up) without a barrier since|where no mbarrier was set up"),
        ("no_release_of_the_right", "the block never lets others allocate tensor memory"),
        ("no_free", "the block ends with 64 columns of tensor memory"),
        ("other_place", r"tcgen05\.dealloc of 64 columns at"),
        ("no_mbarrier_fence", "on an mbarrier that was set up without a fence"),
        ("no_wait_for_tma", "race: a product reads shared memory at .*, which an asynchronous copy still writes"),
        ("no_wait_for_readers", r"race: tcgen05\.(mma writes|ld reads) tensor memory, which"),
        ("old_descriptor", r"tcgen05\.mma by the descriptor .* of a kind that is not modelled"),
        ("other_type", r"tcgen05\.mma by the instruction descriptor .* of a kind that is not modelled"),
        ("beyond_its_columns", r"tcgen05\.mma to columns .* of tensor memory, of which the block has"),
        ("no_commit", "deadlock: thread .* waits in a phase of an mbarrier"),
        ("no_wait_for_products", r"race: tcgen05\.(mma writes|ld reads) tensor memory, which|deadlock"),
        ("no_fence_behind_the_wait", r"race: tcgen05\.ld reads tensor memory, which a product writes"),
        ("no_fence_before_the_arrival", r"race: tcgen05\.mma writes tensor memory, which may still be read"),
        ("no_fence_behind_the_readers", r"race: tcgen05\.mma writes tensor memory, which may still be read"),
        ("no_wait_for_loads", "a warp ends before it has waited for its loads from tensor memory"),
        ("other_lanes", r"tcgen05\.ld of warp . from lane"),
        ("written_by_a_thread", "which (a thread wrote without a proxy fence|may still be read by a product)"),
    ],
)
def test_a_mistake_with_tensor_memory(slip: str, noticed: str, seed: int) -> None:
    with pytest.raises(EmulationError, match=noticed):
        _tensor_product(seed, rows=(64, 128)[seed % 2], slip=slip)


@pytest.mark.parametrize(
    "mutation", mutations("cuda/reduce.cuh", {"warp_size / 2; offset > 0": "warp_size / 4; offset > 0"})
)
def test_a_mutation_that_nothing_looks_at_is_reported(mutation: Mutation) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"nothing notices the mutation reduce\.cuh:.*:warp_size / 2"):
        assert_caught("ops/affine_inverse/affine_inverse.cu", mutation, lambda kernels: None)


def test_a_mutation_that_does_not_compile_is_no_catch() -> None:
    (mutation,) = mutations("ops/affine_inverse/affine_inverse.cu", {"const bool shift_only =": "const bool ="})
    with pytest.raises(CompileError, match="affine_inverse: "):
        assert_caught("ops/affine_inverse/affine_inverse.cu", mutation, lambda kernels: None)


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"__nowhere__ matches nothing in cuda/reduce\.cuh"):
        mutations("cuda/reduce.cuh", {"__nowhere__": ""})
