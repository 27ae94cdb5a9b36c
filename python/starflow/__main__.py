"""`python -m starflow`, which is what `torchrun -m starflow` runs."""

import sys

from starflow.cli import main

sys.exit(main())
