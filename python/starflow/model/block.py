"""FlowBlock: token order, conditioner and scope."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from starflow.config import FlowConfig
from starflow.model.affine import Affine
from starflow.model.conditioner import Conditioner, Layout, make_layout
from starflow.model.tokens import Order, to_grid, to_sequence, token_order


class FlowBlock(nn.Module):
    """One block of the flow: visits the tokens of its scope in its order and standardises each by what came before.

    Args:
        config: of the flow.
        index: of the block; the last is the deep one.
    """

    def __init__(self, config: FlowConfig, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        self.top = config.is_top(index)
        self.frame_local = config.shallow_block_local and not self.top
        flipped = (index % 2 == 0) == (config.seq_order == "L2R")
        self.order: Order = "raster"
        chosen = config.top_order if self.top else config.shallow_order
        if chosen != "raster":
            self.order = chosen
        elif flipped:
            self.order = "reverse_in_frame" if config.temporal_causal > 0 else "reverse"
        # Whether the block goes from the last frame to the first.
        self.backwards = self.order == "reverse" and not self.frame_local
        identity = config.layers_per_block[index] == 0 and not self.top
        self.conditioner = None if identity else Conditioner(config, index)
        # Running mean of the network output over training data. The solver takes it as the output at the tokens of the
        # first frame, for a first guess of them before any evaluation; zeros guess x = z.
        self.register_buffer("guess", torch.zeros(0 if self.conditioner is None else self.raw_channels))
        self.guess: Tensor

    @property
    def raw_channels(self) -> int:
        """Channels of the network output for a token."""
        assert self.conditioner is not None
        return self.conditioner.proj_out.out_features

    def fold(self, grid: Tensor) -> Tensor:
        """The grid as this block sees it: frames become samples where it is frame-local."""
        return grid.flatten(0, 1).unsqueeze(1) if self.frame_local else grid

    def fold_labels(self, context: Tensor | None, frames: int) -> Tensor | None:
        """The condition of each row of `fold`: class labels, which a frame-local block repeats for each frame."""
        return context if context is None or not self.frame_local else context.repeat_interleave(frames, 0)

    def layout(self, frames: int, height: int, width: int, context: Tensor | None, *, image: bool) -> Layout:
        """Layout of a (folded) grid."""
        assert self.conditioner is not None
        text = self.conditioner.text_tokens(context)
        return make_layout(self.config, self.order, frames, height, width, text, still=image or self.frame_local)

    def encode(
        self, grid: Tensor, context: Tensor | None, *, image: bool, frame_conditions: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Affine | None, Tensor | None]:
        """Data to noise for a grid.

        Args:
            grid: (batch, frames, height, width, channels).
            context: text or labels, (batch, ...); None for a block that reads none.
            image: whether the grid is an image (no time).
            frame_conditions: vectors of the frames (batch, frames, frame_dim), or None; the deep block reads them.

        Returns:
            The grid of noise; log |dz/dx| of each token in the block's own order, (batch, frames, frame tokens); the
            affine maps (rows: samples, or frames where frame-local); the text stream. The last two None for an
            identity block.
        """
        batch, frames, height, width, _ = grid.shape
        if self.conditioner is None:
            return grid, grid.new_zeros(batch, frames, height * width), None, None
        folded = self.fold(grid)
        layout = self.layout(folded.shape[1], height, width, context, image=image)
        x = to_sequence(folded, layout.order)
        told = frame_conditions if self.top else None
        affine, text = self.conditioner(x, self.fold_labels(context, frames), layout, told)
        z, log_det = affine.encode(x)
        out = to_grid(z, layout.order, folded.shape[1], height, width).reshape(grid.shape)
        return out, log_det.reshape(batch, frames, height * width), affine, text

    def on_grid(self, values: Tensor, height: int, width: int) -> Tensor:
        """Puts a value per token, (batch, frames, frame tokens) in the block's order, at the token's place in its
        frame.

        Returns:
            (batch, frames, height, width).
        """
        batch, frames, _ = values.shape
        seen = 1 if self.frame_local else frames
        order = token_order(self.order, seen, height, width)
        return to_grid(values.reshape(-1, len(order), 1), order, seen, height, width).view(batch, frames, height, width)


@dataclass(frozen=True)
class Encoded:
    """What `Flow.encode` returns.

    Args:
        z: noise, shape of the data.
        log_det: log |dz/dx| of each token by block, each (batch, frames, frame tokens) in the block's own order.
        latents: grids (batch, frames, height, width, channels): the data as the first block reads them, then the output
            of each block.
        affines: affine maps of each block; None for an identity block.
        text: text stream after the deep block, or None.
    """

    z: Tensor
    log_det: tuple[Tensor, ...]
    latents: tuple[Tensor, ...]
    affines: tuple[Affine | None, ...]
    text: Tensor | None
