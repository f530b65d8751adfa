"""`ProbedModel`: a model in training that answers prompts, and says how likely it finds one answer."""

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from lox_hf.errors import ConfigError, LoxError
from lox_hf.evaluation.models.batch_size import is_out_of_memory, run_in_batches
from lox_hf.evaluation.models.chat import Conversation, ask
from lox_hf.evaluation.models.checks import check_vocabulary, context_length
from lox_hf.evaluation.models.likelihood import Window, fitting_windows, negative_log_likelihood
from lox_hf.evaluation.models.local import LocalModel, left_as_found
from lox_hf.evaluation.models.templates import encode
from lox_hf.evaluation.models.tokens import mark, special_tokens, tokenize
from lox_hf.training.processes import are_many
from lox_hf.weights.spread.model import is_spread_model

Result = TypeVar("Result")


class ProbedModel(LocalModel):
    """A model in training that is also asked how likely it finds an answer.

    Under several processes a batch for which the memory does not suffice is not halved, as the others would go on with
    the whole of it, and each would wait for passes that the others do not make: it ends the run, see `_together`.
    """

    def check(self, conversations: Sequence[Conversation], answer: str) -> None:
        """Raise what `replies` and `perplexity_of` would.

        Args:
            conversations: The conversations.
            answer: The answer.

        Raises:
            ConfigError: If the tokenizer or the chat template does not fit, or nothing is left of the answer.
            PromptError: If not one prompt can be answered.
        """
        self._refused(self._prompts(conversations))
        self._answer_ids(answer)

    def perplexity_of(self, answer: str, conversations: Sequence[Conversation]) -> float:
        """Perplexity of one answer, over all conversations that leave room for it.

        Args:
            answer: The answer.
            conversations: The conversations.

        Returns:
            The perplexity, at least 1; NaN where there is no room.

        Raises:
            ConfigError: If nothing is left of the answer, or the tokenizer or the chat template does not fit.
            LoxError: If the memory does not suffice for a single prompt; under several processes, for a batch.
        """
        ids, context = self._answer_ids(answer), context_length(self._model)
        prompts = [
            prompt for prompt in self._prompts(conversations) if context is None or len(prompt + ids) <= context
        ]
        if not prompts:
            return float("nan")
        windows = [Window(prompt + ids, len(ids)) for prompt in sorted(prompts, key=len, reverse=True)]
        longest = len(windows[0].ids)
        batches = run_in_batches(
            lambda batch: self._together(lambda: negative_log_likelihood(self._model, batch)),
            windows,
            min(fitting_windows(self._model, longest), self.batch_size or len(windows)),
            device=self._model.device,
            one=f"one prompt and a refusal of {longest} tokens: leave the longest prompts out.",
        )
        with left_as_found(self._model):
            total = sum(loss for _, _, loss in batches)
        return torch.tensor(total / (len(windows) * len(ids)), dtype=torch.float64).exp().item()

    def _generate(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        return self._together(lambda: super(ProbedModel, self)._generate(prompts))

    def _together(self, work: Callable[[], Result]) -> Result:
        """Have all processes do this, or all of them fail where the memory of one does not suffice."""
        if not are_many():
            return work()
        done: list[Result] = []
        try:
            done.append(work())
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # In the middle of a pass that all make together the others wait for this process's weights and hear nothing
        # else: its error then ends the run, as the launcher stops the others.
        if (done or not is_spread_model(self._model)) and all(_answers(bool(done))):
            return done[0]
        raise LoxError(
            "A process of this training has run out of memory in a safety probe. Under several processes a batch is "
            "not halved, as all have to make the same passes: give the probe a smaller batch_size or max_new_tokens, "
            "or shorter prompts."
        )

    def _prompts(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        special = special_tokens(self._tokenizer)
        prompts = [
            encode(self._tokenizer, turns, self.template, self._variables, special=special) for turns in conversations
        ]
        check_vocabulary(self._model, self._tokenizer, prompts)
        return prompts

    def _answer_ids(self, answer: str) -> list[int]:
        """Token ids of an answer as they follow a prompt, with the one that ends its turn.

        Read off a text with something in front, as tokenizers spell the beginning of a text in another way. What a
        template writes after the end of the turn a model never generates.

        Returns:
            Token ids.

        Raises:
            ConfigError: If there are none.
        """
        special, ends = special_tokens(self._tokenizer), self._ends()
        before, whole = self._before_and_whole(answer, special)
        pairs = enumerate(zip(before, whole, strict=False))
        start = next((place for place, (ours, theirs) in pairs if ours != theirs), min(len(before), len(whole)))
        ids = list(takewhile(lambda token: token not in ends, whole[start:]))
        if not ids:
            raise ConfigError(
                f"No token is left of the refusal {answer!r} in the format '{self.template}': pass words as refusal, "
                f"or another template than that of '{self._tokenizer.name_or_path}'."
            )
        end = next((token for token in whole[start:] if token in ends), self._tokenizer.eos_token_id)
        return ids if end is None else [*ids, end]

    def _before_and_whole(self, answer: str, special: Mapping[int, str]) -> tuple[list[int], list[int]]:
        """Token ids of a prompt, and of the same with the answer behind it."""
        if self.template != "chat":  # the prompts of "alpaca" end with a colon too
            whole = tokenize(self._tokenizer, special, f": {mark(special, answer)}")
            return tokenize(self._tokenizer, special, ":"), whole
        question = ask("?")
        turns = [*question, {"role": "assistant", "content": mark(special, answer)}]
        text = self._tokenizer.apply_chat_template(cast("Any", turns), tokenize=False, **self._variables)
        before = encode(self._tokenizer, question, "chat", self._variables, special=special)
        return before, tokenize(self._tokenizer, special, cast("str", text).rstrip())


def _answers(answer: bool) -> list[bool]:
    """What every process answers."""
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, answer)
    return answers
