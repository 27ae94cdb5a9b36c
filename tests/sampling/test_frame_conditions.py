"""Sessions and samples of a flow that reads the actions of frames."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from starflow import Guidance, Window, decode
from starflow.codecs import BlockTransform
from starflow.config import DataConfig, RunConfig
from starflow.evaluate import read_clips
from starflow.sampling import Denoising, Frames, Pipeline, Session
from starflow.solver import Conditions, Span
from starflow.worlds import PaddleBall, record

from ..flows import VIDEO, make_flow

ACTED = VIDEO | {
    "in_channels": 4,
    "txt_size": 0,
    "txt_dim": 0,
    "cond_top_only": False,
    "frame_dim": 3,
    "learnable_self_denoiser": True,
    "conditional_denoiser": True,
    "top_order": "spread",
}
FLOWS = {
    "windows": (make_flow(ACTED | {"local_attn_window": 3}), Span(3, 2)),
    "sink": (make_flow(ACTED | {"local_attn_window": 4}), Span(4, 3, 1)),
    "rolling": (make_flow(ACTED | {"attention_frames": 2, "position_embed": True}), Span.rolling(2, 15)),
}
CODEC = BlockTransform(patch=2, channels=1)
LOOSE = Window(size=11, tolerance=0.05)


def session(name: str, *, ahead: int = 0, kind: str = "learned", guidance: float = 1.0, **changes: Any) -> Session:
    flow, span = FLOWS[name]
    conditions = Conditions(None, None, Guidance(guidance), LOOSE)
    denoising = Denoising(kind, 0.2, 0.2, 2, ahead, whole=kind == "score")  # type: ignore[arg-type]
    return Session(flow, CODEC, (2, 4, 3, 5), (3, 4), conditions, span, denoising, **changes)


def vectors(frames: int, seed: int = 1) -> Tensor:
    told = torch.randn(2, frames, 3, generator=torch.Generator().manual_seed(seed))
    told[0, 1] = torch.nan
    return told


def pixels(frames: int) -> Tensor:
    return torch.rand(2, frames, 1, 6, 10, generator=torch.Generator().manual_seed(5)) * 2 - 1


def together(frames: list[Frames], name: str = "pixels") -> Tensor:
    return torch.cat([getattr(part, name) for part in frames], 1)


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("given", [0, 2])
def test_frames_do_not_depend_on_how_their_actions_are_told(name: str, ahead: int, given: int) -> None:
    told = vectors(given + 6)

    def begin(count: int) -> Session:
        made = session(name, ahead=ahead)
        if count:
            made.tell(told[:, :count])
        if given:
            made.prefill(pixels(given))
        return made

    whole = together(list(begin(given + 6).extend(6, last=True, together=True)))
    assert torch.equal(together(list(begin(given + 6).extend(6, last=True))), whole)
    pieces = begin(given)
    pieces.tell(told[:, given : given + 2])
    parts = list(pieces.extend(1))
    pieces.tell(told[:, given + 2 :])
    assert torch.equal(together(parts + list(pieces.extend(5, last=True))), whole)
    if not ahead:
        steps = begin(given)
        stepped = together([steps.step(told[:, frame]) for frame in range(given, given + 6)])
        assert torch.equal(stepped, whole)
    # What is told comes into the frame that it is told of, and not into those before.
    told[:, given + 3] += 1.0
    apart = (together(list(begin(given + 6).extend(6, last=True, together=True))) - whole).abs().amax((0, 2, 3, 4))
    seen = 3 - ahead
    assert (apart[:seen] == 0).all()
    assert (apart[3:] > 1e-4).all()


def test_an_action_may_be_its_number() -> None:
    one, other = session("rolling"), session("rolling")
    for action in (2, 0, 1):
        expected = one.step(torch.eye(3)[action].expand(2, 3))
        assert torch.equal(other.step(action).pixels, expected.pixels)
    assert torch.equal(one.step().pixels, other.step(torch.full((3,), torch.nan)).pixels)


def test_with_a_look_ahead_a_step_tells_the_frame_that_is_decoded() -> None:
    made, expected = session("rolling", ahead=1), session("rolling", ahead=1)
    told = vectors(4)
    expected.tell(torch.cat([told[:, :1], told], 1))
    frames = expected.extend(5)
    for frame in range(4):
        assert torch.equal(made.step(told[:, frame]).pixels, next(frames).pixels)


@pytest.mark.parametrize("name", FLOWS)
def test_noise_of_frames_under_their_actions_makes_them_again(name: str) -> None:
    told, shown = vectors(5), pixels(5)
    first = session(name, kind="none", guidance=0.0)
    with pytest.raises(ValueError, match=r"session: frame_conditions is 'up', expected a tensor"):
        first.tell("up")  # type: ignore[arg-type]
    first.tell(told)
    z = first.encode(shown)
    again = session(name, kind="none", guidance=0.0)
    again.tell(told)
    noisy = together(list(again.extend(z, last=True, together=True)), "noisy")
    clean = CODEC.encode(shown)
    # The decoded frames carry the noise that they were encoded with.
    assert ((noisy - clean).std() - 0.2).abs() < 0.05


def test_a_score_is_that_of_the_frames_under_their_actions() -> None:
    results = []
    for told in (vectors(3), vectors(3, seed=2)):
        made = session("rolling", kind="score")
        made.tell(told)
        results.append(together(list(made.extend(3, last=True))))
    assert (results[0] - results[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (3, "session: condition has the action 3, expected an integer from 0 to 2"),
        ("up", "session: condition has the action 'up', expected an integer from 0 to 2"),
        (torch.zeros(4), r"session: condition has shape \[4\], expected \[3\] or \[2, 3\]"),
        (torch.zeros(3, 3), r"session: condition has shape \[3, 3\], expected \[3\] or \[2, 3\]"),
        (torch.full((3,), torch.inf), "flow: condition holds infinity or NaN"),
    ],
)
def test_a_condition_that_does_not_fit_is_refused_and_nothing_is_lost(condition: Any, message: str) -> None:
    made, other = session("rolling"), session("rolling")
    with pytest.raises(ValueError, match=message):
        made.step(condition)
    assert torch.equal(made.step(1).pixels, other.step(1).pixels)


def test_what_is_told_has_to_fit() -> None:
    made = session("rolling")
    with pytest.raises(ValueError, match=r"flow: frame_conditions has shape \[2, 2, 4\], expected \[2, 2, 3\]"):
        made.tell(torch.zeros(2, 2, 4))
    flow = make_flow(VIDEO | {"in_channels": 4, "txt_size": 0, "txt_dim": 0, "cond_top_only": False})
    conditions = Conditions(None, None, Guidance(0.0), LOOSE)
    plain = Session(flow, CODEC, (2, 4, 3, 5), (3, 4), conditions, Span(3), Denoising("none", 0.2))
    with pytest.raises(ValueError, match=r"frame_conditions is given, expected None .*frame_dim is 0"):
        plain.tell(torch.zeros(2, 2, 3))
    with pytest.raises(ValueError, match=r"session: condition is given, expected None: the flow reads none"):
        plain.step(1)


@pytest.fixture
def acted(configure: Callable[..., RunConfig], build: Callable[[RunConfig], Pipeline]) -> Pipeline:
    config = configure(txt_size=0, txt_dim=0, cond_top_only=False, frame_dim=3, conditional_denoiser=False)
    data = DataConfig(frames=4, height=16, width=16, actions=("stay", "up", "down"))
    return build(dataclasses.replace(config, data=data))


def test_actions_of_a_sample(acted: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"
    path.write_text('{"action": null}\n{"action": 1}\n{"action": 1}\n{"action": 0}\n')
    expected = acted.sample("", actions=path).pixels
    vector = torch.tensor([[torch.nan] * 3, [0, 1, 0], [0, 1, 0], [1, 0, 0]])
    for given in ([None, 1, 1, 0], vector, vector[None], str(path)):
        assert torch.equal(acted.sample("", actions=given).pixels, expected)
    named = acted.sample("", actions="up, up:2,stay").pixels
    assert torch.equal(named, acted.sample("", actions=[1, 1, 1, 0]).pixels)
    assert not torch.equal(named, expected)
    assert not torch.equal(acted.sample("", actions=[None, 1, 1, 0], guidance=2.0).pixels, expected)
    two = acted.sample(["", ""], actions=[None, 1, 1, 0], seeds=(0, 0)).pixels
    torch.testing.assert_close(two[0], two[1])


def test_actions_of_another_order_are_refused(acted: Pipeline, tmp_path: Path) -> None:
    """The number of one means another: `world.json` beside them tells, or above the folder of a split."""
    clips = tmp_path / "clips"
    record(PaddleBall(size=32), clips, 8)
    path = clips / "clip-000000.jsonl"
    expected = acted.sample("", actions=path, frames=8).pixels
    assert len(read_clips(acted, [clips, path.with_suffix(".mp4")])) == 1
    for order, known in ((["up", "stay", "down"], False), ([], True), (["stay", "up", "down"], True)):
        (clips / "world.json").write_text(json.dumps({"world": "paddle", "actions": order}))
        calls = [
            lambda: acted.sample("", actions=path, frames=8).pixels,
            lambda: read_clips(acted, clips),
            lambda: read_clips(acted, path.with_suffix(".mp4")),
        ]
        if known:
            assert torch.equal(calls[0](), expected)
            assert all(len(call()) == 1 for call in calls[1:])
            continue
        for call in calls:
            with pytest.raises(
                ValueError, match=r"world.json names up, stay, down, expected stay, up, down as the model"
            ):
                call()
    (clips / "test").mkdir()
    for part in (path, path.with_suffix(".mp4")):
        part.rename(clips / "test" / part.name)
    (clips / "world.json").write_text(json.dumps({"world": "paddle", "actions": ["up", "stay", "down"]}))
    with pytest.raises(
        ValueError, match=r"clips/world.json names up, stay, down, expected stay, up, down as the model"
    ):
        read_clips(acted, clips / "test")


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ("left:3", r"sample: actions has 'left:3', expected a file that ends in \.jsonl, or names .*stay, up, down\)"),
        ("up:0", "sample: actions has 'up:0', expected"),
        (f"up:{9 * 10**20}", "sample: actions has 'up:9000.*', expected less than 10000000 frames"),
        ([0, 1, 2, 0, 1], "sample: actions are of 5 frames, expected at most 4, those of the clip"),
        ([0, 3], "frame 1 has the action 3, expected an integer from 0 to 2"),
        ([], r"sample: actions has shape \[1, 0, 3\], expected \(1 clips, at least 1 frame, 3\)"),
        (torch.zeros(2, 2), r"sample: actions has shape \[1, 2, 2\], expected \(1 clips, at least 1 frame, 3\)"),
        ("none.jsonl", r"none\.jsonl does not exist"),
    ],
)
def test_actions_that_do_not_fit_are_refused(acted: Pipeline, actions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        acted.sample("", actions=actions)


def test_a_model_without_actions_refuses_them(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="sample: actions are given, expected a model that was trained with them"):
        pipeline.sample("a three moving up", actions=[0, 1])


def test_decode_of_a_session_is_decode() -> None:
    flow, _ = FLOWS["rolling"]
    told = vectors(4)
    made = session("rolling", kind="none", guidance=0.0)
    made.tell(told)
    z = torch.randn(2, 4, 4, 3, 5, generator=torch.Generator().manual_seed(3))
    got = together(list(made.extend(z, last=True, together=True)), "noisy")
    torch.testing.assert_close(got, decode(flow, z, None, told, schedule=LOOSE).x)


@pytest.mark.parametrize("name", FLOWS)
def test_a_condition_is_of_the_next_frame_or_refused(name: str) -> None:
    asked = session(name)
    asked.extend(3)
    with pytest.raises(ValueError, match=r"^session: condition is given, and 3 frames .* expected at most the 0"):
        asked.step(1)
    for _ in range(3):
        asked.step()
    told = vectors(5)
    told[:, :4] = torch.nan
    told[:, 3:] = torch.eye(3)[1]
    expected = session(name)
    expected.tell(told)
    frames = together(list(expected.extend(5)))
    assert torch.equal(together([asked.step(1), asked.step(1)]), frames[:, 3:])


def test_conditions_of_frames_that_are_guided_together_are_told_before() -> None:
    def guided() -> Session:
        made = session("rolling")
        made.conditions = dataclasses.replace(made.conditions, guidance=Guidance(1.0, frames=2))
        return made

    with pytest.raises(ValueError, match=r"^session: condition is given, and the first 2 frames are decoded together"):
        guided().step(1)
    told, one, other = torch.eye(3)[None, [0, 1, 2]].expand(2, -1, -1), guided(), guided()
    one.tell(told)
    other.tell(told[:, :2])
    expected = together(list(one.extend(3)))
    assert torch.equal(together([other.step(), other.step(), other.step(2)]), expected)


@pytest.mark.parametrize("name", FLOWS)
def test_what_is_told_of_frames_behind_the_last_is_refused(name: str) -> None:
    ending = session(name)
    ending.tell(vectors(4))
    with pytest.raises(ValueError, match=r"^session: vectors of 4 frames were told, expected at most 3"):
        ending.extend(3, last=True)
    frames = list(ending.extend(4, last=True))
    assert together(frames).shape[1] == 4
    with pytest.raises(ValueError, match=r"^session: frame_conditions are of 1 frames, expected at most 0: the clip"):
        ending.tell(vectors(2)[:, :1])


@pytest.mark.parametrize("name", FLOWS)
def test_a_session_is_copied_whole_or_not(name: str) -> None:
    first = session(name, ahead=1)
    begun = [first.step(1), first.step(0)]
    second = copy.deepcopy(first)
    assert torch.equal(together([first.step(2), first.step(2)]), together([second.step(2), second.step(2)]))
    assert len(begun) == 2
    for call in (copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match=r"^session: it cannot be pickled or copied, expected copy.deepcopy, or"):
            call(first)
