"""Bits of the tokens, drawn under the frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from starflow.arguments import check_texts
from starflow.data import Clip, to_frames
from starflow.evaluate.scores import ClipScore
from starflow.extras import import_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def heat_map(clips: Sequence[Clip], scores: Sequence[ClipScore], titles: Sequence[str] | None = None) -> Figure:
    """Draws where the bits of clips are: for each clip its frames, and under them the bits per dimension of the tokens.

    Args:
        clips: what was scored; a latent frame of several pixel frames is shown by the first of them.
        scores: of the clips, with `tokens` and `first_frames`.
        titles: by default the names and the bits of the clips.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no clip, or scores without tokens or of other clips.
    """
    plots = import_extra("matplotlib.figure", purpose="a heat map", extra="plots")
    if not clips or len(clips) != len(scores) or any(None in (item.tokens, item.first_frames) for item in scores):
        raise ValueError(
            f"heat_map: {len(clips)} clips and {len(scores)} scores, expected one score with tokens (per_token) of each"
        )
    other = next((item for clip, item in zip(clips, scores, strict=True) if clip.name != item.name), None)
    if other is not None:
        raise ValueError(f"heat_map: a score is of {other.name}, expected one of each clip, in the order of the clips")
    if titles is not None:
        check_texts("heat_map", "titles", titles)
        if len(titles) != len(clips):
            raise ValueError(f"heat_map: {len(clips)} clips and {len(titles)} titles, expected one of each")
    titles = [f"{item.name}: {item.bits_per_dim:.3f}" for item in scores] if titles is None else titles
    maps = [np.array(item.tokens) for item in scores]
    columns = max(len(bits) for bits in maps)
    figure: Figure = plots.Figure(figsize=(1.1 * columns + 1.2, 2.4 * len(clips)), layout="constrained")
    axes = figure.subplots(2 * len(clips), columns, squeeze=False)
    # A single token far out would leave the rest without contrast.
    low, high = np.percentile(np.concatenate([bits.ravel() for bits in maps]), (1, 99))
    begins = [item.first_frames or () for item in scores]
    for row, (clip, bits, first, title) in enumerate(zip(clips, maps, begins, titles, strict=True)):
        shown = to_frames(clip.pixels).numpy()
        left = axes[2 * row, 0]
        # A title would widen its column: an empty one keeps the room for it.
        left.set_title(" ", fontsize=8)
        left.text(0.0, 1.08, title, fontsize=8, transform=left.transAxes, in_layout=False)
        for column in range(columns):
            upper, lower = axes[2 * row, column], axes[2 * row + 1, column]
            for place in (upper, lower):
                place.set_axis_off()
            if column < len(bits):
                upper.imshow(shown[first[column]].squeeze(-1), cmap="gray", vmin=0, vmax=255)
                image = lower.imshow(bits[column], cmap="magma", vmin=low, vmax=high)
    figure.colorbar(image, ax=axes, label="bits per dimension", shrink=0.6)
    return figure
