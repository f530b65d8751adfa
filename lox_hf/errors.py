"""Every error lox_hf raises on purpose, each with the remedy in its message.

A message says what failed, on which object, expected against got, and what to do. The command line prints it without a
traceback and exits with code 2; in Python all of them can be caught as `LoxError`.
"""

from collections.abc import Iterable


class LoxError(Exception):
    """Root of the errors that a user can act on."""


class ConfigError(LoxError, ValueError):
    """A setting is out of range, contradicts another, or matches nothing."""


class PairingError(LoxError):
    """The aligned and the base model do not fit together; all mismatches are in one message."""


class CheckpointError(LoxError):
    """A checkpoint cannot be found, is damaged, or is in a format that is not read."""


class UnsupportedModelError(LoxError, TypeError):
    """The model's weights cannot be edited as they are: quantised, offloaded, on the meta device, or fused."""


class NumericsError(LoxError, ArithmeticError):
    """The numbers themselves are in the way: NaN, Inf, overflow, or a decomposition that fails."""


class OutputError(LoxError, OSError):
    """The output cannot be written: it exists, equals an input, or the disk is full or read-only."""


class DistributedError(LoxError):
    """Processes that work together disagree, or one of them failed or was lost."""


class AlreadyHardenedError(LoxError):
    """LoX has been applied to this model already."""


class PromptError(LoxError):
    """A file or set of prompts, questions or texts cannot be read, or holds none."""


class EndpointError(LoxError, OSError):
    """An OpenAI-compatible endpoint cannot be used: out of reach, it refuses the key, or does not know the model."""


def listing(items: Iterable[str], limit: int = 20) -> str:
    """Join problems for a message; beyond `limit` the rest is counted."""
    items = list(items)
    more = f"; and {len(items) - limit} more" if len(items) > limit else ""
    return "; ".join(items[:limit]) + more + "."
