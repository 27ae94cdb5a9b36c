"""The demo with hardly any training: everything is written, whole and self-contained. What it learns is not judged."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from starflow.cli.demo import DemoFigures, demo
from starflow.data import probe


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DemoFigures]:
    folder = tmp_path_factory.mktemp("demo")
    return folder, demo(folder, steps=2, quiet=True)


def test_figures_are_written_and_in_range(made: tuple[Path, DemoFigures]) -> None:
    folder, figures = made
    assert json.loads((folder / "figures.json").read_text()) == asdict(figures)
    assert {field.name for field in fields(figures)} == set(asdict(figures))
    for name in ("digit_every_frame", "direction_accuracy", "shuffled_ranked", "reversed_ranked"):
        assert 0.0 <= getattr(figures, name) <= 1.0
    assert figures.real_digit_every_frame > 0.9
    assert figures.real_direction_accuracy > 0.9
    assert figures.bits_per_dim > figures.noise_floor_bits
    assert figures.sweeps_per_frame > 0.0
    assert 0.0 <= figures.certificate < 0.1
    assert 0.0 < figures.clip_certificate < 0.1


def test_report_stands_alone(made: tuple[Path, DemoFigures]) -> None:
    page = (made[0] / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r'src="([^"]{0,20})', page)
    assert len(sources) > 20
    assert all(source.startswith("data:image/") for source in sources)
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "whole clips, all blocks" in page
    assert 'alt="bits per dimension of tokens under the frames of clips"' in page
    for heading in (
        "The model that comes with the package",
        "A model trained here",
        "Samples",
        "Continuations",
        "Training",
        "Solving the inverse",
        "Likelihood",
    ):
        assert f"<h2>{heading}</h2>" in page


def test_clips_play(made: tuple[Path, DemoFigures]) -> None:
    clips = sorted((made[0] / "clips").glob("*.mp4"))
    assert {clip.stem.rpartition("-")[0] for clip in clips} == {"shipped", "sample", "from-image", "from-clip"}
    assert probe(clips[0], count=True).frames == 6
    assert all(clip.with_suffix(".gif").exists() for clip in clips)
    assert not list(made[0].rglob("*.partial*"))
