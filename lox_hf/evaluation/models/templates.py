"""From a conversation to a prompt's token ids, and from generated ids to the answer in them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby, takewhile
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from lox_hf.errors import ConfigError
from lox_hf.evaluation.models.chat import Conversation, Reply

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
# Private-use characters around a special token's text in a turn.
_OPEN, _CLOSE = "\ue000", "\ue001"
_MARKED = re.compile(f"{_OPEN}(.*?){_CLOSE}", re.DOTALL)
_LONE_MARK = re.compile(f"[{_OPEN}{_CLOSE}]")


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
    turns = conversation if template == "none" else _marked(tokenizer, conversation)
    if template == "chat":
        text = _render_chat(tokenizer, turns, chat_template_kwargs or {})
    elif template == "alpaca":
        text = _render_alpaca(turns)
    else:
        text = "\n\n".join(turn["content"] for turn in turns)
    with _left_as_it_was(tokenizer):
        return _with_one_bos(tokenizer, _tokens(tokenizer, text))


def read_answer(
    tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[int], generated: Sequence[int], *, cut_off: bool
) -> Reply:
    """Turn what a model generated into its answer.

    Special tokens are removed, and so is a thinking part at the beginning, in any of the forms of `THINKING`: its
    markers may be special tokens, added tokens or plain text, and the prompt may have opened it already. Where a model
    writes channels (gpt-oss), the final one is the answer. What looks like a thinking part further on is left in.

    Args:
        tokenizer: The tokenizer.
        prompt: Token ids of the prompt.
        generated: Token ids after the prompt, without the one that ended them.
        cut_off: Whether the limit of new tokens ended them.

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
    final = _final_channel(tokenizer, generated)
    text = None
    if final is not None:
        opening = _open_thinking(_text(tokenizer, prompt[-_OPENING_TOKENS:]))
        text = after_thinking(opening + _text(tokenizer, final))
    if text is None and cut_off:
        error = f"the thinking part did not end within {len(generated)} new tokens: raise max_new_tokens"
        return Reply("", cut_off, error)
    return Reply((text or "").strip(), cut_off)


def after_thinking(text: str) -> str | None:
    """Return what comes after all thinking parts that a text begins with.

    Args:
        text: What a model wrote.

    Returns:
        The rest; None where a thinking part does not end.

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
        else:  # the end of a part whose opening is not in the text
            text = text[marker.end() :]
    return text


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[int, str]:
    """Return the special tokens of a tokenizer.

    Args:
        tokenizer: The tokenizer.

    Returns:
        Text by id.
    """
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


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


def _marked(tokenizer: "PreTrainedTokenizerBase", conversation: Conversation) -> Conversation:
    """The conversation with marks around every text in it that is a special token's."""
    texts = sorted(filter(str.strip, special_tokens(tokenizer).values()), key=len, reverse=True)
    special = re.compile("|".join(map(re.escape, texts)) or "(?!)")
    return [
        {**turn, "content": special.sub(rf"{_OPEN}\g<0>{_CLOSE}", _LONE_MARK.sub("", turn["content"]))}
        for turn in conversation
    ]


def _tokens(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Token ids of a text; what is marked in it gives ordinary tokens only."""
    ids: list[int] = []
    for number, piece in enumerate(_MARKED.split(text)):
        is_marked = number % 2 == 1
        options = {"split_special_tokens": True} if is_marked else {}
        found = tokenizer(_LONE_MARK.sub("", piece), add_special_tokens=False, **options)["input_ids"]
        # A vocabulary of whole words has no other spelling of a special token.
        ids += [token for token in found if token not in special_tokens(tokenizer)] if is_marked else found
    return ids


def _with_one_bos(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> list[int]:
    """The ids with one BOS in front where the text begins with any or the tokenizer itself puts one there."""
    bos = tokenizer.bos_token_id
    written = next((place for place, token in enumerate(ids) if token != bos), len(ids))
    if written or (bos is not None and tokenizer("a")["input_ids"][:1] == [bos]):
        return [bos, *ids[written:]]
    return ids


@contextmanager
def _left_as_it_was(tokenizer: "PreTrainedTokenizerBase") -> Iterator[None]:
    """Give a fast tokenizer's backend its settings back: every call of the tokenizer overwrites them."""
    if not tokenizer.is_fast:
        yield
        return
    backend = tokenizer.backend_tokenizer
    truncation, padding, encode_special = backend.truncation, backend.padding, backend.encode_special_tokens
    try:
        yield
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)
        backend.encode_special_tokens = encode_special


def _text(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """Text of the ids without special tokens, except those that mark thinking."""
    markers = {number: text for number, text in special_tokens(tokenizer).items() if _MARKER.fullmatch(text)}
    runs = groupby(ids, key=markers.get)
    return "".join(marker or _decode(tokenizer, list(run)) for marker, run in runs)


def _decode(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    return cast("str", tokenizer.decode(ids, skip_special_tokens=True))


def _open_thinking(prompt_end: str) -> str:
    """The opening that the prompt ends with, so that the answer begins inside a thinking part; else empty."""
    return next((opening for opening in THINKING if prompt_end.rstrip().endswith(opening)), "")


def _final_channel(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> Sequence[int] | None:
    """The ids of the final channel, or all of them where none are used; None where the final one has not begun."""
    specials = {text: number for number, text in special_tokens(tokenizer).items()}
    channel, message = specials.get("<|channel|>"), specials.get("<|message|>")
    if channel not in ids:
        return ids
    for start in reversed([place for place, token in enumerate(ids, start=1) if token == channel]):
        name = list(takewhile(lambda token: token != message, ids[start:]))
        content = ids[start + len(name) + 1 :]
        if content and _decode(tokenizer, name).strip() == "final":
            return list(takewhile(lambda token: token not in specials.values(), content))
    return None
