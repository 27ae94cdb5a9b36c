"""What is linked with cmake/older_symbols.py asks no more of a system than manylinux_2_28 has, and runs here."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="only wheels of x86-64 are made")

# exp and log have newer versions since glibc 2.29, dlopen and pthread_create moved with 2.34, the constructor and str()
# came with libstdc++ of GCC 9 and 11.
SOURCE = r"""
#include <cmath>
#include <cstdio>
#include <dlfcn.h>
#include <memory>
#include <pthread.h>
#include <sstream>
#include <stdexcept>
extern "C" int run(double x) {
    std::ostringstream text;
    text << std::exp(x) << " " << std::log(x);
    auto shared = std::make_shared<std::string>(std::move(text).str());
    auto copy = shared;
    pthread_t thread;
    const auto body = [](void* self) -> void* { return dlopen(nullptr, RTLD_NOW) != nullptr ? self : nullptr; };
    if (pthread_create(&thread, nullptr, body, &x) != 0 || pthread_join(thread, nullptr) != 0) return 1;
    try {
        throw std::runtime_error(*copy);
    } catch (const std::exception& error) {
        return std::puts(error.what()) < 0;
    }
}
"""
CALLER = "import ctypes, sys; library = ctypes.CDLL(sys.argv[1]); sys.exit(library.run(ctypes.c_double(1.0)))"
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}


@pytest.fixture
def linked(root: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The same source linked as this machine would, and with the stand-ins."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on PATH")
    script = root / "cmake/older_symbols.py"
    subprocess.run([sys.executable, script, tmp_path / "older", "g++"], check=True)
    source = tmp_path / "source.cpp"
    source.write_text(SOURCE)
    command = ["g++", "-std=c++20", "-O2", "-fPIC", "-shared", "-Wl,--exclude-libs,ALL", "-Wl,--no-undefined"]
    here, older = tmp_path / "here.so", tmp_path / "older.so"
    subprocess.run([*command, source, "-o", here, "-ldl", "-lpthread"], check=True)
    subprocess.run([*command, f"-L{tmp_path / 'older'}", source, "-o", older, "-ldl", "-lpthread"], check=True)
    return here, older


def _too_new(path: Path) -> set[str]:
    printed = subprocess.run(["readelf", "-VW", path], capture_output=True, text=True, check=True).stdout
    versions = re.findall(r"Name: (GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)", printed)
    return {f"{name}_{number}" for name, number in versions if tuple(map(int, number.split("."))) > NEWEST[name]}


def test_no_version_is_newer_than_manylinux_2_28(linked: tuple[Path, Path]) -> None:
    here, older = linked
    assert _too_new(older) == set()
    # The test would not notice anything on a machine of 2018.
    assert _too_new(here) or platform.libc_ver()[1] <= "2.28"


def test_what_moved_is_asked_of_the_libraries_that_had_it(linked: tuple[Path, Path]) -> None:
    printed = subprocess.run(["readelf", "-dW", linked[1]], capture_output=True, text=True, check=True).stdout
    assert {"libdl.so.2", "libpthread.so.0"} <= set(re.findall(r"\(NEEDED\).*\[(.*)\]", printed))


def test_it_runs_with_the_libraries_of_this_machine(linked: tuple[Path, Path]) -> None:
    said = []
    for path in linked:
        done = subprocess.run([sys.executable, "-c", CALLER, path], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said[0] == said[1] == "2.71828 0\n"
