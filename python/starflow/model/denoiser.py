"""The causal denoiser: a light network that predicts the flow's own score, and the steps that use a score.

Reference: Gu et al., STARFlow-V (2025), flow-score matching; Zhai et al., TarFlow (2024), section 3.4 (score step).
"""

from __future__ import annotations

import torch
from torch import Tensor

from starflow.config import FlowConfig
from starflow.model.centre import Centre
from starflow.model.conditioner import Layout, make_layout
from starflow.model.gaussian import Gaussian
from starflow.model.layers import Attending, Int8Linear, Transformer, Weights
from starflow.model.packed import pack_linears, pack_network
from starflow.model.rope import concatenate
from starflow.model.tokens import patchify, unpatchify
from starflow_ext import ops
from starflow_ext._mode import in_reference_mode
from starflow_ext.block_attention import FrameMask
from starflow_ext.linear import ProductInput
from starflow_ext.sweep_block import BlockState, CacheStorage

# The published step: x - 0.3 * prediction. It is Tweedie's, x - sigma^2 * score, when the network was trained on a
# target weighted by sigma / 0.3 or with sigma = 0.3.
STEP = 0.3

# Bytes of keys and values of all layers, in float32, up to which these run in one native call; beyond, only those of
# one layer are kept at a time. Eight layers of width 64 and 128 tokens take 6.5 ms in place of 12.7 on two AVX2 cores.
_ONE_CALL = 16 << 20
# How a network in a dtype runs there: what enters products, and what the keys and values are kept in.
_AT_ONCE: dict[torch.dtype, tuple[ProductInput, CacheStorage]] = {
    torch.float32: ("float32", "float32"),
    torch.float16: ("float32", "float16"),
    torch.bfloat16: ("bfloat16", "bfloat16"),
}


def tweedie_step(sigma: float, *, weighted: bool) -> float:
    """The step of `Denoiser.denoise` that takes a network's prediction to the posterior mean of the clean data.

    Args:
        sigma: standard deviation of the noise that the flow was trained with.
        weighted: the training loss was weighted by sigma / 0.3 (`train.cond_noise_level`).
    """
    return STEP if weighted else sigma


class Denoiser(Transformer):
    """Predicts sigma times the gradient of the negative log-likelihood of noisy data, frame-causal with a look-ahead.

    Args:
        config: of the flow; `temporal_causal` is the look-ahead (0 sees everything), `denoiser_window` the frames
            behind, `denoiser_layers` its depth, `conditional_denoiser` whether it reads text and the vectors of frames,
            `denoiser_skip` how much of its input is added to its output, `denoiser_components` of how many principal
            components the Gaussian is whose score is added.
    """

    def __init__(self, config: FlowConfig) -> None:
        # The sizes of a shallow block, even where the flow has none.
        heads = config.num_heads or config.channels // config.head_dim
        super().__init__(
            config,
            width=config.channels,
            heads=heads,
            kv_heads=config.num_kv_heads or heads,
            layers=config.denoiser_layers,
            out_channels=config.token_channels,
            text_dim=config.txt_dim if config.conditional_denoiser else 0,
            frame_dim=config.frame_dim if config.conditional_denoiser else 0,
        )
        self.config = config
        self.centre = Centre(config) if config.centred else None
        self.gaussian = Gaussian(config) if config.denoiser_components else None

    def forward(self, x: Tensor, text: Tensor | None = None, frame_conditions: Tensor | None = None) -> Tensor:
        """The predicted scaled score.

        Args:
            x: noisy latents (batch, frames, channels, height, width), or without frames for images.
            text: (batch, text tokens, text_dim), needed by a conditional denoiser of a flow with text.
            frame_conditions: vectors of the frames (batch, frames, frame_dim), NaN for none, or None; one that is not
                conditional does not read them.

        Returns:
            Like `x`.

        Raises:
            ValueError: a conditional denoiser was given no text.
        """
        config = self.config
        if self.proj_text is not None and text is None:
            raise ValueError("denoiser: text is None, expected text features (the denoiser is conditional)")
        image = x.dim() == 4
        grid = patchify(x, config.patch_size, channel_first=config.channel_first_patches)
        if self.centre is not None:
            grid = grid - self.centre(grid)
        _, frames, height, width, _ = grid.shape
        text = None if self.proj_text is None else text
        count = 0 if text is None else text.shape[1]
        layout = make_layout(config, "raster", frames, height, width, count, still=image)
        mask = None
        if not image and config.temporal_causal > 0:
            mask = FrameMask(count, height * width, config.temporal_causal, config.denoiser_window)
        samples = self._samples()
        if samples and text is None and self._fits_one_call(grid, mask):
            out = self._at_once(grid, frame_conditions, layout, mask)
        else:
            weights = pack_linears(self) if samples else None
            out = self._by_layer(grid, text, frame_conditions, layout, mask, weights)
        out = out.to(x.dtype).reshape(grid.shape)
        if config.denoiser_skip:
            out = out + config.denoiser_skip * grid.to(out)
        if self.gaussian is not None:
            out = out + self.gaussian(grid.to(out))
        return unpatchify(out, config.patch_size, channel_first=config.channel_first_patches, image=image)

    def _samples(self) -> bool:
        """Whether a clip is sampled by native products of packed weights (CPU, inference mode)."""
        weight = self.proj_in.weight
        sampling = torch.is_inference_mode_enabled() and not torch.compiler.is_compiling()
        native = weight.is_cpu and weight.dtype != torch.float64 and not in_reference_mode()
        return sampling and native and not self.in_pieces

    def _by_layer(
        self,
        grid: Tensor,
        text: Tensor | None,
        told: Tensor | None,
        layout: Layout,
        mask: FrameMask | None,
        weights: Weights | None,
    ) -> Tensor:
        """What the network puts out for the tokens of a grid (batch, frames, height, width, channels)."""
        h = self.embed(grid.flatten(1, 3), weights)
        rows = self.embed_frames(told, weights)
        if rows is not None:
            h = h + rows.repeat_interleave(layout.frame_tokens, 1)
        count = 0
        if text is not None:
            h = torch.cat([self.embed_text(text, weights), h], 1)
            count = text.shape[1]
        rotation = concatenate(layout.text, layout.query, h.device)
        h = self.run(h, Attending(rotation, rotation, causal=False, frames=mask, weights=weights))
        return self.put_out(h[:, count:], weights)

    def _fits_one_call(self, grid: Tensor, mask: FrameMask | None) -> bool:
        kept = 2 * len(self.layers) * grid[..., 0].numel() * self.kv_heads * self.head_dim * 4
        if kept > _ONE_CALL or (mask is not None and mask.look_ahead > 1) or self.dtype not in _AT_ONCE:
            return False
        return not any(isinstance(module, Int8Linear) for module in self.modules())

    def _at_once(self, grid: Tensor, told: Tensor | None, layout: Layout, mask: FrameMask | None) -> Tensor:
        """The same in one native call: no text is read, and each frame sees itself and some behind it."""
        rows = self.embed_frames(told)
        batch, frames = grid.shape[:2]
        tokens = frames * layout.frame_tokens
        behind = None if mask is None else mask.window
        product_input, cache = _AT_ONCE[self.dtype]
        weights = pack_network(self)
        state = BlockState.allocate(
            weights,
            batch,
            tokens,
            storage=cache,
            condition=None if rows is None else rows.float().expand(batch, -1, -1).contiguous(),
            condition_tokens=0 if rows is None else layout.frame_tokens,
            query_rotation=layout.query,
            key_rotation=layout.query,
            frame_tokens=tokens if mask is None else layout.frame_tokens,
            frames_behind=frames if behind is None else behind,
            whole_frames=True,
        )
        slots = grid.flatten(1, 3).float().contiguous()
        start = torch.zeros(batch, dtype=torch.int64, device="cpu")
        return ops.jacobi_sweep(weights, state, slots, start, product_input=product_input)

    def denoise(
        self, x: Tensor, text: Tensor | None = None, frame_conditions: Tensor | None = None, *, step: float = STEP
    ) -> Tensor:
        """One step to clean data: `x - step * prediction` (see `tweedie_step`; the default is the published one)."""
        prediction: Tensor = self(x, text, frame_conditions)
        return x - step * prediction

    def denoise_video(
        self,
        x: Tensor,
        text: Tensor | None = None,
        frame_conditions: Tensor | None = None,
        *,
        step: float = STEP,
        chunk: int | None = None,
    ) -> Tensor:
        """Denoises a clip of any length chunk by chunk: a chunk sees the cleaned frames of the one before.

        Chunks overlap by `denoiser_window` (without one, by all but one frame).

        Args:
            x: (batch, frames, channels, height, width); an image is denoised in one step.
            text: (batch, text tokens, text_dim).
            frame_conditions: as for `forward`.
            step: as for `denoise`.
            chunk: frames of a chunk; by default `local_attn_window`, or all.

        Returns:
            Like `x`; the input is left alone.

        Raises:
            ValueError: the overlap leaves no new frame in a chunk.
        """
        chunk = self.config.local_attn_window if chunk is None else chunk
        if x.dim() == 4 or chunk is None or chunk >= x.shape[1]:
            return self.denoise(x, text, frame_conditions, step=step)
        overlap = self.config.denoiser_window if self.config.denoiser_window is not None else chunk - 1
        if overlap >= chunk:
            raise ValueError(
                f"denoiser: denoiser_window is {overlap}, expected less than the {chunk} frames of a chunk "
                f"(local_attn_window) to denoise the {x.shape[1]} frames in chunks"
            )

        def cleaned(begin: int) -> Tensor:
            frames = slice(begin, begin + chunk)
            told = None if frame_conditions is None else frame_conditions[:, frames]
            return self.denoise(out[:, frames], text, told, step=step)

        out = x.clone()
        out[:, :chunk] = cleaned(0)
        start = chunk - overlap
        while start + overlap < x.shape[1]:
            out[:, start + overlap : start + chunk] = cleaned(start)[:, overlap:]
            start += chunk - overlap
        return out


def score_target(gradient: Tensor, sigma: float) -> Tensor:
    """The target of flow-score matching: `gradient * numel * sigma`.

    Args:
        gradient: d (training loss) / d x of the noisy latents, the loss being a mean over the batch and dimensions.
        sigma: standard deviation of the noise on the data.
    """
    return gradient * (gradient.numel() * sigma)
