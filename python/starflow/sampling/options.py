"""What a sample can be told."""

from __future__ import annotations

from typing import Literal, TypeAlias

Denoise: TypeAlias = bool | Literal["learned", "score"]
