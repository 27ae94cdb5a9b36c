"""Sessions: frames do not depend on how they are asked for, windows are bounded, and what does not fit is named."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from starflow import Chunks, Flow, Guidance, Sequential, Window, decode, noise
from starflow.codecs import BlockTransform
from starflow.model import to_sequence
from starflow.sampling import Denoising, Frames, Session
from starflow.solver import BlockDecoder, Conditions, Decoding, NotFiniteError, Schedule, Span, checked
from starflow.solver.loop import Inversion

from ..flows import CASES, VIDEO, condition, latents, make_flow, null

# Latents of 4 channels: pixels in blocks of 2 x 2.
PIXELS = VIDEO | {"in_channels": 4, "learnable_self_denoiser": True, "conditional_denoiser": True}
LONG = make_flow(PIXELS | {"local_attn_window": 3, "top_order": "spread"})
WHOLE = make_flow(PIXELS | {"shallow_block_local": False, "cond_top_only": False})
CODEC = BlockTransform(patch=2, channels=1)
SHAPE = (2, 4, 3, 5)
LOOSE = Window(size=11, tolerance=0.05)


def session(
    flow: Flow = LONG,
    *,
    span: Span | None = None,
    schedule: Schedule = LOOSE,
    guidance: float = 1.0,
    kind: str = "learned",
    renew: bool = False,
    **changes: object,
) -> Session:
    conditions = Conditions(condition(flow), null(flow), Guidance(guidance), schedule)
    denoising = Denoising(kind, 0.2, 0.2, 2, 1 if kind == "learned" else 0, whole=kind == "score")  # type: ignore[arg-type]
    span = Span(3, 2) if span is None else span
    return Session(flow, CODEC, SHAPE, (3, 4), conditions, span, denoising, renew=renew, **changes)  # type: ignore[arg-type]


def together(frames: Sequence[Frames], name: str = "pixels") -> Tensor:
    return torch.cat([getattr(part, name) for part in frames], 1)


def pixels(frames: int) -> Tensor:
    return torch.rand(2, frames, 1, 6, 10, generator=torch.Generator().manual_seed(5)) * 2 - 1


@pytest.mark.parametrize("kind", ["learned", "none"])
@pytest.mark.parametrize("given", [0, 1, 3])
@pytest.mark.parametrize("schedule", [LOOSE, Window(size=40, tolerance=0.02), Sequential()])
def test_frames_do_not_depend_on_how_they_are_asked_for(schedule: Schedule, given: int, kind: str) -> None:
    """To the last bit, at a tolerance where other windows would give other bits; also past the end of a window."""

    def begin() -> Session:
        made = session(schedule=schedule, kind=kind)
        if given:
            made.prefill(pixels(given))
        return made

    whole = list(begin().extend(7, last=True, together=True))
    one_by_one = list(begin().extend(7, last=True))
    assert [part.first for part in one_by_one] == list(range(given, given + 7))
    pieces = begin()
    drawn = noise.draw((3, 4), 4, *SHAPE[1:], first=given + 3)
    parts = list(pieces.extend(1)) + list(pieces.extend(2)) + list(pieces.extend(drawn, last=True))
    endless = begin().extend()
    some = [next(endless) for _ in range(7)]
    for name in ("noisy", "latents", "pixels"):
        expected = together(whole, name)
        assert expected.shape[1] == 7
        assert torch.equal(together(one_by_one, name), expected)
        assert torch.equal(together(parts, name), expected)
        assert torch.equal(
            together(some, name)[:, :-1], expected[:, :-1]
        )  # the last of a clip is cleaned without another


def test_an_iterator_that_is_left_goes_on_later() -> None:
    expected = together(list(session().extend(6, last=True)))
    made = session()
    first = made.extend(4)
    parts = [next(first), next(first)]
    parts += list(made.extend(2, last=True))
    assert torch.equal(together(parts), expected)


def test_pieces_of_blocks_that_look_over_time() -> None:
    whole = list(session(WHOLE, span=Span(5)).extend(5, last=True, together=True))
    made = session(WHOLE, span=Span(5))
    parts = [part for count, last in ((2, False), (1, False), (2, True)) for part in made.extend(count, last=last)]
    for name in ("noisy", "pixels"):
        assert torch.equal(together(parts, name), together(whole, name))


def test_a_flow_that_goes_backwards_waits_for_the_whole_clip() -> None:
    flow = make_flow(CASES["video backwards in time"] | {"in_channels": 4})
    made = session(flow, span=Span(3), kind="score")
    assert list(made.extend(2)) == []
    frames = together(list(made.extend(1, last=True)), "noisy")
    z = noise.draw((3, 4), 3, *SHAPE[1:])
    options = {"null": null(flow), "guidance": 1.0, "schedule": LOOSE}
    assert torch.equal(frames, decode(flow, z, condition(flow), **options).x)


@pytest.mark.parametrize("frames", [3, 8])
def test_noisy_frames_are_those_of_decode(frames: int) -> None:
    """The inverse of the flow at once, whose windows are those of the model."""
    got = together(list(session().extend(frames, last=True)), "noisy")
    z = noise.draw((3, 4), frames, *SHAPE[1:])
    decoded = decode(LONG, z, condition(LONG), null=null(LONG), guidance=1.0, schedule=LOOSE, context_frames=2)
    assert torch.equal(got, decoded.x)


def test_frames_behind_a_beginning_are_those_of_decode_with_a_prefix() -> None:
    made = session()
    given = made.prefill(pixels(2))
    got = together(list(made.extend(3, last=True)), "noisy")
    z = noise.draw((3, 4), 5, *SHAPE[1:])
    options = {"null": null(LONG), "guidance": 1.0, "schedule": LOOSE, "context_frames": 2}
    decoded = decode(LONG, z, condition(LONG), prefix=given.noisy, **options)
    assert torch.equal(got, decoded.x[:, 2:])
    torch.testing.assert_close(given.noisy - given.latents, 0.2 * noise.draw((3, 4), 2, *SHAPE[1:], purpose="train"))


def test_a_frame_is_final_when_its_successor_is_there() -> None:
    """The denoiser looks one frame ahead; without it, and at the end, no frame waits."""
    made = session()
    assert len(list(made.extend(3))) == 2
    assert made.frames == 2
    assert len(list(made.extend(1, last=True))) == 2
    assert len(list(session(kind="none").extend(3))) == 3
    assert len(list(session(kind="score").extend(3))) == 0


def test_the_flow_runs_no_further_than_a_frame_needs() -> None:
    """Streaming solves the deep block up to the frame; what is solved beyond stays within the solver's window."""
    made = session(kind="none", schedule=Window(size=1, tolerance=0.0), guidance=0.0)
    frames = made.extend(100)
    area = SHAPE[2] * SHAPE[3]
    for count in range(1, 7):
        next(frames)
        deep = made.reports[0]
        assert deep is not None
        assert deep.tokens == count * area
        assert deep.rows == 2 * deep.tokens


def test_nothing_grows_with_the_clip() -> None:
    def held(made: Session) -> int:
        """Numbers that a session keeps: its tensors, and all that hang on it."""
        found: dict[int, int] = {}
        seen: set[int] = set()
        stack: list[object] = [made]
        while stack:
            item = stack.pop()
            if id(item) in seen or isinstance(item, Flow | type | Callable):  # type: ignore[arg-type]
                continue
            seen.add(id(item))
            if isinstance(item, Tensor):
                found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
            elif isinstance(item, dict):
                stack += item.values()
            elif isinstance(item, list | tuple):
                stack += item
            elif type(item).__module__.startswith("starflow") or type(item).__name__ == "deque":
                stack += list(getattr(item, "__dict__", {}).values())
                stack += list(item) if type(item).__name__ == "deque" else []
        return sum(found.values()) + len(found)

    made = session()
    frames = made.extend()
    sizes = []
    for _ in range(31):
        next(frames)
        sizes.append(held(made))
    assert sizes[30] == sizes[20] == sizes[10]  # the same place in a window of 3 frames with 2 carried over


def test_a_changed_prompt_is_a_new_beginning() -> None:
    """What comes after it is what a session with the other text makes of the frames before it."""
    exact = Window(size=11, tolerance=0.0)
    made = session(kind="none", schedule=exact)
    frames = made.extend(9)
    before = together([next(frames) for _ in range(4)], "noisy")
    other = condition(LONG, seed=9)
    assert other is not None
    made.change(other)
    after = together([next(frames) for _ in range(3)], "noisy")
    conditions = checked(LONG, torch.empty(2, 1, *SHAPE[1:]), Conditions(other, null(LONG), Guidance(1.0), exact))
    known = LONG.known(before[:, 2:], other, SHAPE[1:])
    fresh = Decoding(LONG, SHAPE, conditions, Span(3, 2), known=known)
    with torch.inference_mode():
        fresh.push(noise.draw((3, 4), 3, *SHAPE[1:], first=4), more=True)
        got = torch.cat([frame for _ in range(3) if (frame := fresh.pull()) is not None], 1)
    # Its context was encoded from data, up to rounding what the other solved for.
    torch.testing.assert_close(after, got, atol=2e-3, rtol=2e-3)
    unchanged = together(list(session(kind="none", schedule=exact).extend(9)), "noisy")
    assert torch.equal(before, unchanged[:, :4])
    assert float((after - unchanged[:, 4:7]).abs().max()) > 0.05


def test_a_prompt_that_changes_to_itself_before_a_window_begins_changes_nothing() -> None:
    """A window begins after 3 frames, then after each one: there the change is no other beginning."""
    made = session(kind="none")
    frames = made.extend(6)
    parts = [next(frames) for _ in range(4)]
    made.change(condition(LONG))  # type: ignore[arg-type]
    parts += list(frames)
    assert torch.equal(together(parts, "noisy"), together(list(session(kind="none").extend(6)), "noisy"))


def test_text_before_the_first_frame_is_the_text() -> None:
    other = condition(WHOLE, seed=9)
    for given in (0, 2):
        made, told = session(WHOLE, span=Span(5)), session(WHOLE, span=Span(5))
        made.conditions = dataclasses.replace(made.conditions, y=other)
        made._texts = [(0, other)]
        if given:
            made.prefill(pixels(given))
            told.prefill(pixels(given), other)
        else:
            told.change(other)  # type: ignore[arg-type]
        assert torch.equal(together(list(made.extend(3, last=True))), together(list(told.extend(3, last=True))))


def test_a_renewed_context_is_cleaned_and_noised_again() -> None:
    plain, renewed = (list(session(renew=renew).extend(7, last=True)) for renew in (False, True))
    assert torch.equal(together(plain, "noisy")[:, :3], together(renewed, "noisy")[:, :3])
    assert not torch.equal(together(plain, "noisy")[:, 3:], together(renewed, "noisy")[:, 3:])
    again = session(renew=True)
    parts = list(again.extend(2)) + list(again.extend(5, last=True))
    assert torch.equal(together(parts), together(renewed))


def test_a_sink_stays_in_every_window() -> None:
    """The first frame is the first of each window: other first frames, other continuations."""
    flow = make_flow(PIXELS | {"local_attn_window": 4})
    plain = together(list(session(flow, span=Span(4, 3)).extend(9)), "noisy")
    sink = together(list(session(flow, span=Span(4, 3, 1)).extend(9)), "noisy")
    assert torch.equal(plain[:, :4], sink[:, :4])
    assert not torch.equal(plain[:, 5:], sink[:, 5:])


def test_given_noise_is_what_is_decoded() -> None:
    z = 0.5 * noise.draw((3, 4), 4, *SHAPE[1:])
    got = list(session().extend(z, last=True))
    drawn = list(session(temperature=0.5).extend(4, last=True))
    assert torch.equal(together(got), together(drawn))


def test_solves_do_not_depend_on_pieces() -> None:
    """Of plain torch too, up to rounding: sweeps that reached beyond the noise at hand are done again."""
    flow = make_flow(VIDEO | {"top_order": "spread"})
    block, grid = flow.solving_order()[0], flow.encode(latents(flow), condition(flow)).latents[0]
    layout = block.layout(*grid.shape[1:4], condition(flow), image=False)
    z = to_sequence(grid, layout.order)
    results = []
    for cuts in ([45], [1, 9, 20, 45], list(range(1, 46))):
        solve = Inversion(BlockDecoder(block, layout, 2, condition(flow)), LOOSE, z[:, :0])
        begin = 0
        for end in cuts:
            solve.extend(z[:, begin:end], more=end < 45)
            assert solve.run(end) == end
            begin = end
        results.append(solve.x)
        assert sum(solve.report().accepted) >= 2 * 45
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])


def test_chunks_come_at_once() -> None:
    z = noise.draw((3, 4), 3, *SHAPE[1:])
    got = together(list(session(schedule=Chunks(4), kind="none").extend(3, last=True, together=True)), "noisy")
    options = {"null": null(LONG), "guidance": 1.0, "schedule": Chunks(4)}
    assert torch.equal(got, decode(LONG, z, condition(LONG), **options).x)


WRONG: list[tuple[Callable[[Session], object], str]] = [
    (lambda s: s.change(torch.zeros(2, 3, 6)), r"y has shape \[2, 3, 6\], expected \(2, at most 3 text tokens, 5\)"),
    (lambda s: s.change(torch.zeros(1, 3, 5)), r"y has shape \[1, 3, 5\], expected \(2, at most 3 text tokens, 5\)"),
    (lambda s: s.change(torch.zeros(2, 2, 5)), r"null has shape \[2, 3, 5\], expected \[2, 2, 5\] like the text"),
    (lambda s: s.change("a prompt"), "text is 'a prompt', expected features"),
    (lambda s: s.prefill(pixels(4)), r"4 latent frames are given, expected at most 3 \(the window\)"),
    (lambda s: s.prefill(pixels(0)), r"frames has shape \[2, 0, 1, 6, 10\], expected \(2 clips, at least 1 frame"),
    (lambda s: s.prefill(pixels(1)[:1]), r"frames has shape \[1, 1, 1, 6, 10\], expected \(2 clips"),
    (lambda s: s.prefill(pixels(1)[..., :8]), r"frames has latents of \[4, 3, 4\], expected \[4, 3, 5\]"),
    (lambda s: s.prefill(math.nan * pixels(1)), "frames holds values that are not finite"),
    (lambda s: (s.prefill(pixels(1)), s.prefill(pixels(1))), "prefill comes after frames"),
    (lambda s: (list(s.extend(1)), s.prefill(pixels(1))), "prefill comes after frames"),
    (lambda s: s.extend(0), "frames is 0, expected at least 1"),
    (lambda s: s.extend("x"), "frames is 'x', expected a number of them, noise or None"),
    (lambda s: s.change(3), "text is 3, expected a prompt, one for each clip, or features"),
    (lambda s: s.change(["a", None]), r"text is \['a', None\], expected a prompt, one for"),
    (
        lambda s: s.extend(torch.zeros(2, 0, 4, 3, 5)),
        r"noise has shape \[2, 0, 4, 3, 5\], expected \(2 clips, at least 1",
    ),
    (lambda s: s.extend(torch.zeros(2, 2, 4, 3, 4)), r"noise has shape \[2, 2, 4, 3, 4\], expected \(2 clips"),
    (lambda s: (s.extend(1, last=True), s.extend(1)), "extend comes after the last frame"),
]


@pytest.mark.parametrize(("act", "message"), WRONG)
def test_what_does_not_fit_is_named(act: Callable[[Session], object], message: str) -> None:
    made = session()
    with pytest.raises(ValueError, match=message):
        act(made)


def test_a_refused_change_changes_nothing() -> None:
    made = session()
    frames = made.extend(5, last=True)
    parts = [next(frames)]
    with pytest.raises(ValueError, match="y has shape"):
        made.change(torch.zeros(2, 3, 6))
    assert torch.equal(together([*parts, *frames]), together(list(session().extend(5, last=True))))


def test_clips_without_a_sliding_window_end_with_it() -> None:
    made = session(WHOLE, span=Span(4))
    with pytest.raises(ValueError, match=r"would have 5 latent frames, expected at most 4 \(the flow has no sliding"):
        made.extend(5)
    with pytest.raises(ValueError, match="would have inf latent frames"):
        made.extend()
    assert len(list(made.extend(4, last=True))) == 4
    with pytest.raises(ValueError, match="expected a flow whose deep block alone reads it"):
        made.change(condition(WHOLE))  # type: ignore[arg-type]


@pytest.mark.parametrize(("span", "message"), [((3, 3), "expected 1 to 2"), ((3, 0), "context_frames is 0")])
def test_spans_that_leave_no_frame(span: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Span(*span)
    with pytest.raises(ValueError, match="sink_frames is 2, expected 0 to 1"):
        Span(3, 2, 2)


def test_noise_that_is_not_finite_is_named() -> None:
    z = noise.draw((3, 4), 4, *SHAPE[1:])
    z[1, 2] = math.nan
    with pytest.raises(NotFiniteError, match="sample 1 is not finite"):
        list(session().extend(z))


def test_text_behind_the_last_frame_is_refused(pipeline) -> None:
    ended = pipeline.session("a three moving up")
    list(ended.extend(2, last=True))
    with pytest.raises(ValueError, match=r"^session: text changes after the last frame was decoded"):
        ended.change("a five")


@pytest.mark.parametrize("mode", [torch.inference_mode(False), torch.inference_mode()], ids=["outside", "inference"])
def test_what_a_caller_writes_to_does_not_reach_the_session(mode) -> None:
    """Buffers that noise and text are given in are used again by who owns them, and frames that came out are theirs."""
    y, noise_of = condition(LONG), torch.randn(2, 5, *SHAPE[1:])
    begin = pixels(1)

    def frames(*, write: bool) -> list[Frames]:
        text, z, given = y.clone(), noise_of.clone(), begin.clone()
        made = Session(
            LONG,
            CODEC,
            SHAPE,
            (3, 4),
            Conditions(text, null(LONG), Guidance(1.0), LOOSE),
            Span(3, 2),
            Denoising("learned", 0.2, 0.2, 2, 1),
        )
        first = made.prefill(given, text)
        coming = made.extend(z)
        out = [dataclasses.replace(first)]
        if write:
            for buffer in (text, z, given):
                buffer.zero_()
            assert torch.equal(first.pixels, begin)
        for some in coming:
            out.append(Frames(some.first, some.pixels.clone(), some.latents.clone(), some.noisy.clone()))
            if write:
                for buffer in (some.pixels, some.latents, some.noisy):
                    buffer.zero_()
        return out

    with mode:
        kept, written = frames(write=False), frames(write=True)
    for name in ("pixels", "latents", "noisy"):
        assert torch.equal(together(kept, name), together(written, name))
