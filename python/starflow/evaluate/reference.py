"""Reference: how unusual the bits of a clip are among those of ordinary clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from starflow.evaluate.scores import Anomaly, ClipScore


class Reference:
    """Ordinary clips against which others are judged.

    The p-value is conformal: `(1 + number of ordinary clips at least as far from their mean) / (1 + their number)`. For
    clips drawn like them it is at most a with probability at most a, whatever the model; so `n` clips cannot give less
    than `1 / (n + 1)`.

    Args:
        scores: of the ordinary clips, at least two, all of as many latent frames; they must not have been trained on,
            and must be scored at the same noise as what they are compared with.

    Raises:
        ValueError: too few, of different lengths or noise, or all alike.
    """

    def __init__(self, scores: Sequence[ClipScore]) -> None:
        if len(scores) < 2 or len({len(item.frames) for item in scores}) > 1:
            lengths = ", ".join(map(str, sorted({len(item.frames) for item in scores}))) or "none"
            raise ValueError(
                f"reference: {len(scores)} clips of {lengths} latent frames, expected at least 2 of one length"
            )
        noises = sorted({item.noise_std for item in scores if item.noise_std is not None})
        if len(noises) > 1:
            raise ValueError(
                f"reference: clips are scored at the noise {', '.join(f'{sigma:g}' for sigma in noises)}, expected one"
            )
        self._noise = noises[0] if noises else None
        self._bits = np.array([item.bits_per_dim for item in scores])
        self._frames = np.array([item.frames for item in scores])
        self._deviation, self._deviations = self._bits.std(ddof=1), self._frames.std(0, ddof=1)
        if self._deviation == 0.0 or not self._deviations.all():
            raise ValueError("reference: all clips have the same bits, expected clips that differ")

    def judge(self, item: ClipScore) -> ClipScore:
        """The score with its anomaly.

        Raises:
            ValueError: another number of latent frames than the reference, or a score at another noise.
        """
        if len(item.frames) != self._frames.shape[1]:
            raise ValueError(
                f"reference: {item.name} has {len(item.frames)} latent frames, expected {self._frames.shape[1]} as the "
                "reference has"
            )
        if None not in (self._noise, item.noise_std) and item.noise_std != self._noise:
            raise ValueError(
                f"reference: {item.name} is scored at the noise {item.noise_std:g}, expected {self._noise:g} as the "
                "reference"
            )
        mean = self._bits.mean()
        far = (np.abs(self._bits - mean) >= abs(item.bits_per_dim - mean)).sum()
        frames = (np.array(item.frames) - self._frames.mean(0)) / self._deviations
        return replace(
            item,
            anomaly=Anomaly(
                float((item.bits_per_dim - mean) / self._deviation),
                tuple(frames.tolist()),
                float((1 + far) / (1 + len(self._bits))),
            ),
        )
