"""How is the flow inverted? Noise to data: schedules, the loop, windows, clips of any length, and the certificate."""

from starflow.schedules import Chunks, Schedule, Sequential, Window, parse_solver, solver_text
from starflow.solver.break_even import break_even, cache_folder
from starflow.solver.clip import Conditions, Decoding, Span
from starflow.solver.decode import Decoded, checked, decode
from starflow.solver.decoder import BlockDecoder
from starflow.solver.function import solve
from starflow.solver.loop import certify, invert
from starflow.solver.native import Precision
from starflow.solver.protocol import AffineMaps, Autoregressive, Timed, WindowSweeps
from starflow.solver.report import NotFiniteError, SolveReport
from starflow.solver.rolling import rolling_frames

__all__ = [
    "AffineMaps",
    "Autoregressive",
    "BlockDecoder",
    "Chunks",
    "Conditions",
    "Decoded",
    "Decoding",
    "NotFiniteError",
    "Precision",
    "Schedule",
    "Sequential",
    "SolveReport",
    "Span",
    "Timed",
    "Window",
    "WindowSweeps",
    "break_even",
    "cache_folder",
    "certify",
    "checked",
    "decode",
    "invert",
    "parse_solver",
    "rolling_frames",
    "solve",
    "solver_text",
]
