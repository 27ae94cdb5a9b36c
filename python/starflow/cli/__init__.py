"""The command `starflow`: one module for each command."""

from starflow.cli.main import main

__all__ = [
    "main",
]
