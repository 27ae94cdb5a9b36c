"""Runs commands of starflow one after the other, each in a process of its own with limits on time and memory.

It reads lines of JSON, `{"argv": [...], "folder": ..., "seconds": ..., "mib": ...}`, and answers each with one: exit
status (negative: the signal; None: over time) and standard error. The command runs in a fork of a process that has
imported everything, since an interpreter takes seconds to do so.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from typing import Any

import torch

import starflow.sampling
import starflow.storage
import starflow.training  # noqa: F401 (imported for the forks)
from starflow.cli import main


def _child(asked: dict[str, Any], error: int) -> None:
    """What the fork does; it does not return."""
    status = 70
    try:
        os.chdir(asked["folder"])
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        os.dup2(error, 2)
        with open("/proc/self/statm", encoding="ascii") as file:
            held = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + (asked["mib"] << 20),) * 2)
        status = main(asked["argv"])
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else 70
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def run(asked: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile() as error:
        child = os.fork()
        if not child:
            _child(asked, error.fileno())
        end = time.monotonic() + asked["seconds"]
        status = None
        while status is None and time.monotonic() < end:
            done, raw = os.waitpid(child, os.WNOHANG)
            if done:
                status = os.waitstatus_to_exitcode(raw)
            else:
                time.sleep(0.01)
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        error.seek(0)
        return {"status": status, "error": error.read(1 << 20).decode("utf-8", "replace")}


if __name__ == "__main__":
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)
