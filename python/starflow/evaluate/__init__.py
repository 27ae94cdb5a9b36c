"""How good is it? Bits per dimension of clips, frames and tokens, what is unusual, and the distance to real clips."""

from starflow.evaluate.evaluation import Evaluation, evaluate
from starflow.evaluate.features import FrameFeatures
from starflow.evaluate.fidelity import (
    Fidelity,
    Span,
    drift,
    features_of,
    fidelity,
    frame_differences,
    frechet_distance,
    precision_recall,
)
from starflow.evaluate.files import read_clips, tell_rates
from starflow.evaluate.heat_map import heat_map
from starflow.evaluate.reference import Reference
from starflow.evaluate.scores import LEVELS_BITS, Anomaly, ClipScore, noise_floor, score
from starflow.evaluate.surprise import Surprise, Watcher, surprise

__all__ = [
    "LEVELS_BITS",
    "Anomaly",
    "ClipScore",
    "Evaluation",
    "Fidelity",
    "FrameFeatures",
    "Reference",
    "Span",
    "Surprise",
    "Watcher",
    "drift",
    "evaluate",
    "features_of",
    "fidelity",
    "frame_differences",
    "frechet_distance",
    "heat_map",
    "noise_floor",
    "precision_recall",
    "read_clips",
    "score",
    "surprise",
    "tell_rates",
]
