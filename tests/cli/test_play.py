"""`starflow play`: what the command prints, and how it ends."""

from __future__ import annotations

import re
import signal
import socket
import sys
import urllib.request
from pathlib import Path

import pytest

from .commands import run, start

pytest.importorskip("aiohttp", reason="aiohttp (the extra play) is not installed")


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_the_page_is_served_until_it_is_interrupted(model: Path, host: str) -> None:
    process = start("play", model, "--port", 0, "--host", host, "--no-open")
    assert process.stdout is not None
    told = process.stdout.readline()
    found = re.fullmatch(r"playing .*: (http://127\.0\.0\.1:\d+/(\?token=\S+)?) \(Ctrl-C ends it\)\n", told)
    assert found, told
    assert (found[2] is not None) == (host == "0.0.0.0")
    with urllib.request.urlopen(found[1], timeout=60) as answer:
        assert b"<title>starflow play</title>" in answer.read()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0
    assert said == "ended\n"


def test_a_port_in_use_is_one_sentence(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run("play", model, "--port", port, "--no-open") == 1
    said = capsys.readouterr().err
    assert (
        said
        == f"starflow: error: play: port is {port}, which is in use on 127.0.0.1; expected a free one (0 takes any)\n"
    )


def test_a_world_needs_actions(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("play", model, "--world", "paddle", "--no-open") == 2
    assert "--world is 'paddle', expected none: the model reads no actions" in capsys.readouterr().err


def test_without_the_server_one_sentence_says_how_to_add_it(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp.web", None)
    assert run("play", model, "--no-open") == 1
    said = capsys.readouterr().err
    assert "starflow play needs the package aiohttp: pip install 'starflow-ext[play]'" in said


def test_no_model_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("starflow.storage.shipped_names", lambda: ())
    assert run("play", "--no-open") == 2
    assert "MODEL is missing, expected one: folder of a run" in capsys.readouterr().err
