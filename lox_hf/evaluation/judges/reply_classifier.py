"""Classifiers that generate: their replies become verdicts."""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Self

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lox_hf.errors import ConfigError, PromptError
from lox_hf.evaluation.judges.classifier_text import defuse, fill, markers
from lox_hf.evaluation.judges.presets import Preset
from lox_hf.evaluation.models.chat import Conversation, Reply, ask
from lox_hf.evaluation.models.local import LocalModel
from lox_hf.records import Verdict
from lox_hf.records.safety import Label

Write = Callable[[str, str], str]
# Words no chat template holds itself, to see whether it shows both turns.
PROBE = ("the prompt under test", "the response under test")


@dataclass(frozen=True)
class ReplyRule:
    """How a classifier's reply is read.

    Attributes:
        harmful_pattern: Regular expression found in a reply that says harmful; case does not count.
        harmless_pattern: One found in a reply that says harmless.
        max_new_tokens: Longest reply in tokens.
    """

    harmful_pattern: str
    harmless_pattern: str
    max_new_tokens: int

    @classmethod
    def of(cls, model: str, preset: Preset) -> Self:
        """Return the rule that a preset holds.

        Args:
            model: What the model is called in errors.
            preset: The patterns.

        Returns:
            The rule.

        Raises:
            ConfigError: If a pattern is missing or is no regular expression.
        """
        patterns = {"harmful_pattern": preset.harmful_pattern, "harmless_pattern": preset.harmless_pattern}
        if missing := [name for name, pattern in patterns.items() if pattern is None]:
            raise ConfigError(
                f"How are the replies of '{model}' read? Pass {' and '.join(missing)}, such as r'\\A\\s*unsafe', or "
                "preset=, the one of the model it was made from."
            )
        found = {name: str(pattern) for name, pattern in patterns.items()}
        for name, pattern in found.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{name} {pattern!r} is no regular expression: {error}.") from error
        return cls(**found, max_new_tokens=preset.max_new_tokens)

    def settings(self) -> dict[str, Any]:
        """What a verdict depends on, as JSON values."""
        return asdict(self)

    def verdict(self, reply: Reply) -> Verdict:
        """Return the verdict that a reply states.

        Args:
            reply: What the classifier wrote.

        Returns:
            The verdict, with what the pattern found as its reason; unscored where the reply states none, or both.
        """
        if reply.error:
            return Verdict("unscored", f"the classifier gave no reply: {reply.error}", transient=reply.transient)
        patterns: dict[Label, str] = {"complied": self.harmful_pattern, "refused": self.harmless_pattern}
        found = {label: re.search(pattern, reply.text, re.IGNORECASE) for label, pattern in patterns.items()}
        stated = {label: " ".join(match[0].split()) for label, match in found.items() if match}
        if len(stated) != 1:
            what = "both harmful and harmless" if stated else "neither harmful nor harmless"
            return Verdict("unscored", f"the classifier's reply says {what}", raw=reply.text)
        [(label, reason)] = stated.items()
        return Verdict(label, reason, raw=reply.text)


class ReplyClassifier:
    """A generative classifier that judges prompts with responses.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        rule: How its replies are read.
        template: Text with {prompt} and {response}; None takes the tokenizer's chat template.
        batch_size: Responses at once; None finds what fits.

    Raises:
        ConfigError: If there is no template, and no chat template that shows both turns.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rule: ReplyRule,
        template: str | None,
        batch_size: int | None,
    ) -> None:
        self._rule = rule
        self._write = _chat_writer(str(model.name_or_path), tokenizer) if template is None else partial(fill, template)
        self._marks = markers(self._write(*PROBE), tokenizer)
        # What is written is the whole format, a chat template's markup included.
        self._chat = LocalModel(
            model, tokenizer, template="none", max_new_tokens=rule.max_new_tokens, batch_size=batch_size
        )

    def verdicts(
        self, prompts: Sequence[str], responses: Sequence[str], done: Collection[int] = ()
    ) -> Iterator[tuple[int, Verdict]]:
        """Judge a batch, but for batches that are done; yields position and verdict."""
        asked = [self._ask(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        try:
            for place, reply in self._chat.replies(asked, done):
                yield place, self._rule.verdict(reply)
        except PromptError as error:  # all are too long, which is no reason to lose the verdicts of other prompts
            unread = Verdict("unscored", f"the classifier can read none of the responses: {error}")
            yield from ((place, unread) for place in range(len(asked)))

    def _ask(self, prompt: str, response: str) -> Conversation:
        return ask(self._write(defuse(prompt, self._marks), defuse(response, self._marks)))


def _chat_writer(model: str, tokenizer: PreTrainedTokenizerBase) -> Write:
    """Write both turns by the chat template; some (Llama Guard 3 1B, Llama Guard 4) read content in parts only."""
    for in_parts in (False, True):
        write = partial(_render, tokenizer, in_parts)
        try:
            shown = write(*PROBE)
        except Exception:  # a template is a program of its author's and may fail with anything
            continue
        if all(text in shown for text in PROBE):
            return write
    raise ConfigError(
        f"'{model}' has no chat template that shows a prompt and a response: pass template=FILE, a text with "
        "{prompt} and {response}."
    )


def _render(tokenizer: PreTrainedTokenizerBase, in_parts: bool, prompt: str, response: str) -> str:
    turns: list[dict[str, Any]] = [
        {"role": role, "content": [{"type": "text", "text": text}] if in_parts else text}
        for role, text in (("user", prompt), ("assistant", response))
    ]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
