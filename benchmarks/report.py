"""Turn a JSON file of pytest-benchmark into a table: one row an op and shape, one column a variant."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def table(results: dict[str, Any]) -> str:
    """Write the results as Markdown.

    Args:
        results: what pytest-benchmark saved.

    Returns:
        The machine in a few lines, then time and share of the copy bandwidth for each variant.
    """
    machine = results["machine_info"]
    groups: dict[str, dict[str, Any]] = {}
    for record in results["benchmarks"]:
        groups.setdefault(record["group"], {})[record["extra_info"]["variant"]] = record
    variants = list(dict.fromkeys(name for records in groups.values() for name in records))
    copies = [record["extra_info"]["copy GB/s"] for record in results["benchmarks"]]
    lines = [
        f"{machine['processor']}, {machine['threads']} threads; torch {machine['torch']};"
        f" compiled by {machine['compiler']}; load of the machine when it began {machine['load when it began']};"
        f" commit {(results['commit_info'] or {}).get('id') or 'unknown'}.",
        "",
        f"Best time of a call; in brackets the share of the bandwidth of a copy, {min(copies)} to {max(copies)} GB/s.",
        "",
        "| op | " + " | ".join(variants) + " | best over torch |",
        "|---" * (len(variants) + 2) + "|",
    ]
    for group, records in groups.items():
        cells = [_cell(records[name]) if name in records else "" for name in variants]
        native = min(record["stats"]["min"] for name, record in records.items() if name not in {"torch", "compile"})
        lines.append(f"| {group} | " + " | ".join(cells) + f" | {records['torch']['stats']['min'] / native:.1f}x |")
    return "\n".join(lines) + "\n"


def _cell(record: dict[str, Any]) -> str:
    seconds = record["stats"]["min"]
    time = f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
    return f"{time} ({record['extra_info']['percent of copy']:.0f} %)"


def main() -> None:
    """Write the table beside the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    path = parser.parse_args().results
    path.with_suffix(".md").write_text(table(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
