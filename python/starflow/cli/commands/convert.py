"""`starflow convert`: a published checkpoint becomes a model."""

from __future__ import annotations

import argparse
from typing import Any

from starflow.cli.options import PROG, Command, check_written, make_config, model_path, number, path_text
from starflow.config import config_names


def _run(args: argparse.Namespace) -> int:
    from starflow.storage import convert, published_config

    check_written({"OUT": args.out}, {"the checkpoint": [args.checkpoint], "the configuration": [args.config]})
    if args.config not in config_names():
        config = published_config(
            args.config, codec_folder=args.codec, codec_weights=args.codec_weights, text_folder=args.text
        )
    else:
        given = {
            ("codec", "folder"): args.codec,
            ("codec", "weights"): args.codec_weights,
            ("text", "folder"): args.text,
        }
        settings: list[tuple[list[str], Any]] = [(list(option), value) for option, value in given.items() if value]
        if args.codec_weights:
            settings.append((["sample", "denoise"], "none"))
        config = make_config(args.config, settings)
    file_bytes = int(args.file_size * 2**30)
    convert(args.checkpoint, config, args.out, dtype=args.dtype, file_bytes=file_bytes, progress=print)
    return 0


_DESCRIPTION = f"""Turn a published checkpoint (STARFlow, STARFlow-V) that you have on disk into a model file.

Nothing in a pickle is run, and nothing is downloaded. The weights keep their own licence. Sampling needs local copies
of the autoencoder and the text encoder that the release names.

Weights are copied one at a time, so that memory holds about the largest. OUT is one file where its name ends in
.safetensors, else a folder of files of a few gigabytes each.

example:
  {PROG} convert starflow-v.yaml starflow-v.pth starflow-v --dtype bfloat16 --codec wan/vae --text flan-t5-xl"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", metavar="CONFIG", help=f"yaml of the published release, or one of {', '.join(config_names())}"
    )
    parser.add_argument(
        "checkpoint", type=path_text, metavar="CHECKPOINT", help=".pth or .safetensors file with published names"
    )
    parser.add_argument("out", metavar="OUT", type=model_path, help="what to write: a name.safetensors, or a folder")
    parser.add_argument(
        "--dtype",
        choices=("keep", "float32", "bfloat16", "int8"),
        default="keep",
        help="of the weights of layers; all else becomes float32 but with keep (default: keep, as in the checkpoint)",
    )
    parser.add_argument(
        "--file-size",
        type=number(float, 0, above=True),
        default=4.0,
        metavar="GIB",
        help="of the files of a folder, about (default: 4)",
    )
    parser.add_argument(
        "--codec",
        type=path_text,
        metavar="FOLDER_OR_FILE",
        help="local copy of the autoencoder: in diffusers format, or Wan2.2_VAE.pth or Wan2.1_VAE.pth as released",
    )
    parser.add_argument(
        "--codec-weights",
        type=path_text,
        metavar="FILE",
        help="weights that replace some of the autoencoder's: a fine-tuned decoder, which takes noisy latents, so that "
        "samples are not denoised",
    )
    parser.add_argument(
        "--text", type=path_text, metavar="FOLDER", help="local copy of the text encoder (transformers format)"
    )


COMMAND = Command("turn a published checkpoint into a model file", _DESCRIPTION, _add_options, _run)
