"""Centre: the mean of the data, which is taken off before a network reads them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from starflow.config import FlowConfig


class Centre(nn.Module):
    """What lies between data and data without their mean.

    Where most of a latent is the same in every clip (a dark ground has a first coefficient of -13, of which a ball that
    passes changes one or two), a network that puts out clean data has to learn that number first, by updates of a
    learning rate each. The mean is measured once, before training, and never learned; it has no log-determinant.

    Args:
        config: of the flow. The mean is that of each token of a frame of the nominal size; frames of another size take
            the mean over its places.

    Reference: Kingma and Dhariwal, Glow (2018), actnorm, whose shift and scale begin with those of the first data.
    """

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        side = config.frame_side
        self.register_buffer("mean", torch.zeros(side, side, config.token_channels))
        self.mean: Tensor

    def forward(self, grid: Tensor) -> Tensor:
        """The mean of data like `grid`, a grid of tokens (batch, frames, height, width, channels).

        Returns:
            (height, width, channels), or (channels,) of frames that are not of the nominal size; in the grid's dtype.
        """
        nominal = grid.shape[2:4] == self.mean.shape[:2]
        return (self.mean if nominal else self.mean.mean((0, 1))).to(grid.dtype)
