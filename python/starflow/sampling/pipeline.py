"""Pipeline: from prompts to clips, with a report of what the solver did.

Text, the empty text of guidance, noise and an optional beginning (a picture or the end of a video) go through the
inverse flow, the denoiser and the codec. Everything runs in inference mode; noise is drawn by seed and frame, so a clip
can be made again alone with its own seed, whatever batch it was first made in.

Reference: Gu et al., STARFlow-V (2025), sampling.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from starflow import noise
from starflow.arguments import check_config, check_text, check_texts
from starflow.codecs import Codec
from starflow.config import RunConfig
from starflow.data import ASPECT_RATIOS, CaptionMode, aspect_size, plays_otherwise
from starflow.devices import as_device
from starflow.inference import in_inference_mode
from starflow.messages import listed, shown
from starflow.model import Flow, Guidance, tweedie_step
from starflow.sampling.cleaning import Cleaning, Denoising
from starflow.sampling.given import GivenReader
from starflow.sampling.options import Denoise, SampleOptions, sample_options, takes_options
from starflow.sampling.report import SampleReport, report_of
from starflow.sampling.session import Session
from starflow.solver import BlockDecoder, Conditions, Span, Window, break_even
from starflow.storage import Pretrained, load_model
from starflow.text import Features, TextEncoder, caption_for

logger = logging.getLogger(__name__)


# Frames that the denoiser sees before the one it cleans, where the model does not set them (docs/long-video.md).
BEHIND = 1


@dataclass(frozen=True)
class Sampled:
    """What `Pipeline.sample` returns.

    Args:
        pixels: (clips, frames, channels, height, width) in [-1, 1]; given frames are returned unchanged.
        latents: clean latents (clips, latent frames, latent channels, h, w).
        noisy: output of the flow, before the denoiser: at temperature 1 a draw from the density that it learned.
        prompts, captions, seeds: those of each clip; a caption is the text that the text encoder read.
        given: number of pixel frames at the start that were given.
        report: report of the whole call.
    """

    pixels: Tensor
    latents: Tensor
    noisy: Tensor
    prompts: tuple[str, ...]
    captions: tuple[str, ...]
    seeds: tuple[int, ...]
    given: int
    report: SampleReport


class Pipeline(Pretrained):
    """A flow with its codec and its text encoder, ready to sample and to score.

    Args:
        flow: put into eval mode and onto `device`.
        config: configuration of the run that trained it.
        codec: maps pixels to latents.
        text: maps captions to features; None for a flow without text.
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
        check_config("pipeline", config, RunConfig)
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
        if c != config.flow:
            told, own = dataclasses.asdict(config.flow), dataclasses.asdict(c)
            other = next(name for name in own if own[name] != told[name])
            raise ValueError(
                f"pipeline: flow.{other} is {shown(own[other])} in the flow and {shown(told[other])} in the "
                "configuration, expected that of the flow"
            )
        _check_part("codec", codec.to_config(), config.codec)
        if text is not None:
            _check_part("text", text.to_config(), config.text)
        self.device = as_device(device)
        self.flow = flow.eval().to(self.device)
        self.config, self.codec, self.text = config, codec, text
        self.about: Mapping[str, str] = {}
        self._features = Features(flow.config, text)

    @classmethod
    def load(cls, path: str | Path, *, device: str | torch.device = "cpu") -> Pipeline:
        """Reads a model that training or conversion wrote.

        A file above 64 MiB is mapped: replace it by rename, and never write into it, while the pipeline is in use (see
        docs/checkpoints.md).

        Args:
            path: a `.safetensors` file, the folder of a run, or the name of a model that comes with the package.
            device: where the flow runs.
        """
        loaded = load_model(path)
        pipeline = cls(loaded.flow, loaded.config, loaded.codec, loaded.text, device=device)
        pipeline.about = loaded.about
        return pipeline

    # -- captions -----------------------------------------------------------------------------------------------------

    def caption(
        self,
        prompt: str,
        *,
        fps: float | None = None,
        image: bool = False,
        mode: CaptionMode | None = None,
        size: tuple[int, int] | None = None,
        noise_std: float | None = None,
    ) -> str:
        """The caption as training assembled it: with frame rate, noise level and shape only where it did.

        Args:
            prompt: what the clip shows; "" for the empty half of guidance.
            fps: frames a second, by default those of the training clips.
            image: the clip is a single frame.
            mode: "last" where the frame to end with is given, "v2v" where a source clip is.
            size: height and width in pixels, by default those of the training clips.
            noise_std: by default that of training.
        """
        check_text("pipeline", "prompt", prompt)
        data, train = self.config.data, self.config.train
        noisy = train if noise_std is None else replace(train, noise_std=noise_std)
        # Single frames were told apart from clips only where training saw both.
        still = image and data.frames > 1
        config = replace(self.config, train=noisy)
        return caption_for(config, prompt, image=still, mode=mode, size=size, rate=fps)

    def condition(
        self,
        prompts: Sequence[str],
        *,
        fps: float | None = None,
        image: bool = False,
        mode: CaptionMode | None = None,
        size: tuple[int, int] | None = None,
        noise_std: float | None = None,
    ) -> Tensor | None:
        """The flow's condition for these prompts: text features, class labels, or None for a flow without condition.

        Args:
            prompts, fps, image, mode, size, noise_std: see `caption`.

        Raises:
            ValueError: a prompt that the encoder refuses, or one for a flow without condition.
        """
        check_texts("pipeline", "prompts", prompts)
        named = next((prompt for prompt in prompts if prompt), None)
        if self.text is None and named is not None:
            raise ValueError(f'prompt is "{named}", expected "": the model was trained without text')
        try:
            how: dict[str, Any] = {"fps": fps, "image": image, "mode": mode, "size": size, "noise_std": noise_std}
            captions = [self.caption(prompt, **how) for prompt in prompts]
            features = self._features(captions)
        except ValueError as error:
            raise ValueError(f"prompt: {error}") from None
        return None if features is None else features.to(self.device)

    # -- sampling -----------------------------------------------------------------------------------------------------

    @takes_options
    @in_inference_mode
    def sample(self, prompts: str | Sequence[str], options: SampleOptions | None = None, /, **changes: Any) -> Sampled:
        """Makes one clip for each prompt.

        Args:
            prompts: one or several; "" for a clip of anything.
            options: all other options (see `SampleOptions`).
            changes: options by name, in place of those of `options`.

        Returns:
            Clips, latents and the report.

        Raises:
            TypeError: a name that is no option.
            ValueError: an option that does not fit the model; the message names it.
            VideoError: a file that cannot be read.
            NotFiniteError: weights, text or noise are not finite.
        """
        begin = time.perf_counter()
        asked = sample_options(options, changes)
        self._check_length(asked, len(_prompts(prompts)))
        session = self.session(prompts, asked)
        beginning = session.beginning
        windows = [name for name in ("window_frames", "context_frames", "sink_frames", "renew") if getattr(asked, name)]
        if session.planned_frames > self._trained_window and "window_frames" in windows:
            # Without it such a clip would be made in several windows.
            windows.remove("window_frames")
        if windows and session.in_one_window:
            logger.warning(
                "sample: %s given and the clip fits into one window, so that nothing reads %s",
                f"{listed(windows)} {'is' if len(windows) == 1 else 'are'}",
                "it" if len(windows) == 1 else "them",
            )
        parts = [] if beginning is None else [beginning]
        parts += session.extend(session.planned, last=True, together=True)
        pixels, latents, noisy = (
            torch.cat([getattr(part, name) for part in parts], 1).cpu() for name in ("pixels", "latents", "noisy")
        )
        seconds = time.perf_counter() - begin
        still, size = pixels.shape[1] == 1, (pixels.shape[-2], pixels.shape[-1])
        names = _prompts(prompts)
        return Sampled(
            pixels=pixels,
            latents=latents,
            noisy=noisy,
            prompts=names,
            captions=tuple(
                self.caption(
                    name, fps=asked.fps, image=still, mode=asked.mode, size=size, noise_std=asked.target_noise_std
                )
                for name in names
            ),
            seeds=session.seeds,
            given=0 if beginning is None else beginning.pixels.shape[1],
            report=report_of(session, seconds, pixels.shape[0] * pixels.shape[1]),
        )

    @takes_options
    def session(self, prompts: str | Sequence[str], options: SampleOptions | None = None, /, **changes: Any) -> Session:
        """Clips that are made frame by frame (see `Session`).

        Args:
            prompts, options, changes: as of `sample`. `frames` are those of the whole clips, where that is known: what
                the flow attends to at most, if it has no sliding window; by default those of the training clips.

        Raises:
            TypeError: a name that is no option.
            ValueError: an option that does not fit the model; the message names it.
            VideoError: a file that cannot be read.
        """
        asked, names = sample_options(options, changes), _prompts(prompts)
        if not names:
            raise ValueError("sample: prompts is empty, expected at least one prompt")
        config, c = self.config, self.flow.config
        seeds = asked.numbers(len(names))
        asked = replace(asked, size=self._size(asked, seeds), aspect_ratio=None)
        length = config.data.frames if asked.frames is None else asked.frames
        guidance = asked.guidance
        edited = None
        if asked.edit is not None:
            reader = self._reader(len(names), self._latent_shape(config.data.frames, asked.size), asked)
            edited = reader.video("edit", asked.edit, asked.frames, exactly=asked.frames is not None, end=False)
            length = edited.shape[1]
            guidance = 0.0 if guidance is None else guidance
            if asked.edit_prompt and self.text is None:
                raise ValueError(
                    f"sample: edit_prompt is {shown(asked.edit_prompt)}, expected none: the model was trained without "
                    "text"
                )
        weight = config.sample.guidance if guidance is None else guidance
        if weight and self.text is None and not c.frame_dim:
            raise ValueError(f"sample: guidance is {weight:g}, expected 0: the model was trained without text")
        self._tell_guidance(weight)
        _tell_hooks(self.flow)
        self._tell_size(asked.size)
        self._check_mode(asked, length)
        holds = self.about.get("holds_frames", "")
        if holds.isdecimal() and length > int(holds):
            logger.warning("sample: frames is %d, and what the model's card tells was seen up to %s", length, holds)
        shape = self._latent_shape(length, asked.size)
        reader = self._reader(len(names), shape, asked)
        told: dict[str, Any] = {
            "fps": reader.fps,
            "image": length == 1,
            "size": reader.size,
            "noise_std": asked.target_noise_std,
        }

        def read(texts: Sequence[str]) -> Tensor | None:
            return self.condition(texts, mode=asked.mode, **told)

        y, null = read(names), None
        if weight and c.num_classes == 0:
            null = self.condition([""], **told)
            null = None if null is None else null.expand(len(names), -1, -1)
        reference = None
        if asked.last_image is not None:
            reference = reader.picture("last_image", asked.last_image)
        elif asked.source is not None:
            reference = reader.video("source", asked.source, None, end=False)
        before = 0 if reference is None else self.codec.latent_frames(reference.shape[1])
        span = Span(before + shape[0]) if asked.source is not None else self._span(shape[0], shape[2:], asked, before)
        precision = config.sample.precision if asked.precision is None else asked.precision
        schedule = asked.schedule(config.sample.solver)
        guided = config.sample.guidance_frames if asked.guidance_frames is None else asked.guidance_frames
        # A window that begins anew encodes its context with both halves, so that guidance goes on there.
        if asked.guidance_frames is None and span.behind is None:
            guided = None
        if asked.guidance_frames is not None and not weight:
            raise ValueError(f"sample: guidance_frames is {guided}, expected guidance above 0 together with it")
        if asked.guide_top and not weight:
            raise ValueError("sample: guide_top is True, expected guidance above 0 together with it")
        if guided is not None and span.behind is None:
            raise ValueError(f"sample: guidance_frames is {guided}, expected None where no cache rolls")
        guide = Guidance(weight, frames=guided, all_blocks=not asked.guide_top)
        conditions = Conditions(y, null, guide, schedule, asked.attn_temp, precision)
        session = Session(
            self.flow,
            self.codec,
            (len(names), *shape[1:]),
            seeds,
            self._sized(conditions, span.frames, shape),
            span,
            self._denoising(asked, span, before + shape[0]),
            temperature=config.sample.temperature if asked.temperature is None else asked.temperature,
            read=read if self.text is not None else None,
            renew=asked.renew,
        )
        self._tell_unread(asked, names, length, session.denoising.kind)
        if asked.actions is not None:
            vectors = reader.actions(asked.actions, config)
            if vectors.shape[1] > shape[0]:
                raise ValueError(
                    f"sample: actions are of {vectors.shape[1]} frames, expected at most {shape[0]}, those of the clip"
                )
            session.tell(vectors)
        beginning = self._beginning(reader, asked, length, shape[0])
        if beginning is not None or reference is not None:
            session.prefill(beginning, reference=reference, scaled=True)
        session.planned = shape[0] - session.frames
        if edited is not None:
            text = asked.edit_prompt if self.text is not None else None
            session.planned = session.encode(edited, text, scaled=True)
        return session

    # -- parts --------------------------------------------------------------------------------------------------------

    def _tell_unread(self, asked: SampleOptions, prompts: Sequence[str], frames: int, denoiser: Cleaning) -> None:
        """Tells of options that are given and that nothing of this call reads."""
        data = self.config.data
        given = [getattr(asked, name) is not None for name in ("image", "video", "edit", "last_image", "source")]
        unread = not self.config.train.cond_noise_level and denoiser != "score"
        if asked.target_noise_std is not None and unread and not any(given):
            logger.warning(
                "sample: target_noise_std is %g and nothing reads it: captions tell no noise, no frames are given and "
                "the denoiser is %s",
                asked.target_noise_std,
                denoiser,
            )
        if asked.guidance and not any(prompts) and self.flow.config.frame_dim == 0:
            logger.warning("sample: guidance is %g and every prompt is empty: it leads to nothing", asked.guidance)
        rate = data.fps or self.config.sample.fps
        cut = any(isinstance(clip, str | Path) for clip in (asked.video, asked.edit, asked.source))
        moving = frames > 1 and not data.caption_fps and not cut
        if moving and asked.fps is not None and plays_otherwise(asked.fps, rate):
            logger.warning(
                "sample: fps is %g, and captions of the model tell no rate: its clips move as at %g frames a second",
                asked.fps,
                rate,
            )

    def _tell_size(self, size: tuple[int, int] | None) -> None:
        """Tells of a size that no clip of training had."""
        data = self.config.data
        known = {(data.height, data.width), (data.image_height, data.image_width)}
        if size is not None and not data.mix_aspect and size not in known:
            logger.warning(
                "sample: size is %dx%d, and the model was trained on %dx%d alone", *size, data.height, data.width
            )

    def _tell_guidance(self, weight: float) -> None:
        """Tells of guidance away from what the flow never saw: clips without their text, or without their vectors."""
        c, train = self.flow.config, self.config.train
        never = [
            f"train.{option}"
            for option, read in (
                ("drop_label", c.txt_size or c.num_classes),
                ("drop_frame_condition", c.frame_dim),
            )
            if read and getattr(train, option) == 0.0
        ]
        if weight and never:
            logger.warning(
                "sample: guidance is %g, and %s was 0 in training: the flow never saw the clips that guidance leads "
                "away from",
                weight,
                " and ".join(never),
            )

    def _check_mode(self, asked: SampleOptions, frames: int) -> None:
        """Refuses a clip with a last frame or a source, or without one, where training had no such clips."""
        data, train = self.config.data, self.config.train
        if asked.mode is None and train.source_prob == 1.0 and not (frames == 1 and train.image_prob):
            raise ValueError(
                "sample: source is None, expected a video: the model was trained on clips behind their sources alone "
                "(train.source_prob is 1)"
            )
        never = None
        if frames > 1 and train.image_prob == 1.0:
            never = "clips of more than one frame", "image_prob"
        elif frames > 1 and train.drop_image == 1.0:
            never = "whole clips, from their first frame on", "drop_image"
        elif frames > 1 and asked.mode is None and train.last_frame_prob == 1.0:
            never = "clips without the frame that they end with (last_image)", "last_frame_prob"
        if never is not None:
            logger.warning("sample: the model was never trained on %s (train.%s was 1)", *never)
        if asked.mode == "last" and train.last_frame_prob == 0.0:
            raise ValueError(
                "sample: last_image is given, expected a model that was trained to arrive at a frame "
                "(train.last_frame_prob > 0)"
            )
        if asked.mode == "v2v" and train.source_prob == 0.0:
            raise ValueError(
                "sample: source is given, expected a model that was trained to make one clip of another "
                "(train.source_prob > 0)"
            )
        if asked.mode == "v2v" and frames > data.frames:
            raise ValueError(
                f"sample: frames is {frames}, expected at most {data.frames} with a source, as in the pairs of training"
            )

    def _check_length(self, asked: SampleOptions, clips: int) -> None:
        """Refuses clips whose pixels alone, all of which `sample` returns, are more than this machine's memory."""
        height, width = asked.size or (self.config.data.height, self.config.data.width)
        frame = 4 * clips * self.codec.channels * height * width
        most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // max(frame, 1)
        if asked.frames is not None and asked.frames > max(most, 1):
            raise ValueError(
                f"sample: frames is {shown(asked.frames)}, expected at most {most} of {clips} x {height}x{width} "
                "pixels, which are what fits into memory (a session, or --stream, gives frames one by one)"
            )

    def _size(self, asked: SampleOptions, seeds: Sequence[int]) -> tuple[int, int] | None:
        """Height and width in pixels that the options ask for; None for those of training."""
        data = self.config.data
        if asked.aspect_ratio is None:
            return asked.size
        ratio: str = asked.aspect_ratio
        if ratio == "random":
            ratio = ASPECT_RATIOS[int(noise.stream(seeds[0], "choose").integers(len(ASPECT_RATIOS)))]
        side = round(math.sqrt(data.height * data.width))
        return aspect_size(side, ratio, self.codec.spatial * self.flow.config.patch_size)

    def _latent_shape(self, frames: int, size: tuple[int, int] | None) -> tuple[int, int, int, int]:
        """Latent frames, channels, height and width of a clip."""
        data, codec = self.config.data, self.codec
        if frames > 1 and self.flow.config.temporal_causal == 0 and data.frames == 1:
            raise ValueError(f"sample: frames is {frames}, expected 1: the model was trained on images")
        multiple = codec.spatial * self.flow.config.patch_size
        height, width = size or (data.height, data.width)
        if height % multiple or width % multiple:
            raise ValueError(f"sample: size is {height}x{width}, expected multiples of {multiple}")
        return codec.latent_frames(frames), codec.latent_channels, height // codec.spatial, width // codec.spatial

    def _reader(self, clips: int, shape: tuple[int, int, int, int], asked: SampleOptions) -> GivenReader:
        """The reader of given pictures and videos for clips of this latent shape."""
        data = self.config.data
        return GivenReader(
            self.codec,
            clips=clips,
            size=(shape[2] * self.codec.spatial, shape[3] * self.codec.spatial),
            fps=data.fps if asked.fps is None else asked.fps,
            training_frames=data.frames,
            forward=self.flow.config.temporal_causal > 0,
            device=self.device,
        )

    def _denoising(self, asked: SampleOptions, span: Span, frames: int) -> Denoising:
        """How the (at most) `frames` latent frames of a clip are cleaned, by the options of denoising."""
        recipe, c = self.config.train, self.flow.config
        kind = self._denoiser(self.config.sample.denoise if asked.denoise is None else asked.denoise)
        # A denoiser that is not causal sees all frames of a clip, and the score is that of a whole clip's density.
        whole = kind in ("score", "published") or (kind == "learned" and c.temporal_causal == 0)
        most = c.temporal_causal - 1 if kind == "learned" and not whole else 0
        ahead = most if asked.look_ahead is None else asked.look_ahead
        if ahead > most:
            raise ValueError(f"sample: look_ahead is {ahead}, expected 0 to {most} (what the denoiser sees)")
        behind = min(BEHIND, span.frames - 1 - ahead) if c.denoiser_window is None else c.denoiser_window
        step = tweedie_step(recipe.noise_std, weighted=recipe.cond_noise_level)
        chunk = self.codec.latent_frames(self.config.data.frames) if span.behind is not None else span.frames
        if kind == "published" and chunk < frames and (c.denoiser_window or 0) >= chunk:
            raise ValueError(
                f"sample: denoise is 'published' and the denoiser looks back {c.denoiser_window} frames "
                f"(flow.denoiser_window), expected fewer than the {chunk} of a window, or denoise 'learned'"
            )
        published = chunk if kind == "published" else None
        sigma = recipe.noise_std if asked.target_noise_std is None else asked.target_noise_std
        return Denoising(kind, sigma, step, max(behind, 0), ahead, whole=whole, chunk=published)

    def _denoiser(self, denoise: Denoise) -> Cleaning:
        """Which denoiser the option `denoise` means for this model."""
        learned = self.flow.denoiser is not None
        if self.config.train.noise_std == 0.0:
            if denoise not in ("auto", "none"):
                raise ValueError(
                    f"sample: denoise is {denoise!r}, expected 'none': the model was trained without noise "
                    "(train.noise_std is 0)"
                )
            return "none"
        if denoise in ("learned", "published") and not learned:
            raise ValueError(f"sample: denoise is {denoise!r}, expected 'score': the model has no learned denoiser")
        if denoise == "auto":
            return "learned" if learned else "score"
        return denoise

    def _span(self, frames: int, size: tuple[int, int], asked: SampleOptions, reference: int) -> Span:
        """The frames that the deep block sees of a clip of at most `frames` latent frames behind `reference` ones, each
        of the size (height, width) in latents.
        """
        c, window = self.flow.config, asked.window_frames
        windows = window or asked.context_frames or asked.sink_frames or asked.renew or reference
        if c.attention_frames is not None and not windows:
            height, width = (side // c.patch_size for side in size)
            return Span.rolling(c.attention_frames, height * width)
        asks = {
            "window_frames": window,
            "context_frames": asked.context_frames,
            "sink_frames": asked.sink_frames or None,
            "renew": asked.renew or None,
        }
        if not (c.shallow_block_local and c.temporal_causal > 0):
            for name, value in asks.items():
                if value is not None:
                    raise ValueError(
                        f"sample: {name} is {value}, expected it left out: the model's shallow blocks look over time "
                        "(flow.shallow_block_local), so that its clips have no windows"
                    )
            return Span(reference + frames)
        trained = self._trained_window
        if window is not None and trained < min(window, reference + frames):
            logger.warning(
                "sample: window_frames is %d, and the deep block never saw more than %d latent frames in training",
                window,
                trained,
            )
        window = window or trained
        if window == 1:
            named = next((f"{name} is {value}" for name, value in asks.items() if value is not None), None)
            if named and reference + frames > 1:
                raise ValueError(f"sample: {named}, expected window_frames of 2 or more: a context and a new frame")
            return Span(reference + frames)
        context = Span.default_context(window) if asked.context_frames is None else asked.context_frames
        carried = Span(window, context, asked.sink_frames)
        return replace(
            carried, frames=window + reference, context=context + reference, sink=asked.sink_frames + reference
        )

    @property
    def _trained_window(self) -> int:
        """The most latent frames that the deep block saw at once in training."""
        own = self.flow.config.local_attn_window
        return own or self.codec.latent_frames(self.config.data.frames)

    def _beginning(self, reader: GivenReader, asked: SampleOptions, frames: int, latent_frames: int) -> Tensor | None:
        """Pixels (clips, given frames, channels, height, width) that the clips begin with, or None."""
        if asked.image is not None:
            pixels = reader.picture("image", asked.image)
        elif asked.video is not None:
            most = self._half(frames) if asked.given is None else asked.given
            pixels = reader.video("video", asked.video, most, exactly=asked.given is not None)
        else:
            return None
        if self.codec.latent_frames(pixels.shape[1]) >= latent_frames:
            raise ValueError(
                f"sample: frames is {frames}, expected more than the {pixels.shape[1]} frames that are given"
            )
        return pixels

    def _half(self, frames: int) -> int:
        """The largest number of frames up to half of `frames` that the codec can encode, at least 1."""
        for count in range(frames // 2, 1, -1):
            try:
                self.codec.latent_frames(count)
            except ValueError:
                continue
            return count
        return 1

    def _sized(self, conditions: Conditions, window: int, shape: tuple[int, int, int, int]) -> Conditions:
        """Measures a window of size "auto" for one clip, so that a clip does not depend on the size of the batch."""
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


def _check_part(name: str, own: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    """Refuses a codec or a text encoder with other options than the flow was trained with; a folder may have moved."""
    for option, value in told.items():
        if value is None or option == "folder" or option not in own:
            continue
        if _as_lists(own[option]) != _as_lists(value):
            raise ValueError(
                f"pipeline: {name}.{option} is {shown(own[option])}, expected {shown(value)} as in the configuration "
                "of the flow"
            )


def _as_lists(value: Any) -> Any:
    return [_as_lists(item) for item in value] if isinstance(value, list | tuple) else value


def _is_own(hook: Any) -> bool:
    """Whether a hook is none of those by which weights in pieces (`--parallel fsdp`) come together."""
    return not str(getattr(hook, "__module__", "")).startswith("torch.distributed.")


def _tell_hooks(flow: Flow) -> None:
    """Tells of hooks inside of the flow, which sampling does not call."""
    held = [
        name
        for name, module in flow.named_modules()
        if name and any(map(_is_own, (*module._forward_hooks.values(), *module._forward_pre_hooks.values())))
    ]
    if held:
        logger.warning(
            "sample: forward hooks of modules inside of the flow are not called (%s): sampling reads weights alone",
            listed(held),
        )


def _prompts(prompts: str | Sequence[str]) -> tuple[str, ...]:
    names = (prompts,) if isinstance(prompts, str) else prompts
    # A set has no order in which seeds would belong to its prompts, and a generator is empty the second time.
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"sample: prompts is {shown(prompts)}, expected a text or a list of texts")
    return tuple(names)
