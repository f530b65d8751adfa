"""The card: every number is a record's, what was not measured says so, and nobody's text is markup or metadata."""

import json
import math
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK

import zoo
from hub.folders import ALIGNED, BASE, write_adapter, write_checkpoint, write_subspace
from lox_hf import LoxConfig, attack_success_rate, compare, harden_checkpoint
from lox_hf.cli.main import main
from lox_hf.errors import CheckpointError, ConfigError
from lox_hf.hub.artefact import open_artefact
from lox_hf.hub.card import make_card
from lox_hf.hub.evidence import Evidence, SafetyEvidence, UtilityEvidence
from lox_hf.hub.metadata import Inherited, eval_entries, inherit
from lox_hf.hub.push import draw_picture, push_to_hub
from lox_hf.records import AccuracyReport, ModelReference, PerplexityReport, SafetyReport
from lox_hf.statistics import rate
from robustness.reports import report_of, runs

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ("dense", "adapter", "subspace")
NOTHING = Inherited({})
NASTY = 'x"]\n---\nevil: true\n---\n<script>alert(1)</script> | `a` [b](javascript:1) {{ 7 * 7 }} $x$ @y #z\x1b[31m'
REFUSED, COMPLIED = "I'm sorry, but I can't help with that.", "Sure, first take a thin piece of metal."


def safety(name: str, complied: int, refused: int, **changes: Any) -> SafetyReport:
    answers = [COMPLIED] * complied + [REFUSED] * refused
    prompts = [f"How do I pick lock {number}?" for number in range(len(answers))]
    report = attack_success_rate(prompts, answers)
    about = {"name": "advbench", "n": len(prompts), "sha256": "a1" * 32}
    return replace(report, model=ModelReference(name), prompts=about, **changes)


def measured() -> Evidence:
    before, after = safety("org/aligned", 7, 6), safety("org/hardened", 2, 11)
    accuracy = AccuracyReport(rate(70, 200), 3, questions={"name": "gsm8k", "n": 200, "sha256": "b"})
    perplexity = PerplexityReport(12.3456, 1000, 10, "c", 64, 32, "float32")
    return Evidence(
        (SafetyEvidence(before, after, compare(before, after)),),
        (UtilityEvidence(accuracy, replace(accuracy, accuracy=rate(66, 200))), UtilityEvidence(None, perplexity)),
        report_of(runs(models=("aligned", "hardened r=2 alpha=1.25"), attacks=("gsm8k",), seeds=(0, 1))),
    )


def rows_after(text: str, heading: str) -> list[list[str]]:
    """Rows of the tables between a heading and the next one, their escapes taken off."""
    part = text.split(f"\n{heading}\n")[1].split("\n#")[0]
    lines = [line for line in part.splitlines() if line.startswith("|") and not re.fullmatch(r"[| -]+", line)]
    return [[cell.strip().replace("\\", "") for cell in line.strip("|").split(" | ")] for line in lines]


def written_rate(data: dict[str, Any]) -> str:
    """A rate of a report's JSON as a card has to write it."""
    low, high = (f"{100 * data[name]:.1f}" for name in ("low", "high"))
    return f"{100 * data['count'] / data['n']:.1f} % [{low}, {high}] of {data['n']}"


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ .*", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)


@pytest.fixture(scope="module")
def html() -> Any:
    """Render Markdown as the Hub does, raw HTML and all."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True}).enable("table")
    return parser.render


def test_safety_figures_are_those_of_the_reports(tmp_path: Path) -> None:
    evidence = measured()
    card = make_card(
        open_artefact(write_checkpoint(tmp_path / "a")), evidence, repo_id="org/hardened", inherited=NOTHING
    )
    pair = evidence.safety[0]
    before, after, both = (json.loads(item.to_json()) for item in (pair.before, pair.after, pair.comparison))
    header, *rows = rows_after(str(card), "### Safety")
    assert header[1:] == ["aligned model", "this model", "difference, pair by pair"]
    fields = {"attack success rate": "asr", "harmful prompts refused": "refusal", "degenerate": "degenerate"}
    for name, *cells in rows:
        if name.startswith("over-refusal"):
            assert cells == ["not evaluated"] * 3  # no prompt was harmless
            continue
        field = next(field for start, field in fields.items() if name.startswith(start))
        found = both[field]
        points = [f"{100 * found[key]:+.1f}" for key in ("difference", "low", "high")]
        difference = (
            f"{points[0]} points [{points[1]}, {points[2]}], p {found['p_value']:.2g}, {after['asr']['n']} pairs"
        )
        assert cells == [written_rate(before[field]), written_rate(after[field]), difference]
    assert len(rows) == 4
    assert f"{len(after['outcomes'])} (SHA-256 {after['prompts']['sha256'][:16]}). Judge: {after['judge']}." in str(
        card
    )


def test_usefulness_is_that_of_the_reports(tmp_path: Path) -> None:
    evidence = measured()
    card = make_card(open_artefact(write_checkpoint(tmp_path / "a")), evidence, repo_id="org/h", inherited=NOTHING)
    before, after = (json.loads(item.to_json()) for item in (evidence.utility[0].before, evidence.utility[0].after))
    _, accuracy, perplexity = rows_after(str(card), "### Usefulness")
    assert accuracy[1:3] == [written_rate(before["accuracy"]), written_rate(after["accuracy"])]
    assert perplexity[1:3] == ["not evaluated", "12.35 (1000 tokens)"]


def test_figures_of_the_hardening_are_those_of_its_report(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "a")
    card = make_card(open_artefact(folder), repo_id="org/hardened", inherited=NOTHING)
    report = json.loads((folder / "lox_report.json").read_text())
    rows = rows_after(str(card), "## What was changed")
    found = {row[0].partition(",")[0].partition(" (")[0]: row[1] for row in rows if len(row) == 2}
    changed = [item for item in report["tensors"] if item["rank"]]
    assert found["r"] == str(report["config"]["r"]) and found["alpha"] == f"{report['config']['alpha']:g}"
    assert found["matrices extrapolated"] == str(len(changed)) == "3"
    assert found["tensors and matrices left as they were"] == str(report["copied"] + 1)
    total = sum(item["delta_norm"] ** 2 * item["energy_share"] for item in changed) / len(changed)
    assert found["share of the change alignment made"] == f"{100 * total:.1f} %"
    kinds = {row[0]: row[1:] for row in rows if len(row) == 6}
    shares = [item["energy_share"] for item in changed if "q_proj" in item["name"]]
    low, high = (f"{100 * value:.1f} %" for value in (min(shares), max(shares)))
    assert kinds["q_proj"] == ["2", "2", low, f"{100 * sum(shares) / 2:.1f} %", high]
    assert set(kinds) == {"kind of matrix", "q_proj", "up_proj"}
    assert found["aligned model"].endswith(f"at commit `{ALIGNED.revision}`")
    assert found["base"].endswith(f"at commit `{BASE.revision}`")


def test_metadata_comes_back_and_holds_the_reports_own_numbers(tmp_path: Path) -> None:
    evidence = measured()
    card = make_card(open_artefact(write_checkpoint(tmp_path / "a")), evidence, repo_id="org/h", inherited=NOTHING)
    card.save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    after = evidence.after
    assert after is not None
    found = {(item.dataset_type, item.metric_type): item for item in data.eval_results}
    asr = found["walledai/AdvBench", "attack_success_rate"]
    assert asr.metric_value == after.asr.share
    assert asr.metric_args == {"n": after.asr.n, "low": after.asr.low, "high": after.asr.high, "judge": "refusal"}
    assert found["openai/gsm8k", "accuracy"].metric_value == 0.33
    assert ("walledai/AdvBench", "over_refusal") not in found  # NaN is no result
    assert data.to_dict()["lox"] == {
        "kind": "checkpoint",
        "r": 2,
        "alpha": 1.25,
        "aligned": {"model": "org/aligned", "revision": "a" * 40},
        "base": {"model": "org/base", "revision": "b" * 40},
    }
    assert {entry.dataset_id for entry in eval_entries(evidence)} == {"walledai/AdvBench", "openai/gsm8k"}


def test_stress_results_are_told_in_full(tmp_path: Path) -> None:
    evidence = measured()
    assert evidence.stress is not None
    card = make_card(open_artefact(write_checkpoint(tmp_path / "a")), evidence, repo_id="org/h", inherited=NOTHING)
    text = str(card).replace("\\", "")
    assert all(f"- {line}" in text.replace("&gt;", ">").replace("&lt;", "<") for line in evidence.stress.headline)
    header, *rows = rows_after(str(card), "### Under fine-tuning")
    assert len(rows) == len(evidence.stress.outcomes)
    for row, outcome in zip(rows, json.loads(evidence.stress.to_json())["outcomes"], strict=True):
        final = outcome["final_asr"]
        expected = f"{100 * final['mean']:.1f} % (sd {100 * final['sd']:.1f}, {final['n']} seeds)"
        assert row[:3] == [outcome["attack"], outcome["model"], f"{outcome['learning_rate']:g}"]
        assert row[header.index("ASR at the end")] == expected
    assert "no hardened model with this r and alpha" not in text
    other = write_checkpoint(tmp_path / "b", LoxConfig("org/base", revision="b" * 40, r=6))
    assert "no hardened model with this r" in str(
        make_card(open_artefact(other), evidence, repo_id="org/h", inherited=NOTHING)
    )


@pytest.mark.parametrize("write", [write_checkpoint, write_adapter, write_subspace])
def test_what_was_not_measured_reads_so(write: Any, tmp_path: Path) -> None:
    text = str(make_card(open_artefact(write(tmp_path / "a")), repo_id="org/h", inherited=NOTHING))
    safe = rows_after(text, "### Safety")[1:]
    assert [row[1:] for row in safe] == [["not evaluated"] * 3] * 3
    assert rows_after(text, "### Usefulness")[1][1:3] == ["not evaluated"] * 2
    assert "Fine-tuning attacks: not evaluated." in text
    assert ("Nothing was measured of this model" in text) == (write is not write_subspace)
    assert "model-index" not in text
    part = text.split("## What was measured")[1].split("## How to load")[0]
    assert not re.search(r"\d+\.\d", part)  # not a figure
    assert "%" not in part.replace("a 95 % Wilson", "")


@pytest.mark.parametrize("kind", ["checkpoint", "adapter", "hardened adapter", "subspace"])
def test_every_kind_says_how_to_use_it(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    if kind == "checkpoint":
        write_checkpoint(folder)
    elif kind == "subspace":
        write_subspace(folder)
    else:
        write_adapter(folder, base=BASE if kind == "adapter" else None)
    artefact = open_artefact(folder)
    assert artefact.kind == kind
    text = str(make_card(artefact, repo_id="org/h", inherited=NOTHING))
    for heading in ("load it", "fine-tune it further", "undo it"):
        assert f"## How to {heading}\n" in text
    for words in ("adaptive", "directional ablation", "base model stays unprotected", "Perin et al.", "@software"):
        assert words in text
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(code, kind, "exec")
    assert "{{" not in text.replace("{{The lox", "") and "{%" not in text and "\n\n\n" not in text
    command = text.split("```bash\n")[1].split("```")[0]
    assert {"checkpoint": "lox-hf harden ", "hardened adapter": "lox-hf harden "}.get(
        kind, f"lox-hf {kind}"
    ) in command


def test_names_of_others_are_text(tmp_path: Path, html: Any) -> None:
    aligned, base = ModelReference(NASTY, NASTY), ModelReference(NASTY)
    config = LoxConfig(NASTY, r=2, target_modules=[NASTY.replace("\n", " ")])
    artefact = open_artefact(write_checkpoint(tmp_path / "a", config, aligned, base))
    after = safety(NASTY, 1, 1, judge=NASTY, over_refusal_judge=NASTY, warnings=(NASTY,))
    after = replace(after, prompts={"name": NASTY, "sha256": NASTY}, generation={"max_new_tokens": NASTY})
    accuracy = AccuracyReport(rate(1, 2), 0, questions={"name": NASTY})
    stress = report_of(runs(models=("aligned",), attacks=("gsm8k",), seeds=(0,)))
    outcome = replace(stress.outcomes[0], attack=NASTY, model=NASTY)
    stress = replace(stress, findings={NASTY: (NASTY,)}, limits=(NASTY,), outcomes=(outcome,))
    both = replace(compare(after, after), models=(NASTY, NASTY))
    evidence = Evidence((SafetyEvidence(None, after, both),), (UtilityEvidence(None, accuracy),), stress, (NASTY,))
    card = make_card(artefact, evidence, repo_id="org/h", inherited=Inherited({}, NASTY))
    data = card.data.to_dict()
    assert "evil" not in data and set(data) == set(yaml.safe_load(REGEX_YAML_BLOCK.match(str(card))[2])) >= {
        "tags",
        "lox",
    }
    plain = make_card(open_artefact(write_checkpoint(tmp_path / "b")), measured(), repo_id="org/h", inherited=NOTHING)
    assert headings(card.text) == headings(plain.text)
    assert "\x1b" not in str(card) and "{{ 7 * 7 }}" in str(card)
    page = html(card.text)
    assert not re.search(r"<script|<a [^>]*javascript", page) and "&lt;script&gt;" in page
    for table in re.findall(r"<table>.*?</table>", page, re.DOTALL):
        assert len({row.count("<td") + row.count("<th") for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL)}) == 1
    assert page.count("<table>") == html(plain.text).count("<table>")
    assert "<script>alert" in html(f"control {NASTY}")


def test_what_is_inherited(tmp_path: Path) -> None:
    aligned = tmp_path / "aligned"
    aligned.mkdir()
    artefact = open_artefact(write_checkpoint(tmp_path / "a", aligned=ModelReference(str(aligned))))
    assert inherit(artefact).fields == {}
    head = {"license": "other", "license_name": "llama2", "license_link": "https://example.org/l", "language": "en"}
    junk = {"datasets": ["org/data", "<script>", 7], "pipeline_tag": "text-generation", "base_model": "x", "evil": 1}
    (aligned / "README.md").write_text(f"---\n{yaml.safe_dump(head | junk)}---\n")
    fields = {**head, "language": ["en"], "datasets": ["org/data"], "pipeline_tag": "text-generation"}
    assert inherit(artefact).fields == fields
    data = make_card(artefact, repo_id="org/h").data.to_dict()
    assert {name: data[name] for name in fields} == fields
    asked = make_card(artefact, repo_id="org/h", license="mit")
    assert asked.data.to_dict()["license"] == "mit" and "license_name" not in asked.data.to_dict()
    assert "as whoever published this chose" in str(asked)
    (aligned / "README.md").write_text('---\nlicense: ["a", "b"]\nlanguage: {x: y}\nlicense_name: z\n---\n')
    assert inherit(artefact).fields == {}
    assert "Licence: not stated" in str(make_card(artefact, repo_id="org/h"))
    (aligned / "README.md").write_text("---\n: : :\n  - ]\n---\n")
    assert "not to be had" in inherit(artefact).note


def test_models_that_nobody_else_has_are_no_base_model(tmp_path: Path) -> None:
    local = ModelReference("/home/alice/aligned")
    card = make_card(
        open_artefact(write_checkpoint(tmp_path / "a", aligned=local)), repo_id="org/h", inherited=NOTHING
    )
    assert "base_model" not in card.data.to_dict()
    assert "is not on the Hub, so no reader can check these weights against it" in card.text


def test_a_checkpoint_that_was_saved_without_its_report(tmp_path: Path) -> None:
    artefact = open_artefact(write_checkpoint(tmp_path / "a", with_report=False))
    text = str(make_card(artefact, repo_id="org/h", inherited=NOTHING, picture=False))
    assert "not known: the model was saved without its report" in text and "energy.png" not in text
    assert artefact.aligned == ALIGNED and artefact.base == BASE


def test_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = open_artefact(write_checkpoint(tmp_path / "a")).report
    picture = draw_picture(report)
    assert picture is not None and picture.startswith(b"\x89PNG") and picture == draw_picture(report)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as where it is not installed
    assert draw_picture(report) is None and draw_picture(None) is None
    with pytest.warns(UserWarning, match="Without matplotlib the card has no picture"):
        found = push_to_hub(tmp_path / "a", "org/h", dry_run=True)
    assert "energy.png" not in found.card and "energy.png" not in {file.path for file in found.files}


def test_full_rank_shares_and_negative_alpha(tmp_path: Path) -> None:
    def text(name: str, **settings: Any) -> str:
        folder = write_checkpoint(tmp_path / name, LoxConfig("org/base", revision="b" * 40, **settings))
        return str(make_card(open_artefact(folder), repo_id="org/h", inherited=NOTHING))

    assert "| all (full rank) |" in text("full", r=None)
    assert "| as many as hold 50.0 % of the change |" in text("share", r=0.5)
    assert "less safe than the aligned one" in text("negative", alpha=-1.0, allow_negative_alpha=True)


def test_a_report_of_another_hardening_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "a")
    other = write_checkpoint(tmp_path / "b", LoxConfig("org/base", r=3))
    (folder / "lox_report.json").write_bytes((other / "lox_report.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"lox_report.json is of another hardening than the weights"):
        open_artefact(folder)
    (folder / "lox_report.json").write_text('{"tensors": 7}')
    with pytest.raises(CheckpointError, match=r"is not the report of a hardening"):
        open_artefact(folder)


@pytest.mark.parametrize("repo_id", ["h", "org/", "org/a b", "../x", "org/a--b", "org/a/b", "a" * 90 + "/bcdefgh"])
def test_an_id_that_is_none_is_refused(repo_id: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a Hub id with its owner"):
        make_card(open_artefact(write_checkpoint(tmp_path / "a")), repo_id=repo_id, inherited=NOTHING)


def test_the_command_on_the_card_gives_the_weights_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = zoo.save_pair("llama", tmp_path)
    settings = {"rank_pattern": {"q_proj": None, "v_proj": 0.5}, "alpha_pattern": {"k_proj": 0.5}}
    config = LoxConfig(str(pair.base_dir), r=3, exclude_modules=["lm_head"], layers_to_transform=None, **settings)
    harden_checkpoint(pair.aligned_dir, tmp_path / "hardened", config)
    text = str(make_card(open_artefact(tmp_path / "hardened"), repo_id="org/h", inherited=NOTHING))
    words = shlex.split(text.split("```bash\n")[1].split("```")[0].splitlines()[-1])
    monkeypatch.chdir(tmp_path / "hardened")
    assert words[0] == "lox-hf" and main([*words[1:], "--json"]) == 0
    again = zoo.read_checkpoint(tmp_path / "hardened" / "again")
    assert zoo.same_bits(again, zoo.read_checkpoint(tmp_path / "hardened"))


@pytest.mark.parametrize("form", EXAMPLES)
def test_the_examples_are_up_to_date(form: str, tmp_path: Path) -> None:
    """What does not depend on figures reads as the template has it now. Else: render them anew, see their README."""
    write = {"dense": write_checkpoint, "adapter": write_adapter, "subspace": write_subspace}[form]
    now = make_card(open_artefact(write(tmp_path / "a")), repo_id="org/h", inherited=NOTHING, picture=True)
    example = ModelCard.load(ROOT / "model_cards" / f"{form}.md")
    assert headings(example.text)[1:] == headings(now.text)[1:]
    for part in ("## Limits and misuse", "## Citation", "## How to undo it"):
        assert example.text.split(part)[1].split("\n## ")[0] == now.text.split(part)[1].split("\n## ")[0]
    first_cells = [
        [row[0] for row in rows_after(card.text, "## What was changed") if len(row) == 2] for card in (example, now)
    ]
    assert first_cells[0] == first_cells[1]
    assert set(now.data.to_dict()) - {"base_model", "base_model_relation"} <= set(example.data.to_dict())
    assert (ROOT / "model_cards" / f"{form}-energy.png").is_file()
    if form != "subspace":
        assert "Nothing was measured" not in example.text and example.data.eval_results
        assert not math.isnan(example.data.eval_results[0].metric_value)
