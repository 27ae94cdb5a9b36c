"""BlockDecoder: a block of the flow with the caches of a clip, as the solver inverts it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from starflow.model import Affine, DecodeState, FlowBlock, Guidance, Layout
from starflow.solver.break_even import break_even
from starflow.solver.native import NativeNetwork, NativeWindow, Precision, refuse_precision
from starflow_ext.rope_append import Cache


class BlockDecoder:
    """The map that the solver inverts: tokens before a window -> affine maps of the window.

    It holds the K/V buffers, with guidance those of both halves. Single use: one decoder decodes one clip (or one
    window of a long one). Where the block attends to the last frames alone, it decodes a clip without end, as the first
    frames are forgotten.

    Args:
        block: of the flow, with a network.
        layout: of the clip.
        rows: samples.
        context, null: text or labels of the samples and of the unconditional half; None for a block without.
        guidance: how the halves are combined; None, or one that is not active, evaluates the conditional half alone.
        temperature: divides the attention logits.
        precision: of native decoding (see `starflow.solver.Precision`).
        frame_conditions: vectors of all frames of the layout (rows, frames, frame_dim), NaN for none or for one that
            `tell` brings later; None for a block that reads none.
    """

    def __init__(
        self,
        block: FlowBlock,
        layout: Layout,
        rows: int,
        context: Tensor | None,
        null: Tensor | None = None,
        guidance: Guidance | None = None,
        temperature: float = 1.0,
        precision: Precision = "float32",
        frame_conditions: Tensor | None = None,
    ) -> None:
        assert block.conditioner is not None
        conditioner = block.conditioner
        self.conditioner, self.layout = conditioner, layout
        self.guidance = guidance if guidance is not None and guidance.active else None
        self._guess = block.guess
        self.halves = 2 if self.guidance is not None else 1
        self._context = self._of_halves(context, null)
        self._temperature: float | Tensor = temperature
        if self.guidance is not None and self.guidance.kind == "linear" and self.guidance.temperature != 1.0:
            self._temperature = torch.full((2 * rows,), temperature, dtype=torch.float32, device=self.device)
            self._temperature[rows:] *= self.guidance.temperature
        self._frame_conditions: Tensor | None = None
        if conditioner.proj_frame is not None and frame_conditions is not None:
            self._frame_conditions = self._halved(frame_conditions)
        self._before: Tensor | None = None
        self._native: NativeNetwork | None = None
        self._state: DecodeState | None = None
        if NativeNetwork.runs(conditioner, precision):
            self._native = NativeNetwork(
                conditioner,
                layout,
                self.halves * rows,
                self._context,
                self._temperature,
                precision,
                self._frame_conditions,
            )
            return
        refuse_precision(conditioner, precision)
        text = conditioner.text_tokens(self._context)
        self._state = DecodeState.allocate(conditioner, self.halves * rows, layout.tokens, text, device=self.device)
        if text:
            assert self._context is not None
            conditioner.prefill_text(self._context, layout, self._state, self._temperature)

    def tell(self, frame: int, frame_conditions: Tensor | None, before: Tensor | None = None) -> None:
        """Tells the frames `frame ..` of the layout what they depend on, before any of them is evaluated.

        Args:
            frame: the first one.
            frame_conditions: vectors, (rows, frames, frame_dim), NaN for none; None for a block that reads none.
            before: the tokens at the places of theirs in the frames before (`Conditioner.of_previous`), (rows, tokens,
                channels of these); None for a block that reads none.
        """
        if frame_conditions is not None:
            assert self._frame_conditions is not None
            frame_conditions = self._halved(frame_conditions)
            self._frame_conditions[:, frame : frame + frame_conditions.shape[1]] = frame_conditions
        if before is not None and self.halves == 2:
            before = torch.cat([before, before])
        if self._native is not None:
            self._native.tell(frame, frame_conditions, before)
        elif before is not None:
            if self._before is None:
                self._before = before.new_zeros(before.shape[0], self.layout.tokens, before.shape[2])
            begin = frame * self.frame_tokens
            self._before[:, begin : begin + before.shape[1]] = before

    def _halved(self, frame_conditions: Tensor) -> Tensor:
        """Vectors of frames of the rows of both halves; the unconditional one has none."""
        told = frame_conditions.to(self.device, copy=True)
        return told if self.guidance is None else torch.cat([told, torch.full_like(told, torch.nan)])

    def _of_halves(self, context: Tensor | None, null: Tensor | None) -> Tensor | None:
        """Text or labels of all rows."""
        if self.guidance is None or context is None:
            return context
        if self.conditioner.class_embed is not None and null is None:
            null = torch.full_like(context, -1)
        return context if null is None else torch.cat([context, null])

    def forget(self, frames: int) -> None:
        """Drops the first frames of the cache, which the tokens to come do not see: token n becomes token n - tokens.

        Args:
            frames: how many; the block attends to the last frames alone (`flow.attention_frames`).
        """
        self.layout = replace(self.layout, begin=self.layout.begin + frames)
        if self._native is not None:
            self._native.forget(frames * self.frame_tokens, self.layout)
        else:
            assert self._state is not None
            self._state.forget(frames * self.frame_tokens)

    def change(self, context: Tensor | None, null: Tensor | None) -> None:
        """Changes the text or labels of the tokens to come, of a block whose text is no token of its own."""
        self._context = self._of_halves(context, null)
        if self._native is not None:
            self._native.change(self._context)

    def unguide(self) -> None:
        """Evaluates the conditional half alone from now on."""
        if self.guidance is None:
            return
        self.guidance, self.halves = None, 1

        def first(both: Tensor) -> Tensor:
            return both[: both.shape[0] // 2].clone()

        self._context = None if self._context is None else first(self._context)
        self._frame_conditions = None if self._frame_conditions is None else first(self._frame_conditions)
        self._before = None if self._before is None else first(self._before)
        if isinstance(self._temperature, Tensor):
            self._temperature = first(self._temperature)
        if self._native is not None:
            self._native.halve()
        else:
            assert self._state is not None
            caches = tuple(Cache(*map(first, cache)) for cache in self._state.caches)
            self._state = replace(self._state, caches=caches)

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
                previous,
                wide_start,
                self._context,
                self.layout,
                self._state,
                self._temperature,
                final,
                self._frame_conditions,
                self._before,
            )
        return affine if self.guidance is None else self.guidance.combine(affine, start, self.tokens)

    @property
    def native_window(self) -> NativeWindow | None:
        """The solver's window schedule in native code, or None where it has to run in plain torch."""
        return None if self._native is None else NativeWindow(self._native, self.frame_tokens, self.guidance)
