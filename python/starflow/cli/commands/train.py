"""`starflow train`: a flow learns from a folder of videos, or from the built-in digits."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from starflow.cli.options import (
    MODEL_HELP,
    PROG,
    Command,
    add_device,
    check_data,
    device_name,
    make_config,
    number,
    path_text,
    setting,
)
from starflow.config import ConfigError, DataConfig, config_names
from starflow.messages import short, shown


def _run(args: argparse.Namespace) -> int:
    from starflow.data import CaptionMode
    from starflow.distributed import rank_and_size
    from starflow.storage import read_header
    from starflow.training import train

    settings = list(args.set)
    if args.data is not None:
        check_data(args.data)
        for option, value in (("kind", "folder"), ("path", args.data)):
            _refuse_two("--data", value, ["data", option], args.set)
        settings[:0] = [(["data", "kind"], "folder"), (["data", "path"], os.path.realpath(args.data))]
        if args.init is not None and args.config is None:
            settings[:0] = _for_folder(Path(args.data))
    for option in ("init", "steps", "seed", "parallel"):
        value = getattr(args, option)
        if value is not None:
            _refuse_two(f"--{option}", value, ["train", option], args.set)
            settings.append((["train", option], value))
    name = args.config or (_default(args.data) if args.init is None else None)
    config = make_config(name, settings)
    folder = Path(args.out or f"runs/{Path(name).stem if name else f'from-{Path(args.init).stem}'}")
    train(config, folder, resume=not args.no_resume, quiet=args.quiet, device=device_name(args.device))
    if rank_and_size()[0]:
        return 0
    text = read_header(folder).config.text
    given = (' "PROMPT"' if text else "") + (" --source VIDEO" if config.train.source_prob else "")
    print(f"{folder}: trained for {config.train.steps} steps; sample from it with: {PROG} sample {folder}{given}")
    if text.get("kind") == "words":
        words = [word for word in text["vocabulary"] if word not in get_args(CaptionMode)]
        print(f"words of a prompt, at most {text['size']}: {short(', '.join(words), 4000)}")
    elif text.get("names"):
        # Without what captions begin with where something is given, which is not for the user to type.
        modes = tuple(f"({mode}) " for mode in get_args(CaptionMode))
        print(f"prompts: {short(', '.join(name for name in text['names'] if not name.startswith(modes)), 4000)}")
    return 0


def _refuse_two(option: str, value: object, path: list[str], settings: Sequence[tuple[list[str], Any]]) -> None:
    """Refuses a short form beside a setting that says something else."""
    for key, given in settings:
        inner = given.get(path[1], value) if key == path[:1] and isinstance(given, Mapping) else value
        other = given if key == path else inner
        if other != value:
            raise ConfigError(
                f"{option} is {shown(value)} beside --set {'.'.join(path)}={short(other)}, expected one of them"
            )


def _for_folder(data: Path) -> list[tuple[list[str], Any]]:
    """What a folder of videos asks for in place of the data that a model was trained on."""
    from starflow.data import WORLD_FILE

    usual = DataConfig()
    settings: list[tuple[list[str], Any]] = [
        (["data", name], getattr(usual, name)) for name in ("start", "handwritings", "contacts")
    ]
    if (data / WORLD_FILE).is_file():
        settings.append((["data", "actions"], None))
    return settings


def _default(data: str | None) -> str:
    """Name of the configuration for a folder of videos, or for none."""
    from starflow.data import WORLD_FILE

    if data is None:
        return "digits"
    return "world" if (Path(data) / WORLD_FILE).is_file() else "clips"


_DESCRIPTION = f"""Train a flow.

Without --data: on the built-in set of moving handwritten digits, which needs no download. With --data: on a
folder of video files of any format and size; NAME.txt or NAME.json beside NAME.mp4 holds its caption (in the
configuration "clips" NAME is, where there is no such file, followed by the second at which a clip begins). In a folder
that "{PROG} record" wrote, or that has its form, NAME.jsonl holds the action of each frame. A run that was interrupted
goes on where its last checkpoint is when the same command is given again.

With --init the run starts from a model and, without --config, from its configuration; options that differ from the
model's are told. Vectors of frames (actions) may be added to one that has none.

Under torchrun many processes train one flow, with the same numbers as one process ("--parallel fsdp": each keeps a
piece of weights and moments). A checkpoint is resumed by any number of processes.

examples:
  {PROG} train --data my_clips --out runs/mine
  {PROG} train --config digits --set train.steps=2000 --set train.batch_size=16
  {PROG} train --config my.yaml --data my_clips
  {PROG} train --config paddle --out runs/paddle          a ball game that one can play
  {PROG} train --init runs/mine --data other_clips --steps 500 --set train.lr=2e-4
  torchrun --nproc-per-node 8 -m starflow train --config my.yaml --parallel fsdp"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=path_text, metavar="FOLDER", help="folder or tar file of videos (default: the digits)"
    )
    parser.add_argument(
        "--config",
        type=path_text,
        metavar="NAME_OR_PATH",
        help=f"configuration: a yaml file, or one of {', '.join(config_names())} (default: with --data world where it "
        "holds world.json, or clips; else digits)",
    )
    parser.add_argument(
        "--init",
        metavar="MODEL",
        help=f"short for --set train.init=MODEL: the model to start from, with its configuration where --config gives "
        f"none: {MODEL_HELP}",
    )
    parser.add_argument(
        "--out",
        type=path_text,
        metavar="FOLDER",
        help="folder of the run (default: runs/NAME of the configuration, runs/from-MODEL without one)",
    )
    parser.add_argument("--steps", type=number(int, 1), metavar="N", help="short for --set train.steps=N")
    parser.add_argument("--seed", type=number(int, 0), metavar="N", help="short for --set train.seed=N")
    parser.add_argument(
        "--set",
        type=setting,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set an option of the configuration, such as train.lr=5e-4 or flow.channels=128, or several of a group, "
        "such as data={frames: 4, fps: 8}, which leaves its others as they are; may be repeated",
    )
    parser.add_argument(
        "--no-resume", action="store_true", help="insist on a fresh run: an error where the folder holds checkpoints"
    )
    parser.add_argument(
        "--parallel",
        choices=("ddp", "fsdp"),
        help="short for --set train.parallel=...: what the processes of torchrun keep, everything or a piece",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_device(parser)


COMMAND = Command(
    "train a flow on a folder of videos, or on the built-in digits", _DESCRIPTION, _add_options, _run, alone=False
)
