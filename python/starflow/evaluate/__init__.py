"""How good is it? Bits per dimension of clips, frames and tokens, and what is unusual."""

from starflow.evaluate.files import read_clips
from starflow.evaluate.heat_map import heat_map
from starflow.evaluate.reference import Reference
from starflow.evaluate.scores import LEVELS_BITS, Anomaly, ClipScore, noise_floor, score
from starflow.evaluate.surprise import Surprise, Watcher, surprise

__all__ = [
    "LEVELS_BITS",
    "Anomaly",
    "ClipScore",
    "Reference",
    "Surprise",
    "Watcher",
    "heat_map",
    "noise_floor",
    "read_clips",
    "score",
    "surprise",
]
