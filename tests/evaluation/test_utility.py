"""GSM8K with a model that knows some of the answers, a run that is cut off, and the command."""

import argparse
import json
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lox_hf.cli import utility as command
from lox_hf.errors import ConfigError, EndpointError, LoxError, OutputError
from lox_hf.evaluation.data.gsm8k import PROMPT
from lox_hf.evaluation.models.chat import Conversation, Reply, ask
from lox_hf.evaluation.models.templates import encode
from lox_hf.evaluation.utility import gsm8k_accuracy
from lox_hf.records import AccuracyReport

# Question, the answer in the file, and what the model learns to say behind the reference's prompt and in a chat.
LEARNT = (
    ("How many legs has a spider ?", "#### 8", "It has 4 and 4 . #### 8", "It has 8 legs ."),
    ("How many stars are there ?", "About . #### 1,234", "There are #### 1,234", "There are 1234 stars ."),
    ("What does it cost ?", "#### 3.5", "It costs #### $3.50", "It costs $3.50 ."),
    ("How cold is it ?", "#### -7", "It is #### -7 degrees .", "It is -7 ."),
    ("How old is the tree ?", "#### 90", "It is #### 91", "It is 91 ."),
    ("How long is the river ?", "#### 12", "It is 12 miles .", "It is long ."),
)
RIGHT = (True, True, True, True, False, False)
CHAT_TEMPLATE = "<s> {{ messages[0]['content'] }} assistant :"


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The questions as a file."""
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": text, "answer": gold}) + "\n" for text, gold, _, _ in LEARNT))
    return path


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, `<s>` in front, and a chat template that writes its own."""
    texts = [PROMPT, *(" ".join(item) for item in LEARNT), CHAT_TEMPLATE]
    words = ["<pad>", "<s>", "</s>", "<unk>", *sorted({word for text in texts for word in text.split()})]
    words = list(dict.fromkeys(words))
    ids = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT_TEMPLATE, **special)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A small model that has learnt both answers to every question by heart."""
    rows = []
    for text, _, answer, in_chat in LEARNT:
        for prompt, said in ((PROMPT.format(question=text), answer), (f"{text} assistant :", in_chat)):
            start, end = (
                tokenizer(prompt)["input_ids"],
                tokenizer(f"{said} </s>", add_special_tokens=False)["input_ids"],
            )
            rows.append((start + end, [-100] * len(start) + end))
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        settings = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=128, **settings, **sizes))
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(150):
            loss = model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    assert loss.item() < 0.01
    return model.eval()


class Scripted:
    """A chat model that says what it is told to, and notes what it is asked."""

    name = "scripted"

    def __init__(self, replies: Sequence[Reply], stop_after: int | None = None) -> None:
        self.script, self.stop_after = replies, stop_after
        self.asked: list[str] = []

    def settings(self) -> dict[str, Any]:
        return {"max_new_tokens": 400}

    def replies(
        self, conversations: Sequence[Conversation], done: Collection[int] = ()
    ) -> Iterator[tuple[int, Reply]]:
        for position, conversation in enumerate(conversations):
            if position in done:
                continue
            if len(self.asked) == self.stop_after:
                raise EndpointError("The endpoint is gone.")
            self.asked.append(conversation[-1]["content"])
            yield position, self.script[position]


REPLIES = [Reply(said) for _, _, said, _ in LEARNT]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that every space counts, `<s>` in front."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    ids = {sign: number for number, sign in enumerate(["<s>", *sorted(alphabet)])}
    backend = Tokenizer(models.BPE(ids, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


def test_the_prompt_is_the_references_with_one_bos(questions: Path) -> None:
    chat = Scripted(REPLIES)
    gsm8k_accuracy(chat, questions=questions)
    prompt = chat.asked[0]
    assert prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nHow many legs has a spider ?\n\n### Response: "
    )
    tokenizer = byte_tokenizer()
    ids = encode(tokenizer, ask(prompt), "none")
    assert (ids[0], ids.count(0), tokenizer.decode(ids[1:])) == (0, 1, prompt)
    assert tokenizer("<s>" + prompt)["input_ids"].count(0) == 2  # the reference's own


def test_accuracy_is_what_the_model_knows(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: Path
) -> None:
    report = gsm8k_accuracy(model, tokenizer, questions, max_new_tokens=20)
    assert (report.right, report.unreadable) == (RIGHT, 1)
    assert (report.accuracy.count, report.accuracy.n, report.accuracy.unscored) == (4, 6, 0)
    assert report.accuracy.low < 4 / 6 < report.accuracy.high
    assert (report.questions["n"], report.generation["prompt"]) == (6, PROMPT)
    assert report == gsm8k_accuracy(model, tokenizer, questions, max_new_tokens=20, batch_size=1)
    assert AccuracyReport.from_json(report.to_json()) == report


def test_in_a_chat_the_last_number_counts(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: Path
) -> None:
    report = gsm8k_accuracy(model, tokenizer, questions, chat=True, max_new_tokens=20)
    assert (report.right, report.unreadable, report.generation["template"]) == (RIGHT, 1, "chat")
    chat = Scripted([Reply(said) for *_, said in LEARNT])
    assert gsm8k_accuracy(chat, questions=questions, chat=True).right == RIGHT
    assert chat.asked[0] == LEARNT[0][0]


def test_a_run_that_is_cut_off_goes_on(questions: Path, tmp_path: Path) -> None:
    whole = gsm8k_accuracy(Scripted(REPLIES), questions=questions)
    with pytest.raises(EndpointError):
        gsm8k_accuracy(Scripted(REPLIES, stop_after=4), questions=questions, output_dir=tmp_path / "run")
    second = Scripted(REPLIES)
    report = gsm8k_accuracy(second, questions=questions, output_dir=tmp_path / "run")
    assert (len(second.asked), report) == (2, whole)
    assert AccuracyReport.from_json((tmp_path / "run/report.json").read_text()) == whole
    lines = [json.loads(line) for line in (tmp_path / "run/generations.jsonl").read_text().splitlines()]
    assert [line["response"] for line in lines] == [reply.text for reply in REPLIES]
    with pytest.raises(OutputError, match="other settings"):
        gsm8k_accuracy(Scripted(REPLIES), questions=questions, n=3, output_dir=tmp_path / "run")


def test_what_an_endpoint_did_not_answer_is_unscored_and_asked_again(questions: Path, tmp_path: Path) -> None:
    hung = Reply("", error="it hung", transient=True)
    refused = Reply("", error="the server declines")
    report = gsm8k_accuracy(Scripted([hung, refused, *REPLIES[2:]]), questions=questions, output_dir=tmp_path / "run")
    assert (report.accuracy.count, report.accuracy.n, report.accuracy.unscored, report.unreadable) == (2, 5, 1, 2)
    again = Scripted(REPLIES)
    report = gsm8k_accuracy(again, questions=questions, output_dir=tmp_path / "run")
    assert (len(again.asked), report.accuracy.count, report.accuracy.n) == (1, 3, 6)


def test_wrong_calls(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: Path) -> None:
    with pytest.raises(ConfigError, match="needs no tokenizer"):
        gsm8k_accuracy(Scripted(REPLIES), tokenizer, questions)
    with pytest.raises(ConfigError, match="needs its tokenizer"):
        gsm8k_accuracy(model, None, questions)
    with pytest.raises(ConfigError, match="no chat template"):
        gsm8k_accuracy(model, byte_tokenizer(), questions, chat=True)


def run_command(*words: object) -> None:
    """Run the command as `lox-hf` does."""
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    options = parser.parse_args(["utility", *map(str, words)])
    options.func(options)


@pytest.fixture(scope="module")
def checkpoint(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The model on disk."""
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_the_command(checkpoint: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("How old is the tree ?\nIt is 91 .\n")
    words = (checkpoint, "--gsm8k", questions, "--max-new-tokens", 20, "--output", tmp_path / "out")
    run_command(*words, "--perplexity", texts)
    printed = capsys.readouterr().out
    assert "GSM8K accuracy" in printed and "66.7 %" in printed and "30.0 to 90.3 %" in printed
    assert "perplexity" in printed and "10 tokens" in printed
    written = json.loads((tmp_path / "out/utility.json").read_text())
    assert (written["gsm8k"]["accuracy"]["count"], written["perplexity"]["tokens"]) == (4, 10)
    run_command(*words, "--json")  # from the answers that are there, and what was measured before stays
    assert json.loads(capsys.readouterr().out) == written


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "Nothing to measure: pass --gsm8k"),
        (("--gsm8k", "gone.jsonl"), "gone.jsonl"),
        (("--perplexity", "gone.txt"), "gone.txt"),
        (("--gsm8k", "{questions}", "--n", "0"), "n is 0"),
        (("--gsm8k", "{questions}", "--output", "{questions}"), "is a file: choose another folder"),
    ],
)
def test_mistakes_show_before_the_model_is_loaded(
    words: tuple[str, ...], expected: str, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoxError, match=expected):
        run_command("./no-model", *(word.format(questions=questions) for word in words))
    with pytest.raises(LoxError, match=r"no folder '\./no-model'"):
        run_command("./no-model", "--gsm8k", questions)


def test_help_stays_light() -> None:
    code = "import sys, lox_hf.cli.utility; print({'torch', 'transformers', 'scipy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
