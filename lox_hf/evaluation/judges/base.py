"""What every judge is: prompts and responses in, verdicts out as they come."""

from collections.abc import Collection, Iterator, Sequence
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
        reads_prompts: Whether it looks at the prompts too, and so needs them.
        durable: Whether name and settings say all that a verdict depends on, so that one on disk is as good as a new
            one. A judge that costs nothing, or that nothing is known of, is asked again.
    """

    name: str
    tells_refusals: bool
    reads_prompts: bool
    durable: bool

    def settings(self) -> dict[str, Any]:
        """What a verdict depends on besides the prompt and the response, as JSON values.

        "template_hash" (SHA-256 of a prompt template) and "seed" are given where there are any. No keys, no tokens.
        """
        ...

    def verdicts(
        self, prompts: Sequence[str], responses: Sequence[str], done: Collection[int] = ()
    ) -> Iterator[tuple[int, Verdict]]:
        """Judge a batch.

        Args:
            prompts: What was asked.
            responses: What was answered, one for each prompt.
            done: Positions that have a verdict already. Some may be judged again, where batches demand it.

        Yields:
            Position and verdict, each as soon as it is known and in any order; every position that is not done, once.
        """
        ...
