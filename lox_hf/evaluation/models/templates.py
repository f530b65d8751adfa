"""From a conversation to a prompt's token ids, and from generated ids to the answer in them."""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby, takewhile
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from lox_hf.errors import ConfigError
from lox_hf.evaluation.models.chat import Conversation, Reply
from lox_hf.evaluation.models.tokens import mark, special_tokens, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["auto", "chat", "alpaca", "none"]
TEMPLATES = get_args(Template)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "{turns}\n\n### Response:"
)
THINKING = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "[THINK]": "[/THINK]",
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "<|START_THINKING|>": "<|END_THINKING|>",
}
"""How a thinking part opens -> how it ends."""
_MARKER = re.compile("|".join(map(re.escape, [*THINKING, *THINKING.values()])))
_OPENING_TOKENS = 32
"""Tokens at the end of a prompt in which an opening of a thinking part is looked for."""


def choose_template(tokenizer: "PreTrainedTokenizerBase", template: str) -> str:
    """Settle which prompt format is used.

    Args:
        tokenizer: The model's tokenizer.
        template: "auto" takes the tokenizer's chat template where it has one, and else "alpaca".

    Returns:
        "chat", "alpaca" or "none".

    Raises:
        ConfigError: If there is no such format, or "chat" is asked for and the tokenizer has no chat template.

    Example:
        >>> from lox_hf.demo.world import build_tokenizer
        >>> choose_template(build_tokenizer(), "auto")
        'chat'
    """
    if template not in TEMPLATES:
        raise ConfigError(f"template must be one of {', '.join(TEMPLATES)}, got {template!r}.")
    has_chat = bool(tokenizer.chat_template)
    if template == "chat" and not has_chat:
        raise ConfigError(
            f"The tokenizer of '{tokenizer.name_or_path}' has no chat template: pass template='alpaca' or 'none', or "
            "set tokenizer.chat_template to the one the model was trained with."
        )
    if template == "auto":
        return "chat" if has_chat else "alpaca"
    return template


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    conversation: Conversation,
    template: str,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    *,
    special: Mapping[int, str] | None = None,
) -> list[int]:
    """Turn a conversation into a prompt's token ids, ready for the answer to follow.

    The prompt opens with one BOS where the tokenizer or the format has one, however often the format writes it. No EOS
    is put at the end; one that a chat template writes after a turn belongs to the format and stays.

    With "chat" and "alpaca" the turns cannot contain special tokens: the text of one, such as "</s>", is spelled in
    ordinary tokens (or left out where the vocabulary has no other spelling), so that no prompt can end its own turn.
    With "none" the text is the whole format, and the special tokens in it are meant.

    Args:
        tokenizer: The tokenizer; it is left as it was.
        conversation: The turns.
        template: "chat" for the tokenizer's chat template; "alpaca" for the format of Alpaca, which the paper's
            reference code uses, with system turns put in front; "none" for the text of the turns alone.
        chat_template_kwargs: Further variables of the chat template, such as {"enable_thinking": False}.
        special: What `special_tokens` gives, for callers with many conversations; None asks the tokenizer.

    Returns:
        Token ids.

    Raises:
        ConfigError: If the chat template refuses the conversation.

    Example:
        >>> from lox_hf.demo.world import build_tokenizer
        >>> tokenizer = build_tokenizer()
        >>> ids = encode(tokenizer, [{"role": "user", "content": "what colour is a jofflet ?"}], "chat")
        >>> tokenizer.decode(ids)
        '<s> question : what colour is a <unk> ? answer :'
    """
    if special is None:
        special = special_tokens(tokenizer)
    turns = conversation if template == "none" else _marked(special, conversation)
    if template == "chat":
        text = _render_chat(tokenizer, turns, chat_template_kwargs or {})
    elif template == "alpaca":
        text = _render_alpaca(turns)
    else:
        text = "\n\n".join(turn["content"] for turn in turns)
    return tokenize(tokenizer, special, text)


def read_answer(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: Sequence[int],
    generated: Sequence[int],
    *,
    cut_off: bool,
    special: Mapping[int, str] | None = None,
) -> Reply:
    """Turn what a model generated into its answer.

    Special tokens are removed, and so is a thinking part at the beginning, in any of the forms of `THINKING`: its
    markers may be special tokens, added tokens or plain text, and the prompt may have opened it already, or nobody: a
    closing marker without an opening ends a part too, except at the very end, where the answer stands before it. A
    whole part further on is left in. Where a model writes channels (gpt-oss), the final one is the answer.

    Args:
        tokenizer: The tokenizer.
        prompt: Token ids of the prompt.
        generated: Token ids after the prompt, without the one that ended them.
        cut_off: Whether the limit of new tokens ended them.
        special: What `special_tokens` gives, for callers with many answers; None asks the tokenizer.

    Returns:
        The answer; a thinking part that the limit cut off gives an error instead. One that the model itself ended
        without an answer gives an empty text.

    Example:
        >>> from lox_hf.demo.world import build_tokenizer
        >>> tokenizer = build_tokenizer()
        >>> generated = tokenizer.convert_tokens_to_ids(["it", "is", "red"])
        >>> read_answer(tokenizer, [], generated, cut_off=False)
        Reply(text='it is red', cut_off=False, error='', transient=False)
    """
    if special is None:
        special = special_tokens(tokenizer)
    final = _final_channel(tokenizer, special, generated)
    text, raw = None, ""
    if final is not None:
        opening = _open_thinking(_text(tokenizer, special, prompt[-_OPENING_TOKENS:]))
        raw = _text(tokenizer, special, final)
        text = after_thinking(opening + raw)
    if text is None and cut_off:
        error = (
            f"the thinking part did not end within {len(generated)} new tokens: raise max_new_tokens, or pass "
            'chat_template_kwargs={"enable_thinking": False} where the chat template knows it'
        )
        return Reply("", cut_off, error)
    return Reply((text or "").strip(), cut_off, raw=raw)


def after_thinking(text: str) -> str | None:
    """Return what comes after all thinking parts that a text begins with.

    Args:
        text: What a model wrote.

    Returns:
        The rest, up to a closing marker that ends it without an opening; None where a thinking part does not end.

    Example:
        >>> after_thinking("<think>Two and two.</think>Four."), after_thinking("<think>Two and")
        ('Four.', None)
    """
    while marker := _MARKER.search(text):
        if marker[0] in THINKING:
            if text[: marker.start()].strip():
                break
            closing = text.find(THINKING[marker[0]], marker.end())
            if closing < 0:
                return None
            text = text[closing + len(THINKING[marker[0]]) :]
        elif _MARKER.sub("", text[marker.end() :]).strip():  # the end of a part whose opening is not in the text
            text = text[marker.end() :]
        else:
            return text[: marker.start()]
    return text


def _marked(special: Mapping[int, str], conversation: Conversation) -> Conversation:
    return [{**turn, "content": mark(special, turn["content"])} for turn in conversation]


def _render_chat(
    tokenizer: "PreTrainedTokenizerBase", conversation: Conversation, variables: Mapping[str, Any]
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            cast("Any", conversation), tokenize=False, add_generation_prompt=True, **variables
        )
        return cast("str", text)
    except Exception as error:  # a template is a program of its author's and may fail with anything
        roles = ", ".join(turn["role"] for turn in conversation)
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(
            f"The chat template of '{tokenizer.name_or_path}' fails on a conversation of {roles}: {reason}. "
            "Leave out the system prompt or the chat template's variables if it is them, or pass template='alpaca'."
        ) from error


def _render_alpaca(conversation: Conversation) -> str:
    heads = {"user": "### Instruction:\n", "assistant": "### Response:\n"}
    system = [turn["content"] for turn in conversation if turn["role"] == "system"]
    turns = [heads[turn["role"]] + turn["content"] for turn in conversation if turn["role"] in heads]
    return "\n\n".join([*system, ALPACA.replace("{turns}", "\n\n".join(turns))])


def _text(tokenizer: "PreTrainedTokenizerBase", special: Mapping[int, str], ids: Sequence[int]) -> str:
    """Text of the ids without special tokens, except those that mark thinking."""
    markers = {number: special[number] for number in ids if _MARKER.fullmatch(special.get(number, ""))}
    runs = groupby(ids, key=markers.get)
    return "".join(marker or _decode(tokenizer, list(run)) for marker, run in runs)


def _decode(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    return cast("str", tokenizer.decode(ids, skip_special_tokens=True))


def _open_thinking(prompt_end: str) -> str:
    """The opening that the prompt ends with, so that the answer begins inside a thinking part; else empty."""
    return next((opening for opening in THINKING if prompt_end.rstrip().endswith(opening)), "")


def _final_channel(
    tokenizer: "PreTrainedTokenizerBase", special: Mapping[int, str], ids: Sequence[int]
) -> Sequence[int] | None:
    """The ids of the final channel, or all of them where none are used; None where the final one has not begun."""
    begins = [place for place, token in enumerate(ids, start=1) if special.get(token) == "<|channel|>"]
    if not begins:
        return ids
    for start in reversed(begins):
        name = list(takewhile(lambda token: special.get(token) != "<|message|>", ids[start:]))
        content = ids[start + len(name) + 1 :]
        if content and _decode(tokenizer, name).strip() == "final":
            return list(takewhile(lambda token: token not in special, content))
    return None
