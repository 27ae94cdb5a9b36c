"""The rows of the table in docs/checkpoints.md, each tried with random weights of the right shapes.

Names and shapes are those of the releases, without memory (device meta). What computes has the released depths, latent
channels, text and options, and widths and clips that a test can afford: 128 and 192 channels in place of 3072 and 4096,
9 frames of 64 x 64 in place of 81 of 640 x 640.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from starflow.cli import main
from starflow.config import RunConfig
from starflow.data import write_video
from starflow.model import Flow
from starflow.sampling import Pipeline
from starflow.storage import from_published, published_config, read_header
from starflow.storage.published import options_of, published_state

from ..encoders import make_t5
from .test_convert import IMAGE, VIDEO, arguments

ROOT = Path(__file__).parents[2]

# Rows by the words that they begin with, and the test that tries them; "" for the tests below.
ROWS = {
    "encoding, log-determinants": "tests/model/test_goldens.py::test_model",
    "weights": "",
    "yaml": "",
    "solver of the released models": "",
    "guidance of the released": "tests/storage/test_convert.py::test_the_packaged_configs_are_the_published_ones",
    "guided blocks": "",
    "attention temperature": "",
    "long clips": "",
    "shallow blocks of long clips": "",
    "given frames": "",
    "image to video, last frame, video to video": "",
    "denoising": "",
    "step of the denoiser": "",
    "captions in denoising": "",
    "another noise at sampling": "",
    "prompts": "",
    "shapes": "",
    "autoencoders": "",
    "fine-tuned autoencoder": "",
    "fine-tuning": "",
    "noise level that captions tell": "",
    "sampling over processes": "tests/training/test_distributed.py::test_a_model_samples_with_its_weights_in_pieces",
    "second data set of images": "tests/training/test_train.py::test_image_steps_take_a_set_of_their_own",
    "several frame rates": "tests/training/test_train.py::test_shards_and_mixed_rates_resume_to_the_same_bits",
    "tar files": "tests/training/test_train.py::test_shards_and_mixed_rates_resume_to_the_same_bits",
    "logs": "tests/training/test_train.py::test_weights_and_biases_go_on_in_their_own_run",
    "fp8, 8-bit Adam": "tests/storage/test_convert.py::test_every_published_option_is_mapped_or_named",
    "noise at random levels": "tests/storage/test_convert.py::test_published_options_that_cannot_be_honoured_are_named",
}
SMALL = {"channels": 128, "top_block_channels": 192, "img_size": 64, "batch_size": 2}


def test_every_row_has_its_test() -> None:
    page = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    table = page.partition("### The published pipeline beside this one")[2].partition("\n\nThe published sampling")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(ROWS)
    for row, (begin, where) in zip(rows, ROWS.items(), strict=True):
        assert row.startswith(begin)
        file, _, name = where.partition("::")
        assert not where or f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), where


@pytest.mark.parametrize(("name", "billions"), [("starflow_3B_t2i_256x256", 3.9), ("starflow-v_7B_t2v_caus_480p", 6.9)])
def test_names_and_shapes_of_the_releases(name: str, billions: float) -> None:
    config = RunConfig.load(name).flow
    with torch.device("meta"):
        flow = Flow(config)
    state = published_state(flow)
    assert round(sum(tensor.numel() for tensor in flow.parameters()) / 1e9, 1) == billions
    ours = {key: tensor.shape for key, tensor in from_published(flow, state).items()}
    assert ours == {key: tensor.shape for key, tensor in flow.state_dict().items() if key in ours}
    assert set(ours) >= {key for key, _ in flow.named_parameters()}
    told = options_of(state)
    assert tuple(told["layers_per_block"]) == (2, 2, 2, 2, 2, 24) == config.layers_per_block
    assert told["channels"] == config.channels == 3072


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Autoencoders and a text encoder with the released latents and widths, and small networks between them."""
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    diffusers.AutoencoderKLWan(
        base_dim=8,
        z_dim=48,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=16,
        latents_mean=[0.0] * 48,
        latents_std=[1.0] * 48,
    ).save_pretrained(folder / "wan")
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(folder / "kl")
    make_t5(folder / "t5", 0, ("corgi", "cat"), d_model=2048, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    return folder


def convert(parts: Path, name: str, options: dict[str, Any], *further: str, pth: bool = True) -> Path:
    """Random weights under published names become a model, by yaml and command."""
    path = arguments(parts / f"{name}.yaml", options)
    torch.manual_seed(1)
    flow = Flow(published_config(path).flow)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    state = {key: tensor.contiguous() for key, tensor in published_state(flow).items()}
    weights = parts / f"{name}.{'pth' if pth else 'published.safetensors'}"
    torch.save(state, weights) if pth else save_file(state, weights)
    codec = parts / ("wan" if "vid_size" in options else "kl")
    out = parts / f"{name}.safetensors"
    command = ["convert", str(path), str(weights), str(out), "--codec", str(codec), "--text", str(parts / "t5")]
    assert main([*command, *further]) == 0
    return out


def options_of_yaml(text: str, **changes: Any) -> dict[str, Any]:
    return {**yaml.safe_load("{" + text.strip().replace("\n", " ") + "}"), **SMALL, **changes}


@pytest.fixture(scope="module")
def video(parts: Path) -> Path:
    changes = {"vid_size": "9:16:24", "last_frame_cond": 1, "data": str(parts / "clips")}
    return convert(parts, "video", options_of_yaml(VIDEO, **changes))


@pytest.fixture(scope="module")
def pipeline(video: Path) -> Pipeline:
    return Pipeline.load(video)


@pytest.fixture
def picture(tmp_path: Path) -> str:
    Image.linear_gradient("L").convert("RGB").resize((80, 48)).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


@pytest.fixture
def clip(tmp_path: Path) -> str:
    frames = torch.arange(9 * 48 * 80 * 3).remainder(251).view(9, 48, 80, 3).to(torch.uint8)
    write_video(tmp_path / "a.mp4", frames, 16)
    return str(tmp_path / "a.mp4")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_image_model_converts_in_each_dtype_and_samples(parts: Path, dtype: str) -> None:
    # Rows: weights (from safetensors here, from .pth below), yaml, autoencoders, denoising (by the score: no denoiser).
    model = convert(parts, f"image-{dtype}", options_of_yaml(IMAGE), "--dtype", dtype, pth=False)
    config = read_header(model).config
    assert (config.flow.in_channels, config.flow.txt_dim, config.codec["kind"]) == (4, 2048, "autoencoder_kl")
    pipeline = Pipeline.load(model)
    made = pipeline.sample("a corgi", seed=0, solver="chunks:16:0.001")
    assert made.pixels.shape == (1, 1, 3, 64, 64)
    assert made.pixels.isfinite().all()


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ("solver of the released models", {"solver": "chunks:32:0.001"}),
        ("guided blocks", {"guide_top": True}),
        ("attention temperature", {"attn_temp": 0.9, "solver": "sequential", "frames": 5}),
        ("long clips", {"frames": 17, "window_frames": 3, "context_frames": 2, "solver": "chunks:16:0.001"}),
        ("another noise at sampling", {"target_noise_std": 0.2}),
        ("shapes", {"aspect_ratio": "1:1"}),
        ("shapes", {"aspect_ratio": "random", "frames": 5}),
        ("denoising", {"denoise": "learned"}),
        ("denoising", {"denoise": "published"}),
        ("denoising", {"denoise": "score"}),
    ],
)
def test_options_of_the_video_model(pipeline: Pipeline, row: str, options: dict[str, Any]) -> None:
    assert row in ROWS
    usual = {"seed": 3, "solver": "window:16:0.01", "denoise": "none"}
    made = pipeline.sample("a corgi", **{**usual, **options})
    frames = options.get("frames", 9)
    assert made.pixels.shape[:3] == (1, frames, 3)
    if "aspect_ratio" not in options:
        assert made.pixels.shape[3:] == (48, 80)  # 16:9 of about 64 x 64
    assert made.pixels.isfinite().all()


def test_given_frames_stay_as_they_are(pipeline: Pipeline, picture: str, clip: str) -> None:
    usual = {"seed": 3, "solver": "chunks:32:0.001", "denoise": "learned"}
    for given in (
        {"image": picture},
        {"last_image": picture},
        {"video": clip, "given": 5, "frames": 13},
    ):
        made = pipeline.sample("a corgi", **usual, **given)
        assert made.pixels.isfinite().all(), given
    # Of one released recipe a yaml has either the last frame or a source.
    told = replace(pipeline.config, train=replace(pipeline.config.train, source_prob=0.5))
    made = Pipeline(pipeline.flow, told, pipeline.codec, pipeline.text).sample("a corgi", **usual, source=clip)
    assert made.pixels.shape == (1, 9, 3, 48, 80)
    pixels = torch.rand(3, 48, 80) * 2 - 1
    made = pipeline.sample("a corgi", **usual, image=pixels)
    assert torch.equal(made.pixels[0, 0], pixels)


def test_captions_and_the_step_of_the_denoiser(pipeline: Pipeline) -> None:
    # "An aspect ratio, a rate and a noise level", in every window as in training.
    caption = "Noise Level 500:\nA video with 16 fps:\na corgi\n\n in a 16:9 aspect ratio.\n"
    assert pipeline.caption("a corgi") == caption
    assert "Noise Level 570:" in pipeline.caption("a corgi", noise_std=0.57)
    assert "A video with 24 fps:" in pipeline.caption("a corgi", fps=24)
    session = pipeline.session("a corgi", solver="window:16:0.01", denoise="published")
    assert (session.denoising.step, session.denoising.sigma) == (pytest.approx(0.3), 0.5)


def test_prompts_of_a_file(video: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a corgi\n\na cat\n")
    command = ["sample", str(video), "--prompts", str(tmp_path / "prompts.txt"), "--frames", "5", "--size", "32x32"]
    options = ["--solver", "window:16:0.01", "--denoise", "none", "--out", str(tmp_path / "out")]
    assert main([*command, *options]) == 0
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 2


def test_a_decoder_that_was_tuned(parts: Path, tmp_path: Path) -> None:
    tuned = load_file(parts / "wan" / "diffusion_pytorch_model.safetensors")
    tuned = {key: tensor * 1.01 for key, tensor in tuned.items() if key.startswith(("decoder.", "post_quant"))}
    save_file(tuned, tmp_path / "decoder.safetensors")
    options = options_of_yaml(VIDEO, vid_size="9:16")
    model = convert(parts, "tuned", options, "--codec-weights", str(tmp_path / "decoder.safetensors"))
    assert read_header(model).config.sample.denoise == "none"
    made = Pipeline.load(model).sample("a corgi", seed=0, frames=5, solver="window:16:0.01")
    assert made.pixels.isfinite().all()


def test_fine_tuning_goes_on_from_the_model(video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("source", "target"):
        (tmp_path / "clips" / name).mkdir(parents=True)
        frames = torch.arange(14 * 48 * 80 * 3).remainder(253).view(14, 48, 80, 3).to(torch.uint8)
        write_video(tmp_path / "clips" / name / "a.mp4", frames, 24)
    command = ["train", "--init", str(video), "--data", str(tmp_path / "clips"), "--steps", "1", "--quiet"]
    changes = ["train.warmup_steps=1", "train.batch_size=1", "train.precision=float32", "train.image_prob=0"]
    settings = [part for change in changes for part in ("--set", change)]
    assert main([*command, *settings, "--out", str(tmp_path / "run")]) == 0
    assert re.search(r"trained for 1 step", capsys.readouterr().out)
    assert read_header(tmp_path / "run").config.data.mix_fps == (16.0, 24.0)
