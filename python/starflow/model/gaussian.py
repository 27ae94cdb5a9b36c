"""Gaussian: the score of data that are normal at each place of a frame, from which a denoiser begins."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from starflow.config import FlowConfig


class Gaussian(nn.Module):
    """What a denoiser would predict if the tokens of each place were normal, with few directions of variance.

    With data of mean m and covariance C, noise of deviation s makes them N(m, C + s^2), whose mean given a noisy y is
    Wiener's, m + C (C + s^2)^-1 (y - m). C is kept by its first principal components; what is left of its trace counts
    as equally much in all other directions. It is measured once, before training, and never learned: a network that
    begins from it has to learn only what no Gaussian tells. Noisy clips of Pong are cleaned to 35 dB by it, and to 30.5
    by the own score of a flow after 190 steps (docs/evidence.md).

    Args:
        config: of the flow. A covariance is that of the tokens of one place in frames of the nominal size; frames of
            another size take the one of all places.

    Reference: Wiener, Extrapolation, Interpolation, and Smoothing of Stationary Time Series (1949); Tipping and Bishop,
    Probabilistic Principal Component Analysis (1999).
    """

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        side = config.frame_side
        # Places in raster order, and behind them that of all places.
        rows, channels = side * side + 1, config.token_channels
        self.register_buffer("components", torch.zeros(rows, channels, config.denoiser_components))
        self.register_buffer("gains", torch.zeros(rows, config.denoiser_components))
        self.register_buffer("rest", torch.zeros(rows))
        self.components: Tensor
        self.gains: Tensor
        self.rest: Tensor
        self._sides = (side, side)

    @torch.no_grad()
    def fit(self, covariances: Tensor, sigma: float, step: float) -> None:
        """Takes the covariances of the data.

        Args:
            covariances: of the tokens of each place in raster order (places, channels, channels), or (1, channels,
                channels) of all places together, float64.
            sigma: standard deviation of the noise, above 0.
            step: of `Denoiser.denoise`, which multiplies a prediction.
        """
        every = torch.cat([covariances.expand(len(self.rest) - 1, -1, -1), covariances.mean(0, keepdim=True)])
        values, vectors = torch.linalg.eigh(every)
        values = values.clamp_min(0.0)
        count, channels = self.components.shape[2], values.shape[1]
        left = values[:, : channels - count].sum(1) / max(channels - count, 1)
        noise = sigma**2 / step
        rest = noise / (left + sigma**2)
        self.components.copy_(vectors[:, :, channels - count :])
        self.gains.copy_(noise / (values[:, channels - count :] + sigma**2) - rest[:, None])
        self.rest.copy_(rest)

    def forward(self, grid: Tensor) -> Tensor:
        """The prediction for a grid of centred tokens (batch, frames, height, width, channels); like the grid."""
        nominal = grid.shape[2:4] == self._sides
        components, gains, rest = (
            each[:-1].unflatten(0, self._sides) if nominal else each[-1]
            for each in (self.components.to(grid), self.gains.to(grid), self.rest.to(grid))
        )
        at = "hwck" if nominal else "ck"
        along = torch.einsum(f"bfhwc,{at}->bfhwk", grid, components)
        return rest.unsqueeze(-1) * grid + torch.einsum(f"bfhwk,{at}->bfhwc", gains * along, components)
