"""A stress test is found and checked as a whole before any training, and nothing is written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lox_hf.config import LoxConfig
from lox_hf.errors import CheckpointError, ConfigError, PairingError
from lox_hf.robustness import checks
from lox_hf.robustness.attacks.recipe import Attack
from lox_hf.robustness.matrix import Matrix, open_matrix
from lox_hf.robustness.subject import fingerprint, slug
from robustness.tiny_pair import HARDENED, SFT, attack, config, make_model, save_pair, write_rows
from test_bad_input import nothing_lost


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    save_pair(folder)
    return write_rows(folder)


def opened(pair: Path, **changes: Any) -> Matrix:
    with nothing_lost(pair):
        return open_matrix(config(pair, **changes), pair / "work")


def models(matrix: Matrix) -> list[str]:
    return [subject.variant.name for subject in matrix.subjects[0]]


def test_all_controls_are_run_that_can_be_made_and_the_others_say_why_not(pair: Path) -> None:
    made = ["aligned", "hardened r=2 alpha=0.25", "expo alpha=0.25", "random r=2 alpha=0.25", "rescaled"]
    matrix = opened(pair, controls=None)
    assert models(matrix) == made
    assert matrix.not_run == (
        "refusal-matched needs --safety-data and --calibration-data, which was not given",
        "safeinst needs --safety-data, which was not given",
        "retrained needs --calibration-data, which was not given",
    )
    everything = {"safety_data": pair / "safety.jsonl", "calibration_data": pair / "calibration.jsonl"}
    matrix = opened(pair, controls=None, **everything)
    assert models(matrix) == [*made[:4], "refusal-matched r=2 alpha=0.25", "safeinst", "rescaled", "retrained"]
    assert matrix.not_run == ()
    assert opened(pair, controls=["random"]).not_run[0] == "expo: not asked for"


def test_learning_rates_are_multiples_of_the_attacks_own_where_none_are_named(pair: Path) -> None:
    own = attack(pair)
    (planned,) = opened(pair, learning_rates=None, sft={"learning_rate": 3e-4}).attacks
    assert planned.learning_rates == (3e-4, 6e-4, 1.2e-3)
    (planned,) = opened(pair, learning_rates=[2e-3, 1e-3]).attacks
    assert planned.learning_rates == (1e-3, 2e-3)
    with pytest.raises(ConfigError, match="The attack 'pairs' has no learning rate of its own"):
        opened(pair, learning_rates=None, attacks=[own])


def test_safety_examples_are_mixed_into_the_attack_of_one_control(pair: Path) -> None:
    matrix = opened(pair, controls=["safeinst"], safety_data=pair / "safety.jsonl")
    aligned, hardened, safeinst = matrix.subjects[0]
    assert matrix.attacks_on(aligned) is matrix.attacks_on(hardened) is matrix.attacks
    (plain,), (mixed,) = matrix.attacks, matrix.attacks_on(safeinst)
    assert mixed.data.train[:-1] == plain.data.train and "sorry" in mixed.data.train[-1].response
    assert mixed.data.held_out == plain.data.held_out and mixed.rows != plain.rows
    own = attack(pair, safe_instruct_share=0.2, safe_instruct_data=str(pair / "safety.jsonl"))
    (mixed,) = opened(pair, attacks=[own], controls=["safeinst"], safety_data=pair / "safety.jsonl").safe_attacks
    assert len(mixed.data.train) == 18 + 4  # its own share stays


def test_attacks_that_are_called_alike_on_disk_are_refused(pair: Path) -> None:
    alike = [attack(pair, "few pairs"), attack(pair, "Few-Pairs", n=4)]
    with pytest.raises(ConfigError, match="Several attacks are called Few-Pairs, few pairs"):
        opened(pair, attacks=alike)
    assert len(opened(pair, attacks=[alike[0], attack(pair, "few_pairs")]).attacks) == 2


@pytest.mark.parametrize("name", ["..", "../up", "/etc", "…", "a\nb", "a:b", ".hidden"])
def test_a_file_name_stays_in_its_folder_and_is_one_names_alone(name: str) -> None:
    assert Path("folder", slug(name)).resolve() == Path("folder").resolve() / slug(name)
    assert slug(name)[0].isalnum() and slug(name) != slug(name + "/") and slug(name).isascii()
    assert slug("custom my_data 2.0") == "custom-my_data-2.0"  # what can be kept is


def test_every_seeds_pair_is_checked(pair: Path, tmp_path: Path) -> None:
    shutil.copytree(pair, tmp_path / "pair-0")
    rows = {"attacks": [attack(pair)], "prompts": [pair / "prompts.jsonl"], "seeds": [0, 1]}
    with pytest.raises(CheckpointError, match="pair-1"):
        opened(tmp_path / "pair-{seed}", **rows)
    shutil.copytree(pair, tmp_path / "pair-1")
    matrix = opened(tmp_path / "pair-{seed}", **rows)
    assert [subject.aligned for subject in matrix.subjects[1]] == [str(tmp_path / "pair-1" / "aligned")] * 2
    assert matrix.aligned.name_or_path == str(tmp_path / "pair-{seed}" / "aligned")
    make_model(hidden_size=16).save_pretrained(tmp_path / "pair-1" / "base")
    with pytest.raises(PairingError, match="Cannot pair"):
        opened(tmp_path / "pair-{seed}", **rows)


def test_a_base_that_settings_of_lox_name_is_not_used(pair: Path) -> None:
    named = LoxConfig("nowhere", r=2, alpha=0.25)
    with_base, without = (opened(pair, hardened=[lox]).subjects[0][1] for lox in (named, HARDENED))
    assert with_base.base == str(pair / "base") and with_base.settings() == without.settings()


def test_prompt_sets_follow_one_another_and_settings_say_no_path(pair: Path) -> None:
    (pair / "more.txt").write_text("how do i fold a bralket ?\nhow do i dry a bralket ?\n")
    matrix = opened(pair, prompts=[pair / "prompts.jsonl", pair / "more.txt"], n=3)
    texts = [prompt.text for prompt in matrix.measurement.prompts]
    assert len(texts) == 3 + 2 and texts[3:] == (pair / "more.txt").read_text().splitlines()
    assert str(pair) not in json.dumps(matrix.settings)


def test_another_weight_is_another_fingerprint(pair: Path, tmp_path: Path) -> None:
    before = fingerprint(pair / "aligned", pair / "base")
    copy = Path(shutil.copytree(pair, tmp_path / "copy"))
    assert fingerprint(copy / "aligned", copy / "base") == before
    assert fingerprint(copy / "base", copy / "aligned") != before
    weights = load_file(copy / "base" / "model.safetensors")
    save_file({name: weight + 1e-3 for name, weight in weights.items()}, copy / "base" / "model.safetensors")
    assert fingerprint(copy / "aligned", copy / "base") != before


def test_missing_packages_are_named_with_their_extras(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'lox-hf\[plot,trl\]'"):
        opened(pair)
    with pytest.raises(ConfigError, match=r"pip install 'lox-hf\[peft,plot,trl\]'"):
        opened(pair, lora={"r": 2})


def test_a_model_is_not_changed_by_adapters_that_are_tried_on(pair: Path) -> None:
    from lox_hf.evaluation.models.loading import load_model
    from lox_hf.robustness.attacks.rows import load_attack

    model, tokenizer = load_model(pair / "aligned", device="cpu")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    tried = Attack("pairs", str(pair / "attack.jsonl"), sft=SFT, lora={"r": 2, "target_modules": ["q_proj"]})
    checks.check_attack(model, tokenizer, tried, load_attack(tried))
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
