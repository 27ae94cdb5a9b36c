"""Captions from the files beside videos, in a folder or in a shard."""

from __future__ import annotations

import codecs
import json
import logging
import math
import unicodedata
from collections.abc import Sequence
from pathlib import PurePath

from starflow.data.shards import Member, Place, size_of

logger = logging.getLogger(__name__)

SIDECAR_SUFFIXES = (".txt", ".json")

_MAX_BYTES = 1 << 20
_MOST_DOUBLES = 8

# That of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def composed(text: str) -> str:
    """Text with each accented letter as one character, where there is one; the same words are then the same text."""
    return unicodedata.normalize("NFC", text)


def without_punctuation(text: str) -> str:
    """Letters, marks and digits, with one space for everything between them.

    A regular expression's class of letters has no marks, such as the vowel signs of Hindi or accents of their own.
    """
    kept = (each if each.isalnum() or unicodedata.category(each)[0] == "M" else " " for each in composed(text))
    return " ".join("".join(kept).split())


class Sidecars:
    """The caption files of folders, found by the names of the videos that they belong to.

    `NAME.txt` or `NAME.json` belongs to a video `NAME.*` in the same folder. Names that differ only in how accents are
    composed are the same, and so are those that differ in capitals, unless a video has the very name. Of several
    caption files of one video the first of `SIDECAR_SUFFIXES` is taken, then the one whose name is most like.
    """

    def __init__(self) -> None:
        self._files: dict[tuple[PurePath, str], list[Place]] = {}
        self._owned: set[tuple[PurePath, str]] = set()
        self._used: set[Place] = set()
        self._doubles: list[str] = []

    def take_from(self, paths: Sequence[Place]) -> list[Place]:
        """Keep the caption files among some paths, and return the others."""
        others = []
        for path in paths:
            if path.suffix.lower() in SIDECAR_SUFFIXES:
                self._files.setdefault((path.parent, composed(path.stem).casefold()), []).append(path)
            else:
                others.append(path)
                self._owned.add((path.parent, composed(path.stem)))
        return others

    def of(self, path: Place) -> Place | None:
        """The caption file of a video, if there is one."""
        stem = composed(path.stem)
        fitting = [
            each
            for each in self._files.get((path.parent, stem.casefold()), [])
            if composed(each.stem) == stem or (each.parent, composed(each.stem)) not in self._owned
        ]
        if not fitting:
            return None

        def unlike(each: Place) -> tuple[object, ...]:
            kind = SIDECAR_SUFFIXES.index(each.suffix.lower())
            return (
                kind,
                composed(each.stem) != stem,
                each.stem != path.stem,
                each.suffix.lower() != each.suffix,
                str(each),
            )

        first, *rest = sorted(fitting, key=unlike)
        self._used.update(fitting)
        self._doubles += [f"{each}: the caption of {path.name} is read from {first.name}" for each in rest]
        return first

    def left_over(self) -> list[str]:
        """A line for each caption file that stands behind another one, and one for all that belong to no video."""
        lines = list(dict.fromkeys(self._doubles))
        if len(lines) > _MOST_DOUBLES:
            # Shards often have both kinds of caption file for each of thousands of videos.
            lines[_MOST_DOUBLES:] = [f"{len(lines) - _MOST_DOUBLES} more captions that stand behind another file"]
        lonely = sorted(str(each) for files in self._files.values() for each in files if each not in self._used)
        if lonely:
            more = f" and {len(lonely) - 1} more" if len(lonely) > 1 else ""
            lines.append(f"{lonely[0]}{more}: .txt or .json without a video of this name, so no caption")
        return lines


def captions_of(path: Place, *, by_name: bool = False, beside: Sidecars | None = None) -> tuple[str, ...]:
    """The captions in the file beside a video: NAME.txt, one caption, or NAME.json, "caption" or "captions".

    Args:
        path: of the video, or a member of a shard; nothing is read from it.
        by_name: without such a file take the words of NAME in place of "".
        beside: the caption files of its folder, where they are known; otherwise the folder is searched.

    Returns:
        at least one caption, in composed characters (NFC).

    Raises:
        ValueError: when the file beside it is malformed or no text.
    """
    if beside is None:
        beside = Sidecars()
        if isinstance(path, Member):
            beside.take_from(path.shard.members)
        elif path.parent.is_dir():
            beside.take_from([each for each in path.parent.iterdir() if each.is_file()])
    sidecar = beside.of(path)
    if sidecar is None:
        return (without_punctuation(path.stem) if by_name else "",)
    text = _text_of(sidecar)
    if sidecar.suffix.lower() == ".txt":
        return (text.strip(),)
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"VideoFolder: {sidecar} is not valid JSON (nested too deeply)") from error
    except ValueError as error:
        raise ValueError(f"VideoFolder: {sidecar} is not valid JSON ({str(error)[:200]})") from error
    found = content.get("captions", [content.get("caption")]) if isinstance(content, dict) else None
    if not isinstance(found, list) or not found or not all(isinstance(caption, str) for caption in found):
        raise ValueError(
            f'VideoFolder: {sidecar} holds no caption, expected {{"caption": "..."}} or {{"captions": ["..."]}}'
        )
    if isinstance(content, dict) and content.get("caption", found[0]) not in found:
        logger.warning('skipped: %s: its "caption", which is not among its "captions"', sidecar)
    return tuple(composed(caption.strip()) for caption in found)


def _text_of(path: Place) -> str:
    """Text in UTF-8, or in any UTF with a byte order mark."""
    try:
        if (size := size_of(path)) > _MAX_BYTES:
            raise ValueError(f"VideoFolder: {path} has {size} bytes, expected a caption of at most 1 MiB")
        with path.open("rb") as file:
            data = file.read()
    except OSError as error:
        raise ValueError(
            f"VideoFolder: {path} cannot be read ({error.strerror or error}), expected a caption"
        ) from error
    mark, encoding = next(((mark, name) for mark, name in _MARKS if data.startswith(mark)), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"VideoFolder: {path} is no text in {encoding.upper()} (byte {error.start + len(mark)}), expected UTF-8, "
            "or UTF-16 with a byte order mark"
        ) from error
    if "\0" in text:
        raise ValueError(f"VideoFolder: {path} holds zero bytes, expected UTF-8, or UTF-16 with a byte order mark")
    return composed(text)


def caption_at(caption: str, start: float) -> str:
    """The caption of a clip that begins `start` seconds into its file, where captions tell that."""
    return f"{caption} {math.floor(start + 1e-6)}".strip()
