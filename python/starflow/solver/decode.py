"""decode: noise to data in one call, the inverse of `Flow.encode`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from starflow.arguments import check_tensor
from starflow.inference import in_inference_mode
from starflow.model import Flow, Guidance
from starflow.schedules import Schedule, as_schedule
from starflow.solver.clip import Conditions, Decoding, Span
from starflow.solver.native import Precision
from starflow.solver.report import SolveReport


@dataclass(frozen=True)
class Decoded:
    """What `decode` returns.

    Args:
        x: data, shape of the noise.
        reports: of each block in the order of solving, the deep one first; None for an identity block.
        latents: grids after each solved block, the last being the data.
    """

    x: Tensor
    reports: tuple[SolveReport | None, ...]
    latents: tuple[Tensor, ...]

    @property
    def backward_error(self) -> float | None:
        """Largest backward error of the blocks, where they were certified."""
        errors = [r.backward_error for r in self.reports if r is not None and r.backward_error is not None]
        return max(errors) if errors else None


@in_inference_mode
def decode(
    flow: Flow,
    z: Tensor,
    y: Tensor | None = None,
    frame_conditions: Tensor | None = None,
    *,
    null: Tensor | None = None,
    guidance: Guidance | float = 0.0,
    schedule: Schedule | str | None = None,
    prefix: Tensor | None = None,
    context_frames: int | None = None,
    temperature: float = 1.0,
    precision: Precision = "float32",
) -> Decoded:
    """Maps noise to data.

    Args:
        flow: in eval mode.
        z: noise, shape of the data.
        y: text or labels as for `encode`.
        frame_conditions: vectors of the frames as for `encode`, those of the prefix included.
        null: text of the empty prompt like `y`, needed for guidance with text. The unconditional half has no vectors of
            frames.
        guidance: a weight, or a `Guidance`.
        schedule: of the solver, or its text (see `parse_solver`); the default is `Window()`.
        prefix: first frames that are given, noisy latents (batch, prefix frames, channels, height, width). The
            deep block continues their tokens; they come back as they are.
        context_frames: frames that a sampling window (`local_attn_window` frames of the deep block) takes over
            from the one before it; the default is three quarters of the window, at least one.
        temperature: divides the attention logits of every block.
        precision: of the native decoding (see `starflow.solver.Precision`); a certificate is taken in
            float32 whatever it is.

    Returns:
        Data, reports and latents (see `Decoded`).

    Raises:
        ValueError: shapes that do not fit, missing text for guidance, a context that leaves no new frame.
        NotFiniteError: the solver met NaN or infinity.
    """
    for name, tensor in (("z", z), *((("prefix", prefix),) if prefix is not None else ())):
        check_tensor("flow", name, tensor)
    image = z.dim() == 4
    guide = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
    how = as_schedule("decode", schedule)
    conditions = checked(flow, z, Conditions(y, null, guide, how, temperature, precision, image))
    told = flow.check_frame_conditions(z, frame_conditions)
    if guide.active and guide.needs_condition and y is None and told is None:
        raise ValueError(f"flow: guidance is {guide.weight}, expected 0 without anything to guide by")
    z = z.unsqueeze(1) if image else z
    window, frames = flow.config.local_attn_window, z.shape[1]
    if prefix is not None and (prefix.dim() != 5 or prefix.shape[1] >= frames or prefix.shape[0] != z.shape[0]):
        raise ValueError(
            f"flow: prefix has shape {list(prefix.shape)}, expected (batch {z.shape[0]}, fewer than {frames} "
            "frames, channels, height, width)"
        )
    span = Span(frames)
    if flow.config.attention_frames is not None and not image:
        area = (z.shape[-2] // flow.config.patch_size) * (z.shape[-1] // flow.config.patch_size)
        span = Span.rolling(flow.config.attention_frames, area)
    elif window is not None and frames > window:
        span = Span(window, Span.default_context(window) if context_frames is None else context_frames)
    given = 0 if prefix is None else prefix.shape[1]
    before = None if told is None else told[:, :given]
    known = None if prefix is None else flow.known(prefix, conditions.y, z.shape[2:], before)
    decoding = Decoding(
        flow, (z.shape[0], *z.shape[2:]), conditions, span, known=known, known_conditions=before, trace=True
    )
    decoding.push(z[:, given:], more=False, frame_conditions=None if told is None else told[:, given:])
    latents = decoding.rest()
    if known is not None:
        latents = [
            torch.cat([known[block.index], solved], 1)
            for block, solved in zip(flow.solving_order(), latents, strict=True)
        ]
    return Decoded(flow.from_grid(latents[-1], image), decoding.reports, tuple(latents))


def checked(flow: Flow, z: Tensor, conditions: Conditions) -> Conditions:
    """Checks that noise like `z` can be decoded under these conditions (arguments as of `decode`); returns them.

    Raises:
        ValueError: noise or text that does not fit, or guidance without something to guide by.
    """
    y, null, guide = conditions.y, conditions.null, conditions.guidance
    if not 0.0 < conditions.temperature < float("inf"):
        raise ValueError(f"flow: temperature is {conditions.temperature}, expected a finite number > 0")
    y = flow.check(z, y, name="z")
    null = flow.check(z, null, name="z", condition="null") if null is not None else None
    if guide.active and flow.config.txt_size > 0 and null is None:
        raise ValueError("flow: null is None, expected text features of the empty prompt (guidance is on)")
    if guide.active and guide.annealed and flow.config.attention_frames is not None:
        raise ValueError(
            "flow: guidance.annealed is True, expected False with flow.attention_frames: its weight grows up to the "
            "end of a clip, which may have none"
        )
    if guide.active and guide.frames is not None:
        config = flow.config
        if config.attention_frames is None:
            raise ValueError(
                f"flow: guidance.frames is {guide.frames}, expected None for a flow whose cache does not roll "
                "(flow.attention_frames)"
            )
        if guide.all_blocks and not config.cond_top_only:
            raise ValueError(
                f"flow: guidance.frames is {guide.frames}, expected None where shallow blocks are guided too "
                "(guidance.all_blocks, without flow.cond_top_only)"
            )
    if guide.active and guide.needs_condition and y is None and not flow.config.frame_dim:
        raise ValueError(f"flow: guidance is {guide.weight}, expected 0 without text or classes to guide by")
    return replace(conditions, y=y, null=null)
