"""Models, checkpoints, training states and configurations, malformed in every way, through the real commands.

Each command ends with status 0, or with status 1 or 2 and one short sentence, in bounded time and memory. What is under
a checksum is moreover never taken: whatever differs from what was written is refused.

`STARFLOW_MALFORMED=all` runs the whole table instead of a small part of it.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from starflow.config import RunConfig, to_mapping
from starflow.model import Flow
from starflow.storage import convert, published_config, published_state, save_model
from starflow.storage.tensors import sealed, write_tensors
from starflow.training import make_parts, train

from .faults import flipped, oversized, scrambled, truncated

WHOLE = os.environ.get("STARFLOW_MALFORMED", "") == "all"

# Limits of one command, whatever a file asks for: on a busy machine, and beyond what starflow has imported.
SECONDS = 120
MIB = 3_000
# Characters of a message at most, beyond the paths in it.
MESSAGE = 1_200

Fault = tuple[str, bytes]


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Args:
        name: path of the file in a folder of good ones.
        commands: that read it, with names relative to the folder; the first reads all of it.
        whole: every byte is under a checksum.
        special: faults of this kind alone, the bytes of the good file to (name, bytes).
    """

    name: str
    commands: tuple[str, ...]
    whole: bool = False
    special: Callable[[bytes], Iterable[Fault]] = lambda _: ()

    def __str__(self) -> str:
        return self.name


SAMPLE = "sample {} three --out out --frames 2 --solver window:8"


def _header(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and numbers of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _with_header(header: Any, numbers: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + numbers


def _safetensors(data: bytes) -> Iterator[Fault]:
    """Headers of wrong types and absurd sizes; no writer ever wrote their checksum."""
    header, numbers = _header(data)
    name = next(key for key in header if key != "__metadata__")
    entry = header[name]
    for fault, change in (
        ("no metadata", {"__metadata__": None}),
        ("a list as metadata", {"__metadata__": [1]}),
        ("numbers as metadata", {"__metadata__": {"format": 1}}),
        ("a dtype that is none", {name: {**entry, "dtype": "F7"}}),
        ("a dtype of 8 bits", {name: {**entry, "dtype": "F8_E4M3"}}),
        ("a shape of absurd size", {name: {**entry, "shape": [2**62, 2**62]}}),
        ("a negative shape", {name: {**entry, "shape": [-1]}}),
        ("a shape that is text", {name: {**entry, "shape": "3"}}),
        ("an end before the beginning", {name: {**entry, "data_offsets": [8, 0]}}),
        ("offsets behind the file", {name: {**entry, "data_offsets": [0, 2**60]}}),
        ("a name of a megabyte", {"x" * 1_000_000: entry}),
        ("a name of control characters", {"\x1b[31m\x07": entry}),
        ("no offsets", {name: {}}),
    ):
        yield fault, _with_header({**header, **change}, numbers)
    yield "a header that is a list", _with_header([1], numbers)
    yield "a header that is deep", struct.pack("<Q", 100_000) + b"[" * 100_000
    yield "a header of 2^63 bytes", struct.pack("<Q", 2**63) + data[8:]
    yield "a header of 99 megabytes", struct.pack("<Q", 99_000_000) + data[8:]
    yield "a header of no bytes", struct.pack("<Q", 0) + data[8:]


def _model(data: bytes) -> Iterator[Fault]:
    """Headers that a writer of our format could have written, checksum included, around configurations that are odd."""
    yield from _safetensors(data)
    with safe_open(Path("model.safetensors"), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        about = file.metadata()
    config = json.loads(about["config"])

    def written(change: dict[str, Any] | None = None, text: str | None = None, **others: torch.Tensor) -> bytes:
        kept = {key: value for key, value in about.items() if not key.endswith("crc32")}
        kept["config"] = json.dumps({**config, **(change or {})}) if text is None else text
        write_tensors(Path("odd"), {**tensors, **others}, kept)
        return Path("odd").read_bytes()

    for text in ("", "null", "[]", "3", '"x"', "{", "[" * 50_000, "9" * 5_000, "NaN", '{"flow": []}', "{}"):
        yield f"config {text[:10]}", written(text=text)
    for section, options in (
        ("flow", {**config["flow"], "layers_per_block": [10**12]}),
        ("flow", {**config["flow"], "layers_per_block": [1] * 10_000}),
        ("flow", {**config["flow"], "channels": 2**62}),
        ("flow", {**config["flow"], "channels": 10**40}),
        ("flow", {**config["flow"], "img_size": 10**12}),
        ("flow", {**config["flow"], "head_dim": 10**9}),
        ("flow", {**config["flow"], "patch_size": 0}),
        ("flow", {**config["flow"], "soft_clip": "x" * 100_000}),
        ("flow", {**config["flow"], "\x1b[31m": 3}),
        ("data", {"frames": 10**30}),
        ("data", {"height": "tall"}),
        ("codec", None),
        ("codec", []),
        ("codec", {"kind": []}),
        ("codec", {"kind": {}}),
        ("codec", {"kind": "dct", "patch": "four"}),
        ("codec", {"kind": "dct", "patch": 10**9}),
        ("codec", {"kind": "wan", "folder": 3}),
        ("codec", {"kind": "wan", "folder": "nowhere"}),
        ("codec", {"kind": "x" * 100_000}),
        ("text", {"kind": "words", "vocabulary": 3, "size": 1}),
        ("text", {"kind": "words", "vocabulary": [1, 2], "size": 1}),
        ("text", {"kind": "t5", "folder": ["a"]}),
        ("sample", {"solver": "window:" + "9" * 30}),
        ("sample", {"fps": 0}),
        ("train", {"noise_std": "NaN"}),
    ):
        yield f"{section} {str(options)[-40:]}", written({section: options})
    name = "prior_variance"
    yield "a weight that is NaN", _not_finite(data, float("nan"))
    yield "a weight that is infinite", _not_finite(data, float("inf"))
    yield "an integer as a weight", written(**{name: tensors[name].to(torch.int64)})
    yield "a weight in integers that is none", written(**{f"{name}_int8": tensors[name].to(torch.int8)})
    yield "integers of no layer", written(**{"blocks.0.weight_int8": torch.zeros(3, dtype=torch.int8)})


def _not_finite(data: bytes, value: float) -> bytes:
    """A file of the first version of the format, which had one checksum, with a value that is not finite."""
    header, numbers = _header(data)
    changed = numbers[:-4] + struct.pack("<f", value)
    about = {**header["__metadata__"], "format": "starflow-1", "crc32": f"{zlib.crc32(changed):010d}"}
    return _with_header({**header, "__metadata__": about}, changed)


def _index(data: bytes) -> Iterator[Fault]:
    index = json.loads(data)
    for key in ("metadata", "weight_map", "files"):
        for value in (None, [], 3, "x", {}, {"a": 3}, {"a": "../../etc/passwd"}, {"a": ""}, {"a": "x" * 100_000}):
            kept = {name: part for name, part in index.items() if name != "crc32"}
            yield f"{key} is {str(value)[:30]}, sealed", json.dumps(sealed({**kept, key: value})).encode()
    yield "deep", b"[" * 100_000
    yield "a number", b"9" * 100_000
    yield "a list", b"[]"


def _state(data: bytes) -> Iterator[Fault]:
    state = json.loads(data)["state"]
    for change in (
        {"step": "1"},
        {"step": -1},
        {"step": 10**40},
        {"updates": None},
        {"bad": 1.5},
        {"config": []},
        {"config": {}},
        {"config": {"flow": 3}},
        {"files": []},
        {"files": {}},
        {"files": {"../../x": 3}},
        {"files": {"shard-00001-model-00001-of-00001.safetensors": "3"}},
        {"data": 3},
    ):
        yield f"{change}, sealed", json.dumps(sealed({"state": {**state, **change}})).encode()
        yield f"{change}, of the first version", json.dumps({**state, **change}).encode()
    yield "deep", b"[" * 100_000
    yield "a list", b"[]"


def _config(data: bytes) -> Iterator[Fault]:
    plain = data.decode()
    lists = "\n".join(f"  - &b{i} [{','.join([f'*b{i - 1}'] * 9)}]" for i in range(1, 9))
    bomb = "  - &b0 [l,l,l,l,l,l,l,l,l]\n" + lists + "\n"
    values = yaml.safe_load(plain)
    yield "anchors", b"x:\n" + bomb.encode()
    yield "anchors in an option", ("flow:\n  in_channels:\n" + bomb.replace("  -", "    -")).encode()
    yield (
        "anchors of mappings",
        "\n".join(["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{p: *a{i - 1}, q: *a{i - 1}}}" for i in range(1, 60))]).encode(),
    )
    yield (
        "merged anchors",
        "\n".join(
            ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12))]
        ).encode(),
    )
    yield "an alias of itself", b"a: &a [*a]"
    yield "deep", b"[" * 100_000
    yield "deep mappings", b"{a: " * 20_000
    yield "a tag that would run code", b"!!python/object/apply:os.system [ls]"
    yield "a date that is none", b"flow: 2001-99-99"
    yield "two documents", (plain + "\n---\n" + plain).encode()
    yield "control characters", b"flow: \x1b[31m"
    yield "utf-16", plain.encode("utf-16")
    yield "five megabytes", plain.encode() + b"#" * 5_000_000
    for section in values:
        for value in (None, [], 3, "x" * 100_000, {"\x1b[31m": 1}):
            yield f"{section} is {str(value)[:20]}", yaml.safe_dump({**values, section: value}).encode()
    for key, value in (
        ("layers_per_block", [10**9]),
        ("layers_per_block", [[1]]),
        ("channels", 10**30),
        ("channels", "9" * 400),
        ("channels", -1),
        ("soft_clip", float("nan")),
        ("head_dim", [1] * 10_000),
        ("img_size", 1e30),
    ):
        yield (
            f"flow.{key} is {str(value)[:20]}",
            yaml.safe_dump({**values, "flow": {**values["flow"], key: value}}).encode(),
        )


def _published(data: bytes) -> Iterator[Fault]:
    options = {key: value for part in yaml.safe_load(data)["arguments"] for key, value in part.items()}
    for key in options:
        for value in ([], "x" * 100_000, {"a": 1}, 10**30, -1):
            changed = [{name: option} for name, option in {**options, key: value}.items()]
            yield f"{key} is {str(value)[:20]}", yaml.safe_dump({"arguments": changed}).encode()
    yield "no list", b"arguments: 3"
    yield "a list of numbers", b"arguments: [1]"
    yield "anchors", b"arguments: &a [*a]"


def _pickle(data: bytes) -> Iterator[Fault]:
    yield "a lone stop", b"\x80\x02."
    yield "marks", b"\x80\x02" + b"(" * 1_000_000
    yield "deep tuples", b"\x80\x02" + b")" + b"\x85" * 100_000 + b"."
    yield "text of 4 GB", b"\x80\x02X\xff\xff\xff\xff"
    yield "bytes of 2^60", b"\x80\x04\x8e" + struct.pack("<Q", 2**60)
    yield "a frame of 2^60", b"\x80\x04\x95" + struct.pack("<Q", 2**60)
    yield "a global", b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R."
    yield "an archive without members", b"PK\x05\x06" + bytes(18)


PUBLISHED = """fsdp: 1, img_size: 16, txt_size: 8, channel_size: 4, patch_size: 1, channels: 64, blocks: 2,
layers_per_block: 1 1, noise_std: 0.3, batch_size: 2, lr: 6.4e-05, min_lr: 1e-6, nvp: 1, rope: 1, sos: 1,
seq_order: L2R, use_softplus: 1, cond_top_only: 1, use_final_norm: 1, cfg: 2.5, vae: stabilityai/sd-vae-ft-ema,
text: google/flan-t5-xl, drop_label: 0.1, soft_clip: 4"""
STATE = "run/checkpoints/step-00000001"
TRAIN = "train --config tiny --steps 2 --out run --quiet"

KINDS = (
    Kind("model.safetensors", (SAMPLE.format("model.safetensors"), "info model.safetensors"), True, _model),
    Kind("old.safetensors", (SAMPLE.format("old.safetensors"),), False, _safetensors),
    Kind("folder/model.safetensors.index.json", (SAMPLE.format("folder"), "info folder"), True, _index),
    Kind("folder/model-00001-of-00003.safetensors", (SAMPLE.format("folder"), "info folder"), True, _safetensors),
    Kind(f"{STATE}/state.json", (TRAIN,), True, _state),
    Kind(f"{STATE}/shard-00001-model-00001-of-00001.safetensors", (TRAIN,), True, _safetensors),
    Kind("a.yaml", ("plan --config a.yaml",), False, _config),
    Kind("published.yaml", ("convert published.yaml theirs.pth made",), False, _published),
    Kind("zipped.pth", ("convert tiny zipped.pth made",), False, _pickle),
    Kind("plain.pth", ("convert tiny plain.pth made",), False, _pickle),
    Kind("published.safetensors", ("convert tiny published.safetensors made",), False, _safetensors),
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good file of each kind."""
    folder = tmp_path_factory.mktemp("good")
    config = RunConfig.load("tiny")
    torch.manual_seed(0)
    flow = Flow(config.flow)
    parts = make_parts(config)
    save_model(folder / "model.safetensors", flow, config, *parts)
    header, numbers = _header((folder / "model.safetensors").read_bytes())
    header["__metadata__"]["format"] = "starflow-1"
    del header["__metadata__"]["header_crc32"]
    (folder / "old.safetensors").write_bytes(_with_header(header, numbers))
    state = {name: tensor.detach() for name, tensor in published_state(flow).items()}
    torch.save(state, folder / "zipped.pth")
    torch.save(state, folder / "plain.pth", _use_new_zipfile_serialization=False)
    save_file(state, folder / "published.safetensors")
    kept = RunConfig(config.flow, config.data, *(part.to_config() for part in parts if part), config.train)
    size = (folder / "zipped.pth").stat().st_size
    convert(folder / "zipped.pth", kept, folder / "folder", file_bytes=size * 2 // 5)
    train(replace(config, train=replace(config.train, steps=1)), folder / "run", quiet=True)
    (folder / "a.yaml").write_text(yaml.safe_dump(to_mapping(config)))
    options = yaml.safe_load("{" + PUBLISHED.replace("\n", " ") + "}")
    (folder / "published.yaml").write_text(yaml.safe_dump({"arguments": [{k: v} for k, v in options.items()]}))
    theirs = published_state(Flow(published_config(folder / "published.yaml").flow))
    torch.save({name: tensor.detach() for name, tensor in theirs.items()}, folder / "theirs.pth")
    return folder


class Runner:
    """A process that runs commands (see `runner.py`)."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).parent / "runner.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def __call__(self, command: str, folder: Path) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"argv": command.split(), "folder": str(folder), "seconds": SECONDS, "mib": MIB}
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    made = Runner()
    yield made
    made.close()


def damaged(data: bytes, others: dict[str, bytes]) -> Iterator[Fault]:
    """Files that are damaged or another one, or a few of them."""
    yield "empty", b""
    yield from truncated(data, 6 if WHOLE else 1)
    yield from flipped(data, 12 if WHOLE else 1)
    yield from oversized(data, 6 if WHOLE else 1)
    yield from scrambled(data, 6 if WHOLE else 0)
    # The same model in the first version of its format is no damage.
    names = [name for name in others if others[name] != data and name != "old.safetensors"]
    for name in names if WHOLE else names[len(data) % len(names) :][:1]:
        yield f"holds {name}", others[name]


def same(one: bytes, other: bytes) -> bool:
    """Whether two files say the same: json may be written in many ways."""
    try:
        return one == other or json.loads(one) == json.loads(other)
    except ValueError:
        return False


def odd(kind: Kind, data: bytes) -> list[Fault]:
    """Files that hold what nobody should have written, or a few of them."""
    found = list(kind.special(data))
    return found if WHOLE else found[len(data) % 7 :: max(1, len(found) // 3)]


def what_is_wrong(ended: dict[str, Any], *, refused: bool) -> str | None:
    """Why an end is none of those that are right."""
    status, error = ended["status"], ended["error"]
    said = [line for line in error.splitlines() if line.startswith("starflow: error:")]
    if status == 0:
        return "taken" if refused else None
    if status not in (1, 2):
        return "over time" if status is None else f"status {status}"
    if len(said) != 1 or "Traceback" in error:
        return "no sentence"
    if len(said[0]) > MESSAGE:
        return f"a message of {len(said[0])} characters"
    return "control characters" if any(unicodedata.category(c) == "Cc" and c not in "\r\n" for c in error) else None


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_malformed_file_ends_in_a_result_or_in_one_sentence(
    kind: Kind, good: Path, runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(good)
    data = (good / kind.name).read_bytes()
    others = {other.name: (good / other.name).read_bytes() for other in KINDS}
    wrong = []
    files = [("good", data, False)]
    files += [(fault, content, kind.whole) for fault, content in damaged(data, others)]
    files += [(fault, content, False) for fault, content in odd(kind, data)]
    for number, (fault, content, refused) in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(good, folder)
        (folder / kind.name).write_bytes(content)
        # The first command reads the whole file, another one the first part of it.
        commands = kind.commands if WHOLE or fault == "good" else kind.commands[:1]
        for place, command in enumerate(commands):
            ended = runner(command, folder)
            problem = what_is_wrong(ended, refused=refused and place == 0 and not same(content, data))
            if fault == "good" and ended["status"] != 0:
                problem = "refused"
            if problem is not None:
                print(f"{kind}, {fault}: {problem}", file=sys.stderr, flush=True)
                wrong.append(f"{command}, {fault}: {problem}: {ended['status']} {ended['error'][-1500:]}")
        shutil.rmtree(folder)
    assert not wrong, f"{len(wrong)} of {len(files)}:\n" + "\n".join(wrong)
