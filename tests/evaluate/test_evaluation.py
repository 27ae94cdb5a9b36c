"""Evaluation of a model: what is compared with what, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from starflow.config import RunConfig
from starflow.data import Clip, MovingDigits
from starflow.evaluate import evaluate, score
from starflow.sampling import Pipeline, SampleOptions

Configure = Callable[..., RunConfig]
Build = Callable[[RunConfig], Pipeline]

FRAMES, SIZE = 4, 16
# The fewest whose frame differences are more than features, with three of them to a clip, and with one.
COUNT, COUNT_OF_PAIRS = 22, 65
STEPS = 3


def digits(count: int, first: int = 0, frames: int = FRAMES, size: int = SIZE) -> list[Clip]:
    clips = MovingDigits(frames=frames, size=size)
    return [clips.item(index) for index in range(first, first + count)]


REAL, OTHERS = digits(COUNT), digits(COUNT, COUNT)


def run(pipeline: Pipeline, **options: Any) -> Any:
    return evaluate(pipeline, REAL, OTHERS, REAL + OTHERS, steps=STEPS, **options)


def test_everything_is_told(pipeline: Pipeline) -> None:
    done: list[str] = []
    found = run(pipeline, options=SampleOptions(seed=5), batch=16, tell=done.append)
    assert done[:3] == ["clips 1 to 16 of 22", "clips 17 to 22 of 22", "one clip as a stream"]
    assert found.seeds == tuple(range(5, 5 + COUNT))
    assert found.clips.shape == (COUNT, FRAMES, 1, SIZE, SIZE)
    # The clips of random weights are far from digits.
    assert found.made.frechet > 2 * found.floor.frechet > 0
    assert found.made.frechet_motion > 2 * found.floor.frechet_motion > 0
    assert found.made.precision < found.floor.precision
    bits = [item.bits_per_dim for item in score(pipeline, REAL, seed=5)]
    assert found.bits_per_dim == pytest.approx(sum(bits) / COUNT)
    assert [(span.first, span.last) for span in found.drift] == [(0, FRAMES - 1)]
    assert found.drift[0].frechet == pytest.approx(found.made.frechet)
    assert found.drift_floor == pytest.approx(found.floor.frechet)
    assert found.frames_per_second > 0
    values = json.loads(json.dumps(found.to_mapping()))
    assert values["made"]["frechet"] == found.made.frechet
    assert values["drift"] == [{"first": 0, "last": FRAMES - 1, "frechet": found.drift[0].frechet}]
    assert "clips" not in values


def test_clips_have_the_captions_of_real_ones_and_only_seeds_differ(pipeline: Pipeline) -> None:
    found = run(pipeline, options=SampleOptions(seeds=tuple(range(3, 3 + COUNT))), batch=16)
    assert found.seeds == tuple(range(3, 3 + COUNT))
    expected = pipeline.sample([clip.caption for clip in REAL[16:]], seeds=tuple(range(19, 25))).pixels
    assert found.clips[16:] == pytest.approx(expected, abs=1e-4)


def test_longer_clips_are_compared_by_their_beginning_and_drift_in_whole(configure: Configure, build: Build) -> None:
    rolling = build(configure(attention_frames=2, text_embed=True))
    found = run(rolling, options=SampleOptions(frames=10), second=np.int64(4))
    assert json.loads(json.dumps(found.to_mapping()))["second"] == 4
    assert found.clips.shape[1] == found.frames == 10
    assert found.made.made_frames == found.made.real_frames == COUNT * FRAMES
    assert [(span.first, span.last) for span in found.drift] == [(0, 3), (4, 7), (6, 9)]


def test_given_frames_are_left_out(configure: Configure, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    with_given = build(configure(attention_frames=2, text_embed=True))
    half = COUNT_OF_PAIRS
    clips = digits(2 * half)
    seconds = []
    sample = Pipeline.sample

    def spy(self: Pipeline, *arguments: Any, **options: Any) -> Any:
        made = sample(self, *arguments, **options)
        seconds.append(made.report.seconds)
        return made

    monkeypatch.setattr(Pipeline, "sample", spy)
    monkeypatch.setattr("starflow.evaluate.evaluation._stream_rate", lambda *_: None)
    found = evaluate(with_given, clips[:half], clips[half:], clips, steps=STEPS, given=2, batch=half)
    given = torch.stack([clip.pixels[:2] for clip in clips[:half]])
    assert torch.equal(found.clips[:, :2], given)
    assert found.made.made_frames == found.made.real_frames == half * (FRAMES - 2)
    assert found.drift[0][:2] == (2, 3)
    assert found.frames_per_second == pytest.approx(half * (FRAMES - 2) / sum(seconds))


def test_actions_are_those_of_the_clip_then_of_the_next(
    configure: Configure, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    played = build(configure(frame_dim=1, attention_frames=2, text_embed=True))
    told = torch.arange(COUNT * FRAMES, dtype=torch.float32).reshape(COUNT, FRAMES, 1)
    told[:, 0] = torch.nan
    real = [replace(clip, frame_conditions=vectors) for clip, vectors in zip(REAL, told, strict=True)]
    others = [replace(clip, frame_conditions=vectors) for clip, vectors in zip(OTHERS, told, strict=True)]
    seen = []
    sample = Pipeline.sample

    def spy(self: Pipeline, *arguments: Any, **options: Any) -> Any:
        seen.append(options["actions"])
        return sample(self, *arguments, **options)

    monkeypatch.setattr(Pipeline, "sample", spy)
    evaluate(played, real, others, real, steps=STEPS, options=SampleOptions(frames=9), second=9)
    actions = torch.cat(seen)[..., 0].nan_to_num(-1)
    assert actions[1].tolist() == [-1, 5, 6, 7, 9, 10, 11, 13, 14]
    assert actions[-1].tolist() == [-1, 85, 86, 87, 1, 2, 3, 5, 6]


def test_sources_go_along(paired: Pipeline) -> None:
    real, others = (
        [replace(clip, source=-clip.pixels, caption="a three moving up") for clip in clips] for clips in (REAL, OTHERS)
    )
    found = evaluate(paired, real, others, real, steps=STEPS)
    sources = torch.stack([clip.source for clip in real[:2] if clip.source is not None])
    expected = paired.sample([clip.caption for clip in real[:2]], source=sources).pixels
    assert found.clips[:2] == pytest.approx(expected, abs=1e-4)


def test_a_model_without_text_ignores_captions(configure: Configure, build: Build) -> None:
    plain = build(configure(txt_size=0, txt_dim=0, conditional_denoiser=False, cond_top_only=False))
    assert plain.text is None
    assert run(plain).clips.shape[0] == COUNT


@pytest.mark.parametrize(
    ("clips", "options", "message"),
    [
        (digits(COUNT, frames=3), {}, r"shape \[3, 1, 16, 16\] .*expected \[4, 1, 16, 16\] like the model's"),
        (digits(COUNT, size=20), {}, r"evaluate: .* has shape \[4, 1, 20, 20\] \(frames, channels, height, width\)"),
        (digits(21), {}, "21 clips give 63 frames to the smallest comparison, expected more than the 64 .* 22 clips"),
        (digits(23), {"others": REAL}, "others has 22 clips, expected 23 like real"),
        (REAL, {"second": 2}, "22 clips give 44 frames to the smallest comparison, .* at least 33 clips"),
        (REAL, {"given": 4}, "given is 4, expected 0 to 3, fewer than a training clip has"),
        (REAL, {"options": SampleOptions(frames=3)}, "frames is 3, expected at least 4, those of the training clips"),
    ],
)
def test_bad_input_is_told(pipeline: Pipeline, clips: list[Clip], options: dict[str, Any], message: str) -> None:
    others = options.pop("others", clips)
    with pytest.raises(ValueError, match=message):
        evaluate(pipeline, clips, others, clips, steps=STEPS, **options)
