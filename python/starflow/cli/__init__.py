"""What can a user type? The command `starflow`, with one module for each of its commands."""

from starflow.cli.main import main

__all__ = [
    "main",
]
