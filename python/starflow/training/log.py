"""The log of a run: curves for TensorBoard, or for Weights & Biases."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

from starflow.config import LogKind
from starflow.extras import import_extra

logger = logging.getLogger(__name__)

PROJECT = "starflow"


class Log(Protocol):
    """Takes the figures of a step."""

    def __call__(self, scalars: Mapping[str, float], step: int) -> None:
        """Notes figures by name."""


@contextmanager
def open_log(kind: LogKind, folder: Path, step: int, config: Mapping[str, Any]) -> Iterator[Log | None]:
    """The log of a run that has done `step` steps, for as long as the block lasts.

    A run that resumes goes on in its own log. Weights & Biases keeps its files in the log's folder and finds the run
    again by that; account and server are those that its own settings name (`wandb login`, `WANDB_MODE=offline`).

    Args:
        kind: of log.
        folder: that its files go to.
        step: steps done.
        config: of the run, as plain values.

    Returns:
        The log; None for "none", or, with a line that says so, where TensorBoard is not installed.

    Raises:
        ImportError: Weights & Biases is asked for and not installed.
    """
    if kind == "wandb":
        wandb = import_extra("wandb", purpose="train.log 'wandb'", extra="wandb")
        folder.mkdir(parents=True, exist_ok=True)
        number = hashlib.sha256(os.path.realpath(folder).encode()).hexdigest()[:16]
        run = wandb.init(
            project=PROJECT, name=folder.parent.name, id=number, resume="allow", dir=str(folder), config=dict(config)
        )
        try:
            yield lambda scalars, step: run.log(dict(scalars), step=step)
        finally:
            run.finish()
        return
    if kind == "none":
        yield None
        return
    try:
        import_extra("tensorboard", purpose="a training log", extra="train")
    except ImportError as error:
        logger.warning("no log is written: %s", error)
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    with closing(SummaryWriter(str(folder), purge_step=step + 1)) as writer:

        def write(scalars: Mapping[str, float], step: int) -> None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)

        yield write
