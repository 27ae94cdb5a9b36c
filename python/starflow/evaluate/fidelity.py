"""Fidelity: how near the frames and the motion of made clips are to those of real ones, as sets.

The Fréchet distance takes both sets of features as normal and compares their means and covariances: it grows with
whatever differs, and is above 0 for two finite sets of one kind, so it is read beside that of two real halves.
Precision is the share of made frames that lie among the real ones, recall the share of real frames that lie among the
made ones: a model that makes one perfect clip has precision 1 and recall near 0.

Reference: Heusel et al., GANs Trained by a Two Time-Scale Update Rule (2017); Kynkäänniemi et al., Improved Precision
and Recall Metric for Assessing Generative Models (2019).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from starflow.arguments import check_tensor
from starflow.evaluate.features import check_values
from starflow.extras import import_extra
from starflow.inference import without_autocast
from starflow.messages import shown
from starflow.numeric import integer

# Frames whose features are computed together, and rows of distances that are held at a time.
_TOGETHER = 256
NEIGHBOURS = 3


@dataclass(frozen=True)
class Fidelity:
    """How near made clips are to real ones (see the module).

    Args:
        frechet: Fréchet distance of the frames' features.
        frechet_motion: that of the differences of adjacent frames; None without features of motion.
        precision: share of made frames that lie among real ones.
        recall: share of real frames that lie among made ones.
        made_clips, real_clips: that were compared.
        made_frames, real_frames: of all these clips together.
    """

    frechet: float
    frechet_motion: float | None
    precision: float
    recall: float
    made_clips: int
    real_clips: int
    made_frames: int
    real_frames: int

    def to_mapping(self) -> dict[str, Any]:
        """Plain values that json can write."""
        return asdict(self)


class Span(NamedTuple):
    """Fréchet distance of a span of frames.

    Args:
        first, last: numbers of its first and last frame, counted from 0, both part of it.
        frechet: distance of the made frames of the span to all real frames.
    """

    first: int
    last: int
    frechet: float


def frame_differences(clips: Tensor) -> Tensor:
    """Half the difference of each frame to the next, all clips behind one another: what features of motion are of.

    Args:
        clips: (count, frames, channels, height, width) in [-1, 1], at least two frames.

    Returns:
        (count * (frames - 1), channels, height, width) in [-1, 1].

    Raises:
        ValueError: clips of another shape, or of one frame.
    """
    check_tensor("frame_differences", "clips", clips)
    if clips.ndim != 5 or clips.shape[1] < 2:
        raise ValueError(
            f"frame_differences: clips have shape {list(clips.shape)}, expected (count, frames, channels, height, "
            "width) with at least 2 frames"
        )
    return (clips[:, 1:] - clips[:, :-1]).flatten(0, 1) / 2.0


def frechet_distance(made: Tensor, real: Tensor) -> float:
    """Fréchet distance of two sets of features, as if both were normal, computed by torchmetrics in float64.

    Args:
        made, real: (rows, features), at least two rows each; a covariance of full rank takes more rows than features.

    Raises:
        ImportError: torchmetrics is not installed (extra `evaluate`).
        ValueError: sets of another shape, or values that are not finite.
    """
    check_tensor("frechet_distance", "made", made)
    check_tensor("frechet_distance", "real", real)
    if made.ndim != 2 or real.ndim != 2 or made.shape[1] != real.shape[1] or min(len(made), len(real)) < 2:
        raise ValueError(
            f"frechet_distance: made and real have shapes {list(made.shape)} and {list(real.shape)}, expected (rows, "
            "features) with at least 2 rows and the same features"
        )
    fid = import_extra("torchmetrics.image.fid", purpose="the Fréchet distance", extra="evaluate")
    made, real = made.detach().double(), real.detach().double()
    for name, rows in (("made", made), ("real", real)):
        if not bool(rows.isfinite().all()):
            raise ValueError(f"frechet_distance: {name} holds values that are not finite")
    # The distance does not depend on where zero is; torchmetrics subtracts squares, which cancel far from it.
    centre = real.mean(0)
    metric = fid.FrechetInceptionDistance(_Given(made.shape[1]))
    metric.update(real - centre, real=True)
    metric.update(made - centre, real=False)
    # Rounding may leave the distance of equal sets a little below 0.
    return max(float(metric.compute()), 0.0)


class _Given(nn.Module):
    """Features that are given in place of frames."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def precision_recall(made: Tensor, real: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Precision and recall by manifolds of nearest neighbours.

    A set's manifold is the union of balls around its points, each of the radius to the nearest `neighbours`-th other.
    Frames of one clip are near one another, so neighbours are counted by clip: the radius of a point is its distance to
    the `neighbours`-th nearest of the other clips, a clip being as near as its nearest frame.

    Args:
        made, real: features (clips, frames, features), more clips than `neighbours` each.
        neighbours: k of the paper.

    Returns:
        The share of made points on the real manifold, and of real points on the made one.

    Raises:
        ValueError: too few clips, or sets of another shape.
    """
    nearest = integer(neighbours)
    if nearest is None or nearest < 1:
        raise ValueError(f"precision_recall: neighbours is {shown(neighbours)}, expected an integer >= 1")
    for name, points in (("made", made), ("real", real)):
        check_tensor("precision_recall", name, points)
    for name, points in (("made", made), ("real", real)):
        if points.ndim != 3 or points.shape[-1] != real.shape[-1]:
            raise ValueError(
                f"precision_recall: {name} has shape {list(points.shape)}, expected (clips, frames, features)"
            )
        if len(points) <= neighbours:
            raise ValueError(
                f"precision_recall: {name} has {len(points)} clips, expected at least {neighbours + 1}: more than the "
                "neighbours that a radius reaches"
            )
    return _share_on(made, real, neighbours), _share_on(real, made, neighbours)


def _share_on(points: Tensor, manifold: Tensor, neighbours: int) -> float:
    """Share of points (clips, frames, features) that lie on the manifold of others."""
    clips, frames, _ = manifold.shape
    support, asked = manifold.flatten(0, 1).double(), points.flatten(0, 1).double()
    radii = []
    for clip in range(clips):
        by_clip = torch.cdist(manifold[clip].double(), support).reshape(-1, clips, frames).amin(2)
        by_clip[:, clip] = torch.inf
        radii.append(by_clip.kthvalue(neighbours, 1).values)
    reach = torch.cat(radii)
    on = [(torch.cdist(part, support) <= reach).any(1) for part in asked.split(_TOGETHER)]
    return float(torch.cat(on).double().mean())


@without_autocast()
@torch.inference_mode()
def features_of(features: nn.Module, frames: Tensor) -> Tensor:
    """Features of frames, a part at a time, on the device of the network.

    Args:
        features: from frames (count, channels, height, width) to features (count, numbers). It computes as in eval
            mode, whatever mode it is left in: features shall not depend on the other frames of a part, nor on chance.
        frames: (count, channels, height, width).

    Raises:
        ValueError: the network returns another shape.
    """
    if not isinstance(features, nn.Module):
        raise ValueError(f"features: the network is {shown(features)}, expected a torch.nn.Module")
    check_tensor("features", "frames", frames)
    device = next((tensor.device for tensor in (*features.parameters(), *features.buffers())), frames.device)
    parts = []
    with _evaluating(features):
        for part in frames.split(_TOGETHER):
            got = features(part.to(device))
            if not isinstance(got, Tensor) or got.ndim != 2 or len(got) != len(part):
                told = f"shape {list(got.shape)}" if isinstance(got, Tensor) else shown(got)
                raise ValueError(
                    f"features: the network returns {told} for {len(part)} frames, expected [{len(part)}, numbers]"
                )
            parts.append(got.cpu())
    return torch.cat(parts)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """A network in eval mode for the block."""
    trained = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True


def fidelity(made: Tensor, real: Tensor, features: nn.Module, motion_features: nn.Module | None) -> Fidelity:
    """Compares made clips with real ones.

    Args:
        made, real: clips (count, frames, channels, height, width) in [-1, 1]; counts and frames may differ. Made values
            beyond that range are clipped, as where a clip is shown.
        features: a network from frames (N, channels, height, width) in [-1, 1] to (N, numbers), such as
            `FrameFeatures`, or one of ImageNet.
        motion_features: the same, of `frame_differences`; None leaves motion out.

    Raises:
        ImportError: torchmetrics is not installed (extra `evaluate`).
        ValueError: clips of different sizes, of another shape or range, or three clips or fewer.
    """
    made, real = _clips("fidelity", "made", made), _clips("fidelity", "real", real)
    _same_size("fidelity", made, real)
    ours, theirs = (_by_clip(features, clips) for clips in (made, real))
    precision, recall = precision_recall(ours, theirs)
    motion = None
    if motion_features is not None:
        differences = [features_of(motion_features, frame_differences(clips)) for clips in (made, real)]
        motion = frechet_distance(*differences)
    return Fidelity(
        frechet=frechet_distance(ours.flatten(0, 1), theirs.flatten(0, 1)),
        frechet_motion=motion,
        precision=precision,
        recall=recall,
        made_clips=len(made),
        real_clips=len(real),
        made_frames=made.shape[0] * made.shape[1],
        real_frames=real.shape[0] * real.shape[1],
    )


def drift(made: Tensor, real: Tensor, features: nn.Module, *, second: int) -> list[Span]:
    """Fréchet distance of each second of made clips to real frames: a model that drifts is farther in the last.

    Every span has as many frames, so that distances compare: where the length is no multiple of a second, the last span
    reaches back into the one before it.

    Args:
        made, real: clips (count, frames, channels, height, width) in [-1, 1]; counts and frames may differ.
        features: as of `fidelity`.
        second: frames of a second, or of any other span.

    Returns:
        Spans from first to last; one alone where the clips have no more than a second.

    Raises:
        ImportError: torchmetrics is not installed (extra `evaluate`).
        ValueError: clips that do not fit, as of `fidelity`, or a second below 1.
    """
    if (whole := integer(second)) is None or whole < 1:
        raise ValueError(f"drift: second is {shown(second)}, expected an integer of at least 1 frame")
    made, real = _clips("drift", "made", made), _clips("drift", "real", real)
    _same_size("drift", made, real)
    known = features_of(features, real.flatten(0, 1))
    ours = _by_clip(features, made)
    frames = ours.shape[1]
    length = min(second, frames)
    starts = list(range(0, frames - length + 1, length))
    if starts[-1] + length < frames:
        starts.append(frames - length)
    return [
        Span(start, start + length - 1, frechet_distance(ours[:, start : start + length].flatten(0, 1), known))
        for start in starts
    ]


def _by_clip(features: nn.Module, clips: Tensor) -> Tensor:
    """Features (clips, frames, numbers)."""
    return features_of(features, clips.flatten(0, 1)).reshape(*clips.shape[:2], -1)


def _clips(who: str, name: str, clips: Tensor) -> Tensor:
    """Clips in float32, clipped to [-1, 1].

    Raises:
        ValueError: another shape or dtype, or values that are not finite or of another scale.
    """
    check_tensor(who, name, clips)
    if clips.ndim != 5 or 0 in clips.shape:
        raise ValueError(
            f"{who}: {name} has shape {list(clips.shape)}, expected (count, frames, channels, height, width)"
        )
    check_values(who, name, clips)
    return clips.detach().float().clamp(-1.0, 1.0)


def _same_size(who: str, made: Tensor, real: Tensor) -> None:
    if made.shape[2:] != real.shape[2:]:
        raise ValueError(
            f"{who}: made has frames of {list(made.shape[2:])} (channels, height, width), expected "
            f"{list(real.shape[2:])} like real"
        )
