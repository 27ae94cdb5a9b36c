"""Packed weights and their originals: whatever changes a weight, no product comes of what it was."""

from __future__ import annotations

import copy
import io
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import starflow_ext
from starflow_ext import PackedLinear, ops, pack_weight, swap_linears
from starflow_ext._load import native
from starflow_ext._stamp import _on_device, fingerprint

X = torch.randn(7, 48, generator=torch.Generator().manual_seed(0))


def _optimiser(kind: Any, **options: Any) -> Callable[[nn.Parameter], None]:
    def step(weight: nn.Parameter) -> None:
        weight.grad = torch.ones_like(weight)
        kind([weight], lr=0.1, **options).step()

    return step


def _numpy(weight: nn.Parameter) -> None:
    weight.detach().numpy()[:] *= 2


def _inference(weight: nn.Parameter) -> None:
    with torch.inference_mode():
        weight.mul_(2)


def _counted(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.add_(1)


def _replaced_data(weight: nn.Parameter) -> None:
    weight.data = weight.data + 1


WRITES = {
    "SGD": _optimiser(torch.optim.SGD),
    "SGD fused": _optimiser(torch.optim.SGD, fused=True),
    "AdamW fused": _optimiser(torch.optim.AdamW, fused=True),
    "Adam foreach": _optimiser(torch.optim.Adam, foreach=True),
    "data": lambda weight: weight.data.add_(1),
    "data replaced": _replaced_data,
    "numpy": _numpy,
    "inference mode": _inference,
    "counted": _counted,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_changed_original_is_refused_by_linear(write: Callable[[nn.Parameter], None]) -> None:
    weight = nn.Parameter(torch.randn(40, 48))
    packed, dropped = pack_weight(weight), pack_weight(weight, keep=False)
    ops.linear(X, packed)
    write(weight)
    assert not packed.is_fresh()
    expected = "it packed again after a change (pack_weight), or a PackedLinear, which does so by itself"
    with torch.no_grad(), pytest.raises(RuntimeError) as error:
        ops.linear(X, packed)
    assert (
        str(error.value) == f"linear: weight is packed from values that its original no longer has, expected {expected}"
    )
    torch.testing.assert_close(ops.linear(X, pack_weight(weight)), X @ weight.T)
    assert dropped.is_fresh()  # It has no original.


def test_a_single_element_of_a_trained_original_is_seen() -> None:
    weight = nn.Parameter(torch.randn(300, 1000))
    packed = pack_weight(weight)
    weight.data[123, 457] += 1
    assert not packed.is_fresh()
    with pytest.raises(RuntimeError, match=r"^linear: weight is packed from values"):
        ops.linear(torch.randn(2, 1000), packed)


def test_equal_values_written_again_are_fresh() -> None:
    weight = nn.Parameter(torch.randn(40, 48))
    packed = pack_weight(weight)
    with torch.no_grad():
        weight.copy_(weight.clone())
    assert packed.is_fresh(exact=False)
    ops.linear(X, packed)


def _is_right(layer: PackedLinear) -> None:
    with torch.no_grad():
        torch.testing.assert_close(layer(X), F.linear(X, layer.weight, layer.bias), atol=2e-5, rtol=2e-5)
        assert layer._packed is not None


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_layer_packs_again_after_every_write(write: Callable[[nn.Parameter], None]) -> None:
    layer = PackedLinear(48, 40)
    _is_right(layer)
    write(layer.weight)
    _is_right(layer)


@pytest.mark.parametrize("assign", [False, True])
def test_a_layer_packs_again_after_loading(assign: bool) -> None:
    layer, other = PackedLinear(48, 40), nn.Linear(48, 40)
    _is_right(layer)
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    file.seek(0)
    layer.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    _is_right(layer)
    assert layer.state_dict().keys() == other.state_dict().keys()
    other.load_state_dict(layer.state_dict())


def test_a_write_to_one_element_is_seen_after_repack() -> None:
    layer = PackedLinear(1000, 300)
    x = torch.randn(2, 1000)
    with torch.no_grad():
        layer(x)
        layer.weight.data[123, 457] += 1
        layer.repack()
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), atol=2e-5, rtol=2e-5)


def test_a_layer_in_another_dtype_or_place() -> None:
    layer = PackedLinear(48, 40)
    _is_right(layer)
    layer.to(torch.bfloat16)
    with torch.no_grad():
        out = layer(X.bfloat16())
        torch.testing.assert_close(out, F.linear(X.bfloat16(), layer.weight, layer.bias), atol=2e-2, rtol=2e-2)
        layer.double()
        torch.testing.assert_close(layer(X.double()), F.linear(X.double(), layer.weight, layer.bias))


def test_gradients_of_a_layer_are_those_of_nn_linear() -> None:
    layer = PackedLinear(48, 40)
    plain = nn.Linear(48, 40)
    plain.load_state_dict(layer.state_dict())
    for module in (layer, plain):
        module(X).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
    # A frozen layer passes gradients on by its packed weight.
    layer.requires_grad_(False)
    x = X.clone().requires_grad_()
    layer(x).sum().backward()
    assert layer._packed is not None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(7, -1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_a_layer_under_autocast_has_its_dtype(grad: bool) -> None:
    layer = PackedLinear(48, 40)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        out = layer(X)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), F.linear(X, layer.weight, layer.bias), atol=2e-2, rtol=2e-2)


@torch.no_grad()
def test_a_compiled_or_functional_layer_computes_from_the_weight_itself() -> None:
    layer = PackedLinear(48, 40)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    compiled(X)
    layer.weight.data.mul_(2)
    torch.testing.assert_close(compiled(X), F.linear(X, layer.weight, layer.bias))
    weights = torch.randn(3, 40, 48)
    many = torch.func.vmap(lambda weight: torch.func.functional_call(layer, {"weight": weight}, (X,)))(weights)
    torch.testing.assert_close(many, torch.stack([F.linear(X, weight, layer.bias) for weight in weights]))


def test_what_others_put_on_a_layer_is_not_lost() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].note = "mine"  # type: ignore[assignment]
    model[1].register_buffer("scale", torch.ones(4))
    model[2].register_parameter("gain", nn.Parameter(torch.ones(4)))
    model[3].add_module("adapter", nn.Linear(4, 4))
    names = list(model.state_dict())
    assert starflow_ext.swap_linears(model) == ["0", "3.adapter"]
    assert model[0].note == "mine"
    assert list(model.state_dict()) == names
    with pytest.raises(RuntimeError, match="layer has parameters, buffers or modules beside weight and bias, expected"):
        PackedLinear.from_linear(model[1])  # type: ignore[arg-type]


def test_copies_and_files_of_a_layer_hold_no_packed_values() -> None:
    layer = PackedLinear(48, 40, storage="int8")
    with torch.no_grad():
        layer(X)
    other = copy.deepcopy(layer)
    assert other._packed is None
    assert layer._packed is not None
    with tempfile.TemporaryFile() as file:
        torch.save(layer, file)
        assert file.tell() < 3 * 48 * 40 * 4


def test_swapping_the_linears_of_a_model() -> None:
    class Own(nn.Linear):
        pass

    hooked, shared = nn.Linear(4, 4), nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *_: None)
    model = nn.Sequential(nn.Linear(48, 4), nn.ModuleDict({"a": shared, "b": Own(4, 4)}), hooked, shared).eval()
    before = dict(model.named_parameters())
    assert swap_linears(model, "float16") == ["0", "1.a", "3"]
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert model[3] is model[1]["a"]
    assert not model[0].training
    assert model[0].storage == "float16"
    assert type(model[1]["b"]) is Own
    assert type(model[2]) is nn.Linear


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: PackedLinear(3, 4, storage="int4"), r'^PackedLinear: storage is "int4", expected "float32"'),
        (lambda: PackedLinear.from_linear(nn.ReLU()), r"^PackedLinear: layer is of class ReLU, expected a plain torch"),
        (lambda: swap_linears(nn.Linear(3, 4)), r"^swap_linears: model is a linear layer itself, expected one that"),
    ],
)
def test_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.parametrize("read", [lambda tensor: fingerprint([tensor]), _on_device], ids=["native", "torch"])
def test_a_fingerprint_is_of_the_content_and_its_order(read: Callable[[Tensor], int]) -> None:
    generator = torch.Generator().manual_seed(1)
    for shape in ((0,), (1,), (3, 5), (64, 33), (700, 999)):
        tensor = torch.randn(shape, generator=generator)
        same = read(tensor)
        assert read(tensor.clone()) == same
        if tensor.numel() > 1:
            others = [-tensor, tensor.flip(0), tensor.roll(1), tensor * (1 + 2**-20)]
            for at in torch.randint(tensor.numel(), (20,), generator=generator).tolist():
                others.append(tensor.clone())
                others[-1].view(-1)[at] *= -1
            found = [read(other.contiguous()) for other in others]
            assert len({same, *found}) == len(set(map(_bytes, others)) | {_bytes(tensor)})


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def test_a_fingerprint_does_not_depend_on_threads() -> None:
    tensors = [torch.randn(1000, 999), torch.randn(3), torch.randn(64, 64)]
    found = set()
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        found.add(fingerprint(tensors))
        torch.set_num_threads(before)
    assert len(found) == 1
    assert fingerprint([tensors[0].t()]) == fingerprint([tensors[0].t().contiguous()])
    assert fingerprint([torch.empty(3, device="meta")]) is None


def test_a_glance_reads_the_first_and_the_last_line() -> None:
    def glance(tensor: Tensor) -> int:
        return native.fingerprint([(tensor.data_ptr(), tensor.nbytes)], 4)

    tensor = torch.zeros(1000)
    same = glance(tensor)
    for at in (0, 15, -1):
        changed = tensor.clone()
        changed[at] = 1
        assert glance(changed) != same


def test_the_names_are_public() -> None:
    assert {"PackedLinear", "swap_linears"} <= set(starflow_ext.__all__)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("trains", [False, True])
def test_inputs_that_are_no_numbers_with_a_point_are_refused(dtype: torch.dtype, trains: bool) -> None:
    layer = starflow_ext.PackedLinear(8, 5).requires_grad_(trains)
    with pytest.raises(RuntimeError, match=r"^PackedLinear: input has dtype .*, expected float32"):
        layer(torch.ones(2, 8, dtype=dtype))
