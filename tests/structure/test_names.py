"""Functions of a file have names of their own: a second one of a name hides the first, such as a test."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest


@pytest.mark.parametrize("folder", ["benchmarks", "examples", "python", "starflow_ext", "tests"])
def test_no_name_is_defined_twice(root: Path, folder: str) -> None:
    files = sorted((root / folder).rglob("*.py"))
    assert files
    for file in files:
        defined = [
            node.name
            for node in ast.parse(file.read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            and not any(isinstance(mark, ast.Name) and mark.id == "overload" for mark in node.decorator_list)
        ]
        assert [name for name, count in Counter(defined).items() if count > 1] == [], file
