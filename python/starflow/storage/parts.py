"""What a model needs beside its own file: the folders of an autoencoder and of a text encoder, known again later."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from starflow.arguments import check_config
from starflow.config import RunConfig
from starflow.messages import short
from starflow.storage.tensors import CheckpointError, read_json

logger = logging.getLogger(__name__)

_NAMES = {"codec": "autoencoder", "text": "text encoder"}

# Files of a folder that decide what comes out of it, beside config.json: weights, and what tokenizers of transformers
# read.
_WEIGHTS = frozenset({".safetensors", ".bin", ".pth", ".pt"})
_TOKENS = frozenset({".model", ".spm", ".tiktoken", ".vocab"})
_TOKEN_FILES = frozenset(
    {"added_tokens.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"}
    | {"merges.txt", "vocab.txt"}
)
# Options in these json files that change no token: who wrote them and from where, and what a conversation looks like.
_NO_TOKENS = frozenset({"chat_template", "name_or_path", "transformers_version"})
# Of a larger file so many pieces of so many bytes are read, evenly spread.
_PIECES, _PIECE = 1024, 1 << 14


def fingerprints(config: RunConfig) -> dict[str, str]:
    """What identifies the parts in folders, by the key of a model's header.

    `PART_sha256` is of the options in config.json, statistics included. `PART_weights_sha256` is of the weights: of
    their sizes and of 16 MiB of each file. Tuning further changes nearly all weights and so those bytes, and a text
    encoder of 11 GB is known again in the time of a few files; times of files would change with every copy.
    `text_tokens_sha256` is of the files that cut a text into tokens, whole.

    Raises:
        CheckpointError: a file of such a folder cannot be read.
    """
    check_config("fingerprints", config, RunConfig)
    found = {}
    for part, options in (("codec", config.codec), ("text", config.text)):
        folder = options.get("folder")
        if not isinstance(folder, str):
            continue
        file = Path(folder) / "config.json"
        if file.is_file():
            content = read_json(file, "the options of an autoencoder or a text encoder")
            found[f"{part}_sha256"] = hashlib.sha256(_plain(content)).hexdigest()
        if files := _weight_files(options):
            found[f"{part}_weights_sha256"] = _sum_of(files)
        if part == "text" and (files := _token_files(Path(folder))):
            found[f"{part}_tokens_sha256"] = _sum_of_tokens(files)
    return found


def check_parts(who: str, told: Mapping[str, str], config: RunConfig) -> None:
    """Compares the parts that are here with those that a model was trained with; other weights, and another tokenizer,
    have a line in the log.

    Args:
        who: begins the message, such as "checkpoint PATH".
        told: what `fingerprints` said then, among other entries; by a model of an earlier version less or nothing.
        config: of the model.

    Raises:
        CheckpointError: a part with another config.json.
    """
    found = fingerprints(config)
    changed = {key for key in found if told.get(key, found[key]) != found[key]}
    for part, name in _NAMES.items():
        if f"{part}_sha256" in changed:
            raise CheckpointError(
                f"{who}: config.json of the {name} in its folder is another than the one that the model was trained "
                "with, expected the same autoencoder and text encoder"
            )
        for key, what in (("weights", "weights"), ("tokens", "files of the tokenizer")):
            if f"{part}_{key}_sha256" in changed:
                logger.warning(
                    "%s: the %s of the %s in %s are others than those that the model was trained with",
                    who,
                    what,
                    name,
                    short(getattr(config, part)["folder"]),
                )


def _plain(content: Mapping[str, Any], without: Collection[str] = ()) -> bytes:
    """The options of a json file in one order; names with an underscore say which program wrote it, and from where."""
    kept = {key: value for key, value in content.items() if not key.startswith("_") and key not in without}
    return json.dumps(kept, sort_keys=True).encode()


def _inside(place: Path) -> list[Path]:
    return [file for file in (sorted(place.iterdir()) if place.is_dir() else [place]) if file.is_file()]


def _weight_files(options: Mapping[str, Any]) -> list[Path]:
    """The files of weights that an autoencoder or a text encoder is made of."""
    tuned = options.get("weights")
    files = [file for file in _inside(Path(options["folder"])) if file.suffix in _WEIGHTS]
    return files + [file for file in ([Path(tuned)] if isinstance(tuned, str) else []) if file.is_file()]


def _token_files(folder: Path) -> list[Path]:
    """The files of a text encoder's folder that say which tokens a text has."""
    return [file for file in _inside(folder) if file.name in _TOKEN_FILES or file.suffix in _TOKENS]


def _sum_of_tokens(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        if path.suffix == ".json":
            content = _plain(read_json(path, "a tokenizer"), _NO_TOKENS)
        else:
            try:
                content = path.read_bytes()
            except OSError as error:
                raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from None
        digest.update(f"{path.name} {len(content)} ".encode())
        digest.update(content)
    return digest.hexdigest()


def _sum_of(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                digest.update(size.to_bytes(8, "little"))
                count = min(_PIECES, -(-size // _PIECE))
                for piece in range(count):
                    file.seek((size - _PIECE) * piece // (count - 1) if count == _PIECES else _PIECE * piece)
                    digest.update(file.read(_PIECE))
        except OSError as error:
            raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()
