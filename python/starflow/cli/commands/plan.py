"""`starflow plan`: what a training takes, before it is started."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from starflow.cli.options import PROG, Command, make_config, number, setting
from starflow.config import RunConfig, config_names, to_mapping

if TYPE_CHECKING:
    from starflow.training import Plan


def _run(args: argparse.Namespace) -> int:
    from starflow.training import GIB, fitting, plan

    config = make_config(args.config, args.set)
    how = {"devices": args.gpus, "peak": args.peak * 1e12, "efficiency": args.efficiency}
    asked = plan(config, **how)
    limit = None if args.memory is None else int(args.memory * GIB)
    fits = None if limit is None else fitting(config, limit, **how)
    if args.json:
        changed = {} if fits is None else _changes(config, fits[0])
        print(json.dumps({**asked.to_mapping(), "fits": limit is None or asked.memory <= limit, "change": changed}))
        return 0
    _print_plan(asked, config)
    if limit is None:
        return 0
    if fits is None:
        print(
            f"does not fit into {args.memory:g} GiB, one clip at a time, in pieces and recomputed: expected more "
            "devices or memory"
        )
        return 1
    settings = "".join(f" --set {key}={value}" for key, value in _changes(config, fits[0]).items())
    if settings:
        print(f"does not fit into {args.memory:g} GiB; this does, with {fits[1].memory / GIB:.1f}:{settings}")
        return 1
    print(f"fits into {args.memory:g} GiB")
    return 0


def _changes(config: RunConfig, changed: RunConfig) -> dict[str, Any]:
    """Options of one configuration that differ from another's."""
    before, after = to_mapping(config), to_mapping(changed)
    return {
        f"{section}.{name}": value
        for section, options in after.items()
        for name, value in options.items()
        if before[section].get(name) != value
    }


def _print_plan(plan: Plan, config: RunConfig) -> None:
    gib = 2**30
    total = sum(plan.parameters.values())
    print(f"parameters: {total:,} (" + ", ".join(f"{part} {count:,}" for part, count in plan.parameters.items()) + ")")
    print(
        f"a step on each of {plan.devices} ({plan.parallel}): {config.train.accumulate} x {plan.clips} clips of "
        f"{plan.tokens:,} tokens"
    )
    for name in ("weights", "gradients", "moments", "average", "gathered", "activations", "workspace", "memory"):
        print(f"{name:>12}  {getattr(plan, name) / gib:8.2f} GiB")
    print(
        f"{plan.flops:.3g} FLOP a step and device, {plan.seconds:.3g} s at {plan.rate:.3g} FLOP/s; "
        f"{config.train.steps:,} steps in {plan.seconds * config.train.steps / 3600:.3g} hours"
    )


_DESCRIPTION = f"""Tell what a training run takes on each device before it is started: parameters, memory, arithmetic
and time.

With --memory: whether it fits, else what to set so that it does (exit status 1). Nothing is trained and no weights
are made. The time is arithmetic over the peak times the efficiency: what a first run reached is the best guess.

examples:
  {PROG} plan --config digits
  {PROG} plan --config starflow-v_7B_t2v_caus_480p --gpus 64 --memory 80 --peak 989 --efficiency 0.4"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        required=True,
        metavar="NAME_OR_PATH",
        help=f"configuration: a yaml file, or one of {', '.join(config_names())}",
    )
    parser.add_argument(
        "--set", type=setting, action="append", default=[], metavar="KEY=VALUE", help="set an option, as in train"
    )
    parser.add_argument("--gpus", type=number(int, 1), default=1, metavar="N", help="devices in all (default: 1)")
    parser.add_argument(
        "--memory", type=number(float, 0, above=True), metavar="GIB", help="of a device: whether the run fits"
    )
    parser.add_argument(
        "--peak",
        type=number(float, 0, above=True),
        default=989.0,
        metavar="TFLOPS",
        help="of a device, in 10^12 FLOP/s (default: 989, an H100 in bfloat16 without sparsity)",
    )
    parser.add_argument(
        "--efficiency",
        type=number(float, 0, above=True),
        default=0.4,
        metavar="SHARE",
        help="of the peak that is reached (default: 0.4)",
    )
    parser.add_argument("--json", action="store_true", help="print json, memory in bytes")


COMMAND = Command(
    "memory, arithmetic and time of a training run, before it is started",
    _DESCRIPTION,
    _add_options,
    _run,
    alone=False,
)
