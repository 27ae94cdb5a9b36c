"""Flow: the chain of blocks, with its two directions and the likelihood between them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from starflow.block import BlockDecoder, Encoded, FlowBlock
from starflow.config import FlowConfig
from starflow.denoiser import Denoiser
from starflow.guidance import Guidance
from starflow.network import Precision
from starflow.solver import Schedule, SolveReport, Window, solve
from starflow.tokens import patchify, to_grid, to_sequence, unpatchify


@dataclass(frozen=True)
class Decoded:
    """What `Flow.decode` returns.

    Args:
        x: data, shape of the noise.
        reports: of each block in the order of solving, the deep one first; None for an identity block.
        latents: grids after each solved block, the last being the data.
    """

    x: Tensor
    reports: tuple[SolveReport | None, ...]
    latents: tuple[Tensor, ...]

    @property
    def backward_error(self) -> float | None:
        """Largest backward error of the blocks, where they were certified."""
        errors = [r.backward_error for r in self.reports if r is not None and r.backward_error is not None]
        return max(errors) if errors else None


class Flow(nn.Module):
    """A normalizing flow over videos (batch, frames, channels, height, width) or images (without frames).

    Data is mapped to noise by the shallow blocks and then the deep one; sampling inverts them in reverse.

    Args:
        config: architecture.

    Reference: Gu et al., STARFlow-V (2025); Gu et al., STARFlow (2025); Zhai et al., TarFlow (2024).
    """

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(FlowBlock(config, index) for index in range(config.num_blocks))
        self.denoiser = Denoiser(config) if config.learnable_self_denoiser else None
        # Standard deviation squared of the prior by nominal position and channel; ones, except in volume-preserving
        # TarFlow models, which track it.
        side = config.img_size // config.patch_size
        self.register_buffer("prior_variance", torch.ones(side * side, config.token_channels))
        self.prior_variance: Tensor

    # -- data to noise ------------------------------------------------------------------------------------------------

    def encode(self, x: Tensor, y: Tensor | None = None) -> Encoded:
        """Maps data to noise.

        Args:
            x: (batch, frames, channels, height, width), or (batch, channels, height, width) for images.
            y: text (batch, text tokens, txt_dim), class labels (batch,) int64, negative for none, or None.

        Returns:
            Noise, log-determinants and what lies between (see `Encoded`).

        Raises:
            ValueError: a shape that does not fit the config.
        """
        image = x.dim() == 4
        y = self._check(x, y)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        grid = patchify(x, self.config.patch_size, channel_first=self.config.channel_first_patches)
        latents, log_dets, affines = [grid], [], []
        text: Tensor | None = None
        for block in self._blocks():
            grid, log_det, affine, text = block.encode(grid, self._context(block, y), image=image)
            latents.append(grid)
            log_dets.append(log_det)
            affines.append(affine)
        z = self._unpatchify(grid, image)
        return Encoded(z, tuple(log_dets), tuple(latents), tuple(affines), text)

    def log_prob(self, x: Tensor, y: Tensor | None = None, *, by: Literal["clip", "frame", "token"] = "clip") -> Tensor:
        """Log p(x) in nats.

        Args:
            x, y: as for `encode`.
            by: what a number is of (see `log_likelihood` and `token_log_likelihood`).

        Returns:
            (batch,) of clips, (batch, frames), or (batch, frames, height, width) of tokens, which add up to the others.

        Raises:
            ValueError: a shape that does not fit the config, or `by` is something else.
        """
        if by not in ("clip", "frame", "token"):
            raise ValueError(f"flow: by is {by!r}, expected 'clip', 'frame' or 'token'")
        tokens = self.token_log_likelihood(self.encode(x, y))
        return tokens if by == "token" else tokens.flatten(2 if by == "frame" else 1).sum(-1)

    def log_likelihood(self, encoded: Encoded) -> Tensor:
        """Log p of each frame in nats, (batch, frames); an image has one frame.

        In a model whose blocks all go forward in time it is that of the frame given those before it: the sum up to
        frame t is the log-likelihood of the first t + 1 frames.
        """
        return self.token_log_likelihood(encoded).flatten(2).sum(-1)

    def token_log_likelihood(self, encoded: Encoded) -> Tensor:
        """The terms of log p by the place of the token in its frame, in nats, (batch, frames, height, width).

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

    def nll(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Training objective of each sample, (batch,): mean over dimensions of z^2 / 2 minus the log-determinants.

        The negative log-likelihood in nats per dimension without the constant log(2 pi) / 2.
        """
        return nll_of(self.encode(x, y))

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
            if z[0, ..., 0].numel() == self.prior_variance.shape[0]:
                self.prior_variance.lerp_(z.square().mean(0).flatten(0, -2).to(self.prior_variance.dtype), rate)

    # -- noise to data ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def decode(
        self,
        z: Tensor,
        y: Tensor | None = None,
        *,
        null: Tensor | None = None,
        guidance: Guidance | float = 0.0,
        schedule: Schedule | None = None,
        prefix: Tensor | None = None,
        window_context: int | None = None,
        temperature: float = 1.0,
        precision: Precision = "float32",
    ) -> Decoded:
        """Maps noise to data.

        Args:
            z: noise, shape of the data.
            y: text or labels as for `encode`.
            null: text of the empty prompt like `y`, needed for guidance with text.
            guidance: a weight, or a `Guidance`.
            schedule: of the solver; the default is `Window()`.
            prefix: first frames that are given, noisy latents (batch, prefix frames, channels, height, width). The
                deep block keeps their tokens exactly; frames come back up to rounding.
            window_context: frames that a sampling window (`local_attn_window` frames of the deep block) takes over
                from the one before it; the default is three quarters of the window, at least one.
            temperature: divides the attention logits of every block.
            precision: of the native decoding on the CPU (see `starflow.network.Precision`); a certificate is taken in
                float32 whatever it is.

        Returns:
            Data, reports and latents (see `Decoded`).

        Raises:
            ValueError: shapes that do not fit, missing text for guidance, a context that leaves no new frame.
            NotFiniteError: the solver met NaN or infinity.
        """
        image = z.dim() == 4
        guide = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
        schedule = Window() if schedule is None else schedule
        if not 0.0 < temperature < float("inf"):
            raise ValueError(f"flow: temperature is {temperature}, expected a finite number > 0")
        y = self._check(z, y, name="z")
        null = self._check(z, null, name="z", condition="null") if null is not None else None
        if guide.active and self.config.txt_size > 0 and null is None:
            raise ValueError("flow: null is None, expected text features of the empty prompt (guidance is on)")
        if guide.active and guide.needs_condition and y is None:
            raise ValueError(f"flow: guidance is {guide.weight}, expected 0 without text or classes to guide by")
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        grid = patchify(z, self.config.patch_size, channel_first=self.config.channel_first_patches)
        grid = grid * self._prior_variance(grid).sqrt()
        known = self._known(prefix, y, grid)
        latents: list[Tensor] = []
        reports: list[SolveReport | None] = []
        for block in reversed(self._blocks()):
            # A frame-local block sees no frame but its own: it inverts what the deep block made, given frames included.
            given = known[block.index] if known is not None and not block.frame_local else None
            grid, report = self._solve(
                block, grid, y, null, guide, schedule, given, window_context, temperature, precision, image=image
            )
            latents.append(grid)
            reports.append(report)
        return Decoded(self._unpatchify(grid, image), tuple(reports), tuple(latents))

    def _solve(
        self,
        block: FlowBlock,
        grid: Tensor,
        y: Tensor | None,
        null: Tensor | None,
        guide: Guidance,
        schedule: Schedule,
        known: Tensor | None,
        window_context: int | None,
        temperature: float,
        precision: Precision = "float32",
        *,
        image: bool,
    ) -> tuple[Tensor, SolveReport | None]:
        """Inverts one block; the deep one window by window where the clip is longer than its window."""
        if block.conditioner is None:
            return grid, None
        guided = guide if block.top or (guide.all_blocks and not self.config.cond_top_only) else None
        context, free = (block.fold_labels(self._context(block, c), grid.shape[1]) for c in (y, null))
        folded = block.fold(grid)
        rows, frames, height, width, _ = folded.shape
        if block.frame_local and isinstance(schedule, Window) and schedule.size is not None:
            # All frames of a clip go through one call: they share its rows.
            schedule = replace(schedule, size=-(-schedule.size // grid.shape[1]))
        limit = self.config.local_attn_window if block.top else None
        window = frames if limit is None else min(limit, frames)

        def solve_frames(z: Tensor, given: Tensor | None) -> tuple[Tensor, SolveReport]:
            layout = block.layout(z.shape[1], height, width, context, image=image)

            def decoder(precision: Precision) -> BlockDecoder:
                return block.decoder(layout, rows, context, free, guided, temperature, precision)

            judge = None if precision == "float32" else partial(decoder, "float32")
            first = None if given is None else to_sequence(given, layout.order[: given[0, ..., 0].numel()])
            x, report = solve(decoder(precision), to_sequence(z, layout.order), schedule, first, judge)
            return to_grid(x, layout.order, z.shape[1], height, width), report

        if window == frames:
            x, report = solve_frames(folded, known)
            return x.reshape(grid.shape), report
        carried = max(1, window * 3 // 4) if window_context is None else window_context
        if not 1 <= carried < window:
            raise ValueError(
                f"flow: window_context is {carried}, expected 1 to {window - 1} (local_attn_window is {window})"
            )
        if known is not None and known.shape[1] > window:
            raise ValueError(f"flow: prefix has {known.shape[1]} frames, expected at most local_attn_window {window}")
        out, report = solve_frames(folded[:, :window], known)
        while out.shape[1] < frames:
            first = out.shape[1] - carried
            x, later = solve_frames(folded[:, first : first + window], out[:, first:])
            out = torch.cat([out, x[:, carried:]], 1)
            report = report.then(later)
        return out, report

    def _known(self, prefix: Tensor | None, y: Tensor | None, grid: Tensor) -> tuple[Tensor, ...] | None:
        """What enters each block at the given frames, or None without a prefix."""
        if prefix is None:
            return None
        if prefix.dim() != 5 or grid.shape[0] != prefix.shape[0] or prefix.shape[1] >= grid.shape[1]:
            raise ValueError(
                f"flow: prefix has shape {list(prefix.shape)}, expected (batch {grid.shape[0]}, fewer than "
                f"{grid.shape[1]} frames, channels, height, width)"
            )
        if any(block.backwards for block in self._blocks()):
            raise ValueError("flow: prefix is given, expected temporal_causal > 0: a block runs backwards in time")
        config = self.config
        size = [config.in_channels, *(side * config.patch_size for side in grid.shape[2:4])]
        if list(prefix.shape[2:]) != size:
            raise ValueError(f"flow: prefix has frames of {list(prefix.shape[2:])}, expected {size} like the noise")
        return self.encode(prefix, y).latents

    # -- checks and helpers -------------------------------------------------------------------------------------------

    def _blocks(self) -> list[FlowBlock]:
        return [block for block in self.blocks if isinstance(block, FlowBlock)]

    def _context(self, block: FlowBlock, y: Tensor | None) -> Tensor | None:
        if y is None or self.config.num_classes:
            return y
        return y if self.config.text_width(block.index) else None

    def _unpatchify(self, grid: Tensor, image: bool) -> Tensor:
        return unpatchify(grid, self.config.patch_size, channel_first=self.config.channel_first_patches, image=image)

    def _prior_variance(self, grid: Tensor) -> Tensor:
        """(height, width, channels), or a scalar one where the grid is not the nominal one (the variance is ones)."""
        height, width = grid.shape[2:4]
        if self.config.nvp or height * width != self.prior_variance.shape[0]:
            return grid.new_ones(())
        return self.prior_variance.to(grid.dtype).view(height, width, -1)

    def _check(self, x: Tensor, y: Tensor | None, *, name: str = "x", condition: str = "y") -> Tensor | None:
        config = self.config
        if x.dim() not in (4, 5) or x.shape[-3] != config.in_channels:
            raise ValueError(
                f"flow: {name} has shape {list(x.shape)}, expected (batch, frames, {config.in_channels}, height, "
                f"width) or (batch, {config.in_channels}, height, width)"
            )
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
        elif config.num_classes:
            if y is not None and (
                y.shape != x.shape[:1] or y.is_floating_point() or int(y.max()) >= config.num_classes
            ):
                raise ValueError(
                    f"flow: {condition} has shape {list(y.shape)} and dtype {y.dtype}, expected {x.shape[0]} integer "
                    f"labels below {config.num_classes}, negative for none"
                )
        elif y is not None:
            raise ValueError(f"flow: {condition} is given, expected None (the flow has neither text nor classes)")
        return y


def nll_of(encoded: Encoded) -> Tensor:
    """The training objective of each sample from an encoded batch, (batch,) (see `Flow.nll`)."""
    z = encoded.latents[-1].flatten(1)
    log_det = sum((d.flatten(1).sum(1) for d in encoded.log_det), start=z.new_zeros(z.shape[0]))
    return 0.5 * z.square().mean(1) - log_det / z.shape[1]
