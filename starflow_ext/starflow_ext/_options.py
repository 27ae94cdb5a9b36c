"""Named values that the native ops take as numbers, and the constants of the kernels: read from the library once.

A native op takes the number of an option's value, its place in the enum of csrc/: each string that crosses torch's
stable ABI leaves 48 bytes behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from starflow_ext._check import require
from starflow_ext._load import native

Codes = Mapping[str, int]


def _codes(option: str) -> dict[str, int]:
    return {name: code for code, name in enumerate(native.options()[option])}


SCALE_ACTIVATIONS: Final = _codes("scale_activation")
# These include "none", which linear and the sweeps take and the op norm does not.
NORM_KINDS: Final = _codes("norm_kind")
WEIGHT_STORAGES: Final = _codes("matrix_storage")
PRODUCT_INPUTS: Final = _codes("product_input")
EPILOGUES: Final = _codes("epilogue")
PAIRINGS: Final = _codes("pairing")
DTYPES: Final = _codes("dtype")
ATTENTION_KERNELS: Final = tuple(native.options()["attention_kernel"])
LINEAR_CHOICES: Final = tuple(native.options()["linear_choice"])

CONSTANTS: Final = native.constants()


def code_of(op: str, argument: str, name: str, codes: Codes) -> int:
    """Return the number of an option's value.

    Raises:
        RuntimeError: if there is no such value; the message names the known ones.
    """
    code = codes.get(name)
    if code is None:
        require(False, op, f"{argument} is", f'"{name}"', names_text(codes))
        raise AssertionError
    return code


def check_name(op: str, argument: str, name: str, codes: Iterable[str]) -> None:
    """Check the value of an option; raises like ``code_of``."""
    if name not in codes:
        require(False, op, f"{argument} is", f'"{name}"', names_text(codes))


def name_of(op: str, argument: str, code: int, codes: Codes) -> str:
    """Return the value of an option whose number a native op was given; raises what that op raises."""
    names = list(codes)
    known = 0 <= code < len(names)
    require(known, op, f"{argument} is", code, _listed([f'{number} ("{name}")' for name, number in codes.items()]))
    return names[code]


def names_text(codes: Iterable[str]) -> str:
    """Write the values of an option as ``"a", "b" or "c"``."""
    return _listed([f'"{name}"' for name in codes])


def _listed(parts: list[str]) -> str:
    return " or ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
