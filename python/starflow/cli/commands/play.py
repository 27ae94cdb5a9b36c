"""`starflow play`: a page on which a model is played."""

from __future__ import annotations

import argparse
import os
import sys
import webbrowser
from collections.abc import Callable
from typing import TYPE_CHECKING

from starflow.cli.options import MODEL_HELP, PROG, Command, add_device, device_name, load_pipeline, number, path_text
from starflow.config import ConfigError

if TYPE_CHECKING:
    from starflow.sampling import Pipeline
    from starflow.worlds import PlayableWorld


def _run(args: argparse.Namespace) -> int:
    from pathlib import Path

    import torch

    from starflow.distributed import World
    from starflow.play import Played, serve
    from starflow.storage import shipped_name, shipped_names

    name = args.model or next((known for known in ("paddle",) if known in shipped_names()), None)
    if name is None:
        raise ConfigError(f"MODEL is missing, expected one: {MODEL_HELP}")
    pipeline = load_pipeline(name, World(device=torch.device(device_name(args.device))))
    world, make_world = _world(args.world, pipeline)
    title = name if shipped_name(name) else Path(name).absolute().stem

    def announce(url: str) -> None:
        print(f"playing {name}: {url} (Ctrl-C ends it)", flush=True)
        if args.open and (sys.platform == "darwin" or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))):
            webbrowser.open(url)

    try:
        serve(Played(pipeline, title, make_world, world), host=args.host, port=args.port, announce=announce)
    except KeyboardInterrupt:
        print("ended", file=sys.stderr)
    return 0


def _world(asked: str | None, pipeline: Pipeline) -> tuple[str, Callable[[], PlayableWorld] | None]:
    """Name and maker of the real world beside the dream; none for a model that reads no actions."""
    from starflow.worlds import open_world

    data = pipeline.config.data
    # Clips of the kind "paddle" are of that world, whatever else their configuration tells.
    learned = data.world or ("paddle" if data.kind == "paddle" else None)
    name = learned if asked is None else asked
    if name is None or name == "none":
        return "", None
    if not pipeline.flow.config.frame_dim:
        raise ConfigError(f"--world is {name!r}, expected none: the model reads no actions (flow.frame_dim is 0)")
    return name, lambda: open_world(name, size=(data.height, data.width), channels=pipeline.codec.channels)


_DESCRIPTION = f"""Play a model on a page of this machine: keys and touch steer its dream.

A model of actions is played beside its real world, under the same keys; a model of text streams what a
prompt says, which may change at any time. The page shows how surprised the model is, in bits, and where;
one can wind back, branch off, put the ball elsewhere, and keep a clip.

examples:
  {PROG} play
  {PROG} play digits
  {PROG} play runs/mine --port 9000
  {PROG} play runs/mine --host 0.0.0.0      others need the link with its token"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=path_text, nargs="?", metavar="MODEL", help=f"{MODEL_HELP} (default: paddle)")
    parser.add_argument(
        "--port", type=number(int, 0, most=65535), default=8765, metavar="N", help="0 takes a free one (default: 8765)"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on; any but this machine's own needs the token in the link (default: 127.0.0.1)",
    )
    parser.add_argument(
        "--world",
        metavar="NAME",
        help="the real world beside the dream: paddle, an environment of gymnasium, or none (default: the one that the "
        "model learned from)",
    )
    parser.add_argument(
        "--open", action=argparse.BooleanOptionalAction, default=True, help="open the page where there is a display"
    )
    add_device(parser)


COMMAND = Command("play a model on a page", _DESCRIPTION, _add_options, _run)
