import json
from pathlib import Path

import pytest

from starflow.data import aspect_size, assemble

UNITS = json.loads((Path(__file__).parents[1] / "goldens" / "units.json").read_text())


@pytest.mark.parametrize("case", UNITS["captions"], ids=lambda case: case["out"][0][:20])
def test_captions_are_those_of_the_published_code(case):
    def value(name, row):
        given = case["kwargs"].get(name)
        # The published code truncates levels that came as float32; the recorded number is that float32.
        return given["tensor"][row] if isinstance(given, dict) else given

    out = [
        assemble(
            text,
            fps=value("fps", row),
            noise_level=value("noise_std", row),
            aspect_ratio=value("aspect_ratio", row),
            template="gemma" if case["kwargs"].get("use_template") else None,
        )
        for row, text in enumerate(case["text"])
    ]
    assert out == case["out"]


def test_modes_and_drop_come_before_everything_else():
    assert assemble("a cat", mode="extend", noise_level=0.3) == "Noise Level 300:\n(extend) a cat"
    assert assemble("a cat", mode="last") == "(last) a cat"
    assert assemble("a cat", mode="v2v") == "(v2v) a cat"
    assert assemble("a cat", mode="extend", drop=True, fps=16) == assemble("", fps=16)
    assert assemble("a cat", fps=23.976) == "A video with 23.976 fps:\na cat\n"


@pytest.mark.parametrize("case", UNITS["aspect_sizes"])
def test_aspect_sizes_are_those_of_the_published_code(case):
    side, multiple = map(int, case.split("/"))
    assert {r: list(aspect_size(side, r, multiple)) for r in UNITS["aspect_sizes"][case]} == UNITS["aspect_sizes"][case]


def test_caption_errors_name_what_was_expected():
    with pytest.raises(ValueError, match='aspect ratio is "wide", expected "W:H" such as "16:9"'):
        assemble("", aspect_ratio="wide")
    with pytest.raises(ValueError, match="assemble: fps is -1, expected at least 0"):
        assemble("", fps=-1)
    with pytest.raises(ValueError, match='assemble: mode is "first", expected "extend"'):
        assemble("", mode="first")
    with pytest.raises(ValueError, match="too small for 21:9 in multiples of 64"):
        aspect_size(32, "21:9", 64)
