"""The paper's ablation of the denoiser, on the flows of the study: what cleans noisy clips best?

Held-out clips get the noise of training and are cleaned in one step, as in the published table: by the denoiser that
learned the flow's score beside it, by a step along that score itself, by a denoiser of the same shape that learned the
noise itself from the same clips in as many steps (the squared error to clean frames, so a regression), and not at all.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fit import new_optimizer
from measures import features
from study import Row
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from starflow.codecs import Codec
from starflow.config import RunConfig
from starflow.evaluate import fidelity
from starflow.model import Denoiser, Flow
from starflow.noise import draw
from starflow.sampling.cleaning import score_denoise
from starflow.storage import saving
from starflow.training.batches import Batches, make_dataset, make_parts

CLIPS = 128


def fit_regression(row: Row, config: RunConfig, own: Denoiser, path: Path) -> Denoiser:
    """A denoiser that learned the noise itself, with the steps, the rate and the batches of the flow's `own`."""
    torch.manual_seed(row.seed)
    denoiser = Denoiser(config.flow)
    if denoiser.centre is not None and own.centre is not None:
        denoiser.centre.load_state_dict(own.centre.state_dict())
    if path.exists():
        denoiser.load_state_dict(torch.load(path, weights_only=True))
        return denoiser.eval()
    recipe = config.train
    optimizer = new_optimizer(denoiser, recipe, recipe.denoiser_lr, (0.9, 0.999))
    codec, _ = make_parts(config)
    batches = Batches(config, make_dataset(config), codec)
    for step in range(0, recipe.steps, recipe.denoiser_every):
        batch = batches.make(step)
        noisy = codec.encode(batch.pixels) + recipe.noise_std * batch.noise
        F.mse_loss(denoiser(noisy), batch.noise).backward()
        optimizer.clip()
        optimizer.step(step)
        optimizer.zero_grad()
    with saving(path, "denoiser") as temporary:
        torch.save(denoiser.state_dict(), temporary)
    return denoiser.eval()


def compare(row: Row, flow: Flow, config: RunConfig, folder: Path) -> list[dict[str, Any]]:
    """Peak signal to noise, structural similarity and Fréchet distance of each way, one line for each.

    Args:
        row: of a flow without text (its denoiser reads none either).
        flow: trained, with a denoiser.
        config: of the row.
        folder: of the study's weights.
    """
    sigma = config.train.noise_std
    codec, data = make_parts(config)[0], make_dataset(config, "test")
    clips = [data.item(index) for index in range(CLIPS)]
    pixels = torch.stack([clip.pixels for clip in clips])
    told = [clip.frame_conditions for clip in clips if clip.frame_conditions is not None]
    vectors = torch.stack(told) if told else None
    latents = codec.encode(pixels)
    noisy = latents + sigma * draw(range(CLIPS), *latents.shape[1:], purpose="train")
    own = flow.denoiser
    assert own is not None
    regression = fit_regression(row, config, own, folder / str(row) / "regression-denoiser.pt")
    ways: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
        "flow-score matching": lambda x, _: own.denoise(x, step=sigma),
        "score step": lambda x, told: score_denoise(flow, x, None, sigma, told),
        "regression to clean frames": lambda x, _: regression.denoise(x, step=sigma),
        "none": lambda x, _: x,
    }
    lines = []
    for way, clean in ways.items():
        parts = zip(noisy.split(16), [None] * CLIPS if vectors is None else vectors.split(16), strict=False)
        with torch.no_grad():
            made = _shown(codec, torch.cat([clean(x, told) for x, told in parts]))
        measured = fidelity(made, pixels, *features(row.kind, folder)[:2])
        flat, real = made.flatten(0, 1), pixels.flatten(0, 1)
        ratio = peak_signal_noise_ratio(flat, real, data_range=2.0, reduction="none", dim=(1, 2, 3))
        alike = structural_similarity_index_measure(flat, real, data_range=2.0, reduction="none")
        lines.append(
            {
                "denoiser": way,
                "row": str(row),
                "psnr": float(ratio.mean()),
                "ssim": statistics.fmean(torch.as_tensor(alike).flatten().tolist()),
                "frechet": measured.frechet,
            }
        )
    return lines


def _shown(codec: Codec, latents: Tensor) -> Tensor:
    return codec.decode(latents).clamp(-1.0, 1.0)
