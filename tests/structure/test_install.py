"""What is installed, which copy is imported, and what a broken installation says."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import starflow_ext
from starflow_ext._info import cgroup_quota
from starflow_ext._load import LIBRARY, native


def _distribution() -> tuple[importlib.metadata.Distribution, bool]:
    distribution = importlib.metadata.distribution("starflow-ext")
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    return distribution, bool(origin.get("dir_info", {}).get("editable"))


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a fresh interpreter, from a folder that holds no package."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        cwd=Path(sys.prefix),
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_installed_package_is_the_one_imported(root: Path) -> None:
    """The checkout holds the same packages; imported from there, the wheel would go untested."""
    _, editable = _distribution()
    assert Path(starflow_ext.__file__).is_relative_to(root / "starflow_ext") == editable


def _at_the_root(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a fresh interpreter in the root of the checkout, with nothing but it in front of the installed packages."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("module", ["starflow_ext", "starflow"])
def test_the_root_of_the_checkout_hides_no_package(root: Path, module: str) -> None:
    """`python -c` and `python -m` put the current folder first: the folder starflow_ext there is no package."""
    code = f"import {module}, starflow_ext.ops; print({module}.__file__)"
    done = _at_the_root(root, "-c", code)
    assert done.stdout.strip() == importlib.import_module(module).__file__


def test_wheel_holds_both_packages_and_no_sources() -> None:
    distribution, editable = _distribution()
    if editable:
        pytest.skip("an editable installation has no wheel")
    files = distribution.files or []
    names = {str(name) for name in files}
    assert {f"starflow_ext/{LIBRARY}", "starflow_ext/py.typed", "starflow/__init__.py", "starflow/py.typed"} <= names
    assert any(name.startswith("starflow_ext/_C.") and name.endswith(".so") for name in names)
    assert not [name for name in names if name.endswith((".a", ".o", ".cpp", ".cu", ".h", ".cmake", ".txt.in"))]
    assert sum(Path(str(name.locate())).stat().st_size for name in files) < 100 << 20


def test_wheel_depends_on_a_range_of_torch() -> None:
    distribution, _ = _distribution()
    assert [line for line in distribution.requires or [] if re.match(r"torch\b", line)] == ["torch>=2.10"]


def test_versions_agree() -> None:
    assert starflow_ext.__version__ == importlib.metadata.version("starflow-ext") == native.build_info()["version"]


@pytest.fixture
def copy(tmp_path: Path, library: Path) -> Path:
    """Make a copy of the installed package that may be broken; it hides the real one from a fresh interpreter."""
    package = tmp_path / "starflow_ext"
    source = Path(starflow_ext.__file__).parent
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for path in (library, *library.parent.glob("_C.*.so")):
        shutil.copy(path, package)
    return package


# Without the finder of an editable installation, which would win over the copy.
IMPORT = "import sys; sys.meta_path = [f for f in sys.meta_path if 'Redirect' not in type(f).__name__]; "


def _last_line(copy: Path, code: str = "import starflow_ext") -> str:
    done = _python(IMPORT + code, PYTHONPATH=str(copy.parent))
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1]


def test_a_whole_copy_works(copy: Path) -> None:
    done = _python(IMPORT + "import starflow_ext; print(starflow_ext.__file__)", PYTHONPATH=str(copy.parent))
    assert done.stdout.strip() == str(copy / "__init__.py"), done.stderr


def test_missing_library(copy: Path) -> None:
    (copy / LIBRARY).unlink()
    assert _last_line(copy) == (
        f"ImportError: starflow_ext: {copy / LIBRARY} is missing; run `pip install --force-reinstall --no-deps "
        "starflow-ext`, or `pip install .` in a checkout."
    )


def test_broken_library(copy: Path) -> None:
    (copy / LIBRARY).write_bytes(b"not a library")
    sentence = _last_line(copy)
    assert sentence.startswith(f"ImportError: starflow_ext: {copy / LIBRARY} does not load with torch 2.")
    assert sentence.endswith("or `pip install .` in a checkout.")


def test_source_folder_that_hides_the_package(copy: Path) -> None:
    for path in copy.glob("*.so"):
        path.unlink()
    assert _last_line(copy).startswith(f"ImportError: starflow_ext: {copy} has no native module; if it is a source fol")


def test_module_of_another_python(copy: Path) -> None:
    for path in copy.glob("_C.*.so"):
        path.rename(copy / "_C.cpython-39-x86_64-linux-gnu.so")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"the native module was built for cpython-39-x86_64-linux-gnu, this is Python {version};" in _last_line(copy)


def test_torch_too_old(copy: Path) -> None:
    sentence = _last_line(copy, "import torch; torch.__version__ = '2.9.1'; import starflow_ext")
    assert sentence == (
        "ImportError: starflow_ext: found torch 2.9.1, expected 2.10 or later; run `pip install 'torch>=2.10'`."
    )


CALL = "import torch, starflow_ext as ext; ext.ops.affine_inverse(torch.ones(1, 2), torch.ones(1, 4)); "


@pytest.mark.parametrize("level", list(native.isa_levels()))
def test_environment_chooses_the_level(level: str) -> None:
    done = _python(CALL + "print(ext.info()['cpu levels']['selected'])", STARFLOW_ISA=level)
    if native.isa_levels()[level]:
        assert f'STARFLOW_ISA is "{level}", expected a level of this machine: ' in done.stderr
    else:
        assert done.stdout.strip() == level


def test_environment_with_an_unknown_level() -> None:
    done = _python(CALL, STARFLOW_ISA="sse9")
    assert done.stderr.strip().endswith(
        'RuntimeError: STARFLOW_ISA is "sse9", expected scalar, avx2, avx512, avx512_bf16 or amx'
    )


def test_a_level_that_is_not_there_is_refused() -> None:
    with pytest.raises(
        RuntimeError, match=r'^the ISA override is "neon", expected scalar, avx2, avx512, avx512_bf16 or amx$'
    ):
        native.set_isa("neon")


def test_info_prints_every_section() -> None:
    text = str(starflow_ext.info())
    for word in ("build\n", "cpu levels\n", "cpu features\n", "threads\n", "cuda\n", "scalar: supported", "amx_bf16: "):
        assert word in text


def test_support_table_names_every_op(root: Path) -> None:
    done = _at_the_root(root, "-m", "starflow_ext")
    rows = [line for line in done.stdout.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == starflow_ext.ops.__all__


def test_explain_an_op_that_does_not_exist() -> None:
    with pytest.raises(RuntimeError, match=r'^explain: op is "affine", expected one of affine_forward, affine_inverse'):
        starflow_ext.explain("affine")


def test_quota_of_the_control_group(tmp_path: Path) -> None:
    assert cgroup_quota(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("150000\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert cgroup_quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cgroup_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("400000 100000\n")
    assert cgroup_quota(tmp_path) == 4.0
