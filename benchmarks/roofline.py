"""Draw the rates of products and sweeps that benchmarks/targets.py measured under the roofline of the processor.

    python benchmarks/targets.py --group cpu > benchmarks/results/targets_xeon.jsonl
    python benchmarks/roofline.py benchmarks/results/targets_xeon.jsonl docs/images/roofline.svg

A point is one call: its operations over the bytes of weights and caches that it must read, and its rate.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("svg")
from matplotlib import pyplot as plt


def main() -> None:
    """Read the lines and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.lines.read_text().splitlines()]
    ceilings = next(line for line in lines if line["name"] == "ceilings")
    points = [point for line in lines for point in line.get("points", [])]

    plt.rcParams["svg.hashsalt"] = "starflow"
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    intensity = np.logspace(0, 3, 200)
    for kind, color in (("float32", "tab:blue"), ("bfloat16", "tab:orange")):
        peak = ceilings["bf16" if kind == "bfloat16" else "fma"]
        for memory, style in (("16MB", "-"), ("64MB", "--")):
            roof = np.minimum(peak, ceilings[f"read_{memory}"] * intensity)
            axes.plot(intensity, roof / 1e9, style, color=color, lw=1, label=f"{kind}, reading {memory}")
        for what, marker in (("linear", "o"), ("sweep", "s")):
            mine = [p for p in points if p[0].startswith(what) and p[0].endswith(kind)]
            x = [flops / size for _, flops, size, _ in mine]
            y = [flops / seconds / 1e9 for _, flops, _, seconds in mine]
            axes.plot(x, y, marker, color=color, mfc="none" if what == "sweep" else color, label=f"{what}, {kind}")
    axes.set(xscale="log", yscale="log", xlabel="operations a byte of weights and caches", ylabel="GFLOP/s")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(args.picture, metadata={"Date": None})


if __name__ == "__main__":
    main()
