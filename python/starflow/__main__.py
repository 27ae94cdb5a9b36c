"""`python -m starflow` is the command `starflow`."""

import sys

from starflow.cli import main

sys.exit(main())
