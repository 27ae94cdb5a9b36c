"""Every op in every mode of torch: right, or refused in one sentence. `python -m tests.ops.modes` prints the table.

The table of docs/ops.md is this one; test_modes.py runs each cell.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from starflow_ext import ops
from starflow_ext._spec import Sample, Spec, map_tensors, tensors
from starflow_ext.linear_pack import PackedWeight

from .battery import in_float64, inputs, samples_of
from .blocks import block, state_of

RIGHT, REFUSED, NOTHING = "right", "refused", "-"

# The calls of an op that the modes run, by the beginning of their label.
CALLS = {
    "affine_forward": ("defaults", "activation=exp soft_clip=3.0 shifted=True"),
    "affine_inverse": ("defaults", "activation=softplus soft_clip=3.0 shifted=True"),
    "block_attention": (
        "defaults",
        "start of each sample",
        "first key of each sample",
        "temperature of each sample",
        "causal FrameMask(prefix=5",
    ),
    "jacobi_update": ("defaults", "activation=exp soft_clip=3.0, guidance=1.5"),
    "linear": ("defaults", "gelu_tanh", "silu", "layer_norm with options", "plain weight"),
    "norm": ("defaults", "residual, rms_norm", "neither weight nor bias, residual, layer_norm"),
    "rope_append": ("defaults", "queries rotated"),
}
CACHED = "rope_append, cached"


@dataclass(frozen=True)
class Call:
    """One call as a function of its tensors: those that have a derivative, or whichever a derivative may be asked of.

    ``exact`` is its reference; it is asked for float64.
    """

    op: str
    label: str
    run: Callable[..., tuple[Tensor, ...]]
    exact: Callable[..., tuple[Tensor, ...]]
    leaves: tuple[Tensor, ...]
    sample: Sample | None = None
    spec: Spec | None = None

    @property
    def record(self) -> tuple[Spec, Sample]:
        """The Spec of the op, and its sample that the call is."""
        assert self.spec is not None
        assert self.sample is not None
        return self.spec, self.sample

    @property
    def overwrites(self) -> bool:
        """Whether an argument is overwritten."""
        if self.spec is None:
            return True
        spec, sample = self.record
        return bool(tensors(tuple(sample.arguments.get(name) for name in spec.mutates)))


def rows() -> dict[str, list[Call]]:
    """The rows of the table: the calls of each op, apart where a cache is overwritten."""
    found: dict[str, list[Call]] = {}
    for name, labels in CALLS.items():
        spec = ops.SPECS[name]
        drawn = list(samples_of(spec, torch.float32))
        chosen = [next(sample for sample in drawn if sample.label.startswith(label)) for label in labels]
        found[name] = [_call(spec, sample) for sample in chosen]
        if name == "rope_append":
            cached = next(sample for sample in drawn if sample.label == "final slots")
            found[CACHED] = [_call(spec, cached)]
    weights = block({})
    for name in ops.LOOPS:
        found[name] = [_loop(name, weights)]
    return found


def _call(spec: Spec, sample: Sample) -> Call:
    leaves = inputs(spec, sample)
    if not leaves:
        first = next(name for name, value in sample.arguments.items() if isinstance(value, Tensor))
        leaves = {first: sample.arguments[first]}

    def given(arguments: Mapping[str, Any], values: tuple[Tensor, ...]) -> dict[str, Any]:
        """The arguments with these values; those that are overwritten are copies."""
        changed = {**arguments, **dict(zip(leaves, values, strict=True))}
        return {name: map_tensors(torch.clone, v) if name in spec.mutates else v for name, v in changed.items()}

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        return tensors(spec.call(**given(sample.arguments, values)))

    def exact(*values: Tensor) -> tuple[Tensor, ...]:
        return tensors(spec.reference(**spec.arguments(**given(in_float64(sample).arguments, values))))

    return Call(spec.name, sample.label, run, exact, tuple(leaves.values()), sample, spec)


def _loop(name: str, weights: Any) -> Call:
    from starflow_ext.jacobi_solve import SolveProgress

    state = state_of(weights, 2, 9)

    def sweep(rows: Tensor) -> tuple[Tensor, ...]:
        return (ops.jacobi_sweep(weights, state, rows, torch.full((2,), 2)),)

    def solve(z: Tensor) -> tuple[Tensor, ...]:
        progress = SolveProgress.begin(torch.zeros(2, 8, 5), 0, halves=1, out_channels=10)
        options: dict[str, Any] = {"first": 0, "first_token": 0, "frame_tokens": 7, "window": 3, "tolerance": 0.0}
        ops.jacobi_solve(weights, state, progress, z, **options)
        return (progress.x,)

    generator = torch.Generator().manual_seed(2)
    run = sweep if name == "jacobi_sweep" else solve
    return Call(name, "a block", run, run, (torch.randn(2, 7, 5, generator=generator),))


def _near(got: Any, want: Any, what: str) -> None:
    """Compare with float64: a float32 derivative may be off by the rounding of many terms."""
    for a, b in zip(tensors(got), tensors(want), strict=True):
        assert a.shape == b.shape, what
        scale = max(1.0, float(b.detach().abs().amax())) if b.numel() else 1.0
        torch.testing.assert_close(a.detach().double(), b.detach().double(), rtol=2e-4, atol=2e-5 * scale, msg=what)


def _directions(call: Call, seed: int = 1) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(leaf.shape, generator=generator) for leaf in call.leaves)


def _wide(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.double() for value in values)


def _every(call: Call) -> tuple[int, ...]:
    return tuple(range(len(call.leaves)))


def _loss(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    """A sum of squares of the results, weighed: it has a second derivative too."""

    def loss(*values: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for result in function(*values):
            weights = torch.linspace(-1.0, 1.5, result.numel(), dtype=torch.float64).reshape(result.shape)
            total = total + (weights * result.double().square()).sum()
        return total

    return loss


def forward_mode(call: Call) -> None:
    """Tangents by dual numbers."""
    directions = _directions(call)
    with forward_ad.dual_level():
        duals = (forward_ad.make_dual(*pair) for pair in zip(call.leaves, directions, strict=True))
        got = tuple(forward_ad.unpack_dual(result).tangent for result in call.run(*duals))
    want = torch.func.jvp(call.exact, _wide(call.leaves), _wide(directions))[1]
    assert all(tangent is not None for tangent in got), call.label
    _near(got, want, call.label)


def func_jvp(call: Call) -> None:
    """torch.func.jvp."""
    directions = _directions(call)
    got = torch.func.jvp(call.run, call.leaves, directions)[1]
    _near(got, torch.func.jvp(call.exact, _wide(call.leaves), _wide(directions))[1], call.label)


def func_grad(call: Call) -> None:
    """torch.func.grad, and vjp."""
    want = torch.func.grad(_loss(call.exact), _every(call))(*_wide(call.leaves))
    _near(torch.func.grad(_loss(call.run), _every(call))(*call.leaves), want, call.label)
    value, pull = torch.func.vjp(_loss(call.run), *call.leaves)
    _near(pull(torch.ones_like(value)), want, call.label)


def func_jacrev(call: Call) -> None:
    """torch.func.jacrev of the sums over channels, times a direction: the tangents of forward mode."""
    directions = _directions(call)
    parts = torch.func.jacrev(lambda *values: call.run(*values)[0].sum(-1), _every(call))(*call.leaves)
    want = torch.func.jvp(call.exact, _wide(call.leaves), _wide(directions))[1][0].sum(-1)
    got = sum(
        torch.tensordot(part.double(), direction.double(), dims=direction.dim())
        for part, direction in zip(parts, directions, strict=True)
    )
    _near(got, want, call.label)


def func_vmap(call: Call) -> None:
    """torch.func.vmap over a new dimension, and the gradient of each of its calls and through them."""
    stacked = tuple(torch.stack([leaf, 0.5 * leaf, leaf.flip(-1)]) for leaf in call.leaves)
    each = [tuple(value[i] for value in stacked) for i in range(3)]
    want = [call.run(*values) for values in each]
    _near(torch.func.vmap(call.run)(*stacked), tuple(torch.stack(parts) for parts in zip(*want, strict=True)), "vmap")
    grads = [torch.func.grad(_loss(call.exact), _every(call))(*_wide(values)) for values in each]
    expected = tuple(torch.stack(parts) for parts in zip(*grads, strict=True))
    _near(torch.func.vmap(torch.func.grad(_loss(call.run), _every(call)))(*stacked), expected, "vmap of grad")
    leaves = tuple(value.clone().requires_grad_() for value in stacked)
    total = torch.func.vmap(_loss(call.run))(*leaves).sum()
    _near(torch.autograd.grad(total, leaves), expected, "gradient of vmap")


def func_nested(call: Call) -> None:
    """The derivative of a gradient: forward over reverse, and reverse over reverse."""
    directions = _directions(call)
    exact = torch.func.grad(_loss(call.exact), _every(call))
    want = torch.func.jvp(exact, _wide(call.leaves), _wide(directions))[1]
    gradient = torch.func.grad(_loss(call.run), _every(call))
    _near(torch.func.jvp(gradient, call.leaves, directions)[1], want, "forward over reverse")

    def along(*values: Tensor) -> Tensor:
        grads = gradient(*values)
        return sum(((g * d).sum() for g, d in zip(grads, directions, strict=True)), torch.zeros(()))

    _near(torch.func.grad(along, _every(call))(*call.leaves), want, "reverse over reverse")


def _gradient(call: Call, run: Callable[..., tuple[Tensor, ...]], **options: Any) -> tuple[Tensor, ...]:
    leaves = tuple(leaf.clone().requires_grad_() for leaf in call.leaves)
    return torch.autograd.grad(_loss(run)(*leaves), leaves, **options)


def double_backward(call: Call) -> None:
    """A gradient that a second one is taken of."""
    leaves = tuple(leaf.clone().requires_grad_() for leaf in call.leaves)
    grads = torch.autograd.grad(_loss(call.run)(*leaves), leaves, create_graph=True)
    directions = _directions(call)
    along = sum((grad * direction).sum() for grad, direction in zip(grads, directions, strict=True))
    exact = torch.func.grad(_loss(call.exact), _every(call))
    want = torch.func.jvp(exact, _wide(call.leaves), _wide(directions))[1]
    _near(torch.autograd.grad(along, leaves), want, call.label)


def checkpointed(call: Call) -> None:
    """torch.utils.checkpoint, of both kinds. The reentrant one runs without gradients first, where a norm is fused."""
    want = _gradient(call, call.run)
    for reentrant in (False, True):
        leaves = tuple(leaf.clone().requires_grad_() for leaf in call.leaves)
        _loss(lambda *values, r=reentrant: checkpoint(call.run, *values, use_reentrant=r))(*leaves).backward()
        got = tuple(leaf.grad for leaf in leaves)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=call.label)


def autocast(call: Call) -> None:
    """The gradient under autocast, to bfloat16's precision: operands are rounded, or nothing is."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = _gradient(call, call.run)
    for a, b in zip(got, _gradient(call, call.run), strict=True):
        assert (a - b).norm() <= 0.05 * b.norm() + 1e-6, call.label


class Counting:
    """A backend that counts the graphs it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, example: list[Any]) -> Any:
        self.graphs += 1
        return graph.forward


def _larger(call: Call, batch: int) -> Sample:
    """The sample with its batch repeated."""
    spec, sample = call.record

    def repeated(tensor: Tensor) -> Tensor:
        return torch.cat([tensor] * batch)

    return sample.map(repeated, but=spec.shared)


def dynamic_compile(call: Call) -> None:
    """torch.compile(dynamic=True): one graph for every batch."""
    spec, _ = call.record
    torch._dynamo.reset()
    backend = Counting()
    compiled = torch.compile(spec.call, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        # Sizes that no other dimension has: torch takes equal ones for the same.
        for batch in (11, 13, 17):
            sample, other = _larger(call, batch), _larger(call, batch).map(torch.clone)
            sample = sample.map(torch.clone)
            got, want = tensors(compiled(**sample.arguments)), tensors(spec.call(**other.arguments))
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), call.label
    assert backend.graphs == 1, (call.label, backend.graphs)


def _exported(call: Call, *, strict: bool) -> None:
    spec, sample = call.record
    names = tuple(name for name, value in sample.arguments.items() if isinstance(value, Tensor))
    rest = {name: value for name, value in sample.arguments.items() if name not in names}
    kept = tuple(rest.get(name) for name in spec.mutates)
    before = map_tensors(torch.clone, kept)

    class Module(nn.Module):
        def forward(self, *values: Tensor) -> Any:
            return tensors(spec.call(**rest, **dict(zip(names, values, strict=True))))

    given = tuple(sample.arguments[name] for name in names)
    with torch.no_grad():
        program = torch.export.export(Module(), map_tensors(torch.clone, given), strict=strict)
        got = program.module()(*map_tensors(torch.clone, given))
        _restore(kept, before)
        want = Module()(*map_tensors(torch.clone, given))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), call.label
        _restore(kept, before)


def _restore(kept: tuple[Any, ...], before: tuple[Any, ...]) -> None:
    for old, new in zip(tensors(kept), tensors(before), strict=True):
        old.copy_(new)


def strict_export(call: Call) -> None:
    """torch.export in strict mode: the bits of the call."""
    _exported(call, strict=True)


def loose_export(call: Call) -> None:
    """torch.export in non-strict mode."""
    _exported(call, strict=False)


class _All(nn.Module):
    """The first call of each op, one after the other. Every tensor is an argument, but packed weights: constants."""

    def __init__(self) -> None:
        super().__init__()
        self.records = {name: calls[0].record for name, calls in rows().items() if calls[0].spec is not None}

    def arguments(self) -> tuple[Tensor, ...]:
        """The tensors of all calls, as drawn."""
        given = (value for _, sample in self.records.values() for value in tensors(tuple(sample.arguments.values())))
        return tuple(tensor.clone() for tensor in given)

    def forward(self, *values: Tensor) -> dict[str, tuple[Tensor, ...]]:
        rest = iter(values)
        return {
            name: tensors(spec.call(**sample.map(lambda _: next(rest)).arguments))
            for name, (spec, sample) in self.records.items()
        }


@cache
def _package() -> Mapping[str, bool]:
    """By op, whether a package of all calls, built once and loaded again, has the bits of the calls."""
    program = _All()
    given, kept = program.arguments(), program.arguments()
    with torch.no_grad(), TemporaryDirectory() as folder:
        exported = torch.export.export(program, program.arguments())
        path = torch._inductor.aoti_compile_and_package(exported, package_path=str(Path(folder) / "ops.pt2"))
        got = torch._inductor.aoti_load_package(path)(*given)
        want = program(*kept)
    # What is overwritten is among the arguments.
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))
    return {
        name: all(torch.equal(a, b) for a, b in zip(got[name], results, strict=True)) for name, results in want.items()
    }


def aot_inductor(call: Call) -> None:
    """A package of AOTInductor, which runs without Python: the bits of the call."""
    assert _package()[CACHED if call.op == "rope_append" and call.overwrites else call.op], call.label


def _shapes(results: tuple[Tensor, ...]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(result.shape, result.dtype) for result in results]


def meta(call: Call) -> None:
    """Meta tensors: the shapes and dtypes of the call. A packed weight has its memory."""
    spec, sample = call.record
    if isinstance(sample.arguments.get("weight"), PackedWeight):
        return
    sample = sample.map(lambda tensor: tensor.to("meta"))
    assert _shapes(tensors(spec.call(**sample.arguments))) == _shapes(call.run(*call.leaves)), call.label


def fake(call: Call) -> None:
    """Fake tensors, as torch traces with."""
    want = _shapes(call.run(*call.leaves))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert _shapes(call.run(*(mode.from_tensor(leaf) for leaf in call.leaves))) == want, call.label


def inference(call: Call) -> None:
    """Inference tensors: the values of the call, in inference mode and outside of it."""
    want = call.run(*call.leaves)
    with torch.inference_mode():
        leaves = tuple(leaf.clone() for leaf in call.leaves)
        inside = call.run(*leaves)
    with torch.no_grad():
        outside = call.run(*leaves)
    for got in (inside, outside):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), call.label


def empty(call: Call) -> None:
    """No samples: results and gradients of no samples, zeros for what is shared."""
    spec, sample = call.record
    nothing = _call(spec, sample.map(lambda tensor: tensor[:0], but=spec.shared))
    assert all(result.shape[0] == 0 for result in nothing.run(*nothing.leaves)[:1]), call.label
    if not call.overwrites:
        for leaf, grad in zip(nothing.leaves, _gradient(nothing, nothing.run), strict=True):
            assert torch.equal(grad, torch.zeros_like(leaf)), call.label


def stride_zero(call: Call) -> None:
    """Arguments that are expanded: the values of copies. What is overwritten cannot be expanded."""
    spec, sample = call.record

    def expanded(tensor: Tensor) -> Tensor:
        return tensor[:1].expand_as(tensor)

    read = sample.map(expanded, but=spec.mutates)
    got = spec.call(**read.map(torch.clone, but=tuple(set(read.arguments) - set(spec.mutates))).arguments)
    want = spec.call(**read.map(lambda tensor: tensor.clone(memory_format=torch.contiguous_format)).arguments)
    assert all(torch.equal(a, b) for a, b in zip(tensors(got), tensors(want), strict=True)), call.label


def every_gradient(call: Call) -> None:
    """Each tensor that a gradient is asked of, alone: that of the reference, or one sentence, where all are refused."""
    spec, sample = call.record
    refused: list[RuntimeError] = []
    right = 0
    for position, tensor in enumerate(tensors(tuple(sample.arguments.values()))):
        if not tensor.is_floating_point():
            continue

        def asked(dtype: torch.dtype, call: Callable[..., Any], position: int = position) -> Any:
            seen = iter(range(1000))

            def changed(value: Tensor) -> Tensor:
                value = value.clone().to(dtype) if value.is_floating_point() else value.clone()
                return value.requires_grad_() if next(seen) == position else value

            given = spec.arguments(**sample.map(changed).arguments)
            leaf = next(tensor for tensor in tensors(tuple(given.values())) if tensor.requires_grad)
            return torch.autograd.grad(_loss(lambda: tensors(call(**given)))(), leaf)

        try:
            got = asked(torch.float32, spec.call)
        except RuntimeError as error:
            if not is_sentence(str(error)):
                raise
            refused.append(error)
            continue
        _near(got, asked(torch.float64, spec.reference), f"{call.label}, tensor {position}")
        right += 1
    if not right:
        raise refused[0]


MODES: Mapping[str, Callable[[Call], None]] = {
    "forward mode": forward_mode,
    "func.jvp": func_jvp,
    "func.grad, vjp": func_grad,
    "func.jacrev": func_jacrev,
    "func.vmap": func_vmap,
    "nested": func_nested,
    "double backward": double_backward,
    "checkpoint": checkpointed,
    "autocast": autocast,
    "every gradient": every_gradient,
    "dynamic compile": dynamic_compile,
    "strict export": strict_export,
    "loose export": loose_export,
    "AOTInductor": aot_inductor,
    "meta": meta,
    "fake": fake,
    "inference": inference,
    "empty batch": empty,
    "stride 0": stride_zero,
}
# What the loops have no call for: they run on packed weights and caches of their own, no arguments of a graph.
NEEDS_SPEC = (
    "every gradient",
    "dynamic compile",
    "strict export",
    "loose export",
    "AOTInductor",
    "meta",
    "fake",
    "empty batch",
    "stride 0",
)


def is_sentence(text: str) -> bool:
    """Whether a refusal is the documented one sentence, of the op or of one that it calls."""
    names = "|".join(ops.__all__)
    return re.fullmatch(rf"({names}): [^\n]+, expected [^\n]+", text) is not None


def outcome(mode: str, call: Call) -> str:
    """What a mode makes of a call; anything but a right value or the one sentence is raised."""
    if call.spec is None and mode in NEEDS_SPEC:
        return NOTHING
    try:
        MODES[mode](call)
    except RuntimeError as error:
        if not is_sentence(str(error)):
            raise
        return REFUSED
    return RIGHT


def cells() -> Iterator[tuple[str, str]]:
    """The cells of the table."""
    for row in rows():
        for mode in MODES:
            yield row, mode


def table() -> str:
    """Write the table as Markdown, modes down and ops across."""
    calls = rows()
    lines = ["| | " + " | ".join(f"`{name}`" for name in calls) + " |", "|---" * (len(calls) + 1) + "|"]
    for mode in MODES:
        found = [" / ".join(dict.fromkeys(outcome(mode, call) for call in row)) for row in calls.values()]
        lines.append(f"| {mode} | " + " | ".join(found) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
