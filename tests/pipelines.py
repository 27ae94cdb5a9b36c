"""Fixtures: a small flow with random weights, as a pipeline and as a model file. A wing's conftest imports its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from starflow import Flow, FlowConfig
from starflow.codecs import make_codec
from starflow.config import DataConfig, RunConfig, SampleConfig
from starflow.data import VOCABULARY
from starflow.sampling import Pipeline
from starflow.storage import save_model
from starflow.text import make_text_encoder

SIZE = 16
FRAMES = 4


def make_config(**flow: object) -> RunConfig:
    options: dict[str, object] = {
        "in_channels": 16,
        "img_size": SIZE // 4,
        "channels": 32,
        "layers_per_block": (1, 1, 2),
        "head_dim": 16,
        "soft_clip": 4.0,
        "use_final_norm": True,
        "txt_size": 3,
        "txt_dim": len(VOCABULARY),
        "cond_top_only": True,
        "seq_order": "L2R",
        "temporal_causal": 2,
        "shallow_block_local": True,
        "top_order": "spread",
        "learnable_self_denoiser": True,
        "conditional_denoiser": True,
        **flow,
    }
    return RunConfig(
        flow=FlowConfig(**options),  # type: ignore[arg-type]
        data=DataConfig(frames=FRAMES, height=SIZE, width=SIZE),
        codec={"kind": "dct", "patch": 4, "channels": 1},
        text={"kind": "words", "vocabulary": list(VOCABULARY), "size": 3} if options["txt_size"] else {},
        sample=SampleConfig(solver="window:8"),
    )


def make_pipeline(config: RunConfig) -> Pipeline:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = Flow(config.flow)
        with torch.no_grad():
            # A new flow is the identity: its last layers are zero.
            for parameter in flow.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    text = make_text_encoder(config.text) if config.text else None
    return Pipeline(flow, config, make_codec(config.codec), text)


@pytest.fixture(scope="session")
def configure() -> Callable[..., RunConfig]:
    """Makes the config of the small flow, with other options where given."""
    return make_config


@pytest.fixture(scope="session")
def build() -> Callable[[RunConfig], Pipeline]:
    """Makes a pipeline with random weights."""
    return make_pipeline


@pytest.fixture(scope="session")
def pipeline() -> Pipeline:
    return make_pipeline(make_config())


@pytest.fixture(scope="session")
def model(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file."""
    path = tmp_path_factory.mktemp("run") / "model.safetensors"
    save_model(path, pipeline.flow, pipeline.config, pipeline.codec, pipeline.text)
    return path


@pytest.fixture(scope="session")
def paired() -> Pipeline:
    """A pipeline with random weights whose configuration says that it was trained on pairs."""
    config = make_config()
    words = {**config.text, "vocabulary": [*config.text["vocabulary"][:-1], "v2v"], "size": 4}
    return make_pipeline(
        replace(
            config,
            flow=replace(config.flow, txt_size=4),
            text=words,
            train=replace(config.train, source_prob=1.0),
        )
    )
