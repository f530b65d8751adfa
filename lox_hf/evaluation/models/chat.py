"""What answers conversations: a model in this process, or an endpoint; the same to its callers."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict


class Message(TypedDict):
    """One turn, in the form of chat templates and of OpenAI's API."""

    role: str
    content: str


Conversation = list[Message]


@dataclass(frozen=True)
class Reply:
    """What came back for one conversation.

    Attributes:
        text: The answer, without the prompt, special tokens and thinking part.
        cut_off: It was ended by the limit of new tokens.
        error: Why there is no answer; empty where there is one.
        transient: The error may be gone next time (an endpoint that did not answer).
        raw: The answer with its thinking part, for who reads it in another way.
    """

    text: str
    cut_off: bool = False
    error: str = ""
    transient: bool = False
    raw: str = field(default="", repr=False, compare=False)


class ChatModel(Protocol):
    """Answers conversations.

    Attributes:
        name: How reports call it.
    """

    name: str

    def settings(self) -> dict[str, Any]:
        """What an answer depends on besides the conversation, as JSON values. No keys, no tokens."""
        ...

    def replies(
        self, conversations: Sequence[Conversation], done: Collection[int] = ()
    ) -> Iterator[tuple[int, Reply]]:
        """Answer conversations.

        Args:
            conversations: The conversations; each ends with a user's turn.
            done: Positions that are answered already. Some may be answered again, where batches demand it.

        Yields:
            Position and reply, each as soon as it is known and in any order.
        """
        ...


def ask(prompt: str, system: str | None = None) -> Conversation:
    """Return the conversation in which a user says one thing.

    Args:
        prompt: What the user says.
        system: System prompt; None sends none.

    Returns:
        The conversation.

    Example:
        >>> ask("Hello")
        [{'role': 'user', 'content': 'Hello'}]
    """
    turns: Conversation = [{"role": "system", "content": system}] if system else []
    return [*turns, {"role": "user", "content": prompt}]
