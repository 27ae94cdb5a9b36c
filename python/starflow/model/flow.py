"""Flow: the chain of blocks, with its two directions and the likelihood between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from starflow.arguments import check_config, check_tensor
from starflow.config import FlowConfig
from starflow.mapped import require_unchanged
from starflow.model.block import Encoded, FlowBlock
from starflow.model.centre import Centre
from starflow.model.denoiser import Denoiser
from starflow.model.gaussian import Gaussian
from starflow.model.tokens import patchify, unpatchify

# What class labels may be.
_LABELS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Flow(nn.Module):
    """A normalizing flow over videos (batch, frames, channels, height, width) or images (without frames).

    Data is mapped to noise by the shallow blocks and then the deep one; sampling inverts them in reverse.

    Args:
        config: architecture.

    Reference: Gu et al., STARFlow-V (2025); Gu et al., STARFlow (2025); Zhai et al., TarFlow (2024).
    """

    def __init__(self, config: FlowConfig) -> None:
        check_config("Flow", config, FlowConfig)
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(FlowBlock(config, index) for index in range(config.num_blocks))
        self.denoiser = Denoiser(config) if config.learnable_self_denoiser else None
        self.centre = Centre(config) if config.centred else None
        # Variance of the prior by nominal position and channel: ones, but for volume-preserving TarFlow models, where
        # it is a running mean.
        self.register_buffer("prior_variance", torch.ones(config.frame_side**2, config.token_channels))
        self.prior_variance: Tensor

    # -- data to noise ------------------------------------------------------------------------------------------------

    def encode(self, x: Tensor, y: Tensor | None = None, frame_conditions: Tensor | None = None) -> Encoded:
        """Maps data to noise.

        Args:
            x: (batch, frames, channels, height, width), or (batch, channels, height, width) for images.
            y: text (batch, text tokens, txt_dim), class labels (batch,) int64, negative for none, or None.
            frame_conditions: a vector for each frame, (batch, frames, frame_dim), such as the action that led to it;
                NaN for a frame that has none, None where no frame has one.

        Returns:
            Noise, log-determinants and what lies between (see `Encoded`).

        Raises:
            ValueError: a shape that does not fit the config.
        """
        y = self.check(x, y)
        image = x.dim() == 4
        told = self.check_frame_conditions(x, frame_conditions)
        grid = self.to_grid(x)
        latents, log_dets, affines = [grid], [], []
        text: Tensor | None = None
        for block in self._blocks():
            context = self._context(block, y)
            grid, log_det, affine, text = block.encode(grid, context, image=image, frame_conditions=told)
            latents.append(grid)
            log_dets.append(log_det)
            affines.append(affine)
        return Encoded(self._join(grid, image), tuple(log_dets), tuple(latents), tuple(affines), text)

    def encode_shallow(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The part of `encode` before the deep block.

        Args:
            x, y: as for `encode`.

        Returns:
            The grid that enters the deep block, (batch, frames, height, width, channels), and the sum of the other
            blocks' log-determinants at each of its places, (batch, frames, height, width).
        """
        y = self.check(x, y)
        image = x.dim() == 4
        grid = self.to_grid(x)
        total = grid.new_zeros(grid.shape[:-1])
        for block in self._blocks()[:-1]:
            grid, log_det, _, _ = block.encode(grid, self._context(block, y), image=image)
            total = total + block.on_grid(log_det, *grid.shape[2:4])
        return grid, total

    def log_prob(
        self,
        x: Tensor,
        y: Tensor | None = None,
        frame_conditions: Tensor | None = None,
        *,
        by: Literal["clip", "frame", "token"] = "clip",
    ) -> Tensor:
        """Log p(x) in nats.

        Args:
            x, y, frame_conditions: as for `encode`.
            by: whether a number is of a clip, a frame or a token (see `log_likelihood` and `token_log_likelihood`).

        Returns:
            (batch,) of clips, (batch, frames), or (batch, frames, height, width) of tokens, which add up to the others.

        Raises:
            ValueError: a shape that does not fit the config, or `by` is something else.
        """
        if by not in ("clip", "frame", "token"):
            raise ValueError(f"flow: by is {by!r}, expected 'clip', 'frame' or 'token'")
        tokens = self.token_log_likelihood(self.encode(x, y, frame_conditions))
        return tokens if by == "token" else tokens.flatten(2 if by == "frame" else 1).sum(-1)

    def log_likelihood(self, encoded: Encoded) -> Tensor:
        """Log p of each frame in nats, (batch, frames); an image has one frame.

        In a model whose blocks all go forward in time it is that of the frame given those before it: the sum up to
        frame t is the log-likelihood of the first t + 1 frames.
        """
        return self.token_log_likelihood(encoded).flatten(2).sum(-1)

    def token_log_likelihood(self, encoded: Encoded) -> Tensor:
        """The term of log p at each place of the token grid, in nats, (batch, frames, height, width).

        A term is the log-density of the noise at a place and the log-determinants of the token there in all blocks. In
        a flow of one block that is log p of the token given those before it in the block's order. With more blocks what
        is exact is the sum over what no block mixes with the rest: over a frame where shallow blocks are frame-local.
        """
        grid = encoded.latents[-1]
        variance = self._prior_variance(grid)
        total: Tensor = (-0.5 * (grid.square() / variance + math.log(2 * math.pi) + variance.log())).sum(-1)
        for block, log_det in zip(self._blocks(), encoded.log_det, strict=True):
            total = total + block.on_grid(log_det, *grid.shape[2:4])
        return total

    def nll(self, x: Tensor, y: Tensor | None = None, frame_conditions: Tensor | None = None) -> Tensor:
        """Training objective of each sample, (batch,): mean over dimensions of z^2 / 2 minus the log-determinants.

        The negative log-likelihood in nats per dimension without the constant log(2 pi) / 2.
        """
        return nll_of(self.encode(x, y, frame_conditions))

    def track(self, encoded: Encoded, rate: float) -> None:
        """Updates what is tracked rather than learned: the solver's first guess of each block, and the prior's variance
        of a volume-preserving flow.

        Args:
            encoded: of a training batch.
            rate: weight of this batch in the running mean.
        """
        for block, affine in zip(self._blocks(), encoded.affines, strict=True):
            if affine is not None:
                mean = affine.raw.detach().float().mean((0, 1))
                block.guess.lerp_(mean.to(block.guess.dtype), rate)
        if not self.config.nvp:
            z = encoded.latents[-1].detach()
            if z.shape[1] == 1 and z[0, ..., 0].numel() == self.prior_variance.shape[0]:
                self.prior_variance.lerp_(z.square().mean(0).flatten(0, -2).to(self.prior_variance.dtype), rate)

    def tracked(self) -> list[Tensor]:
        """The buffers that `track` updates."""
        guesses = [block.guess for block in self._blocks() if block.guess.numel()]
        return guesses if self.config.nvp else [*guesses, self.prior_variance]

    def measured(self) -> list[Tensor]:
        """The buffers that hold what was measured of the data before training (`Centre`, `Gaussian`)."""
        return [buffer for part in self.modules() if isinstance(part, Centre | Gaussian) for buffer in part.buffers()]

    @property
    def nominal_sides(self) -> tuple[int, int]:
        """Height and width of the token grid of frames of the nominal size."""
        return self.config.frame_side, self.config.frame_side

    # -- noise to data ------------------------------------------------------------------------------------------------

    def known(
        self, prefix: Tensor, y: Tensor | None, frame: Sequence[int], frame_conditions: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Encodes given frames: the grids that enter each block, and last the output of the deep block.

        Args:
            prefix: (batch, frames, channels, height, width).
            y: text or labels.
            frame: channels, height and width of the frames that come after them.
            frame_conditions: of the given frames, as for `encode`.

        Raises:
            ValueError: frames of another size, or a flow that cannot go on from frames.
        """
        if any(block.backwards for block in self._blocks()):
            raise ValueError("flow: prefix is given, expected temporal_causal > 0: a block runs backwards in time")
        if list(prefix.shape[2:]) != list(frame):
            raise ValueError(
                f"flow: prefix has frames of {list(prefix.shape[2:])}, expected {list(frame)} like the noise"
            )
        return self.encode(prefix, y, frame_conditions).latents

    def noise_grid(self, z: Tensor) -> Tensor:
        """Standard normal noise (batch, frames, channels, height, width) as the grid that the deep block inverts."""
        grid = self._cut(z)
        return grid * self._prior_variance(grid).sqrt()

    def to_grid(self, x: Tensor) -> Tensor:
        """Data (batch, frames, channels, height, width), or images, as the grid that the first block reads.

        It is without the mean of the data where the flow is centred; its dtype is that of the residual stream.
        """
        grid = self._cut(x)
        return grid if self.centre is None else grid - self.centre(grid)

    def from_grid(self, grid: Tensor, image: bool = False) -> Tensor:
        """What the first block reads as data (batch, frames, channels, height, width), without frames for an image."""
        return self._join(grid if self.centre is None else grid + self.centre(grid), image)

    @torch.no_grad()
    def centre_on(self, mean: Tensor) -> None:
        """Sets the mean of the data, of the flow and of its denoiser; without effect on a flow that is not centred.

        Args:
            mean: of a frame of latents, (channels, height, width). One that is not of the nominal size counts by its
                channels alone.
        """
        grid = self._cut(mean[None])[0, 0]
        for centre in self.modules():
            if isinstance(centre, Centre):
                nominal = grid.shape == centre.mean.shape
                centre.mean.copy_(grid if nominal else grid.mean((0, 1)))

    def _cut(self, x: Tensor) -> Tensor:
        """Frames or images as a grid of tokens."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return patchify(x, self.config.patch_size, channel_first=self.config.channel_first_patches)

    def _join(self, grid: Tensor, image: bool) -> Tensor:
        """The inverse of `_cut`."""
        return unpatchify(grid, self.config.patch_size, channel_first=self.config.channel_first_patches, image=image)

    def solving_order(self) -> list[FlowBlock]:
        """The blocks in the order in which noise is decoded, the deep one first."""
        return self._blocks()[::-1]

    # -- checks and helpers -------------------------------------------------------------------------------------------

    def _blocks(self) -> list[FlowBlock]:
        return [block for block in self.blocks if isinstance(block, FlowBlock)]

    def _context(self, block: FlowBlock, y: Tensor | None) -> Tensor | None:
        if y is None or self.config.num_classes:
            return y
        return y if self.config.text_width(block.index) else None

    def _prior_variance(self, grid: Tensor) -> Tensor:
        """(height, width, channels), or a scalar one where the grid is not the nominal one (the variance is ones)."""
        height, width = grid.shape[2:4]
        if self.config.nvp or height * width != self.prior_variance.shape[0]:
            return grid.new_ones(())
        return self.prior_variance.to(grid.dtype).view(height, width, -1)

    def check_frame_conditions(
        self,
        x: Tensor,
        frame_conditions: Tensor | None,
        *,
        name: str = "frame_conditions",
        device: torch.device | None = None,
    ) -> Tensor | None:
        """Checks that the vectors of frames fit the flow and `x`; returns them in the dtype of the residual stream.

        Args:
            x: data or noise, (batch, frames, channels, height, width), or without frames for images (one frame).
            frame_conditions: (batch, frames, frame_dim), a frame all NaN or all finite; None for none.
            name: what the caller calls them.
            device: where they are wanted; None for that of `x`.

        Raises:
            ValueError: a flow without such vectors, another shape or dtype, or infinite values.
        """
        told, config = frame_conditions, self.config
        if told is None:
            return None
        check_tensor("flow", name, told)
        if not config.frame_dim:
            raise ValueError(f"flow: {name} is given, expected None (the flow reads none: frame_dim is 0)")
        expected = [x.shape[0], x.shape[1] if x.dim() == 5 else 1, config.frame_dim]
        if list(told.shape) != expected:
            raise ValueError(
                f"flow: {name} has shape {list(told.shape)}, expected {expected} (batch, frames, frame_dim)"
            )
        if not told.is_floating_point():
            raise ValueError(f"flow: {name} has dtype {str(told.dtype).removeprefix('torch.')}, expected a float one")
        none = told.isnan()
        if not bool((none.all(-1) | told.isfinite().all(-1)).all()):
            raise ValueError(f"flow: {name} holds infinity or NaN, expected finite vectors, or NaN alone for none")
        return told.to(x.device if device is None else device, torch.promote_types(x.dtype, torch.float32))

    def check(self, x: Tensor, y: Tensor | None, *, name: str = "x", condition: str = "y") -> Tensor | None:
        """Checks that `x`, data or noise, and the condition `y` fit the flow; returns `y`.

        Args:
            x: data or noise, (batch, frames, channels, height, width), or without frames for images.
            y: text, class labels or None.
            name, condition: what the caller calls `x` and `y`.

        Raises:
            ValueError: a shape or dtype that does not fit the config; the message has these names.
            ChangedFileError: the file that the weights are mapped from was written to.
        """
        require_unchanged(self)
        config = self.config
        check_tensor("flow", name, x)
        if y is not None:
            check_tensor("flow", condition, y)
        if x.dim() not in (4, 5) or x.shape[-3] != config.in_channels:
            raise ValueError(
                f"flow: {name} has shape {list(x.shape)}, expected (batch, frames, {config.in_channels}, height, "
                f"width) or (batch, {config.in_channels}, height, width)"
            )
        if not x.numel():
            raise ValueError(f"flow: {name} has shape {list(x.shape)}, expected at least one of each")
        double = self._blocks()[-1].guess.dtype == torch.float64
        if not x.is_floating_point() or (x.dtype == torch.float64) != double:
            expected = "float64 like the weights" if double else "float32, bfloat16 or float16"
            raise ValueError(f"flow: {name} has dtype {str(x.dtype).removeprefix('torch.')}, expected {expected}")
        if config.txt_size > 0:
            if y is None:
                raise ValueError(f"flow: {condition} is None, expected text features (the flow reads text)")
            if y.dim() != 3 or y.shape[::2] != (x.shape[0], config.txt_dim) or y.shape[1] > config.txt_size:
                raise ValueError(
                    f"flow: {condition} has shape {list(y.shape)}, expected ({x.shape[0]}, at most {config.txt_size} "
                    f"text tokens, {config.txt_dim})"
                )
            if not y.is_floating_point():
                raise ValueError(
                    f"flow: {condition} has dtype {y.dtype}, expected text features, which are floating-point"
                )
        elif config.num_classes:
            if y is not None and (
                y.shape != x.shape[:1] or y.dtype not in _LABELS or int(y.max()) >= config.num_classes
            ):
                raise ValueError(
                    f"flow: {condition} has shape {list(y.shape)} and dtype {y.dtype}, expected {x.shape[0]} integer "
                    f"labels below {config.num_classes}, negative for none"
                )
            # torch takes indices of uint8 for a mask.
            y = None if y is None else y.long()
        elif y is not None:
            raise ValueError(f"flow: {condition} is given, expected None (the flow has neither text nor classes)")
        return y


def nll_of(encoded: Encoded) -> Tensor:
    """The training objective of each sample from an encoded batch, (batch,) (see `Flow.nll`)."""
    z = encoded.latents[-1].flatten(1)
    log_det = sum((d.flatten(1).sum(1) for d in encoded.log_det), start=z.new_zeros(z.shape[0]))
    return 0.5 * z.square().mean(1) - log_det / z.shape[1]
