"""STARFlow-V: video generation by one normalizing flow."""

from starflow.config import ConfigError, FlowConfig
from starflow.flow import Decoded, Flow
from starflow.guidance import Guidance
from starflow.inverse import solve
from starflow.solver import Chunks, Sequential, SolveReport, Window

__all__ = [
    "Chunks",
    "ConfigError",
    "Decoded",
    "Flow",
    "FlowConfig",
    "Guidance",
    "Sequential",
    "SolveReport",
    "Window",
    "solve",
]
