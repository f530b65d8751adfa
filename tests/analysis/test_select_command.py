"""`lox-hf select` on a pair that trains in a second: what it prints and writes, and every mistake in one line."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lox_hf import LoxConfig, SafetySubspace
from lox_hf.cli.main import main
from lox_hf.records import Selection
from robustness.tiny_pair import make_model, save_pair, write_rows
from test_bad_input import contents

Run = Callable[..., tuple[int, str, str]]
ATTACK = ("--attack", "custom:attack.jsonl", "--attack-steps", 2, "--attack-lr", 1e-2, "--attack-most", 2)
SFT = ("--sft", "per_device_train_batch_size=4", "lr_scheduler_type=constant", "gradient_checkpointing=false")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pair with its prompts, saved directions, and a base of another shape."""
    folder = tmp_path_factory.mktemp("template")
    save_pair(folder)
    write_rows(folder)
    make_model(hidden_size=16).save_pretrained(folder / "larger")
    SafetySubspace.from_models(folder / "aligned", folder / "base", LoxConfig(r=3)).save_pretrained(folder / "saved")
    harmless = [line for line in (folder / "prompts.jsonl").read_text().splitlines() if '"safe"' in line]
    (folder / "harmless.txt").write_text("\n".join(json.loads(line)["prompt"] for line in harmless[:3]) + "\n")
    unsafe = [line for line in (folder / "prompts.jsonl").read_text().splitlines() if '"safe"' not in line]
    (folder / "unsafe.jsonl").write_text("\n".join(unsafe) + "\n")
    return folder


@pytest.fixture
def run(run: Run) -> Run:
    """Runs the command on the pair; gives the exit code, and what stands on standard output and error."""

    def select(*words: object, base: str = "base", alphas: str = "0.05,0.5", prompts: str = "prompts.jsonl"):
        given = ["select", "aligned", "--base-model", base, "--prompts", prompts, "--max-new-tokens", 14]
        given += ["--device", "cpu", "--rs", "1,full", "--alphas", alphas, "--output", "out"]
        return run(*given, *words)

    return select


def test_the_whole_command_and_hardening_with_what_it_wrote(
    here: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run("--targets", "all,no-embeddings", "--limits", "asr=1", "over-refusal=1", "degenerate=1")
    assert code == 0 and "Traceback" not in err
    found = Selection.from_json((here / "out" / "selection.json").read_text())
    assert [item.targets for item in found.candidates] == ["all"] * 4 + ["no-embeddings"] * 4
    assert found.aligned_score.value("kl") == 0 and found.candidates[0].score.value("kl") > 0
    assert found.recommended is not None and found.objective == "strength"
    lines = out.splitlines()
    assert re.match(r"candidate +strength +attack success +over-refusal +degenerate +accuracy +KL +limits", lines[0])
    assert re.match(r"limits +\+100 points", lines[1]) and lines[2].startswith("aligned model")
    assert re.search(rf"^{found.recommended} .*RECOMMENDED$", out, re.MULTILINE)
    said = " ".join(out.split())
    for reason in (*found.reasons, *found.warnings):
        assert " ".join(reason.split()) in said
    assert "Robustness was not measured" in said and "no adaptive attack" in said
    report = (here / "out" / "report.md").read_text()
    assert "| candidate | strength |" in report and "![" in report and "(selection.png)" in report
    assert report.count("\n| r=") == 8
    names = {"selection.png", "selection.svg", "selection.json", "report.md", "lox_config.json", "subspace", "points"}
    assert names <= {path.name for path in (here / "out").iterdir()}

    command = out.splitlines()[-1].split()
    assert command == ["lox-hf", "harden", "aligned", "--config", "out/lox_config.json"]
    assert main([*command[1:], "--output", "hardened"]) == 0
    hardened = json.loads((here / "hardened" / "config.json").read_text())["lox_config"]
    chosen = found.get(found.recommended).config
    assert {name: hardened[name] for name in ("r", "alpha", "exclude_modules", "base_model_name_or_path")} == {
        "r": chosen["r"],
        "alpha": chosen["alpha"],
        "exclude_modules": chosen["exclude_modules"],
        "base_model_name_or_path": "base",
    }
    before = contents(here / "out")
    again = run("--targets", "all,no-embeddings", "--limits", "asr=1", "over-refusal=1", "degenerate=1")
    assert again[:2] == (0, out) and contents(here / "out") == before  # everything is read, and comes out the same


def test_an_attack_decides(here: Path, run: Run) -> None:
    loose = ("--limits", "asr=1", "over_refusal=1", "degenerate=1", "accuracy=none", "kl=none")
    code, out, _ = run(*ATTACK, *SFT, "--targets", "all", *loose, "--json")
    found = Selection.from_json(out)
    assert code == 0 and found.objective == "asr_mean" and found.aligned_attacked is not None
    assert [limit.measure for limit in found.limits] == ["asr", "over_refusal", "degenerate", "gsm8k", "perplexity"]
    attacked = [item.name for item in found.candidates if item.attacked is not None]
    assert attacked == ["r=1 alpha=0.5 all", "r=full alpha=0.5 all"]
    assert (here / "out" / "selection.json").read_text() == out
    code, out, _ = run(*ATTACK, *SFT, "--targets", "all", *loose)
    assert code == 0 and "ASR under attack" in out
    assert found.recommended is not None or "Hardening does not help here" in out


def test_no_candidate_keeps_the_limits(here: Path, run: Run) -> None:
    code, out, _ = run("--targets", "all", "--limits", "kl=0")
    assert code == 0 and "so none is recommended" in " ".join(out.split())
    assert "RECOMMENDED" not in out and "lox-hf harden" not in out
    assert not (here / "out" / "lox_config.json").exists()


def test_other_prompts_for_the_divergence(here: Path, run: Run) -> None:
    def divergence(*words: object, output: str, **changes: str) -> float:
        code, out, err = run("--targets", "all", "--json", *words, "--output", output, **changes)
        assert code == 0, err
        return Selection.from_json(out).candidates[-1].score.value("kl")

    by_prompts, by_file = divergence(output="one"), divergence("--kl-prompts", "harmless.txt", output="two")
    assert by_prompts > 0 and by_file > 0 and by_prompts != by_file
    none = divergence(output="three", prompts="unsafe.jsonl")
    assert none != none  # nothing harmless, nothing measured


def test_saved_directions_and_a_file_of_options(here: Path, run: Run) -> None:
    targets = r"targets: ['q_proj,.*layers\.\d{1,2}\.self_attn\.(k|v)_proj']"
    (here / "o.yaml").write_text(f"{targets}\nlimits: {{kl: 5, accuracy: none}}\nsubspace: saved\n")
    code, out, err = run("--config", "o.yaml", "--json")
    assert code == 0, err
    found = Selection.from_json(out)
    assert [item.targets for item in found.candidates] == ["q_proj"] * 4 + [
        r".*layers\.\d{1,2}\.self_attn\.(k|v)_proj"  # a comma in brackets does not end a word
    ] * 4
    assert {limit.measure: limit.most for limit in found.limits}["kl"] == 5
    assert not (here / "out" / "subspace").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--alphas", "0,1"], "alpha = 0 is the aligned model itself"),
        (["--alphas", "much"], "--alphas takes numbers, got 'much'"),
        (["--rs", "many"], "must be a number, got 'many'"),
        (["--rs", "1.5"], "r must be a positive int"),
        (["--targets", "nowhere"], "'nowhere' matches no module"),
        (["--limits", "harm=0.1"], "--limits has no measure 'harm'; it has asr, over_refusal"),
        (["--limits", "kl"], "--limits takes NAME=VALUE, got 'kl'"),
        (["--limits", "kl=little"], "--limits takes numbers, got 'little'"),
        (["--limits", "kl=-1"], "the limit of kl must be a number of 0 or more"),
        (["--attack-lr", "0.1"], "--attack-lr would do nothing without --attack"),
        (["--attack", "gsm8"], "Did you mean 'gsm8k'"),
        (["--attack", "custom:none.jsonl"], "none.jsonl"),
        ([*ATTACK, "--attack-most", "0"], "attack_most must be 1 or more"),
        ([*ATTACK, "--sft", "max_step=2"], "Did you mean 'max_steps'"),
        (["--base-model", "larger"], "Cannot pair aligned 'aligned' with base 'larger'"),
        (["--base-model", "nowhere"], "nowhere"),
        (["--subspace", "base"], "holds no subspace"),
        (["--subspace", "saved", "--rs", "4"], "r = 4 against 3 stored directions"),
        (["--kl-prompts", "none.txt"], "none.txt"),
        (["--output", "base"], "holds something else"),
        (["--exclude-modules", "nowhere"], "'nowhere' matches no module"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(here: Path, run: Run, words: list[str], said: str) -> None:
    before = contents(here)
    code, out, err = run(*words)
    (line,) = [line for line in err.splitlines() if line.startswith("lox-hf: error:")]
    assert (code, out) == (2, "") and re.search(said, line) and "Traceback" not in err
    assert contents(here) == before
