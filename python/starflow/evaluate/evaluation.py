"""Evaluation of a model: its clips beside real ones, by everything that can be told without a person.

Clips are made with the captions, the actions and the sources of held-out real ones, so that both sets are asked for the
same. The Fréchet distance of two finite sets is above 0 even where both are real, so that of two halves of the real
clips, each of as many as are made, stands beside every one: the floor, under which no model is told from the data.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from starflow.arguments import check_call
from starflow.data import Clip, require_clip
from starflow.evaluate.features import FrameFeatures
from starflow.evaluate.fidelity import NEIGHBOURS, Fidelity, Span, drift, fidelity, frame_differences
from starflow.evaluate.scores import noise_floor, score
from starflow.messages import shown, told_once
from starflow.numeric import integer
from starflow.sampling import Pipeline, SampleOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` finds.

    Args:
        made: the made clips against real ones, in the length of the training clips.
        floor: other real clips against the same, as many.
        drift: Fréchet distance of each second of the made clips to real frames, in their whole length but for given
            frames, which are counted in the numbers of the spans.
        drift_floor: that of the first second of other real clips.
        second: frames of a second.
        frames: of a made clip, given ones included.
        given: frames of the real clip that each made one begins with; they are left out of every comparison.
        bits_per_dim: mean over the real clips of the density that was trained on (see `score`).
        noise_floor: in bits per dimension, which no model falls under on average; None for a model without noise.
        frames_per_second: of one clip that is made frame by frame, from its second on; of all clips together where the
            denoiser needs the whole clip. Given frames are not made, and do not count.
        streamed: whether it was frame by frame.
        threads: of the processor that were used.
        clips: the made ones (clips, frames, channels, height, width).
        seeds: of their noise.
    """

    made: Fidelity
    floor: Fidelity
    drift: tuple[Span, ...]
    drift_floor: float
    second: int
    frames: int
    given: int
    bits_per_dim: float
    noise_floor: float | None
    frames_per_second: float
    streamed: bool
    threads: int
    clips: Tensor
    seeds: tuple[int, ...]

    def to_mapping(self) -> dict[str, Any]:
        """Plain values that json can write; the clips are left out."""
        values = asdict(replace(self, clips=torch.empty(0)))
        del values["clips"]
        return {**values, "drift": [span._asdict() for span in self.drift]}


def evaluate(
    pipeline: Pipeline,
    real: Sequence[Clip],
    others: Sequence[Clip],
    training: Sequence[Clip],
    *,
    options: SampleOptions | None = None,
    given: int = 0,
    second: int | None = None,
    batch: int = 32,
    steps: int = 400,
    tell: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Makes a clip for each real one and compares the two sets.

    Args:
        pipeline: with the flow.
        real: held-out clips in the size and length of the training clips, with their captions, actions and sources as
            the model reads them.
        others: further real clips, as many as `real`, for the floor.
        training: real clips that the features are learned from, with the seed 0 whatever the options say, so that
            evaluations of one set of clips compare.
        options: of sampling; `frames` makes longer clips, for the drift. Their actions are those of the clip, then of
            the next one, and so on.
        given: frames of the real clip that each made one begins with.
        second: frames of a second; by default those of a second of the training clips.
        batch: most clips made together.
        steps: of training the features.
        tell: is called with what is done next, which may take minutes.

    Raises:
        ImportError: torchmetrics is not installed (extra `evaluate`).
        ValueError: a clip of another size or length than the model's, too few for a covariance, or an option that does
            not fit the model; the message names it.
    """
    check_call("evaluate", "tell", tell, optional=False)
    for name, value, least in (("given", given, 0), ("second", second, 1), ("batch", batch, 1), ("steps", steps, 1)):
        whole = integer(value)
        if not (name == "second" and value is None) and (whole is None or whole < least):
            raise ValueError(f"evaluate: {name} is {shown(value)}, expected an integer >= {least}")
    # Python's own, which json can write; those of numpy it cannot.
    given, batch, steps, second = int(given), int(batch), int(steps), None if second is None else int(second)
    if not isinstance(options, SampleOptions | None):
        raise ValueError(f"evaluate: options is {shown(options)}, expected a starflow.SampleOptions or None")
    asked = options or SampleOptions()
    length = pipeline.config.data.frames
    frames = length if asked.frames is None else asked.frames
    if frames < length:
        raise ValueError(f"evaluate: frames is {frames}, expected at least {length}, those of the training clips")
    if not 0 <= given < length:
        raise ValueError(f"evaluate: given is {given}, expected 0 to {length - 1}, fewer than a training clip has")
    if len(real) != len(others):
        raise ValueError(f"evaluate: others has {len(others)} clips, expected {len(real)} like real")
    for clip in (*real, *others, *training):
        _check(pipeline, clip)
    twice = {id(clip.pixels) for clip in real} & {id(clip.pixels) for clip in others}
    if twice:
        logger.warning(
            "evaluate: %d of the %d clips of others are those of real: the floor is too low",
            len(twice),
            len(others),
        )
    second = _second(pipeline) if second is None else second
    _check_count(len(real), length - given, min(max(second, 1), frames - given))

    seen, known, learned = (torch.stack([clip.pixels for clip in clips]) for clips in (real, others, training))
    with told_once():
        made, rate = _make(pipeline, real, asked, frames, given, batch, tell)
        tell("one clip as a stream")
        streamed = _stream_rate(pipeline, real, asked, frames, given)
    tell("features of frames")
    features = FrameFeatures.fit(learned.flatten(0, 1), steps=steps, num_features=_FEATURES)
    motion = None
    if length - given > 1:
        tell("features of motion")
        motion = FrameFeatures.fit(frame_differences(learned), steps=steps, num_features=_FEATURES)
    seen, known, new = seen[:, given:], known[:, given:], made[:, given:]
    sigma = pipeline.config.train.noise_std
    tell("comparing")
    scores = score(pipeline, real, seed=asked.seed)
    return Evaluation(
        made=fidelity(new[:, : length - given], seen, features, motion),
        floor=fidelity(known, seen, features, motion),
        drift=tuple(
            Span(span.first + given, span.last + given, span.frechet)
            for span in drift(new, seen, features, second=second)
        ),
        drift_floor=drift(known, seen, features, second=second)[0].frechet,
        second=second,
        frames=frames,
        given=given,
        bits_per_dim=sum(item.bits_per_dim for item in scores) / len(scores),
        noise_floor=noise_floor(sigma, pipeline.codec.log_det_per_dimension) if sigma else None,
        frames_per_second=rate if streamed is None else streamed,
        streamed=streamed is not None,
        threads=torch.get_num_threads(),
        clips=made,
        seeds=asked.numbers(len(real)),
    )


_FEATURES = 64


def _second(pipeline: Pipeline) -> int:
    """Frames of a second of the training clips."""
    return max(1, round(pipeline.config.data.fps or pipeline.config.sample.fps))


def _check(pipeline: Pipeline, clip: Clip) -> None:
    """Refuses a clip that is not like the model's."""
    require_clip("evaluate: a clip", clip)
    data = pipeline.config.data
    expected = [data.frames, data.channels, data.height, data.width]
    if list(clip.pixels.shape) != expected:
        raise ValueError(
            f"evaluate: {clip.name} has shape {list(clip.pixels.shape)} (frames, channels, height, width), expected "
            f"{expected} like the model's training clips"
        )


def _check_count(clips: int, frames: int, span: int) -> None:
    """Refuses fewer frames in any comparison than a covariance of the features needs.

    Args:
        clips: in a set.
        frames: of each that are compared.
        span: frames of each in a second.
    """
    fewest = min(span, max(frames - 1, 1))
    least = max(_FEATURES // fewest + 1, NEIGHBOURS + 1)
    if clips < least:
        raise ValueError(
            f"evaluate: {clips} clips give {clips * fewest} frames to the smallest comparison, expected more than the "
            f"{_FEATURES} features of a frame, whose covariance is taken: at least {least} clips in each half"
        )


def _conditions(clips: Sequence[Clip], places: Sequence[int], frames: int, given: int) -> dict[str, Any]:
    """What clips at some places are made with beside their captions: actions, sources and given frames."""
    told: dict[str, Any] = {}
    chosen = [clips[place] for place in places]
    if chosen[0].frame_conditions is not None:
        told["actions"] = torch.stack([_actions(clips, place, frames) for place in places])
    if chosen[0].source is not None:
        told["source"] = torch.stack([clip.source for clip in chosen if clip.source is not None])
    if given:
        told["video"] = torch.stack([clip.pixels[:given] for clip in chosen])
        told["given"] = given
    return told


def _actions(clips: Sequence[Clip], place: int, frames: int) -> Tensor:
    """Vectors of the frames of a clip, and of the next ones while more are needed, (frames, frame_dim)."""
    parts: list[Tensor] = []
    while sum(map(len, parts)) < frames:
        vectors = clips[(place + len(parts)) % len(clips)].frame_conditions
        assert vectors is not None
        # The first frame of a clip has no action, as nothing is known from before it.
        parts.append(vectors if not parts or len(vectors) == 1 else vectors[1:])
    return torch.cat(parts)[:frames]


def _captions(pipeline: Pipeline, clips: Sequence[Clip]) -> list[str]:
    return ["" if pipeline.text is None else clip.caption for clip in clips]


def _make(
    pipeline: Pipeline,
    clips: Sequence[Clip],
    asked: SampleOptions,
    frames: int,
    given: int,
    batch: int,
    tell: Callable[[str], None],
) -> tuple[Tensor, float]:
    """A clip for each real one, and frames a second of all."""
    seeds, parts, seconds = asked.numbers(len(clips)), [], 0.0
    for first in range(0, len(clips), batch):
        places = range(first, min(first + batch, len(clips)))
        tell(f"clips {places[0] + 1} to {places[-1] + 1} of {len(clips)}")
        sampled = pipeline.sample(
            _captions(pipeline, [clips[place] for place in places]),
            asked,
            frames=frames,
            seed=0,
            seeds=tuple(seeds[place] for place in places),
            **_conditions(clips, places, frames, given),
        )
        parts.append(sampled.pixels)
        seconds += sampled.report.seconds
    made = torch.cat(parts)
    return made, made.shape[0] * (made.shape[1] - given) / seconds


def _stream_rate(
    pipeline: Pipeline, clips: Sequence[Clip], asked: SampleOptions, frames: int, given: int
) -> float | None:
    """Frames a second of one clip made frame by frame, from its second on; None where it is made as a whole."""
    told = _conditions(clips, [0], frames, given)
    seeds = asked.numbers(len(clips))[:1]
    session = pipeline.session(_captions(pipeline, clips[:1]), asked, frames=frames, seed=0, seeds=seeds, **told)
    if session.denoising.whole:
        return None
    begin, first, count, last = time.perf_counter(), 0, 0, 0.0
    start = begin
    for made in session.extend(session.planned, last=True):
        last = time.perf_counter()
        count += made.pixels.shape[1]
        if not first:
            start, first = last, count
    return (count - first) / (last - start) if count > first else count / (last - begin)
