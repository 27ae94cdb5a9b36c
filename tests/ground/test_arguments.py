"""Arguments of another type than a public call takes: one sentence, before any work."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from starflow import Flow, FlowConfig, Guidance, Pipeline, Window, decode
from starflow.codecs import make_codec
from starflow.config import RunConfig, to_mapping
from starflow.data import Clip, DigitJudge, MovingDigits, assemble, write_contact_sheet
from starflow.evaluate import (
    Watcher,
    evaluate,
    features_of,
    fidelity,
    frame_differences,
    frechet_distance,
    precision_recall,
    read_clips,
    score,
)
from starflow.play import Game
from starflow.storage import convert, empty_flow, fingerprints, save_model, write_model
from starflow.text import ClassEncoder, Features, WordEncoder, caption_for, make_text_encoder, split_words
from starflow.training import Trainer, fitting, make_dataset, make_parts, plan, train
from starflow.worlds import PaddleBall, record

from ..pipelines import make_config, make_pipeline

NEVER: Any = None  # what a call does not come to read


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return make_pipeline(make_config())


@pytest.mark.parametrize(
    ("who", "call"),
    [
        ("train", lambda config: train(config, "runs/never")),
        ("Trainer", lambda config: Trainer(config, NEVER, NEVER, torch.device("cpu"))),
        ("plan", plan),
        ("fitting", lambda config: fitting(config, 1 << 30)),
        ("make_dataset", make_dataset),
        ("make_parts", make_parts),
        ("pipeline", lambda config: Pipeline(NEVER, config, NEVER)),
        ("save_model", lambda config: save_model("never.safetensors", {}, config, NEVER, NEVER)),
        ("write_model", lambda config: write_model("never.safetensors", {}, config, {})),
        ("empty_flow", empty_flow),
        ("fingerprints", fingerprints),
        ("convert", lambda config: convert("never.pth", config, "never.safetensors")),
        ("caption_for", lambda config: caption_for(config, "a three")),
    ],
)
def test_a_configuration_of_another_type_is_named(who: str, call: Callable[[Any], object]) -> None:
    config = make_config()
    for other in (to_mapping(config), config.flow, "digits", None):
        said = rf"^{who}: config is a {type(other).__name__}, expected a RunConfig \(starflow.config.from_mapping makes"
        with pytest.raises(ValueError, match=said):
            call(other)


def test_a_flow_and_parts_are_made_of_their_own_configurations() -> None:
    config = make_config()
    with pytest.raises(ValueError, match=r"^Flow: config is a RunConfig, expected a FlowConfig \("):
        Flow(config)  # type: ignore[arg-type]
    assert isinstance(config.flow, FlowConfig)
    assert isinstance(config, RunConfig)
    with pytest.raises(ValueError, match=r"^codec: config is None, expected a mapping of its options such as"):
        make_codec(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^text encoder: config is 'words', expected a mapping of its options"):
        make_text_encoder("words")  # type: ignore[arg-type]


@pytest.mark.parametrize("other", ["print", 3, [print]])
def test_what_cannot_be_called_is_told_before_any_work(tmp_path: Path, pipeline: Pipeline, other: Any) -> None:
    folder = tmp_path / "new"
    calls = [
        ("train: on_step", lambda: train(make_config(), folder, on_step=other)),
        ("record: on_frame", lambda: record(PaddleBall(), folder, 3, on_frame=other)),
        ("convert: progress", lambda: convert("never.pth", make_config(), folder, progress=other)),
        ("evaluate: tell", lambda: evaluate(pipeline, [], [], [], tell=other)),
        ("Game: make_world", lambda: Game(pipeline, other)),
    ]
    for name, call in calls:
        with pytest.raises(ValueError, match=rf"^{name} is .*, expected a function"):
            call()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("who", "call"),
    [
        ("WordEncoder: texts", lambda texts: WordEncoder().encode(texts)),
        ("ClassEncoder: texts", lambda texts: ClassEncoder(3, ["a", "b", "c"]).encode(texts)),
        ("Features: captions", lambda texts: Features(make_config().flow, WordEncoder())(texts)),
        ("pipeline: prompts", lambda texts: make_pipeline(make_config()).condition(texts)),
        ("watcher: prompts", lambda texts: Watcher(make_pipeline(make_config()), texts)),
        ("DigitJudge: captions", lambda texts: DigitJudge().score([torch.zeros(2, 1, 24, 24)], texts)),
        (
            "write_contact_sheet: captions",
            lambda texts: write_contact_sheet("a.png", [torch.zeros(2, 8, 8, 1, dtype=torch.uint8)], texts),
        ),
    ],
)
def test_texts_are_a_list_of_texts(who: str, call: Callable[[Any], object]) -> None:
    with pytest.raises(ValueError, match=rf"^{who}\[0\] is None, expected a text$"):
        call([None])
    with pytest.raises(ValueError, match=rf"^{who}\[1\] is 3, expected a text$"):
        call(["a three", 3])
    # The letters of one text would be read as so many.
    for other in ("abc", 3, {"a three": 1}, (text for text in ["a three"])):
        with pytest.raises(ValueError, match=rf"^{who} is .*, expected a list of texts$"):
            call(other)


def test_one_text_is_a_text(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match=r"^split_words: text is \['three'\], expected a text$"):
        split_words(["three"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^assemble: text is None, expected a text$"):
        assemble(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^pipeline: prompt is None, expected a text$"):
        pipeline.caption(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^read_clips: caption is 3, expected a text$"):
        read_clips(pipeline, [], caption=3)  # type: ignore[arg-type]
    for paths in (None, [None], (path for path in ["a.mp4"])):
        with pytest.raises(ValueError, match=r"^score: paths is .*, expected a path or a list of paths$"):
            read_clips(pipeline, paths)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", ["3", None, 2.5, True, 0])
def test_numbers_of_vectors_and_classes_are_integers(size: Any) -> None:
    with pytest.raises(ValueError, match=r"^WordEncoder: size is .*, expected an integer of at least 1$"):
        WordEncoder(size=size)
    with pytest.raises(ValueError, match=r"^ClassEncoder: num_classes is .*, expected an integer of at least 1$"):
        ClassEncoder(size)


@pytest.mark.parametrize("other", ["no", 0, None, "false"])
def test_flags_are_true_or_false(pipeline: Pipeline, tmp_path: Path, other: Any) -> None:
    clips = [Clip(torch.zeros(4, 1, 16, 16), "", "a")]
    calls = [
        ("train: resume", lambda: train(make_config(), tmp_path / "run", resume=other)),
        ("train: quiet", lambda: train(make_config(), tmp_path / "run", quiet=other)),
        ("score: order_check", lambda: score(pipeline, clips, order_check=other)),
        ("score: per_token", lambda: score(pipeline, clips, per_token=other)),
        ("session: last", lambda: pipeline.session("").extend(1, last=other)),
        ("session: together", lambda: pipeline.session("").extend(1, together=other)),
        ("guidance: annealed", lambda: Guidance(1.0, kind="linear", annealed=other)),
        ("guidance: all_blocks", lambda: Guidance(1.0, all_blocks=other)),
        ("solver: certificate", lambda: Window(certificate=other)),
        ("BlockTransform: equalize", lambda: make_codec({"kind": "dct", "equalize": other})),
        ("BlockTransform: opponent", lambda: make_codec({"kind": "dct", "opponent": other})),
        ("MovingDigits: pairs", lambda: MovingDigits(pairs=other)),
    ]
    for name, call in calls:
        with pytest.raises(ValueError, match=rf"^{name} is .*, expected True or False$"):
            call()
    assert Window(certificate=np.True_).certificate  # type: ignore[arg-type]


@pytest.mark.parametrize("patch", ["4", 4.0, 0, None, True])
def test_sizes_of_blocks_are_integers(patch: Any) -> None:
    for name in ("patch", "temporal"):
        with pytest.raises(ValueError, match=rf"^BlockTransform: {name} is .*, expected an integer of at least 1$"):
            make_codec({"kind": "dct", name: patch})


def test_arrays_are_no_data_of_a_flow(pipeline: Pipeline) -> None:
    flow, x = pipeline.flow, torch.zeros(1, 4, 16, 4, 4)
    y = pipeline.condition([""])
    for call in (flow.log_prob, flow.encode, flow.encode_shallow, flow.nll):
        with pytest.raises(ValueError, match=r"^flow: x is a ndarray, expected a tensor \(torch.as_tensor\)$"):
            call(x.numpy(), y)
        with pytest.raises(ValueError, match=r"^flow: y is a list, expected a tensor \(torch.as_tensor\)$"):
            call(x, [0])
    with pytest.raises(ValueError, match=r"^flow: z is a ndarray, expected a tensor"):
        decode(flow, x.numpy(), y)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^flow: prefix is a ndarray, expected a tensor"):
        decode(flow, x, y, prefix=x[:, :1].numpy())  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"^sample: image has shape \[16, 16\], expected \(\[clips,\] channels, height"
    ):
        pipeline.sample("", image=torch.zeros(16, 16))


def test_arguments_of_measures_are_told_before_hours_of_work(pipeline: Pipeline) -> None:
    clips, sets = [Clip(torch.zeros(4, 1, 16, 16), "", "a")], torch.zeros(5, 2, 3)
    calls: list[tuple[str, Callable[[], object]]] = [
        ("evaluate: given is 1.5, expected an integer >= 0", lambda: evaluate(pipeline, [], [], [], given=1.5)),  # type: ignore[arg-type]
        ("evaluate: batch is 0, expected an integer >= 1", lambda: evaluate(pipeline, [], [], [], batch=0)),
        ("evaluate: steps is 0, expected an integer >= 1", lambda: evaluate(pipeline, [], [], [], steps=0)),
        ("evaluate: second is 0, expected an integer >= 1", lambda: evaluate(pipeline, [], [], [], second=0)),
        ("evaluate: options is {}, expected a starfl", lambda: evaluate(pipeline, [], [], [], options={})),  # type: ignore[arg-type]
        ("precision_recall: neighbours is 0, expected an integer >= 1", lambda: precision_recall(sets, sets, 0)),
        ("precision_recall: made is a list, expected a tensor", lambda: precision_recall([1], sets)),  # type: ignore[arg-type]
        ("frechet_distance: real is a ndarray, expected a tensor", lambda: frechet_distance(sets[0], sets[0].numpy())),  # type: ignore[arg-type]
        ("frame_differences: clips is a list, expected a tensor", lambda: frame_differences([1])),  # type: ignore[arg-type]
        ("features: the network is <function", lambda: features_of(lambda x: x, sets)),  # type: ignore[arg-type]
        ("fidelity: made is a ndarray, expected a te", lambda: fidelity(sets.numpy(), sets, torch.nn.Identity(), None)),  # type: ignore[arg-type]
        ("score: fps is '3', expected a finite number above 0, or", lambda: score(pipeline, clips, fps="3")),  # type: ignore[arg-type]
        ("score: fps is -3, expected a finite number above 0, or None", lambda: score(pipeline, clips, fps=-3)),
    ]
    for said, call in calls:
        with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
            call()


def test_clips_to_evaluate_are_clips(pipeline: Pipeline) -> None:
    clips = [Clip(None, "a three", "a")]  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"^evaluate: a clip is Clip.*, expected a starflow.data.Clip whose pixels are"
    ):
        evaluate(pipeline, clips, clips, clips)
