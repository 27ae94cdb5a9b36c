"""What a solve did, and the error of one that met NaN or infinity."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from starflow.solver.protocol import AffineMaps


@dataclass(frozen=True)
class SolveReport:
    """What a solve did.

    Args:
        tokens: of a sample that were solved for, without those that were known or pass unchanged.
        rows: evaluations of a token, summed over samples and the halves of guidance.
        sweeps: calls of the network, one after the other.
        samples: rows of the batch.
        accepted: tokens accepted in each sweep, summed over samples.
        passes: sweeps of each chunk (`Chunks` only).
        window: most tokens of a sample in a call.
        backward_error: max |z' - z| in standard deviations of the noise, where it was asked for.
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


@dataclass
class Tally:
    """What a solve has done so far.

    Attributes:
        rows: evaluations of a token, all samples.
        accepted: tokens accepted in each sweep, all samples.
        passes: sweeps of each chunk.
        window: most rows of a sample in a call.
        maps: of the last evaluation in plain torch; guesses are made by maps of the same kind.
        before: tokens that were forgotten, before those that the solve still holds.
    """

    rows: int = 0
    accepted: list[int] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    window: int = 1
    maps: AffineMaps | None = None
    before: int = 0


class NotFiniteError(RuntimeError):
    """A token is NaN or infinity: as noise, as given data, or as solved for (weights or text are not finite)."""


def not_finite(what: str, sample: int, token: int) -> NotFiniteError:
    """The error of a token that is NaN or infinity."""
    return NotFiniteError(
        f"solve: the {what} of token {token} of sample {sample} is not finite, "
        "expected finite weights, text, noise and given data"
    )
