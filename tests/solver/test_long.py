"""Given frames, and clips longer than the deep block's window."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from starflow import Chunks, Flow, Sequential, Window, decode
from starflow.model import to_grid, to_sequence, token_order
from starflow.solver import BlockDecoder, Span
from starflow.solver.loop import invert

from ..flows import CASES, VIDEO, condition, latents, make_flow, null

EXACT = Window(size=9, tolerance=0.0)
WINDOWED = make_flow(VIDEO | {"local_attn_window": 3})
SPREAD = make_flow(VIDEO | {"local_attn_window": 3, "top_order": "spread"})


def deep(flow: Flow, z: Tensor, y: Tensor | None, prefix: Tensor | None = None) -> Tensor:
    """What the deep block makes of noise that fits its window: a grid."""
    return decode(flow, z, y, schedule=Sequential(), prefix=prefix).latents[0]


@pytest.mark.parametrize("flow", [WINDOWED, SPREAD])
@pytest.mark.parametrize(("frames", "carried"), [(4, 1), (4, 2), (6, 1), (7, 2)])
def test_sliding_windows_are_decodes_one_after_the_other(flow: Flow, frames: int, carried: int) -> None:
    z, y = latents(flow, frames=frames), condition(flow)
    got = decode(flow, z, y, schedule=EXACT, context_frames=carried).latents[0]
    block = flow._blocks()[-1]
    grid = flow.encode(z, y).latents[0]
    expected = deep(flow, z[:, :3], y)
    while expected.shape[1] < frames:
        first = expected.shape[1] - carried
        noise, given = grid[:, first : first + 3], expected[:, first:]
        layout = block.layout(*noise.shape[1:4], y, image=False)
        known = to_sequence(given, layout.order[: given[0, ..., 0].numel()])
        x, _ = invert(BlockDecoder(block, layout, 2, y), to_sequence(noise, layout.order), Sequential(), known)
        later = to_grid(x, layout.order, *noise.shape[1:4])
        assert torch.equal(later[:, :carried], given)
        expected = torch.cat([expected, later[:, carried:]], 1)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_context_is_three_quarters_of_the_window_by_default() -> None:
    z, y = latents(WINDOWED, frames=5), condition(WINDOWED)
    default = decode(WINDOWED, z, y, schedule=EXACT).x
    assert torch.equal(default, decode(WINDOWED, z, y, schedule=EXACT, context_frames=2).x)
    assert not torch.equal(default, decode(WINDOWED, z, y, schedule=EXACT, context_frames=1).x)


def published(
    flow: Flow, noise: Tensor, y: Tensor | None, carried: int, block: int, threshold: float, most: int
) -> tuple[Tensor, list[int]]:
    """The deep block by the published scheme, written out: all windows of a clip in one sequence, without a cache.

    `inputs` holds what each position of the window was last read as: what the published cache was computed from.

    Args:
        noise: of the deep block, a grid (batch, frames, height, width, channels).
        carried, block, threshold, most: frames of context, tokens of a chunk, change that ends it, cap of its passes.
    """
    deep = flow._blocks()[-1]
    frames, frame = flow.config.local_attn_window, noise.shape[2] * noise.shape[3]
    assert frames is not None
    assert deep.conditioner is not None
    layout = deep.layout(frames, *noise.shape[2:4], y, image=False)
    order = token_order(deep.order, noise.shape[1], *noise.shape[2:4])
    z = to_sequence(noise, order)
    total = z.shape[1]
    x = torch.cat([torch.zeros_like(z[:, :1]), z], 1)  # position n is read as token n - 1
    passes, done, begin, end = [], 0, 0, min(total, frames * frame)
    inputs = torch.zeros(z.shape[0], frames * frame + 1, z.shape[2], dtype=z.dtype)
    while True:
        while done < end:
            size = min(block if done <= frame else 4 * block, end - done)
            here = slice(done - begin, done - begin + size)
            for count in range(1, most + 1):
                read = done - frame if count == 1 and done > frame else done
                inputs[:, here] = x[:, read : read + size]
                affine, _ = deep.conditioner(inputs[:, 1:], y, layout)
                new = affine.like(affine.raw[:, here]).decode(z[:, done : done + size])
                change = (new - x[:, done + 1 : done + size + 1]).square().mean() / new.square().mean()
                x[:, done + 1 : done + size + 1] = new
                if change < threshold:
                    break
            passes.append(count)
            done += size
        if end == total:
            return to_grid(x[:, 1:], order, *noise.shape[1:4]), passes
        begin, end = end - carried * frame, min(total, end + (frames - carried) * frame)
        inputs[:, : carried * frame] = x[:, begin : begin + carried * frame]


@pytest.mark.parametrize("carried", [1, 2])
@pytest.mark.parametrize("threshold", [1e-2, 1e-6])
def test_chunks_go_on_in_a_new_window_as_published(carried: int, threshold: float) -> None:
    flow = make_flow(VIDEO | {"local_attn_window": 3}, spread=0.8).double()
    z, y = latents(flow, frames=7), condition(flow)
    schedule = Chunks(block=4, threshold=threshold, max_iterations=20)
    got = decode(flow, z, y, schedule=schedule, context_frames=carried)
    with torch.no_grad():
        expected, passes = published(flow, flow.noise_grid(z), y, carried, 4, threshold, 20)
    report = got.reports[0]
    assert report is not None
    assert list(report.passes) == passes
    assert len(set(passes)) > 1
    torch.testing.assert_close(got.latents[0], expected, rtol=0, atol=1e-10)


def test_the_published_window_takes_over_sixteen_frames() -> None:
    assert [Span.default_context(frames) for frames in (2, 3, 4, 6, 8, 12, 21)] == [1, 2, 3, 4, 6, 9, 16]


@pytest.mark.parametrize("carried", [0, 3, 4, -1])
def test_a_context_that_leaves_no_new_frame_is_refused(carried: int) -> None:
    with pytest.raises(ValueError, match=rf"context_frames is {carried}, expected 1 to 2 \(local_attn_window is 3\)"):
        decode(WINDOWED, latents(WINDOWED, frames=5), condition(WINDOWED), context_frames=carried)


def test_reports_of_windows_add_up() -> None:
    z, y = latents(WINDOWED, frames=6), condition(WINDOWED)
    report = decode(WINDOWED, z, y, schedule=EXACT, context_frames=2).reports[0]
    assert report is not None
    assert report.tokens == 6 * 15  # tokens carried over are not solved for again
    assert sum(report.accepted) == report.tokens * 2


@pytest.mark.parametrize("weight", [0.0, 1.5])
@pytest.mark.parametrize("name", ["video", "video spread", "video shallow blocks over time", "video spread shifted"])
def test_given_frames_come_back_and_the_rest_goes_on_from_them(name: str, weight: float) -> None:
    flow = make_flow(CASES[name])
    z, y = latents(flow, frames=4), condition(flow)
    prefix = latents(flow, frames=2, seed=8)
    options = {"null": null(flow), "guidance": weight, "schedule": EXACT}
    decoded = decode(flow, z, y, prefix=prefix, **options)
    torch.testing.assert_close(decoded.x[:, :2], prefix, atol=1e-4, rtol=1e-4)
    # The deep block keeps them bit for bit.
    entering = flow.encode(prefix, y).latents[-2]
    assert torch.equal(decoded.latents[0][:, :2], entering)
    # Noise at given frames is not read.
    other = z.clone()
    other[:, :2] = 7.0
    assert torch.equal(decode(flow, other, y, prefix=prefix, **options).x[:, 2:], decoded.x[:, 2:])
    # Continuing what the flow itself made changes nothing.
    if weight == 0.0:
        whole = decode(flow, z, y, **options).x
        again = decode(flow, z, y, prefix=whole[:, :2].clone(), **options).x
        torch.testing.assert_close(again, whole, atol=1e-3, rtol=1e-3)


def test_frames_given_to_a_long_clip() -> None:
    z, y = latents(WINDOWED, frames=5), condition(WINDOWED)
    for frames in (1, 3):
        prefix = latents(WINDOWED, frames=frames, seed=8)
        got = decode(WINDOWED, z, y, prefix=prefix, schedule=EXACT).x
        torch.testing.assert_close(got[:, :frames], prefix, atol=1e-4, rtol=1e-4)


def test_prefixes_that_do_not_fit() -> None:
    z, y = latents(WINDOWED, frames=5), condition(WINDOWED)
    prefix = latents(WINDOWED, frames=4)
    for given, message in [
        (prefix, "prefix has 4 frames, expected at most local_attn_window 3"),
        (prefix[:1], r"prefix has shape \[1, 4, 2, 3, 5\], expected \(batch 2, fewer than 5 frames"),
        (latents(WINDOWED, frames=5), "fewer than 5 frames"),
        (prefix[:, 0], r"prefix has shape \[2, 2, 3, 5\]"),
        (prefix[..., :4], r"prefix has frames of \[2, 3, 4\], expected \[2, 3, 5\] like the noise"),
    ]:
        with pytest.raises(ValueError, match=message):
            decode(WINDOWED, z, y, prefix=given)


@pytest.mark.parametrize("order", ["L2R", "R2L"])
def test_a_block_that_goes_backwards_cannot_continue_frames(order: str) -> None:
    flow = make_flow(CASES["video backwards in time"] | {"seq_order": order})
    z = latents(flow, image=False)
    with pytest.raises(ValueError, match=r"prefix is given, expected temporal_causal > 0: a block runs backwards"):
        decode(flow, z, condition(flow), prefix=z[:, :1])


def test_labels_of_clips_reach_every_frame() -> None:
    """Frame-local blocks see frames as samples: each has the label of its clip."""
    flow = make_flow(CASES["video of classes"])
    x = latents(flow, batch=3)
    y = torch.tensor([2, 0, -1])
    together = flow.encode(x, y).z
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], flow.encode(x[i : i + 1], y[i : i + 1]).z, atol=1e-5, rtol=1e-5)
    guided = decode(flow, x, y, guidance=1.0, schedule=EXACT).x
    torch.testing.assert_close(guided[2:], decode(flow, x[2:], y[2:], schedule=EXACT).x, atol=1e-4, rtol=1e-4)
