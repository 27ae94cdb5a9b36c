"""Turn a JSON file of pytest-benchmark into a table: one row an op and shape, one column a variant."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Variants that are native kernels; all others are what a user would write without them.
NATIVE = ("scalar", "avx2", "avx512", "avx512_bf16", "amx", "cuda")

Record = dict[str, Any]


def groups_of(records: Sequence[Record]) -> dict[str, dict[str, Record]]:
    """Records by group, and in it by variant."""
    groups: dict[str, dict[str, Record]] = {}
    for record in records:
        groups.setdefault(record["group"], {})[record["extra_info"]["variant"]] = record
    return groups


def best_of(records: dict[str, Record], *, native: bool) -> str | None:
    """The fastest native variant, or the fastest other one."""
    names = [name for name in records if (name in NATIVE) == native]
    return min(names, key=lambda name: records[name]["stats"]["min"], default=None)


def share_of(record: Record, records: dict[str, Record]) -> float:
    """Per cent of the ceiling. That of a group is the highest that was found: other work makes one low."""
    facts = record["extra_info"]
    if "ceiling seconds" in facts:
        least = min(other["extra_info"]["ceiling seconds"] for other in records.values())
        return 100.0 * float(least) / float(record["stats"]["min"])
    return float(max(facts.get(f"percent of {what}", 0.0) for what in ("copy", "product")))


def ceiling_of(records: dict[str, Record]) -> str:
    """The ceiling of a group, in words."""
    found = [facts for record in records.values() if "ceiling" in (facts := record["extra_info"])]
    return str(min(found, key=lambda facts: facts["ceiling seconds"])["ceiling"]) if found else ""


def time_text(seconds: float) -> str:
    """Three figures, as a reader says them."""
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def terminal(records: Sequence[Record]) -> Iterator[str]:
    """Lines for the terminal: a group with its ceiling, and each variant's time, rate and share of that ceiling."""
    columns = f"{'best':>11}{'median':>11}{'GB/s':>9}{'GFLOP/s':>10}{'of ceiling':>12}"
    yield f"{'':24}{columns}{'faster than the best other':>28}"
    for group, variants in groups_of(records).items():
        ceiling = ceiling_of(variants)
        yield f"{group}{f', at most {ceiling}' if ceiling else ''}"
        other = best_of(variants, native=False)
        for name, record in variants.items():
            facts, stats = record["extra_info"], record["stats"]
            operations = facts.get("GFLOP/s", 1e3 * facts["TFLOP/s"] if "TFLOP/s" in facts else None)
            share = share_of(record, variants)
            ratio = ""
            if other is not None and name in NATIVE:
                ratio = f"{variants[other]['stats']['min'] / stats['min']:.2f}x {other}"
            yield (
                f"  {name:22}{time_text(stats['min']):>11}{time_text(stats['median']):>11}{facts['GB/s']:>9}"
                f"{'' if operations is None else f'{operations:.4g}':>10}{f'{share:.0f} %':>12}{ratio:>28}"
            ).rstrip()


def table(results: dict[str, Any]) -> str:
    """Write the results as Markdown.

    Args:
        results: what pytest-benchmark saved.

    Returns:
        The machine in a few lines, then time and share of the ceiling for each variant.
    """
    machine = results["machine_info"]
    groups = groups_of(results["benchmarks"])
    variants = list(dict.fromkeys(name for records in groups.values() for name in records))
    variants.sort(key=lambda name: (name in NATIVE, NATIVE.index(name) if name in NATIVE else 0))
    commit = (results["commit_info"] or {}).get("id") or "unknown"
    lines = [
        f"{machine['processor']}, {machine['threads']} threads; torch {machine['torch']};"
        f" compiled by {machine['compiler']}; other work kept {machine['cores busy with other work']} of"
        f" {machine['cores']} cores busy when it began; commit {commit}.",
        "",
        "Best time of a call; in brackets the share of its ceiling, which is the rate at which this machine reads and"
        " writes as many bytes in a loop (from the cache that holds them, or from memory), or multiplies, whichever"
        " takes longer. Last, the fastest level against the fastest of what is not ours.",
        "",
        "| op | ceiling | " + " | ".join(variants) + " | best over best |",
        "|---" * (len(variants) + 3) + "|",
    ]
    for group, records in groups.items():
        cells = [_cell(records[name], records) if name in records else "" for name in variants]
        ours, other = (best_of(records, native=native) for native in (True, False))
        ratio = (
            ""
            if ours is None or other is None
            else f"{_seconds(records[other]) / _seconds(records[ours]):.1f}x {other}"
        )
        lines.append(f"| {group} | {ceiling_of(records)} | " + " | ".join(cells) + f" | {ratio} |")
    return "\n".join(lines) + "\n"


def _seconds(record: Record) -> float:
    return float(record["stats"]["min"])


def _cell(record: Record, records: dict[str, Record]) -> str:
    return f"{time_text(_seconds(record))} ({share_of(record, records):.0f} %)"


def main() -> None:
    """Write the table beside the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    path = parser.parse_args().results
    path.with_suffix(".md").write_text(table(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
