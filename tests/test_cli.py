"""The command line: sensible with nothing but a model, defaults with their source, no traceback for a mistake."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import zoo
from lox_hf import HardeningPlan, HardeningReport, LoxConfig, SafetySubspace, harden_checkpoint
from lox_hf.cli.main import main
from test_bad_input import contents, nothing_lost

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    zoo.save_pair("llama", folder)
    return folder


@pytest.fixture
def here(here: Path) -> Path:
    """The working directory: the card of `aligned` names `base`."""
    (here / "aligned" / "README.md").write_text("---\nlicense: mit\nbase_model: base\n---\n# A card\n")
    return here


def row(output: str, name: str) -> str:
    """A line of the table that says what will be done."""
    return next(line for line in output.splitlines() if line.startswith(name)).removeprefix(name).strip()


def test_nothing_but_the_model(here: Path, run: Run) -> None:
    code, out, err = run("harden", "aligned")
    assert (code, err) == (0, "")  # no progress bar either: this is no terminal
    assert row(out, "aligned") == "aligned"
    assert row(out, "base") == "base (named by README.md of the aligned model)"
    assert row(out, "r") == "6 (default: the paper's main setting, LLaMA-2-7B)"
    assert row(out, "alpha") == "1.25 (default: the paper's main setting, LLaMA-2-7B)"
    assert row(out, "targets") == "all (default: every tensor with two or more dims, as the reference does)"
    assert row(out, "output") == "aligned-lox (named after the aligned model)"
    assert "16 matrices hardened, 5 left as they were" in out and "Written to aligned-lox" in out
    harden_checkpoint(here / "aligned", here / "expected", LoxConfig(str(here / "base")))
    assert zoo.same_bits(zoo.read_checkpoint(here / "aligned-lox"), zoo.read_checkpoint(here / "expected"))


def test_what_is_given_has_no_source(here: Path, run: Run) -> None:
    words = "--base-model base --r 2 --alpha 0.5 --target-modules q_proj,k_proj --output deep/out --svd exact --seed 3"
    code, out, _ = run("harden", "--model", "aligned", *words.split())
    assert code == 0 and "default" not in out and "named" not in out
    assert (row(out, "base"), row(out, "r"), row(out, "alpha")) == ("base", "2", "0.5")
    stored = LoxConfig.from_pretrained(here / "deep" / "out")
    assert (stored.r, stored.alpha, stored.target_modules, stored.svd, stored.seed) == (
        2,
        0.5,
        ["q_proj", "k_proj"],
        "exact",
        3,
    )


def test_a_dry_run_writes_nothing(here: Path, run: Run) -> None:
    before = contents(here)
    code, out, _ = run("harden", "aligned", "--dry-run", "--exclude-modules", "lm_head")
    assert code == 0 and contents(here) == before
    assert re.search(r"^lm_head.weight +\(192, 96\) +bfloat16 +copied: excluded$", out, re.MULTILINE)
    assert re.search(r"q_proj.weight +\(96, 96\) +bfloat16 +r 6, alpha 1.25$", out, re.MULTILINE)
    assert "15 tensors to edit, 6 to copy" in out and "Nothing was written" in out
    code, out, _ = run("harden", "aligned", "--dry-run", "--json")
    plan = HardeningPlan.from_json(out)
    assert (code, len(plan.edited), plan.base_found_in) == (0, 16, "README.md") and contents(here) == before
    assert run("harden", "aligned")[0] == 0 and contents(here) != before  # control


@pytest.mark.parametrize("command", ["harden", "adapter", "subspace"])
def test_json_is_the_report_and_nothing_else(command: str, here: Path, run: Run) -> None:
    code, out, err = run(command, "aligned", "--r", "2", "--output", "out", "--json")
    report = HardeningReport.from_json(out)
    assert (code, err, len(report.tensors), report.base and report.base.name_or_path) == (0, "", 16, "base")
    assert json.loads((here / "out" / "lox_report.json").read_text()) == json.loads(out)


@pytest.mark.parametrize(
    ("word", "r"), [("6", 6), ("0.9", 0.9), ("1", 1), ("1.0", 1.0), ("full", None), ("0", None), ("none", None)]
)
def test_spellings_of_r(word: str, r: float | None, here: Path, run: Run) -> None:
    assert run("harden", "aligned", "--r", word, "--target-modules", "q_proj")[0] == 0
    stored = LoxConfig.from_pretrained(here / "aligned-lox").r
    assert stored == r and type(stored) is type(r)


def test_a_config_file_is_the_command_line_and_loses_to_it(here: Path, run: Run) -> None:
    (here / "run.yaml").write_text(
        "model: aligned\nbase-model: base\noutput: 7\nr: null\nalpha: 0.5\ntarget_modules: [q_proj, k_proj]\n"
        "layers_to_transform: 1\nrank_pattern: {k_proj: 2}\n"
    )
    code, out, _ = run("harden", "--config", "run.yaml", "--alpha", "0.25")
    stored = LoxConfig.from_pretrained(here / "7")
    assert code == 0 and row(out, "r") == "full rank" and row(out, "output") == "7"
    assert (stored.r, stored.alpha, stored.target_modules) == (None, 0.25, ["q_proj", "k_proj"])
    assert (stored.layers_to_transform, stored.rank_pattern) == ([1], {"k_proj": 2})


def test_the_config_of_a_hardened_model_is_a_config_file(here: Path, run: Run) -> None:
    assert run("harden", "aligned", "--r", "full", "--alpha-pattern", "q_proj=0.5", "--output", "first")[0] == 0
    assert run("harden", "aligned", "--config", "first/lox_config.json", "--output", "second")[0] == 0
    assert zoo.same_bits(zoo.read_checkpoint(here / "first"), zoo.read_checkpoint(here / "second"))


def test_an_adapter_that_stock_peft_loads(here: Path, run: Run) -> None:
    code, out, err = run("adapter", "aligned", "--r", "2", "--exclude-modules", "embed_tokens")
    assert (code, err) == (0, "") and 'PeftModel.from_pretrained(model, "aligned-lox-adapter")' in out
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("aligned"), "aligned-lox-adapter")
    assert model.peft_config["default"].base_model_name_or_path == "aligned"
    assert model.peft_config["default"].r == 2


def test_a_subspace_that_loads(here: Path, run: Run) -> None:
    code, out, err = run("subspace", "aligned", "--r", "2")
    assert (code, err) == (0, "") and "16 matrices decomposed" in out
    assert {item.rank for item in SafetySubspace.from_pretrained("aligned-lox-subspace").factors.values()} == {2}


def test_an_aligned_adapter_needs_no_base(here: Path, run: Run) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained("base"), lora).save_pretrained("lora")
    shutil.copy("base/config.json", "lora")  # as trainers do
    before = contents(here)
    code, out, _ = run("harden", "lora", "--dry-run")
    assert code == 0 and contents(here) == before and "4 tensors to edit" in out
    assert row(out, "base").startswith("not needed: the adapter")
    code, out, _ = run("harden", "lora", "--dry-run", "--json", "--target-modules", "q_proj")
    assert len(HardeningPlan.from_json(out).edited) == 2 and contents(here) == before
    code, out, err = run("harden", "lora", "--r", "2")
    assert (code, err) == (0, "") and row(out, "output") == "lora-lox (named after the aligned model)"
    ours, theirs = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("lora-lox", "lora"))
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert not zoo.same_bits(ours, theirs)
    assert (here / "lora-lox" / "config.json").read_bytes() == (here / "base" / "config.json").read_bytes()
    assert PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "lora-lox").peft_config


MISTAKES = {
    "harden": "No model is named",
    "harden aligned --model base": "Two models are named",
    "harden nowhere/at/all": "neither a folder on this machine nor a Hub id",
    "harden ./nowhere": "There is no folder",
    "harden base": "No base model is named",
    "harden aligned --r -1": "r must be a positive int",
    "harden aligned --r many": "--r must be a number",
    "harden aligned --alpha -1": "alpha = -1.0 takes alignment away",
    "harden aligned --alpha big": "--alpha must be a number",
    "harden aligned --alpha 1e300": "overflows",
    "harden aligned --svd qr": "svd must be",
    "harden aligned --r 193": "r exceeds the smaller side",
    "harden aligned --target-modules nowhere": "'nowhere' matches no module",
    "harden aligned --target-modules [": "is not a regular expression",
    "harden aligned --layers-to-transform 5-3": "takes numbers and ranges",
    "harden aligned --rank-pattern q_proj": "takes NAME=VALUE",
    "harden aligned --base-model aligned": "are the same checkpoint",
    "harden aligned --output base": "is an input or lies inside one",
    "harden aligned --output full": "exists: choose another",
    "harden aligned --config unknown.yaml": "unknown key 'coef'",
    "harden aligned --config list.yaml": "expected keys and values, got list",
    "harden aligned --config broken.yaml": "Cannot read broken.yaml",
    "harden aligned --config number.yaml": "unknown key '5'",
    "harden aligned --config nowhere.yaml": "Cannot read nowhere.yaml",
    "harden aligned --unknown": "unrecognized arguments: --unknown",
    "adapter aligned --r full": "full rank",
    "adapter aligned --alpha 0": "An adapter needs alpha > 0",
    "adapter aligned --output full": "exists: choose another",
    "subspace aligned --r 0": "full rank",
    "subspace aligned --output full": "exists: choose another",
    "frobnicate": "invalid choice",
    "": "required",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_told_in_words(line: str, here: Path, run: Run) -> None:
    (here / "full").mkdir()
    (here / "full" / "thesis.txt").write_text("precious")
    files = {"unknown": "coef: 1.25", "list": "[1, 2]", "broken": "a: [", "number": "5: 6"}
    for name, text in files.items():
        (here / f"{name}.yaml").write_text(text)
    with nothing_lost(here):
        code, _, err = run(*line.split())
    assert code == 2 and MISTAKES[line] in err and "Traceback" not in err
    assert "lox-hf: error: " in err or err.startswith("usage: ")


def test_the_command_in_a_process_of_its_own(here: Path) -> None:
    """With the exit code, the streams and the progress bar of a real run; its bits are those of this process."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lox_hf.cli", *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    done = run("harden", "aligned", "--output", "apart")
    assert (done.returncode, done.stderr) == (0, "")
    assert main(["harden", "aligned", "--output", "here"]) == 0
    assert zoo.same_bits(zoo.read_checkpoint(here / "apart"), zoo.read_checkpoint(here / "here"))
    wrong = run("harden", "aligned", "--output", "apart")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert re.fullmatch(r"lox-hf: error: The output .*/apart exists: .*\n", wrong.stderr)


def test_a_terminal_gets_a_progress_bar(here: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control of the runs above, whose standard error is empty."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    code, out, err = run("harden", "aligned")
    assert code == 0 and "Hardening: 100%" in err and "Hardening" not in out
    assert run("harden", "aligned", "--output", "quiet", "--json")[2] == ""


def test_help_and_version(run: Run) -> None:
    code, out, _ = run("harden", "--help")
    assert code == 0
    for field in LoxConfig().to_dict():
        flag = {"base_model_name_or_path": "--base-model", "revision": "--base-revision"}.get(field, f"--{field}")
        assert flag.replace("_", "-") in out, field
    assert run("--version")[1].startswith("lox-hf ")
