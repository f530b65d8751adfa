"""`lox-hf drift` against the definitions in float64, and what it says of wrong inputs."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import zoo
from drift_oracle import Expected, expected_drift, fine_tune
from lox_hf import LoxConfig, SafetySubspace, apply_lox
from lox_hf.training.monitor import read_drift
from test_bad_input import contents

Run = Callable[..., tuple[int, str, str]]

R = 3
KEYS = ["r_ft", "r_align", "ratio", "retention"]
# float32 tiles and an iterative decomposition against float64.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`aligned`, `base`, and `tuned`, which fine-tuning has moved; a subspace of the first two."""
    folder = tmp_path_factory.mktemp("template")
    pair = zoo.save_pair("llama", folder, dtype=torch.float32, max_shard_size="1GB")
    shutil.copytree(pair.aligned_dir, folder / "tuned")
    save_file(fine_tune(pair.aligned(), pair.base()), folder / "tuned" / "model.safetensors", {"format": "pt"})
    SafetySubspace.from_models(pair.aligned_dir, pair.base_dir, LoxConfig(r=R)).save_pretrained(folder / "saved")
    return folder


@pytest.fixture
def here(here: Path) -> Path:
    """The working directory: the card of `aligned` names `base`."""
    (here / "aligned" / "README.md").write_text("---\nbase_model: base\n---\n# A card\n")
    return here


def expected(here: Path, *, names: str = "", k: int = R) -> Expected:
    """The definitions, over every linear layer and the head, as the reference, or those with a word in their name."""
    weights, aligned, base = (zoo.read_checkpoint(here / name) for name in ("tuned", "aligned", "base"))
    linear = [name for name in aligned if aligned[name].ndim == 2 and "embed_tokens" not in name and names in name]
    return expected_drift(weights, aligned, base, k, linear)


def test_the_figures_are_those_of_the_definition(here: Path, run: Run) -> None:
    before = contents(here)
    code, out, err = run("drift", "tuned", "--aligned-model", "aligned", "--base-model", "base", "--r", R, "--json")
    found, exact = json.loads(out), expected(here)
    assert (code, err, list(found)) == (0, "", KEYS)
    figures = (exact.r_ft, exact.r_align, exact.r_ft / exact.r_align, exact.retention)
    assert tuple(found.values()) == pytest.approx(figures, abs=CLOSE)
    assert contents(here) == before  # nothing is written
    other = json.loads(run("drift", "tuned", "--aligned-model", "aligned", "--r", 1, "--json")[1])  # base: of the card
    assert other["retention"] == pytest.approx(expected(here, k=1).retention, abs=CLOSE)
    assert abs(other["r_align"] - found["r_align"]) > 0.01  # control: the rank counts


def test_every_matrix_where_asked_for(here: Path, run: Run) -> None:
    words = ("drift", "tuned", "--aligned-model", "aligned", "--r", R, "--target-modules", "q_proj", "v_proj")
    found = json.loads(run(*words, "--per-layer", "--json")[1])
    assert list(found) == [*KEYS, "tensors"]
    names = [f"model.layers.{layer}.self_attn.{one}_proj.weight" for layer in (0, 1) for one in "qv"]
    assert [tensor["name"] for tensor in found["tensors"]] == names
    for tensor in found["tensors"]:
        exact = expected(here, names=tensor["name"])
        assert tensor["retention"] == pytest.approx(exact.retention, abs=CLOSE)
        assert tensor["r_ft"] == pytest.approx(exact.r_ft, abs=CLOSE)
    assert found["r_ft"] == pytest.approx(math.fsum(tensor["r_ft"] for tensor in found["tensors"]) / 4)
    out = run(*words, "--per-layer")[1]
    assert all(name in out for name in names) and names[0] not in run(*words)[1]


def test_a_saved_subspace_reads_retention_without_a_base(here: Path, run: Run) -> None:
    whole = json.loads(run("drift", "tuned", "--subspace", "saved", "--base-model", "base", "--json")[1])
    shutil.rmtree(here / "base")
    shutil.rmtree(here / "aligned")
    code, out, _ = run("drift", "tuned", "--subspace", "saved", "--json")
    found = json.loads(out)
    assert code == 0 and [found[name] for name in KEYS[:3]] == [None] * 3
    assert found["retention"] == pytest.approx(whole["retention"], abs=CLOSE)
    assert whole["r_ft"] is not None  # control
    out = run("drift", "tuned", "--subspace", "saved")[1]
    assert "r_ft needs --base-model" in out and "r_align" not in out


def test_what_a_person_reads(here: Path, run: Run) -> None:
    code, out, err = run("drift", "tuned", "--aligned-model", "aligned", "--base-model", "base", "--r", R)
    exact = expected(here)
    assert (code, err) == (0, "")
    table = {line.split()[0]: line for line in out.splitlines()[:4]}
    assert list(table) == KEYS and {len(line.partition("0.")[0]) for line in table.values()} == {12}
    assert f"{exact.r_ft:.4f}" in table["r_ft"] and f"{exact.retention:.4f}" in table["retention"]
    assert "15 matrices" in out
    for words in ("1 + alpha after LoX", "a rise after LoX is no evidence", "answers turn unsafe", "lox-hf asr"):
        assert words in out


def test_the_same_figures_as_in_python(here: Path, run: Run) -> None:
    reading = read_drift(here / "tuned", SafetySubspace.from_pretrained(here / "saved"), here / "base")
    found = json.loads(run("drift", "tuned", "--subspace", "saved", "--base-model", "base", "--json")[1])
    assert found == {name: getattr(reading, name) for name in KEYS}


def test_what_the_caveat_says_is_so(here: Path, run: Run) -> None:
    words = ("--aligned-model", "aligned", "--base-model", "base", "--r", R, "--json")
    aligned, base = (json.loads(run("drift", name, *words)[1]) for name in ("aligned", "base"))
    assert aligned["retention"] == pytest.approx(1, abs=CLOSE) and base["retention"] == pytest.approx(0, abs=CLOSE)
    assert base["r_ft"] is None and "-" in run("drift", "base", *words[:-1])[1].splitlines()[0]
    hardened = apply_lox(
        AutoModelForCausalLM.from_pretrained(here / "aligned"),
        LoxConfig(r=R, alpha=0.5),
        base_model=SafetySubspace.from_pretrained(here / "saved"),
    )
    hardened.save_pretrained(here / "hardened")
    found = json.loads(run("drift", "hardened", *words)[1])
    assert found["retention"] == pytest.approx(1.5, abs=CLOSE) and found["ratio"] > 1.01


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "No model is named"),
        ("tuned", "--aligned-model"),
        ("tuned --aligned-model aligned --subspace saved", "both are given"),
        ("tuned --subspace saved --r 3 --base-revision main", "--r, --base-revision would do nothing"),
        ("tuned --subspace nowhere", "nowhere"),
        ("tuned --subspace saved --base-model nowhere", "nowhere"),
        ("nowhere --subspace saved", "nowhere"),
        ("tuned --aligned-model aligned --r many", "--r must be a number, got 'many'"),
        ("tuned --aligned-model aligned --r full", "Give r a number"),
        ("tuned --aligned-model aligned --target-modules typo_proj", "typo_proj"),
        ("tuned --aligned-model base", "base"),  # its files name none
        ("tuned --subspace saved --output out", "writes nothing"),
        ("other --subspace saved", "Cannot read the drift"),
    ],
)
def test_wrong_inputs_are_one_message(words: str, message: str, here: Path, run: Run) -> None:
    if "other" in words:
        zoo.save_pair("qwen2", here / "small", dtype=torch.float32)
        (here / "small" / "aligned").rename(here / "other")
    before = contents(here)
    code, out, err = run("drift", *words.split())
    assert (code, out) == (2, "") and err.startswith("lox-hf: error: ") and err.count("\n") == 1
    assert message in err and "Traceback" not in err
    assert contents(here) == before


def test_options_out_of_a_file_that_hardening_reads_too(here: Path, run: Run) -> None:
    (here / "lox.yaml").write_text(f"base-model: base\nr: {R}\nalpha: 0.5\naligned-model: aligned\njson: true\n")
    found = json.loads(run("drift", "tuned", "--config", "lox.yaml")[1])
    assert found["retention"] == pytest.approx(expected(here).retention, abs=CLOSE)


def test_help_loads_nothing_that_takes_seconds() -> None:
    program = (
        "import sys; from lox_hf.cli.main import main\n"
        "try: main(['drift', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.rstrip().endswith("[]") and "--per-layer" in out and "--output" not in out
