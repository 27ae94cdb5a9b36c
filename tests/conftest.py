"""For every test: fresh interpreters import the installed packages too."""

from __future__ import annotations

import os

# `python -m` and `python -c` put the current folder first, and the root holds folders of the packages' names.
os.environ["PYTHONSAFEPATH"] = "1"
