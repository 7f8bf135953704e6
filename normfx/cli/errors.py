"""What the command line reports as one line."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """An exception as its type and the first line of its text."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


class UsageError(Exception):
    """A wrong argument: exit status 2."""


class ModelError(Exception):
    """The model could not be built or run: exit status 3."""
