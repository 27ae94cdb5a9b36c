"""Pipeline: from prompts to clips, with a report of what the solver did.

Text and its empty half, noise, an optional given beginning (a picture or the end of a video), the inverse flow, the
denoiser, the codec. Everything runs in inference mode; noise is drawn by seed and frame, so a clip can be made again
alone with its own seed, whatever batch it was first made in.

Reference: Gu et al., STARFlow-V (2025), sampling.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from starflow.codecs import Codec
from starflow.config import RunConfig
from starflow.data import CaptionMode
from starflow.model import Flow, Guidance, tweedie_step
from starflow.sampling.cleaning import Cleaning, Denoising
from starflow.sampling.given import picture_pixels, video_pixels
from starflow.sampling.options import Denoise
from starflow.sampling.report import SampleReport, report_of
from starflow.sampling.session import Session
from starflow.solver import BlockDecoder, Conditions, Precision, Schedule, Span, Window, break_even, parse_solver
from starflow.storage import load_model
from starflow.text import Features, TextEncoder, caption_for

logger = logging.getLogger(__name__)


# Frames before one that is cleaned which the denoiser sees, where the model does not say (docs/long-video.md).
BEHIND = 1


@dataclass(frozen=True)
class Sampled:
    """What `Pipeline.sample` returns.

    Args:
        pixels: (clips, frames, channels, height, width) in [-1, 1]; given frames are the ones that were given.
        latents: clean latents (clips, latent frames, latent channels, h, w).
        noisy: what the flow put out, before the denoiser: at temperature 1 a draw from the density that it learned.
        prompts, captions, seeds: of each clip; a caption is what the text encoder saw.
        given: pixel frames at the start that were given.
        report: of the whole call.
    """

    pixels: Tensor
    latents: Tensor
    noisy: Tensor
    prompts: tuple[str, ...]
    captions: tuple[str, ...]
    seeds: tuple[int, ...]
    given: int
    report: SampleReport


class Pipeline:
    """A flow with its codec and its text encoder, ready to sample and to score.

    Args:
        flow: put into eval mode and onto `device`.
        config: of the run that trained it.
        codec: pixels to latents.
        text: captions to features; None for a flow without text.
        device: where the flow runs.

    Raises:
        ValueError: parts that do not fit each other.
    """

    def __init__(
        self,
        flow: Flow,
        config: RunConfig,
        codec: Codec,
        text: TextEncoder | None = None,
        *,
        device: str | torch.device = "cpu",
    ) -> None:
        c = flow.config
        if codec.latent_channels != c.in_channels:
            raise ValueError(
                f"pipeline: codec has {codec.latent_channels} latent channels, expected {c.in_channels} "
                "(flow.in_channels)"
            )
        if (c.txt_size > 0 or c.num_classes > 0) and text is None:
            raise ValueError("pipeline: text is None, expected a text encoder (the flow is conditional)")
        if text is not None and c.txt_size > 0 and (text.dim != c.txt_dim or text.size > c.txt_size):
            raise ValueError(
                f"pipeline: text encoder gives {text.size} vectors of {text.dim} numbers, expected at most "
                f"{c.txt_size} of {c.txt_dim} (flow.txt_size, flow.txt_dim)"
            )
        if text is not None and c.num_classes > 0 and text.dim != c.num_classes:
            raise ValueError(f"pipeline: text encoder has {text.dim} classes, expected {c.num_classes}")
        self.device = torch.device(device)
        self.flow = flow.eval().to(self.device)
        self.config, self.codec, self.text = config, codec, text
        self._features = Features(flow.config, text)

    @classmethod
    def load(cls, path: str | Path, *, device: str | torch.device = "cpu") -> Pipeline:
        """Reads a model that training or conversion wrote.

        Args:
            path: a `.safetensors` file, or the folder of a run.
            device: where the flow runs.
        """
        loaded = load_model(Path(path))
        return cls(loaded.flow, loaded.config, loaded.codec, loaded.text, device=device)

    # -- captions -----------------------------------------------------------------------------------------------------

    def caption(
        self,
        prompt: str,
        *,
        fps: float | None = None,
        image: bool = False,
        mode: CaptionMode | None = None,
        size: tuple[int, int] | None = None,
    ) -> str:
        """The caption as training assembled it: with frame rate, noise level and shape only where it did.

        Args:
            prompt: what the clip shows; "" for the empty half of guidance.
            fps: frames a second, by default those of the training clips.
            image: a single frame.
            mode: "last" where the frame to end with is given, "v2v" where a source is.
            size: height and width in pixels, by default those of the training clips.
        """
        data = self.config.data
        told = data if fps is None else replace(data, fps=fps)
        # Single frames were told apart from clips only where training saw both.
        still = image and data.frames > 1
        return caption_for(replace(self.config, data=told), prompt, image=still, mode=mode, size=size)

    def condition(
        self,
        prompts: Sequence[str],
        *,
        fps: float | None = None,
        image: bool = False,
        mode: CaptionMode | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor | None:
        """What the flow reads for these prompts: text features, class labels, or None for a flow without condition.

        Args:
            prompts, fps, image, mode, size: see `caption`.

        Raises:
            ValueError: a prompt that the encoder refuses, or one for a flow without condition.
        """
        named = next((prompt for prompt in prompts if prompt), None)
        if self.text is None and named is not None:
            raise ValueError(f'prompt is "{named}", expected "": the model was trained without text')
        try:
            captions = [self.caption(prompt, fps=fps, image=image, mode=mode, size=size) for prompt in prompts]
            features = self._features(captions)
        except ValueError as error:
            raise ValueError(f"prompt: {error}") from None
        return None if features is None else features.to(self.device)

    # -- sampling -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def sample(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        fps: float | None = None,
        guidance: float | None = None,
        temperature: float | None = None,
        solver: str | Schedule | None = None,
        precision: Precision | None = None,
        certificate: bool = False,
        image: str | Path | Tensor | None = None,
        video: str | Path | Tensor | None = None,
        given: int | None = None,
        last_image: str | Path | Tensor | None = None,
        source: str | Path | Tensor | None = None,
        edit: str | Path | Tensor | None = None,
        edit_prompt: str = "",
        denoise: Denoise = True,
        look_ahead: int | None = None,
        window: int | None = None,
        window_context: int | None = None,
    ) -> Sampled:
        """Makes one clip for each prompt.

        Args:
            prompts: one or several; "" for a clip of anything.
            seed: of the first clip; the next ones have seed + 1, seed + 2 and so on.
            seeds: one for each clip, instead of `seed`.
            frames: pixel frames, given ones included; by default those of the training clips. 1 makes images.
            height, width: in pixels, by default those of the training clips.
            fps: frames a second, by default those of the training clips.
            guidance: weight of classifier-free guidance, by default the model's.
            temperature: factor of the noise that clips are made from, by default the model's. At 1 they are draws from
                the density of the flow; below, they vary less and keep together better.
            solver: a schedule or its text (see `parse_solver`), by default the model's.
            precision: of the arithmetic (see `starflow.network.Precision`), by default the model's.
            certificate: measure the backward error.
            image: the first frame: a file, or a tensor ([clips,] channels, height, width) in [-1, 1].
            video: a clip to continue: a file, or a tensor ([clips,] frames, channels, height, width) in [-1, 1]. The
                new clip begins with its last `given` frames.
            given: frames taken from `video`; by default as many as it has, at most half of `frames`.
            last_image: the frame to end with, like `image`, for a model that was trained so (`train.last_frame_prob`).
            source: a clip to make another one of, as the prompt says, like `video`, for a model that was trained on
                pairs (`train.source_prob`): as many frames as its clips have, all of them.
            edit: a clip to make again under another text, like `video`: from its first frame on, `frames` of it. Its
                noise is found by the flow and decoded under the prompt; guidance is 0 unless it is given.
            edit_prompt: what that clip shows.
            denoise: True takes the learned denoiser where the flow has one and otherwise a step along the flow's own
                score; "learned" and "score" insist on one; False returns the noisy clips.
            look_ahead: frames that the learned denoiser waits for before it cleans one; by default as many as it was
                trained to see. 0 shows a frame sooner, cleaned a little worse.
            window: latent frames that the deep block sees of a long clip, by default those of the model's own window
                (`flow.local_attn_window`), or else of the training clips. Shallow blocks that look over time see all.
            window_context: of these, the ones that a window takes over from the one before; by default three quarters.

        Returns:
            Clips, latents and the report.

        Raises:
            ValueError: an argument that does not fit the model; the message names it.
            VideoError: a file that cannot be read.
            NotFiniteError: weights, text or noise are not finite.
        """
        begin = time.perf_counter()
        names = (prompts,) if isinstance(prompts, str) else tuple(prompts)
        session = self.session(
            names,
            seed=seed,
            seeds=seeds,
            frames=frames,
            height=height,
            width=width,
            fps=fps,
            guidance=guidance,
            temperature=temperature,
            solver=solver,
            precision=precision,
            certificate=certificate,
            image=image,
            video=video,
            given=given,
            last_image=last_image,
            source=source,
            edit=edit,
            edit_prompt=edit_prompt,
            denoise=denoise,
            look_ahead=look_ahead,
            window=window,
            window_context=window_context,
        )
        beginning = session.beginning
        parts = [] if beginning is None else [beginning]
        parts += session.extend(session.planned, last=True, together=True)
        pixels, latents, noisy = (
            torch.cat([getattr(part, name) for part in parts], 1).cpu() for name in ("pixels", "latents", "noisy")
        )
        seconds = time.perf_counter() - begin
        still, size = pixels.shape[1] == 1, (pixels.shape[-2], pixels.shape[-1])
        return Sampled(
            pixels=pixels,
            latents=latents,
            noisy=noisy,
            prompts=names,
            captions=tuple(
                self.caption(name, fps=fps, image=still, mode=_mode(last_image, source), size=size) for name in names
            ),
            seeds=session.seeds,
            given=0 if beginning is None else beginning.pixels.shape[1],
            report=report_of(session, seconds, pixels.shape[0] * pixels.shape[1]),
        )

    def session(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        fps: float | None = None,
        guidance: float | None = None,
        temperature: float | None = None,
        solver: str | Schedule | None = None,
        precision: Precision | None = None,
        certificate: bool = False,
        image: str | Path | Tensor | None = None,
        video: str | Path | Tensor | None = None,
        given: int | None = None,
        last_image: str | Path | Tensor | None = None,
        source: str | Path | Tensor | None = None,
        edit: str | Path | Tensor | None = None,
        edit_prompt: str = "",
        denoise: Denoise = True,
        look_ahead: int | None = None,
        window: int | None = None,
        window_context: int | None = None,
        window_sink: int = 0,
        renew: bool = False,
    ) -> Session:
        """Clips that are made frame by frame (see `Session`); the arguments as of `sample`.

        Args:
            frames: pixel frames of the clips, where they are known: what the flow attends to at most, if it has no
                sliding window. By default those of the training clips.
            window_sink: of the context of a window, how many frames are the first ones of the clip, for good.
            renew: frames that a window takes over are cleaned and given fresh noise.

        Raises:
            ValueError: an argument that does not fit the model; the message names it.
        """
        config, c = self.config, self.flow.config
        names = (prompts,) if isinstance(prompts, str) else tuple(prompts)
        numbers = self._seeds(len(names), seed, seeds)
        fps = config.data.fps if fps is None else fps
        edited = None
        if edit is not None:
            if image is not None or video is not None or last_image is not None or source is not None:
                raise ValueError("sample: edit is given, expected no image, video, last_image or source beside it")
            shape = self._latent_shape(config.data.frames, height, width)
            edited = self._pixels("edit", edit, frames, shape, fps, len(names), exactly=frames is not None, end=False)
            frames = edited.shape[1]
            guidance = 0.0 if guidance is None else guidance
        length = config.data.frames if frames is None else frames
        weight = config.sample.guidance if guidance is None else guidance
        heat = config.sample.temperature if temperature is None else temperature
        if not 0.0 <= heat < math.inf:
            raise ValueError(f"temperature is {heat:g}, expected a number >= 0")
        shape = self._latent_shape(length, height, width)
        still = length == 1
        if isinstance(solver, str) or solver is None:
            schedule = parse_solver(config.sample.solver if solver is None else solver, certificate=certificate)
        else:
            schedule = replace(solver, certificate=True) if certificate and isinstance(solver, Window) else solver
        mode = _mode(last_image, source)
        if mode is None and config.train.source_prob == 1.0 and not (still and config.train.image_prob):
            raise ValueError(
                "sample: source is None, expected a video: the model was trained on clips behind their sources alone "
                "(train.source_prob is 1)"
            )
        if mode == "last" and config.train.last_frame_prob == 0.0:
            raise ValueError(
                "sample: last_image is given, expected a model that was trained to arrive at a frame "
                "(train.last_frame_prob > 0)"
            )
        if mode == "v2v":
            self._check_paired(length, last_image, window, window_context)
        if weight and self.text is None:
            raise ValueError(f"guidance is {weight:g}, expected 0: the model was trained without text")

        size = (shape[2] * self.codec.spatial, shape[3] * self.codec.spatial)

        def read(told: Sequence[str]) -> Tensor | None:
            return self.condition(told, fps=fps, image=still, mode=mode, size=size)

        y, null = read(names), None
        if weight and c.num_classes == 0:
            null = self.condition([""], fps=fps, image=still, size=size)
            null = None if null is None else null.expand(len(names), -1, -1)
        reference = None
        if last_image is not None:
            reference = self._pixels("last_image", last_image, 1, shape, fps, len(names))
        elif source is not None:
            reference = self._pixels("source", source, None, shape, fps, len(names), end=False)
        before = 0 if reference is None else self.codec.latent_frames(reference.shape[1])
        if source is None:
            span = self._span(shape[0], window, window_context, window_sink, before)
        else:
            span = Span(before + shape[0])
        conditions = Conditions(
            y, null, Guidance(weight), schedule, precision=config.sample.precision if precision is None else precision
        )
        conditions = self._sized(conditions, span.window, shape)
        session = Session(
            self.flow,
            self.codec,
            (len(names), *shape[1:]),
            numbers,
            conditions,
            span,
            self._denoising(denoise, look_ahead, span.window),
            temperature=heat,
            read=read if self.text is not None else None,
            renew=renew,
        )
        beginning = self._beginning(image, video, given, length, shape, fps, len(names))
        if beginning is not None or reference is not None:
            session.prefill(beginning, reference=reference)
        session.planned = shape[0] - session.frames
        if edited is not None:
            session.planned = session.encode(edited, edit_prompt if self.text is not None else None)
        return session

    # -- parts --------------------------------------------------------------------------------------------------------

    @staticmethod
    def _seeds(count: int, seed: int, seeds: Sequence[int] | None) -> tuple[int, ...]:
        if count == 0:
            raise ValueError("sample: prompts is empty, expected at least one prompt")
        numbers = tuple(range(seed, seed + count)) if seeds is None else tuple(seeds)
        if len(numbers) != count:
            raise ValueError(f"sample: seeds has {len(numbers)} entries, expected {count} like the prompts")
        if min(numbers) < 0:
            raise ValueError(f"sample: seed is {min(numbers)}, expected an integer >= 0")
        return numbers

    def _latent_shape(self, frames: int, height: int | None, width: int | None) -> tuple[int, int, int, int]:
        """Latent frames, channels, height and width of a clip."""
        data, codec = self.config.data, self.codec
        if frames < 1:
            raise ValueError(f"sample: frames is {frames}, expected at least 1")
        if frames > 1 and self.flow.config.temporal_causal == 0 and data.frames == 1:
            raise ValueError(f"sample: frames is {frames}, expected 1: the model was trained on images")
        multiple = codec.spatial * self.flow.config.patch_size
        sides = []
        for name, side in (("height", height or data.height), ("width", width or data.width)):
            if side < 1 or side % multiple:
                raise ValueError(f"sample: {name} is {side}, expected a positive multiple of {multiple}")
            sides.append(side // codec.spatial)
        return codec.latent_frames(frames), codec.latent_channels, sides[0], sides[1]

    def _denoising(self, denoise: Denoise, look_ahead: int | None, window: int) -> Denoising:
        """What the options of denoising mean."""
        recipe, c = self.config.train, self.flow.config
        kind = self._denoiser(denoise)
        # A denoiser that is not causal sees the clip from its first to its last frame, and a score is that of a clip.
        whole = kind == "score" or (kind == "learned" and c.temporal_causal == 0)
        most = c.temporal_causal - 1 if kind == "learned" and not whole else 0
        if look_ahead is not None and not 0 <= look_ahead <= most:
            raise ValueError(f"sample: look_ahead is {look_ahead}, expected 0 to {most} (what the denoiser sees)")
        ahead = most if look_ahead is None else look_ahead
        behind = min(BEHIND, window - 1 - ahead) if c.denoiser_window is None else c.denoiser_window
        step = tweedie_step(recipe.noise_std, weighted=recipe.cond_noise_level)
        return Denoising(kind, recipe.noise_std, step, max(behind, 0), ahead, whole=whole)

    def _denoiser(self, denoise: Denoise) -> Cleaning:
        """Which denoiser an option means."""
        learned = self.flow.denoiser is not None
        if denoise is False or self.config.train.noise_std == 0.0:
            return "none"
        if denoise is True:
            return "learned" if learned else "score"
        if denoise not in ("learned", "score"):
            raise ValueError(f'sample: denoise is {denoise!r}, expected True, False, "learned" or "score"')
        if denoise == "learned" and not learned:
            raise ValueError('sample: denoise is "learned", expected "score": the model has no learned denoiser')
        return denoise

    def _span(self, frames: int, window: int | None, context: int | None, sink: int, reference: int) -> Span:
        """How much the deep block sees of a clip of so many latent frames, if it is no longer, behind a reference."""
        c = self.flow.config
        if not (c.shallow_block_local and c.temporal_causal > 0):
            if window is not None:
                raise ValueError(
                    f"sample: window is {window}, expected None: the model's shallow blocks look over time "
                    "(flow.shallow_block_local)"
                )
            return Span(reference + frames)
        if window is not None and window < 1:
            raise ValueError(f"sample: window is {window}, expected at least 1 latent frame")
        window = window or c.local_attn_window or self.codec.latent_frames(self.config.data.frames)
        if window == 1:
            return Span(reference + frames)
        carried = Span(window, Span.default_context(window) if context is None else context, sink)
        return replace(
            carried, window=window + reference, context=(carried.context or 0) + reference, sink=sink + reference
        )

    def _check_paired(self, frames: int, last_image: object, window: int | None, window_context: int | None) -> None:
        """Refuses what a clip that is made of a source cannot have."""
        data = self.config.data
        if self.config.train.source_prob == 0.0:
            raise ValueError(
                "sample: source is given, expected a model that was trained to make one clip of another "
                "(train.source_prob > 0)"
            )
        for name, value in (("last_image", last_image), ("window", window), ("window_context", window_context)):
            if value is not None:
                raise ValueError(f"sample: {name} is given beside source, expected one of them")
        if frames > data.frames:
            raise ValueError(
                f"sample: frames is {frames}, expected at most {data.frames} with a source, as in the pairs of training"
            )

    def _beginning(
        self,
        image: str | Path | Tensor | None,
        video: str | Path | Tensor | None,
        given: int | None,
        frames: int,
        shape: tuple[int, int, int, int],
        fps: float | None,
        clips: int,
    ) -> Tensor | None:
        """Pixels (clips, given frames, channels, height, width) that the clips begin with, or None."""
        if image is None and video is None:
            if given is not None:
                raise ValueError(f"sample: given is {given}, expected None without a video")
            return None
        if image is not None and video is not None:
            raise ValueError("sample: image and video are both given, expected one of them")
        if video is None:
            assert image is not None
            pixels = self._pixels("image", image, 1, shape, fps, clips)
        else:
            most = self._half(frames) if given is None else given
            pixels = self._pixels("video", video, most, shape, fps, clips, exactly=given is not None)
        if self.codec.latent_frames(pixels.shape[1]) >= shape[0]:
            raise ValueError(
                f"sample: frames is {frames}, expected more than the {pixels.shape[1]} frames that are given"
            )
        return pixels

    def _pixels(
        self,
        name: str,
        source: str | Path | Tensor,
        frames: int | None,
        shape: tuple[int, int, int, int],
        fps: float | None,
        clips: int,
        *,
        exactly: bool = False,
        end: bool = True,
    ) -> Tensor:
        """Pixels (clips, frames, channels, height, width) of a picture or of a video, for the argument `name`.

        Args:
            frames: of a video, at most or exactly so many, from its end or its start; None takes as many as the
                training clips have. A source must have so many.
            shape: latent frames, channels, height and width of the clips.
        """
        if self.flow.config.temporal_causal == 0:
            raise ValueError(
                f"sample: {name} is given, expected a model that runs forward in time (temporal_causal > 0)"
            )
        channels = self.codec.channels
        size = {"height": shape[2] * self.codec.spatial, "width": shape[3] * self.codec.spatial}
        if name in ("image", "last_image"):
            pixels = picture_pixels(source, **size, channels=channels, name=name)
        else:
            most = self.config.data.frames if frames is None else frames
            pixels = video_pixels(source, most, exactly=exactly, end=end, fps=fps, **size, channels=channels, name=name)
        if pixels.dim() == 4:
            pixels = pixels.expand(clips, *pixels.shape)
        expected = (channels, size["height"], size["width"])
        if pixels.dim() != 5 or pixels.shape[0] != clips or tuple(pixels.shape[2:]) != expected:
            raise ValueError(
                f"sample: {name} has shape {list(pixels.shape)}, expected {clips} clips of {list(expected)} frames"
            )
        if not bool(pixels.isfinite().all()):
            raise ValueError(f"sample: {name} holds values that are not finite, expected numbers in [-1, 1]")
        try:
            self.codec.latent_frames(pixels.shape[1])
        except ValueError as error:
            raise ValueError(
                f"sample: {name} gives {pixels.shape[1]} frames, which the codec cannot hold: {error}"
            ) from None
        return pixels.to(self.device)

    def _half(self, frames: int) -> int:
        """The most frames up to half of `frames` that the codec can hold, at least 1."""
        for count in range(frames // 2, 1, -1):
            try:
                self.codec.latent_frames(count)
            except ValueError:
                continue
            return count
        return 1

    def _sized(self, conditions: Conditions, window: int, shape: tuple[int, int, int, int]) -> Conditions:
        """Settles a measured window for one clip, so that a clip does not depend on how many are made together."""
        schedule, y, null = conditions.schedule, conditions.y, conditions.null
        if not isinstance(schedule, Window) or schedule.size is not None:
            return conditions
        c = self.flow.config
        block = self.flow.solving_order()[0]
        context = y[:1] if y is not None and (c.num_classes or c.text_width(block.index)) else None
        layout = block.layout(window, shape[2] // c.patch_size, shape[3] // c.patch_size, context, image=False)
        free = None if null is None or context is None else null[:1]
        decoder = BlockDecoder(block, layout, 1, context, free, conditions.guidance, precision=conditions.precision)
        return replace(conditions, schedule=replace(schedule, size=break_even(decoder, 1)))


def _mode(last_image: object, source: object) -> CaptionMode | None:
    """How captions tell what stands before a clip."""
    return "last" if last_image is not None else "v2v" if source is not None else None
