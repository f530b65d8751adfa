"""`lox-hf stress`: one command, one clear line for every mistake before anything is written, and what it prints."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from lox_hf.cli.main import main
from robustness.tiny_pair import make_model, save_pair, write_rows
from test_bad_input import nothing_lost

Run = Callable[..., tuple[int, str, str]]
OPTIONS = {
    "base-model": "base",
    "attacks": "custom:attack.jsonl",
    "hardened": "2:0.5",
    "controls": "none",
    "lrs": "0.01",
    "seeds": "1",
    "readings": "2",
    "sft": "max_steps=2 per_device_train_batch_size=4",
    "prompts": "prompts.jsonl",
    "max-new-tokens": "14",
    "device": "cpu",
    "output": "out",
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    save_pair(folder)
    return write_rows(folder)


@pytest.fixture
def here(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: it holds `aligned`, `base`, and files of rows."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process, with options changed; gives the exit code, standard output and error."""

    def run(model: str = "aligned", *flags: str, **changes: str | None) -> tuple[int, str, str]:
        given = OPTIONS | {name.replace("_", "-"): value for name, value in changes.items()}
        words = [word for name, value in given.items() if value for word in (f"--{name}", *value.split(" "))]
        capsys.readouterr()
        try:
            code = main(["stress", model, *flags, *words])
        except SystemExit as end:  # argparse's own mistakes
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


MISTAKES: dict[str, tuple[dict[str, str | None], str]] = {
    "no attack": ({"attacks": None}, "needs --attacks; lox-hf stress --help"),
    "neither attack nor base": ({"attacks": None, "base-model": None}, "needs --base-model and --attacks"),
    "unknown attack": ({"attacks": "gsm8"}, "no attack 'gsm8'; .* Did you mean 'gsm8k'?"),
    "attack by file alone": ({"attacks": "attack.jsonl"}, "pass 'custom:attack.jsonl'"),
    "attack without data": ({"attacks": "identity-shift"}, "'identity-shift' needs data"),
    "attack twice": ({"attacks": "custom:attack.jsonl custom:./attack.jsonl"}, "Several attacks are called"),
    "no such rows": ({"attacks": "custom:none.jsonl"}, "none.jsonl"),
    "no column of responses": ({"attacks": "custom:prompts.jsonl"}, "Cannot tell prompts and responses .* expected"),
    "conversation of another form": ({"attacks": "custom:turns.jsonl"}, "the conversation is str, expected a list"),
    "rows longer than the context": ({"attacks": "custom:long.jsonl"}, "1 of 1 rows are longer than the context"),
    "unknown control": ({"controls": "randm"}, "Unknown controls: 'randm' Did you mean 'random'?"),
    "control twice": ({"controls": "random random"}, "named twice: 'random'"),
    "control without data": ({"controls": "safeinst retrained"}, "safeinst needs --safety-data; retrained needs"),
    "control's data missing": ({"controls": "safeinst", "safety-data": "none.jsonl"}, "none.jsonl"),
    "control's data of another form": ({"controls": "safeinst", "safety-data": "prompts.jsonl"}, "Cannot tell"),
    "too few safety examples": (
        {"controls": "safeinst", "safety-data": "two.jsonl", "attacks": "custom:many.jsonl"},
        "holds 2 safety examples, expected 3",
    ),
    "too few calibration prompts": (
        {"controls": "retrained", "calibration-data": "long.jsonl"},
        "1 different benign examples",
    ),
    "unknown setting of SFT": ({"sft": "max_step=2"}, "sft has no setting 'max_step'. Did you mean 'max_steps'?"),
    "SFT setting of another type": ({"sft": "learning_rate=fast"}, "learning_rate is 'fast', expected a positive"),
    "SFT setting out of range": ({"sft": "max_steps=0"}, "max_steps is 0, expected a positive integer"),
    "SFT setting that is not for users": ({"sft": "seed=3"}, "'seed' cannot be set"),
    "SFT setting without a value": ({"sft": "max_steps"}, "--sft takes NAME=VALUE, got 'max_steps'"),
    "unknown setting of LoRA": ({"lora": "rnk=2"}, "lora has no setting 'rnk'"),
    "LoRA on modules that are not there": ({"lora": "target_modules=nowhere"}, "nowhere"),
    "unknown setting of controls": ({"control-training": "retrain_step=4"}, "Did you mean 'retrain_steps'?"),
    "control setting of another type": ({"control-training": "learning_rate=fast"}, "learning_rate is 'fast'"),
    "control setting out of range": ({"control-training": "every=0"}, "every is 0, expected a positive integer"),
    "hardened without alpha": ({"hardened": "6"}, "--hardened takes R:ALPHA such as 6:1.25, got '6'"),
    "hardened by no number": ({"hardened": "six:1"}, "must be a number, got 'six'"),
    "hardened at the full rank": ({"hardened": "full:1.25"}, "control 'expo'"),
    "hardened the wrong way round": ({"hardened": "1.25:6"}, "r must"),
    "hardened twice": ({"hardened": "2:0.5 2:0.50"}, "names something twice"),
    "learning rate by no number": ({"lrs": "fast"}, "--lrs takes numbers, got 'fast'"),
    "learning rate out of range": ({"lrs": "2"}, "learning_rates must lie between 0 and 1"),
    "learning rate twice": ({"lrs": "0.01,1e-2"}, "learning_rates must be different"),
    "seed by no number": ({"seeds": "one"}, "--seeds takes numbers, got 'one'"),
    "no seeds": ({"seeds": "0"}, "--seeds takes how many, or the seeds themselves"),
    "seed below zero": ({"seeds": "-1,2"}, "--seeds takes how many"),
    "seed twice": ({"seeds": "1,1"}, "seeds names something twice"),
    "no scanning seeds": ({"scan-seeds": "0"}, "scan_seeds must be a positive whole number, got 0"),
    "no readings": ({"readings": "0"}, "readings must be a positive whole number, got 0"),
    "no workers": ({"workers": "0"}, "workers must be a positive whole number, got 0"),
    "no such base": ({"base-model": "nowhere"}, "nowhere"),
    "base of another size": ({"base-model": "larger"}, "Cannot pair aligned 'aligned' with base 'larger'"),
    "base is an adapter": ({"base-model": "adapter"}, "adapter: expected a whole model, got an adapter"),
    "seed in one model alone": ({"base-model": "base-{seed}"}, "must stand in both models or in neither"),
    "no such prompts": ({"prompts": "none.jsonl"}, "none.jsonl"),
    "no harmful prompt": ({"prompts": "safe.jsonl"}, "No prompt is harmful"),
    "unknown judge": ({"judge": "strict"}, "strict"),
    "perplexity of nothing": ({"utility": "perplexity"}, "name a file of them as utility_data"),
    "known answers to nothing": ({"utility": "known answers", "prompts": "texts.txt"}, "No harmless prompt has a"),
    "utility's data missing": ({"utility": "perplexity", "utility-data": "none.txt"}, "none.txt"),
    "no such device": ({"device": "abacus"}, "There is no device 'abacus' here"),
    "no such dtype": ({"dtype": "int8"}, "dtype must be"),
    "output is something else": ({"output": "base"}, "base holds something else"),
    "output is a file": ({"output": "attack.jsonl"}, "attack.jsonl is a file"),
}


@pytest.fixture(scope="module")
def wrong(template: Path) -> Path:
    """What mistakes are made with, beside the rest."""
    rows = (template / "attack.jsonl").read_text().splitlines(keepends=True)
    (template / "two.jsonl").write_text("".join((template / "safety.jsonl").read_text().splitlines(True)[:2]))
    (template / "many.jsonl").write_text("".join(json.dumps({"prompt": f"{i}", "response": "."}) + "\n" for i in range(99)))
    (template / "long.jsonl").write_text(json.dumps({"prompt": "mill " * 80, "response": "mill"}) + "\n")
    (template / "turns.jsonl").write_text(json.dumps({"messages": "what is 2 plus 2 ?"}) + "\n")
    (template / "texts.txt").write_text("how do i fold a bralket ?\n")
    (template / "safe.jsonl").write_text("".join(line for line in (template / "prompts.jsonl").open() if '"safe"' in line))
    make_model(hidden_size=16).save_pretrained(template / "larger")
    get_peft_model(make_model(), LoraConfig(r=1, target_modules=["q_proj"])).save_pretrained(template / "adapter")
    return template


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(mistake: str, wrong: Path, here: Path, run: Run) -> None:
    changes, told = MISTAKES[mistake]
    with nothing_lost(here):
        code, out, err = run(**changes)
    assert (code, out) == (2, "")
    assert err.startswith("lox-hf: error: ") and err.count("\n") == 1
    assert re.search(told.replace("?", r"\?"), err), err
