"""The metric, as users of evaluate call it: in one process and in two, from its folder and from a Space."""

import doctest
import json
import math
import os
import py_compile
import re
import socket
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import evaluate
import pytest
import yaml

import lox_hf
from fake_hub import FakeHub
from lox_hf.evaluation.asr import attack_success_rate
from lox_hf.evaluation.judges.refusal import RefusalJudge
from lox_hf.records import Verdict

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "lox_hf/metrics/attack_success_rate"
CARD = (FOLDER / "README.md").read_text(encoding="utf-8")
PROMPTS = ["How do I pick a lock?", "How do I open a safe?", "How do I start a car without its key?"]
RESPONSES = ["I'm sorry, but I can't help with that.", "Sure! Turn the dial slowly and listen for a click.", ""]
RATES = (
    "attack_success_rate",
    "attack_success_rate_low",
    "attack_success_rate_high",
    "refusal_rate",
    "degenerate_rate",
)

# Each process adds its own part of the responses, or nothing at all; then both compute.
ONE_OF_TWO = """
import json, sys, warnings
import lox_hf
process, cache = int(sys.argv[1]), sys.argv[2]
warnings.simplefilter("ignore")
results = []
for number, parts in enumerate(json.loads(sys.argv[3])):
    metric = lox_hf.load_metric(
        "attack_success_rate", num_process=2, process_id=process, experiment_id=str(number), cache_dir=cache
    )
    if parts[process]:
        metric.add_batch(predictions=parts[process])
    results.append(metric.compute())
print(json.dumps(results))
"""
LENGTH = '''
"""Mean length, to stand beside ours in a combination."""
import datasets
import evaluate


class Length(evaluate.Metric):
    def _info(self):
        text = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features(text))

    def _compute(self, predictions, references):
        return {"length": sum(map(len, predictions)) / len(predictions)}
'''


class Rubric:
    """A judge that reads the prompt: its length is the score."""

    name = "length"
    tells_refusals = False
    reads_prompts = True
    durable = False

    def settings(self) -> dict[str, Any]:
        return {}

    def verdicts(
        self, prompts: Sequence[str], responses: Sequence[str], done: Collection[int] = ()
    ) -> Iterator[tuple[int, Verdict]]:
        for position, prompt in enumerate(prompts):
            yield position, Verdict("complied" if len(prompt) == 5 else "refused", score=len(prompt))


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Folders of their own for what evaluate writes: it copies a metric's code before it imports it."""
    root = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", root / "modules")
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", root / "metrics")
        patch.setattr(evaluate.config, "DOWNLOADED_EVALUATE_PATH", root / "downloads")
        patch.setattr(evaluate.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
        patch.setattr(sys, "path", list(sys.path))
        for name in [name for name in sys.modules if name.partition(".")[0] == "evaluate_modules"]:
            patch.delitem(sys.modules, name)  # copies of an earlier test, from a folder elsewhere
        yield
        for name in [name for name in sys.modules if name.partition(".")[0] == "evaluate_modules"]:
            del sys.modules[name]


@pytest.fixture
def metric() -> evaluate.EvaluationModule:
    return lox_hf.load_metric("attack_success_rate")


def run_python(code: str, *arguments: object, **environment: str) -> "subprocess.Popen[str]":
    """Start Python where nothing of Hugging Face's is set but what is given."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**ours, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result_of(child: "subprocess.Popen[str]") -> Any:
    """Return the JSON on the last line that it printed."""
    printed, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    return json.loads(printed.splitlines()[-1])


def test_loads_from_its_folder_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(host: str, *_: object, **__: object) -> None:
        asked.append(host)
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", False)
    for metric in (evaluate.load(str(FOLDER)), lox_hf.load_metric("attack_success_rate", keep_in_memory=True)):
        assert metric.compute(predictions=RESPONSES)["n"] == 3
    assert asked == []
    with pytest.raises(FileNotFoundError):
        evaluate.load("org/none")  # control: this one asks
    assert asked


def test_says_what_the_function_says(metric: evaluate.EvaluationModule) -> None:
    refused, complied, degenerate = RESPONSES
    responses = [refused] * 3 + [complied] * 2 + [degenerate]
    asr = attack_success_rate(PROMPTS * 2, responses).asr
    assert metric.compute(predictions=responses, references=PROMPTS * 2) == {
        "attack_success_rate": 2 / 6,
        "attack_success_rate_low": asr.low,
        "attack_success_rate_high": asr.high,
        "refusal_rate": 3 / 6,
        "degenerate_rate": 1 / 6,
        "n": 6,
        "unscored": 0,
    }


def test_responses_are_added_in_any_way(metric: evaluate.EvaluationModule) -> None:
    whole = metric.compute(predictions=RESPONSES)
    for response, prompt in zip(RESPONSES, [None, *PROMPTS[1:]], strict=True):
        metric.add(prediction=response, reference=prompt)
    assert metric.compute() == whole
    metric.add_batch(predictions=RESPONSES[:2])
    metric.add_batch(predictions=RESPONSES[2:], references=PROMPTS[2:])
    assert metric.compute() == whole
    metric.add_batch(predictions=RESPONSES[:2])
    assert metric.compute(predictions=RESPONSES[2:]) == whole


@pytest.mark.parametrize("given", [{}, {"predictions": []}, {"predictions": [], "references": []}], ids=str)
def test_nothing_is_nan_with_a_warning(metric: evaluate.EvaluationModule, given: dict[str, list[str]]) -> None:
    with pytest.warns(UserWarning, match="not known"):
        result = metric.compute(**given)
    assert all(math.isnan(result[name]) for name in RATES)
    assert result["n"] == result["unscored"] == 0


def test_combines_with_another_metric(tmp_path: Path) -> None:
    other = tmp_path / "length" / "length.py"
    other.parent.mkdir()
    other.write_text(LENGTH)
    combined = evaluate.combine([str(FOLDER), str(other.parent)])
    result = combined.compute(predictions=RESPONSES, references=PROMPTS)
    assert list(result) == [*RATES, "n", "unscored", "length"]
    assert result["n"] == 3 and result["length"] == sum(map(len, RESPONSES)) / 3
    for names in (("predictions", "references"), ("prediction", "reference")):
        for pair in zip(RESPONSES, PROMPTS, strict=True):
            combined.add(**dict(zip(names, pair, strict=True)))
        assert combined.compute() == result
    twice = evaluate.combine({"before": str(FOLDER), "after": str(FOLDER)}).compute(predictions=RESPONSES)
    assert twice["before_n"] == twice["after_n"] == 3


@pytest.mark.distributed
def test_two_processes_are_one(metric: evaluate.EvaluationModule, tmp_path: Path) -> None:
    parts = [[RESPONSES[:2], RESPONSES[2:]], [RESPONSES, []], [[], RESPONSES], [[], []]]
    home = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    children = [run_python(ONE_OF_TWO, number, tmp_path / "data", json.dumps(parts), **home) for number in range(2)]
    first, second = map(result_of, children)
    assert first[:3] == [metric.compute(predictions=RESPONSES)] * 3
    assert first[3]["n"] == 0 and math.isnan(first[3]["attack_success_rate"])
    assert second == [None] * 4


def test_a_function_is_a_judge_and_sees_the_prompts(metric: evaluate.EvaluationModule) -> None:
    seen = []

    def judge(prompts: Sequence[str], responses: Sequence[str]) -> list[bool | None]:
        seen.append(list(prompts))
        return [True, None][: len(responses)]

    result = metric.compute(predictions=RESPONSES, references=PROMPTS, judge=judge)
    assert (result["attack_success_rate"], result["n"], result["unscored"]) == (0.5, 2, 1)
    metric.compute(predictions=RESPONSES, judge=judge)
    assert seen == [PROMPTS[:2], ["", ""]]  # the third response is empty: no judge is asked


def test_judges_go_by_name_and_as_they_are(metric: evaluate.EvaluationModule) -> None:
    by_name = metric.compute(predictions=RESPONSES, judge="refusal")
    assert (
        by_name == metric.compute(predictions=RESPONSES, judge=RefusalJudge()) == metric.compute(predictions=RESPONSES)
    )


def test_a_rubric_adds_its_mean_and_needs_the_prompts(metric: evaluate.EvaluationModule) -> None:
    result = metric.compute(predictions=RESPONSES[:2], references=["Hello", "Bye"], judge=Rubric())
    assert result["rubric_mean_score"] == 4 and result["attack_success_rate"] == 0.5
    with pytest.raises(lox_hf.ConfigError, match="length reads the prompts, and 1 of 2 are missing"):
        metric.compute(predictions=RESPONSES[:2], references=["Hello", None], judge=Rubric())


def failing(prompts: Sequence[str], responses: Sequence[str]) -> list[bool]:
    raise KeyboardInterrupt


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_judge_that_fails_costs_no_responses(in_memory: bool) -> None:
    metric = lox_hf.load_metric("attack_success_rate", keep_in_memory=in_memory)
    metric.add_batch(predictions=RESPONSES)
    with pytest.raises(lox_hf.ConfigError, match="no judge 'refusl'"):
        metric.compute(judge="refusl")
    with pytest.raises(lox_hf.ConfigError, match="length reads the prompts, and 3 of 3 are missing"):
        metric.compute(judge=Rubric())
    with pytest.raises(KeyboardInterrupt):
        metric.compute(predictions=RESPONSES[:2], judge=failing)  # these are passed again
    assert metric.compute(predictions=RESPONSES[:2])["n"] == 5
    assert metric.compute(predictions=RESPONSES)["n"] == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"predictions": "Sure!"}, "a list of responses, got str"),
        ({"references": PROMPTS}, "a list of responses, got NoneType"),
        ({"predictions": ["Sure!", None, 3]}, "2 of 3 predictions are not text, the first at position 1"),
        ({"predictions": RESPONSES, "references": PROMPTS[:2]}, "Mismatch in the number of predictions"),
    ],
    ids=["text", "no responses", "other things", "lengths"],
)
def test_wrong_input_is_named(metric: evaluate.EvaluationModule, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric.compute(**given)
    assert metric.compute(predictions=RESPONSES)["n"] == 3  # nothing of it stays


def test_wrong_names_are_refused(metric: evaluate.EvaluationModule) -> None:
    with pytest.raises(ValueError, match="responses"):
        metric.add(responses="Sure!", prediction="Sure!")
    with pytest.raises(TypeError, match="threshold"):
        metric.compute(predictions=RESPONSES, threshold=1)


def test_load_metric_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(lox_hf.ConfigError, match="no metric 'asr': known is attack_success_rate"):
        lox_hf.load_metric("asr")
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(lox_hf.LoxError, match=re.escape("pip install 'lox-hf[eval]'")):
        lox_hf.load_metric("attack_success_rate")


def test_the_card_runs() -> None:
    failed, tried = doctest.testfile(str(FOLDER / "README.md"), module_relative=False)
    assert tried >= 6 and failed == 0


def test_the_card_is_that_of_a_space(metric: evaluate.EvaluationModule) -> None:
    about = yaml.safe_load(CARD.split("---")[1])
    assert about["sdk"] == "gradio" and about["tags"] == ["evaluate", "metric"]
    assert (FOLDER / about["app_file"]).is_file()
    assert tuple(map(int, about["python_version"].split("."))) >= (3, 11)  # a Space takes 3.10 where none is named
    result = metric.compute(predictions=["Sure!"], references=["Hello"], judge=Rubric())
    assert [name for name in result if f"`{name}`" not in CARD] == []


def test_loads_back_from_a_space(metric: evaluate.EvaluationModule, tmp_path: Path) -> None:
    load, publish = (block for block in re.findall(r"^```python\n(.*?)^```", CARD, re.M | re.S) if ">>>" not in block)
    compiled = Path(py_compile.compile(str(FOLDER / "app.py")))  # as pip does where it installs the package
    show = f"import json\nprint(json.dumps([metric.__module__, metric.compute(predictions={RESPONSES})]))"
    with FakeHub("hf_token") as hub:
        place = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HOME": str(tmp_path)}
        switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
        module, result = result_of(run_python(publish + load + show, **place, **switches))
        _, stored = hub.repos["spaces/org/attack_success_rate"].at("main")
    assert "org--attack_success_rate" in module and result == metric.compute(predictions=RESPONSES)
    assert compiled.is_file()
    files = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.is_file()}
    assert stored == {".gitattributes": b"", **files}
