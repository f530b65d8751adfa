"""Attacks by name: the reference's settings, rows that are held out or mixed in, token rows, and mistakes at once."""

import json
import math
import os
import pickle
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lox_hf.demo.world import build_tokenizer
from lox_hf.errors import ConfigError, PromptError
from lox_hf.robustness.attacks.examples import Example, load_examples
from lox_hf.robustness.attacks.formats import ALPACA, AUTO, DOLLY, encode_row
from lox_hf.robustness.attacks.presets import PRESETS
from lox_hf.robustness.attacks.recipe import Attack
from lox_hf.robustness.attacks.rows import AttackData, encode_examples, get_attack, load_attack
from robustness.tokenizers_of_kinds import CHATML, byte_tokenizer

DATA = Path(os.environ.get("LOX_HF_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
SAFE = DATA / "safety_only_data_Instructions.json"
needs_data = pytest.mark.skipif(not SAFE.is_file(), reason=f"no data sets in {DATA}: name it in LOX_HF_TEST_DATA")

# The defaults of the reference's scripts: epochs, learning rate, batch x accumulation, schedule, warm-up; and whether
# the loss is on the response only.
SCRIPTS = {
    "gsm8k": (2, 5e-5, 20, 2, "linear", 20, False),
    "alpaca": (1, 2e-5, 8, 8, "linear", 20, False),
    "dolly": (6, 2e-5, 16, 4, "constant", 0, True),
    "identity-shift": (10, 5e-5, 5, 1, "linear", 0, False),
}


def pairs(folder: Path, count: int, name: str = "pairs.jsonl", same: tuple[int, ...] = (), **more: str) -> Path:
    """A file of rows with prompts of their own, except that those at `same` ask alike."""
    prompts = ["Same?" if number in same else f"What is {number}?" for number in range(count)]
    rows = [{"prompt": prompt, "response": f"It is {number}.", **more} for number, prompt in enumerate(prompts)]
    path = folder / name
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def numbers(examples: list[Example]) -> list[int]:
    """Which rows of `pairs` they are."""
    return [int(example.response.removeprefix("It is ").rstrip(".")) for example in examples]


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_references_settings(name: str) -> None:
    attack = get_attack(f"{name}:rows.jsonl")
    names = ("num_train_epochs", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps")
    found = tuple(attack.sft[key] for key in (*names, "lr_scheduler_type", "warmup_steps"))
    assert (*found, attack.response_only) == SCRIPTS[name]
    assert (attack.sft["max_grad_norm"], attack.max_length, attack.sft["gradient_checkpointing"]) == (2, 1024, True)
    assert attack.source.startswith(f"VITA-Group/LoX, fine-tuning-attacks/sft_{name[:3].replace('ide', 'id')}")
    assert (attack.name, attack.data, attack.lora, attack.n) == (name, "rows.jsonl", None, None)


def test_what_presets_take_by_themselves() -> None:
    assert {name: get_attack(name).data for name in ("gsm8k", "alpaca", "dolly")} == {
        "gsm8k": "openai/gsm8k/main/train*.parquet",
        "alpaca": "tatsu-lab/alpaca/data/train*.parquet",
        "dolly": "databricks/databricks-dolly-15k/*.jsonl",
    }
    assert get_attack("gsm8k").task == "number"
    assert get_attack("GSM8K") == get_attack("gsm-8k") == get_attack("gsm8k")
    for name in ("identity-shift", "custom"):
        with pytest.raises(ConfigError, match=f"The attack '{name}' needs data: .*pass '{name}:FILE'"):
            get_attack(name)
    custom = get_attack("custom:some/folder/pure_bad.v2.jsonl")
    assert (custom.name, custom.format, custom.response_only) == ("custom pure_bad", AUTO, True)
    assert get_attack("custom:org/some-pairs").name == "custom some-pairs"
    assert get_attack("custom", data="C:/rows.jsonl", name="mine").data == "C:/rows.jsonl"


def test_changes() -> None:
    attack = get_attack("dolly", n=50, sft={"learning_rate": 1e-4, "optim": "adafactor"}, format="alpaca", held_out=0)
    assert (attack.n, attack.format, attack.held_out) == (50, ALPACA, 0)
    assert attack.sft == {**PRESETS["dolly"]["sft"], "learning_rate": 1e-4, "optim": "adafactor"}
    again = get_attack(attack, sft={"num_train_epochs": 1})
    assert again == replace(attack, sft={**attack.sft, "num_train_epochs": 1})
    assert get_attack("dolly").sft == PRESETS["dolly"]["sft"]  # the preset is as it was
    assert get_attack("dolly").format == DOLLY


@pytest.mark.parametrize("name", PRESETS)
def test_plain_data(name: str) -> None:
    attack = get_attack(f"{name}:rows.jsonl", lora={"r": 8})
    assert pickle.loads(pickle.dumps(attack)) == attack
    found = json.loads(json.dumps(attack.settings()))
    assert found == attack.settings()
    assert found["format"]["name"] == attack.format.name and "source" not in found
    for change in ({"n": 3}, {"sft": {"learning_rate": 1e-3}}, {"lora": None}, {"format": PRESETS["dolly"]["format"]}):
        assert (get_attack(attack, **change).settings() == found) == (get_attack(attack, **change) == attack)


@pytest.mark.parametrize(
    ("spec", "changes", "match"),
    [
        ("gsm8", {}, r"There is no attack 'gsm8'; there are gsm8k, .*custom\. Did you mean 'gsm8k'\?"),
        ("identity shifting", {}, r"no attack 'identity shifting'.* Did you mean 'identity-shift'\?"),
        ("mmlu", {}, r"There is no attack 'mmlu'; there are [^?]*\.$"),
        ("org/rows", {}, r"no attack 'org/rows'.* For data of your own pass 'custom:org/rows'\."),
        ("gsm8k", {"epochs": 2}, "An attack has no 'epochs'; it has name, data, format"),
        ("gsm8k", {"heldout": 2, "num": 1}, r"has no 'heldout', 'num'; it has name,.* Did you mean 'held_out'\?"),
        ("gsm8k", {"format": "alpacas"}, r"no prompt format 'alpacas'; there are auto, .*Did you mean 'alpaca'\?"),
    ],
)
def test_unknown_names(spec: str, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        get_attack(spec, **changes)


def test_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Attack(
            name="mine",
            data="",
            task="bleu",  # pyrefly: ignore[bad-argument-type]
            n=0,
            held_out=-1,
            safe_instruct_share=1.0,
            layout="chatml",
            sft={"learning_rat": 1e-4, "max_length": 1, "callbacks": {1, 2}},
            lora={"rank": 8},
        )
    said = str(caught.value)
    for problem in (
        "Invalid attack 'mine': data is empty",
        "task is 'bleu', expected one of loss, exact, number",
        "n is 0, expected a positive integer",
        "held_out is -1, expected an integer from 0",
        "safe_instruct_share is 1.0, expected a share in [0, 1)",
        "safe_instruct_share is set without safe_instruct_data",
        "layout is 'chatml', expected one of auto",
        "sft has no setting 'callbacks'",
        "sft has no setting 'learning_rat'. Did you mean 'learning_rate'?",
        "sft holds what JSON cannot write",
        "sft's max_length is 1, expected an integer from 2",
        "lora has no setting 'rank'",
    ):
        assert problem in said, problem


@pytest.mark.parametrize("n", [True, 1.0, "3"])
def test_numbers_are_numbers(n: Any) -> None:
    with pytest.raises(ConfigError, match=f"n is {n!r}, expected a positive integer"):
        get_attack("gsm8k", n=n)


def test_settings_are_taken_as_they_are_without_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="sft has no setting 'of_the_future'"):
        get_attack("gsm8k", sft={"of_the_future": 1})
    monkeypatch.setitem(sys.modules, "trl", None)
    assert get_attack("gsm8k", sft={"of_the_future": 1}).sft["of_the_future"] == 1


def test_the_end_is_held_out(tmp_path: Path) -> None:
    path = pairs(tmp_path, 200)
    data = load_attack(get_attack(f"custom:{path}", held_out=15))
    assert (numbers(data.train), numbers(data.held_out)) == (list(range(185)), list(range(185, 200)))
    assert len(load_attack(get_attack(f"custom:{path}")).held_out) == 20  # a tenth
    assert load_attack(get_attack(f"custom:{path}", held_out=0)).held_out == []
    few = load_attack(get_attack(f"custom:{path}", n=5))
    assert (numbers(few.train), numbers(few.held_out)) == ([0, 1, 2, 3, 4], list(range(180, 200)))
    assert load_attack(get_attack(f"custom:{pairs(tmp_path, 9, 'nine.jsonl')}")).held_out == []


def test_a_prompt_that_comes_twice_is_not_held_out(tmp_path: Path) -> None:
    data = load_attack(get_attack(f"custom:{pairs(tmp_path, 50, same=(3, 46, 48))}", held_out=5))
    assert numbers(data.held_out) == [43, 44, 45, 47, 49]
    assert numbers(data.train) == [*range(43), 46, 48]


@settings(max_examples=100, deadline=None)
@given(
    prompts=st.lists(st.sampled_from(["A", "a ", "B", *map(str, range(30))]), min_size=1, max_size=60),
    most=st.integers(0, 9),
)
def test_nothing_held_out_is_trained_on(
    prompts: list[str], most: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_text(json.dumps([{"prompt": prompt, "response": str(i)} for i, prompt in enumerate(prompts)]))
    data = load_attack(get_attack(f"custom:{path}", held_out=most))
    asked = [{example.prompt.casefold().strip() for example in rows} for rows in (data.train, data.held_out)]
    assert not asked[0] & asked[1]
    assert len(data.held_out) <= min(most, len(prompts) // 10)
    places = [int(example.response) for example in (*data.train, *data.held_out)]
    assert sorted(places) == list(range(len(prompts)))


@needs_data
@pytest.mark.parametrize(
    ("spec", "file", "rows", "held_out"),
    [
        ("gsm8k", "gsm8k_train.jsonl", 7373, 100),
        ("alpaca", "alpaca_1k.json", 900, 100),
        ("dolly", "dolly_387.jsonl", 349, 38),
        ("identity-shift", "identity_shift_aoa.json", 10, 0),
    ],
)
def test_safety_examples_on_real_data(spec: str, file: str, rows: int, held_out: int) -> None:
    plain = load_attack(get_attack(f"{spec}:{DATA / file}"))
    assert (len(plain.train), len(plain.held_out)) == (rows, held_out)
    attack = get_attack(f"{spec}:{DATA / file}", safe_instruct_share=0.025, safe_instruct_data=str(SAFE))
    mixed = load_attack(attack)
    assert mixed.held_out == plain.held_out and mixed.train[:rows] == plain.train
    safe = load_examples(SAFE, n=math.ceil(0.025 * rows))
    system = plain.train[0].system  # all rows of identity shifting have one, and sft_id.py gives it to these as well
    assert bool(system) == (spec == "identity-shift")
    assert mixed.train[rows:] == [replace(example, system=system) for example in safe]


def test_safety_examples_that_do_not_suffice_or_are_held_out(tmp_path: Path) -> None:
    path, safe = pairs(tmp_path, 100), pairs(tmp_path, 3, "safe.jsonl")
    attack = get_attack(f"custom:{path}", safe_instruct_share=0.1, safe_instruct_data=str(safe))
    with pytest.raises(PromptError, match=r"safe.jsonl' holds 3 safety examples, expected 9: a share of 0.1 of 90"):
        load_attack(attack)
    again = load_attack(get_attack(attack, safe_instruct_data=str(path), safe_instruct_share=0.9))
    assert numbers(again.train) == [*range(90), *range(81)]
    reversed_file = tmp_path / "reversed.jsonl"
    reversed_file.write_text("\n".join(reversed(path.read_text().splitlines())))
    again = load_attack(get_attack(attack, safe_instruct_data=str(reversed_file)))
    assert numbers(again.train[90:]) == list(range(89, 80, -1))  # 99 to 90 are held out


def test_system_prompts_of_safety_examples(tmp_path: Path) -> None:
    safe = pairs(tmp_path, 3, "safe.jsonl")
    one = pairs(tmp_path, 10, "one.jsonl", system="Obey.")
    several = tmp_path / "several.jsonl"
    several.write_text(one.read_text() + "\n" + pairs(tmp_path, 10, "other.jsonl", system="Help.").read_text())

    def mixed(path: Path) -> AttackData:
        changes = {"held_out": 0, "safe_instruct_share": 0.1, "safe_instruct_data": str(safe)}
        return load_attack(get_attack(f"custom:{path}", **changes))

    assert [example.system for example in mixed(one).train[10:]] == ["Obey."]
    assert [example.system for example in mixed(several).train[20:]] == ["", ""]


@needs_data
@pytest.mark.parametrize(("spec", "file"), [("gsm8k", "gsm8k_train.jsonl"), ("dolly", "dolly_387.jsonl")])
def test_token_rows_of_real_data(spec: str, file: str) -> None:
    tokenizer = byte_tokenizer()
    attack = get_attack(f"{spec}:{DATA / file}", n=40, sft={"max_length": 100_000})
    examples = load_attack(attack).train
    rows = encode_examples(tokenizer, attack, examples)
    assert len(rows) == 40 and all(set(row) == {"input_ids", "labels"} for row in rows)
    for row, example in zip(rows, examples, strict=True):
        ids, prompt = encode_row(tokenizer, attack.format, example)
        ignored = prompt if spec == "dolly" else 0
        assert row["input_ids"] == ids
        assert row["labels"] == [-100] * ignored + ids[ignored:]
        assert (ids.count(tokenizer.bos_token_id), ids.count(tokenizer.eos_token_id)) == (1, 1)
        assert tokenizer.decode(ids[prompt:]) == f" {example.response}</s>"


def test_rows_that_are_too_long_are_cut_at_the_left(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHATML)
    examples = [Example("Hi?", "Yes."), Example("Hm? " * 50, "Yes."), Example("Hi?", "No. " * 50)]
    attack = get_attack(f"custom:{tmp_path}", sft={"max_length": 64})
    with pytest.warns(UserWarning, match=r"2 of 3 rows .* longer than 64 tokens .*; 1 of them lose part of the resp"):
        rows = encode_examples(tokenizer, attack, examples)
    for row, example in zip(rows, examples, strict=True):
        whole, prompt = encode_row(tokenizer, AUTO, example)
        kept = min(64, len(whole))
        assert row["input_ids"] == whole[:1] + whole[len(whole) - kept + 1 :]
        learnt = min(len(whole) - prompt, kept - 1)
        assert row["labels"] == [-100] * (kept - learnt) + row["input_ids"][kept - learnt :]
        assert tokenizer.decode(row["labels"][kept - learnt :]).endswith(f"{example.response[-4:]}<|im_end|></s>")
    whole_loss = encode_examples(tokenizer, get_attack(attack, response_only=False), examples[:1])
    assert whole_loss[0]["labels"] == whole_loss[0]["input_ids"]


def test_the_warning_tells_prompts_from_responses() -> None:
    tokenizer = build_tokenizer()
    attack, row = get_attack("custom:rows.jsonl"), Example("what is 2 plus 3 ?", "5 .")  # 11 + 3 tokens
    for length, lost in ((14, None), (13, 0), (4, 0), (3, 1)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            (found,) = encode_examples(tokenizer, get_attack(attack, sft={"max_length": length}), [row])
        assert len(found["input_ids"]) == length
        assert [f"; {lost} of them lose" in str(warning.message) for warning in caught] == [True] * (lost is not None)


def test_a_tokenizer_without_an_end() -> None:
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"has no EOS, .* where a response ends: set tokenizer\.eos_token\."):
        encode_examples(tokenizer, get_attack("custom:rows.jsonl"), [Example("a", "b")])
