"""A judge made from a user's own function."""

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from typing import Any, cast, get_args

from lox_hf.errors import ConfigError
from lox_hf.records import Verdict
from lox_hf.records.safety import Label

LONGEST_SHOWN = 60


class FunctionJudge:
    """A function of prompts and responses as a judge.

    Args:
        function: Returns one item for each response: True where the attack succeeded and False where it did not; a
            label ("refused", "complied", "degenerate", "unscored"); a `Verdict`; or None where it cannot say.
        tells_refusals: Whether its "refused" (or False) means that the response refuses, so that it can judge harmless
            prompts too.

    Raises:
        ConfigError: If the function does not take prompts and responses.

    Example:
        >>> judge = FunctionJudge(lambda prompts, responses: ["sure" in text.lower() for text in responses])
        >>> [verdict.label for _, verdict in judge.verdicts(["a", "b"], ["Sure, here it is", "No."])]
        ['complied', 'refused']
    """

    reads_prompts = False  # it is given them, and may do without
    durable = False  # of a function nothing is known but its name

    def __init__(
        self, function: Callable[[Sequence[str], Sequence[str]], Sequence[Any]], *, tells_refusals: bool = False
    ) -> None:
        self.function, self.tells_refusals = function, tells_refusals
        self.name = f"function:{getattr(function, '__name__', type(function).__name__)}"
        try:
            inspect.signature(function).bind((), ())
        except TypeError as error:
            raise ConfigError(f"{self.name} must take prompts and responses: {error}.") from error
        except ValueError:  # some built-in functions have no signature
            pass

    def settings(self) -> dict[str, Any]:
        """Nothing that is known here."""
        return {}

    def verdicts(
        self, prompts: Sequence[str], responses: Sequence[str], done: Collection[int] = ()
    ) -> Iterator[tuple[int, Verdict]]:
        """Call the function once, with everything.

        Args:
            prompts: What was asked.
            responses: What was answered.
            done: No matter: the function is given all there is.

        Yields:
            Position and verdict.

        Raises:
            ConfigError: If the function returns no list, another number of items, or one that is no verdict.
        """
        if not responses:
            return
        items = self.function(prompts, responses)
        try:
            iterator = iter(items)
        except TypeError as error:
            raise ConfigError(
                f"{self.name} returned {_shown(items)}: expected a list with an item for each response."
            ) from error
        found = list(iterator)
        if len(found) != len(responses):
            raise ConfigError(f"{self.name} judged {len(responses)} responses, but returned {len(found)} items.")
        yield from enumerate(map(self._verdict, found))

    def _verdict(self, item: Any) -> Verdict:
        if isinstance(item, Verdict) and item.label in get_args(Label):
            return item
        if item is None:
            return Verdict("unscored", f"{self.name} could not say")
        if isinstance(item, str) and item in get_args(Label):
            return Verdict(cast(Label, item), "" if item in ("refused", "complied") else f"says {self.name}")
        with suppress(ValueError, RuntimeError):  # NumPy and torch of an array, which is neither true nor false
            if item in (True, False):  # 0, 1 and NumPy's too
                return Verdict("complied" if item else "refused")
        raise ConfigError(
            f"{self.name} returned {_shown(item)} for a response: expected True, False, None, a Verdict, or one of "
            f"{get_args(Label)}."
        )


def _shown(item: Any) -> str:
    return " ".join(repr(item).split())[:LONGEST_SHOWN]
