"""NativeNetwork: a block's network while a clip is decoded by the native kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import torch
from torch import Tensor

from starflow.model import Affine, Conditioner, Guidance, Layout, concatenate, later, pack_conditioner
from starflow_ext import ops
from starflow_ext._load import native
from starflow_ext._mode import in_reference_mode
from starflow_ext.jacobi_solve import SolveProgress, SweepCount
from starflow_ext.linear_pack import WeightStorage
from starflow_ext.rope_append import Rotation
from starflow_ext.sweep_block import BlockState, CacheStorage

# How decoding stores weights, keys and values, and in which dtypes it multiplies. The residual stream, norms, softmax
# and the affine update are always float32.
#   float32   the weights as they are; float32 products (bfloat16 ones for weights in bfloat16)
#   two_bfloat16  weights and what they multiply as sums of two bfloat16 (16 bits), three products of these; attention
#             in float32: for processors with tiles, where it is faster than float32
#   float16   weights, keys and values rounded to float16, float32 products: half the bytes, nearly float32's accuracy
#   bfloat16  everything that enters a product rounded to bfloat16: fastest where the machine multiplies bfloat16;
#             its own noise is some 0.05 in units of the tokens' scale, so tolerances below that buy nothing
#   int8      weights rounded to 255 steps an output channel, float32 products, float16 keys and values
# On CUDA float16 and bfloat16 alone decode natively, and there float16 rounds everything that enters a product too;
# float32 stands for the dtype of the weights where that is one of them, else plain torch decodes.
Precision = Literal["float32", "two_bfloat16", "float16", "bfloat16", "int8"]


@dataclass(frozen=True)
class _How:
    weights: WeightStorage | None
    product_input: Literal["float32", "two_bfloat16", "bfloat16"] | None
    cache: CacheStorage


_HOW: Final[dict[str, _How]] = {
    "float32": _How(None, "float32", "float32"),
    "two_bfloat16": _How("two_bfloat16", "two_bfloat16", "float32"),
    "float16": _How("float16", "float32", "float16"),
    "bfloat16": _How("bfloat16", "bfloat16", "bfloat16"),
    "int8": _How("int8", "float32", "float16"),
}
_HOW_ON_CUDA: Final[dict[str, _How]] = {
    "float16": _How("float16", None, "float16"),
    "bfloat16": _How("bfloat16", None, "bfloat16"),
}
_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


def _how(conditioner: Conditioner, precision: Precision) -> _How | None:
    """How a network decodes natively; None where it does not."""
    weight = conditioner.proj_in.weight
    if weight.dtype not in _DTYPES or in_reference_mode() or conditioner.in_pieces:
        return None
    own = str(weight.dtype).removeprefix("torch.") if precision == "float32" else precision
    if weight.device.type == "cuda":
        return _HOW_ON_CUDA.get(own)
    return _HOW.get("bfloat16" if own == "bfloat16" else precision) if weight.device.type == "cpu" else None


def refuse_precision(conditioner: Conditioner, precision: str) -> None:
    """Raises ValueError where plain torch decodes, and a precision was asked for.

    Raises:
        ValueError: names what the device has.
    """
    weight = conditioner.proj_in.weight
    if precision == "float32":
        return
    if precision not in _HOW:
        expected = f"one of {', '.join(map(repr, _HOW))}"
    elif weight.device.type == "cuda" and weight.dtype in _DTYPES and not in_reference_mode():
        expected = f"'float32', {' or '.join(map(repr, _HOW_ON_CUDA))} on {weight.device}"
    else:
        dtype = str(weight.dtype).removeprefix("torch.")
        expected = f"'float32' where plain torch decodes (weights on {weight.device} in {dtype})"
    raise ValueError(f"decode: precision is {precision!r}, expected {expected}")


class NativeNetwork:
    """Packed weights, K/V caches, and the embeddings that are added to every row; the text is cached at once.

    Args:
        conditioner: one that decodes natively (see `runs`).
        layout: of the clip.
        rows: of the caches, one for each sample, with guidance two.
        context: text or labels of the rows, or None.
        temperature: divides the attention logits, one number or one for each row.
        precision: see `Precision`.
        frame_conditions: of the rows, as for `tell`, of all frames; None without.
    """

    def __init__(
        self,
        conditioner: Conditioner,
        layout: Layout,
        rows: int,
        context: Tensor | None,
        temperature: float | Tensor,
        precision: Precision,
        frame_conditions: Tensor | None = None,
    ) -> None:
        how = _how(conditioner, precision)
        assert how is not None
        device = conditioner.proj_in.weight.device
        self._conditioner, self._how = conditioner, how
        packed = pack_conditioner(conditioner, how.weights)
        self._weights, self._summary, self._rows = packed.block, packed.summary, rows
        self._previous = packed.previous
        text = conditioner.text_tokens(context)
        query, key = (concatenate(layout.text, table, device) for table in (layout.query, layout.key))
        position = conditioner.position_rows(layout, packed=None if packed.position is None else packed.position.weight)
        if context is not None and context.is_floating_point():
            context = context.float()
        # What is added to all tokens of a row. Beside that, to those of a frame what its vector says, and to each what
        # stood at its place before: then every frame, or every token, has a condition of its own.
        self._shared = condition = self._condition(context)
        self._frame_tokens = layout.frame_tokens
        alike = 1 if packed.previous is not None else 0 if frame_conditions is None else layout.frame_tokens
        if alike:
            shape = rows, layout.tokens // alike, conditioner.width
            condition = torch.zeros(shape, dtype=torch.float32, device=device)
            if self._shared is not None:
                condition += self._shared[:, None]
        slots = text + layout.tokens
        if query is not None and not text:
            query, key = (
                Rotation(*(t.to(device) for t in table)) if table else None for table in (layout.query, layout.key)
            )
        self._query, self._key = query, key
        behind = conditioner.attention_frames
        self._state = BlockState.allocate(
            self._weights,
            rows,
            slots,
            text_tokens=text,
            storage=how.cache,
            temperature=torch.as_tensor(temperature, dtype=torch.float32, device=device).expand(rows).contiguous(),
            position=None if position is None else position.float().contiguous(),
            condition=condition,
            condition_tokens=alike,
            query_rotation=query,
            key_rotation=key,
            frame_tokens=0 if behind is None else layout.frame_tokens,
            frames_behind=0 if behind is None else behind,
        )
        if text:
            assert context is not None
            assert packed.text is not None
            embedded = ops.linear(context, packed.text.weight, packed.text.bias, product_input=how.product_input)
            self._sweep(embedded, torch.zeros(rows, dtype=torch.int64, device="cpu"), text=True)
        if frame_conditions is not None:
            self.tell(0, frame_conditions, None)

    def _condition(self, context: Tensor | None) -> Tensor | None:
        """What is added to the tokens of each row, (rows, width)."""
        packed = None if self._summary is None else self._summary.weight
        condition = self._conditioner.condition_rows(context, self._rows, packed=packed)
        return None if condition is None else condition.float().expand(self._rows, -1, -1).flatten(1).contiguous()

    def change(self, context: Tensor | None) -> None:
        """Changes what is added to tokens; as `BlockDecoder.change`."""
        if context is not None and context.is_floating_point():
            context = context.float()
        self._shared = self._condition(context)
        if not self._state.condition_tokens:
            self._state = replace(self._state, condition=self._shared)

    def forget(self, tokens: int, layout: Layout) -> None:
        """Drops the first tokens of the caches; `layout` is that of the tokens that then fill them."""
        self._state.forget(self._weights.head_dim, tokens)
        query, key = (later(table, layout.begin) for table in (self._query, self._key))
        self._state = replace(self._state, query_rotation=query, key_rotation=key)

    def halve(self) -> None:
        """Keeps the first half of the rows."""
        state, rows = self._state, self._rows // 2
        self._rows = rows
        self._shared = None if self._shared is None else self._shared[:rows].clone()
        self._state = replace(
            state,
            keys=state.keys[:, :rows].clone(),
            values=state.values[:, :rows].clone(),
            temperature=state.temperature[:rows].clone(),
            condition=None if state.condition is None else state.condition[:rows].clone(),
        )

    @staticmethod
    def runs(conditioner: Conditioner, precision: Precision) -> bool:
        """Whether a network decodes natively: in float32 or less, outside `starflow_ext.reference_mode`."""
        return _how(conditioner, precision) is not None

    def tell(self, frame: int, frame_conditions: Tensor | None, before: Tensor | None) -> None:
        """What the frames `frame ..` of the layout are told; as `BlockDecoder.tell`."""
        rows, held = self._conditioner.embed_frames(frame_conditions), self._state.condition
        assert held is not None
        begin = frame * self._frame_tokens // self._state.condition_tokens
        added = torch.zeros((), device=held.device) if self._shared is None else self._shared[:, None]
        if rows is not None:
            each = self._frame_tokens // self._state.condition_tokens
            added = added + rows.float().repeat_interleave(each, 1)
        if before is not None:
            assert self._previous is not None
            added = added + self._conditioner.previous_rows(before.float(), self._previous.weight)
        held[:, begin : begin + added.shape[1]] = added

    @property
    def cost_key(self) -> str:
        """A name of everything that the cost of a row depends on."""
        weights = self._weights.proj_in.weight.storage
        kernels = native.selected_isa() if self._weights.device.type == "cpu" else "cuda"
        return f"{kernels}-{weights}-{self._how.product_input or weights}-{self._how.cache}"

    def window(self, previous: Tensor, start: int | Tensor, final: Tensor | None = None) -> Affine:
        """Affine maps of the tokens `start ..`; as `Conditioner.window`."""
        first = self._conditioner.first_token - self._state.text_tokens
        slots = torch.as_tensor(start).expand(previous.shape[0]) - first
        keep = None if final is None else final - first
        raw = self._sweep(previous.float(), slots.contiguous(), keep=keep)
        return Affine(raw.to(previous.dtype), self._conditioner.activation, self._conditioner.soft_clip)

    @property
    def out_channels(self) -> int:
        """Channels that the network puts out for a token."""
        return self._weights.proj_out.weight.out_channels

    def solve(self, progress: SolveProgress, z: Tensor, **options: Any) -> SweepCount:
        """Sweeps of the window schedule in place; the options are those of `starflow_ext.ops.jacobi_solve`."""
        c = self._conditioner
        return ops.jacobi_solve(
            self._weights,
            self._state,
            progress,
            z,
            first_token=c.first_token,
            activation=c.activation,
            soft_clip=c.soft_clip,
            product_input=self._how.product_input,
            **options,
        )

    def _sweep(self, rows: Tensor, start: Tensor, *, keep: Tensor | None = None, text: bool = False) -> Tensor:
        return ops.jacobi_sweep(
            self._weights, self._state, rows, start, keep=keep, product_input=self._how.product_input, text=text
        )


@dataclass(frozen=True)
class NativeWindow:
    """The window schedule of the solver on a native network (see `starflow.solver.WindowSweeps`).

    Args:
        network: of the block.
        frame_tokens: tokens of a frame.
        guidance: active, or None.
    """

    network: NativeNetwork
    frame_tokens: int
    guidance: Guidance | None

    def begin(self, x: Tensor, first: int) -> SolveProgress:
        """Where a solve of the tokens `first ..` starts; x is (batch, tokens + 1, channels)."""
        halves = 1 if self.guidance is None else 2
        return SolveProgress.begin(x, first, halves=halves, out_channels=self.network.out_channels)

    def sweep(
        self, progress: SolveProgress, z: Tensor, first: int, size: int, tolerance: float, most_sweeps: int
    ) -> SweepCount:
        """Up to `most_sweeps` sweeps in place; see `starflow_ext.ops.jacobi_solve`."""
        guided, weight = "gaussian", 0.0
        if self.guidance is not None:
            weight = self.guidance.weight
            if self.guidance.kind == "linear":
                guided = self.guidance.parts + ("+" if self.guidance.annealed else "")
        return self.network.solve(
            progress,
            z,
            first=first,
            frame_tokens=self.frame_tokens,
            window=size,
            tolerance=tolerance,
            guidance=weight,
            guided=guided,
            most_sweeps=most_sweeps,
        )
