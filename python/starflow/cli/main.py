"""The command `starflow`.

Exit status: 0 success, 1 failure, 2 the command line is wrong, 130 interrupted. An error is one sentence on standard
error, and one that nobody foresaw says so and where to report it; `--debug` adds the traceback. Files appear whole or
not at all.
"""

from __future__ import annotations

import argparse
import difflib
import io
import logging
import os
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from starflow.cli.commands import convert, demo, evaluate, info, plan, play, record, sample, score, train
from starflow.cli.options import MOST_THREADS, PROG, number
from starflow.config import ConfigError
from starflow.messages import short

_COMMANDS = {
    "demo": demo.COMMAND,
    "record": record.COMMAND,
    "train": train.COMMAND,
    "sample": sample.COMMAND,
    "score": score.COMMAND,
    "evaluate": evaluate.COMMAND,
    "play": play.COMMAND,
    "convert": convert.COMMAND,
    "plan": plan.COMMAND,
    "info": info.COMMAND,
}

# Characters of an error: some list what differs.
_MOST_SAID = 4000


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROG}: error: {message} (see {self.prog} --help)\n")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions and examples."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=100)


def _add_common(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("everywhere")
    group.add_argument(
        "--threads",
        type=number(int, 1, most=MOST_THREADS),
        metavar="N",
        help="threads to compute with (default: OMP_NUM_THREADS, else what affinity and container quota allow)",
    )
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def make_parser() -> _Parser:
    """The command line of `starflow`."""
    from starflow.cli.info import version

    parser = _Parser(
        prog=PROG,
        formatter_class=_Formatter,
        description="Video generation by one normalizing flow: train it, sample from it, score clips with it.",
        epilog=f"""examples:
  {PROG} demo                                          train on moving digits, sample, write a report
  {PROG} train --data my_clips --out runs/mine         train on a folder of videos
  {PROG} sample runs/mine "waves at night" --out out   make a clip: mp4, GIF, JSON and a contact sheet
  {PROG} score runs/mine a.mp4 b.mp4                   bits per dimension of given clips
  {PROG} evaluate runs/mine --data held_out            clips of a model beside real ones

"{PROG} COMMAND --help" tells all options of a command.
exit status: 0 done, 1 it could not be done, 2 the command line is wrong, 130 interrupted.""",
    )
    parser.add_argument("--version", action="version", version=f"{PROG} {version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")

    for name, command in _COMMANDS.items():
        made = commands.add_parser(
            name, formatter_class=_Formatter, help=command.help, description=command.description, allow_abbrev=False
        )
        made.set_defaults(run=command.run)
        command.add_options(made)
        _add_common(made)
    return parser


def _hint(command: str, rest: Sequence[str]) -> str:
    """A hint at the option that was probably meant."""
    own = _Parser()
    _COMMANDS[command].add_options(own)
    known = set(re.findall(r"--[a-z-]+", own.format_usage()))
    close = [name for text in rest for name in difflib.get_close_matches(text.partition("=")[0], known, n=1)]
    return f"; did you mean {close[0]}?" if close else ""


def _sentence(error: BaseException) -> str:
    """The message of an error, in one line."""
    if isinstance(error, FileExistsError | NotADirectoryError) and error.filename:
        parts = (Path(error.filename), *Path(error.filename).parents)
        lost = any(part.is_symlink() and not os.path.exists(part) for part in parts)
        what = "a link that leads nowhere" if lost else "a file"
        return f"{short(error.filename)}: it or a part of this path is {what}, expected a folder"
    if isinstance(error, OSError) and error.strerror:
        return f"{short(error.filename)}: {error.strerror}" if error.filename else error.strerror
    return short(error, _MOST_SAID) or type(error).__name__


def _unforeseen(error: BaseException) -> str:
    """What to tell of an error that is a fault of the program."""
    return (
        f"{type(error).__name__}: {_sentence(error)}; this is a fault of {PROG} that nobody foresaw, please report it"
        f"{_where_to_report()}, with what the same command prints with --debug, and what `{PROG} info` prints"
    )


def _where_to_report() -> str:
    from starflow.cli.info import DISTRIBUTION

    try:
        links = metadata.metadata(DISTRIBUTION).get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        links = []
    found = [link.partition(", ")[2] for link in links if link.lower().startswith(("issues", "bug", "tracker"))]
    return f" at {found[0]}" if found else f" where you got {PROG} from"


def _out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def _fail(status: int, message: str) -> int:
    print(f"{PROG}: error: {message}", file=sys.stderr)
    return status


def _check_alone(command: str) -> None:
    """Refuses several processes of a command that they would all do alone.

    Raises:
        ConfigError: torchrun started more than one.
    """
    from starflow.distributed import rank_and_size

    _, size = rank_and_size()
    if size > 1 and _COMMANDS[command].alone:
        raise ConfigError(
            f"{command} is started in {size} processes (WORLD_SIZE in the environment), each of which would do all of "
            "it, expected one: under torchrun train and sample alone share their work"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        argv: arguments; None takes those of the process.

    Returns:
        The exit status (see the module).
    """
    from starflow.cli.info import check_surroundings, set_threads

    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    # argparse takes a list of positional arguments in one piece only: those behind an option come back as `rest`.
    takes_rest = _COMMANDS[args.command].rest
    if rest and (takes_rest is None or any(text.startswith("-") for text in rest)):
        parser.error(f"{args.command} does not know {' '.join(rest)}{_hint(args.command, rest)}")
    if rest and takes_rest is not None:
        getattr(args, takes_rest).extend(rest)
    # A name with letters that the terminal does not know is no reason to lose what was computed.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(format=f"{PROG}: %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("starflow").setLevel(logging.INFO)
    try:
        check_surroundings()
        _check_alone(args.command)
        set_threads(args.threads)
        status: int = args.run(args)
    except KeyboardInterrupt as told:
        # A command that knows better what is left says so.
        resumes = args.command in ("demo", "train")
        after = "the same command goes on from the last checkpoint" if resumes else "no file is half-written"
        return _fail(130, f"interrupted; {str(told) or after}")
    except BrokenPipeError:
        # The reader of the pipe, such as `head`, has closed it: the rest of the buffer is dropped.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            raise
        if isinstance(error, ConfigError):
            return _fail(2, _sentence(error))
        if _out_of_memory(error):
            return _fail(1, "not enough memory, expected fewer or smaller clips (--batch, --frames, --size) to fit")
        ours = type(error).__module__.partition(".")[0] == "starflow"
        if ours or isinstance(error, ValueError | OSError | ImportError):
            return _fail(1, _sentence(error))
        return _fail(1, _unforeseen(error))
    return status
