"""What a flow holds of its data before the first step: their mean, and the covariances from which a denoiser begins."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from starflow.codecs import Codec
from starflow.config import TrainConfig
from starflow.data import ClipDataset
from starflow.distributed import World
from starflow.model import Flow, tweedie_step
from starflow.training.batches import item_of
from starflow.training.errors import not_finite

__all__ = ["begin_from_data", "moments"]

# Clips that the mean and the covariance of the data are measured on, spread over the set.
CLIPS_MEASURED = 64


def begin_from_data(
    flow: Flow, dataset: ClipDataset, codec: Codec, train: TrainConfig, world: World, *, new: bool
) -> None:
    """Measures the mean of the data and the Gaussian of the denoiser, where a flow has them and they are not known.

    The first process does it, in one pass over the clips; all of them then hold the same bits.

    Args:
        flow: before the first step, on the CPU.
        dataset: that it is trained on. codec: of the run.
        train: the recipe.
        world: the processes that call this together.
        new: whether the weights are random ones. The mean of a model that a run goes on from is kept, and so is its
            Gaussian, unless the denoiser is new.

    Raises:
        TrainingError: a clip that is not finite.
        ConfigError: an item of the data set that is no clip.
    """
    gaussian = None if flow.denoiser is None else flow.denoiser.gaussian
    # Without noise a Gaussian predicts 0.
    fits = gaussian is not None and train.noise_std > 0.0 and not gaussian.rest.any()
    centres = new and flow.config.centred
    if not fits and not centres:
        return

    def measure() -> list[Tensor]:
        mean, covariances = moments(flow, dataset, codec, world.device, second=fits)
        if centres:
            grid = mean.unflatten(0, flow.nominal_sides if len(mean) > 1 else (1, 1))
            flow.centre_on(flow.from_grid(grid[None, None].float())[0, 0])
        elif covariances is not None:
            # Around the mean that the model has.
            covariances = covariances + torch.einsum("pc,pd->pcd", mean, mean)
        if gaussian is not None and covariances is not None:
            step = tweedie_step(train.noise_std, weighted=train.cond_noise_level)
            gaussian.fit(covariances, train.noise_std, step)
        return flow.measured()

    for buffer, value in zip(flow.measured(), world.share(measure), strict=True):
        buffer.copy_(value)


@torch.no_grad()
def moments(
    flow: Flow, dataset: ClipDataset, codec: Codec, device: torch.device, *, second: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Mean and covariance of the tokens that the first block reads, at each place of a frame, in one pass.

    Every clip counts alike. Sums are of what lies beyond the mean of the first clip, so that nothing cancels.

    Args:
        flow: cuts latents into tokens and takes its own mean off, which is 0 in a new flow.
        dataset, codec: of the clips. device: where the codec computes.
        second: whether the covariances are wanted.

    Returns:
        The mean (places, channels), places in raster order, and the covariances around it, (places, channels,
        channels), or None; float64. Of clips that are not of the nominal size, or of several sizes, those of all
        places together: one place.

    Raises:
        TrainingError: a clip that is not finite.
        ConfigError: an item of the data set that is no clip.
    """
    shift: Tensor | None = None
    # Sums of clips of the nominal size, place by place, and of all others.
    sums: dict[bool, tuple[Tensor, Tensor | None]] = {}
    count = min(CLIPS_MEASURED, len(dataset))
    for latents in _measured(dataset, codec, device, count):
        grid = flow.to_grid(latents[None].cpu())[0]
        nominal = tuple(grid.shape[1:3]) == flow.nominal_sides
        tokens = grid.flatten(1, 2) if nominal else grid.flatten(0, 2)[:, None]
        if shift is None:
            shift = tokens.mean((0, 1))
        beyond = tokens - shift
        squares = torch.einsum("fpc,fpd->pcd", beyond, beyond) / len(beyond) if second else None
        mean, square = beyond.mean(0), squares
        if nominal in sums:
            before, squares_before = sums[nominal]
            mean = mean + before
            square = None if squares is None or squares_before is None else squares + squares_before
        sums[nominal] = mean, square
    assert shift is not None
    parts = list(sums.values())
    if len(parts) > 1:
        parts = [(m.mean(0, keepdim=True), None if s is None else s.mean(0, keepdim=True)) for m, s in parts]
    mean = torch.stack([m for m, _ in parts]).sum(0) / count
    covariances = None
    if second:
        squares = torch.stack([s for _, s in parts if s is not None]).sum(0) / count
        covariances = squares - torch.einsum("pc,pd->pcd", mean, mean)
    return mean + shift, covariances


def _measured(dataset: ClipDataset, codec: Codec, device: torch.device, count: int) -> Iterator[Tensor]:
    """Latents (frames, channels, height, width) of so many clips that are spread over a set, float64."""
    for number in range(count):
        index = number * len(dataset) // count
        clip = item_of(dataset, index)
        latents = codec.encode(clip.pixels[None].to(device))[0].double()
        if not latents.isfinite().all():
            raise not_finite(clip.name)
        yield latents
