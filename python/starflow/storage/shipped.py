"""Models that come with the package: weights in half precision, each beside its card."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from starflow.config import ConfigError, from_mapping, read_yaml
from starflow.storage.tensors import CheckpointError

MODELS = Path(__file__).parents[1] / "models"


@dataclass(frozen=True)
class Card:
    """What is known of a shipped model.

    Args:
        sha256: checksum of its file.
        about: what it makes, in one sentence.
        data: what it was trained on.
        recipe: the configuration that it was trained by, one that comes with the package.
        command: what trains it again.
        hours, machine: how long that took, and where.
        seeds: of the trainings of this recipe that the figures rest on.
        licence: under which weights and data may be used.
        holds_frames: length of a clip up to which `figures` say what is seen.
        figures: what was measured, by name: a number, or a text with its scatter.
        limits: what it cannot do.
    """

    sha256: str
    about: str
    data: str
    recipe: str
    command: str
    hours: float
    machine: str
    seeds: tuple[int, ...]
    licence: str
    holds_frames: int
    figures: Mapping[str, float | str] = field(default_factory=dict)
    limits: tuple[str, ...] = ()


def shipped_names() -> tuple[str, ...]:
    """Names of the models that come with the package."""
    return tuple(sorted(path.stem for path in MODELS.glob("*.yaml")))


def shipped_card(name: str) -> Card:
    """The card of a shipped model.

    Raises:
        CheckpointError: there is no such model, or its card is damaged.
    """
    if name not in shipped_names():
        raise CheckpointError(
            f"model {name!r} does not come with the package, expected one of {', '.join(shipped_names())}"
        )
    try:
        values = read_yaml(MODELS / f"{name}.yaml")
        if not isinstance(values, Mapping):
            raise ConfigError(f"it is {type(values).__name__}, expected a mapping")
        return from_mapping(Card, values)
    except ConfigError as error:
        raise CheckpointError(f"card of the shipped model {name} cannot be used: {error}; {_REINSTALL}") from None


def shipped_name(path: str | Path) -> str | None:
    """The shipped model that a path names, None where it names a file or a folder.

    A text that is a name alone, without a folder or a suffix, is that of a shipped model, from whatever folder it is
    asked for. "./digits" is a path, and so is `Path("digits")`, which pathlib makes of both.

    Raises:
        CheckpointError: the working directory holds a file or folder of that name too.
    """
    if not isinstance(path, str) or path not in shipped_names():
        return None
    name = path
    if Path(name).exists():
        raise CheckpointError(
            f"model {name!r} is both a model that comes with the package ({MODELS / name}.safetensors) and "
            f"{Path(name).absolute()}; expected ./{name} for the latter, or another working directory for the former"
        )
    return name


def shipped_file(name: str) -> Path:
    """The file of a shipped model, which is whole and the one that its card speaks of.

    Raises:
        CheckpointError: the file is missing or damaged, or of another model than its card.
    """
    card, file = shipped_card(name), MODELS / f"{name}.safetensors"
    if not file.is_file():
        raise CheckpointError(f"checkpoint {file} of the shipped model {name} does not exist; {_REINSTALL}")
    if hashlib.sha256(file.read_bytes()).hexdigest() != card.sha256:
        raise CheckpointError(
            f"checkpoint {file} is damaged or of another model than its card: it does not have the checksum that the "
            f"card of {name} has; {_REINSTALL}"
        )
    return file


_REINSTALL = "expected the one that was installed: pip install --force-reinstall --no-deps starflow-ext"
