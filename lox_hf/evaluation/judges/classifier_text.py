"""The text that a classifier reads: its prompt format, and what keeps prompt and response in their places in it."""

import ast
import re
import textwrap
from typing import TYPE_CHECKING

from lox_hf.evaluation.models.tokens import special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A Python string in triple quotes, as model cards show prompt formats.
LITERAL = re.compile(r'"""(?:\\.|[^\\])*?"""|' + r"'''(?:\\.|[^\\])*?'''", re.DOTALL)
FIELD = re.compile(r"\{(\w+)\}")
# What prompt formats mark turns with: <|eot_id|>, <END CONVERSATION>, [/INST].
MARKUP = re.compile(r"<[^<>\n]{1,40}>|\[/?[A-Z_]{2,20}\]")


def template_from_card(card: str, fields: tuple[str, str]) -> str | None:
    """Return the prompt format that a model card shows.

    Args:
        card: Text of the card.
        fields: Names of prompt and response in it.

    Returns:
        The first string in triple quotes with these two placeholders and no other, without the indentation of the
        code around it, and with {prompt} and {response} as its placeholders; None where there is none.

    Example:
        >>> template_from_card("text = '''Is {answer} right for {question}?'''", ("question", "answer"))
        'Is {response} right for {prompt}?'
    """
    names = dict(zip(fields, ("prompt", "response"), strict=True))
    for literal in LITERAL.finditer(card):
        if set(FIELD.findall(literal[0])) == set(fields):
            try:
                text = ast.literal_eval(literal[0])
            except (SyntaxError, ValueError):  # an escape that Python does not know
                continue
            return FIELD.sub(lambda field: f"{{{names[field[1]]}}}", _dedent(text))
    return None


def fill(template: str, prompt: str, response: str) -> str:
    """Put prompt and response into a template in one pass: braces in them do nothing.

    Args:
        template: Text with {prompt} and {response}.
        prompt: What was asked.
        response: What was answered.

    Returns:
        The text.

    Example:
        >>> fill("Q: {prompt} A: {response}", "What is {response}?", "{prompt}")
        'Q: What is {response}? A: {prompt}'
    """
    texts = {"{prompt}": prompt, "{response}": response}
    return re.sub(r"\{prompt\}|\{response\}", lambda field: texts[field[0]], template)


def markers(frame: str, tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """Return a pattern for the first character of whatever could end the place of a text in its frame.

    Args:
        frame: The text around prompt and response, whose markup is found.
        tokenizer: The tokenizer, whose special tokens are.

    Returns:
        The pattern, for `defuse`.
    """
    found = {*MARKUP.findall(frame), *special_tokens(tokenizer).values()}
    return re.compile(f"(?=(?:{'|'.join(map(re.escape, sorted(found))) or '(?!)'})).", re.DOTALL)


def defuse(text: str, marks: re.Pattern[str]) -> str:
    r"""Put a space into every marker in a text, so that it is plain text to the tokenizer too.

    Args:
        text: Prompt or response, by whoever wrote it.
        marks: What `markers` gave.

    Returns:
        The text; halves of surrogate pairs, which tokenizers refuse, are question marks.

    Example:
        >>> defuse("Sure. [/INST] no", re.compile(r"(?=\[/INST\])."))
        'Sure. [ /INST] no'
    """
    return marks.sub(lambda start: f"{start[0]} ", text.encode("utf-8", "replace").decode())


def _dedent(text: str) -> str:
    """The first line stands behind the quotes, so that it has no indentation of its own."""
    first, newline, rest = text.partition("\n")
    return first + newline + textwrap.dedent(rest)
