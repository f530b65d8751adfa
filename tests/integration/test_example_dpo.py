"""The first example, end to end on real preference pairs: train, align, save, harden by the command line, load."""

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from integration.example_scripts import DATA, example_modules, missing_data, run_example

EXAMPLE = "01_harden_a_dpo_model"
PAIRS = "hh_rlhf_harmless_base_test.jsonl.gz"

needs_data = pytest.mark.skipif(bool(missing_data(PAIRS)), reason=missing_data(PAIRS))
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")

SMALL = ["--base-steps", "20", "--dpo-steps", "8", "--held-out", "150", "--max-tokens", "128"]


@pytest.fixture(scope="module")
def example() -> Iterator[SimpleNamespace]:
    with example_modules(EXAMPLE) as modules:
        yield modules


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@needs_data
@needs_trl
def test_the_example_aligns_hardens_and_compares(
    example: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    done = run_example(EXAMPLE, "--data", DATA / PAIRS, "--output", output, *SMALL)
    assert done.returncode == 0, done.stderr
    for name in ("base", "aligned", "hardened"):
        assert len(list((output / name).glob("*.safetensors"))) > 1, "saved in shards"
    base, aligned, hardened = (read(output / name) for name in ("base", "aligned", "hardened"))
    assert {tensor.dtype for tensor in hardened.values()} == {torch.bfloat16}
    for name, tensor in aligned.items():
        if tensor.ndim > 1:
            assert not torch.equal(tensor, base[name]), f"DPO left {name} as it was"
            assert not torch.equal(hardened[name], tensor), f"{name} was not hardened"
        else:
            assert torch.equal(hardened[name], tensor)
    config = json.loads((output / "hardened" / "config.json").read_text())
    assert config["lox_config"], "the settings travel with the model"
    assert len(re.findall(r"^ *(?:base|aligned|hardened): .* -> ", done.stdout, re.MULTILINE)) == 6
    rows = re.findall(r"^ *(base|aligned|hardened) \| *(\d+)/(\d+) = .*\| (\d\.\d+)$", done.stdout, re.MULTILINE)
    assert [row[0] for row in rows] == ["base", "aligned", "hardened"]
    assert all(0 <= int(count) <= int(n) and int(n) > 20 for _, count, n, _ in rows)
    assert rows[0][3] == "0.693"  # the base is DPO's reference: ln 2

    # The same with a pair that exists: nothing is trained.
    capsys.readouterr()
    example.run.main(["--model", str(output / "aligned"), "--base-model", str(output / "base"), "--r", "2"])
    told = capsys.readouterr().out
    assert "top 2 directions" in told and "lox-hf harden " in told and "DPO" not in told


@needs_trl
def test_no_file_and_no_hub_are_said(example: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    load_preferences = example.preferences.load_preferences
    with pytest.raises(SystemExit, match=r"There is no file 'no/such/file.jsonl'. Pass --data"):
        load_preferences(Path("no/such/file.jsonl"))

    def unreachable(*args: object, **settings: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(SystemExit, match=r"(?s)could not be loaded.*no route to host.*Pass --data with a local"):
        load_preferences(None)


def test_one_model_alone_is_refused(example: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.run.parse(["--model", "somewhere"])
    assert "--model and --base-model belong together" in capsys.readouterr().err


def test_a_dialogue_is_split_at_the_last_shared_turn(example: SimpleNamespace) -> None:
    split = example.preferences.split_dialogue
    start = "\n\nHuman: Hello\n\nAssistant: Hello. And you?\n\nHuman: How do I bake bread?\n\nAssistant:"
    pair = split(start + " Knead the dough.", start + " Knowing is hard.")
    assert (pair.prompt, pair.chosen, pair.rejected) == (start, " Knead the dough.", " Knowing is hard.")
    # Turns that follow the first difference belong to the answers.
    longer = split(start + " Yes.\n\nHuman: Why?\n\nAssistant: So.", start + " No.\n\nHuman: Why?\n\nAssistant: So.")
    assert longer.prompt == start
    # The marker itself must be shared: this one differs just before it.
    assert split("\n\nHuman: A\n\nAssistant: x", "\n\nHuman: B\n\nAssistant: x") is None
    assert split(start + " Same.", start + " Same.") is None
    assert split(start + " Something.", start) is None


def test_shares_and_pairs_of_shares(example: SimpleNamespace) -> None:
    measure = example.measure
    low, high = measure.Share(8, 10).interval
    assert (low, high) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)  # Wilson, 8 of 10
    assert measure.Share(0, 20).interval[0] == pytest.approx(0.0, abs=1e-12)
    before = torch.tensor([True] * 6 + [False] * 6)
    after = torch.tensor([True] * 5 + [False] + [True] * 5 + [False])
    won, lost, p_value = measure.mcnemar(before, after)
    assert (won, lost) == (5, 1)
    assert p_value == pytest.approx(2 * (1 + 6) / 2**6)  # both tails of six fair coins
    assert measure.dpo_loss(torch.zeros(4, 2), 0.1) == pytest.approx(0.6931472)
