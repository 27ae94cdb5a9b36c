"""Checkpoints of other programs as tensors by name: safetensors, and pickles that hold tensors and nothing else."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from starflow.messages import listed, short, shown
from starflow.storage.tensors import PICKLES, CheckpointError

# What wrappers put into the names of the tensors inside: torch.compile, fully sharded training, recomputation.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# What every published flow has, under whatever a checkpoint puts before it.
_FIRST_NAME = re.compile(r"((?:[^.]+\.)*?)blocks\.\d+\.")


def read_foreign(path: Path, tell: Callable[[str], None]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name; they are mapped from the file where its format allows it.

    A state dict inside a mapping (`{"model": {...}, "step": 3}`) is taken where there is one, and what wrappers or a
    surrounding module put into all names is dropped, both with a line.

    Args:
        path: of a file that `torch.save` wrote, or of safetensors; which of the two it is, its first bytes say.
        tell: called with the lines.

    Raises:
        CheckpointError: it cannot be read, is damaged, or holds anything else.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"checkpoint {short(path)} does not exist, or is no file")
        with path.open("rb") as file:
            start = file.read(9)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"checkpoint {short(path)} cannot be read: {reason}") from None
    if start.startswith(PICKLES):
        return _plain_names(path, _state_dict(path, _unpickled(path), tell), tell)
    if start[8:] == b"{":
        return _plain_names(path, _safetensors(path), tell)
    what = "is empty" if not start else "is neither a file of torch.save nor safetensors, or is damaged"
    raise CheckpointError(f"checkpoint {path} {what}, expected a state dict")


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    # Dtypes that torch does not have are a KeyError or an AttributeError, by the version of safetensors.
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {path} is truncated, damaged or not safetensors ({short(error)})") from None


def _unpickled(path: Path) -> Any:
    zipped = zipfile.is_zipfile(path)
    if zipped:
        _check_archive(path)
    try:
        if path.suffix == ".safetensors":
            # torch goes by the name of a file that it is given by name.
            with path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        # Only the zip form can be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {short(asked[1], 80)}; " if asked else ""
        raise CheckpointError(
            f"checkpoint {path} is damaged or holds more than tensors, expected a state dict ({what}nothing in it was "
            "run)"
        ) from None
    # Damaged bytes bring the reader of pickles to raise almost anything; it runs nothing.
    except Exception as error:
        why = short(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise CheckpointError(f"checkpoint {path} is truncated or damaged ({why})") from None


def _check_archive(path: Path) -> None:
    """Refuses an archive that unpacks to more than its size: `torch.save` compresses nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    except Exception as error:  # The module raises many things at damaged archives.
        raise CheckpointError(f"checkpoint {path} is truncated or damaged ({short(error)})") from None
    if packed:
        raise CheckpointError(
            f"checkpoint {path} is a compressed archive ({listed(packed, 1)}), expected a file of torch.save"
        )


def _is_state(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(key, str) and isinstance(item, Tensor) for key, item in value.items())
    )


def _state_dict(path: Path, content: Any, tell: Callable[[str], None]) -> dict[str, Tensor]:
    """The one state dict in what a pickle held."""
    if _is_state(content):
        return dict(content)
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"checkpoint {path} is no state dict but {short(type(content).__name__, 40)}, expected tensors by name"
        )
    found = [key for key, value in content.items() if _is_state(value)]
    if len(found) > 1:
        # An optimiser may keep tensors by name, too.
        found = [key for key in found if any(_FIRST_NAME.match(name) for name in content[key])] or found
    if len(found) != 1:
        keys = listed(shown(key, 60) for key in (found or content))
        held = f"holds {len(found)} state dicts, under {keys}" if found else f"is no state dict; it holds {keys}"
        raise CheckpointError(f"checkpoint {path} {held}, expected one with tensors by name")
    tell(f"taking the state dict under {shown(found[0], 60)}")
    return dict(content[found[0]])


def _plain_names(path: Path, state: Mapping[str, Tensor], tell: Callable[[str], None]) -> dict[str, Tensor]:
    """Names without what wrappers put into them and without what stands before all of them."""
    names = {name: _WRAPPERS.sub("", name) for name in state}
    begun = next((found[1] for name in names.values() if (found := _FIRST_NAME.match(name))), "")
    if begun and all(name.startswith(begun) for name in names.values()):
        names = {name: plain.removeprefix(begun) for name, plain in names.items()}
    changed = [name for name, plain in names.items() if name != plain]
    if len(set(names.values())) != len(names):
        raise CheckpointError(
            f"checkpoint {path} has names that differ by a prefix alone, such as {listed(changed, 2)}"
        )
    if changed:
        tell(f"{len(changed)} names are read without a prefix, such as {names[changed[0]]} for {short(changed[0])}")
    return {plain: state[name] for name, plain in names.items()}


def require_numbers(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuses tensors that are no plain numbers a flow computes with.

    Raises:
        CheckpointError: integers, 8-bit floats, complex, sparse or quantised tensors, or tensors without content.
    """
    usable = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    kinds: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.is_meta:
            kinds.setdefault("without content (meta)", []).append(name)
        elif tensor.layout != torch.strided or tensor.is_quantized:
            kinds.setdefault(f"of layout {str(tensor.layout).removeprefix('torch.')}", []).append(name)
        elif tensor.dtype not in usable:
            kinds.setdefault(f"of {str(tensor.dtype).removeprefix('torch.')}", []).append(name)
    if kinds:
        told = "; ".join(f"{kind}: {listed(names, 2)}" for kind, names in list(kinds.items())[:4])
        raise CheckpointError(
            f"checkpoint {path} has tensors {told}; expected dense tensors of float32, bfloat16, float16 or float64"
        )
