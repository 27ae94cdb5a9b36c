"""Reports of a call of `Pipeline.sample`: schedule, sweeps, errors and seconds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from starflow.sampling.session import Session
from starflow.solver import solver_text


@dataclass(frozen=True)
class BlockReport:
    """Cost and error of solving one block.

    Args:
        block: index; the last of the flow is the deep one, solved first.
        window: tokens of a sample in one call. sweeps: calls one after the other.
        evaluations_per_token: tokens pushed through the block over tokens of the clips, both halves of guidance
            counted.
        backward_error: max |z' - z| in standard deviations of the noise, where it was asked for.
    """

    block: int
    window: int
    sweeps: int
    evaluations_per_token: float
    backward_error: float | None


@dataclass(frozen=True)
class SampleReport:
    """Options, cost and error of a call of `Pipeline.sample`.

    Args:
        solver: the schedule that ran, as the option's text. precision: precision of decoding. guidance: its weight.
        temperature: factor of the noise.
        denoised: "learned", "score" or "none".
        window, sweeps, evaluations_per_token: those of the deep block, which takes most of the time.
        backward_error: largest of all blocks, where it was asked for; None otherwise.
        blocks: reports of the blocks that have a network, the deep one first.
        seconds: time of text encoder, flow, denoiser and codec together.
        frames_per_second: frames of all clips over `seconds`.
    """

    solver: str
    precision: str
    guidance: float
    temperature: float
    denoised: str
    window: int
    sweeps: int
    evaluations_per_token: float
    backward_error: float | None
    blocks: tuple[BlockReport, ...]
    seconds: float
    frames_per_second: float

    def to_mapping(self) -> dict[str, Any]:
        """Plain values that json can write."""
        return asdict(self)


def report_of(session: Session, seconds: float, frames: int) -> SampleReport:
    """The report of a session that took `seconds` for `frames` pixel frames of all clips."""
    last = len(session.reports) - 1
    blocks = tuple(
        BlockReport(last - place, report.window, report.sweeps, report.evaluations_per_token, report.backward_error)
        for place, report in enumerate(session.reports)
        if report is not None
    )
    errors = [block.backward_error for block in blocks if block.backward_error is not None]
    conditions = session.conditions
    return SampleReport(
        solver=solver_text(conditions.schedule),
        precision=conditions.precision,
        guidance=conditions.guidance.weight,
        temperature=session.temperature,
        denoised=session.denoising.kind,
        window=blocks[0].window,
        sweeps=blocks[0].sweeps,
        evaluations_per_token=blocks[0].evaluations_per_token,
        backward_error=max(errors) if errors else None,
        blocks=blocks,
        seconds=seconds,
        frames_per_second=frames / seconds,
    )
