"""What is special to jacobi_update: guidance, the change that it reports, and writing in place."""

from __future__ import annotations

import pytest
import torch

from starflow_ext import ops


def _draw(generator: torch.Generator, rows: int = 2, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    shapes = [(2, 5, 19), (2, 5, 19), (rows, 5, 38)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def test_it_is_affine_inverse_in_place(generator: torch.Generator, isa: str) -> None:
    x, z, raw = _draw(generator)
    where, expected = x.data_ptr(), ops.affine_inverse(z, raw)
    ops.jacobi_update(x, z, raw)
    assert torch.equal(x, expected)
    assert x.data_ptr() == where


def test_a_fixed_point_does_not_change(generator: torch.Generator, isa: str) -> None:
    x, z, raw = _draw(generator, rows=4, dtype=torch.float32)
    ops.jacobi_update(x, z, raw, guidance=2.0)
    assert torch.equal(ops.jacobi_update(x, z, raw, guidance=2.0), torch.zeros(2, 5))


def test_change_is_in_units_of_the_scale(generator: torch.Generator, isa: str) -> None:
    x, z, raw = _draw(generator)
    before, noise = x.clone(), ops.affine_forward(x, raw)[0]
    change = ops.jacobi_update(x, z, raw)
    # (x_new - x_old) / scale = z - (x_old - shift) / scale
    torch.testing.assert_close(change, (z - noise).abs().amax(-1).float(), rtol=1e-6, atol=1e-6)
    assert change.dtype == torch.float32
    assert not torch.equal(before, x)


def test_guidance_between_equal_halves_changes_nothing(generator: torch.Generator, isa: str) -> None:
    x, z, raw = _draw(generator)
    guided, plain = x.clone(), x.clone()
    ops.jacobi_update(guided, z, torch.cat([raw, raw]), guidance=3.0)
    ops.jacobi_update(plain, z, raw)
    torch.testing.assert_close(guided, plain, rtol=1e-13, atol=1e-13)


def test_guidance_is_the_product_of_gaussians(generator: torch.Generator, isa: str) -> None:
    """Where the conditional scale is the smaller one: N_c^(1+w) / N_u^w, a Gaussian of that shift and scale."""
    x, z, _ = _draw(generator)
    weight = 1.5
    shifts = torch.randn(4, 5, 19, generator=generator, dtype=torch.float64)
    logs = torch.cat([torch.full((2, 5, 19), -0.7), torch.full((2, 5, 19), 0.2)]).double()
    ops.jacobi_update(x, z, torch.cat([logs, shifts], dim=-1), activation="exp", guidance=weight)
    precise, loose = (-2 * logs).exp().chunk(2)
    precision = (1 + weight) * precise - weight * loose
    shift = ((1 + weight) * precise * shifts[:2] - weight * loose * shifts[2:]) / precision
    # The published rule scales the precision by the conditional one, q = 1 + w - w r, which is the same number.
    torch.testing.assert_close(x, shift + z / precision.sqrt(), rtol=1e-12, atol=1e-12)


def test_nan_in_one_channel_is_never_converged(generator: torch.Generator, isa: str) -> None:
    for argument in range(3):
        for guidance in (0.0, 1.0):
            args = _draw(generator, rows=4 if guidance else 2, dtype=torch.float32)
            args[argument][1, 3, 7] = torch.nan
            change = ops.jacobi_update(*args, guidance=guidance)
            assert change[1, 3].isnan()
            assert not (change[1, 3] < 1e9)
            assert change.isnan().sum() == 1


def test_wrong_arguments(generator: torch.Generator) -> None:
    x, z, raw = _draw(generator)
    with pytest.raises(RuntimeError, match=r"^jacobi_update: raw has shape \[2, 5, 38\], expected \[4, 5, 38\] for x"):
        ops.jacobi_update(x, z, raw, guidance=1.0)
    with pytest.raises(RuntimeError, match=r"^jacobi_update: guidance is -1, expected a finite number >= 0$"):
        ops.jacobi_update(x, z, raw, guidance=-1.0)
    with pytest.raises(RuntimeError, match=r"^jacobi_update: z has shape \[2, 4, 19\], expected \[2, 5, 19\] like x$"):
        ops.jacobi_update(x, z[:, 1:], raw)
    with pytest.raises(RuntimeError, match=r"^jacobi_update: z has dtype float32, expected float64 like x$"):
        ops.jacobi_update(x, z.float(), raw)
    with pytest.raises(RuntimeError, match=r"^jacobi_update: x has elements that share memory, expected a tensor of"):
        ops.jacobi_update(x[:1].expand(2, -1, -1), z, raw)
    with pytest.raises(RuntimeError, match=r"^jacobi_update: gradient mode is on for a tensor that requires"):
        ops.jacobi_update(x, z, raw.requires_grad_())
    with torch.no_grad():
        ops.jacobi_update(x, z, raw)


def test_memory_in_common_is_refused(generator: torch.Generator) -> None:
    x, z, raw = _draw(generator)
    own = r"expected a tensor of its own"
    several = torch.cat([x, z, raw], -1)
    expected = x.clone()
    ops.jacobi_update(expected, z, raw)
    # Parts of one buffer that lie between each other, and the noise itself, which is read before it is written.
    ops.jacobi_update(several[..., :19], several[..., 19:38], several[..., 38:])
    assert torch.equal(several[..., :19], expected)
    ops.jacobi_update(z, z, raw)
    assert torch.equal(z, expected)
    frames = torch.zeros(2, 6, 19, dtype=torch.float64)
    for wrong, name in (
        ((frames[:, 1:], frames[:, :-1], raw), "x has memory in common with z"),
        ((several[..., :19], several[..., 18:37], raw), "x has memory in common with z"),
        ((raw[..., 1:20], x, raw), "x has memory in common with raw"),
        ((torch.zeros(200, dtype=torch.float64).as_strided((2, 5, 19), (90, 18, 1)), x, raw), "x has elements that"),
    ):
        with pytest.raises(RuntimeError, match=f"^jacobi_update: {name}.*{own}"):
            ops.jacobi_update(*wrong)
