"""The whole way on a real pair: what is chosen, hardened, measured and written, and where it stops early."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from auto import auto_pair
from lox_hf.auto.run import auto_harden, plan_auto
from lox_hf.auto.stops import NO_CHANGE
from lox_hf.config import LoxConfig
from lox_hf.errors import ConfigError, OutputError, PairingError, PromptError
from lox_hf.evaluation.data.prompts import load_prompts
from lox_hf.harden import harden_checkpoint
from lox_hf.records import AutoReport, Limit, Selection
from lox_hf.robustness.measuring.measure import Measurement, ask_prompts
from test_bad_input import contents


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with auto_pair.made(tmp_path_factory.mktemp("pair")) as folder:
        yield folder


@pytest.fixture(scope="module")
def told() -> list[str]:
    return []


@pytest.fixture(scope="module")
def report(pair: Path, told: list[str]) -> AutoReport:
    return auto_harden(auto_pair.config(pair), pair / "out", tell=told.append, progressbar=False)


def test_it_goes_the_whole_way(pair: Path, report: AutoReport) -> None:
    output = pair / "out"
    assert report.stopped == ""
    assert report.base.name_or_path == str(pair / "base")
    assert all((output / name).exists() for name in report.files.values())
    assert (output / "selection.svg").exists()
    selection = Selection.from_json((output / "selection/selection.json").read_text())
    assert report.recommended == selection.recommended
    assert report.reasons == selection.reasons
    assert AutoReport.from_json((output / "report.json").read_text()) == report
    page = (output / "report.md").read_text()
    assert "## Before and after" in page
    assert all(candidate.name in page for candidate in selection.candidates)
    assert load_prompts(pair / "prompts.jsonl")[0].text not in page


def test_the_checkpoint_is_what_harden_makes_of_the_settings(pair: Path, report: AutoReport, tmp_path: Path) -> None:
    config = LoxConfig.from_dict(report.config or {})
    assert config == LoxConfig.from_pretrained(pair / "out")
    assert config.base_model_name_or_path == str(pair / "base")
    harden_checkpoint(pair / "aligned", tmp_path / "by-hand", config)
    ours, theirs = (
        load_file(folder / "model.safetensors") for folder in (pair / "out/hardened", tmp_path / "by-hand")
    )
    for name, weight in theirs.items():
        # Directions for more ranks at once are found to a float32's rounding.
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-6)
    aligned = load_file(pair / "aligned/model.safetensors")
    assert any(not torch.equal(ours[name], aligned[name]) for name in ours)


def test_figures_are_of_the_saved_models_on_prompts_that_nothing_was_chosen_by(pair: Path, report: AutoReport) -> None:
    halves = [json.loads((pair / "out/run.json").read_text())["settings"][name] for name in ("choosing", "reporting")]
    assert halves[0]["prompts"] != halves[1]["prompts"]
    prompts = load_prompts(pair / "prompts.jsonl")
    from lox_hf.auto.halves import split_prompts

    reporting = split_prompts(prompts).reporting
    assert report.before is not None and report.after is not None
    for name, found in (("aligned", report.before), ("out/hardened", report.after)):
        model = AutoModelForCausalLM.from_pretrained(pair / name)
        tokenizer = AutoTokenizer.from_pretrained(pair / name)
        by_hand = ask_prompts(model, tokenizer, Measurement(reporting, max_new_tokens=14))
        assert found.score.rates["asr"] == by_hand.asr
        assert found.score.rates["accuracy"] == by_hand.accuracy
    assert report.before.score.figures["kl"] == 0 < report.after.score.figures["kl"]
    assert report.differences["asr"].before == report.before.score.rates["asr"]
    assert report.before.attacked is not None
    assert report.attacked_differences["asr"].before == report.before.attacked.rates["asr"]


def test_every_choice_is_told_with_its_reason_and_option(pair: Path, report: AutoReport, told: list[str]) -> None:
    assert f"base      {pair / 'base'} (named by README.md; --base-model)" in told
    options = ("--base-model", "--prompts", "--utility", "--rs", "--limits", "--attack")
    assert all(any(option in line for line in told) for option in options)
    assert any(line == f"chosen    {report.recommended}" for line in told)
    assert told[: len(report.choices)] == [str(choice) for choice in report.choices]


def test_a_finished_run_is_read(pair: Path, report: AutoReport, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(pair / "out")
    monkeypatch.setattr("lox_hf.auto.run._Run", None)  # which would measure
    assert auto_harden(auto_pair.config(pair), pair / "out", progressbar=False) == report
    assert contents(pair / "out") == before


def test_another_runs_folder_is_refused(pair: Path, report: AutoReport, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"holds a run with other settings .*candidates"):
        auto_harden(auto_pair.config(pair, alphas=[0.125]), pair / "out", progressbar=False)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds something else"):
        auto_harden(auto_pair.config(pair), tmp_path, progressbar=False)


def test_the_plan_measures_nothing(pair: Path, tmp_path: Path) -> None:
    plan = plan_auto(auto_pair.config(pair), tmp_path / "out")
    assert (plan.candidates, plan.measured, plan.attacked, plan.attack_steps) == (4, 8, 7, 6)
    assert not (tmp_path / "out").exists()
    assert type(plan).from_json(plan.to_json()) == plan
    without = plan_auto(auto_pair.config(pair, attack=None))
    assert (without.attacked, without.attack_steps) == (0, 0)


def test_without_an_attack_the_strongest_is_taken(pair: Path, tmp_path: Path) -> None:
    found = auto_harden(auto_pair.config(pair, attack=None, rs=[1], limits=[]), tmp_path / "out", progressbar=False)
    assert found.recommended == "r=1 alpha=0.5 all"
    assert found.attacked_differences == {}
    assert "figure" not in found.files, "which is of limits"
    assert not (tmp_path / "out/selection.png").exists()
    assert found.after is not None and found.after.attacked is None
    assert any("Robustness was not measured" in reason for reason in found.reasons)


def stopped(pair: Path, output: Path, **changes: Any) -> str:
    """Run, see that nothing was hardened and a report says why, and return the reason."""
    found = auto_harden(auto_pair.config(pair, **changes), output, progressbar=False)
    assert found.config is None
    assert not (output / "hardened").exists()
    assert AutoReport.from_json((output / "report.json").read_text()) == found
    assert "Nothing was hardened" in (output / "report.md").read_text()
    return found.stopped


def test_it_stops_where_nothing_has_changed(pair: Path, tmp_path: Path) -> None:
    shutil.copytree(pair / "aligned", tmp_path / "twin")
    assert stopped(pair, tmp_path / "out", base_model=tmp_path / "twin") == NO_CHANGE


def test_it_stops_where_there_is_nothing_to_protect(pair: Path, tmp_path: Path) -> None:
    """The other way round: the base, which answers everything, as the aligned model."""
    found = stopped(pair, tmp_path / "out", aligned_model=pair / "base", base_model=bare(pair, tmp_path))
    assert "not safe to begin with: its attack success rate is 100.0 %" in found


def test_it_stops_where_the_base_is_as_safe(pair: Path, tmp_path: Path) -> None:
    """The base is the aligned model with one number changed."""
    twin = bare(pair, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(twin)
    with torch.no_grad():
        model.lm_head.weight[0] += 1e-3
    model.save_pretrained(twin)
    assert "do not show that the aligned model is safer" in stopped(pair, tmp_path / "out", base_model=twin)


def test_it_stops_where_the_attack_does_no_harm(pair: Path, tmp_path: Path) -> None:
    found = stopped(pair, tmp_path / "out", attack_learning_rate=1e-7, readings=1)
    assert "The attack does not cost the aligned model its safety" in found
    assert json.loads((tmp_path / "out/choosing/attacked.json").read_text())


def test_it_stops_where_no_candidate_qualifies(pair: Path, tmp_path: Path) -> None:
    found = stopped(pair, tmp_path / "out", attack=None, limits=[Limit("kl", 0.0)])
    assert "None of the 4 candidates keeps every limit" in found
    assert (tmp_path / "out/selection.png").exists()


def bare(pair: Path, folder: Path) -> Path:
    """A copy of the aligned model whose card names nothing."""
    shutil.copytree(pair / "aligned", folder / "bare")
    (folder / "bare/README.md").unlink()
    return folder / "bare"


def test_wrong_inputs_are_refused_before_any_work(pair: Path, tmp_path: Path) -> None:
    good = auto_pair.config(pair)
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"aligned_model": bare(pair, tmp_path)}, ConfigError, "do not name the model that it was made from"),
        ({"base_model": pair / "aligned"}, PairingError, "are the same checkpoint"),
        ({"base_model": pair / "nothing"}, Exception, "no folder"),
        ({"attack": "gsm"}, ConfigError, "Did you mean 'gsm8k'"),
        ({"attack": f"custom:{tmp_path}/none.jsonl"}, PromptError, "--attack custom:FILE, or --no-attack"),
        ({"prompts": [pair / "none.jsonl"]}, PromptError, "none.jsonl"),
        ({"limits": [Limit("kl", -1.0)]}, ConfigError, "limit of kl must be"),
        ({"alphas": [0.0]}, ConfigError, "alpha = 0 is the aligned model itself"),
        ({"targets": ["nothing_like_it"]}, ConfigError, "nothing_like_it"),
        ({"sft": {"warm_up": 3}}, ConfigError, "warm_up"),
    ]
    for changes, kind, said in wrong:
        with pytest.raises(kind, match=said):
            auto_harden(replace(good, **changes), tmp_path / "out", progressbar=False)
        assert not (tmp_path / "out").exists()
