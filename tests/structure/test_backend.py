"""What pip is asked to install for a build: torch and CUTLASS only where the machine lacks or needs them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest


def _module(root: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, root / f"cmake/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def find_torch(root: Path) -> ModuleType:
    return _module(root, "find_torch")


@pytest.fixture
def backend(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("scikit_build_core")
    monkeypatch.syspath_prepend(str(root / "cmake"))
    for name in ("STARFLOW_CUDA", "STARFLOW_CUDA_ARCHITECTURES", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    module = _module(root, "backend")
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    return module


def make_torch(folder: Path, version: str) -> Path:
    torch = folder / "torch"
    for name in ("include/torch/csrc/stable/library.h", "lib/libtorch_cpu.so", "version.py"):
        (torch / name).parent.mkdir(parents=True, exist_ok=True)
        (torch / name).write_text(f"__version__ = '{version}'\n")
    return torch


def only_in(monkeypatch: pytest.MonkeyPatch, path: list[str], environment: Path) -> None:
    monkeypatch.setattr(sys, "path", path)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(environment))


def test_torch_of_the_environment_serves_an_isolated_build(
    find_torch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pip takes the environment off the path, but the interpreter stays that of the environment."""
    torch = make_torch(tmp_path, "2.14.1+cu130")
    only_in(monkeypatch, [str(tmp_path / "isolated")], tmp_path)
    assert find_torch.find_torch() == ("2.14.1+cu130", torch)


def test_torch_of_the_build_comes_first(
    find_torch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_torch(tmp_path / "isolated", "2.13.0")
    make_torch(tmp_path, "2.14.1")
    only_in(monkeypatch, [str(tmp_path / "isolated")], tmp_path)
    assert find_torch.find_torch() == ("2.13.0", first)


@pytest.mark.parametrize("version", ["2.11.0+cu130", "2.12.1"])
def test_torch_of_2_11_has_the_headers(
    find_torch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    torch = make_torch(tmp_path, version)
    only_in(monkeypatch, [], tmp_path)
    assert find_torch.find_torch() == (version, torch)


@pytest.mark.parametrize("version", ["2.10.0", "2.9.1+cpu", "1.13.1"])
def test_torch_with_older_headers_does_not_serve(
    find_torch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    make_torch(tmp_path, version)
    only_in(monkeypatch, [], tmp_path)
    assert find_torch.find_torch() is None


def test_torch_is_asked_for_where_there_is_none(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert backend.needed(None) == []
    monkeypatch.setattr(backend, "find_torch", lambda: None)
    assert backend.needed(None) == ["torch==2.13.0"]
    assert "torch==2.13.0" in backend.get_requires_for_build_wheel()
    assert "torch==2.13.0" in backend.get_requires_for_build_editable()
    assert "torch==2.13.0" not in backend.get_requires_for_build_sdist()


@pytest.mark.parametrize(
    ("environment", "settings"),
    [
        ({"STARFLOW_CUDA": "ON"}, {}),
        ({"TORCH_CUDA_ARCH_LIST": "8.0"}, {}),
        ({"STARFLOW_CUDA_ARCHITECTURES": "80-real"}, {}),
        ({"STARFLOW_CUDA": "OFF"}, {"cmake.define.STARFLOW_CUDA": "ON"}),
    ],
)
def test_cutlass_is_asked_for_where_cuda_kernels_are(
    backend: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    settings: dict[str, str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert backend.needed(settings) == ["nvidia-cutlass==4.2.0.0"]
    assert backend.needed(settings | {"cmake.define.STARFLOW_CUDA": "OFF"}) == []
    assert backend.needed(settings | {"cmake.define.STARFLOW_CUTLASS": "/headers"}) == []


def test_a_visible_gpu_asks_for_cutlass(backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert backend.needed({}) == ["nvidia-cutlass==4.2.0.0"]


def test_run_as_a_script_it_prints_all_requirements(root: Path) -> None:
    done = subprocess.run([sys.executable, root / "cmake/backend.py"], capture_output=True, text=True, check=True)
    assert {"torch==2.13.0", "nvidia-cutlass==4.2.0.0", "pybind11>=2.13"} <= set(done.stdout.split())
    project = (root / "pyproject.toml").read_text()
    assert all(f'"{line}"' in project for line in done.stdout.split() if not line.startswith(("torch", "nvidia")))
