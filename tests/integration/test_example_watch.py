"""The fourth example: a fine-tuning watched, stopped, re-applied to; and the comparison behind docs/callback.md."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from integration.example_scripts import example_modules, run_example
from lox_hf import LoxCallback, LoxConfig, SafetySubspace

EXAMPLE = "04_watch_fine_tuning"
FEW_STEPS = ("--base-steps", "3", "--align-steps", "2")
ROW = r"^(before|log|stop|stop, checkpoint-\d+|reapply) +(\d+) +(\S+ %|-) "

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def example() -> Iterator[SimpleNamespace]:
    with example_modules(EXAMPLE) as modules:
        yield modules


@pytest.fixture(scope="module")
def pairs(example: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hardly trained pairs, by the recipe that `FEW_STEPS` makes."""
    folder = tmp_path_factory.mktemp("pairs")
    recipe = example.run.Recipe(base_steps=3, alignment_steps=2)
    example.inputs.trained_pair(0, folder, recipe)
    return folder


@pytest.fixture
def inputs(example: SimpleNamespace, pairs: Path, tmp_path: Path) -> Any:
    recipe = example.run.Recipe(base_steps=3, alignment_steps=2)
    return example.inputs.small_inputs(pairs, tmp_path / "rows", "benign", 0, recipe, sft={"max_steps": 6})


def readings(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "lox" / "readings.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_three_runs_side_by_side(pairs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shared = ("--pairs", pairs, "--output", output, *FEW_STEPS, "--sft", "max_steps=4", "--every", 2)
    # Every reading is beyond this threshold, so the second run ends at its first one after the start.
    done = run_example(EXAMPLE, *shared, "--above", "-0.5", "--strength", "1.25")
    assert done.returncode == 0, done.stderr
    rows = {name: int(steps) for name, steps, _ in re.findall(ROW, done.stdout, re.MULTILINE)}
    assert rows == {"before": 0, "log": 4, "stop": 2, "reapply": 4}
    steps = {name: [one["step"] for one in readings(output / name)] for name in ("log", "stop", "reapply")}
    assert steps["log"] == [0, 2, 4]
    assert steps["stop"] == [0, 2]
    last = readings(output / "reapply")[-1]
    assert last["retention_after"] == pytest.approx(1.25, abs=1e-4)
    assert not any(one["reapplied"] for one in readings(output / "log")), "the control: only one of them is corrected"
    told = next(line for line in done.stdout.splitlines() if line.startswith("reapply "))
    assert " 1.25 " in told, "the table shows the model that training leaves"
    for name in ("log", "stop", "reapply"):
        for file in ("readings.jsonl", "drift.png"):
            assert (output / name / "lox" / file).is_file()
            assert file in next(line for line in done.stdout.splitlines() if line.startswith(str(output / name)))


def test_a_model_of_ones_own_under_lora(
    example: SimpleNamespace, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The small pair given by its folders: rows from a file, prompts from a file, adapters in place of weights."""
    pair = pairs / "seed-0"
    rows = example.inputs.write_attacks(tmp_path / "rows")
    subspace = tmp_path / "subspace"
    linear = LoxConfig(r=2, target_modules="all-linear")
    SafetySubspace.from_models(pair / "aligned", pair / "base", linear, progressbar=False).save_pretrained(subspace)
    shared = ("--aligned-model", pair / "aligned", "--dataset", f"custom:{rows / 'sums.jsonl'}", "--every", 2)
    prompts = ("--prompts", pair / "questions.jsonl", "--n", 8, "--sft", "max_steps=2", "gradient_checkpointing=false")
    output = tmp_path / "out"
    words = (*shared, *prompts, "--subspace", subspace, "--lora", "r=2", "--output", output)
    example.run.main([str(word) for word in words])
    told = capsys.readouterr().out
    assert "8 harmful and 8 harmless prompts" in told
    lines = {line.split()[0]: line for line in told.splitlines() if re.match(ROW, line)}
    assert lines["reapply"].endswith(" -"), "without a base there is no R_ft"
    assert readings(output / "reapply")[-1]["retention_after"] == pytest.approx(1.5, abs=1e-3)


def test_the_last_safe_checkpoint_is_the_one_before_the_threshold(
    example: SimpleNamespace, inputs: Any, tmp_path: Path
) -> None:
    finetuning = example.finetuning
    watched = LoxCallback(inputs.subspace, every_n_steps=2, base_model=inputs.base)
    finetuning.fine_tune(inputs, watched, tmp_path / "log", seed=0)
    found = [reading.drift.ratio for reading in watched.readings]
    assert found[2] < found[1], "or there is nothing to cross"
    threshold = {"metric": "ratio", "below": (found[1] + found[2]) / 2, "base_model": inputs.base}
    stopped = LoxCallback(inputs.subspace, "stop", every_n_steps=2, **threshold)
    with finetuning.stops_expected():
        *_, steps = finetuning.fine_tune(inputs, stopped, tmp_path / "stop", seed=0, **finetuning.saving(2))
    assert steps == 4
    assert stopped.last_safe_checkpoint == tmp_path / "stop" / "checkpoint-2"
    safe = finetuning.measure_folder(inputs, stopped.last_safe_checkpoint, 2)
    assert safe.ratio == pytest.approx(found[1], abs=1e-6), "the same weights as in the run without a stop"
    assert safe.steps == 2


def test_the_probe_asks_nothing_that_is_tested_or_trained_on(example: SimpleNamespace, inputs: Any) -> None:
    probed = {prompt.text for prompt in inputs.probed}
    assert len(probed) == 2 * example.inputs.PROBED
    assert not probed & {prompt.text for prompt in inputs.measurement.prompts}
    assert not probed & {row.prompt for row in (*inputs.data.train, *inputs.data.held_out)}
    tested = list(inputs.measurement.prompts)
    for sets in ([tested], [tested[:3], tested[3:]], [tested[:6]]):
        ours, theirs = example.inputs.split_prompts(sets, 50)
        assert not {prompt.text for prompt in ours} & {prompt.text for prompt in theirs}
        assert ours and theirs
        assert max(sum(prompt.harmful == kind for prompt in theirs) for kind in (True, False)) <= 50


@pytest.mark.slow
def test_the_comparison_is_taken_up_where_it_was(
    example: SimpleNamespace, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    compare = example.compare
    monkeypatch.setattr(compare, "STARTS", {0.0: ("before", "log", "stop, ratio"), 0.5: ("before", "log")})
    monkeypatch.setattr(compare, "FINE_TUNINGS", ("benign",))
    words = ["--output", str(tmp_path), "--pairs", str(pairs), "--seeds", "0,", "--workers", "1", *FEW_STEPS]
    compare.main(words)
    table = capsys.readouterr().out
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[1] for line in lines[2:]] == [
        "before",
        "log",
        "stop, ratio",
        "stop, ratio: its last safe checkpoint",
        "before",
        "log",
    ]
    assert (tmp_path / "tables.md").read_text(encoding="utf-8").strip() in table
    for name in ("actions", "readings"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    cells = sorted((tmp_path / "cells").rglob("*.json"))
    assert len(cells) == 5
    cells[0].unlink()
    before = {path: path.stat().st_mtime_ns for path in cells[1:]}
    compare.main(words)
    assert cells[0].exists()
    assert before == {path: path.stat().st_mtime_ns for path in cells[1:]}, "what is there is not done again"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--aligned-model", "somewhere", "--dataset", "gsm8k"], "needs --dataset, and --base-model or --subspace"),
        (["--dataset", "gsm8k"], "--base-model, --subspace and --dataset belong to --aligned-model"),
        (["--sft", "max_steps"], "'max_steps' is not NAME=VALUE"),
        (["--output", "."], "--output . exists: name a new folder"),
        (["--every", "0"], "'0' is no positive number of steps"),
    ],
)
def test_wrong_options_are_said_in_one_line(
    arguments: list[str], said: str, example: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.run.main(["--output", str(tmp_path / "out"), *arguments])
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_callback_that_cannot_be_is_said_in_one_line(example: SimpleNamespace, pairs: Path, tmp_path: Path) -> None:
    words = ["--pairs", str(pairs), "--output", str(tmp_path / "out"), *FEW_STEPS, "--sft", "max_steps=0"]
    with pytest.raises(SystemExit, match=r"error: .*max_steps"):
        example.run.main(words)
