"""What ends a training."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """Training cannot go on: data or loss that is not finite, or a run that does not fit its folder."""


def not_finite(clip: str) -> TrainingError:
    """The error for a clip, by its name, that holds NaN or infinity."""
    return TrainingError(f"training: clip {clip} holds NaN or infinity, expected finite pixels")
