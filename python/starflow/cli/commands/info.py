"""`starflow info`: what is installed, what the machine can do, or what a model holds."""

from __future__ import annotations

import argparse
import json

from starflow.cli.options import MODEL_HELP, PROG, Command, path_text
from starflow.config import config_names


def _run(args: argparse.Namespace) -> int:
    from starflow.cli import info
    from starflow.storage import shipped_names

    facts = info.machine() if args.model is None else info.model(args.model)
    if args.model is None:
        facts["starflow"]["configs"] = ", ".join(config_names())
        facts["starflow"]["models"] = ", ".join(shipped_names())
    print(json.dumps(facts, indent=2, default=str) if args.json else info.text_of(facts))
    return 0


_DESCRIPTION = f"""Tell what is installed and what the machine can do; with a model, what it holds, and the
card of one that comes with the package.

examples:
  {PROG} info
  {PROG} info digits
  {PROG} info runs/mine"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=path_text, nargs="?", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--json", action="store_true", help="print json")


COMMAND = Command("versions and machine, or what a model file holds", _DESCRIPTION, _add_options, _run, alone=False)
