"""Protocols: what the solver can invert, and what the native window offers it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from starflow_ext.jacobi_solve import SolveProgress, SweepCount


class AffineMaps(Protocol):
    """The map `x = shift + scale * z` of each token of a call; `starflow.model.Affine` is the one of networks."""

    @property
    def raw(self) -> Tensor:
        """The parameters of the maps, (rows, tokens, ...): a row for each sample, with guidance two."""

    def like(self, raw: Tensor) -> AffineMaps:
        """Maps of the same kind with the parameters `raw`."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Data to noise, and the log-determinant of each token."""

    def decode(self, z: Tensor) -> Tensor:
        """Noise to data."""

    def update_(self, x: Tensor, z: Tensor) -> Tensor:
        """Overwrites `x` by its decoded value; returns the largest change of each token in units of its scale."""


class Autoregressive(Protocol):
    """What can be inverted: a map from the tokens before a window to the affine maps of the window."""

    @property
    def first_token(self) -> int:
        """Tokens below this pass unchanged: `x = z`."""

    @property
    def tokens(self) -> int:
        """Tokens of a sample."""

    @property
    def frame_tokens(self) -> int:
        """Tokens of a frame; the token one frame earlier is where guesses come from."""

    @property
    def halves(self) -> int:
        """2 where a call evaluates a conditional and an unconditional half, else 1."""

    def initial_guess(self, z: Tensor) -> Tensor:
        """First guess of the tokens before anything is evaluated, like `z`."""

    def default_window(self, batch: int, first: int) -> int:
        """Tokens of a sample in a call where the schedule gives no size; arguments as of `break_even`."""

    def evaluate(self, previous: Tensor, start: int | Tensor, final: Tensor | None = None) -> AffineMaps:
        """Affine maps of the tokens `start ..`; row i of `previous` is token `start + i - 1`.

        Cached keys and values of the first `final` tokens of each sample stay as they are.
        """

    @property
    def native_window(self) -> WindowSweeps | None:
        """The window schedule in native code, or None where it runs in plain torch."""


class WindowSweeps(Protocol):
    """The window schedule of a model in native code (see `starflow_ext.ops.jacobi_solve`)."""

    def begin(self, x: Tensor, first: int) -> SolveProgress:
        """Where a solve of the tokens `first ..` starts."""

    def sweep(
        self, progress: SolveProgress, z: Tensor, first: int, size: int, tolerance: float, most_sweeps: int
    ) -> SweepCount:
        """Up to `most_sweeps` sweeps, in place."""


class Timed(Autoregressive, Protocol):
    """A model whose calls can be timed, and whose times can be kept under a name."""

    @property
    def device(self) -> torch.device:
        """The device that it computes on."""

    @property
    def channels(self) -> int:
        """Dimensions of a token."""

    @property
    def cost_key(self) -> str:
        """A name of everything but the rows that the cost of a call depends on."""
