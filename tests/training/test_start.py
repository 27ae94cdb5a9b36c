"""Runs that start from a model: its weights, its configuration, and what may differ."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from starflow.cli import main
from starflow.cli.options import make_config
from starflow.config import ConfigError, RunConfig
from starflow.model import Flow
from starflow.storage import CheckpointError, convert, load_flow, load_model, published_state, read_header, save_model
from starflow.training import Batches, Trainer, TrainingError, TrainStep, make_dataset, make_parts, train
from starflow.training.start import started_flow

CPU = torch.device("cpu")


@pytest.fixture
def model(tiny, tmp_path: Path) -> Path:
    """A model whose weights are away from their start, where the network puts out no scale at all."""
    config = tiny()
    flow = Flow(config.flow)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in flow.state_dict().values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.05)
    path = tmp_path / "model.safetensors"
    save_model(path, flow, config, *make_parts(config))
    return path


def first_step(config: RunConfig) -> tuple[TrainStep, Trainer, Batches]:
    codec, text = make_parts(config)
    trainer = Trainer(config, codec, text, CPU, flow=started_flow(config, codec, text))
    batches = Batches(config, make_dataset(config), codec)
    return trainer.run(batches.make(0)), trainer, batches


def score(model: str | Path, trainer: Trainer, batches: Batches) -> float:
    """What the model itself says of the first batch of a run, computed in float32 as training does."""
    x, y = trainer._inputs(batches.make(0))
    with torch.no_grad():
        return float(load_model(model).flow.float().nll(x, y).mean())


def test_the_first_loss_is_the_score_of_the_model(tiny, model: Path) -> None:
    done, trainer, batches = first_step(tiny(init=str(model)))
    assert done.loss == pytest.approx(score(model, trainer, batches), abs=1e-6)
    fresh, _, _ = first_step(tiny(init=str(model), seed=9))
    assert fresh.loss != done.loss


def test_a_shipped_model_is_trained_on_with_its_configuration(caplog) -> None:
    caplog.set_level(logging.INFO, "starflow")
    settings = [(["train", "init"], "digits"), (["train", "batch_size"], 2), (["train", "precision"], "float32")]
    config = make_config(None, settings)
    assert replace(config, train=read_header("digits").config.train) == read_header("digits").config
    done, trainer, batches = first_step(config)
    assert done.loss == pytest.approx(score("digits", trainer, batches), abs=1e-5)
    told = [record.getMessage() for record in caplog.records]
    assert told[0] == "starting from the weights of digits"
    assert told[1:] == [
        "train.batch_size is 2, in digits it is 8",
        "train.precision is 'float32', in digits it is 'bfloat16'",
    ]


def test_a_converted_model_is_trained_on(tiny, tmp_path: Path) -> None:
    config = tiny()
    flow = Flow(config.flow)
    torch.save(published_state(flow), tmp_path / "published.pth")
    convert(tmp_path / "published.pth", config, tmp_path / "folder", file_bytes=1 << 16)
    assert len(list((tmp_path / "folder").glob("*.safetensors"))) > 1
    done, trainer, batches = first_step(tiny(init=str(tmp_path / "folder")))
    assert done.loss == pytest.approx(score(tmp_path / "folder", trainer, batches), abs=1e-6)


def test_the_average_starts_from_the_weights_of_the_model(tiny, model: Path, tmp_path: Path) -> None:
    source, _ = load_flow(model)
    trained = train(tiny(init=str(model), steps=1, lr=0.0, min_lr=0.0, denoiser_lr=0.0), tmp_path / "run", quiet=True)
    tracked = {name for name in source.state_dict() if name.endswith(".guess")}
    for name, tensor in source.state_dict().items():
        if name not in tracked:
            assert torch.allclose(trained.state_dict()[name], tensor, atol=1e-7), name


def test_frame_conditions_that_are_added_start_at_zero(tiny, model: Path, caplog) -> None:
    config = tiny(init=str(model), flow={"frame_dim": 3})
    codec, text = make_parts(config)
    flow = started_flow(config, codec, text)
    assert "flow.frame_dim is 3, in" in caplog.text
    assert not any(bool(tensor.any()) for name, tensor in flow.state_dict().items() if "proj_frame" in name)
    x = torch.randn(2, 4, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(2, 3, 15)
    told = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))
    source, _ = load_flow(model)
    assert torch.equal(flow.nll(x, y, told), source.nll(x, y))
    assert flow.denoiser is not None
    assert source.denoiser is not None
    assert torch.equal(flow.denoiser(x, y, told), source.denoiser(x, y))


def test_a_denoiser_may_be_added_or_left_out(tiny, model: Path, tmp_path: Path) -> None:
    without = tiny(init=str(model), flow={"learnable_self_denoiser": False, "conditional_denoiser": False})
    codec, text = make_parts(without)
    flow = started_flow(without, codec, text)
    assert flow.denoiser is None
    save_model(tmp_path / "without.safetensors", flow, without, codec, text)
    again = started_flow(tiny(init=str(tmp_path / "without.safetensors")), codec, text)
    new = Flow(tiny().flow)
    assert again.denoiser is not None
    assert new.denoiser is not None
    assert again.denoiser.state_dict().keys() == new.denoiser.state_dict().keys()
    assert torch.equal(again.blocks[0].conditioner.proj_in.weight, flow.blocks[0].conditioner.proj_in.weight)


def test_a_denoiser_that_is_added_has_the_mean_of_the_data(tiny, tmp_path: Path) -> None:
    parts = {"learnable_self_denoiser": False, "conditional_denoiser": False, "denoiser_window": None}
    config = tiny(flow={"centred": True, **parts})
    flow = Flow(config.flow)
    mean = torch.randn(config.flow.in_channels, 1, 1, generator=torch.Generator().manual_seed(5)).expand(-1, 8, 8)
    flow.centre_on(mean)
    path = tmp_path / "model.safetensors"
    save_model(path, flow, config, *make_parts(config))
    added = {"learnable_self_denoiser": True, "denoiser_layers": 2, "denoiser_skip": 1.0}
    more = tiny(init=str(path), flow={"centred": True, **parts, **added})
    made = started_flow(more, *make_parts(more))
    assert flow.centre is not None
    assert made.denoiser is not None
    assert made.denoiser.centre is not None
    assert torch.equal(made.denoiser.centre.mean, flow.centre.mean)
    assert flow.centre.mean.abs().amax() > 0.5
    # Of a denoiser that both have, these options say what the weights mean.
    path = tmp_path / "other.safetensors"
    save_model(path, made, more, *make_parts(more))
    other = tiny(init=str(path), flow={"centred": True, **parts, **added, "denoiser_skip": 0.5})
    with pytest.raises(ConfigError, match=r"flow.denoiser_skip is 0.5, the model has 1.0"):
        started_flow(other, *make_parts(other))


def test_a_gaussian_is_measured_for_a_denoiser_that_is_new_and_kept_of_one_that_is_not(tiny, tmp_path: Path) -> None:
    none = {"centred": True, "learnable_self_denoiser": False, "conditional_denoiser": False, "denoiser_window": None}
    train(tiny(flow=none, steps=1), tmp_path / "plain", quiet=True)
    added = none | {"learnable_self_denoiser": True, "denoiser_components": 2}
    found = train(tiny(flow=added, steps=1, init=str(tmp_path / "plain")), tmp_path / "added", quiet=True)
    assert found.denoiser is not None
    assert found.denoiser.gaussian is not None
    assert found.denoiser.gaussian.rest.gt(0).all()
    # Other data would have another one.
    config = tiny(flow=added, steps=1, init=str(tmp_path / "added"))
    later = train(replace(config, data=replace(config.data, start="anywhere")), tmp_path / "later", quiet=True)
    assert later.denoiser is not None
    assert later.denoiser.gaussian is not None
    assert torch.equal(later.denoiser.gaussian.components, found.denoiser.gaussian.components)


@pytest.mark.parametrize(
    "flow, said",
    [
        (
            {"channels": 48},
            [
                "flow.channels is 48, the model has 32",
                r"of another shape: .*proj_in\.weight \[32, 16\] \(expected \[48",
            ],
        ),
        (
            {"layers_per_block": (1, 1, 3)},
            ["layers_per_block is", r"missing in the model: blocks\.2\.conditioner\.lay"],
        ),
        ({"layers_per_block": (1, 1, 1)}, ["layers_per_block is", r"unexpected in the model: blocks\.2\.conditioner"]),
        ({"soft_clip": 3.0}, [r"flow\.soft_clip is 3\.0, the model has 4\.0"]),
        ({"top_order": "raster"}, ["flow.top_order is 'raster', the model has 'spread'"]),
    ],
)
def test_another_flow_is_one_error(tiny, model: Path, flow: dict[str, Any], said: list[str]) -> None:
    config = tiny(init=str(model), flow=flow)
    for message in said:
        with pytest.raises(ConfigError, match=message):
            started_flow(config, *make_parts(config))


def test_another_codec_or_vocabulary_is_refused(tiny, model: Path) -> None:
    words = [*RunConfig.load("tiny").text["vocabulary"][1:], "backwards"]
    config = tiny(init=str(model), text={"kind": "words", "size": 3, "vocabulary": words})
    with pytest.raises(ConfigError, match=r"text\.vocabulary is \[.*the model has \['zero'"):
        started_flow(config, *make_parts(config))
    config = replace(tiny(init=str(model)), codec={"kind": "haar", "patch": 4, "channels": 1})
    with pytest.raises(ConfigError, match=r"codec\.kind is 'haar', the model has 'dct'"):
        started_flow(config, *make_parts(config))


def test_integers_are_no_weights_to_train(tiny, tmp_path: Path) -> None:
    config = tiny()
    torch.save(published_state(Flow(config.flow)), tmp_path / "published.pth")
    convert(tmp_path / "published.pth", config, tmp_path / "int8.safetensors", dtype="int8")
    with pytest.raises(ConfigError, match="whose weights are kept as integers, expected floating-point numbers"):
        started_flow(tiny(init=str(tmp_path / "int8.safetensors")), *make_parts(config))


def test_a_run_resumes_without_its_model_and_keeps_to_it(tiny, model: Path, tmp_path: Path) -> None:
    config, whole = tiny(init=str(model), steps=4, checkpoint_every=2), tmp_path / "whole"
    expected = train(config, whole, quiet=True).state_dict()

    def stop(done: TrainStep) -> None:
        if done.step == 3:
            raise OSError("the machine went down")

    with pytest.raises(OSError, match="went down"):
        train(config, tmp_path / "cut", quiet=True, on_step=stop)
    other = tmp_path / "other.safetensors"
    model.rename(other)
    with pytest.raises(
        TrainingError, match=r"holds a run that began from '.*model\.safetensors', expected another fol"
    ):
        train(replace(config, train=replace(config.train, init=str(other))), tmp_path / "cut", quiet=True)
    resumed = train(config, tmp_path / "cut", quiet=True).state_dict()
    for name, tensor in expected.items():
        assert torch.equal(resumed[name], tensor), name
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not exist"):
        train(config, tmp_path / "new", quiet=True)


def test_the_short_form_takes_what_a_yaml_leaves_out_from_the_model(
    tiny, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(f"train: {{init: {model}, batch_size: 2, steps: 1}}\n")
    config = make_config(str(tmp_path / "mine.yaml"), [])
    base = read_header(model).config
    assert (config.flow, config.codec, config.text, config.data) == (base.flow, base.codec, base.text, base.data)
    assert (config.train.batch_size, config.train.noise_std) == (2, 0.1)
    out = tmp_path / "run"
    settings = ["--set", "train.batch_size=2", "--steps", "1", "--quiet", "--device", "cpu"]
    assert main(["train", "--init", str(model), "--out", str(out), *settings]) == 0
    trained = read_header(out).config
    assert (trained.flow, trained.train.init) == (base.flow, str(model))
    assert main(["train", "--init", str(model), "--out", str(model.parent), *settings]) == 1
    assert "to train on from it, name it as train.init and give the run a folder of its own" in capsys.readouterr().err
