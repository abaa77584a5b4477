"""Errors that are for people: their message is all that a command prints."""

from __future__ import annotations


class InputError(ValueError):
    """Something that was given cannot be used; the message names it, what is allowed, and what to do."""


class OptionError(InputError):
    """An option that does not exist or has a value that is not allowed; the message says what is."""


class ConfigError(OptionError):
    """A run that cannot start as it was asked for: the message names the setting and what is allowed."""


class CheckpointError(InputError):
    """A state dict that does not belong to this optimizer and model; nothing was loaded from it."""


class SparseGradient(TypeError, RuntimeError):
    """A gradient with a sparse layout; torch's own optimizers raise a RuntimeError for it."""


class MissingPackage(ImportError):
    """A package that is not installed, and how to install it."""


def reason(error: BaseException) -> str:
    """What an error of a library says, in one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
