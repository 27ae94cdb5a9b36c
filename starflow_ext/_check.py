"""User errors in one form: the op, the argument, what was given and what was expected."""

from __future__ import annotations


def require(condition: bool, op: str, argument: str, got: object, expected: object) -> None:
    """Raise the one sentence that the native library raises for the same mistake.

    Args:
        condition: what must hold.
        op: name of the op.
        argument: name of the argument at fault, with the property that is wrong ("shift has shape").
        got: what was given.
        expected: what would have been right.

    Raises:
        RuntimeError: if ``condition`` is false; the type that torch's own ops raise.
    """
    if not condition:
        raise RuntimeError(f"{op}: {argument} {got}, expected {expected}")
