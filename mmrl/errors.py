"""Errors for people. Free of torch, so that the command line answers at once."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can put right. The CLI prints it without a traceback and exits with 2."""


def require(condition: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)
