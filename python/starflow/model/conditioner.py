"""Conditioner: predicts the affine map of each token from the tokens before it.

`affine[t] = conditioner(previous[t])` with `previous[t] = x[t - 1]` and `previous[0]` the start token; without a start
token `affine[0]` is the identity and the network reads one token less. Only this module knows which of the two holds.

Slots are positions of the network's input: token n is predicted at slot n with a start token, at slot n - 1 without.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from starflow.config import FlowConfig
from starflow.model.affine import Affine
from starflow.model.cache import DecodeState
from starflow.model.layers import Attending, Transformer
from starflow.model.rope import concatenate, grid_positions, later, rotation, text_positions
from starflow.model.tables import kept_tables
from starflow.model.tokens import Order, token_order
from starflow_ext import ops
from starflow_ext.block_attention import FrameMask
from starflow_ext.linear_pack import PackedWeight
from starflow_ext.rope_append import Rotation


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tokens of a clip stand for one block.

    Args:
        frames, height, width: of the token grid that the block sees (one frame for a frame-local block).
        order: raster index of the n-th token.
        text: rotation of the text tokens; query, key: rotation of the slots. None without rotary positions.
        begin: frames that came before and were forgotten; the rotations are those of a clip without such.
    """

    frames: int
    height: int
    width: int
    order: Tensor
    text: Rotation | None
    query: Rotation | None
    key: Rotation | None
    begin: int = 0

    @property
    def frame_tokens(self) -> int:
        """Tokens of a frame."""
        return self.height * self.width

    @property
    def tokens(self) -> int:
        """Tokens of the clip."""
        return self.frames * self.frame_tokens


@kept_tables(128)
def make_layout(
    config: FlowConfig, order: Order, frames: int, height: int, width: int, text_tokens: int, *, still: bool
) -> Layout:
    """Layout of a clip for a block that visits tokens in `order`; `still` for images and frame-local blocks."""
    visited = token_order(order, frames, height, width)
    if not config.rope:
        return Layout(frames, height, width, visited, None, None, None)
    side = config.position_side
    positions = grid_positions(frames, height, width, side, still=still)
    if config.attention_frames is not None:
        # Clips without end: in float32 the angles of late frames would be less exact than those of the first.
        positions = positions.double()
    if frames > 1 and not config.third_axis:
        raise ValueError(
            f"flow: the clip has {frames} frames, expected 1: without text and with temporal_causal 0 rotary positions "
            "have no axis for time"
        )
    if order not in ("raster", "reverse", "reverse_in_frame"):
        # A slot holds the content of one token and predicts another, so queries stand where the predicted token
        # stands and keys where their content stands; the start token stands outside the clip.
        ordered = positions[visited]
        before = torch.cat([torch.full((1, 3), -1.0, dtype=ordered.dtype), ordered[:-1]])
        query, key = (ordered, before) if config.sos else (torch.cat([ordered[1:], ordered[:1]]), ordered)
    else:
        # The published models give slot n the angles of raster slot n, whatever the order.
        query = key = positions
    text, query_table, key_table = (
        rotation(p, config.head_dim, third_axis=config.third_axis)
        for p in (text_positions(text_tokens, side), query, key)
    )
    return Layout(frames, height, width, visited, text, query_table, key_table)


class Conditioner(Transformer):
    """The causal transformer of one block: tokens before n, text or class -> affine map of token n.

    Args:
        config: of the flow.
        block: index of the block.
    """

    def __init__(self, config: FlowConfig, block: int) -> None:
        channels = config.token_channels
        super().__init__(
            config,
            width=config.width(block),
            heads=config.heads(block),
            kv_heads=config.kv_heads(block),
            layers=config.layers_per_block[block],
            out_channels=channels if config.activation == "none" else 2 * channels,
            # Text tokens stand at a time of their own, which a clip without end leaves behind for ever.
            text_dim=config.text_width(block) if config.attention_frames is None else 0,
            frame_dim=config.frame_dim if config.is_top(block) else 0,
        )
        self.attention_frames = config.attention_frames if config.is_top(block) else None
        self.activation = config.activation
        self.soft_clip = config.soft_clip
        self.sos_embed = nn.Parameter(torch.randn(1, 1, channels)) if config.sos else None
        table = config.frame_side**2
        self.pos_embed = None if config.rope else nn.Parameter(0.01 * torch.randn(table, self.width))
        self.proj_position = nn.Linear(config.head_dim, self.width, bias=False) if config.position_embed else None
        self.previous_frames = config.previous_frames if config.is_top(block) else 0
        self.proj_previous = (
            nn.Linear(self.previous_frames * channels, self.width, bias=False) if self.previous_frames else None
        )
        text_dim = config.text_width(block) if config.text_embed else 0
        self.proj_summary = nn.Linear(text_dim, self.width, bias=False) if text_dim else None
        self.class_embed = (
            nn.Parameter(0.01 * torch.randn(config.num_classes, 1, self.width)) if config.num_classes else None
        )

    @property
    def first_token(self) -> int:
        """The first token that the network predicts: 1 without a start token, whose token 0 passes unchanged."""
        return 0 if self.sos_embed is not None else 1

    def text_tokens(self, context: Tensor | None) -> int:
        """How many text tokens of `context` this block reads."""
        return context.shape[1] if context is not None and self.proj_text is not None else 0

    def forward(
        self, x: Tensor, context: Tensor | None, layout: Layout, frame_conditions: Tensor | None = None
    ) -> tuple[Affine, Tensor | None]:
        """Affine maps of all tokens of known data, in one pass.

        Args:
            x: (batch, tokens, channels) in the block's order.
            context: text (batch, text tokens, text_dim), class labels (batch,) or None.
            layout: of the clip.
            frame_conditions: vector of each frame (batch, frames, frame_dim), NaN for none; None for none at all.

        Returns:
            The affine maps, and the text stream (batch, text tokens, width) after the layers or None.
        """
        inputs = x
        if self.sos_embed is not None:
            inputs = torch.cat([self.sos_embed.to(x.dtype).expand(x.shape[0], -1, -1), x[:, :-1]], 1)
        before = None if self.proj_previous is None else self.of_previous(x, layout.frame_tokens)
        h = self._embed_slots(inputs, context, layout, slice(None), frame_conditions, before)
        text = self.text_tokens(context)
        if text:
            assert context is not None
            h = torch.cat([self.embed_text(context), h], 1)
        query, key = (concatenate(layout.text, table, h.device) for table in (layout.query, layout.key))
        h = self.run(h, Attending(query, key, frames=self._frames(layout)))
        stream = h[:, :text] if text else None
        return self._affine(self.put_out(h[:, text:]), shifted=self.sos_embed is None), stream

    # Keys and values in a cache carry no gradient.
    @torch.no_grad()
    def prefill_text(self, context: Tensor, layout: Layout, state: DecodeState, temperature: float | Tensor) -> None:
        """Writes keys and values of the text into the first slots of `state`."""
        text = _on(layout.text, context)
        self.run(self.embed_text(context), Attending(text, text, caches=state.caches, temperature=temperature))

    def window(
        self,
        previous: Tensor,
        start: int | Tensor,
        context: Tensor | None,
        layout: Layout,
        state: DecodeState,
        temperature: float | Tensor = 1.0,
        final: Tensor | None = None,
        frame_conditions: Tensor | None = None,
        before: Tensor | None = None,
    ) -> Affine:
        """Affine maps of the tokens `start .. start + tokens - 1` from the tokens before them and the cached prefix.

        Writes the keys and values of the window into `state`, but for the tokens that are final; writing a window again
        overwrites them.

        Args:
            previous: (batch, tokens, channels): row i is token `start + i - 1`; the row before token 0 is ignored.
            start: first token, at least `first_token`; one number, or one for each sample (batch,).
            context: text or class labels as for `forward`; the text tokens themselves are read from the state.
            layout: of the clip.
            state: holds text and accepted tokens.
            temperature: divides the attention logits.
            final: (batch,) tokens of each sample whose keys and values stay; None writes all.
            frame_conditions: as for `forward`, of all frames of the layout.
            before: what `of_previous` returns for all tokens of the layout; None for a network that reads none.
        """
        slot = start - self.first_token
        count = torch.arange(previous.shape[1], device=previous.device)
        slots = slot[:, None] + count if isinstance(slot, Tensor) else slot + count
        if self.sos_embed is not None:
            previous = torch.where((slots == 0)[..., None], self.sos_embed.to(previous.dtype), previous)
        h = self._embed_slots(previous, context, layout, slots, frame_conditions, before)
        attending = Attending(
            later(_on(layout.query, h, slots), layout.begin),
            later(_on(layout.key, h, slots), layout.begin),
            caches=state.caches,
            start=slot + state.text_tokens,
            final=None if final is None else final - self.first_token + state.text_tokens,
            frames=self._frames(layout),
            temperature=temperature,
        )
        return self._affine(self.put_out(self.run(h, attending)))

    def _frames(self, layout: Layout) -> FrameMask | None:
        """Which frames a slot sees, beside those that come before it; None for all."""
        if self.attention_frames is None:
            return None
        return FrameMask(0, layout.frame_tokens, look_ahead=1, window=self.attention_frames)

    def _affine(self, raw: Tensor, *, shifted: bool = False) -> Affine:
        return Affine(raw, self.activation, self.soft_clip, shifted=shifted)

    def _embed_slots(
        self,
        inputs: Tensor,
        context: Tensor | None,
        layout: Layout,
        slots: Tensor | slice,
        frame_conditions: Tensor | None,
        before: Tensor | None,
    ) -> Tensor:
        h = self.embed(inputs)
        position = self.position_rows(layout, slots)
        if position is not None:
            h = h + position
        told = self.frame_rows(frame_conditions, layout, slots)
        if told is not None:
            h = h + told
        if before is not None:
            h = h + self.previous_rows(at_slots(before, slots))
        condition = self.condition_rows(context, h.shape[0])
        return h if condition is None else h + condition

    def frame_rows(
        self,
        frame_conditions: Tensor | None,
        layout: Layout,
        slots: Tensor | slice = slice(None),
    ) -> Tensor | None:
        """Embeddings of the vectors of frames at `slots`, (batch, slots, width), which are added to the tokens there.

        A slot has the vector of the frame whose token it predicts: a token depends on the vectors up to its own frame.
        (Flows with such vectors have a start token, so that slots are tokens, and go forward in time.)

        Args:
            frame_conditions: (batch, frames, frame_dim), NaN for none; None for none at all.
            layout: of the clip.
            slots: all, or those of a window: (slots,), or (batch, slots).
        """
        rows = self.embed_frames(frame_conditions)
        if rows is None:
            return None
        return at_slots(rows, torch.arange(layout.tokens, device=rows.device)[slots] // layout.frame_tokens)

    def of_previous(self, x: Tensor, frame_tokens: int) -> Tensor:
        """The tokens at each token's own place in the frames before its own, the last frame first.

        Args:
            x: (batch, tokens, channels) in the block's order, whole frames.
            frame_tokens: tokens of a frame.

        Returns:
            (batch, tokens, previous_frames x channels); zeros for frames before the first.
        """
        tokens = x.shape[1]
        shifts = (frame_tokens * (number + 1) for number in range(self.previous_frames))
        return torch.cat([F.pad(x, (0, 0, shift, 0))[:, :tokens] for shift in shifts], -1)

    def before_next(self, x: Tensor, frame_tokens: int) -> Tensor | None:
        """What `of_previous` returns for the frame that comes after all of `x`, (batch, frame tokens, channels of it).

        None for a network that reads none. Of `x` the last `previous_frames` frames matter.
        """
        if self.proj_previous is None:
            return None
        # In place of the next frame whatever stands there: its own tokens are not looked at.
        last = F.pad(x[:, -self.previous_frames * frame_tokens :], (0, 0, 0, frame_tokens))
        return self.of_previous(last, frame_tokens)[:, -frame_tokens:]

    def previous_rows(self, before: Tensor, packed: PackedWeight | None = None) -> Tensor:
        """What is added to tokens for what stood at their places in the frames before, (batch, tokens, width).

        Args:
            before: rows of what `of_previous` returns.
            packed: `proj_previous.weight` in packed form, if the caller has it.
        """
        assert self.proj_previous is not None
        return ops.linear(before, self.proj_previous.weight if packed is None else packed)

    def position_rows(
        self, layout: Layout, slots: Tensor | slice = slice(None), packed: PackedWeight | None = None
    ) -> Tensor | None:
        """Position embeddings of the tokens at `slots`, (slots, width), which are added to them; None without such.

        `packed` is `proj_position.weight` in packed form, if the caller has it.
        """
        device = self.proj_in.weight.device
        if self.pos_embed is not None:
            if self.pos_embed.shape[0] != layout.tokens:
                raise ValueError(
                    f"conditioner: the clip has {layout.tokens} tokens, expected the {self.pos_embed.shape[0]} of the "
                    "learned position table (rope is off)"
                )
            return self.pos_embed[layout.order.to(device)[slots]]
        if self.proj_position is None or layout.query is None:
            return None
        # Rotary angles encode relative positions only. Without these rows a network has to infer the place of a token
        # in its frame from the distance to the text, which takes long training.
        if self.attention_frames is not None:
            # A token must not know at which time of the clip it stands: all frames have the rows of the first one.
            slots = torch.arange(layout.tokens, device=device)[slots] % layout.frame_tokens
        waves = torch.cat([table.to(device)[slots] for table in layout.query], -1)
        return ops.linear(waves, self.proj_position.weight if packed is None else packed)

    def condition_rows(self, context: Tensor | None, batch: int, packed: PackedWeight | None = None) -> Tensor | None:
        """Embedding of each sample's text summary or class, (batch, 1, width), added to all its tokens; None without.

        `packed` is `proj_summary.weight` in packed form, if the caller has it.
        """
        if self.proj_summary is not None and context is not None:
            return ops.linear(context.sum(1, keepdim=True), self.proj_summary.weight if packed is None else packed)
        return None if self.class_embed is None else self._class_rows(context, batch)

    def _class_rows(self, labels: Tensor | None, batch: int) -> Tensor:
        """(batch, 1, width); a negative label, or none, is the mean over the classes (no condition)."""
        assert self.class_embed is not None
        mean = self.class_embed.mean(0)
        if labels is None:
            return mean.expand(batch, 1, -1)
        return torch.where((labels < 0)[:, None, None], mean, self.class_embed[labels.clamp(min=0)])


def at_slots(rows: Tensor, slots: Tensor | slice) -> Tensor:
    """The rows (batch, all, width) at `slots`: all, (slots,), or those of each sample (batch, slots)."""
    if isinstance(slots, slice) or slots.dim() == 1:
        return rows[:, slots]
    return rows[torch.arange(rows.shape[0], device=rows.device)[:, None], slots]


def _on(table: Rotation | None, like: Tensor, slots: Tensor | None = None) -> Rotation | None:
    """The table on the device of `like`, at `slots`."""
    if table is None:
        return None
    cos, sin = (t.to(like.device) for t in table)
    return Rotation(cos, sin) if slots is None else Rotation(cos[slots], sin[slots])
