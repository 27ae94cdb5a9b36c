"""The one solver that owns every inverse: `x[n] = shift(x[< n]) + scale(x[< n]) * z[n]` for all n.

Three schedules of the same loop: `Sequential` (token by token), `Chunks` (the published fixed chunks with their
stopping rule) and `Window` (a sliding window that accepts token by token, the default).

The window holds the tokens behind the accepted prefix. A sweep evaluates all of it at once with the prefix in the K/V
cache. The first token is then exact, since all that it reads is final; a later token is accepted when every token
before it in the window moved, since its own last evaluation, by less than the tolerance in units of its own scale.
The window slides past what was accepted and is filled up by guesses: shift and scale of the token one frame earlier,
and the token's own noise.

Every x that is returned is the exact inverse of some noise z'; `certify` measures max |z' - z|, in units of the
noise's standard deviation. It says more than the distance to the token-by-token result, which float32 itself does not
determine where a sample stands at a fork.

Reference: Song et al., Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving (2021), for
Jacobi iteration; Gu et al., STARFlow-V (2025), for chunks; the acceptance rule and the guess are this project's.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from starflow.affine import Affine
from starflow.files import write_text
from starflow_ext.jacobi_solve import SweepCount


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
        """Where tokens lie before anything is evaluated, like `z`."""

    def default_window(self, batch: int, first: int) -> int:
        """Rows of a sample in a call where the schedule names none; arguments as of `break_even`."""

    def evaluate(self, previous: Tensor, start: int | Tensor, final: Tensor | None = None) -> Affine:
        """Affine maps of the tokens `start ..`; row i of `previous` is token `start + i - 1`.

        What is cached of the first `final` tokens of each sample stays.
        """

    def window_solver(
        self, x: Tensor, z: Tensor, first: int, size: int, tolerance: float
    ) -> Iterator[SweepCount] | None:
        """The window schedule in native code (see `starflow.block.BlockDecoder`), or None for that in plain torch."""


class Timed(Autoregressive, Protocol):
    """A model whose calls can be timed, and the times kept under a name."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def channels(self) -> int:
        """Dimensions of a token."""

    @property
    def cost_key(self) -> str:
        """Names what the cost of a call depends on beside its rows."""


@dataclass(frozen=True)
class Sequential:
    """Token by token: exact, one call a token."""


@dataclass(frozen=True)
class Chunks:
    """The published scheme: fixed chunks, each iterated until its mean change falls under a threshold.

    Args:
        block: tokens of a chunk in the first frame; four times as many after it.
        threshold: of mean((x_new - x_old)^2) / mean(x_new^2) over the whole batch and chunk.
        max_iterations: cap of the sweeps of a chunk, without an error.
    """

    block: int = 32
    threshold: float = 1e-3
    max_iterations: int = 32

    def __post_init__(self) -> None:
        if self.block < 1 or self.max_iterations < 1:
            raise ValueError(
                f"solver: block is {self.block} and max_iterations {self.max_iterations}, expected both at least 1"
            )
        if not 0.0 <= self.threshold < float("inf"):
            raise ValueError(f"solver: threshold is {self.threshold}, expected a finite number >= 0")


@dataclass(frozen=True)
class Window:
    """The sliding window with acceptance token by token (see the module).

    Args:
        size: rows of a clip in a call, which a frame-local block shares out to its frames; None takes the break-even
            of a call on this machine (see `break_even`), divided by the batch and by 2 with guidance; of a function
            (see `starflow.solve`) all tokens, or a frame where it can be evaluated window by window.
        tolerance: of the change of a token in units of its scale. 0 is token by token for any size.
        certificate: also measure the backward error.
    """

    size: int | None = None
    tolerance: float = 0.01
    certificate: bool = False

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"solver: window size is {self.size}, expected at least 1")
        if not 0.0 <= self.tolerance < float("inf"):
            raise ValueError(f"solver: tolerance is {self.tolerance}, expected a finite number >= 0")


Schedule = Sequential | Chunks | Window


@dataclass(frozen=True)
class SolveReport:
    """What a solve did.

    Args:
        tokens: of a sample that were solved for: not those that were known or pass unchanged.
        rows: evaluations of a token, all samples and halves.
        sweeps: calls one after the other.
        samples: rows of the batch.
        accepted: tokens accepted in each sweep, all samples.
        passes: sweeps of each chunk (`Chunks` only).
        window: rows of a sample in a call.
        backward_error: max |z' - z| where asked for.
    """

    tokens: int
    rows: int
    sweeps: int
    samples: int
    accepted: tuple[int, ...] = ()
    passes: tuple[int, ...] = ()
    window: int = 1
    backward_error: float | None = None

    @property
    def evaluations_per_token(self) -> float:
        """Tokens pushed through the block over tokens in the clip."""
        return self.rows / max(self.tokens * self.samples, 1)

    def then(self, later: SolveReport) -> SolveReport:
        """The report of two solves one after the other (windows of a long clip)."""
        errors = [e for e in (self.backward_error, later.backward_error) if e is not None]
        return replace(
            later,
            tokens=self.tokens + later.tokens,
            rows=self.rows + later.rows,
            sweeps=self.sweeps + later.sweeps,
            accepted=self.accepted + later.accepted,
            passes=self.passes + later.passes,
            backward_error=max(errors) if errors else None,
        )


class NotFiniteError(RuntimeError):
    """A token is NaN or infinity: as noise, as given data, or as solved for (weights or text are not finite)."""


@dataclass
class _Progress:
    rows: int = 0
    accepted: list[int] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    window: int = 1


@torch.inference_mode()
def solve(
    model: Autoregressive,
    z: Tensor,
    schedule: Schedule,
    known: Tensor | None = None,
    judge: Callable[[], Autoregressive] | None = None,
) -> tuple[Tensor, SolveReport]:
    """Finds x with `z = (x - shift(x)) / scale(x)`.

    Args:
        model: fresh decoder of a block (its cache is written).
        z: noise (batch, tokens, channels), float32 or float64; what stands at known tokens is ignored.
        schedule: how.
        known: first tokens that are given, (batch, known tokens, channels): kept bit for bit.
        judge: makes the decoder that certifies, where `model` rounds what it computes; None lets it judge itself.

    Returns:
        x like `z`, and the report.

    Raises:
        ValueError: shapes that do not fit.
        NotFiniteError: a token is not finite; names it, as soon as it is met.
    """
    if z.dim() != 3 or z.shape[1] != model.tokens:
        raise ValueError(f"solve: z has shape {list(z.shape)}, expected (batch, {model.tokens}, channels)")
    count = 0 if known is None else known.shape[1]
    if known is not None and (count > z.shape[1] or known.shape[::2] != z.shape[::2]):
        raise ValueError(f"solve: known has shape {list(known.shape)}, expected at most {list(z.shape)} tokens of z")
    _require_finite(z[:, count:], count, "noise")
    if known is not None:
        _require_finite(known, 0, "given data")
    # Row n + 1 holds token n, so that rows n .. are what the network reads to predict the tokens n ..
    x = torch.cat([torch.zeros_like(z[:, :1]), z], 1)
    if known is not None:
        x[:, 1 : count + 1] = known
    first = max(count, model.first_token)
    if count > model.first_token:
        model.evaluate(x[:, model.first_token : count], model.first_token)
    progress = _Progress()
    if first < z.shape[1]:
        if isinstance(schedule, Chunks):
            _chunks(model, x, z, first, schedule, progress)
        elif isinstance(schedule, Sequential):
            _sequential(model, x, z, first, progress)
        else:
            _window(model, x, z, first, schedule, progress)
    out = x[:, 1:]
    report = SolveReport(
        tokens=z.shape[1] - first,
        rows=progress.rows * model.halves,
        sweeps=len(progress.accepted),
        samples=z.shape[0],
        accepted=tuple(progress.accepted),
        passes=tuple(progress.passes),
        window=progress.window,
    )
    if isinstance(schedule, Window) and schedule.certificate:
        report = replace(report, backward_error=certify(model if judge is None else judge(), out, z, first))
    return out, report


@torch.inference_mode()
def certify(model: Autoregressive, x: Tensor, z: Tensor, first: int = 0) -> float:
    """Backward error of a solution: max |z' - z| with z' from one parallel pass over the finished x.

    Args:
        model: decoder of the block; its cache is overwritten.
        x, z: (batch, tokens, channels).
        first: tokens before it were given and have no noise.
    """
    first = max(first, model.first_token)
    if first >= x.shape[1]:
        return 0.0
    padded = torch.cat([torch.zeros_like(x[:, :1]), x], 1)
    affine = model.evaluate(padded[:, model.first_token : -1], model.first_token)
    seen, _ = affine.encode(x[:, model.first_token :])
    return float((seen - z[:, model.first_token :])[:, first - model.first_token :].abs().max())


def _require_finite(tokens: Tensor, first: int, what: str) -> None:
    """Raises `NotFiniteError` for the first token of (batch, tokens, channels) that is not finite."""
    bad = ~tokens.isfinite().all(-1)
    if bool(bad.any()):
        sample, token = bad.nonzero()[0].tolist()
        raise _not_finite(what, sample, first + token)


def _not_finite(what: str, sample: int, token: int) -> NotFiniteError:
    return NotFiniteError(
        f"solve: the {what} of token {token} of sample {sample} is not finite, "
        "expected finite weights, text, noise and given data"
    )


def _sequential(model: Autoregressive, x: Tensor, z: Tensor, first: int, progress: _Progress) -> None:
    for token in range(first, z.shape[1]):
        affine = model.evaluate(x[:, token : token + 1], token)
        new = affine.decode(z[:, token : token + 1])
        _require_finite(new, token, "solution")
        x[:, token + 1 : token + 2] = new
        progress.rows += z.shape[0]
        progress.accepted.append(z.shape[0])


def _chunks(model: Autoregressive, x: Tensor, z: Tensor, first: int, schedule: Chunks, progress: _Progress) -> None:
    frame, total = model.frame_tokens, z.shape[1]
    start = first
    while start < total:
        # The published code compares `start <= frame` here and `start > frame` for the guess: the first chunk of the
        # second frame is short and has no guess.
        size = min(schedule.block if start <= frame else 4 * schedule.block, total - start)
        window = slice(start + 1, start + size + 1)
        progress.window = max(progress.window, size)
        for sweep in range(schedule.max_iterations):
            read = start - frame if sweep == 0 and start > frame else start
            affine = model.evaluate(x[:, read : read + size], start)
            new = affine.decode(z[:, start : start + size])
            change = (new - x[:, window]).square().mean() / new.square().mean()
            x[:, window] = new
            progress.rows += size * z.shape[0]
            progress.accepted.append(0)
            if change < schedule.threshold:
                break
        _require_finite(new, start, "solution")
        progress.passes.append(sweep + 1)
        progress.accepted[-1] = size * z.shape[0]
        start += size


def _window(model: Autoregressive, x: Tensor, z: Tensor, first: int, schedule: Window, progress: _Progress) -> None:
    batch, total, _ = z.shape
    size = schedule.size if schedule.size is not None else model.default_window(batch, first)
    progress.window = size = min(size, total - first)
    x[:, first + 1 :] = model.initial_guess(z[:, first:])
    native = model.window_solver(x, z, first, size, schedule.tolerance)
    if native is not None:
        for count in native:
            progress.rows += count.rows // model.halves
            progress.accepted += count.accepted
            if count.bad is not None:
                raise _not_finite("solution", *count.bad)
        return
    # On the host, where every sweep has to look at them: calls of a small model are as short as the bookkeeping.
    frontier = np.full(batch, first)
    fresh = frontier  # first token of each sample that has not been evaluated
    kept: _Kept | None = None
    while (lowest := int(frontier.min())) < total:
        width = min(size, total - lowest)
        # A sample ahead of the others, near its end, computes some accepted tokens again, without effect: what was
        # cached of them stays, so that a sample does not depend on the batch that it is in.
        starts = np.minimum(frontier, total - width)
        together = starts.max() == lowest
        again = frontier.max() > total - width
        here, after = (places(starts + shift, width, z.device) for shift in (0, 1))
        if kept is not None and starts.max() + width > fresh.min():
            kept.guess_(x, z, starts, width, fresh)
        _tame_(x, z, here, starts, width, frontier)
        begin = lowest if together else torch.from_numpy(starts).to(z.device)
        final = torch.from_numpy(frontier).to(z.device) if again else None
        affine = model.evaluate(x[here], begin, final)
        moved = x[after].clone()
        change = affine.update_(moved, z[here])
        accepted = change < schedule.tolerance
        if final is not None:
            done = _tokens(starts, width, z.device) < final[:, None]
            moved = torch.where(done[..., None], x[after], moved)
            accepted |= done
        x[after] = moved
        if model.frame_tokens < total - first:
            if kept is None:
                kept = _Kept(affine, first, model.frame_tokens, batch, total)
            kept.keep(affine, here)
        fresh = np.maximum(fresh, starts + width)
        # A token is final when all before it in the window moved less than the tolerance; NaN never does.
        settled = accepted.cumprod(1).sum(1).cpu().numpy()
        reached = starts + np.minimum(settled + 1, width)
        if not math.isfinite(float(change.amax())):
            # Of what is accepted only the last token can be other than finite: those before it moved by a number.
            for sample, token in enumerate((reached - 1).tolist()):
                if not math.isfinite(float(change[sample, token - starts[sample]])):
                    raise _not_finite("solution", sample, token)
        progress.rows += batch * width
        progress.accepted.append(int((reached - frontier).sum()))
        frontier = reached


# Of each sample, on the host.
Numbers = npt.NDArray[np.int64]

# Indices of a window in (batch, tokens, ...).
Places = tuple[slice, slice] | tuple[Tensor, Tensor]


def places(starts: Numbers, width: int, device: torch.device) -> Places:
    """Indices of `width` tokens from `starts` on, one for each sample: slices where all start together."""
    first = int(starts[0])
    if (starts == first).all():
        return slice(None), slice(first, first + width)
    return torch.arange(len(starts), device=device)[:, None], _tokens(starts, width, device)


def _tokens(starts: Numbers, width: int, device: torch.device) -> Tensor:
    """Numbers of the tokens of a window, (batch, width)."""
    return torch.from_numpy(starts).to(device)[:, None] + torch.arange(width, device=device)


# Provisional tokens beyond this are divergence, not data.
_WILD = 1e6


def _tame_(x: Tensor, z: Tensor, here: Places, starts: Numbers, width: int, frontier: Numbers) -> None:
    """Replaces what is read of tokens that are not final, where it is not finite or far off, by their noise.

    A masked NaN still reaches every row of the window, as 0 * NaN. Any value in its place is as right, for it is only a
    guess.
    """
    read = x[here]
    size = read.abs()
    if float(size.amax()) < _WILD:
        return
    tokens = _tokens(starts, width, z.device)
    provisional = tokens > torch.from_numpy(frontier).to(z.device)[:, None]
    noise = z[torch.arange(len(starts), device=z.device)[:, None], (tokens - 1).clamp(min=0)]
    x[here] = torch.where(provisional[..., None] & ~(size < _WILD), noise, read)


class _Kept:
    """The network's last output for each token, from which tokens one frame later are guessed."""

    def __init__(self, affine: Affine, first: int, frame: int, batch: int, total: int) -> None:
        self._like, self._first, self._frame = affine, first, frame
        self._raw = affine.raw.new_zeros(affine.raw.shape[0] // batch, batch, total, affine.raw.shape[-1])

    def keep(self, affine: Affine, here: Places) -> None:
        halves = affine.raw.view(self._raw.shape[0], self._raw.shape[1], *affine.raw.shape[1:])
        for kept, raw in zip(self._raw, halves, strict=True):
            kept[here] = raw

    def guess_(self, x: Tensor, z: Tensor, starts: Numbers, width: int, fresh: Numbers) -> None:
        """Places tokens that were never evaluated: shift and scale of the nearest earlier frame, their own noise."""
        tokens = _tokens(starts, width, z.device)
        ahead = tokens - torch.from_numpy(fresh).to(z.device)[:, None]
        source = tokens - (torch.div(ahead, self._frame, rounding_mode="floor") + 1) * self._frame
        wanted = (ahead >= 0) & (source >= self._first)
        if not bool(wanted.any()):
            return
        rows = torch.arange(len(starts), device=z.device)[:, None]
        raw = self._raw[:, rows, source.clamp(min=0)].flatten(0, 1)
        guess = x[rows, tokens + 1]
        replace(self._like, raw=raw).update_(guess, z[rows, tokens])
        x[rows, tokens + 1] = torch.where(wanted[..., None], guess, x[rows, tokens + 1])


# A call of this many rows is past the break-even on every machine seen, so its time is arithmetic.
_MANY_ROWS = 256
_REPEATS = 5
_measured: dict[str, int] = {}


@torch.inference_mode()
def break_even(model: Timed, batch: int, first: int = 0) -> int:
    """The window at which a call stops being free: the rows whose arithmetic takes as long as a call of one row.

    A narrower window only adds calls, a wider one only arithmetic. Measured once per block, machine and number of
    threads, and kept in a file in the user's cache folder (`STARFLOW_CACHE`, else `XDG_CACHE_HOME`/starflow), since
    the window decides the last bits of a sample.

    Args:
        model: decoder of the block; its cache is overwritten from `first` on.
        batch: samples that share a call.
        first: first token that may be overwritten.

    Returns:
        Rows of a sample, at least 1, at most the tokens of a sample.
    """
    if model.tokens - first < 2:
        return 1
    key = f"{platform.machine()}-{_processor()}-{model.cost_key}"
    if key not in _measured:
        path = cache_folder() / "break_even.json"
        stored = _read_json(path)
        if key not in stored:
            stored[key] = _measure(model, batch, first)
            _write_json(path, stored)
        _measured[key] = stored[key]
    return max(1, min(_measured[key] // (batch * model.halves), model.tokens))


def _measure(model: Timed, batch: int, first: int) -> int:
    last = model.tokens - first
    many = max(2, min(_MANY_ROWS // batch, last))
    channels = model.channels
    seconds = {}
    for rows in (1, many):
        previous = torch.zeros(batch, rows, channels, device=model.device)
        times = []
        for _ in range(_REPEATS + 1):
            begin = time.perf_counter()
            # Reading a value back waits for the device.
            float(model.evaluate(previous, first).raw[0, 0, 0])
            times.append(time.perf_counter() - begin)
        seconds[rows] = statistics.median(times[1:])
    per_row = max((seconds[many] - seconds[1]) / (batch * (many - 1)), seconds[1] / _MANY_ROWS)
    rows = round(seconds[1] / per_row)
    # Noise of the clock must not decide between neighbouring windows: round to a power of two.
    return int(2 ** round(math.log2(max(rows, 1)))) * model.halves


def cache_folder() -> Path:
    """Where measurements of this machine are kept: `STARFLOW_CACHE`, else `XDG_CACHE_HOME`/starflow."""
    explicit = os.environ.get("STARFLOW_CACHE")
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "starflow"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _read_json(path: Path) -> dict[str, int]:
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return {str(k): int(v) for k, v in stored.items()} if isinstance(stored, dict) else {}


def _write_json(path: Path, values: dict[str, int]) -> None:
    """Best effort: without a writable cache folder the measurement is repeated by the next process."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(values, indent=1))
    except OSError:
        pass
