"""Text encoders that need no pretrained model: one-hot words of a small vocabulary, and class labels."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Sequence
from typing import Any

import torch

from starflow.arguments import check_text, check_texts
from starflow.data import VOCABULARY
from starflow.messages import shown
from starflow.numeric import integer

__all__ = ["STOP_WORDS", "ClassEncoder", "WordEncoder", "split_words"]

STOP_WORDS = ("a", "an", "and", "is", "moving", "of", "standing", "the")
"""Words that `WordEncoder` drops by default."""


# Characters of a word that is compared with the vocabulary to name its nearest ones.
_COMPARED = 40
# Unknown words of a caption that an error names.
_TOLD = 5
# Characters that may stand between the letters of a word: the apostrophe, the hyphen, and the two joiners (zero width)
# of Persian and of the scripts of India.
_INSIDE = "'-\u200c\u200d"


def split_words(text: str, stop_words: Sequence[str] = ()) -> list[str]:
    """The words of a caption in lower case, without punctuation and stop words.

    A word is a run of letters, marks (vowel signs, accents) and digits; a single apostrophe or hyphen may stand inside.
    Accents are composed (NFC), so that the same word is the same text however it was typed.
    """
    check_text("split_words", "text", text)
    words, word = [], ""
    for character in unicodedata.normalize("NFC", text.lower()) + " ":
        inside = word and character in _INSIDE and word[-1] not in _INSIDE
        if inside or character.isalnum() or unicodedata.category(character)[0] == "M":
            word += character
        elif word:
            words.append(word.rstrip(_INSIDE))
            word = ""
    return [word for word in words if word not in stop_words]


def _are_texts(value: object) -> bool:
    """Whether a value, which may come from a configuration file, is a sequence of strings."""
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(each, str) for each in value)


class WordEncoder:
    """One-hot vectors of the words of a caption, in their order.

    Case and punctuation do not matter. Stop words are dropped; any other word outside of the vocabulary is an error.

    Args:
        vocabulary: the known words, in lower case; by default those of the data set of moving digits.
        size: most known words of a caption.
        stop_words: words that are dropped.

    Raises:
        ValueError: when the vocabulary is empty, repeats a word, or an argument is out of range.
    """

    def __init__(
        self, vocabulary: Sequence[str] = VOCABULARY, size: int = 3, stop_words: Sequence[str] = STOP_WORDS
    ) -> None:
        if not _are_texts(vocabulary) or not vocabulary:
            raise ValueError(f"WordEncoder: vocabulary is {vocabulary!r}, expected a list of at least one word")
        if not _are_texts(stop_words):
            raise ValueError(f"WordEncoder: stop_words is {stop_words!r}, expected a list of words")
        most = integer(size)
        if most is None or most < 1:
            raise ValueError(f"WordEncoder: size is {shown(size)}, expected an integer of at least 1")
        self.vocabulary = tuple(unicodedata.normalize("NFC", word) for word in vocabulary)
        self.size = most
        self.dim = len(self.vocabulary)
        self.stop_words = tuple(stop_words)
        self._index = {word: index for index, word in enumerate(self.vocabulary)}
        for word in self.vocabulary:
            if self.vocabulary.count(word) > 1 or word in self.stop_words or split_words(word) != [word]:
                raise ValueError(
                    f'WordEncoder: vocabulary holds "{word}", '
                    "expected single words in lower case, each once, none of them a stop word"
                )

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """Encode captions.

        Args:
            texts: one caption per sample, such as "a three moving up and left".

        Returns:
            float32 (batch, size, dim).

        Raises:
            ValueError: when a word is unknown, or a caption has more than `size` known words.
        """
        check_texts("WordEncoder", "texts", texts)
        features = torch.zeros(len(texts), self.size, self.dim, dtype=torch.float32, device="cpu")
        for row, text in enumerate(texts):
            words = split_words(text, self.stop_words)
            unknown = [word for word in dict.fromkeys(words) if word not in self._index]
            if unknown:
                raise ValueError(self._refusal(text, unknown))
            if len(words) > self.size:
                raise ValueError(f'WordEncoder: "{text}" has {len(words)} known words, expected at most {self.size}')
            for column, word in enumerate(words):
                features[row, column, self._index[word]] = 1.0
        return features

    def _refusal(self, text: str, unknown: list[str]) -> str:
        """What the error says of a caption with unknown words: which they are, and what each may have meant."""
        told, only = unknown[:_TOLD], len(unknown) == 1
        close = []
        for word in told:
            if found := difflib.get_close_matches(word[:_COMPARED], self.vocabulary, n=2):
                close.append(f"{'nearest' if only else f'nearest to {word}'}: {', '.join(found)}")
        hint = f" ({'; '.join(close)})" if close else ""
        names = ", ".join(f'"{word}"' for word in told)
        others = f" and {len(unknown) - len(told)} more" if len(unknown) > len(told) else ""
        return (
            f'WordEncoder: {names}{others} in "{text}" {"is not a known word" if only else "are not known words"}'
            f"{hint}, expected words of the vocabulary: {', '.join(self.vocabulary)}"
        )

    def to_config(self) -> dict[str, Any]:
        """The configuration from which `make_text_encoder` makes this encoder again."""
        return {
            "kind": "words",
            "vocabulary": list(self.vocabulary),
            "size": self.size,
            "stop_words": list(self.stop_words),
        }


class ClassEncoder:
    """The class of a caption as one one-hot vector.

    Args:
        num_classes: number of classes.
        names: names of the classes, in order; with None a label is a number, "0" to "num_classes - 1".

    Raises:
        ValueError: when an argument is out of range.
    """

    size = 1

    def __init__(self, num_classes: int, names: Sequence[str] | None = None) -> None:
        count = integer(num_classes)
        if count is None or count < 1:
            raise ValueError(f"ClassEncoder: num_classes is {shown(num_classes)}, expected an integer of at least 1")
        num_classes = count
        if names is not None and _are_texts(names):
            names = tuple(unicodedata.normalize("NFC", name) for name in names)
        if names is not None and (not _are_texts(names) or not len(set(names)) == len(names) == num_classes):
            raise ValueError(f"ClassEncoder: names are {names!r}, expected {num_classes} different names")
        self.num_classes = num_classes
        self.dim = num_classes
        self.names = None if names is None else tuple(names)
        labels = self.names or [str(label) for label in range(num_classes)]
        self._index = {label: index for index, label in enumerate(labels)}

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """Encode labels.

        Args:
            texts: one label per sample, "" for no label.

        Returns:
            float32 (batch, 1, num_classes).

        Raises:
            ValueError: when a label is unknown.
        """
        check_texts("ClassEncoder", "texts", texts)
        features = torch.zeros(len(texts), 1, self.dim, dtype=torch.float32, device="cpu")
        for row, text in enumerate(texts):
            label = unicodedata.normalize("NFC", text.strip())
            if not label:
                continue
            if label not in self._index:
                known = f"0 to {self.num_classes - 1}" if self.names is None else ", ".join(self.names)
                raise ValueError(f'ClassEncoder: "{text}" is not a class, expected one of {known}')
            features[row, 0, self._index[label]] = 1.0
        return features

    def to_config(self) -> dict[str, Any]:
        """The configuration from which `make_text_encoder` makes this encoder again."""
        names = None if self.names is None else list(self.names)
        return {"kind": "classes", "num_classes": self.num_classes, "names": names}
