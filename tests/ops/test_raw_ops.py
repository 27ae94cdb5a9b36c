"""The registered operators themselves, which anybody may call: they trust no tensor, and leave no memory behind."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from starflow_ext import ops, pack_weight
from starflow_ext._spec import Spec
from starflow_ext.jacobi_solve import SolveProgress

from .battery import DIFFERENTIABLE, SPECS, copied, plain, requiring
from .blocks import block, state_of


class _Recorder(TorchDispatchMode):
    """The calls of native operators, with their arguments by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "starflow_ext":
            names = [argument.name for argument in func._schema.arguments]
            self.calls.append((func, dict(zip(names, args, strict=True))))
        return func(*args, **(kwargs or {}))


def _backward_calls(spec: Spec) -> list[tuple[Any, dict[str, Any]]]:
    """What the gradient of the usual call runs, and that of one with every result."""
    recorder = _Recorder()
    for changed in ({}, {"return_lse": True}, {"residual": torch.ones(2, 5, 48)}):
        if not changed.keys() <= spec.arguments(**plain(spec).arguments).keys():
            continue
        sample, _ = requiring(spec, plain(spec))
        if spec.name == "linear" and changed:
            continue
        results = spec.call(**{**sample.arguments, **changed})
        results = results if isinstance(results, tuple) else (results,)
        with recorder:
            sum(result.sum() for result in results).backward()
    return [(func, call) for func, call in recorder.calls if func._schema.name.endswith("_backward")]


BACKWARD = {call[0]._schema.name.partition("::")[2]: spec for spec in DIFFERENTIABLE for call in _backward_calls(spec)}


def test_every_backward_op_is_among_them() -> None:
    registered = torch._C._dispatch_get_all_op_names()
    names = {name.partition("::")[2].partition(".")[0] for name in registered if name.startswith("starflow_ext::")}
    assert set(BACKWARD) == {name for name in names if name.endswith("_backward")}
    assert {"norm_backward", "rope_append_backward", "block_attention_backward", "affine_forward_backward"} <= names


# What may be of other types than the rest.
_ANY_FLOATING = ("x", "raw", "weight", "query_norm", "key_norm", "query_cos", "query_sin", "key_cos", "key_sin")


def _wrong(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Tensors that may not stand in an argument's place."""
    changed = {
        "smaller": tensor[tuple(slice(0, 1) for _ in tensor.shape)],
        "of one row less": tensor[..., :-1, :] if tensor.dim() > 1 else tensor[:-1],
        "of a dimension more": tensor[None],
        "integers": tensor.to(torch.int64),
    }
    return changed if name in _ANY_FLOATING else changed | {"of another type": tensor.to(torch.bfloat16)}


def _refusal(operator: Any, call: dict[str, Any]) -> str:
    with pytest.raises(RuntimeError) as refusal:
        operator(**call)
    return str(refusal.value).splitlines()[0]


@pytest.mark.parametrize("name", BACKWARD)
def test_gradients_of_wrong_shape_or_dtype_are_refused(name: str) -> None:
    """Natively, where memory beyond them would be read; and gradients and results without memory, in the same words."""
    checked = set()
    for operator, call in _backward_calls(BACKWARD[name]):
        operator(**call)
        tensors = {argument: value.detach() for argument, value in call.items() if isinstance(value, Tensor)}
        for argument, tensor in tensors.items():
            for how, wrong in _wrong(argument, tensor).items():
                said = _refusal(operator, {**call, argument: wrong})
                assert ", expected " in said, (argument, how)
                if argument.startswith("grad_") or argument in ("out", "lse"):
                    assert said.startswith(f"{name}: {argument} has "), how
                    with FakeTensorMode(allow_non_fake_inputs=True):
                        assert _refusal(operator, {**call, argument: wrong}) == said
            checked.add(argument)
    assert any(argument.startswith("grad_") for argument in checked)


class _MallInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keep",
        )
    ]


def _allocated() -> int:
    """Bytes that malloc has handed out."""
    gc.collect()
    found = _mallinfo()
    return int(found.uordblks + found.hblkhd)


_mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
if _mallinfo is not None:
    _mallinfo.restype = _MallInfo


def _sweep_call() -> Callable[[], Any]:
    weights = block({})
    state = state_of(weights, 1, 8)
    rows, start = torch.randn(1, 2, 5), torch.tensor([2])
    return lambda: ops.jacobi_sweep(weights, state, rows, start)


def _solve_call() -> Callable[[], Any]:
    weights = block({})
    state = state_of(weights, 1, 8)
    z, x = torch.randn(1, 4, 5), torch.zeros(1, 5, 5)

    def call() -> None:
        progress = SolveProgress.begin(x, 0, halves=1, out_channels=10)
        options = {"first": 0, "first_token": 0, "frame_tokens": 4, "window": 4, "tolerance": 1.0}
        ops.jacobi_solve(weights, state, progress, z, **options)

    return call


def _call_of(spec: Spec) -> Callable[[], Any]:
    sample = copied(plain(spec))
    return lambda: spec.call(**sample.arguments)


CALLS: dict[str, Callable[[], Callable[[], Any]]] = {
    **{spec.name: (lambda spec=spec: _call_of(spec)) for spec in SPECS},
    "linear_pack": lambda: lambda: pack_weight(torch.ones(4, 4), "int8"),
    "jacobi_sweep": _sweep_call,
    "jacobi_solve": _solve_call,
}


def test_every_op_is_called_many_times() -> None:
    assert {*ops.__all__} <= CALLS.keys()


@pytest.mark.skipif(_mallinfo is None, reason="mallinfo2 is of glibc 2.33 and later")
@pytest.mark.parametrize("name", CALLS)
def test_ten_thousand_calls_leave_no_memory_behind(name: str) -> None:
    """A string that crosses the stable ABI would leave 48 bytes each time: 480 kB."""
    call = CALLS[name]()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            for _ in range(200):
                call()
            before = _allocated()
            for _ in range(10_000):
                call()
            grown = _allocated() - before
    finally:
        torch.set_num_threads(threads)
    assert grown < 40_000


@pytest.mark.skipif(_mallinfo is None, reason="mallinfo2 is of glibc 2.33 and later")
@pytest.mark.parametrize("spec", DIFFERENTIABLE, ids=lambda spec: spec.name)
def test_a_thousand_gradients_leave_no_memory_behind(spec: Spec) -> None:
    def call() -> None:
        sample, leaves = requiring(spec, plain(spec))
        results = spec.call(**sample.arguments)
        results = results if isinstance(results, tuple) else (results,)
        torch.autograd.grad(sum(result.sum() for result in results), list(leaves.values()))

    for _ in range(100):
        call()
    before = _allocated()
    for _ in range(1000):
        call()
    assert _allocated() - before < 20_000


def test_no_operator_takes_a_string() -> None:
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("starflow_ext::")]
    assert len(names) > 10
    for name in names:
        schema = torch._C._get_schema(*(name.split(".") if "." in name else (name, "")))
        assert "str" not in {str(argument.type) for argument in schema.arguments}, name


FIRST_CALLS = {
    **{spec.name: f"spec = SPECS[{spec.name!r}]; spec.call(**sample(spec))" for spec in SPECS},
    "linear_pack": "pack_weight(torch.ones(2, 2))",
    "norm of many rows": "ops.norm(torch.ones(4000, 64), torch.ones(64))",
}


@pytest.mark.parametrize("name", FIRST_CALLS)
def test_an_unknown_level_is_told_by_whatever_runs_first(name: str) -> None:
    program = (
        "import torch\nfrom starflow_ext import ops, pack_weight\nfrom starflow_ext.ops import SPECS\n"
        "def sample(spec):\n"
        "    return next(spec.samples((torch.float32,) * len(spec.dtypes[0]), torch.Generator())).arguments\n"
        f"{FIRST_CALLS[name]}"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"STARFLOW_ISA": "sse9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.strip().splitlines()[-1] == (
        'RuntimeError: STARFLOW_ISA is "sse9", expected scalar, avx2, avx512, avx512_bf16 or amx'
    )
