"""Session: clips that grow frame by frame, in the memory of one window, or of a cache that rolls.

Noise goes through the flow, the denoiser and the codec, and a frame comes out as soon as nothing can change it any
more: the deep block is past it, the shallow blocks are solved for it, and the frames that the denoiser looks ahead at
are there. `starflow.sample.Pipeline.sample` is a session that is extended once.

Reference: Gu et al., STARFlow-V (2025), streaming generation.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from starflow import noise
from starflow.arguments import check_flag
from starflow.codecs import Codec, tell_scale
from starflow.data import action_vector
from starflow.inference import in_inference_mode, without_autocast
from starflow.messages import shown
from starflow.model import Flow, compared_once
from starflow.numeric import integer
from starflow.sampling.cleaning import Denoising, score_denoise
from starflow.solver import Conditions, Decoding, SolveReport, Span, checked

# Maps prompts to text features or class labels (batch, ...); returns None for a flow without a condition.
Reader = Callable[[Sequence[str]], Tensor | None]


@dataclass(frozen=True)
class Frames:
    """Frames that are final.

    Args:
        first: index in the clip of the first of these latent frames; given frames count.
        pixels: (clips, frames, channels, height, width) in [-1, 1].
        latents: clean latents (clips, latent frames, channels, height, width).
        noisy: output of the flow, of the shape of `latents`.
    """

    first: int
    pixels: Tensor
    latents: Tensor
    noisy: Tensor


class Session:
    """Clips that are generated frame by frame, from a given beginning or from none, to any length.

    The frames do not depend on how many are asked for at once. In native code, at one CPU level, frames taken one by
    one equal those taken at once, to the last bit, with any schedule but `Chunks`.

    Args:
        flow: in eval mode, on the device of all tensors.
        codec: maps latents to pixels.
        shape: shape of a latent frame of all clips, (clips, channels, height, width).
        seeds: seed of the noise of each clip.
        conditions: text, guidance and how to solve.
        span: frames that the deep block sees; the clip ends with them where no new window begins and no cache rolls.
        denoising: how frames are cleaned.
        temperature: factor of the noise.
        read: turns prompts into text features; None for a session that is given features.
        renew: whether the frames that a new window begins with are cleaned and given fresh noise.

    Raises:
        ValueError: arguments that do not fit the flow, or `renew` where a cache rolls.

    Example:
        >>> from starflow.sampling.pipeline import Pipeline
        >>> session = Pipeline.load("runs/mine").session("a three moving up", seed=1)  # doctest: +SKIP
        >>> for frames in session.extend(100):  # doctest: +SKIP
        ...     show(frames.pixels)
    """

    def __init__(
        self,
        flow: Flow,
        codec: Codec,
        shape: tuple[int, int, int, int],
        seeds: tuple[int, ...],
        conditions: Conditions,
        span: Span,
        denoising: Denoising,
        *,
        temperature: float = 1.0,
        read: Reader | None = None,
        renew: bool = False,
    ) -> None:
        self._flow, self._codec, self.shape, self.seeds = flow, codec, shape, seeds
        self._device = next(flow.parameters()).device
        self.conditions = self._checked(conditions)
        self._span, self.denoising, self.temperature = span, denoising, temperature
        check_flag("session", "renew", renew)
        if renew and span.behind is not None:
            raise ValueError("session: renew is True, expected False where a cache rolls: no window begins anew")
        self._read, self._renew = read, renew
        # The given frames that the clips were begun with.
        self.beginning: Frames | None = None
        # Noise, or a number of frames, to extend the clips by, where `Pipeline.session` set it.
        self.planned: Tensor | int | None = None
        self._reference = 0  # given frames that the clips refer to and do not contain
        self._decode = codec.decoder()
        self._decoding: Decoding | None = None
        self._guided_reports: tuple[SolveReport | None, ...] = ()  # of frames that were guided and renewed
        # Noise that is decoded next, or the number of frames that noise is drawn for.
        self._sources: deque[Tensor | float] = deque()
        self._known: tuple[Tensor, ...] | None = None
        self._last = False
        self._texts: list[tuple[int, Tensor | None]] = [(0, self.conditions.y)]
        self._noisy = torch.empty(shape[0], 0, *shape[1:], dtype=torch.float32, device=self._device)
        self._begin = 0  # index of the first frame in `_noisy`
        self._next = 0  # index of the next frame that goes out
        self._drawn = 0  # index of the next frame whose noise is read
        self._clean = self._noisy
        # Vectors of the frames from `_begin` on, as far as they were told; NaN for a frame without.
        self._vectors = torch.empty(shape[0], 0, flow.config.frame_dim, dtype=torch.float32, device=self._device)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A session is in the middle of what it computes: a file of it, or a copy that shares its caches, is none."""
        raise TypeError(
            "session: it cannot be pickled or copied, expected copy.deepcopy, or another session with the same seeds"
        )

    def __deepcopy__(self, known: dict[int, Any]) -> Session:
        made = object.__new__(type(self))
        known[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, known))
        return made

    @property
    def frames(self) -> int:
        """Latent frames of the clips that are given or went out."""
        return self._next - self._reference

    @property
    def in_one_window(self) -> bool:
        """Whether the frames that are given, went out or were planned end before a second window begins."""
        return self._span.context is not None and self.planned_frames <= self._span.frames

    @property
    def planned_frames(self) -> int:
        """Latent frames that are given, went out or were planned; those of a reference count."""
        planned = self.planned.shape[1] if isinstance(self.planned, Tensor) else self.planned or 0
        return self._next + planned

    @property
    def endless(self) -> bool:
        """Whether the clips may go on for ever: a window follows the one before, or a cache rolls."""
        return self._span.endless

    @property
    def reports(self) -> tuple[SolveReport | None, ...]:
        """The solver's report of each block, the deep one first; None for an identity block, or one not yet solved."""
        if self._decoding is None:
            return self._guided_reports
        reports = self._decoding.reports
        if not self._guided_reports:
            return reports
        both = zip(self._guided_reports, reports, strict=True)
        return tuple(
            before if after is None else after if before is None else before.then(after) for before, after in both
        )

    # -- what goes in -------------------------------------------------------------------------------------------------

    def prefill(
        self,
        frames: Tensor | None,
        text: str | Sequence[str] | Tensor | None = None,
        *,
        reference: Tensor | None = None,
        scaled: bool = False,
    ) -> Frames | None:
        """Begins the clips with given frames, once, before any other.

        Args:
            frames: pixels (clips, frames, channels, height, width) in [-1, 1]; None with a reference alone.
            text: as for `change`; None keeps what the session was made with.
            reference: frames like `frames` that the clips refer to and do not show, such as the frame that they end
                with. They are encoded alone and stand before the first frame, as in training; `Span.sink` keeps them
                in every window.
            scaled: the pixels are known to be in [-1, 1], as those of files are; the log tells of others that look like
                [0, 1].

        Returns:
            The given frames with their latents, clean and with the noise that the flow sees.

        Raises:
            ValueError: frames or text that do not fit, no frame, or more than the window has (a cache that rolls takes
                any number).
        """
        if not scaled:
            _tell_scale(reference=reference, frames=frames)
        beginning = self._prefill(frames, text, reference)
        if beginning is not None:
            self.beginning = beginning
        return beginning

    @in_inference_mode
    def _prefill(
        self, frames: Tensor | None, text: str | Sequence[str] | Tensor | None, reference: Tensor | None
    ) -> Frames | None:
        if self._decoding is not None or self._drawn:
            raise ValueError("session: prefill comes after frames, expected it before the first one, and once")
        given = [("reference", reference), ("frames", frames)]
        encoded = {name: self._encoded(name, pixels) for name, pixels in given if pixels is not None}
        if not encoded:
            raise ValueError("session: frames is None, expected frames or a reference")
        clean = torch.cat(list(encoded.values()), 1)
        count = clean.shape[1]
        most = self._span.frames - (self._span.context is None)
        if count > most and self._span.behind is None:
            raise ValueError(f"session: {count} latent frames are given, expected at most {most} (the window)")
        if text is not None:
            self.change(text)
        if reference is not None:
            # A reference has no vectors, and those that were told are of the frames behind it.
            self._reference = encoded["reference"].shape[1]
            none = self._vectors.new_full((self.shape[0], self._reference, self._vectors.shape[2]), math.nan)
            self._vectors = torch.cat([none, self._vectors], 1)
        noisy = clean + self.denoising.sigma * self._draw(0, count, "train")
        self._known = self._flow.known(noisy, self.conditions.y, self.shape[1:], self._vectors_of(0, count))
        self._noisy, self._clean = noisy, clean
        self._next = self._drawn = count
        if frames is not None:
            latents = encoded["frames"]
            self._decode(latents)
            return Frames(0, frames.clone(), latents, noisy[:, self._reference :].clone())
        return None

    def _encoded(self, name: str, pixels: Tensor) -> Tensor:
        """Clean latents of given pixels."""
        if pixels.dim() != 5 or pixels.shape[0] != self.shape[0] or pixels.shape[1] < 1:
            raise ValueError(
                f"session: {name} has shape {list(pixels.shape)}, expected ({self.shape[0]} clips, at least 1 frame, "
                "channels, height, width)"
            )
        clean = self._codec.encode(pixels.to(self._device))
        if not bool(clean.isfinite().all()):
            raise ValueError(f"session: {name} holds values that are not finite, expected numbers in [-1, 1]")
        if tuple(clean.shape[2:]) != self.shape[1:]:
            raise ValueError(
                f"session: {name} has latents of {list(clean.shape[2:])}, expected {list(self.shape[1:])} (channels, "
                "height, width)"
            )
        return clean

    @in_inference_mode
    def encode(
        self, frames: Tensor, text: str | Sequence[str] | Tensor | None = None, *, scaled: bool = False
    ) -> Tensor:
        """The noise of given frames: `extend` makes the same frames from it, or others under another text.

        Without guidance and with the text that they were encoded with, frames come back up to the solver's tolerance
        and the noise that the denoiser leaves.

        Args:
            frames: pixels (clips, frames, channels, height, width) in [-1, 1].
            text: text of these frames, as for `change`; None is the session's own.
            scaled: as of `prefill`.

        Returns:
            Noise for `extend`, (clips, latent frames, channels, height, width).

        Raises:
            ValueError: frames or text that do not fit; a session that was begun, or one that renews its context.
        """
        if self._drawn or self._renew:
            raise ValueError("session: encode comes after frames or with renew, expected neither")
        if not scaled:
            _tell_scale(frames=frames)
        clean = self._encoded("frames", frames)
        conditions = self.conditions if text is None else self._told(text)
        noisy = clean + self.denoising.sigma * self._draw(0, clean.shape[1], "train")
        window, context, sink = self._span.frames, self._span.context, self._span.sink
        if self._span.behind is not None:
            return self._flow.encode(noisy, conditions.y, self._vectors_of(0, noisy.shape[1])).z
        parts = [self._flow.encode(noisy[:, :window], conditions.y, self._vectors_of(0, min(window, noisy.shape[1]))).z]
        while (done := sum(part.shape[1] for part in parts)) < noisy.shape[1]:
            if context is None:
                raise ValueError(
                    f"session: frames has {noisy.shape[1]} latent frames, expected at most {window} (the flow has no "
                    "sliding window)"
                )
            before = torch.cat([noisy[:, :sink], noisy[:, done - context + sink : done]], 1)
            new = noisy[:, done : done + window - context]
            clip = torch.cat([before, new], 1)
            places = [(0, sink), (done - context + sink, done + new.shape[1])]
            told = [self._vectors_of(*place) for place in places]
            vectors = torch.cat([some for some in told if some is not None], 1) if told[0] is not None else None
            parts.append(self._flow.encode(clip, conditions.y, vectors).z[:, context:])
        return torch.cat(parts, 1)

    @without_autocast()
    @torch.inference_mode()
    def change(self, text: str | Sequence[str] | Tensor) -> None:
        """Changes the text of all frames that the flow has not decoded yet.

        Frames that the denoiser looked ahead at keep the old text: with a look-ahead of one, the frame that goes out
        next. A new window of the deep block begins, with the frames before it as its context; a cache that rolls goes
        on as it is.

        Args:
            text: a prompt for all clips, one for each, or features (clips, text tokens, txt_dim).

        Raises:
            ValueError: text of another width or number, a prompt that the encoder refuses, or no frame to come.
        """
        conditions = self._told(text)
        config = self._flow.config
        if self._decoding is not None:
            if config.num_classes or (config.txt_size and not config.cond_top_only):
                raise ValueError(
                    "session: text changes after the first frame, expected a flow whose deep block alone reads it "
                    "(flow.cond_top_only)"
                )
            if self._decoding.done:
                raise ValueError("session: text changes after the last frame was decoded, expected it before")
            self._decoding.change(conditions.y)
        elif self._known is not None:
            told = self._vectors_of(0, self._noisy.shape[1])
            self._known = self._flow.known(self._noisy, conditions.y, self.shape[1:], told)
        self.conditions = conditions
        have = self._begin + self._noisy.shape[1]
        self._texts.append((have, self.conditions.y))

    @torch.inference_mode()
    def tell(self, frame_conditions: Tensor) -> None:
        """Tells the vectors of the next latent frames that were told none, such as the actions that lead to them.

        Told before `prefill`, the first ones are those of the given frames. A frame that nothing is told of has none.

        Args:
            frame_conditions: (clips, frames, frame_dim), NaN for a frame without.

        Raises:
            ValueError: a flow without such vectors, or vectors that do not fit or are of frames behind the last.
        """
        if not isinstance(frame_conditions, Tensor):
            raise ValueError(
                f"session: frame_conditions is {shown(frame_conditions)}, expected a tensor (clips, frames, frame_dim)"
            )
        first, count = max(self._begin + self._vectors.shape[1], self._drawn), frame_conditions.shape[1:2].numel()
        if self._last and first + count > (end := self._drawn + self._waiting):
            raise ValueError(
                f"session: frame_conditions are of {count} frames, expected at most {end - first:g}: the clip ends "
                "(last was True)"
            )
        self._tell(first, frame_conditions, "frame_conditions")

    def _tell(self, first: int, vectors: Tensor, name: str) -> None:
        """Puts vectors at the frames `first ..`."""
        frames = vectors.shape[1] if vectors.dim() == 3 else 1
        like = torch.empty(self.shape[0], frames, *self.shape[1:], device="meta")
        # The meta tensor says which shape is meant, and nothing else.
        told = self._flow.check_frame_conditions(like, vectors, name=name, device=self._device)
        assert told is not None
        before, after = self._vectors_of(self._begin, first), self._vectors[:, first - self._begin + frames :]
        assert before is not None
        self._vectors = torch.cat([before, told.to(before.dtype), after], 1)

    def _vectors_of(self, first: int, end: int) -> Tensor | None:
        """Vectors of the frames `first .. end - 1`, (clips, frames, frame_dim); None for a flow without."""
        if not self._vectors.shape[2]:
            return None
        told = self._vectors[:, first - self._begin : end - self._begin]
        missing = end - first - told.shape[1]
        return torch.cat([told, told.new_full((told.shape[0], missing, told.shape[2]), math.nan)], 1)

    def _told(self, text: str | Sequence[str] | Tensor) -> Conditions:
        """The session's conditions with another text."""
        if isinstance(text, Tensor):
            return self._checked(replace(self.conditions, y=text))
        prompts = [text] * self.shape[0] if isinstance(text, str) else text
        if not (isinstance(prompts, Sequence) and all(isinstance(prompt, str) for prompt in prompts)):
            raise ValueError(f"session: text is {text!r}, expected a prompt, one for each clip, or features")
        if self._read is None:
            raise ValueError(f"session: text is {text!r}, expected features (the session has no text encoder)")
        if len(prompts) != self.shape[0]:
            raise ValueError(f"session: text has {len(prompts)} prompts, expected {self.shape[0]} like the clips")
        return self._checked(replace(self.conditions, y=self._read(prompts)))

    # -- what comes out -----------------------------------------------------------------------------------------------

    def extend(
        self, noise: Tensor | int | None = None, *, last: bool = False, together: bool = False
    ) -> Iterator[Frames]:
        """Goes on with the clips.

        Args:
            noise: standard normal noise of further frames, (clips, latent frames, channels, height, width), times the
                temperature where that is wanted; or a number of latent frames, whose noise follows from the seeds; None
                goes on without end.
            last: whether the clips end with these frames. Else the denoiser waits for its look-ahead frames, and as
                many frames are held back.
            together: whether the frames of a window come together, in fewer calls, or each as soon as it is final.

        Returns:
            Iterator of frames. Frames that are not taken from it go out first when the session is extended again.

        Raises:
            ValueError: noise of another shape, no frame, a clip that has ended, or vectors of frames behind its last.
            NotFiniteError: while iterating, where noise, text or weights are not finite.
        """
        check_flag("session", "last", last)
        check_flag("session", "together", together)
        if self._last:
            raise ValueError("session: extend comes after the last frame, expected it before (last was True)")
        if isinstance(noise, Tensor):
            expected = (self.shape[0], max(noise.shape[1], 1) if noise.dim() == 5 else 1, *self.shape[1:])
            if tuple(noise.shape) != expected:
                raise ValueError(
                    f"session: noise has shape {list(noise.shape)}, expected ({self.shape[0]} clips, at least 1 "
                    f"frame, {', '.join(map(str, self.shape[1:]))})"
                )
            if not noise.is_floating_point():
                raise ValueError(f"session: noise has dtype {noise.dtype}, expected a floating-point one")
            # In the precision of the weights; numbers of numpy are often in another.
            double = next(self._flow.parameters()).dtype == torch.float64
            # A copy: frames are made later, and the caller may write the next noise into the same tensor.
            self._sources.append(noise.detach().to(self._device, torch.float64 if double else torch.float32, copy=True))
        else:
            count = math.inf if noise is None else integer(noise)
            if count is None:
                raise ValueError(f"session: frames is {shown(noise)}, expected a number of them, noise or None")
            if count < 1:
                raise ValueError(f"session: frames is {noise}, expected at least 1")
            self._sources.append(count)
        length = self._drawn + self._waiting
        if not self._span.endless and length > self._span.frames:
            self._sources.pop()
            raise ValueError(
                f"session: the clip would have {length:g} latent frames, expected at most {self._span.frames} (the "
                "flow has no sliding window)"
            )
        told = self._begin + self._vectors.shape[1] - self._drawn
        if last and told > self._waiting:
            self._sources.pop()
            raise ValueError(
                f"session: vectors of {told} frames were told, expected at most {length - self._drawn:g}, those that "
                "the clip ends with (last is True)"
            )
        self._last = last
        return self._iterate(together=together)

    def step(self, condition: int | Tensor | None = None) -> Frames:
        """Goes on by one frame, the next that is not out yet.

        The denoiser sees the frames that it looks ahead at first, so that the first call decodes as many more. With
        a cache that rolls (`flow.attention_frames`), which never looks beyond the frame that it solves, frames are
        those of `extend`; and so they are otherwise, but sweeps of a window that reached beyond a frame are done again.

        Args:
            condition: what leads to this frame: the number of an action, or its vector ([clips,] frame_dim); None tells
                nothing. With a denoiser that looks ahead it is of the frame that is decoded now, which comes out as
                many frames later. Frames that were asked for before are taken first.

        Returns:
            The frame: one latent frame, and its pixels.

        Raises:
            ValueError: a condition that does not fit the flow, a clip that has ended or cannot go on, or a denoiser
                that sees whole clips.
            NotFiniteError: noise, text or weights are not finite.
        """
        vector = None if condition is None else self._vector(condition)
        if vector is not None:
            self._check_next()
        if self.denoising.whole:
            raise ValueError(
                "session: step cleans frames one by one, expected a denoiser that does not see whole clips"
            )
        if self._last:
            raise ValueError("session: step comes after the last frame, expected it before (last was True)")
        if vector is not None:
            self._tell(self._drawn, vector, "condition")
        while (frames := self._advance(together=False)) is None:
            self.extend(1)
            if vector is not None:
                self._tell(self._drawn, vector, "condition")
        return frames

    def _check_next(self) -> None:
        """Refuses a condition that would be of another frame than the one that is decoded next."""
        # Frames whose noise was read are decoded, or will be together, without what is told now.
        pending = self._drawn - self._next + self._waiting
        if pending > self.denoising.look_ahead:
            raise ValueError(
                f"session: condition is given, and {pending:g} frames that were asked for before are not out yet, "
                f"expected at most the {self.denoising.look_ahead} that the denoiser looks ahead at (take them first; "
                "`tell` tells the vectors of frames before they are asked for)"
            )
        if self._decoding is None and self._guided > 1:
            raise ValueError(
                f"session: condition is given, and the first {self._guided} frames are decoded together "
                "(guidance_frames), expected None for these, and their vectors by `tell`"
            )

    def _vector(self, condition: int | Tensor) -> Tensor:
        """A condition as vectors of one frame, (clips, 1, frame_dim)."""
        dim = self._flow.config.frame_dim
        if not dim:
            raise ValueError("session: condition is given, expected None: the flow reads none (frame_dim is 0)")
        if not isinstance(condition, Tensor):
            condition = action_vector(condition, dim, "session: condition")
        if condition.shape not in ((dim,), (self.shape[0], dim)):
            raise ValueError(
                f"session: condition has shape {list(condition.shape)}, expected [{dim}] or [{self.shape[0]}, {dim}]"
            )
        return condition.expand(self.shape[0], dim)[:, None]

    def _iterate(self, *, together: bool) -> Iterator[Frames]:
        while (frames := self._advance(together=together)) is not None:
            yield frames

    @in_inference_mode
    def _advance(self, *, together: bool) -> Frames | None:
        """The next frames, or None where noise is missing."""
        if self._decoding is None:
            if (guided := self._guided) and not self._renew_guided(guided):
                return None
            self._decoding = self._make_decoding()
            self._known = None
        while not (ready := self._ready()):
            if room := min(self._decoding.room, self._waiting):
                first, noise = self._drawn, self._take(int(room))
                told = self._vectors_of(first, self._drawn)
                self._decoding.push(noise, more=not self._last or self._waiting > 0, frame_conditions=told)
            elif self._last and not self._waiting:
                self._decoding.push(self._noisy[:, :0], more=False)
            new = self._decoding.pull(together=together)
            if new is None:
                return None
            self._noisy = torch.cat([self._noisy, new], 1)
        return self._out(ready if together or self.denoising.whole else 1)

    def _make_decoding(self) -> Decoding:
        """A decoding behind the frames that are known."""
        return Decoding(
            self._flow,
            self.shape,
            self.conditions,
            self._span,
            known=self._known,
            known_conditions=None if self._known is None else self._vectors_of(0, self._drawn),
            renew=self._renewed if self._renew else None,
            trace=False,
        )

    @property
    def _guided(self) -> int:
        """Frames to decode with guidance, clean and renew before the clips go on without; 0 where that is not so."""
        guidance = self.conditions.guidance
        if not guidance.active or guidance.frames is None or self.denoising.kind == "none":
            return 0
        count = max(guidance.frames - self._drawn, 0)
        return 0 if self._last and self._waiting <= count else count

    def _renew_guided(self, count: int) -> bool:
        """Decodes the guided frames, cleans them, and gives them fresh noise; False where noise is missing.

        Guidance leads away from the frames that the flow was trained on, and a frame carries that on to the next one.
        Cleaned, and with noise like that of training, frames are nearer to them again.
        """
        if self._waiting < count:
            return False
        decoding = self._make_decoding()
        first, z = self._drawn, self._take(count)
        decoding.push(z, more=False, frame_conditions=self._vectors_of(first, self._drawn))
        decoded = decoding.pull(together=True)
        assert decoded is not None
        self._guided_reports = decoding.reports
        known = self._noisy
        with compared_once():
            clean = self._denoised(torch.cat([known, decoded], 1), self.conditions.y, 0)[:, first:]
        fresh = clean + self.denoising.sigma * self._draw(first, count, "train")
        self._noisy = torch.cat([known, fresh], 1)
        told = self._vectors_of(0, self._drawn)
        self._known = self._flow.known(self._noisy, self.conditions.y, self.shape[1:], told)
        return True

    @property
    def _waiting(self) -> float:
        """Number of frames that were asked for and whose noise was not read yet."""
        return sum(source.shape[1] if isinstance(source, Tensor) else source for source in self._sources)

    def _take(self, count: int) -> Tensor:
        """Noise of the next `count` frames."""
        parts: list[Tensor] = []
        while count:
            source = self._sources.popleft()
            size = source.shape[1] if isinstance(source, Tensor) else source
            some = int(min(count, size))
            if isinstance(source, Tensor):
                parts.append(source[:, :some])
                left: Tensor | float = source[:, some:]
            else:
                parts.append(self.temperature * self._draw(self._drawn, some, "sample"))
                left = source - some
            if size > some:
                self._sources.appendleft(left)
            self._drawn += some
            count -= some
        return torch.cat(parts, 1)

    def _draw(self, first: int, count: int, purpose: noise.Purpose) -> Tensor:
        drawn = noise.draw(self.seeds, count, *self.shape[1:], first=first, purpose=purpose)
        return drawn.to(self._device)

    def _ready(self) -> int:
        """Number of frames that can be cleaned now, as all frames that the denoiser sees are there."""
        assert self._decoding is not None
        have = self._begin + self._noisy.shape[1] - self._next
        if self._last and self._decoding.done:
            return have
        return 0 if self.denoising.whole else max(have - self.denoising.look_ahead, 0)

    def _out(self, count: int) -> Frames:
        """Cleans and decodes the next frames."""
        first = self._next
        if self.denoising.whole:
            clean = self._denoised(self._noisy, self.conditions.y, self._begin)[:, first - self._begin :]
        else:
            with compared_once():
                clean = torch.cat([self._cleaned(frame) for frame in range(first, first + count)], 1)
        pixels = torch.cat([self._decode(frame) for frame in clean.split(1, 1)], 1).clamp(-1.0, 1.0)
        # A copy: what goes out is the caller's, who may write to it.
        noisy = self._noisy[:, first - self._begin : first - self._begin + count].clone()
        self._next += count
        self._forget(clean)
        return Frames(first - self._reference, pixels, clean, noisy)

    def _cleaned(self, frame: int) -> Tensor:
        """One frame without its noise, (clips, 1, channels, height, width)."""
        place = frame - self._begin
        begin = max(place - self.denoising.behind, 0)
        chunk = self._noisy[:, begin : place + self.denoising.look_ahead + 1]
        text = next(y for first, y in reversed(self._texts) if first <= frame)
        return self._denoised(chunk, text, self._begin + begin)[:, place - begin : place - begin + 1]

    def _denoised(self, x: Tensor, text: Tensor | None, first: int) -> Tensor:
        """The frames `first ..` without their noise."""
        how, denoiser = self.denoising, self._flow.denoiser
        told = self._vectors_of(first, first + x.shape[1])
        if how.kind == "score":
            return score_denoise(self._flow, x, text, how.sigma, told)
        if how.kind == "none" or denoiser is None:
            return x
        read = (text, told) if self._flow.config.conditional_denoiser else (None, None)
        if how.kind == "published":
            return denoiser.denoise_video(x, *read, step=how.step, chunk=how.chunk)
        return denoiser.denoise(x, *read, step=how.step)

    def _forget(self, clean: Tensor) -> None:
        """Drops frames and texts that no later frame needs."""
        context = (self._span.context or 0) if self._renew else 0
        self._clean = torch.cat([self._clean, clean], 1)[:, -context:] if context else self._noisy[:, :0]
        if self.denoising.whole:
            return
        keep = max(self._next - self.denoising.behind, 0)
        if keep > self._begin:
            # A copy, since a view would keep the dropped frames in memory.
            self._noisy = self._noisy[:, keep - self._begin :].clone()
            self._vectors = self._vectors[:, keep - self._begin :].clone()
            self._begin = keep
        while len(self._texts) > 1 and self._texts[1][0] <= self._next:
            self._texts.pop(0)

    def _renewed(self, count: int) -> Tensor:
        """The last frames, cleaned and with fresh noise, in the space that the deep block decodes into."""
        have = self._begin + self._noisy.shape[1]
        ahead = [self._cleaned(frame) for frame in range(self._next, have)]
        clean = torch.cat([self._clean, *ahead], 1)[:, -count:]
        noisy = clean + self.denoising.sigma * self._draw(have - clean.shape[1], clean.shape[1], "train")
        return self._flow.known(noisy, self.conditions.y, self.shape[1:])[-2]

    def _checked(self, conditions: Conditions) -> Conditions:
        """Checks that conditions fit the flow, and returns them with texts of their own, which no caller writes to."""
        like = torch.empty(self.shape[0], 1, *self.shape[1:], dtype=torch.float32, device="cpu")
        y, null = conditions.y, conditions.null
        conditions = checked(self._flow, like, conditions)
        if y is not None and null is not None and y.shape != null.shape:
            raise ValueError(f"session: null has shape {list(null.shape)}, expected {list(y.shape)} like the text")
        y, null = (None if text is None else text.detach().clone() for text in (conditions.y, conditions.null))
        return replace(conditions, y=y, null=null)


def _tell_scale(**given: Tensor | None) -> None:
    for name, pixels in given.items():
        if pixels is not None:
            tell_scale(f"session: no pixel of {name}", [pixels])
