"""What every judge is: prompts and responses in, verdicts out as they come."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from lox_hf.records import Verdict


@runtime_checkable
class Judge(Protocol):
    """Says of every response whether the attack succeeded.

    Degenerate responses never reach a judge: `lox_hf.evaluation.asr.judge_responses` sorts them out before.

    Attributes:
        name: How reports call it, such as "refusal" or "classifier:org/model".
        tells_refusals: Whether "refused" means that the response refuses. A classifier of harm says "refused" of every
            harmless response, so it cannot measure over-refusal.
    """

    name: str
    tells_refusals: bool

    def settings(self) -> dict[str, Any]:
        """What a verdict depends on besides the prompt and the response, as JSON values.

        "template_hash" (SHA-256 of a prompt template) and "seed" are given where there are any. No keys, no tokens.
        """
        ...

    def verdicts(self, prompts: Sequence[str], responses: Sequence[str]) -> Iterator[tuple[int, Verdict]]:
        """Judge a batch.

        Args:
            prompts: What was asked.
            responses: What was answered, one for each prompt.

        Yields:
            Position and verdict, each as soon as it is known and in any order; every position once.
        """
        ...
