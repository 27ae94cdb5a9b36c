"""The command line in this process, and in one of its own."""

from __future__ import annotations

import signal
import subprocess
import sys

from starflow.cli import main


def run(*args: object) -> int:
    """Exit status of a command line, also where argparse ends it."""
    try:
        return main([str(arg) for arg in args])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1


def start(*args: object) -> subprocess.Popen[str]:
    """Starts a command line as a process that Ctrl-C ends."""
    # A shell that starts the tests in the background has them ignore the signal, and their children after them.
    return subprocess.Popen(
        [sys.executable, "-m", "starflow", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
