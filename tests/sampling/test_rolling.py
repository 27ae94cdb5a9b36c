"""Sessions whose cache rolls: frames one by one, at once or on from given ones, and what does not go together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import starflow_ext
from starflow import Flow, Guidance, Sequential, Window, decode, noise
from starflow.codecs import BlockTransform
from starflow.config import RunConfig
from starflow.sampling import Denoising, Frames, Pipeline, Session
from starflow.solver import Conditions, Schedule, SolveReport, Span

from ..flows import VIDEO, condition, make_flow, null

FLOW = make_flow(
    VIDEO
    | {
        "in_channels": 4,
        "learnable_self_denoiser": True,
        "conditional_denoiser": True,
        "top_order": "spread",
        "position_embed": True,
        "text_embed": True,
        "attention_frames": 2,
        "previous_frames": 1,
    }
)
# Its deep block decoded in windows.
SEEING = VIDEO | {
    "in_channels": 4,
    "txt_size": 0,
    "txt_dim": 0,
    "cond_top_only": False,
    "frame_dim": 3,
    "top_order": "spread",
    "position_embed": True,
    "attention_frames": 2,
    "previous_frames": 2,
}
CODEC = BlockTransform(patch=2, channels=1)
SHAPE = (2, 4, 3, 5)
LOOSE = Window(size=11, tolerance=0.05)
Configure = Callable[..., RunConfig]
Build = Callable[[RunConfig], Pipeline]


def session(
    flow: Flow = FLOW,
    *,
    frames: int = 4,
    schedule: Schedule = LOOSE,
    ahead: int = 1,
    kind: str = "learned",
    guided: int | None = None,
    weight: float = 1.0,
) -> Session:
    guidance = Guidance(weight, frames=guided, all_blocks=flow.config.cond_top_only)
    conditions = Conditions(condition(flow), null(flow), guidance, schedule)
    denoising = Denoising(kind, 0.2, 0.2, 1, ahead, whole=kind == "score")  # type: ignore[arg-type]
    return Session(flow, CODEC, SHAPE, (3, 4), conditions, Span(frames, behind=2), denoising)


def together(frames: Sequence[Frames], name: str = "pixels") -> Tensor:
    return torch.cat([getattr(part, name) for part in frames], 1)


def pixels(frames: int) -> Tensor:
    return torch.rand(2, frames, 1, 6, 10, generator=torch.Generator().manual_seed(5)) * 2 - 1


@pytest.mark.parametrize("schedule", [LOOSE, Sequential()])
@pytest.mark.parametrize("given", [0, 1, 9])
def test_frames_do_not_depend_on_how_they_are_asked_for(schedule: Schedule, given: int) -> None:
    """To the last bit, also past every place where the cache rolls; any number of given frames."""

    def begin() -> Session:
        made = session(schedule=schedule)
        if given:
            made.prefill(pixels(given))
        return made

    whole = list(begin().extend(9, last=True, together=True))
    one_by_one = list(begin().extend(9, last=True))
    assert [part.first for part in one_by_one] == list(range(given, given + 9))
    pieces = begin()
    drawn = noise.draw((3, 4), 4, *SHAPE[1:], first=given + 5)
    parts = list(pieces.extend(1)) + list(pieces.extend(4, together=True)) + list(pieces.extend(drawn, last=True))
    steps = begin()
    stepped = [steps.step() for _ in range(8)] + list(steps.extend(1))
    assert [part.first for part in stepped] == list(range(given, given + 9))
    for name in ("noisy", "latents", "pixels"):
        expected = together(whole, name)
        assert expected.shape[1] == 9
        assert torch.equal(together(one_by_one, name), expected)
        assert torch.equal(together(parts, name), expected)
        # The last of a clip is cleaned without another.
        assert torch.equal(together(stepped, name)[:, :-1], expected[:, :-1])


def test_a_step_decodes_its_frame_alone() -> None:
    """Without look-ahead; with one, the first step decodes two."""
    for ahead in (0, 1):
        made = session(ahead=ahead)
        for count in range(1, 6):
            frames = made.step()
            assert (frames.first, frames.pixels.shape[1], made.frames) == (count - 1, 1, count)
            report = made.reports[0]
            assert report is not None
            assert report.tokens == (count + ahead) * 15


def test_steps_go_on_where_an_iterator_was_left() -> None:
    made, expected = session(), together(list(session().extend(6)))
    parts = [next(made.extend(3))]
    parts += [made.step() for _ in range(4)]
    assert torch.equal(together(parts), expected)


def test_frames_of_a_flow_with_windows_step_too() -> None:
    flow = make_flow(VIDEO | {"in_channels": 4, "local_attn_window": 3})
    conditions = Conditions(condition(flow), null(flow), Guidance(1.0), LOOSE)
    made, other = (
        Session(flow, CODEC, SHAPE, (3, 4), conditions, Span(3, 2), Denoising("none", 0.2, 0.2, 1, 0)) for _ in range(2)
    )
    assert torch.equal(together([made.step() for _ in range(5)]), together(list(other.extend(5))))
    ends = Session(flow, CODEC, SHAPE, (3, 4), conditions, Span(2), Denoising("none", 0.2, 0.2, 1, 0))
    ends.step(), ends.step()
    with pytest.raises(ValueError, match="the clip would have 3 latent frames, expected at most 2"):
        ends.step()


def test_steps_that_are_refused() -> None:
    with pytest.raises(ValueError, match="condition is given, expected None: the flow reads none"):
        session().step(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="expected a denoiser that does not see whole clips"):
        session(kind="score", ahead=0).step()
    made = session()
    assert len(list(made.extend(2, last=True))) == 2
    with pytest.raises(ValueError, match="step comes after the last frame"):
        made.step()
    conditions = Conditions(condition(FLOW), null(FLOW), Guidance(1.0), LOOSE)
    with pytest.raises(ValueError, match="renew is True, expected False where a cache rolls"):
        Session(
            FLOW, CODEC, SHAPE, (3, 4), conditions, Span(4, behind=2), Denoising("none", 0.2, 0.2, 1, 0), renew=True
        )


def test_noise_of_given_frames_makes_them_again() -> None:
    """More frames than the cache holds."""
    conditions = Conditions(condition(FLOW), null(FLOW), Guidance(0.0), Window(8, 0.0))
    made = Session(FLOW, CODEC, SHAPE, (3, 4), conditions, Span(4, behind=2), Denoising("none", 0.2, 0.2, 1, 0))
    given = CODEC.encode(pixels(11))
    noisy = given + 0.2 * noise.draw((3, 4), 11, *SHAPE[1:], purpose="train")
    again = together(list(made.extend(made.encode(pixels(11)), last=True)), "noisy")
    torch.testing.assert_close(again, noisy, atol=1e-4, rtol=1e-4)


def test_another_text_is_read_by_the_frames_to_come() -> None:
    same, changed = session(), session()
    expected, parts = together(list(same.extend(9))), list(changed.extend(5))
    other = condition(FLOW, seed=8)
    assert other is not None
    changed.change(other)
    parts += list(changed.extend(4))
    got = together(parts)
    assert got.shape == expected.shape
    # The frame that the denoiser looked ahead at keeps the text that it was decoded with.
    assert torch.equal(got[:, :4], expected[:, :4])
    assert (got[:, 5] - expected[:, 5]).abs().max() > 1e-3


@pytest.fixture(scope="module")
def rolling(configure: Configure, build: Build) -> Pipeline:
    return build(configure(attention_frames=2, text_embed=True, position_embed=True))


def test_a_sample_rolls(rolling: Pipeline) -> None:
    """As the session does, to any length, whatever is given."""
    for given in ({}, {"image": torch.zeros(1, 16, 16)}, {"video": torch.zeros(11, 1, 16, 16), "given": 11}):
        options = {"frames": 15, "guidance": 1.0, "certificate": True, **given}
        clip = rolling.sample("a three", **options)
        made = rolling.session("a three", **options)
        count = clip.given
        steps = [made.step() for _ in range(14 - count)]
        assert torch.equal(together(steps, "noisy"), clip.noisy[:, count:14])
        assert clip.pixels.shape[1] == 15
        assert torch.equal(rolling.sample("a three", **options | {"frames": 12}).noisy, clip.noisy[:, :12])
        assert clip.report.backward_error is not None
        assert clip.report.backward_error < 0.1


@pytest.mark.parametrize("options", [{"window_frames": 4}, {"context_frames": 2}, {"sink_frames": 1}, {"renew": True}])
def test_windows_that_are_asked_for_do_not_roll(rolling: Pipeline, options: dict[str, object]) -> None:
    """They encode their context anew, without what came before it."""
    windows = rolling.sample("a three", frames=12, guidance=0.0, **options).noisy
    rolled = rolling.sample("a three", frames=12, guidance=0.0).noisy
    assert windows.shape == rolled.shape
    assert not torch.equal(windows, rolled)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(("context", "sink"), [(2, 0), (3, 1)])
def test_windows_of_a_flow_that_sees_the_frames_before(context: int, sink: int, reference: bool) -> None:
    """A window is decoded from the noise that its frames are encoded to, each window by itself."""
    flow = make_flow(SEEING)
    schedule = Window(size=11, tolerance=1e-6, certificate=True)
    vectors = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(6))

    def begin() -> Session:
        conditions = Conditions(condition(flow), null(flow), Guidance(0.0), schedule)
        span = Span(4, context, sink)
        made = Session(flow, CODEC, SHAPE, (3, 4), conditions, span, Denoising("none", 0.2, 0.2, 0, 0))
        made.tell(vectors)
        return made

    noisy = noise.draw((5, 6), 9, *SHAPE[1:], purpose="train")
    with starflow_ext.reference_mode() if reference else contextlib.nullcontext():
        made = begin()
        parts = list(made.extend(noisy, last=True))
        decoded = together(parts, "noisy")
        assert made.reports[0] is not None
        assert made.reports[0].backward_error < 1e-3  # type: ignore[operator]
    shown = [list(range(4))]
    while shown[-1][-1] < 8:
        done = shown[-1][-1] + 1
        new = range(done, min(done + 4 - context, 9))
        shown.append([*range(sink), *range(done - context + sink, done), *new])
    with torch.no_grad():
        for place, frames in enumerate(shown):
            z = flow.encode(decoded[:, frames], condition(flow), vectors[:, frames]).z
            first = context if place else 0
            torch.testing.assert_close(z[:, first:], noisy[:, frames][:, first:], atol=2e-3, rtol=0)
    # From noise that comes in pieces they are the same; in native code, to the last bit.
    if not reference:
        again = begin()
        pieces = [frame for some in noisy.split([3, 1, 5], 1) for frame in again.extend(some)]
        assert torch.equal(together(pieces, "noisy"), decoded)


def test_a_last_image_of_a_flow_that_sees_the_frames_before(configure: Configure, build: Build) -> None:
    config = configure(attention_frames=2, previous_frames=2, text_embed=True, centred=True)
    text = {**config.text, "vocabulary": [*config.text["vocabulary"][:-1], "last"]}
    pipeline = build(replace(config, text=text, train=replace(config.train, last_frame_prob=0.5)))
    last = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(5)) * 2 - 1
    how: dict[str, Any] = {"seed": 1, "solver": "window:8:1e-6", "denoise": "none"}
    made = pipeline.sample(["", ""], last_image=last, frames=4, **how)
    shape = (5, *made.noisy.shape[2:])
    train, drawn = (noise.draw((1, 2), *shape, purpose=what) for what in ("train", "sample"))  # type: ignore[arg-type]
    known = pipeline.codec.encode(last[:, None]) + config.train.noise_std * train[:, :1]
    with torch.no_grad():
        encoded = pipeline.flow.encode(torch.cat([known, made.noisy], 1), pipeline.condition(["", ""], mode="last"))
    torch.testing.assert_close(encoded.z[:, 1:], drawn[:, 1:] * config.sample.temperature, atol=5e-3, rtol=0)


@pytest.mark.parametrize("reference", [False, True])
def test_the_first_frames_alone_are_guided(reference: bool) -> None:
    """What is not guided is solved by half of the rows, and is the conditional flow's: the certificate says so."""

    def made(guided: int | None) -> tuple[Tensor, SolveReport]:
        schedule = Window(size=11, tolerance=1e-4, certificate=True)
        with starflow_ext.reference_mode() if reference else contextlib.nullcontext():
            own = session(schedule=schedule, kind="none", ahead=0, guided=guided)
            noisy = together(list(own.extend(9, last=True)), "noisy")
        report = own.reports[0]
        assert report is not None
        return noisy, report

    (every, whole), (first, part), (nine, _) = made(None), made(2), made(9)
    assert torch.equal(nine, every)
    torch.testing.assert_close(first[:, :2], every[:, :2])
    assert (first[:, 2:] - every[:, 2:]).abs().max() > 1e-3
    assert part.backward_error is not None
    assert part.backward_error < 1e-3
    assert part.evaluations_per_token < 0.8 * whole.evaluations_per_token


def test_given_frames_count_among_the_guided_ones() -> None:
    guided, free = session(guided=2), session(guided=None, weight=0.0)
    for own in (guided, free):
        own.prefill(pixels(2))
    frames = [together(list(own.extend(3, last=True)), "noisy") for own in (guided, free)]
    torch.testing.assert_close(frames[0], frames[1])


@pytest.mark.parametrize("given", [0, 1])
def test_guided_frames_are_cleaned_before_the_clip_goes_on(given: int) -> None:
    """As a clip that is given them cleaned, and is not guided, goes on; given frames stay as they are."""

    def begin(**options: Any) -> Session:
        made = session(schedule=Window(size=11, tolerance=0.0), **options)
        if given:
            made.prefill(pixels(given))
        return made

    own = begin(guided=2)
    whole = list(own.extend(9 - given, last=True))
    dirty = together(list(begin(kind="none", ahead=0).extend(2 - given, last=True)), "noisy")
    before = CODEC.encode(pixels(given)) if given else dirty[:, :0]
    noisy = torch.cat([before + 0.2 * noise.draw((3, 4), given, *SHAPE[1:], purpose="train"), dirty], 1)
    assert FLOW.denoiser is not None
    with torch.inference_mode():
        clean = torch.cat([before, FLOW.denoiser.denoise(noisy, condition(FLOW), step=0.2)[:, given:]], 1)
    other = session(schedule=Window(size=11, tolerance=0.0), weight=0.0)
    other.prefill(CODEC.decoder()(clean))
    rest = list(other.extend(7, last=True))
    renewed = clean + 0.2 * noise.draw((3, 4), 2, *SHAPE[1:], purpose="train")
    torch.testing.assert_close(together(whole, "noisy")[:, : 2 - given], renewed[:, given:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together(whole, "noisy")[:, 2 - given :], together(rest, "noisy"), atol=1e-3, rtol=1e-3)
    steps = begin(guided=2)
    stepped = together([steps.step() for _ in range(8 - given)])
    assert torch.equal(stepped, together(whole)[:, : 8 - given])
    (report, *_) = own.reports
    assert report is not None
    assert report.tokens == (9 - given) * 15
    # A clip that ends with them keeps what was decoded.
    assert torch.equal(together(list(begin(guided=2).extend(2 - given, last=True)), "noisy"), dirty)


def test_frames_that_are_guided_need_a_cache_that_rolls() -> None:
    with pytest.raises(ValueError, match="guidance: frames is 0, expected None or an integer >= 1"):
        Guidance(1.0, frames=0)
    other = make_flow(VIDEO)
    z = torch.zeros(2, 3, other.config.in_channels, 4, 4)
    with pytest.raises(ValueError, match=r"guidance.frames is 1, expected None for a flow whose cache does not roll"):
        decode(other, z, condition(other), null=null(other), guidance=Guidance(1.0, frames=1))
