"""The lines that targets.py prints, and the table of its targets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sklearn.metrics import roc_auc_score


class Skipped(Exception):  # noqa: N818  (not an error: the machine lacks something)
    """A target that this machine cannot measure; the message says why."""


@dataclass
class Figure:
    """One line of the output.

    Attributes:
        name: name of the target.
        value: measured value. unit: its unit.
        goal, moonshot: value that shall be reached, and value that the ceiling allows.
        lower: whether smaller is better.
        raw: medians in seconds, and other facts.
    """

    name: str
    value: float
    unit: str
    goal: float
    moonshot: float
    lower: bool = False
    raw: dict[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        """Return the JSON line."""
        holds = self.value <= self.goal if self.lower else self.value >= self.goal
        rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in self.raw.items()}
        return json.dumps(
            {
                "name": self.name,
                "value": float(f"{self.value:.4g}"),
                "unit": self.unit,
                "goal": self.goal,
                "moonshot": self.moonshot,
                "holds": holds,
                **rounded,
            }
        )


Target = Callable[[], Iterator[Figure]]
TARGETS: dict[str, tuple[str, Target]] = {}


def target(group: str) -> Callable[[Target], Target]:
    """Enter a function into the table of targets under its name."""

    def enter(function: Target) -> Target:
        TARGETS[function.__name__] = (group, function)
        return function

    return enter


def area_under_curve(ordinary: Sequence[float], odd: Sequence[float]) -> float:
    """How often an odd one scores above an ordinary one: area under the curve of hits over false alarms."""
    return float(roc_auc_score([0] * len(ordinary) + [1] * len(odd), [*ordinary, *odd]))
