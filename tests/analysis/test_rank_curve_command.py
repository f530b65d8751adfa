"""`lox-hf rank-curve` on a pair that trains in a second: what it prints and writes, and every mistake in one line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from lox_hf import LoxConfig, SafetySubspace
from lox_hf.cli import rank_curve as command
from lox_hf.records import RankCurve
from robustness.tiny_pair import make_model, save_pair, write_rows
from test_bad_input import contents

Run = Callable[..., tuple[int, str, str]]
RANKS = (0, 1, 4)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pair with its prompts, saved directions, and a base of another shape."""
    folder = tmp_path_factory.mktemp("template")
    save_pair(folder)
    write_rows(folder)
    make_model(hidden_size=16).save_pretrained(folder / "larger")
    SafetySubspace.from_models(folder / "aligned", folder / "base", LoxConfig(r=4)).save_pretrained(folder / "saved")
    return folder


@pytest.fixture
def run(run: Run) -> Run:
    """Runs the command on the pair; gives the exit code, and what stands on standard output and error."""

    def rank_curve(*words: object, base: str | None = "base", ranks: str | None = "0,1,4") -> tuple[int, str, str]:
        given = ["rank-curve", "aligned", "--prompts", "prompts.jsonl", "--max-new-tokens", 14, "--device", "cpu"]
        given += ["--base-model", base] * (base is not None) + ["--ranks", ranks] * (ranks is not None)
        return run(*given, *words)

    return rank_curve


def test_the_whole_command(here: Path, run: Run) -> None:
    code, out, err = run("--output", "out")
    assert code == 0 and "Traceback" not in err
    written = here / "out"
    curve = RankCurve.from_json((written / "rank_curve.json").read_text())
    assert [point.r for point in curve.points] == list(RANKS) and curve.about["max_new_tokens"] == 14
    base, aligned = curve.points[0].score.rates["asr"], curve.aligned_score.rates["asr"]
    assert (base.count, base.n, aligned.n) == (8, 8, 8) and aligned.count < 8  # the pair: what alignment changed
    assert curve.points[0].score.rates["accuracy"].n == 8 and len(curve.aligned_score.marks["asr"]) == 8
    rows = out.splitlines()
    assert rows[0].split()[:4] == ["r", "energy", "attack", "success"] and rows[4].startswith("aligned")
    assert str(base) in rows[1] and "100.0 % [67.6, 100.0] of 8" in rows[1]
    assert curve.effective is not None and curve.effective.words[0] in " ".join(out.split())
    assert "At 95 % this cannot be said with 8 prompts: it takes at least 268" in " ".join(out.split())
    assert out.count("it takes") == 1 and "no adaptive" in out  # the warning is one of the sentences
    report = (written / "report.md").read_text()
    assert "| r | energy | attack success |" in report and "![The curve](rank_curve.png)" in report
    assert {"rank_curve.png", "rank_curve.svg", "points", "subspace"} <= {path.name for path in written.iterdir()}
    before = contents(written)
    assert run("--output", "out")[:2] == (0, out)  # again: everything is read, and comes out the same
    assert contents(written) == before


def test_json_alone_and_the_files_settings(here: Path, run: Run) -> None:
    (here / "o.yaml").write_text("ranks: [0, 2]\nrho: 0.2\nreset-vectors: true\nlayers: layers.0.\noutput: out\n")
    code, out, _ = run("--json", "--config", "o.yaml", ranks=None)
    record = json.loads(out)
    assert code == 0 and [point["r"] for point in record["points"]] == [0, 2] and record["reset_vectors"]
    assert record["config"]["target_modules"] == r".*(?:layers\.0\.).*" and record["matrices"] == 7
    assert record["effective"]["rho"] == 0.2 and record["effective"]["least_n"] == 11
    assert out == (here / "out" / "rank_curve.json").read_text()
    assert "| modules | .\\*(?:layers" in (here / "out" / "report.md").read_text()


def test_saved_directions_are_used(here: Path, run: Run) -> None:
    code, out, _ = run("--subspace", "saved", "--json", "--output", "out")
    assert code == 0 and not (here / "out" / "subspace").exists()
    found = json.loads(run("--json", "--output", "other")[1])
    assert [point["score"] for point in found["points"]] == [point["score"] for point in json.loads(out)["points"]]


@pytest.mark.parametrize(
    ("pattern", "target", "taken", "left"),
    [
        ("q_proj", ".*(?:q_proj).*", "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"),
        ("layers.1.", r".*(?:layers\.1\.).*", "model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj"),
        ("(?i)Q_PROJ", "(?i).*(?:Q_PROJ).*", "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"),
        (r"s\.\d{1,2}\.m", r".*(?:s\.\d{1,2}\.m).*", "model.layers.0.mlp.up_proj", "model.layers.111.mlp.up_proj"),
        (r"[qk]_proj|mlp", ".*(?:[qk]_proj|mlp).*", "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.v_proj"),
    ],
)
def test_layers_are_a_part_of_the_name_or_an_expression(pattern: str, target: str, taken: str, left: str) -> None:
    from lox_hf.weights.selection import matches

    found = command._target(pattern)
    assert found == target and matches(found, taken) and not matches(found, left)
    assert command._target("all") is None


MISTAKES = {
    "a rank that is none": (
        ["--ranks", "0,half"],
        "from 0 (the base), such as 0,1,2,4; got 0,half.",
    ),
    "a share of energy": (
        ["--ranks", "0.9"],
        "from 0 (the base), such as 0,1,2,4; got 0.9.",
    ),
    "a negative rank": (["--ranks=-1"], "--ranks takes whole numbers from 0"),
    "too large ranks": (["--ranks", "900"], "r exceeds the smaller side"),
    "rho beside a rate": (["--rho", "5"], "rho must lie in (0, 1), such as 0.01"),
    "rho that is no number": (["--rho", "1%"], "--rho takes numbers, got '1%'"),
    "no such layer": (["--layers", "layers.7."], "matches no module"),
    "no expression": (["--layers", "("], "is not a regular expression"),
    "another shape": (["--base-model", "larger"], "Cannot pair aligned 'aligned' with base 'larger'"),
    "no folder of directions": (["--subspace", "base"], "'base' holds no subspace"),
    "directions not deep enough": (["--subspace", "saved", "--ranks", "8"], "r = 8 against 4 stored directions"),
    "prompts without harm": (["--prompts", "safe.jsonl"], "No prompt is harmful"),
    "a folder of something else": (["--output", "base"], "holds something else"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(mistake: str, here: Path, run: Run) -> None:
    words, message = MISTAKES[mistake]
    lines = (here / "prompts.jsonl").read_text().splitlines()
    (here / "safe.jsonl").write_text("\n".join(line for line in lines if '"safe"' in line))
    before = contents(here)
    code, out, err = run("--output", "out", *words)
    told = [line for line in err.splitlines() if line.startswith("lox-hf: error: ")]
    assert (code, out, len(told)) == (2, "", 1) and message in told[0]
    assert contents(here) == before


def test_other_settings_need_another_folder(here: Path, run: Run) -> None:
    assert run("--output", "out")[0] == 0
    before = contents(here)
    code, _, err = run("--output", "out", "--system-prompt", "be brief .")
    assert code == 2 and "with other settings" in err and "choose another folder" in err
    assert contents(here) == before
    model = AutoModelForCausalLM.from_pretrained(here / "aligned")
    model.lm_head.weight.data[0] += 1
    model.save_pretrained(here / "aligned")
    assert run("--output", "out")[0] == 2  # other weights under the same name


def test_the_base_may_be_named_by_the_card(here: Path, run: Run) -> None:
    code, _, err = run("--output", "out", base=None)
    assert code == 2 and "--base-model" in err
    (here / "aligned" / "README.md").write_text("---\nbase_model: base\n---\n# A card\n")
    assert run("--output", "out", base=None)[0] == 0
