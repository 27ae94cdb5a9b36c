"""Every tensor of the golden files: inputs and outputs of the published model code.

What is run for a file follows from the json beside it and from the tensors that it holds, so another file of the same
form works unchanged. A tensor that no check consumed fails the test.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from starflow import Chunks, Decoded, Flow, FlowConfig, Guidance, Sequential, Window, decode
from starflow.data.captions import aspect_size, assemble
from starflow.model import concatenate, nll_of, patchify, score_target, token_order, unpatchify
from starflow.model.rope import grid_positions, rotation, text_positions
from starflow.sampling import score_denoise
from starflow.storage import load_published, published_state
from starflow.storage.published import published_name
from starflow.training.optim import cosine_lr
from starflow_ext.block_attention import FrameMask
from starflow_ext.ops import jacobi_update
from starflow_ext.rope_append import rotate

FOLDER = Path(os.environ.get("STARFLOW_GOLDENS") or Path(__file__).parents[1] / "goldens")
MODELS = sorted(path.stem for path in FOLDER.glob("*.json") if "family" in json.loads(path.read_text(encoding="utf-8")))


def close(got: Tensor, expected: Tensor, name: str) -> None:
    """The tolerance of the golden files: 1e-4 absolute and relative."""
    torch.testing.assert_close(
        got.detach().to(expected.dtype).reshape(expected.shape),
        expected,
        atol=1e-4,
        rtol=1e-4,
        msg=lambda m: f"{name}: {m}",
    )


class Golden:
    """A golden file: hands out tensors, remembers which were used."""

    def __init__(self, name: str) -> None:
        self.about: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        self.tensors = load_file(FOLDER / f"{name}.safetensors")
        self.left = set(self.tensors)

    def take(self, name: str) -> Tensor:
        self.left.discard(name)
        return self.tensors[name]

    def has(self, name: str) -> bool:
        return name in self.tensors

    def check(self, name: str, got: Tensor) -> None:
        """Compares, where the file holds the tensor."""
        if self.has(name):
            close(got, self.take(name), name)

    def finish(self) -> None:
        assert not self.left, f"never compared: {sorted(self.left)}"


def load_flow(golden: Golden) -> Flow:
    config = FlowConfig.from_published(golden.about["kwargs"], golden.about["family"])
    flow = Flow(config)
    state = {name.removeprefix("model."): golden.take(name) for name in golden.tensors if name.startswith("model.")}
    load_published(flow, state)
    for name, tensor in published_state(flow).items():
        torch.testing.assert_close(tensor.reshape(state[name].shape), state[name], atol=0, rtol=0)
    return flow


def check_gradients(golden: Golden, flow: Flow) -> None:
    norms = golden.about.get("grad_norms", {})
    seen = set()
    for name, parameter in flow.named_parameters():
        published = published_name(name, flow.config)
        assert published is not None
        if parameter.grad is None:
            assert published not in norms or norms[published] == 0.0
            continue
        golden.check(f"grad.{published}", parameter.grad)
        if published in norms:
            seen.add(published)
            assert float(parameter.grad.norm()) == pytest.approx(norms[published], rel=1e-3, abs=1e-4), published
    assert {n for n, v in norms.items() if v} <= seen


def check_sigma(expected: list[list[float]], flow: Flow, affines: tuple[Any, ...]) -> None:
    for (low, high), affine in zip(expected, affines, strict=True):
        scale = torch.ones(1) if affine is None else affine.terms().scale
        assert float(scale.min()) == pytest.approx(low, abs=1e-4)
        assert float(scale.max()) == pytest.approx(high, abs=1e-4)


def check_encode(golden: Golden, flow: Flow, y: Tensor | None, prefix: str = "") -> None:
    """Noise, log-determinants, latents, text stream and loss of one input."""
    x = golden.take(f"{prefix}in.x")
    encoded = flow.encode(x, y)
    golden.check(f"{prefix}out.z", encoded.z)
    for block, (log_det, affine) in enumerate(zip(encoded.log_det, encoded.affines, strict=True)):
        if affine is None:
            golden.check(f"{prefix}out.logdet.{block}", log_det.sum((1, 2)))
            continue
        log_scale = affine.terms().log_scale
        golden.check(f"{prefix}out.logdet.{block}", -log_scale)
        # The op's own sum over channels is what the likelihood uses.
        torch.testing.assert_close(log_det.flatten(), -log_scale.sum(-1).flatten(), atol=1e-4, rtol=1e-4)
    for index, latent in enumerate(encoded.latents):
        golden.check(f"{prefix}out.latent.{index}", latent)
    if encoded.text is not None:
        golden.check(f"{prefix}out.y", encoded.text)
    scalars = golden.about["scalars"]
    if f"{prefix}loss" in scalars:
        parts = scalars[f"{prefix}loss"]
        loss_z = 0.5 * encoded.z.square().mean()
        assert float(loss_z) == pytest.approx(parts["loss_z"], abs=1e-4)
        assert float(nll_of(encoded).mean() - loss_z) == pytest.approx(parts["loss_logdet"], abs=1e-4)
        assert float(nll_of(encoded).mean()) == pytest.approx(parts["loss"], abs=1e-4)
    if f"{prefix}sigma_range_per_block" in scalars:
        check_sigma(scalars[f"{prefix}sigma_range_per_block"], flow, encoded.affines)


def check_score(golden: Golden, flow: Flow, y: Tensor | None) -> None:
    """The training loss, its gradients by parameter and by data, and the score target."""
    call = golden.about["calls"]["fsm"]
    x = golden.take("in.x").clone().requires_grad_()
    encoded = flow.encode(x, y)
    loss = call["loss_weight"] * nll_of(encoded).mean()
    for latent in encoded.latents[:-1]:
        loss = loss + call["latent_norm_regularization"] * latent.square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == pytest.approx(call["loss"], abs=1e-4)
    assert x.grad is not None
    golden.check("out.x_grad", x.grad)
    golden.check("out.fsm_target", score_target(x.grad, call["sigma"]))
    check_gradients(golden, flow)


def chunks(call: Mapping[str, Any], others: Mapping[str, Any]) -> Chunks:
    block = call.get("block") or next(c["block"] for c in others.values() if "block" in c)
    return Chunks(block, call["th"], call.get("max_iter", 32 if call["th"] > 1e-10 else 2000))


def check_exact_passes(got: list[int], expected: list[int]) -> None:
    assert len(got) == len(expected)
    assert all(abs(a - b) <= 2 for a, b in zip(got, expected, strict=True)), (got, expected)


def passes(decoded: Decoded) -> list[int]:
    return [count for report in decoded.reports if report is not None for count in report.passes]


class Sampler:
    """Decodes with what the json says of a call."""

    def __init__(self, golden: Golden, flow: Flow, y: Tensor | None, null: Tensor | None) -> None:
        self.golden, self.flow, self.y, self.null = golden, flow, y, null
        self.calls = golden.about["calls"]

    def __call__(self, z: Tensor, schedule: Any, *, weight: float = 0.0, **options: Any) -> Decoded:
        return decode(self.flow, z, self.y, null=self.null, guidance=weight, schedule=schedule, **options)


def check_samples(golden: Golden, flow: Flow, y: Tensor | None, null: Tensor | None) -> None:
    calls = golden.about["calls"]
    sample = Sampler(golden, flow, y, null)
    z = golden.take("in.z")
    decoded = sample(z, Sequential())
    golden.check("out.rev", decoded.x)
    for index, latent in enumerate(decoded.latents[:-1]):
        golden.check(f"out.rev_seq.{index + 1}", latent_as_data(flow, latent, z))
    close(sample(z, Window(size=7, tolerance=0.0)).x, golden.tensors["out.rev"], "window of 7 at tolerance 0")
    for name in [n for n in golden.tensors if n.startswith("out.rev_attn_temp")]:
        temperature = float(name.removeprefix("out.rev_attn_temp"))
        golden.check(name, sample(z, Sequential(), temperature=temperature).x)
    if "rev_cfg" in calls:
        weight = calls["rev_cfg"]["guidance"]
        golden.check("out.rev_cfg", sample(z, Sequential(), weight=weight).x)
        close(sample(z, Window(size=5, tolerance=0.0), weight=weight).x, golden.tensors["out.rev_cfg"], "guided window")
    for name, call in calls.items():
        if not name.startswith("jacobi"):
            continue
        options: dict[str, Any] = {"weight": call.get("guidance", 0.0)}
        if call.get("context_length"):
            options["context_frames"] = call["context_length"]
        decoded = sample(z, chunks(call, calls), **options)
        expected = call["iterations_per_chunk"]
        if 0.0 < call["th"] < 1e-10:  # the last pass notices a change of zero, which rounding may move
            check_exact_passes(passes(decoded), expected)
            close(decoded.x, golden.tensors["out.rev"], name)
        else:
            assert passes(decoded) == expected, name
        golden.check(f"out.{name}", decoded.x)


def latent_as_data(flow: Flow, latent: Tensor, like: Tensor) -> Tensor:
    config = flow.config
    return unpatchify(latent, config.patch_size, channel_first=config.channel_first_patches, image=like.dim() == 4)


def check_context(golden: Golden, flow: Flow, y: Tensor, null: Tensor) -> None:
    """Continuing given frames, token by token and by chunks."""
    calls = golden.about["calls"]
    if "i2v" not in calls:
        return
    sample = Sampler(golden, flow, y, null)
    z, prefix = golden.take("in.z"), golden.take("in.x")[:, : calls["i2v"]["context_frames"]]
    weight = calls["i2v"]["guidance"]
    decoded = sample(z, Sequential(), prefix=prefix)
    golden.check("out.i2v", decoded.x)
    close(decoded.x[:, : prefix.shape[1]], prefix, "given frames")
    golden.check("out.i2v_cfg", sample(z, Sequential(), weight=weight, prefix=prefix).x)
    call = calls["i2v_jacobi_exact_cfg"]
    exact = sample(z, chunks(call, calls), weight=weight, prefix=prefix)
    close(exact.x, golden.tensors["out.i2v_cfg"], "i2v_jacobi_exact_cfg")
    check_exact_passes(passes(exact), call["iterations_per_chunk"])
    close(sample(z, Window(size=9, tolerance=0.0), prefix=prefix).x, golden.tensors["out.i2v"], "window with prefix")


def check_long(golden: Golden, flow: Flow, y: Tensor, null: Tensor) -> None:
    """Sliding windows over a clip longer than the deep block's window, and denoising in chunks."""
    calls = golden.about["calls"]
    if "long" not in calls:
        return
    call = calls["long"]
    sample = Sampler(golden, flow, y, null)
    z = golden.take("long.z")
    options = {"context_frames": call["context_length"]}
    decoded = sample(z, chunks(call, calls), **options)
    golden.check("long.out", decoded.x)
    check_exact_passes(passes(decoded), call["iterations_per_chunk"])
    golden.check("long.out_cfg", sample(z, chunks(call, calls), weight=call["guidance_cfg"], **options).x)
    prefix = golden.take("in.x")[:, :1]
    golden.check("long.out_i2v", sample(z, chunks(call, calls), prefix=prefix, **options).x)
    close(sample(z, Sequential(), **options).x, golden.tensors["long.out"], "token by token beyond the window")
    if golden.has("long.denoised_chunks"):
        assert flow.denoiser is not None
        golden.check("long.denoised_chunks", flow.denoiser.denoise_video(golden.tensors["long.out"], y))


def check_denoisers(golden: Golden, flow: Flow, y: Tensor | None) -> None:
    x = golden.take("in.x")
    sigma = golden.about["calls"]["fsm"]["sigma"]
    if golden.has("out.self_denoise"):
        golden.check("out.self_denoise", score_denoise(flow, x, y, sigma))
    if flow.denoiser is not None:
        with torch.no_grad():
            golden.check("out.denoiser", flow.denoiser(x, y))
            golden.check("out.denoised", flow.denoiser.denoise(x, y))
            if golden.has("img.out.denoiser"):
                golden.check("img.out.denoiser", flow.denoiser(golden.take("img.in.x"), y))
            expected = golden.about["scalars"].get("denoiser_mse_vs_fsm_target")
            if expected is not None:
                error = (golden.tensors["out.denoiser"] - golden.tensors["out.fsm_target"]).square().mean()
                assert float(error) == pytest.approx(expected, rel=1e-3)


def run_starflow(golden: Golden, flow: Flow) -> None:
    y = golden.take("in.y") if golden.has("in.y") else None
    null = golden.take("in.y_null") if golden.has("in.y_null") else None
    with torch.no_grad():
        check_encode(golden, flow, y)
    check_score(golden, flow, y)
    check_denoisers(golden, flow, y)
    check_samples(golden, flow, y, null)
    if y is not None and null is not None:
        check_context(golden, flow, y, null)
        check_long(golden, flow, y, null)
    if golden.has("img.in.x"):
        with torch.no_grad():
            check_encode(golden, flow, y, "img.")
        golden.check("img.out.rev", decode(flow, golden.take("img.in.z"), y, schedule=Sequential()).x)


def run_tarflow(golden: Golden, flow: Flow) -> None:
    """TarFlow's noise and latents are token sequences in raster order."""
    x = golden.take("in.x").clone().requires_grad_()
    y = golden.take("in.y") if golden.has("in.y") else None
    scalars = golden.about["scalars"]
    inputs = {"": y}
    if golden.has("in.y_drop"):
        inputs |= {"drop.": golden.take("in.y_drop"), "none.": None}
    for prefix, labels in inputs.items():
        encoded = flow.encode(x, labels)
        golden.check(f"{prefix}out.z", encoded.latents[-1])
        dims = encoded.z[0].numel()
        golden.check(f"{prefix}out.logdets", sum(d.flatten(1).sum(1) for d in encoded.log_det) / dims)  # type: ignore[arg-type]
        loss = nll_of(encoded).mean()
        assert float(loss.detach()) == pytest.approx(scalars[f"{prefix}loss"], abs=1e-4)
        if not prefix:
            loss.backward()  # type: ignore[no-untyped-call]
            assert x.grad is not None
            golden.check("out.x_grad", x.grad)
            check_gradients(golden, flow)
            for index, latent in enumerate(encoded.latents[1:]):
                golden.check(f"out.latent.{index}", latent)
    side = flow.config.img_size // flow.config.patch_size
    tokens = golden.take("in.z").unflatten(1, (1, side, side))[:, 0].unsqueeze(1)
    z = latent_as_data(flow, tokens, x)
    for name, call in {"rev": {}, **golden.about["calls"]}.items():
        guidance = Guidance(
            call.get("guidance", 0.0),
            kind="linear",
            parts=call.get("guide_what", "ab"),
            annealed=call.get("annealed_guidance", False),
            temperature=call.get("attn_temp", 1.0),
        )
        for schedule in (Window(size=5, tolerance=0.0), Sequential()):
            decoded = decode(flow, z, y, guidance=guidance, schedule=schedule)
            close(decoded.x, golden.take(f"out.{name}"), f"out.{name} by {schedule}")


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str) -> None:
    golden = Golden(name)
    flow = load_flow(golden)
    (run_tarflow if golden.about["family"] == "tarflow" else run_starflow)(golden, flow)
    golden.finish()


@pytest.fixture
def units() -> Iterator[Golden]:
    return Golden("units")


def numbers(text: str) -> dict[str, int | None]:
    return {k: None if v == "None" else int(v) for k, v in re.findall(r"(\w+)=(\d+|None)", text)}


def test_units(units: Golden) -> None:
    about = units.about["tensors"]
    for case in sorted({name.rsplit(".", 1)[0] for name in about if name.startswith("rope.")}):
        sizes = numbers(about[f"{case}.angles"])
        frames, text, side, head = (int(sizes[k] or 0) for k in ("frames", "txt", "pt_seq_len", "head_dim"))
        height, width = int(sizes["h"] or 0), int(sizes["w"] or 0)
        grid = grid_positions(max(frames, 1), height, width, side, still=frames == 0)
        words = text_positions(text, side)
        expected = units.take(f"{case}.pos")
        close(torch.cat([words, grid])[:, : expected.shape[1]], expected, f"{case}.pos")
        table = concatenate(
            rotation(words, head, third_axis=text > 0), rotation(grid, head, third_axis=text > 0), torch.device("cpu")
        )
        assert table is not None
        angles = units.take(f"{case}.angles")
        close(table.cos.repeat_interleave(2, -1), angles.cos(), f"{case}.angles")
        close(table.sin.repeat_interleave(2, -1), angles.sin(), f"{case}.angles")
        q = units.take(f"{case}.q")
        close(rotate(q, table, "interleaved"), units.take(f"{case}.q_rot_interleaved"), f"{case} interleaved")
        close(rotate(q, table, "half"), units.take(f"{case}.q_rot_half"), f"{case} half")
    for name in [n for n in about if n.startswith("mask.")]:
        sizes = numbers(about[name])
        text, frame = int(sizes["txt"] or 0), int(sizes["h"] or 0) * int(sizes["w"] or 0)
        mask = FrameMask(text, frame, int(sizes["block_causal"] or 0), sizes["window"])
        index = torch.arange(text + int(sizes["frames"] or 0) * frame)
        assert torch.equal(mask.visible(index, index), units.take(name).bool()), name
    check_guidance(units)
    close(patchify(units.take("patchify.in"), 2), units.take("patchify.out"), "patchify")
    close(
        patchify(units.take("patchify_tarflow.in"), 2, channel_first=True),
        units.take("patchify_tarflow.out"),
        "patchify_tarflow",
    )
    check_orders(units)
    units.finish()


def check_guidance(units: Golden) -> None:
    """The guided affine map, read off the fused op at z = 0 and z = 1."""
    mu, sigma = units.take("cfg.mu"), units.take("cfg.sigma")
    weight = float(re.findall(r"w=([\d.]+)", units.about["tensors"]["cfg.mu_eff"])[0])
    raw = torch.cat([sigma.log(), mu], -1).reshape(mu.shape[0], -1, 2 * mu.shape[-1])
    shape = (mu.shape[0] // 2, raw.shape[1], mu.shape[-1])
    found = []
    for value in (0.0, 1.0):
        x = torch.zeros(shape)
        jacobi_update(x, torch.full(shape, value), raw, activation="exp", guidance=weight)
        found.append(x)
    shift, scale = found[0], found[1] - found[0]
    for name, got in (("mu_eff", shift), ("sigma_eff", scale)):
        expected = units.take(f"cfg.{name}")
        if expected.shape[0] == mu.shape[0]:
            got = torch.cat([got, got])
        close(got, expected, f"cfg.{name}")


def check_orders(units: Golden) -> None:
    for name, frames in (("perm.flip_in_block", 3), ("perm.flip", 3), ("perm.flip_in_block_image", 1)):
        expected = units.take(name).flatten().long()
        area = len(expected) // frames
        side = int(area**0.5)
        order = token_order("reverse_in_frame" if "in_block" in name else "reverse", frames, side, area // side)
        assert order.tolist() == expected.tolist(), name


def test_captions_sizes_and_schedule(units: Golden) -> None:
    for case in units.about["captions"]:
        options = dict(case["kwargs"])
        for index, text in enumerate(case["text"]):
            one = {k: v["tensor"][index] if isinstance(v, dict) else v for k, v in options.items()}
            got = assemble(
                text,
                fps=one.get("fps"),
                noise_level=one.get("noise_std"),
                aspect_ratio=one.get("aspect_ratio"),
                template="gemma" if one.get("use_template") else None,
            )
            assert got == case["out"][index]
    for key, sizes in units.about["aspect_sizes"].items():
        side, multiple = map(int, key.split("/"))
        for ratio, size in sizes.items():
            assert list(aspect_size(side, ratio, multiple)) == size
    about = units.about["cosine_lr"]
    expected = [about["initial"], *about["after_step"]]
    got = [
        cosine_lr(step, warmup=about["warmup"], total=about["total"], peak=about["max_lr"], floor=about["min_lr"])
        for step in range(len(expected))
    ]
    assert got == pytest.approx(expected, rel=1e-9)
