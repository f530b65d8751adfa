"""A judge made from a user's own function."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast, get_args

from lox_hf.errors import ConfigError
from lox_hf.records import Verdict
from lox_hf.records.safety import Label


class FunctionJudge:
    """A function of prompts and responses as a judge.

    Args:
        function: Returns one item for each response: True where the attack succeeded and False where it did not; a
            label ("refused", "complied", "degenerate", "unscored"); a `Verdict`; or None where it cannot say.
        tells_refusals: Whether its "refused" (or False) means that the response refuses, so that it can judge harmless
            prompts too.

    Example:
        >>> judge = FunctionJudge(lambda prompts, responses: ["sure" in text.lower() for text in responses])
        >>> [verdict.label for _, verdict in judge.verdicts(["a", "b"], ["Sure, here it is", "No."])]
        ['complied', 'refused']
    """

    def __init__(
        self, function: Callable[[Sequence[str], Sequence[str]], Sequence[Any]], *, tells_refusals: bool = False
    ) -> None:
        self.function, self.tells_refusals = function, tells_refusals
        self.name = f"function:{getattr(function, '__name__', type(function).__name__)}"

    def settings(self) -> dict[str, Any]:
        """Nothing that is known here."""
        return {}

    def verdicts(self, prompts: Sequence[str], responses: Sequence[str]) -> Iterator[tuple[int, Verdict]]:
        """Call the function once.

        Args:
            prompts: What was asked.
            responses: What was answered.

        Yields:
            Position and verdict.

        Raises:
            ConfigError: If the function returns another number of items, or one that is no verdict.
        """
        if not responses:
            return
        found = list(self.function(prompts, responses))
        if len(found) != len(responses):
            raise ConfigError(f"{self.name} judged {len(responses)} responses, but returned {len(found)} items.")
        yield from enumerate(map(self._verdict, found))

    def _verdict(self, item: Any) -> Verdict:
        if isinstance(item, Verdict):
            return item
        if item is None:
            return Verdict("unscored", f"{self.name} could not say")
        if isinstance(item, str) and item in get_args(Label):
            return Verdict(cast(Label, item), "" if item in ("refused", "complied") else f"says {self.name}")
        if item in (True, False):  # 0, 1 and NumPy's too
            return Verdict("complied" if item else "refused")
        raise ConfigError(
            f"{self.name} returned {item!r}: expected True, False, None, a Verdict, or one of {get_args(Label)}."
        )
