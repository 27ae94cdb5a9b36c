from __future__ import annotations

from ..pipelines import build, configure, paired, pipeline

__all__ = ["build", "configure", "paired", "pipeline"]
