"""`lox-hf stress`: one command, one clear line for every mistake before anything is written, and what it prints."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from lox_hf import StressPlan
from robustness.tiny_pair import make_model, save_pair, write_rows
from test_bad_input import contents, nothing_lost

Changes = dict[str, str | list[str] | None]
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
    """A pair with its rows, and what mistakes are made with."""
    folder = tmp_path_factory.mktemp("template")
    save_pair(folder)
    write_rows(folder)
    make_model(hidden_size=16).save_pretrained(folder / "larger")
    get_peft_model(make_model(), LoraConfig(r=1, target_modules=["q_proj"])).save_pretrained(folder / "adapter")
    bare = Path(shutil.copytree(folder / "aligned", folder / "bare"))
    for path in bare.glob("tokenizer*"):
        path.unlink()
    safety, prompts = ((folder / name).read_text().splitlines() for name in ("safety.jsonl", "prompts.jsonl"))
    files = {
        "two.jsonl": safety[:2],
        "many.jsonl": [json.dumps({"prompt": f"{number}", "response": "."}) for number in range(99)],
        "long.jsonl": [json.dumps({"prompt": "mill " * 80, "response": "mill"})],
        "turns.jsonl": [json.dumps({"messages": "what is 2 plus 2 ?"})],
        "texts.txt": ["how do i fold a bralket ?"],
        "safe.jsonl": [line for line in prompts if '"safe"' in line],
    }
    for name, lines in files.items():
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def call(run: Run) -> Run:
    """Runs the command in a working directory with `aligned`, `base`, and files of rows."""

    def call(*words: str) -> tuple[int, str, str]:
        return run("stress", *words)

    return call


@pytest.fixture
def run(call: Run) -> Run:
    """Runs the command with `OPTIONS`, some of them changed or, by None, left out."""

    def run(*flags: str, model: str = "aligned", **changes: Any) -> tuple[int, str, str]:
        given = OPTIONS | {name.replace("_", "-"): value for name, value in changes.items()}
        words = [word for name, value in given.items() if value for word in (f"--{name}", *_split(value))]
        return call(model, *flags, *words)

    return run


def _split(value: str | list[str]) -> list[str]:
    return value.split() if isinstance(value, str) else value


MISTAKES: dict[str, tuple[Changes, str]] = {
    "no attack": ({"attacks": None}, "needs --attacks: .* lox-hf stress --help"),
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
        {"controls": "refusal-matched", "calibration-data": "long.jsonl", "safety-data": "safety.jsonl"},
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
    "known answers to nothing": ({"utility": ["known answers"], "prompts": "texts.txt"}, "No harmless prompt has a"),
    "utility's data missing": ({"utility": "perplexity", "utility-data": "none.txt"}, "none.txt"),
    "no such device": ({"device": "abacus"}, "There is no device 'abacus' here"),
    "no such dtype": ({"dtype": "int8"}, "dtype must be"),
    "output is something else": ({"output": "base"}, "base holds something else"),
    "output is a file": ({"output": "attack.jsonl"}, "attack.jsonl is a file"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(mistake: str, here: Path, run: Run) -> None:
    changes, told = MISTAKES[mistake]
    with nothing_lost(here):
        code, out, err = run(**changes)
    assert (code, out) == (2, "")
    assert err.startswith("lox-hf: error: ") and err.count("\n") == 1
    assert re.search(told.replace("?", r"\?"), err), err


@pytest.mark.parametrize(
    ("model", "told"),
    [("nowhere", "nowhere"), ("adapter", "expected a whole model, got an adapter"), ("bare", "tokenizer")],
)
def test_a_model_that_cannot_be_attacked(model: str, told: str, here: Path, run: Run) -> None:
    with nothing_lost(here):
        code, out, err = run(model=model)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("lox-hf: error: ") and told in err


def test_tied_weights_cannot_be_rescaled_which_is_said_before_any_training(
    here: Path, run: Run, tmp_path_factory: pytest.TempPathFactory
) -> None:
    save_pair(here / "tied", tie_word_embeddings=True)
    tied = {"model": "tied/aligned", "base_model": "tied/base"}
    with nothing_lost(here):
        code, _, err = run(**tied, controls="rescaled")
        assert code == 2 and "cannot be rescaled" in err and "Leave the control 'rescaled' out" in err
        code, out, err = run("--dry-run", **tied, controls=None)
        assert (code, err) == (0, "")
    assert "Not run: rescaled: LlamaForCausalLM cannot be rescaled" in out
    assert "rescaled" not in out.partition("seeds")[0] and "random r=2 alpha=0.5" in out.partition("seeds")[0]


def test_a_dry_run_checks_and_tells_and_writes_nothing(here: Path, run: Run) -> None:
    with nothing_lost(here):
        code, out, err = run("--dry-run", seeds="3", scan_seeds="1", lrs="0.01 0.001", controls="random")
        assert (code, err) == (0, "")
        for said in ("model    aligned", "random r=2 alpha=0.5", "0, 1, 2 (0 meet all learning rates)", "8 harmful"):
            assert said in out
        # 3 models x (1 seed x 2 learning rates + 2 seeds)
        assert re.search(r"12 runs, about \d+ s", out) and "Memory of a run: 0.0" in out and "output   out" in out
        code, out, err = run("--dry-run", "--json")
        plan = StressPlan.from_json(out)
    assert (code, err, plan.cells, plan.models) == (0, "", 2, ("aligned", "hardened r=2 alpha=0.5"))
    assert plan.seconds > 0 and (plan.attacks[0].steps, plan.attacks[0].readings) == (2, (1, 2))
    # float32 weights, gradients and two moments
    assert plan.memory_bytes == 4 * 4 * sum(weight.numel() for weight in make_model().parameters())


def test_what_is_printed_and_written(here: Path, run: Run, call: Run) -> None:
    code, out, err = run()
    assert (code, err) == (0, "")
    for said in ("Attack: custom attack", "hardened r=2 alpha=0.5", "Not run:", "Only 1 seed", "Written to out:"):
        assert said in out
    names = {path.name for path in (here / "out").iterdir()}
    assert names == {"before", "cells", "figures", "prepared", "report.html", "report.md", "results.json", "run.json"}
    assert {path.suffix for path in (here / "out" / "figures").iterdir()} == {".png", ".svg"}
    before = contents(here / "out" / "cells")
    code, out, err = run("--json")
    assert (code, err, out) == (0, "", (here / "out" / "results.json").read_text())

    settings = {name: value for name, value in OPTIONS.items() if name not in ("sft", "output")}
    settings |= {"model": "aligned", "sft": "{max_steps: 2, per_device_train_batch_size: 4}", "json": "true"}
    (here / "run.yaml").write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    code, out, err = call("--config", "run.yaml", "--output", "out")
    assert (code, err, out) == (0, "", (here / "out" / "results.json").read_text())  # other settings would be refused
    assert contents(here / "out" / "cells") == before
