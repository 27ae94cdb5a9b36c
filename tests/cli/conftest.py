from __future__ import annotations

from ..pipelines import build, configure, model, paired, pipeline

__all__ = ["build", "configure", "model", "paired", "pipeline"]
