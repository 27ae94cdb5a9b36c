"""What the documentation shows runs: the examples of docstrings, and the code of the pages."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import starflow
import starflow_ext
from starflow import Flow
from starflow.batches import make_parts
from starflow.checkpoints import MODEL, save_model
from starflow.config import RunConfig

MODULES = sorted(
    module.name
    for package in (starflow, starflow_ext)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.endswith(("__main__", "._C", ".libstarflow_ops"))
)


@pytest.mark.parametrize("name", ["starflow", "starflow_ext", *MODULES])
def test_examples_of_docstrings(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    assert finder.find(importlib.import_module("starflow.inverse").solve)[0].examples


PAGES = [path for path in sorted((Path(__file__).parents[2] / "docs").glob("*.md")) if "```python" in path.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_of_a_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run one after the other, as a reader would paste them, where `starflow train` has run."""
    config = RunConfig.load("tiny")
    codec, text = make_parts(config)
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    save_model(tmp_path / "runs" / "tiny" / MODEL, Flow(config.flow), config, codec, text)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, page.name, "exec"), names)
