"""FlowBlock: token order + conditioner + scope, and the decoder that the solver inverts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from starflow.affine import Affine
from starflow.conditioner import Conditioner, Layout, make_layout
from starflow.config import FlowConfig
from starflow.guidance import Guidance
from starflow.network import NativeNetwork, NativeWindow, Precision, refuse_precision
from starflow.solver import break_even
from starflow.state import DecodeState
from starflow.tokens import Order, to_grid, to_sequence, token_order


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
        # Where tokens of the first frame are guessed to lie before their first evaluation (see `solver`): the mean
        # network output over data, tracked while training. Zeros guess x = z.
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
        """The condition of `fold`'s rows: class labels (the only one that a frame-local block reads) by frame."""
        return context if context is None or not self.frame_local else context.repeat_interleave(frames, 0)

    def layout(self, frames: int, height: int, width: int, context: Tensor | None, *, image: bool) -> Layout:
        """Layout of a (folded) grid."""
        assert self.conditioner is not None
        text = self.conditioner.text_tokens(context)
        return make_layout(self.config, self.order, frames, height, width, text, still=image or self.frame_local)

    def encode(
        self, grid: Tensor, context: Tensor | None, *, image: bool
    ) -> tuple[Tensor, Tensor, Affine | None, Tensor | None]:
        """Data to noise for a grid.

        Args:
            grid: (batch, frames, height, width, channels).
            context: text or labels, (batch, ...); None for a block that reads none.
            image: whether the grid is an image (no time).

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
        affine, text = self.conditioner(x, self.fold_labels(context, frames), layout)
        z, log_det = affine.encode(x)
        out = to_grid(z, layout.order, folded.shape[1], height, width).reshape(grid.shape)
        return out, log_det.reshape(batch, frames, height * width), affine, text

    def on_grid(self, values: Tensor, height: int, width: int) -> Tensor:
        """Values of tokens in the block's own order, (batch, frames, frame tokens), at their places in the frames.

        Returns:
            (batch, frames, height, width).
        """
        batch, frames, _ = values.shape
        seen = 1 if self.frame_local else frames
        order = token_order(self.order, seen, height, width)
        return to_grid(values.reshape(-1, len(order), 1), order, seen, height, width).view(batch, frames, height, width)

    def decoder(
        self,
        layout: Layout,
        rows: int,
        context: Tensor | None,
        null: Tensor | None = None,
        guidance: Guidance | None = None,
        temperature: float = 1.0,
        precision: Precision = "float32",
    ) -> BlockDecoder:
        """A fresh decoder of `rows` samples (see `BlockDecoder`)."""
        assert self.conditioner is not None
        return BlockDecoder(self.conditioner, layout, rows, context, null, guidance, temperature, self.guess, precision)


class BlockDecoder:
    """The map that the solver inverts: tokens before a window -> affine maps of the window.

    Holds the K/V buffers; with guidance, of both halves. Single use: one decoder decodes one clip (or one window of a
    long one).

    Args:
        conditioner: network of the block.
        layout: of the clip.
        rows: samples.
        context, null: text or labels of the samples and of the unconditional half; None for a block without.
        guidance: None or inactive is none.
        temperature: divides the attention logits.
        guess: (raw_channels,) where tokens lie before anything is known.
        precision: of native decoding (see `starflow.network.Precision`).
    """

    def __init__(
        self,
        conditioner: Conditioner,
        layout: Layout,
        rows: int,
        context: Tensor | None,
        null: Tensor | None,
        guidance: Guidance | None,
        temperature: float,
        guess: Tensor,
        precision: Precision,
    ) -> None:
        self.conditioner, self.layout = conditioner, layout
        self.guidance = guidance if guidance is not None and guidance.active else None
        self._guess = guess
        self.halves = 2 if self.guidance is not None else 1
        self._context = context
        self._temperature: float | Tensor = temperature
        if self.guidance is not None:
            if conditioner.class_embed is not None and context is not None and null is None:
                null = torch.full_like(context, -1)
            if context is not None and null is not None:
                self._context = torch.cat([context, null])
            if self.guidance.kind == "linear" and self.guidance.temperature != 1.0:
                self._temperature = torch.full((2 * rows,), temperature, device=self.device)
                self._temperature[rows:] *= self.guidance.temperature
        self._native: NativeNetwork | None = None
        self._state: DecodeState | None = None
        if NativeNetwork.runs(conditioner, precision):
            self._native = NativeNetwork(
                conditioner, layout, self.halves * rows, self._context, self._temperature, precision
            )
            return
        refuse_precision(conditioner, precision)
        text = conditioner.text_tokens(self._context)
        self._state = DecodeState.allocate(conditioner, self.halves * rows, layout.tokens, text, device=self.device)
        if text:
            assert self._context is not None
            conditioner.prefill_text(self._context, layout, self._state, self._temperature)

    @property
    def first_token(self) -> int:
        """Tokens below this pass unchanged: `x = z`."""
        return self.conditioner.first_token

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.conditioner.proj_in.weight.device

    @property
    def channels(self) -> int:
        """Dimensions of a token."""
        return self.conditioner.proj_in.in_features

    @property
    def tokens(self) -> int:
        """Tokens of the clip."""
        return self.layout.tokens

    @property
    def frame_tokens(self) -> int:
        """Tokens of a frame."""
        return self.layout.frame_tokens

    def initial_guess(self, z: Tensor) -> Tensor:
        """Tokens (batch, tokens, channels) at the mean shift and scale of the block, with their own noise."""
        c = self.conditioner
        raw = self._guess.to(z.dtype).expand(*z.shape[:2], -1)
        return Affine(raw, c.activation, c.soft_clip).decode(z)

    @property
    def cost_key(self) -> str:
        """Names what the cost of a call depends on beside its rows."""
        c = self.conditioner
        dtype = str(c.dtype).removeprefix("torch.")
        cpu = self.device.type == "cpu"
        where = f"threads{torch.get_num_threads()}" if cpu else torch.cuda.get_device_name(self.device)
        how = dtype if self._native is None else self._native.cost_key
        return f"{len(c.layers)}x{c.width}-{how}-{self.tokens}-{where}"

    def default_window(self, batch: int, first: int) -> int:
        """The break-even of this block on this machine (see `starflow.solver.break_even`)."""
        return break_even(self, batch, first)

    def evaluate(self, previous: Tensor, start: int | Tensor, final: Tensor | None = None) -> Affine:
        """Affine maps of the tokens `start ..` given the tokens before each.

        Args:
            previous: (batch, tokens, channels), row i is token `start + i - 1`.
            start: one number, or one for each sample (batch,).
            final: (batch,) tokens of each sample whose keys and values stay as they are; None overwrites all.
        """
        wide_start = start
        if self.guidance is not None:
            previous = torch.cat([previous, previous])
            wide_start = torch.cat([start, start]) if isinstance(start, Tensor) else start
            final = None if final is None else torch.cat([final, final])
        if self._native is not None:
            affine = self._native.window(previous, wide_start, final)
        else:
            assert self._state is not None
            affine = self.conditioner.window(
                previous, wide_start, self._context, self.layout, self._state, self._temperature, final
            )
        return affine if self.guidance is None else self.guidance.combine(affine, start, self.tokens)

    @property
    def native_window(self) -> NativeWindow | None:
        """The solver's window schedule in native code, or None where it has to run in plain torch."""
        return None if self._native is None else NativeWindow(self._native, self.frame_tokens, self.guidance)


@dataclass(frozen=True)
class Encoded:
    """What `Flow.encode` returns.

    Args:
        z: noise, shape of the data.
        log_det: log |dz/dx| of each token by block, each (batch, frames, frame tokens) in the block's own order.
        latents: grids (batch, frames, height, width, channels): the data, then the output of each block.
        affines: affine maps of each block; None for an identity block.
        text: text stream after the deep block, or None.
    """

    z: Tensor
    log_det: tuple[Tensor, ...]
    latents: tuple[Tensor, ...]
    affines: tuple[Affine | None, ...]
    text: Tensor | None
