"""Fixtures: small models with random weights that are played."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from starflow.config import DataConfig, RunConfig, SampleConfig
from starflow.play import Game, Played
from starflow.sampling import Pipeline
from starflow.worlds import PaddleBall

from ..pipelines import build, configure, pipeline

__all__ = ["build", "configure", "pipeline"]


@pytest.fixture(autouse=True, scope="module")
def settled(one_thread: None) -> None:
    """Every test of this folder runs on one thread."""


def _of_actions(configure: Callable[..., RunConfig], **flow: object) -> RunConfig:
    """The configuration of a small model of the paddle world whose cache rolls."""
    options: dict[str, object] = {
        "img_size": 6,
        "layers_per_block": (1, 1),
        "txt_size": 0,
        "txt_dim": 0,
        "cond_top_only": False,
        "conditional_denoiser": False,
        "frame_dim": 3,
        "temporal_causal": 1,
        "attention_frames": 2,
        "position_embed": True,
        **flow,
    }
    data = DataConfig(kind="paddle", frames=4, height=24, width=24, actions=("stay", "up", "down"), world="paddle")
    return replace(configure(**options), data=data, sample=SampleConfig(solver="window:36", fps=30.0))


@pytest.fixture(scope="session")
def paddle(configure: Callable[..., RunConfig], build: Callable[[RunConfig], Pipeline]) -> Pipeline:
    """A model of the paddle world whose cache rolls."""
    return build(_of_actions(configure))


@pytest.fixture(scope="session")
def whole(configure: Callable[..., RunConfig], build: Callable[[RunConfig], Pipeline]) -> Pipeline:
    """The same without a network that cleans: by its score it is cleaned as a whole."""
    return build(_of_actions(configure, learnable_self_denoiser=False))


@pytest.fixture
def game(paddle: Pipeline) -> Game:
    return Game(paddle, PaddleBall)


@pytest.fixture
def played(paddle: Pipeline) -> Played:
    return Played(paddle, "tiny", PaddleBall, "paddle")
