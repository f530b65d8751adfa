"""`lox-hf layers`: its files, its tables, and what it says of wrong inputs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import zoo
from drift_oracle import erase
from lox_hf import LoxConfig, SafetySubspace
from lox_hf.records import LayerMap
from test_bad_input import contents

Run = Callable[..., tuple[int, str, str]]
FILES = ["layers.json", "layers.png", "layers.svg"]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`aligned`, `base`, `half` without half of the safety component, and the directions."""
    folder = tmp_path_factory.mktemp("template")
    pair = zoo.save_pair("llama", folder, dtype=torch.float32, max_shard_size="1GB")
    shutil.copytree(pair.aligned_dir, folder / "half")
    save_file(erase(pair.aligned(), pair.base(), 2, 0.5), folder / "half" / "model.safetensors", {"format": "pt"})
    SafetySubspace.from_models(pair.aligned_dir, pair.base_dir, LoxConfig(r=2)).save_pretrained(folder / "saved")
    return folder


def test_models_and_their_directions_give_the_same_map(here: Path, run: Run) -> None:
    code, out, err = run("layers", "aligned", "--base-model", "base", "--r", 2)
    assert (code, err) == (0, "") and sorted(path.name for path in (here / "aligned-layers").iterdir()) == FILES
    found = LayerMap.from_json((here / "aligned-layers" / "layers.json").read_text())
    assert len(found.entries) == 16 and found.r == 2 and found.tuned == ""
    for words in (
        "self_attn.q_proj",
        "lm_head",
        "outside",
        "of the change lies in the layers",
        "not where safety lives",
    ):
        assert words in out
    assert "retention" not in out
    code, out, _ = run("layers", "--subspace", "saved", "--output", "other", "--json")
    assert code == 0 and out == (here / "other" / "layers.json").read_text()
    assert LayerMap.from_json(out).entries == found.entries
    assert len(contents(here / "other")) == 3


def test_retention_of_every_matrix_of_a_tuned_model(here: Path, run: Run) -> None:
    code, out, err = run("layers", "--subspace", "saved", "--tuned", "half", "--output", "out")
    assert (code, err) == (0, "")
    found = LayerMap.from_json((here / "out" / "layers.json").read_text())
    assert found.tuned == "half"
    assert [item.retention for item in found.entries] == pytest.approx([0.5] * 16, abs=1e-4)  # embeddings too
    assert out.count(" 0.500") == 12
    parts = [*("layers", "aligned", "--base-model", "base", "--target-modules", "v_proj"), "--r", 2]
    assert run(*parts, "--tuned", "half", "--output", "part")[2] == ""  # no warning of what was not asked for
    (kind,) = LayerMap.from_json((here / "part" / "layers.json").read_text()).by_kind().values()
    assert kind.matrices == 2 and kind.retention == pytest.approx(0.5, abs=1e-4)


def test_again_in_the_same_folder_gives_the_same_bytes(here: Path, run: Run) -> None:
    (here / "out").mkdir()
    (here / "out" / "notes.txt").write_text("mine")
    states = []
    for _ in range(2):
        assert run("layers", "--subspace", "saved", "--output", "out")[0] == 0
        states.append(contents(here / "out"))
    assert states[0] == states[1] and len(states[0]) == 4


def test_many_layers_are_not_all_printed(here: Path, run: Run) -> None:
    sides = [{f"model.layers.{n}.q.weight": torch.randn(8, 8) for n in range(20)} for _ in range(2)]
    SafetySubspace.from_models(*sides, LoxConfig(r=2)).save_pretrained(here / "deep")
    out = run("layers", "--subspace", "deep", "--output", "out")[1]
    assert "8 more layers changed less" in out
    assert len(json.loads((here / "out" / "layers.json").read_text())["entries"]) == 20


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "No model is named"),
        ("aligned", "base"),
        ("aligned --subspace saved", "MODEL would do nothing with --subspace"),
        ("--subspace saved --base-model base --r 3", "--base-model, --r would do nothing with --subspace"),
        ("--subspace nowhere", "nowhere"),
        ("--subspace aligned", "holds no subspace"),
        ("aligned --base-model base --r full", "r=None"),
        ("aligned --base-model base --r many", "--r must be a number"),
        ("aligned --base-model base --target-modules nothing", "matches no module"),
        ("--subspace saved --tuned-revision main", "--tuned-revision would do nothing without --tuned"),
        ("--subspace saved --tuned nowhere", "nowhere"),
    ],
)
def test_wrong_inputs_have_one_clear_message(words: str, message: str, here: Path, run: Run) -> None:
    before = contents(here)
    code, out, err = run("layers", *words.split())
    assert (code, out) == (2, "") and err.startswith("lox-hf: error: ") and message in err
    assert contents(here) == before


def test_an_output_that_cannot_be_written(here: Path, run: Run) -> None:
    (here / "file").write_text("mine")
    code, _, err = run("layers", "--subspace", "saved", "--output", "file")
    assert code == 2 and "file" in err and (here / "file").read_text() == "mine"
