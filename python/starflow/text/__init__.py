"""What does the flow see of captions? Features, which text encoders compute behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from starflow.arguments import check_mapping
from starflow.text.encoder import TextEncoder
from starflow.text.features import Features, caption_for
from starflow.text.pretrained import MiniLMEncoder, T5Encoder
from starflow.text.words import STOP_WORDS, ClassEncoder, WordEncoder, split_words

__all__ = [
    "STOP_WORDS",
    "ClassEncoder",
    "Features",
    "MiniLMEncoder",
    "T5Encoder",
    "TextEncoder",
    "WordEncoder",
    "caption_for",
    "make_text_encoder",
    "split_words",
]

_KINDS: dict[str, Callable[..., TextEncoder]] = {
    "words": WordEncoder,
    "classes": ClassEncoder,
    "minilm": MiniLMEncoder,
    "t5": T5Encoder,
}


def make_text_encoder(config: Mapping[str, Any]) -> TextEncoder:
    """Make the text encoder that a configuration describes; the inverse of `TextEncoder.to_config`.

    Args:
        config: "kind", one of "words", "classes", "minilm" and "t5", and the arguments of its class.

    Returns:
        the encoder.

    Raises:
        ValueError: when the kind or an argument is unknown or out of range.
    """
    check_mapping("text encoder", config)
    options = dict(config)
    kind = options.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"text encoder: kind is {kind!r}, expected one of {', '.join(_KINDS)}")
    try:
        return _KINDS[kind](**options)
    except TypeError as error:
        raise ValueError(f"text encoder: the options do not fit the kind {kind!r} ({error})") from error
