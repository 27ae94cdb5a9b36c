"""STARFlow-V in PyTorch: flows over images and videos, their solver and everything around them."""

from starflow.config import ConfigError, FlowConfig
from starflow.model import Flow, Guidance
from starflow.sampling import Pipeline, SampleOptions, Session
from starflow.solver import Chunks, Decoded, Sequential, SolveReport, Window, decode, solve

__all__ = [
    "Chunks",
    "ConfigError",
    "Decoded",
    "Flow",
    "FlowConfig",
    "Guidance",
    "Pipeline",
    "SampleOptions",
    "Sequential",
    "Session",
    "SolveReport",
    "Window",
    "decode",
    "solve",
]
