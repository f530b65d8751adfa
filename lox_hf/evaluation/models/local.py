"""A model in this process as a chat model: greedy, in batches, and left as it was found."""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from torch import nn

from lox_hf.errors import ConfigError, PromptError, listing
from lox_hf.evaluation.models.batch import make_batch, reads_padding
from lox_hf.evaluation.models.batch_size import fitting_batch_size, run_in_batches
from lox_hf.evaluation.models.chat import Conversation, Reply
from lox_hf.evaluation.models.checks import check_model, check_vocabulary, context_length, model_name
from lox_hf.evaluation.models.templates import choose_template, encode, read_answer, special_tokens
from lox_hf.weights.identity import weights_sample

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

# The mode, our settings for the time of a call, and a method that PEFT hangs into its modules.
_TOUCHED = ("training", "generation_config", "prepare_inputs_for_generation")


class LocalModel:
    """Answers conversations with a loaded model, each with its most likely tokens.

    Prompts are sorted by length, padded on the left and answered in batches, which depend on the whole list alone: a
    run that goes on composes the same ones. Sampling settings and penalties of the model's generation config do not
    count. The model (modes of its modules, configs, random state) and the tokenizer are left as they were found.

    Attributes:
        name: Name of the model, from its config.
        template: Prompt format: "chat", "alpaca" or "none".
        batch_size: Prompts at once; None until the first batch where it is found automatically, and halved whenever
            the memory does not suffice. A run that is to be repeated batch by batch stores it.

    Args:
        model: A decoder-only transformers model, or a PEFT model around one; it answers on the device it is on.
        tokenizer: Its tokenizer; a padding token is not needed.
        template: "chat" (the tokenizer's), "alpaca" (the reference's), "none", or "auto": chat where there is one.
        max_new_tokens: Longest answer in tokens, a thinking part included.
        batch_size: Prompts at once; None takes what fits half of the free memory, up to where speed stops growing. An
            adapter that learnt tokens to put in front (prompt tuning, prefix tuning), RWKV and xLSTM, which padding
            would disturb, answer one prompt at a time.
        chat_template_kwargs: Further variables of the chat template, such as {"enable_thinking": False}.

    Raises:
        ConfigError: If a setting is out of range, or there is no chat template where one is asked for.
        UnsupportedModelError: If the model does not continue a text: an encoder-decoder, or one without a head.

    Example:
        >>> from lox_hf.evaluation.models.chat import ask
        >>> chat = LocalModel(model, tokenizer)  # doctest: +SKIP
        >>> dict(chat.replies([ask("Hello")]))  # doctest: +SKIP
        {0: Reply(text='Hello! How can I help you?', cut_off=False, error='', transient=False)}
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        template: str = "auto",
        max_new_tokens: int = 60,
        batch_size: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        check_model(model, tokenizer)
        if max_new_tokens < 1 or (batch_size is not None and batch_size < 1):
            raise ConfigError(
                f"max_new_tokens and batch_size must be at least 1, got {max_new_tokens} and {batch_size}."
            )
        # Compiled or not, `generate` runs the model inside, so everything else does too.
        self._model: Any = getattr(model, "_orig_mod", model)
        self._tokenizer = tokenizer
        self._variables = dict(chat_template_kwargs or {})
        self._max_new_tokens = max_new_tokens
        self.name = model_name(self._model)
        self.template = choose_template(tokenizer, template)
        self.batch_size = 1 if reads_padding(self._model) else batch_size

    def settings(self) -> dict[str, Any]:
        """What an answer depends on besides the conversation, as JSON values.

        Returns:
            Template, limit of new tokens, dtype, revision, a hash of samples of the weights (a model that was edited
            in memory keeps its name), and for "chat" the template's SHA-256 and its variables.
        """
        settings = {
            "template": self.template,
            "max_new_tokens": self._max_new_tokens,
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "revision": getattr(self._model.config, "_commit_hash", None),
            "weights_sample": _weights_sample(self._model),
        }
        if self.template == "chat":
            template = self._tokenizer.get_chat_template()
            settings["chat_template_hash"] = hashlib.sha256(template.encode()).hexdigest()
            settings["chat_template_kwargs"] = self._variables
        return settings

    def replies(
        self, conversations: Sequence[Conversation], done: Collection[int] = ()
    ) -> Iterator[tuple[int, Reply]]:
        """Answer conversations, batch by batch, the longest prompts first: what runs out of memory does so at once.

        Args:
            conversations: The conversations.
            done: Positions that are answered already; a batch is left out only where all of it is.

        Yields:
            Position and reply; of a prompt that is empty or too long for the model, the error.

        Raises:
            ConfigError: If the chat template refuses a conversation, or the tokenizer is not the model's.
            PromptError: If not one prompt can be answered.
            LoxError: If the memory does not suffice for a single prompt.
        """
        special = special_tokens(self._tokenizer)  # once: of thousands it takes long
        prompts = [
            encode(self._tokenizer, turns, self.template, self._variables, special=special) for turns in conversations
        ]
        check_vocabulary(self._model, self._tokenizer, prompts)
        answered = frozenset(done)
        refused = self._refused(prompts)
        yield from ((position, reply) for position, reply in refused.items() if position not in answered)
        readable = [position for position in range(len(prompts)) if position not in refused]
        readable.sort(key=lambda position: -len(prompts[position]))
        if not readable:
            return
        longest = len(prompts[readable[0]])

        def generate(batch: Sequence[int]) -> list[list[int]] | None:
            return None if answered.issuperset(batch) else self._generate([prompts[position] for position in batch])

        batches = run_in_batches(
            generate,
            readable,
            self.batch_size or fitting_batch_size(self._model, longest + self._max_new_tokens),
            device=self._model.device,
            one=f"one prompt of {longest} tokens and {self._max_new_tokens} new ones with '{self.name}': lower "
            "max_new_tokens, load the model in a smaller dtype, or leave the longest prompts out.",
        )
        for self.batch_size, batch, rows in batches:
            if rows is not None:
                for position, row in zip(batch, rows, strict=True):
                    yield position, self._read(prompts[position], row, special)

    def _refused(self, prompts: Sequence[list[int]]) -> dict[int, Reply]:
        """Replies to prompts that the model cannot read, by position."""
        context, new = context_length(self._model), self._max_new_tokens
        room = f", and the model's context is {context} with {new} for the answer"
        wrong = {
            position: f"the prompt has {len(prompt)} tokens{room if prompt else ''}"
            for position, prompt in enumerate(prompts)
            if not prompt or (context is not None and len(prompt) + new > context)
        }
        if wrong and len(wrong) == len(prompts):
            named = listing((f"{position}: {error}" for position, error in wrong.items()), 5)
            raise PromptError(
                f"'{self.name}' can answer none of {len(prompts)} prompts; numbers counted from 0: {named} Shorten "
                "them, or lower max_new_tokens."
            )
        return {position: Reply("", error=error) for position, error in wrong.items()}

    def _generate(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        # `generate` runs under no_grad. Under inference_mode, tensors that a model keeps for later (rotary tables,
        # unpacked weights) could never be used in training again.
        config = self._generation_config()
        with left_as_found(self._model, config):
            batch = make_batch(self._model, prompts, max_new_tokens=self._max_new_tokens, filler=config.pad_token_id)
            output = self._model.generate(**batch)
        return output[:, batch["input_ids"].shape[1] :].tolist()

    def _generation_config(self) -> "GenerationConfig":
        from transformers import GenerationConfig

        ends = self._ends()
        return GenerationConfig(
            do_sample=False,
            use_cache=True,
            max_new_tokens=self._max_new_tokens,
            eos_token_id=ends or None,
            # Masked, so any token of the model does; the tokenizer's own padding may not be one.
            pad_token_id=ends[0] if ends else 0,
        )

    def _ends(self) -> list[int]:
        """Tokens that end an answer: the model's, and the tokenizer's, which fine-tuning often changes alone."""
        ends = getattr(self._model.generation_config, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        return sorted({end for end in [*ends, self._tokenizer.eos_token_id] if end is not None})

    def _read(self, prompt: list[int], row: list[int], special: Mapping[int, str]) -> Reply:
        ends = self._ends()
        generated = list(takewhile(lambda token: token not in ends, row))
        cut_off = len(generated) == len(row)
        return read_answer(self._tokenizer, prompt, generated, cut_off=cut_off, special=special)


@contextmanager
def left_as_found(model: nn.Module, config: "GenerationConfig | None" = None) -> Iterator[None]:
    """Put a model into evaluation mode, and afterwards give every module back what it had.

    A config that is passed to `generate` is filled up from the model's own, penalties included; so it takes its place.

    Args:
        model: The model.
        config: What it generates by.
    """
    found = [vars(module) for module in model.modules()]
    before = [{name: attributes[name] for name in _TOUCHED if name in attributes} for attributes in found]
    try:
        for attributes in found:
            attributes["training"] = False
            if config is not None and "generation_config" in attributes:
                attributes["generation_config"] = config
        yield
    finally:
        for attributes, old in zip(found, before, strict=True):
            for name in _TOUCHED:
                attributes.pop(name, None)
            attributes.update(old)


def _weights_sample(model: nn.Module) -> str:
    """A sample of the weights, and which adapters are on."""
    digest = hashlib.sha256(weights_sample(model.named_parameters()).encode())
    for name, module in model.named_modules():
        if hasattr(module, "disable_adapters"):
            digest.update(f"{name} {module.disable_adapters} {module.active_adapters}".encode())
    return digest.hexdigest()
