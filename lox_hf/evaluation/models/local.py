"""A model in this process as a chat model: greedy, in batches, and left as it was found."""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lox_hf.errors import ConfigError, LoxError, PromptError, UnsupportedModelError
from lox_hf.evaluation.models.batch import learns_prompts, make_batch
from lox_hf.evaluation.models.batch_size import fitting_batch_size
from lox_hf.evaluation.models.chat import Conversation, Reply
from lox_hf.evaluation.models.templates import choose_template, encode, read_answer

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
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
            adapter that learnt tokens to put in front (prompt tuning, prefix tuning) answers one prompt at a time.
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
        _must_generate(model)
        if tokenizer is None:
            raise ConfigError(f"{type(model).__name__} needs its tokenizer: pass it as the second argument.")
        if max_new_tokens < 1 or (batch_size is not None and batch_size < 1):
            raise ConfigError(
                f"max_new_tokens and batch_size must be at least 1, got {max_new_tokens} and {batch_size}."
            )
        # Compiled or not, `generate` runs the model inside, so everything else does too.
        self._model: Any = getattr(model, "_orig_mod", model)
        self._tokenizer = tokenizer
        self._variables = dict(chat_template_kwargs or {})
        self._max_new_tokens = max_new_tokens
        self.name = getattr(self._model.config, "_name_or_path", "") or type(self._model).__name__
        self.template = choose_template(tokenizer, template)
        self.batch_size = 1 if learns_prompts(self._model) else batch_size

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
            Position and reply.

        Raises:
            ConfigError: If the chat template refuses a conversation, or the tokenizer is not the model's.
            PromptError: If prompts are empty or too long for the model; all of them are named, and nothing is
                generated.
            LoxError: If the memory does not suffice for a single prompt.
        """
        prompts = [encode(self._tokenizer, turns, self.template, self._variables) for turns in conversations]
        self._check(prompts)
        answered = frozenset(done)
        order = sorted(range(len(prompts)), key=lambda position: -len(prompts[position]))
        start = 0
        while start < len(order):
            if self.batch_size is None:
                longest = len(prompts[order[0]]) + self._max_new_tokens
                self.batch_size = fitting_batch_size(self._model, longest)
            batch = order[start : start + self.batch_size]
            if not answered.issuperset(batch):
                rows = self._generate_if_it_fits([prompts[position] for position in batch])
                if rows is None:
                    self._halve(len(batch), len(prompts[batch[0]]))
                    continue
                for position, row in zip(batch, rows, strict=True):
                    yield position, self._read(prompts[position], row)
            start += len(batch)

    def _check(self, prompts: Sequence[list[int]]) -> None:
        """Refuse what the model cannot read, before anything is generated."""
        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        largest = max(map(max, filter(None, prompts)), default=0)
        if largest >= vocabulary:
            raise ConfigError(
                f"The tokenizer '{self._tokenizer.name_or_path}' does not belong to '{self.name}': it gives token "
                f"{largest}, and the model has {vocabulary}. Load both from the same place."
            )
        empty = [str(position) for position, prompt in enumerate(prompts) if not prompt]
        if empty:
            raise PromptError(f"Prompts without a token: numbers {', '.join(empty)}, counted from 0. Leave them out.")
        context = getattr(self._model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        room = float("inf") if context is None else context - self._max_new_tokens
        long = [f"{position} ({len(prompt)})" for position, prompt in enumerate(prompts) if len(prompt) > room]
        if long:
            raise PromptError(
                f"{len(long)} of {len(prompts)} prompts do not fit the context of '{self.name}', {context} tokens "
                f"with {self._max_new_tokens} for the answer: numbers (tokens) {', '.join(long)}, counted from 0. "
                "Shorten them, leave them out, or lower max_new_tokens."
            )

    def _generate_if_it_fits(self, prompts: Sequence[list[int]]) -> list[list[int]] | None:
        """Return the new tokens of every prompt, None where memory ran out; by then the attempt's memory is free."""
        try:
            return self._generate(prompts)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
        if self._model.device.type != "cpu":
            torch.get_device_module(self._model.device).empty_cache()
        return None

    def _halve(self, batch_size: int, longest: int) -> None:
        if batch_size == 1:
            raise LoxError(
                f"The memory of {self._model.device} does not suffice for one prompt of {longest} tokens and "
                f"{self._max_new_tokens} new ones with '{self.name}': lower max_new_tokens, load the model in a "
                "smaller dtype, or leave the longest prompts out."
            )
        self.batch_size = batch_size // 2

    def _generate(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        # `generate` runs under no_grad. Under inference_mode, tensors that a model keeps for later (rotary tables,
        # unpacked weights) could never be used in training again.
        config = self._generation_config()
        with _left_as_found(self._model, config):
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
        ends = self._model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return sorted({end for end in [*ends, self._tokenizer.eos_token_id] if end is not None})

    def _read(self, prompt: list[int], row: list[int]) -> Reply:
        ends = self._ends()
        generated = list(takewhile(lambda token: token not in ends, row))
        return read_answer(self._tokenizer, prompt, generated, cut_off=len(generated) == len(row))


def _must_generate(model: nn.Module) -> None:
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} ({config.model_type}) is an encoder-decoder; only decoder-only models, which "
            "continue a prompt, can be evaluated."
        )
    if not callable(getattr(model, "generate", None)):
        raise UnsupportedModelError(f"{type(model).__name__} cannot generate text: load it with AutoModelForCausalLM.")


@contextmanager
def _left_as_found(model: nn.Module, config: "GenerationConfig") -> Iterator[None]:
    """Set a model up for generating by `config` alone, and give every module back what it had.

    A config that is passed to `generate` is filled up from the model's own, penalties included; so it takes its place.
    """
    found = [vars(module) for module in model.modules()]
    before = [{name: attributes[name] for name in _TOUCHED if name in attributes} for attributes in found]
    try:
        for attributes in found:
            attributes["training"] = False
            if "generation_config" in attributes:
                attributes["generation_config"] = config
        yield
    finally:
        for attributes, old in zip(found, before, strict=True):
            for name in _TOUCHED:
                attributes.pop(name, None)
            attributes.update(old)


def _is_out_of_memory(error: BaseException) -> bool:
    message = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in message for text in _OUT_OF_MEMORY)


def _weights_sample(model: nn.Module) -> str:
    """SHA-256 of up to 64 numbers of every floating-point weight, and of which adapters are on."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not weight.is_meta:
            step = max(1, -(-weight.numel() // 64))
            digest.update(f"{name} {weight.detach().flatten()[::step].tolist()}".encode())
    for name, module in model.named_modules():
        if hasattr(module, "disable_adapters"):
            digest.update(f"{name} {module.disable_adapters} {module.active_adapters}".encode())
    return digest.hexdigest()
