"""`solve`: the inverse of any causal affine flow, given as a function, by the loop of `starflow.solver`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from starflow.arguments import check_flag, check_tensor
from starflow.messages import shown
from starflow.numeric import integer
from starflow.schedules import Schedule, as_schedule
from starflow.solver.loop import invert
from starflow.solver.report import SolveReport
from starflow_ext.window_sweep import places, token_numbers

Function = Callable[..., tuple[Tensor, Tensor]]


def solve(
    fn: Function,
    z: Tensor,
    *,
    axis: int = 1,
    order: Tensor | None = None,
    frame: int | None = None,
    windowed: bool = False,
    known: Tensor | None = None,
    schedule: Schedule | str | None = None,
) -> tuple[Tensor, SolveReport]:
    """Finds x with `x = shift(x) + scale(x) * z`, where shift and scale of a token depend on earlier tokens alone.

    Tokens are the slices of `z` along one axis; a masked autoregressive network over features has one number a token.
    All tokens of a window are evaluated together, sweep after sweep, and accepted one by one (see `starflow.solver`).
    After as many sweeps as there are tokens the result is exact whatever `fn` is; a flow whose tokens depend little on
    those just before them takes far fewer.

    Args:
        fn: x like `z` to (shift, scale), each like `z`, scale > 0; it is called without gradients. What it returns for
            a token must not depend on that token or later ones. With `windowed` it is called as
            `fn(x, slice(start, stop))` and returns the tokens `start .. stop - 1` alone: what is before `start` is
            final, so it may be cached.
        z: noise (batch, ...), float32 or float64.
        axis: of the tokens; not the first, which is the batch.
        order: (tokens,) the token that comes n-th, where dependency does not run along the axis. Not with `windowed`.
        frame: tokens of a frame, where tokens resemble those one frame earlier: a token's first guess is then made with
            their shift and scale. None: all are one frame.
        windowed: see `fn`.
        known: first tokens that are given, like `z` but shorter along the axis, in the order of dependency.
        schedule: a schedule or its text (see `parse_solver`); None is `Window()`. A window without a size takes all
            tokens; with `windowed`, one frame.

    Returns:
        x like `z`, and the report. Its `rows` count the tokens of the windows, not what `fn` computes beyond them.

    Raises:
        ValueError: an argument of another type or one that does not fit, or what `fn` returns; a function that is seen
            not to be causal: its map of the first token depends on x, or that of another changes though no token before
            it did.
        NotFiniteError: a token is not finite.

    Examples:
        >>> import torch, starflow
        >>> def fn(x):  # an autoregression: a token is half of the one before it, plus noise of deviation 0.1
        ...     return 0.5 * torch.nn.functional.pad(x[:, :-1], (1, 0)), torch.full_like(x, 0.1)
        >>> z = torch.ones(1, 4)
        >>> x, report = starflow.solve(fn, z, schedule=starflow.Window(tolerance=1e-6, certificate=True))
        >>> x
        tensor([[0.1000, 0.1500, 0.1750, 0.1875]])
        >>> report.sweeps <= 4, report.backward_error < 1e-5
        (True, True)
    """
    model = FunctionDecoder(fn, z, axis, order, frame, windowed=windowed)
    given = None if known is None else model.given(known)
    x, report = invert(model, model.sequence(z), as_schedule("solve", schedule), given)
    # Made in inference mode, where a tensor cannot later take part in autograd.
    return model.like_z(x).clone(), report


# Difference between two results for the same token that rounding may make, relative to scale and shift.
_SAME = 1e-3


class FunctionDecoder:
    """A function of x in the form that the solver inverts, and the x that it sees; arguments as of `solve`."""

    halves = 1
    first_token = 0

    def __init__(
        self, fn: Function, z: Tensor, axis: int, order: Tensor | None, frame: int | None, *, windowed: bool
    ) -> None:
        if not callable(fn):
            raise ValueError(f"solve: fn is {type(fn).__name__}, expected a function of x that returns shift and scale")
        for name, tensor in (("z", z), *((("order", order),) if order is not None else ())):
            _check_tensor(name, tensor)
        whole, of_frame = integer(axis), integer(frame)
        if whole is None:
            raise ValueError(f"solve: axis is {shown(axis)}, expected an integer")
        if frame is not None and of_frame is None:
            raise ValueError(f"solve: frame is {shown(frame)}, expected an integer or None")
        axis, frame = whole, of_frame
        check_flag("solve", "windowed", windowed)
        if z.dim() < 2 or z.numel() == 0 or z.dtype not in (torch.float32, torch.float64):
            dtype = str(z.dtype).removeprefix("torch.")
            raise ValueError(
                f"solve: z has shape {list(z.shape)} and dtype {dtype}, expected (batch, ...) with at least one token, "
                "float32 or float64"
            )
        if not -z.dim() < axis < z.dim() or axis == 0:
            raise ValueError(f"solve: axis is {axis}, expected an axis of z {list(z.shape)} other than the first")
        self._fn, self._windowed, self._axis = fn, windowed, axis
        self._shape = z.movedim(axis, 1).shape
        self.tokens = self._shape[1]
        if frame is not None and not 1 <= frame <= self.tokens:
            raise ValueError(f"solve: frame is {frame}, expected 1 to the {self.tokens} tokens of z")
        self.frame_tokens = self.tokens if frame is None else frame
        # Scale and shift of the first token, which depend on nothing.
        self._first: tuple[Tensor, Tensor] | None = None
        # The maps of the call before, and the token that they begin with.
        self._before: tuple[int, tuple[Tensor, ...]] | None = None
        # Whether the function was seen to fill the same tensors at each call.
        self._refills = False
        self._order = self._place = None
        if order is not None:
            if windowed:
                raise ValueError("solve: order is given with windowed, expected tokens in the order of dependency")
            if order.is_floating_point() or order.dtype == torch.bool:
                dtype = str(order.dtype).removeprefix("torch.")
                raise ValueError(f"solve: order has dtype {dtype}, expected an integer one")
            if order.shape != (self.tokens,) or order.sort().values.tolist() != list(range(self.tokens)):
                raise ValueError(
                    f"solve: order has shape {list(order.shape)}, expected a permutation of 0 .. {self.tokens - 1}"
                )
            if order.tolist() != list(range(self.tokens)):
                self._order = order.to(z.device)
                self._place = self._order.argsort()
        # Row n + 1 holds token n, as in the solver; row 0 stands for what is before the first.
        self._x = z.new_zeros(z.shape[0], self.tokens + 1, math.prod(self._shape[2:]))

    def sequence(self, x: Tensor) -> Tensor:
        """Shape and order of `z` to (batch, tokens, channels)."""
        x = self._flat(x)
        return x if self._order is None else x.index_select(1, self._order)

    def _flat(self, x: Tensor) -> Tensor:
        """(batch, tokens, channels) in the order along the axis."""
        if x.dim() == 2:
            return x.unsqueeze(-1)
        x = x.movedim(self._axis, 1)
        return x.reshape(*x.shape[:2], self._x.shape[2])

    def like_z(self, x: Tensor) -> Tensor:
        """(batch, tokens, channels) to the shape and order of `z`."""
        x = x if self._place is None else x.index_select(1, self._place)
        if len(self._shape) == 2:
            return x.squeeze(-1)
        return x.reshape(*x.shape[:2], *self._shape[2:]).movedim(1, self._axis)

    def given(self, known: Tensor) -> Tensor:
        """First tokens, like `z` but shorter along its axis, as (batch, known tokens, channels)."""
        _check_tensor("known", known)
        moved = known.movedim(self._axis, 1) if known.dim() == len(self._shape) else known
        expected = [*self._shape[:1], moved.shape[1] if moved.dim() > 1 else 0, *self._shape[2:]]
        if list(moved.shape) != expected or moved.shape[1] > self.tokens or known.dtype != self._x.dtype:
            raise ValueError(
                f"solve: known has shape {list(known.shape)} and dtype {str(known.dtype).removeprefix('torch.')}, "
                f"expected those of z, with at most {self.tokens} tokens along axis {self._axis}"
            )
        return moved.reshape(*moved.shape[:2], self._x.shape[2])

    def initial_guess(self, z: Tensor) -> Tensor:
        """The noise itself, as for a map near the identity."""
        return z

    def default_window(self, batch: int, first: int) -> int:
        """All tokens, since they are computed anyway; of a function of windows, a frame."""
        return self.frame_tokens if self._windowed else self.tokens

    @property
    def native_window(self) -> None:
        """None: a function is called from plain torch."""

    def evaluate(self, previous: Tensor, start: int | Tensor, final: Tensor | None = None) -> Given:
        """Affine maps of the tokens `start ..`; arguments as of `starflow.solver.Autoregressive.evaluate`."""
        batch, width, _ = previous.shape
        starts = start.tolist() if isinstance(start, Tensor) else [start] * batch
        here = places(starts, width, previous.device)
        if final is not None:
            kept = (token_numbers(starts, width, final.device) < final[:, None])[..., None]
            previous = torch.where(kept, self._x[here], previous)
        moved = (self._x[here] != previous).any(-1)
        self._x[here] = previous
        window = slice(min(starts), max(starts) + width)
        scale, shift = self._call(window)
        self._check_causal(moved, starts, window.start if self._windowed else 0, (scale, shift))
        first = window.start if self._windowed else 0
        there = places([token - first for token in starts], width, previous.device)
        return Given(scale[there], shift[there])

    def _call(self, window: slice) -> tuple[Tensor, Tensor]:
        """Scale and shift, (batch, tokens, channels), of the tokens of `window` or of all."""
        # No causal function reads the last token: another one each time shows those that do.
        self._x[:, -1] = 1.0 - self._x[:, -1]
        x = self.like_z(self._x[:, 1:])
        returned: Any = self._fn(x, window) if self._windowed else self._fn(x)
        if not (isinstance(returned, tuple) and len(returned) == 2 and all(isinstance(t, Tensor) for t in returned)):
            raise ValueError(f"solve: fn returned {type(returned).__name__}, expected two tensors (shift, scale)")
        expected = list(x.shape)
        if self._windowed:
            expected[self._axis] = window.stop - window.start
        for name, tensor in zip(("shift", "scale"), returned, strict=True):
            if list(tensor.shape) != expected:
                raise ValueError(f"solve: fn returned {name} of shape {list(tensor.shape)}, expected {expected}")
            if tensor.is_complex():
                dtype = str(tensor.dtype).removeprefix("torch.")
                raise ValueError(f"solve: fn returned {name} in {dtype}, expected real numbers")
        shift, scale = returned
        least = float(scale.amin())
        if least < 0.0:
            raise ValueError(f"solve: fn returned scale {least:g}, expected numbers > 0")
        maps = self.sequence(scale.to(x.dtype)), self.sequence(shift.to(x.dtype))
        if window.start == 0 or not self._windowed:
            self._check_first(*(part[:, 0] for part in maps))
        return maps

    def _check_first(self, scale: Tensor, shift: Tensor) -> None:
        """Refuses a function whose map of the first token changes with x: of such a one the solution would be wrong."""
        if self._first is None:
            self._first = scale.clone(), shift.clone()
        changes = [(new - old).abs() for new, old in zip((scale, shift), self._first, strict=True)]
        most = _SAME * (self._first[0].abs() + self._first[1].abs())
        if any(bool((change > most).any()) for change in changes):
            raise ValueError(
                "solve: fn returned another shift or scale of the first token for another x, expected a function that "
                "is causal (shift and scale of a token depend on the tokens before it alone) and the same at each call"
            )

    def _check_causal(self, moved: Tensor, starts: list[int], first: int, maps: tuple[Tensor, Tensor]) -> None:
        """Refuses a function whose map of a token changes though no token before it did since the call before.

        What is compared is the map of the first token of each sample that changed, as later ones may change with it.
        Accepted tokens stay, so that it is each token's turn in the course of a solve.

        Args:
            moved: whether the tokens that the evaluated ones read have changed, (batch, width).
            starts: first of the evaluated tokens of each sample.
            first: token that `maps` begin with.
            maps: scale and shift of this call.
        """
        before = self._before
        if not self._refills and before is not None:
            self._refills = any(new.data_ptr() == old.data_ptr() for new, old in zip(maps, before[1], strict=True))
            before = None if self._refills else before
        self._before = first, tuple(part.clone() for part in maps) if self._refills else maps
        if before is None:
            return
        width = moved.shape[1]
        # The first maximum of a row is the first that moved.
        unmoved = torch.where(moved.any(1), moved.byte().argmax(1), width)
        token = unmoved + torch.tensor([start - 1 for start in starts], device=moved.device)
        samples = torch.arange(len(starts), device=moved.device)
        compared = torch.ones_like(samples, dtype=torch.bool)
        parts = []
        for begin, own in ((first, maps), before):
            end = begin + own[0].shape[1]
            compared &= (token >= begin) & (token < end)
            parts.append([part[samples, (token - begin).clamp(0, end - begin - 1)] for part in own])
        new, old = parts
        most = _SAME * (old[0].abs() + old[1].abs())
        changes = [(now - then).abs().gt(most).any(-1) for now, then in zip(new, old, strict=True)]
        other = (changes[0] | changes[1]) & compared
        if bool(other.any()):
            sample = int(other.byte().argmax())
            raise ValueError(
                f"solve: fn returned another shift or scale of token {int(token[sample])} of sample {sample} though no "
                "token before it had changed, expected a function that is causal (shift and scale of a token depend on "
                "the tokens before it in the same sample, in the given order, alone) and the same at each call"
            )


def _check_tensor(name: str, value: object) -> None:
    """Refuses what is no dense tensor."""
    check_tensor("solve", name, value)
    assert isinstance(value, Tensor)
    if value.layout != torch.strided:
        raise ValueError(f"solve: {name} is {str(value.layout).removeprefix('torch.')}, expected a dense tensor")


@dataclass(frozen=True)
class Given:
    """Affine maps as a function returned them, both (batch, tokens, channels): a `starflow.solver.AffineMaps`."""

    scale: Tensor
    shift: Tensor

    @property
    def raw(self) -> Tensor:
        """(batch, tokens, 2 * channels): scale, then shift."""
        return torch.cat([self.scale, self.shift], -1)

    def like(self, raw: Tensor) -> Given:
        """The maps in `raw`."""
        return Given(*raw.chunk(2, -1))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Data to noise, and the log-determinant of each token."""
        return (x - self.shift) / self.scale, -self.scale.log().sum(-1)

    def decode(self, z: Tensor) -> Tensor:
        """Noise to data."""
        return torch.addcmul(self.shift, self.scale, z)

    def update_(self, x: Tensor, z: Tensor) -> Tensor:
        """Overwrites `x` by its decoded value; returns the largest change of each token in units of its scale."""
        new = self.decode(z)
        change = (new - x).abs_().div_(self.scale)
        # A token is often one number.
        change = change.squeeze(-1) if change.shape[-1] == 1 else change.amax(-1)
        x.copy_(new)
        return change
