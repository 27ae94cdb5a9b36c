"""Decoding: the inverse of a flow in progress, from frames of noise to frames of data.

Noise comes in as it is drawn and frames go out as they become final, so a clip of any length takes the memory of its
window. `starflow.decode` is a decoding that is given everything at once.

The deep block decodes in windows of `Span.frames` frames (the solver's `Window` counts tokens). When a window is full,
the next one begins: the last frames of the clip are given to it, at positions counted from 0 (Gu et al., STARFlow-V,
2025). Blocks that see one frame at a time have no windows of frames. A deep block that was trained to attend to the
last frames alone (`flow.attention_frames`) needs none either: its cache rolls (`starflow.solver.rolling`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import nan
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from starflow.model import FlowBlock, Guidance, to_grid, to_sequence
from starflow.schedules import Chunks, Schedule, Window
from starflow.solver.decoder import BlockDecoder
from starflow.solver.loop import Inversion
from starflow.solver.native import Precision
from starflow.solver.report import SolveReport
from starflow.solver.rolling import RollingInversion, rolling_frames

if TYPE_CHECKING:
    from starflow.model import Flow

# Makes the context of a new window: takes how many last frames it has, and returns the output of the deep block at
# them.
Renew = Callable[[int], Tensor]


@dataclass(frozen=True)
class Conditions:
    """Condition, guidance and way of solving, the same for all blocks of a decoding.

    Args:
        y, null: text or labels of the samples, and of the unconditional half; None without.
        guidance: how the two are combined.
        schedule: of the solver.
        temperature: divides the attention logits.
        precision: of native decoding.
        image: the clip is an image (no time).
    """

    y: Tensor | None
    null: Tensor | None
    guidance: Guidance
    schedule: Schedule
    temperature: float = 1.0
    precision: Precision = "float32"
    image: bool = False


@dataclass(frozen=True)
class Span:
    """How much of a clip the deep block sees.

    Args:
        frames: latent frames that the deep block attends to at most; then it begins anew with a context. With `behind`
            frames that its cache holds.
        context: how many of these frames were decoded before; None where the clip is no longer than `frames`.
        sink: how many frames of the context are the first ones of the clip; the others are the last decoded ones.
        behind: frames that the block sees before each, where its cache rolls; None where it does not.

    Raises:
        ValueError: a context that leaves no room for a new frame, or a sink that leaves none for the last decoded one;
            frames that leave no room for a new one behind `behind`.
    """

    frames: int
    context: int | None = None
    sink: int = 0
    behind: int | None = None

    def __post_init__(self) -> None:
        if self.behind is not None and not (1 <= self.behind < self.frames and self.context is None):
            raise ValueError(
                f"flow: attention_frames is {self.behind}, expected 1 to {self.frames - 1} for a cache that holds "
                f"{self.frames} frames and rolls, without a context"
            )
        if self.context is None:
            return
        if not 1 <= self.context < self.frames:
            raise ValueError(
                f"flow: context_frames is {self.context}, expected 1 to {self.frames - 1} (local_attn_window is "
                f"{self.frames})"
            )
        if not 0 <= self.sink < self.context:
            raise ValueError(f"flow: sink_frames is {self.sink}, expected 0 to {self.context - 1} (below the context)")

    @classmethod
    def rolling(cls, behind: int, frame_tokens: int) -> Span:
        """Of a block that sees `behind` frames of `frame_tokens` tokens before each."""
        return cls(rolling_frames(behind, frame_tokens), behind=behind)

    @property
    def endless(self) -> bool:
        """Whether a clip may be longer than `frames`."""
        return self.context is not None or self.behind is not None

    @staticmethod
    def default_context(frames: int) -> int:
        """Three quarters of the frames, to the nearest, of two the smaller, at least one: 16 of 21 as published."""
        return max(1, (3 * frames + 1) // 4)


class Decoding:
    """Noise to data, frame by frame.

    Args:
        flow: in eval mode.
        shape: of a frame of all clips, (batch, channels, height, width).
        conditions: text and way of solving, as `starflow.solver.checked` returns them.
        span: of the deep block.
        known: inputs of each block at given frames, as `Flow.known` returns them; these frames are not returned. None
            without given frames.
        known_conditions: vectors of the given frames (batch, frames, frame_dim), NaN for none; None for none at all.
        renew: makes the context of a new window; None takes the deep block's output as it was decoded.
        trace: reports have an entry for every sweep, and so grow with the clip.

    Raises:
        ValueError: more given frames than the window has.
    """

    def __init__(
        self,
        flow: Flow,
        shape: tuple[int, ...],
        conditions: Conditions,
        span: Span,
        *,
        known: tuple[Tensor, ...] | None = None,
        known_conditions: Tensor | None = None,
        renew: Renew | None = None,
        trace: bool = False,
    ) -> None:
        batch, _, height, width = shape
        size = (batch, height // flow.config.patch_size, width // flow.config.patch_size)
        self._flow = flow
        deep, *shallow = flow.solving_order()
        given = {block.index: None if known is None else known[block.index] for block in (deep, *shallow)}
        self._deep: _Causal | _Rolling
        if span.behind is not None:
            self._deep = _Rolling(deep, size, conditions, span, given[deep.index], trace=trace)
        else:
            self._deep = _Causal(deep, size, conditions, span, given[deep.index], renew, trace=trace)
        if self._deep.reads_frames and known is not None:
            self._deep.tell(known[0].shape[1], known_conditions)
        self._shallow: list[_Local | _Causal | None] = []
        for block in shallow:
            if block.conditioner is None:
                self._shallow.append(None)
            elif block.frame_local:
                self._shallow.append(_Local(block, batch, conditions, trace=trace))
            else:
                # Sees all frames, as long as the clip is no longer than the window (`Span.context` is None).
                self._shallow.append(_Causal(block, size, conditions, span, given[block.index], None, trace=trace))

    @property
    def reports(self) -> tuple[SolveReport | None, ...]:
        """Of each block in the order of solving, the deep one first; None for an identity block."""
        return self._deep.report(), *(None if stage is None else stage.report() for stage in self._shallow)

    @property
    def room(self) -> int:
        """Frames of noise that the window still takes, or the next one where all frames of this one were pulled."""
        return self._deep.room

    @property
    def done(self) -> bool:
        """Whether every frame was pulled and none may come."""
        return self._deep.done

    def push(self, z: Tensor, *, more: bool, frame_conditions: Tensor | None = None) -> None:
        """Takes noise.

        Args:
            z: of further frames (batch, frames, channels, height, width).
            more: whether there may be more frames after them.
            frame_conditions: vectors of these frames (batch, frames, frame_dim), NaN for none; None for none at all.
        """
        if self._deep.reads_frames:
            self._deep.tell(z.shape[1], frame_conditions)
        self._deep.push(self._flow.noise_grid(z), more=more)

    def pull(self, *, together: bool = False) -> Tensor | None:
        """The next frames of data, once they are final: (batch, frames, channels, height, width).

        Args:
            together: solve the whole window in fewer calls, where otherwise frames are returned as soon as one is
                final.

        Returns:
            Frames; None where noise is missing.
        """
        while (frames := self._deep.pull(together=together)) is not None:
            for stage in self._shallow:
                frames = frames if stage is None else stage.solve(frames, more=not self._deep.done)
            if frames.shape[1]:
                return self._flow.from_grid(frames)
        return None

    def rest(self) -> list[Tensor]:
        """Solves all frames whose noise is at hand; returns the output grids of each block, the deep one first."""
        grids = [self._deep.rest()]
        for stage in self._shallow:
            grids.append(grids[-1] if stage is None else stage.solve(grids[-1], more=not self._deep.done))
        return grids

    def change(self, y: Tensor | None) -> None:
        """Changes the text of all frames that were not pulled yet; those of them that were solved are solved again."""
        for stage in (self._deep, *self._shallow):
            if stage is not None:
                stage.change(y)


_Kept: TypeAlias = tuple[tuple[int, int], Callable[[Precision, Tensor | None], BlockDecoder], BlockDecoder, Tensor]


class _Stage:
    """One block of a decoding."""

    def __init__(self, block: FlowBlock, batch: int, conditions: Conditions, *, trace: bool) -> None:
        self.block, self.conditions, self._batch, self._trace = block, conditions, batch, trace
        self._report: SolveReport | None = None
        # The decoder in use, with its rows and frames, a function that makes others like it, and the order of its
        # tokens.
        self._kept: _Kept | None = None
        # Vectors of the frames of the window and of those that wait, NaN where there is none.
        self._vectors = block.guess.new_empty(batch, 0, block.config.frame_dim)
        # Those of the frames that the decoder sees; None for a block that reads none.
        self._told: Tensor | None = None

    def change(self, y: Tensor | None) -> None:
        """Takes another text for what is to come."""
        self.conditions, self._kept = replace(self.conditions, y=y), None

    @property
    def reads_frames(self) -> bool:
        """Whether the block reads a vector of each frame."""
        return self.block.conditioner is not None and self.block.conditioner.proj_frame is not None

    def tell(self, frames: int, frame_conditions: Tensor | None) -> None:
        """Takes the vectors of the next frames, of which there are so many; None where they have none."""
        told = self._none(frames) if frame_conditions is None else frame_conditions.to(self._vectors)
        assert told is not None
        self._vectors = torch.cat([self._vectors, told], 1)

    def _none(self, frames: int) -> Tensor | None:
        """Vectors of frames that have none; None for a block that reads none."""
        if not self.reads_frames:
            return None
        return self._vectors.new_full((self._batch, frames, self._vectors.shape[2]), nan)

    def _texts(self) -> tuple[Tensor | None, Tensor | None]:
        """What the block reads, for the samples and for the unconditional half."""
        reads = self.block.config.num_classes or self.block.config.text_width(self.block.index)
        return (self.conditions.y, self.conditions.null) if reads else (None, None)

    def _solve(
        self, schedule: Schedule, known: Tensor, frames: int, before: Tensor | None = None
    ) -> tuple[Inversion, Tensor]:
        """A solve of `frames` frames, of which those of the folded grid `known` are given, and the order of tokens.

        A window that goes on from another one has the token (batch, 1, channels) `before` it.
        """
        rows, _, height, width, _ = known.shape
        if self._kept is None or self._kept[0] != (rows, frames):
            make, order = self._decoders(rows, frames, height, width)
            self._kept = (rows, frames), make, make(self.conditions.precision, self._told), order
        elif self._told is not None:
            self._kept[2].tell(0, self._told)
        # A decoder may be used again: a solve writes every slot that it reads, but for those of the text, which stays.
        _, decoder, own, order = self._kept
        first = to_sequence(known, order[: known[0, ..., 0].numel()])
        self._tell_known(own, first)
        return Inversion(own, schedule, first, lambda: self._judge(decoder("float32", self._told)), before), order

    def _tell_known(self, decoder: BlockDecoder, tokens: Tensor) -> None:
        """Tells a decoder what stands before each of the given tokens, of a block that reads that."""

    def _judge(self, decoder: BlockDecoder) -> BlockDecoder:
        """A fresh decoder, told all that it needs to certify the window."""
        return decoder

    def _decoders(
        self, rows: int, frames: int, height: int, width: int
    ) -> tuple[Callable[[Precision, Tensor | None], BlockDecoder], Tensor]:
        """What makes a decoder of a precision, with vectors of its frames, for `rows` (folded) samples; their order."""
        block, c = self.block, self.conditions
        context, null = (block.fold_labels(text, rows // self._batch) for text in self._texts())
        layout = block.layout(frames, height, width, context, image=c.image)
        guided = c.guidance if block.top or (c.guidance.all_blocks and not block.config.cond_top_only) else None
        return partial(BlockDecoder, block, layout, rows, context, null, guided, c.temperature), layout.order

    def _add(self, report: SolveReport) -> SolveReport:
        report = report if self._trace else replace(report, accepted=(), passes=())
        return report if self._report is None else self._report.then(report)


class _Local(_Stage):
    """A block that sees each frame for itself."""

    def solve(self, frames: Tensor, *, more: bool) -> Tensor:
        """Solved frames."""
        folded = self.block.fold(frames)
        solve, order = self._solve(self._schedule(), folded[:, :0], 1)
        solve.extend(to_sequence(folded, order))
        solve.run(solve.tokens)
        report = solve.report()
        # Frames are rows of the batch here; the report counts clips.
        self._report = self._add(replace(report, tokens=report.tokens * frames.shape[1], samples=frames.shape[0]))
        return to_grid(solve.x, order, 1, *folded.shape[2:4]).reshape(frames.shape)

    def _schedule(self) -> Schedule:
        schedule = self.conditions.schedule
        if isinstance(schedule, Window) and schedule.size is not None:
            # The size is the same for one frame and for many in a call: a frame must not depend on how many are solved
            # together.
            return replace(schedule, size=-(-schedule.size // LOCAL_SHARE))
        return schedule

    def report(self) -> SolveReport | None:
        """What was done; None before the first frame."""
        return self._report


# A frame of a frame-local block takes one part in so many of the size of the schedule's window.
LOCAL_SHARE = 6


class _Causal(_Stage):
    """A block that sees all frames of a window."""

    def __init__(
        self,
        block: FlowBlock,
        size: tuple[int, int, int],
        conditions: Conditions,
        span: Span,
        known: Tensor | None,
        renew: Renew | None,
        *,
        trace: bool,
    ) -> None:
        super().__init__(block, size[0], conditions, trace=trace)
        given = 0 if known is None else known.shape[1]
        if given > span.frames or (given == span.frames and span.context is None):
            fewer = "at most local_attn_window" if span.context is not None else "fewer than the"
            raise ValueError(f"flow: prefix has {given} frames, expected {fewer} {span.frames}")
        self._size, self._span, self._renew = size, span, renew
        self._queue: Tensor | None = None  # noise that is not in the window yet
        self._more = True
        self._out = 0  # frames of the window that are given or were pulled
        self._first: Tensor | None = None  # the sink
        self._open: tuple[Inversion, Tensor] | None = None
        self._known = known
        self._before: Tensor | None = None  # the last token before the window, for chunks
        conditioner = block.conditioner
        # The network that reads the frames before at each token's own place, if it does: then a frame is solved when
        # those before it are final, as in a cache that rolls.
        self._sees = conditioner if conditioner is not None and conditioner.previous_frames else None

    @property
    def done(self) -> bool:
        """Whether every frame was pulled and none may come."""
        return not self._more and self._queue is None and self._open_is_pulled

    @property
    def _open_is_pulled(self) -> bool:
        return self._open is None or self._in_window == self._out

    @property
    def room(self) -> int:
        """Frames that the window takes beyond the waiting noise, or the next one where all frames were pulled."""
        waiting = 0 if self._queue is None else self._queue.shape[1]
        taken = (0 if self._known is None else self._known.shape[1]) if self._open is None else self._in_window
        if taken == self._span.frames and self._span.context is not None and self._open_is_pulled:
            taken = self._span.context
        return max(self._span.frames - taken - waiting, 0)

    def push(self, z: Tensor, *, more: bool) -> None:
        """Takes noise."""
        self._more = more
        if not z.shape[1]:
            return
        self._queue = z if self._queue is None else torch.cat([self._queue, z], 1)

    def pull(self, *, together: bool) -> Tensor | None:
        """The next final frames, at least one, or all of the window; None where noise is missing."""
        frames = self._pull(together=together)
        if self._sees is None or not together or frames is None:
            return frames
        parts = [frames]
        # Not beyond the window: the next one may begin with what is made of these frames.
        while self._queue is not None and self._in_window < self._span.frames:
            some = self._pull(together=True)
            assert some is not None
            parts.append(some)
        return torch.cat(parts, 1)

    def _pull(self, *, together: bool) -> Tensor | None:
        if self.block.backwards and self._more:
            return None
        self._fill()
        if self._open is None or self._out == self._in_window:
            return None
        solve, order = self._open
        _, height, width = self._size
        area = height * width
        whole = together or self.block.backwards
        final = solve.run(solve.tokens if whole else (self._out + 1) * area) // area
        begin, self._out = self._out, final
        if self.block.backwards:
            return to_grid(solve.x, order, final, height, width)[:, begin:]
        return self._grid(solve.x, order, begin, final)

    def rest(self) -> Tensor:
        """All frames whose noise is at hand."""
        frames = []
        while (some := self.pull(together=True)) is not None:
            frames.append(some)
        return torch.cat(frames, 1)

    def solve(self, frames: Tensor, *, more: bool) -> Tensor:
        """Takes frames and solves those whose noise is at hand."""
        self.push(frames, more=more)
        some = self.pull(together=True)
        return frames[:, :0] if some is None else some

    def change(self, y: Tensor | None) -> None:
        """Takes another text, and begins a new window behind the last frame that was pulled."""
        super().change(y)
        if self._open is None:
            return
        solve, order = self._open
        if self._out < self._in_window:
            waiting = self._grid(solve.z, order, self._out, self._in_window)
            self._queue = waiting if self._queue is None else torch.cat([waiting, self._queue], 1)
        self._close(self._out if self._span.context is None else min(self._span.context, self._out))

    def report(self) -> SolveReport | None:
        """What was done in all windows; None before the first frame."""
        return self._report if self._open is None else self._add(self._open[0].report())

    @property
    def _in_window(self) -> int:
        assert self._open is not None
        return self._open[0].tokens // (self._size[1] * self._size[2])

    def _fill(self) -> None:
        """Moves waiting noise into the window; opens the next one when all frames of a full window were pulled."""
        while self._queue is not None:
            if self._open is None:
                known = self._queue[:, :0] if self._known is None else self._known
                self._told = self._none(self._span.frames)
                if self._told is not None:
                    self._told[:, : known.shape[1]] = self._vectors[:, : known.shape[1]]
                self._open = self._solve(self.conditions.schedule, known, self._span.frames, self._before)
                self._out, self._known = known.shape[1], None
            begin = self._in_window
            room = self._span.frames - begin
            if self._sees is not None:
                room = min(room, 1) if self._out == begin else 0
            if room:
                noise, rest = self._queue[:, :room], self._queue[:, room:]
                self._queue = rest if rest.shape[1] else None
                solve, order = self._open
                self._tell_decoder(begin, begin + noise.shape[1])
                tokens = noise[0, ..., 0].numel()
                more = self._sees is None and begin + noise.shape[1] < self._span.frames and self._more
                solve.extend(to_sequence(noise, order[:tokens]), more=more)
            if self._out < self._in_window or self._queue is None:
                return
            if self._span.context is None:
                raise ValueError(
                    f"flow: frame {self._span.frames} is asked for, expected at most {self._span.frames} frames: the "
                    "flow has no sliding window (local_attn_window)"
                )
            self._close(self._span.context)

    def _tell_decoder(self, begin: int, end: int) -> None:
        """Gives the decoder the vectors of the frames `begin .. end - 1` of the window, and what stands before them."""
        assert self._kept is not None
        assert self._open is not None
        before = None
        if self._sees is not None:
            area = self._size[1] * self._size[2]
            before = self._sees.before_next(self._open[0].x[:, : begin * area], area)
        if self._told is not None:
            self._told[:, begin:end] = self._vectors[:, begin:end]
        if self._told is not None or before is not None:
            self._kept[2].tell(begin, None if self._told is None else self._told[:, begin:end], before)

    def _tell_known(self, decoder: BlockDecoder, tokens: Tensor) -> None:
        if self._sees is None:
            return
        # Of the whole window: a decoder that is used again holds what it was told of another one.
        missing = decoder.tokens - tokens.shape[1]
        decoder.tell(0, self._told, self._sees.of_previous(F.pad(tokens, (0, 0, 0, missing)), decoder.frame_tokens))

    def _judge(self, decoder: BlockDecoder) -> BlockDecoder:
        if self._sees is not None and self._open is not None:
            self._tell_known(decoder, self._open[0].x)
        return decoder

    def _close(self, carried: int) -> None:
        """Ends the window; the next one begins with `carried` frames of it."""
        assert self._open is not None
        solve, order = self._open
        self._report = self._add(solve.report())
        if self._span.sink and self._first is None:
            self._first = self._grid(solve.x, order, 0, self._span.sink)
        sink = self._span.sink if carried > self._span.sink else 0
        last = carried - sink
        self._vectors = torch.cat([self._vectors[:, :sink], self._vectors[:, self._out - last :]], 1)
        if self._renew is not None:
            self._known = self._renew(last)
        else:
            self._known = self._grid(solve.x, order, self._out - last, self._out)
        if sink and self._first is not None:
            self._known = torch.cat([self._first, self._known], 1)
        begin = (self._out - last) * self._size[1] * self._size[2]
        if begin and isinstance(self.conditions.schedule, Chunks):
            self._before = solve.x[:, begin - 1 : begin]
        self._open = None

    def _grid(self, sequence: Tensor, order: Tensor, begin: int, end: int) -> Tensor:
        """Frames of a sequence that goes forward in time, as a grid."""
        area = self._size[1] * self._size[2]
        tokens = sequence[:, begin * area : end * area]
        return to_grid(tokens, order[: (end - begin) * area], end - begin, *self._size[1:])


class _Rolling(_Stage):
    """A deep block that attends to the last frames alone."""

    def __init__(
        self,
        block: FlowBlock,
        size: tuple[int, int, int],
        conditions: Conditions,
        span: Span,
        known: Tensor | None,
        *,
        trace: bool,
    ) -> None:
        super().__init__(block, size[0], conditions, trace=trace)
        self._size, self._span, self._known = size, span, known
        self._queue: Tensor | None = None  # noise that is not decoded yet
        self._more = True
        self._open: tuple[RollingInversion, Tensor] | None = None
        self._frames = 0  # that were given or solved

    @property
    def done(self) -> bool:
        """Whether every frame was pulled and none may come."""
        return not self._more and self._queue is None

    @property
    def room(self) -> int:
        """Frames that may wait beside those that do: no more than the cache holds."""
        return max(self._span.frames - (0 if self._queue is None else self._queue.shape[1]), 0)

    def push(self, z: Tensor, *, more: bool) -> None:
        """Takes noise."""
        self._more = more
        if z.shape[1]:
            self._queue = z if self._queue is None else torch.cat([self._queue, z], 1)

    def pull(self, *, together: bool) -> Tensor | None:
        """The next frame, or all whose noise is at hand; None where noise is missing."""
        if self._queue is None:
            return None
        count = self._queue.shape[1] if together else 1
        now, rest = self._queue[:, :count], self._queue[:, count:]
        self._queue = rest if rest.shape[1] else None
        solve, order = self._opened(now)
        _, height, width = self._size
        solved = []
        for frame in now.split(1, 1):
            self._count(solve)
            tokens = solve.solve(to_sequence(frame, order), self._next_vector())
            solved.append(to_grid(tokens, order, 1, height, width))
        return torch.cat(solved, 1)

    def rest(self) -> Tensor:
        """All frames whose noise is at hand."""
        frames = self.pull(together=True)
        assert frames is not None
        return frames

    def change(self, y: Tensor | None) -> None:
        """Takes another text; no frame is solved before it is pulled."""
        super().change(y)
        if self._open is not None:
            self._open[0].change(*self._texts())

    def report(self) -> SolveReport | None:
        """What was done; None before the first frame."""
        return None if self._open is None else self._open[0].report()

    def _opened(self, like: Tensor) -> tuple[RollingInversion, Tensor]:
        """The solve, to which given frames were given, and the order of the tokens of a frame."""
        if self._open is None:
            rows, height, width = self._size
            make, order = self._decoders(rows, self._span.frames, height, width)
            order = order[: height * width]
            assert self._span.behind is not None
            solve = RollingInversion(
                make(self.conditions.precision, self._none(self._span.frames)),
                self.conditions.schedule,
                self._span.behind,
                to_sequence(like[:, :0], order[:0]),
                lambda: make("float32", self._none(self._span.frames)),
                trace=self._trace,
            )
            self._open = solve, order
            if self._known is not None:
                for frame in self._known.to(like.dtype).split(1, 1):
                    self._count(solve)
                    solve.give(to_sequence(frame, order), self._next_vector())
                self._known = None
        return self._open

    def _count(self, solve: RollingInversion) -> None:
        """Counts the next frame, given or not; guidance ends before the first one that is not to be guided."""
        if self._frames == self.conditions.guidance.frames:
            solve.unguide()
        self._frames += 1

    def _next_vector(self) -> Tensor | None:
        """The vector of the next frame, (batch, 1, frame_dim); None for a block that reads none."""
        if not self.reads_frames:
            return None
        vector, self._vectors = self._vectors[:, :1], self._vectors[:, 1:]
        return vector
