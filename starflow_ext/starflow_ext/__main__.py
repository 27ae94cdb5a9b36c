"""``python -m starflow_ext``: what this build and this machine can do, and what each op takes."""

import sys

from starflow_ext import info
from starflow_ext._explain import support_table

sys.stdout.write(f"{info()}\n\n{support_table()}\n")
