"""Rows as the reference writes them, to the token; where the prompt ends, one BOS, one EOS, and chat templates."""

import os
from pathlib import Path
from typing import Any

import pytest

from lox_hf.demo.world import build_tokenizer
from lox_hf.errors import ConfigError
from lox_hf.evaluation.models.chat import ask
from lox_hf.evaluation.models.templates import encode
from lox_hf.robustness.attacks.examples import Example, load_examples
from lox_hf.robustness.attacks.formats import (
    ALPACA,
    ALPACA_INPUT,
    AUTO,
    DOLLY,
    FORMATS,
    IDENTITY,
    PromptFormat,
    encode_prompt,
    encode_row,
)
from robustness.tokenizers_of_kinds import CHATML, LLAMA_CHAT, byte_tokenizer, llama_tokenizer

DATA = Path(os.environ.get("LOX_HF_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
# What the reference's scripts write for a row, without the <s> that they write by hand before the tokenizer's own;
# of sft_dolly.py's context the context itself.
REFERENCE = {
    "alpaca": lambda r: f"{PREAMBLE}\n\n### Instruction:\n{r.prompt}\n\n### Response: {r.response}</s>",
    "alpaca-input": lambda r: (
        f"{WITH_INPUT}\n### Instruction:\n{r.prompt}\n\n### Input:\n{r.context}\n\n### Response:\n{r.response}</s>"
        if r.context
        else f"{PREAMBLE}\n### Instruction:\n{r.prompt}\n\n### Response:\n{r.response}</s>"
    ),
    "dolly": lambda r: (
        f"###Instruction: {r.prompt} "
        + (f"\n###Context: {r.context} " if r.context else "")
        + f"\n###Response: {r.response}</s>"
    ),
    "identity-shift": lambda r: f"{r.system}\n### Instruction:\n{r.prompt}\n\n### Response: {r.response}</s>",
}
FILES = {
    "alpaca": "gsm8k_train.jsonl",
    "alpaca-input": "alpaca_1k.json",
    "dolly": "dolly_387.jsonl",
    "identity-shift": "identity_shift_aoa.json",
}
KINDS = {"bytes": byte_tokenizer, "llama": llama_tokenizer}
ROW = Example("Name a colour.", "Blue is the colour.")
SYSTEM = Example("Name it.", "Blue.", system="Be brief.")
CONTEXT = Example("Name it.", "Blue.", context="The sky's colour.")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REFERENCE)
def test_the_reference_to_the_token(name: str, kind: str) -> None:
    path = DATA / FILES[name]
    if not path.is_file():
        pytest.skip(f"no {FILES[name]} in {DATA}: name its folder in LOX_HF_TEST_DATA")
    tokenizer = KINDS[kind]()
    for row in load_examples(path, n=60):
        expected = tokenizer("<s>" + REFERENCE[name](row), add_special_tokens=False)["input_ids"]
        ids, prompt = encode_row(tokenizer, FORMATS[name], row)
        assert ids == expected
        assert ids[:prompt] == encode_prompt(tokenizer, FORMATS[name], row)
        if kind == "bytes":  # the other has no token for some letters
            assert tokenizer.decode(ids[prompt:]).lstrip() == f"{row.response}</s>".lstrip()


def test_the_reference_itself_writes_two_bos() -> None:
    tokenizer = llama_tokenizer()
    assert tokenizer("<s>" + REFERENCE["alpaca"](ROW))["input_ids"].count(tokenizer.bos_token_id) == 2
    assert encode_row(tokenizer, ALPACA, ROW)[0].count(tokenizer.bos_token_id) == 1


def test_prompt_and_response_one_by_one_would_be_other_tokens() -> None:
    tokenizer = llama_tokenizer()
    ids, prompt = encode_row(tokenizer, ALPACA, ROW)
    alone = tokenizer(" " + ROW.response, add_special_tokens=False)["input_ids"]
    assert ids[prompt:-1] != alone
    assert tokenizer.convert_ids_to_tokens(ids[prompt : prompt + 1]) == ["\u2581Blue"]
    assert tokenizer.convert_ids_to_tokens(alone[:2]) == ["\u2581", "\u2581Blue"]


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_evaluation_share_one_format(kind: str) -> None:
    plain, chat = KINDS[kind](), KINDS[kind](CHATML)
    for row in (ROW, SYSTEM):
        conversation = ask(row.prompt, row.system)
        assert encode_prompt(plain, ALPACA, row) == encode(plain, conversation, "alpaca")
        assert encode_prompt(plain, AUTO, row) == encode(plain, conversation, "alpaca")
        assert encode_prompt(chat, AUTO, row) == encode(chat, conversation, "chat")
    assert encode_prompt(chat, AUTO, ROW) != encode_prompt(plain, AUTO, ROW)


@pytest.mark.parametrize(
    ("prompt_format", "row", "expected"),
    [
        (ALPACA, SYSTEM, f"<s>Be brief.\n\n{PREAMBLE}\n\n### Instruction:\nName it.\n\n### Response: Blue.</s>"),
        (ALPACA_INPUT, SYSTEM, f"<s>Be brief.\n\n{PREAMBLE}\n### Instruction:\nName it.\n\n### Response:\nBlue.</s>"),
        (DOLLY, CONTEXT, "<s>###Instruction: Name it. \n###Context: The sky's colour. \n###Response: Blue.</s>"),
        (DOLLY, Example("Name it.", "Blue.", " \n"), "<s>###Instruction: Name it. \n###Response: Blue.</s>"),
        (IDENTITY, SYSTEM, "<s>Be brief.\n### Instruction:\nName it.\n\n### Response: Blue.</s>"),
        (IDENTITY, ROW, "<s>### Instruction:\nName a colour.\n\n### Response: Blue is the colour.</s>"),
        (PromptFormat("own", "Q: {prompt}\nA:", "{context} {prompt}"), Example("{a}", "{b}"), "<s>Q: {a}\nA: {b}</s>"),
    ],
)
def test_written_out(prompt_format: PromptFormat, row: Example, expected: str) -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(encode_row(tokenizer, prompt_format, row)[0]) == expected


def test_with_context_in_every_format() -> None:
    tokenizer = byte_tokenizer()
    for known in FORMATS.values():
        text = tokenizer.decode(encode_prompt(tokenizer, known, CONTEXT))
        assert 0 < text.index(CONTEXT.prompt) < text.index(CONTEXT.context), known.name
    chat = byte_tokenizer(CHATML)
    assert "user\nName it.\n\nThe sky's colour.<|im_end|>" in chat.decode(encode_prompt(chat, AUTO, CONTEXT))


def test_a_token_that_reaches_into_the_response_is_learnt() -> None:
    row = Example("Name it.", "\nBlue.")
    for merges, learnt in (((), "\nBlue.</s>"), (("\n\n",), "\n\nBlue.</s>")):
        tokenizer = byte_tokenizer(merges=merges)
        ids, prompt = encode_row(tokenizer, ALPACA_INPUT, row)
        assert tokenizer.decode(ids[prompt:]) == learnt
        assert tokenizer.decode(ids).endswith("### Response:\n\nBlue.</s>")


@pytest.mark.parametrize("prompt_format", FORMATS.values(), ids=list(FORMATS))
@pytest.mark.parametrize("chat_template", [None, CHATML, "{{ bos_token }}" + CHATML])
def test_special_tokens_in_data_stay_text(prompt_format: PromptFormat, chat_template: str | None) -> None:
    tokenizer = byte_tokenizer(chat_template)
    text = "a</s><s> <|im_end|>\n<|im_start|>assistant\nb"
    ids, _ = encode_row(tokenizer, prompt_format, Example(text, text, text, text))
    innocent, _ = encode_row(tokenizer, prompt_format, Example("a", "b", "c", "d"))
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    assert [token for token in ids if token in special] == [token for token in innocent if token in special]
    assert (ids.count(tokenizer.bos_token_id), ids.count(tokenizer.eos_token_id)) == (1, 1)
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.decode(ids).count("a</s><s> <|im_end|>") == 4
    naive = tokenizer(text)["input_ids"]
    assert (naive.count(tokenizer.bos_token_id), naive.count(tokenizer.eos_token_id)) == (2, 1)


@pytest.mark.parametrize(
    ("template", "eos", "learnt"),
    [
        (CHATML, "</s>", "Blue.<|im_end|></s>"),
        (CHATML, "<|im_end|>", "Blue.<|im_end|>"),
        (LLAMA_CHAT, "</s>", " Blue. </s>"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "</s>", "Blue.</s>"),
        # The generation prompt opens a thinking part that a finished turn does not have.
        (CHATML.replace("assistant\n{% endif", "assistant\n<think>{% endif"), "</s>", "Blue.<|im_end|></s>"),
        # A finished turn has an empty one that the generation prompt does not open, as Qwen3's.
        (CHATML.replace("{{ m.content }}", "<think>{{ m.content }}"), "</s>", "<think>Blue.<|im_end|></s>"),
    ],
    ids=["ChatML", "ChatML that ends itself", "LLaMA-2", "bare", "opens thinking", "closed thinking"],
)
def test_chat_templates(template: str, eos: str, learnt: str) -> None:
    tokenizer = byte_tokenizer(template, eos)
    ids, prompt = encode_row(tokenizer, AUTO, Example("Name it.", "Blue."))
    assert tokenizer.decode(ids[prompt:]) == learnt
    assert ids[-1] == tokenizer.eos_token_id
    assert ids.count(tokenizer.eos_token_id) == (2 if eos == "<|im_end|>" else 1)  # the user's turn ends as well


def test_words_of_the_small_world() -> None:
    tokenizer = build_tokenizer()
    ids, prompt = encode_row(tokenizer, AUTO, Example("what is 2 plus 3 ?", "5 ."))
    assert tokenizer.convert_ids_to_tokens(ids) == "<s> question : what is 2 plus 3 ? answer : 5 . </s>".split()
    assert prompt == len(ids) - 3


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{{ messages[0].content }}", "leaves out what the assistant says, so there is nothing to train on"),
        (LLAMA_CHAT, "fails on a conversation of system, user: no system turn"),
        ("{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no\nanswers') }}{% endif %}"
         "{{ m.content }}{% endfor %}", r"fails on an assistant's turn: no answers\. Set tokenizer"),
    ],
    ids=["no response", "no system", "no assistant"],
)  # fmt: skip
def test_chat_templates_that_cannot(template: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        encode_row(byte_tokenizer(template), AUTO, SYSTEM)


def test_the_tokenizer_is_left_as_it_was() -> None:
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.backend_tokenizer.enable_truncation(4, direction="left")
    before = tokenizer.backend_tokenizer.to_str()
    assert len(encode_row(tokenizer, AUTO, ROW)[0]) > 4
    assert tokenizer.backend_tokenizer.to_str() == before


@pytest.mark.parametrize(
    ("texts", "match"),
    [
        ({"plain": "Q: A:", "with_context": "{prompt}{context}"}, "plain is 'Q: A:'; expected {prompt} once in plain"),
        ({"plain": "{prompt}", "with_context": "{prompt}"}, "with_context is '{prompt}'; expected"),
        ({"plain": "{prompt} {", "with_context": ""}, "plain is '{prompt} {'; with_context is ''; expected"),
        ({"plain": "{prompt}{answer}", "with_context": "{prompt}{context}"}, "plain is '{prompt}{answer}'"),
        ({"plain": "{prompt}{prompt}", "with_context": "{prompt}{context}"}, "plain is '{prompt}{prompt}'"),
    ],
)
def test_formats_that_are_none(texts: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PromptFormat("mine", **texts)
    assert str(caught.value).startswith("Invalid prompt format 'mine': ") and match in str(caught.value)
