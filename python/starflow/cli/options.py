"""Types of options, and the options that several commands have."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from starflow.config import ConfigError, RunConfig, from_mapping, parse_yaml, to_mapping
from starflow.messages import short, shown

if TYPE_CHECKING:
    from starflow.data import Clip
    from starflow.distributed import World
    from starflow.sampling import Pipeline, SampleOptions


logger = logging.getLogger(__name__)

PROG = "starflow"
MODEL_HELP = "folder of a run, a .safetensors file, or a model that comes with the package (`starflow info` lists them)"


@dataclass(frozen=True)
class Command:
    """One of the commands that `starflow` has.

    Args:
        help: a line of `starflow --help`.
        description: what `starflow COMMAND --help` begins with.
        add_options: puts the options of the command into a parser.
        run: runs a parsed command line and returns the exit status.
        rest: name of the list of positional arguments, which may also stand behind options.
        alone: several processes of torchrun would each do all of its work and write the same files.
    """

    help: str
    description: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    rest: str | None = None
    alone: bool = True


# What an option may be: an integer fits the machine's, and no arithmetic on a number leaves the range of floats.
_MOST_INTEGER = (1 << 63) - 1
_MOST_NUMBER = 1e30
MOST_THREADS = 4096


def number(
    kind: Callable[[str], Any], least: float, *, above: bool = False, most: float | None = None
) -> Callable[[str], Any]:
    """An argparse type: a number of at least (or above) `least` and at most `most`."""
    what = f"{'an integer' if kind is int else 'a number'} {'>' if above else '>='} {least:g}"
    limit = most if most is not None else _MOST_INTEGER if kind is int else _MOST_NUMBER

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value or (above and value == least):
            raise argparse.ArgumentTypeError(f"{shown(text)} is given, expected {what}")
        if value > limit:
            raise argparse.ArgumentTypeError(f"{shown(text)} is given, expected at most {limit:g}")
        return value

    return parse


def path_text(text: str) -> str:
    """An argparse type: a path or a name. An empty one, often a shell variable that is not set, would be the folder
    that one is in.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{shown(text)} is given, expected a path")
    return text


def size_of(text: str) -> tuple[int, int]:
    """An argparse type: HEIGHTxWIDTH in pixels."""
    found = re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,8})", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{shown(text)} is given, expected HEIGHTxWIDTH such as 480x848")
    return int(found[1]), int(found[2])


def model_path(text: str) -> str:
    """An argparse type: path that a model is written to; names of pickle files are refused."""
    path_text(text)
    if Path(text).suffix in (".pth", ".pt", ".ckpt", ".bin"):
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is given, expected a file that ends in .safetensors, or a folder"
        )
    return text


def check_written(written: Mapping[str, str | Sequence[str] | None], read: Mapping[str, Sequence[str]]) -> None:
    """Refuses files of a command that are each other, or among what it reads: they would be replaced without a word.

    Args:
        written: a path, or several, by the option that names them or what they are called; None and "-" are no files.
        read: paths by what they are called.

    Raises:
        ConfigError: two of one path.
    """
    known = {os.path.realpath(path): f"{name} {short(path)}" for name, paths in read.items() for path in paths}
    paths = [
        (name, path) for name, given in written.items() for path in ([given] if isinstance(given, str) else given or ())
    ]
    for name, path in paths:
        if path == "-":
            continue
        place = os.path.realpath(path)
        if place in known:
            raise ConfigError(f"{name} is {shown(path)}, which is {known[place]}, expected another file")
        known[place] = f"that of {name}"


def picture_path(text: str) -> str:
    """An argparse type: a picture that matplotlib can write."""
    if Path(text).suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"{shown(text)} is given, expected a file that ends in .png, .svg or .pdf")
    return text


def setting(text: str) -> tuple[list[str], Any]:
    """KEY=VALUE to (path, value), the value read as yaml."""
    key, equals, value = text.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not equals or not all(path):
        raise argparse.ArgumentTypeError(f"{shown(text)} is given, expected KEY=VALUE such as train.steps=1000")
    try:
        return path, parse_yaml(value, "its value")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)} is given, expected a value that is yaml: {error}") from None


def make_config(name: str | None, settings: Sequence[tuple[list[str], Any]]) -> RunConfig:
    """A configuration with some of its options changed.

    With `train.init`, sections that the file does not have are those of the model that the option names.

    Args:
        name: name of a configuration that comes with the package, or path of a yaml file; None for no file, which needs
            `train.init`.
        settings: (path, value), such as (["train", "steps"], 1000).

    Raises:
        ConfigError: an option that does not exist or a value that does not fit.
        CheckpointError: the model that `train.init` names cannot be read.
    """
    sections = {} if name is None else RunConfig.sections(name)
    recipe = sections.get("train")
    init = recipe.get("init") if isinstance(recipe, Mapping) else None
    init = next((value for path, value in reversed(settings) if path == ["train", "init"]), init)
    if isinstance(init, str):
        from starflow.storage import read_header

        sections = {**to_mapping(read_header(init).config), **sections}
    values = to_mapping(from_mapping(RunConfig, sections))
    known: dict[tuple[str, ...], Any] = {}
    for path, value in settings:
        if known.setdefault(tuple(path), value) != value:
            first = short(known[tuple(path)])
            raise ConfigError(f"--set {'.'.join(path)} is given as {first} and as {short(value)}, expected one of them")
        place = values
        for key in path[:-1]:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise ConfigError(f"--set {'.'.join(path)}: {key} is one option, expected a group of options")
        before = place.get(path[-1])
        if isinstance(before, dict) and isinstance(value, Mapping):
            value = _changed(path, before, value)
        place[path[-1]] = value
    return from_mapping(RunConfig, values)


def _changed(path: Sequence[str], before: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A group of options, of which `given` sets some: the others stay.

    Codec and text of another kind have other options, so that they begin anew; `text={}` stands for no text.
    """
    if path[0] in ("codec", "text") and len(path) == 1:
        return (
            dict(given)
            if not given or given.get("kind", before.get("kind")) != before.get("kind")
            else {**before, **given}
        )
    if not given:
        raise ConfigError(f"--set {'.'.join(path)} is {{}}, expected options that it sets, such as {path[0]}.KEY=VALUE")
    return {**before, **given}


def check_data(path: str) -> None:
    """Refuses a path of `--data` that holds no clips.

    Raises:
        ConfigError: neither a folder nor a tar file.
    """
    from starflow.data import is_folder

    if not is_folder(Path(path)):
        raise ConfigError(f"--data is {shown(path)}, expected a folder of videos or a tar file of them")


def held_out_clips(config: RunConfig, count: int) -> list[Clip]:
    """The first clips of a run's own test data."""
    from starflow.training import make_dataset

    dataset = make_dataset(config, "test")
    if len(dataset) < count:
        logger.warning("%d held-out clips are asked for, the data have %d", count, len(dataset))
    return [dataset.item(index) for index in range(min(count, len(dataset)))]


def device_name(name: str) -> str:
    """The device that `--device` names."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    count = torch.cuda.device_count()
    if re.fullmatch(r"cuda(:\d+)?", name) and not count:
        raise ConfigError(f"--device is {shown(name)}, expected cpu: torch {torch.__version__} sees no CUDA device")
    known = ["cpu", *(["cuda"] if count else []), *(f"cuda:{index}" for index in range(count))]
    if name not in known:
        raise ConfigError(f"--device is {shown(name)}, expected auto, {' or '.join(known)}")
    return name


def load_pipeline(model: str, world: World) -> Pipeline:
    """The model that a command line names, in one of the processes of `world`."""
    from starflow.sampling import Pipeline
    from starflow.storage import read_header

    licence = read_header(model).about.get("licence")
    if licence and world.first:
        print(f"{model}: {short(licence, 400)}", file=sys.stderr)
    return Pipeline.load(model, device=world.device)


def model_places(model: str) -> list[str]:
    """The files of a model that a command line names."""
    from starflow.storage import model_file, model_files

    return [str(path) for path in (model_file(model), *model_files(model))]


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds `--device`."""
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, or auto: CUDA where there is one (default: auto)"
    )


def add_sample_options(parser: argparse.ArgumentParser, only: Collection[str] | None = None) -> None:
    """Adds the fields of `SampleOptions`, under their headings.

    Args:
        parser: of the command.
        only: names of the fields, for a command that does not have all.
    """
    from starflow.sampling import SampleOptions, option_help, option_kinds

    groups: dict[str, Any] = {}
    for field in dataclasses.fields(SampleOptions):
        heading, kinds = field.metadata.get("group"), option_kinds()[field.name]
        if heading is None or (only is not None and field.name not in only):
            continue
        groups.setdefault(heading, parser.add_argument_group(heading))
        how: dict[str, Any] = {"metavar": field.metadata["metavar"], "type": str, "default": field.default}
        if kinds == (bool,):
            how = {"action": "store_true"}
        elif field.name == "size":
            how["type"] = size_of
        elif get_origin(kinds[0]) is Literal:
            how = {"choices": get_args(kinds[0]), "default": field.default}
        elif kinds[0] in (int, float):
            least, above, most = (field.metadata[name] for name in ("least", "above", "most"))
            how["type"] = number(kinds[0], least if above is None else above, above=above is not None, most=most)
        # argparse reads % in a help text as a conversion.
        text = option_help()[field.name].replace("%", "%%")
        groups[heading].add_argument(f"--{field.name.replace('_', '-')}", help=text, **how)


def sample_options_of(args: argparse.Namespace) -> SampleOptions:
    """The options of a sample that a command line names.

    Raises:
        ConfigError: options that exclude each other, or a value out of range.
    """
    from starflow.sampling import SampleOptions

    names = [field.name for field in dataclasses.fields(SampleOptions) if field.metadata]
    try:
        return SampleOptions(**{name: getattr(args, name) for name in names if hasattr(args, name)})
    except ValueError as error:
        raise ConfigError(str(error)) from None
