"""Decoding by the native sweep and solver is that of the plain-torch model, to rounding; and its own promises, to the
last bit: any window at tolerance 0 is token by token, whatever the batch and the number of threads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import starflow_ext
from starflow import Chunks, Flow, Guidance, Sequential, Window, decode
from starflow.config import RunConfig
from starflow.model import compared_once, pack_conditioner, pack_linears, packed
from starflow.solver import NotFiniteError, Precision, Schedule
from starflow.storage import load_flow, write_model
from starflow_ext import ops
from starflow_ext._load import native
from starflow_ext._stamp import fingerprint
from starflow_ext.sweep_block import BlockState

from ..flows import CASES, VIDEO, condition, latents, make_flow, null

LEVELS = native.isa_levels()
DEEP = make_flow(VIDEO | {"top_order": "spread", "num_kv_heads": 1, "use_qk_norm": True})


@pytest.fixture(params=list(LEVELS))
def isa(request: pytest.FixtureRequest) -> Any:
    level = str(request.param)
    if LEVELS[level]:
        pytest.skip(f"{level}: {LEVELS[level]}")
    native.set_isa(level)
    yield level
    native.set_isa("")


def sampled(flow: Flow, z: Tensor, schedule: Schedule, weight: float = 0.0, **options: Any) -> Tensor:
    batch = len(z)
    y, free = condition(flow, batch), null(flow, batch)
    guidance = Guidance(
        weight, "gaussian" if free is not None else "linear", temperature=1.0 if free is not None else 0.7
    )
    return decode(flow, z, y, null=free, guidance=guidance, schedule=schedule, **options).x


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("weight", [0.0, 0.8])
def test_every_architecture_decodes_as_in_plain_torch(name: str, weight: float) -> None:
    flow = make_flow(CASES[name])
    z = latents(flow)
    for schedule in (Sequential(), Window(size=7, tolerance=0.0), Chunks(5, 0.0, 40)):
        got = sampled(flow, z, schedule, weight)
        with starflow_ext.reference_mode():
            expected = sampled(flow, z, schedule, weight)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_every_level_decodes_as_in_plain_torch(isa: str) -> None:
    z = latents(DEEP)
    with starflow_ext.reference_mode():
        expected = sampled(DEEP, z, Sequential(), 0.8)
    torch.testing.assert_close(sampled(DEEP, z, Window(size=9, tolerance=0.0), 0.8), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or torch without CUDA")
@pytest.mark.parametrize("weight", [0.0, 0.8])
def test_cuda_decodes_as_the_cpu(weight: float) -> None:
    z = latents(DEEP)
    y, free = condition(DEEP, len(z)), null(DEEP, len(z))
    with starflow_ext.reference_mode():
        expected = sampled(DEEP, z, Sequential(), weight)
    flow = copy.deepcopy(DEEP).cuda()
    options = {"null": free.cuda(), "guidance": weight, "precision": "float16"}
    got = [decode(flow, z.cuda(), y.cuda(), schedule=s, **options).x for s in (Sequential(), Window(9, 0.0))]
    torch.testing.assert_close(got[0].cpu(), expected, atol=5e-2, rtol=5e-2)
    assert torch.equal(*got)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    size=st.integers(1, 50),
    batch=st.integers(1, 4),
    frames=st.integers(1, 3),
    threads=st.integers(1, 4),
    weight=st.sampled_from([0.0, 1.5]),
    precision=st.sampled_from(["float32", "two_bfloat16", "float16", "bfloat16", "int8"]),
)
def test_bits_do_not_depend_on_window_batch_or_threads(
    size: int, batch: int, frames: int, threads: int, weight: float, precision: Precision
) -> None:
    z = latents(DEEP, batch=4, frames=frames)
    y, free = condition(DEEP, 4), null(DEEP, 4)

    def run(schedule: Schedule, count: int) -> Tensor:
        some = {"null": free[:count], "guidance": weight, "schedule": schedule, "precision": precision}
        return decode(DEEP, z[:count], y[:count], **some).x

    expected = run(Sequential(), 4)[:batch]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(run(Window(size=size, tolerance=0.0), batch), expected)
        loose = Window(size=size, tolerance=0.02)
        assert torch.equal(run(loose, batch), run(loose, 4)[:batch])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "precision, tolerance, most",
    [
        ("float32", 1e-3, 1e-2),
        ("two_bfloat16", 1e-3, 1e-2),
        ("float16", 1e-3, 2e-2),
        ("int8", 1e-3, 0.3),
        ("bfloat16", 0.05, 0.5),
    ],
)
def test_certificate_is_taken_in_float32(precision: Precision, tolerance: float, most: float) -> None:
    z, y = latents(DEEP), condition(DEEP)
    schedule = Window(size=15, tolerance=tolerance, certificate=True)
    decoded = decode(DEEP, z, y, schedule=schedule, precision=precision)
    assert decoded.backward_error is not None
    assert decoded.backward_error < most
    with starflow_ext.reference_mode():
        seen = (DEEP.encode(decoded.x, y).z - z).abs().max().item()
    # One block after the other rounds a little differently from the chain of all.
    assert seen < 3 * most


def test_precision_of_plain_torch_is_refused() -> None:
    with (
        starflow_ext.reference_mode(),
        pytest.raises(ValueError, match=r"^decode: precision is 'int8', expected 'float32' where plain torch decodes"),
    ):
        decode(DEEP, latents(DEEP), condition(DEEP), precision="int8")
    with pytest.raises(ValueError, match=r"^decode: precision is 'int7', expected one of 'float32'"):
        decode(DEEP, latents(DEEP), condition(DEEP), precision="int7")


@pytest.mark.parametrize("part", ["layers.0.mlp.up.weight", "proj_out.bias"])
def test_weights_that_are_not_finite_end_the_solve(part: str) -> None:
    flow = make_flow(VIDEO)
    parameter = dict(flow.blocks[-1].conditioner.named_parameters())[part]
    with torch.no_grad():
        parameter.view(-1)[3] = float("nan")
    with pytest.raises(NotFiniteError, match=r"^solve: the solution of token 0 of sample 0 is not finite"):
        decode(flow, latents(flow), condition(flow), schedule=Window(size=8, tolerance=0.01))


def _write_numpy(weight: torch.nn.Parameter) -> None:
    weight.detach().numpy()[0, 0] += 1


def _write_counted(weight: torch.nn.Parameter) -> None:
    with torch.no_grad():
        weight += 1


def _write_data(weight: torch.nn.Parameter) -> None:
    weight.data[-1, -1] += 1


def _write_by_optimiser(weight: torch.nn.Parameter) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.1, fused=True).step()


@pytest.mark.parametrize("write", [_write_counted, _write_data, _write_numpy, _write_by_optimiser])
@pytest.mark.parametrize("part", ["proj_out", "layers.0.mlp.up"])
def test_changed_weights_are_packed_again(write: Callable[[torch.nn.Parameter], None], part: str) -> None:
    flow = make_flow(VIDEO)
    conditioner = flow.blocks[-1].conditioner
    z, y = latents(flow), condition(flow)
    decode(flow, z, y)
    first = pack_conditioner(conditioner)
    assert pack_conditioner(conditioner) is first
    write(conditioner.get_submodule(part).weight)
    assert pack_conditioner(conditioner) is not first
    fresh = make_flow(VIDEO)
    fresh.load_state_dict(flow.state_dict())
    assert torch.equal(decode(flow, z, y).x, decode(fresh, z, y).x)


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="the table of pages is Linux's")
@pytest.mark.parametrize("write", [_write_counted, _write_data, _write_numpy, _write_by_optimiser])
@pytest.mark.parametrize("part", ["proj_out", "layers.0.mlp.up"])
def test_mapped_weights_are_read_again_only_if_written(
    write: Callable[[torch.nn.Parameter], None], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_flow(VIDEO)
    write_model(tmp_path / "model.safetensors", made.state_dict(), RunConfig(flow=made.config), {})
    flow, _ = load_flow(tmp_path)
    conditioner = flow.blocks[-1].conditioner
    z, y = latents(flow), condition(flow)
    assert torch.equal(decode(flow, z, y).x, decode(made, z, y).x)
    read: list[int] = []

    def counted(tensors: Sequence[Tensor]) -> int | None:
        read.append(sum(tensor.nbytes for tensor in tensors))
        return fingerprint(tensors)

    monkeypatch.setattr(packed, "fingerprint", counted)
    first = pack_conditioner(conditioner)
    assert sum(read) == 0
    write(conditioner.get_submodule(part).weight)
    assert pack_conditioner(conditioner) is not first
    made.load_state_dict(flow.state_dict())
    assert torch.equal(decode(flow, z, y).x, decode(made, z, y).x)


def _sweep(flow: Flow, **change: Any) -> Tensor:
    conditioner = flow.blocks[-1].conditioner
    weights = pack_conditioner(conditioner).block
    state = BlockState.allocate(weights, 2, 20)
    call = {"rows": torch.zeros(2, 4, 2), "start": torch.zeros(2, dtype=torch.int64)} | change
    return ops.jacobi_sweep(weights, state, call.pop("rows"), call.pop("start"), **call)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"start": torch.tensor([3, 17])},
            "start holds 17, expected slots from 0 to 16 for 4 tokens: the caches have 20 slots, 21 are needed",
        ),
        (
            {"rows": torch.zeros(2, 4, 3)},
            "rows has shape [2, 4, 3] and dtype float32, expected (2, tokens, 2), float32, contiguous, on cpu",
        ),
        (
            {"start": torch.tensor([3])},
            "start has shape [1] and dtype int64, expected [2] int64 on cpu: one number a cache row",
        ),
        ({"product_input": "int4"}, 'product_input is "int4", expected "float32", "bfloat16" or "two_bfloat16"'),
    ],
)
def test_errors_of_the_sweep(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError) as error:
        _sweep(DEEP, **change)
    assert str(error.value).splitlines()[0] == f"jacobi_sweep: {message}"


def test_empty_window() -> None:
    assert _sweep(DEEP, rows=torch.zeros(2, 0, 2)).shape == (2, 0, 4)


def test_weights_are_compared_once_where_it_is_asked_for() -> None:
    """Within `compared_once` the first use compares; what is written after it is seen outside again."""
    network = make_flow(VIDEO).blocks[-1].conditioner
    first = pack_linears(network)
    with compared_once():
        assert pack_linears(network) is first
        network.proj_in.weight.data += 1.0
        assert pack_linears(network) is first
    assert pack_linears(network) is not first
    with compared_once():
        network.proj_in.weight.data += 1.0
        assert pack_linears(network) is not first
