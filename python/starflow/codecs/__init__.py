"""What does the flow see of pixels? Latents: codecs take clips there and back, behind one interface."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from starflow.arguments import check_mapping
from starflow.codecs.autoencoder import AutoencoderKLCodec, WanCodec
from starflow.codecs.block_transform import BlockTransform
from starflow.codecs.codec import Codec, tell_scale

__all__ = ["AutoencoderKLCodec", "BlockTransform", "Codec", "WanCodec", "make_codec", "tell_scale"]

_KINDS: dict[str, Callable[..., Codec]] = {
    "dct": functools.partial(BlockTransform, "dct"),
    "haar": functools.partial(BlockTransform, "haar"),
    "autoencoder_kl": AutoencoderKLCodec,
    "wan": WanCodec,
}


def make_codec(config: Mapping[str, Any]) -> Codec:
    """Make the codec that a configuration describes; the inverse of `Codec.to_config`.

    Args:
        config: "kind", one of "dct", "haar", "autoencoder_kl" and "wan", and the arguments of its class.

    Returns:
        the codec.

    Raises:
        ValueError: when the kind or an argument is unknown or out of range.
    """
    check_mapping("codec", config)
    options = dict(config)
    kind = options.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"codec: kind is {kind!r}, expected one of {', '.join(_KINDS)}")
    try:
        return _KINDS[kind](**options)
    except TypeError as error:
        raise ValueError(f"codec: the options do not fit the kind {kind!r} ({error})") from error
