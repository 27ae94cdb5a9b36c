"""What the documentation shows runs: docstrings, the code of the pages, their commands, and the site."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import starflow
import starflow_ext
from starflow import Flow
from starflow.cli.main import make_parser
from starflow.config import RunConfig
from starflow.storage import MODEL, save_model
from starflow.training import make_parts

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
    assert finder.find(importlib.import_module("starflow.solver.function").solve)[0].examples


ROOT = Path(__file__).parents[2]
PAGES = [path for path in sorted((ROOT / "docs").glob("*.md")) if "```python" in path.read_text()]


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


def commands(page: Path) -> list[list[str]]:
    """Words of the commands `starflow ...` in the blocks of a page, with or without `torchrun` before them."""
    found = []
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE):
        if kind not in ("", "sh"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            for part in map(str.strip, line.split("&&")):
                if not part.startswith(("starflow ", "torchrun ")):
                    continue
                words = shlex.split(part, comments=True)
                if words[:1] == ["torchrun"]:
                    words = words[words.index("-m") + 1 :]
                if words[:1] == ["starflow"] and "..." not in words:
                    found.append(words[1:])
    return found


SHOWN = [
    pytest.param(command, id=f"{page.stem}-{place}")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for place, command in enumerate(commands(page))
]


@pytest.mark.parametrize("command", SHOWN)
def test_commands_of_a_page_have_the_options_that_they_name(command: list[str]) -> None:
    args, rest = make_parser().parse_known_args(command)
    assert not [word for word in rest if word.startswith("-")]
    assert callable(args.run)


def test_commands_are_found() -> None:
    assert [command[0] for command in commands(ROOT / "docs" / "gallery.md")].count("sample") >= 6
    assert len(SHOWN) > 20


def test_pictures_of_the_gallery_are_there_and_small() -> None:
    page = ROOT / "docs" / "gallery.md"
    shown = re.findall(r"!\[[^\]]+\]\((images/gallery/[^)]+)\)", page.read_text(encoding="utf-8"))
    sizes = {name: (page.parent / name).stat().st_size for name in shown}
    assert len(sizes) == len(shown) >= 8
    assert max(sizes.values()) < 150_000
    assert sum(sizes.values()) < 1_000_000
    assert {f"images/gallery/{path.name}" for path in (page.parent / "images" / "gallery").iterdir()} == set(sizes)
