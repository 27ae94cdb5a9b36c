"""What the documentation shows runs: the examples of docstrings, and the code of the pages."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
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


def test_the_site_builds_without_a_warning(root: Path, tmp_path: Path) -> None:
    """Every page is in the navigation, every link and every anchor has its target, every name of the reference is."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings_handlers.python")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    for page in (root / "docs").glob("*.md"):
        where = tmp_path if page.stem == "index" else tmp_path / page.stem
        assert (where / "index.html").is_file(), page
