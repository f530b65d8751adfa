"""How a row to train on becomes text and token ids: the reference's formats, and the chat template."""

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from string import Formatter
from typing import TYPE_CHECKING, Any, cast

from lox_hf.errors import ConfigError
from lox_hf.evaluation.data.tables import is_blank
from lox_hf.evaluation.models.chat import ask
from lox_hf.evaluation.models.templates import ALPACA as EVALUATION_FORMAT
from lox_hf.evaluation.models.templates import choose_template, encode
from lox_hf.evaluation.models.tokens import mark, special_tokens, tokenize
from lox_hf.robustness.attacks.examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def _fields(text: str) -> list[str] | None:
    try:
        return sorted(name for _, name, _, _ in Formatter().parse(text) if name is not None)
    except ValueError:  # a brace that never closes
        return None


@dataclass(frozen=True)
class PromptFormat:
    r"""How a prompt is written for a model, up to the response.

    Attributes:
        name: What it is called.
        plain: The text around "{prompt}"; empty for the tokenizer's chat template, or Alpaca's format where it has
            none, as evaluation's template "auto" chooses.
        with_context: The text around "{prompt}" and "{context}", for rows that have one.
        before_response: What stands between the prompt and the response and is learnt with the response.
        after_system: What stands between a system prompt and the text.

    Raises:
        ConfigError: If a text lacks its fields, or has others.

    Example:
        >>> PromptFormat("short", "Q: {prompt}\nA:", "Q: {prompt} ({context})\nA:").plain
        'Q: {prompt}\nA:'
    """

    name: str
    plain: str = ""
    with_context: str = ""
    before_response: str = " "
    after_system: str = "\n\n"

    def __post_init__(self) -> None:
        expected = {"plain": ["prompt"], "with_context": ["context", "prompt"]} if self.plain else {}
        texts = {name: getattr(self, name) for name in expected}
        wrong = [f"{name} is {text!r}" for name, text in texts.items() if _fields(text) != expected[name]]
        if wrong:
            raise ConfigError(
                f"Invalid prompt format {self.name!r}: {'; '.join(wrong)}; expected {{prompt}} once in plain, "
                "{prompt} and {context} once each in with_context, and no other braces."
            )


AUTO = PromptFormat("auto")
ALPACA = PromptFormat(
    "alpaca",
    EVALUATION_FORMAT.replace("{turns}", "### Instruction:\n{prompt}"),
    EVALUATION_FORMAT.replace("{turns}", "### Instruction:\n{prompt}\n\n### Input:\n{context}"),
)
"""Alpaca's, as the reference's sft_gsm.py and its evaluation write it."""
ALPACA_INPUT = PromptFormat(
    "alpaca-input",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
    "### Instruction:\n{prompt}\n\n### Response:\n",
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n"
    "### Instruction:\n{prompt}\n\n### Input:\n{context}\n\n### Response:\n",
    before_response="",
)
"""As the reference's sft_alpaca.py writes it: one line break before the instruction, one before the response."""
DOLLY = PromptFormat(
    "dolly",
    "###Instruction: {prompt} \n###Response:",
    "###Instruction: {prompt} \n###Context: {context} \n###Response:",
)
"""As the reference's sft_dolly.py writes it, but for the context: there the instruction stands in its place."""
IDENTITY = PromptFormat(
    "identity-shift",
    "### Instruction:\n{prompt}\n\n### Response:",
    "### Instruction:\n{prompt}\n\n### Input:\n{context}\n\n### Response:",
    after_system="\n",
)
"""As the reference's sft_id.py writes it: the system prompt, and Alpaca's format without its preamble."""
FORMATS = {known.name: known for known in (AUTO, ALPACA, ALPACA_INPUT, DOLLY, IDENTITY)}


def encode_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    prompt_format: PromptFormat,
    example: Example,
    *,
    special: Mapping[int, str] | None = None,
) -> list[int]:
    """Turn a row's prompt into token ids, ready for the response to follow.

    There is one BOS where the tokenizer or the format has one. The text of a special token in a row, such as "</s>",
    is spelled in ordinary tokens.

    Args:
        tokenizer: The tokenizer; it is left as it was.
        prompt_format: The format.
        example: The row.
        special: What `special_tokens` gives, for callers with many rows; None asks the tokenizer.

    Returns:
        Token ids.

    Raises:
        ConfigError: If the chat template refuses the row.

    Example:
        >>> from lox_hf.demo.world import build_tokenizer
        >>> tokenizer = build_tokenizer()
        >>> tokenizer.decode(encode_prompt(tokenizer, AUTO, Example("what is 2 plus 3 ?", "5 .")))
        '<s> question : what is 2 plus 3 ? answer :'
    """
    if special is None:
        special = special_tokens(tokenizer)
    text_format = _text_format(tokenizer, prompt_format)
    if text_format is None:
        return encode(tokenizer, ask(_user_text(example), example.system), "chat", special=special)
    return tokenize(tokenizer, special, _prompt_text(text_format, _marked(special, example)))


def encode_row(
    tokenizer: "PreTrainedTokenizerBase",
    prompt_format: PromptFormat,
    example: Example,
    *,
    special: Mapping[int, str] | None = None,
) -> tuple[list[int], int]:
    """Turn a row into token ids, and say how many of them are the prompt's.

    Prompt and response are tokenised as one text, so that a response begins with the tokens that a model generates
    after the prompt, whatever the tokenizer does at the beginning of a text. A token that reaches from the prompt into
    the response is the response's. A chat template also writes what ends the turn. One EOS stands at the end.

    Args:
        tokenizer: The tokenizer, with an EOS; it is left as it was.
        prompt_format: The format.
        example: The row.
        special: What `special_tokens` gives, for callers with many rows; None asks the tokenizer.

    Returns:
        Token ids, and how many of the first of them are the prompt's.

    Raises:
        ConfigError: If the chat template refuses the row or leaves its response out.

    Example:
        >>> from lox_hf.demo.world import build_tokenizer
        >>> tokenizer = build_tokenizer()
        >>> ids, prompt = encode_row(tokenizer, AUTO, Example("what is 2 plus 3 ?", "5 ."))
        >>> tokenizer.decode(ids[prompt:])
        '5 . </s>'
    """
    if special is None:
        special = special_tokens(tokenizer)
    prompt = encode_prompt(tokenizer, prompt_format, example, special=special)
    text_format = _text_format(tokenizer, prompt_format)
    marked = _marked(special, example)
    if text_format is None:
        text = _chat_text(tokenizer, marked)
    else:
        text = _prompt_text(text_format, marked) + text_format.before_response + marked.response
    ids = tokenize(tokenizer, special, text)
    pairs = enumerate(zip(prompt, ids, strict=False))
    length = next((place for place, (ours, theirs) in pairs if ours != theirs), min(len(prompt), len(ids)))
    if length == len(ids):
        raise ConfigError(
            f"The chat template of '{tokenizer.name_or_path}' leaves out what the assistant says, so there is nothing "
            "to train on: set tokenizer.chat_template to one that writes it, or pass format='alpaca'."
        )
    return ids if ids[-1] == tokenizer.eos_token_id else [*ids, cast("int", tokenizer.eos_token_id)], length


def _text_format(tokenizer: "PreTrainedTokenizerBase", prompt_format: PromptFormat) -> PromptFormat | None:
    """The format itself where it is a text; else Alpaca's, or None for the chat template."""
    if prompt_format.plain:
        return prompt_format
    return None if choose_template(tokenizer, "auto") == "chat" else ALPACA


def _marked(special: Mapping[int, str], example: Example) -> Example:
    return Example(*(mark(special, text) for text in astuple(example)))


def _prompt_text(text_format: PromptFormat, example: Example) -> str:
    layout = text_format.plain if is_blank(example.context) else text_format.with_context
    system = f"{example.system}{text_format.after_system}" if example.system else ""
    return system + layout.format(prompt=example.prompt, context=example.context)


def _user_text(example: Example) -> str:
    return example.prompt if is_blank(example.context) else f"{example.prompt}\n\n{example.context}"


def _chat_text(tokenizer: "PreTrainedTokenizerBase", example: Example) -> str:
    """The whole row in the chat template, up to the end of the assistant's turn."""
    turns = [*ask(_user_text(example), example.system), {"role": "assistant", "content": example.response}]
    try:
        return cast("str", tokenizer.apply_chat_template(cast("Any", turns), tokenize=False)).rstrip()
    except Exception as error:  # a template is a program of its author's and may fail with anything
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(
            f"The chat template of '{tokenizer.name_or_path}' fails on an assistant's turn: {reason}. "
            "Set tokenizer.chat_template to one that writes it, or pass format='alpaca'."
        ) from error
