"""How are clips made? From prompts and given frames to clips, at once or frame by frame."""

from starflow.sampling.cleaning import Denoising, score_denoise
from starflow.sampling.options import Denoise, SampleOptions, option_help, option_kinds
from starflow.sampling.pipeline import Pipeline, Sampled
from starflow.sampling.report import BlockReport, SampleReport, report_of
from starflow.sampling.session import Frames, Session

__all__ = [
    "BlockReport",
    "Denoise",
    "Denoising",
    "Frames",
    "Pipeline",
    "SampleOptions",
    "SampleReport",
    "Sampled",
    "Session",
    "option_help",
    "option_kinds",
    "report_of",
    "score_denoise",
]
