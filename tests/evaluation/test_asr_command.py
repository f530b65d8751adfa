"""`lox-hf asr`: one command, a table with intervals, and one clear line for every mistake."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from endpoint_server import EndpointServer
from transformers import T5Config, T5ForConditionalGeneration

from lox_hf import SafetyReport
from lox_hf.demo.training import new_model
from lox_hf.demo.world import build_tokenizer

DATA = Path(os.environ.get("LOX_HF_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
KEY = "sk-" + "k" * 20
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the small world, not trained: it answers words at random."""
    folder = tmp_path_factory.mktemp("models") / "aligned"
    new_model(build_tokenizer(), 0).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "prompts.csv").write_text(
        "prompt,label,category\nhow do i fold a bralket ?,unsafe,folding\nhow do i fold a brazzim ?,safe,folding\n"
    )
    return tmp_path


@pytest.fixture
def run(run: Run) -> Run:
    """Runs `lox-hf asr`; gives the exit code, standard output and standard error."""
    return lambda *words: run("asr", *words)


def refuses(body: Mapping[str, Any]) -> str:
    return "I'm sorry, but I can't help with that."


def complies(body: Mapping[str, Any]) -> str:
    return "Take the brush to the attic."


def scores_five(body: Mapping[str, Any]) -> str:
    return '{"reason": "it does what was asked", "score": 5}'


def test_a_model_and_prompts_are_enough(model: Path, here: Path, run: Run) -> None:
    code, out, err = run(model, "--prompts", "prompts.csv", "--max-new-tokens", "4")
    assert (code, err) == (0, "")
    for said in ("template  chat", "4 at most, greedy", "attack success rate", "95 % interval", "unscored", "folding"):
        assert said in out
    folder = here / "aligned-asr-prompts"
    assert {path.name for path in folder.iterdir()} >= {"generations.jsonl", "report.json", "report.md", "run.json"}
    report = SafetyReport.from_json((folder / "report.json").read_text())
    assert (report.asr.n, report.over_refusal.n, report.prompts["name"]) == (1, 1, "prompts.csv")
    assert report.model is not None and report.model.name_or_path == str(model)


def test_json_is_the_report_and_nothing_else(model: Path, here: Path, run: Run) -> None:
    code, out, err = run(model, "--prompts", "prompts.csv", "--max-new-tokens", "4", "--output", "run", "--json")
    assert (code, err) == (0, "")
    assert out.strip() == (here / "run" / "report.json").read_text().strip()


def test_a_config_file_is_the_command_line(model: Path, here: Path, run: Run) -> None:
    (here / "run.yaml").write_text(
        f"model: {model}\nprompts: prompts.csv\nn: 1\nmax-new-tokens: 2\ntemplate: none\noutput: run\njudge: refusal\n"
    )
    code, out, _ = run("--config", "run.yaml", "--max-new-tokens", "3")
    assert code == 0 and "template  none" in out and "3 at most" in out
    assert SafetyReport.from_json((here / "run" / "report.json").read_text()).prompts["n"] == 1


def test_before_and_after(here: Path, run: Run) -> None:
    with EndpointServer(complies) as before, EndpointServer(refuses) as after:
        assert run("m", "--endpoint", before.base_url, "--prompts", "prompts.csv", "--output", "before")[0] == 0
        words = ("m", "--endpoint", after.base_url, "--prompts", "prompts.csv", "--output", "after")
        code, out, err = run(*words, "--compare", "before")
        assert (code, err) == (0, "")
        assert "-100.0 points" in out and "p (McNemar)" in out and "base_url" in out
        code, out, _ = run(*words, "--compare", "before", "--json")
        content = json.loads(out)
        assert content["comparison"]["asr"]["difference"] == -1.0 and len(content["reports"]) == 1


def test_two_judges_and_a_rubric_at_an_endpoint(model: Path, here: Path, run: Run) -> None:
    (here / "texts.txt").write_text("how do i fold a bralket ?\nhow do i dry a bralket ?\n")
    words = (model, "--prompts", "texts.txt", "--max-new-tokens", "12", "--output", "run", "--template", "chat")
    with EndpointServer(scores_five) as judge:
        code, out, err = run(*words, "--judge", "refusal", "rubric:judge", "--judge-endpoint", judge.base_url)
        assert (code, err) == (0, "") and "Cohen's kappa" in out and "rubric:judge" in out
        asked = len(judge.requests)
        assert run(*words, "--judge", "rubric:judge", "--judge-endpoint", judge.base_url)[0] == 0
        assert len(judge.requests) == asked > 0  # every verdict is on disk: none is paid for twice


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no data at {DATA}: name its folder in LOX_HF_TEST_DATA")
@pytest.mark.parametrize(
    ("file", "harmful", "harmless"),
    [
        ("advbench_harmful_behaviors.csv", 520, 0),
        ("jailbreakbench_behaviors.csv", 100, 0),
        ("xstest_prompts.csv", 200, 250),
    ],
)
def test_real_prompt_sets(file: str, harmful: int, harmless: int, model: Path, here: Path, run: Run) -> None:
    code, _, err = run(model, "--prompts", DATA / file, "--max-new-tokens", "2", "--output", "run")
    report = SafetyReport.from_json((here / "run" / "report.json").read_text())
    assert (code, err) == (0, "")
    assert (report.asr.n + report.asr.unscored, report.over_refusal.n + report.over_refusal.unscored) == (
        harmful,
        harmless,
    )


BAD_FILES = {
    "empty.csv": b"",
    "header.csv": b"prompt\n",
    "columns.csv": b"a,b\n1,2\n",
    "latin.csv": "prompt\ncaf\u00e9 au lait\n".encode("latin-1"),
    "broken.jsonl": b'{"prompt": "a"}\n{"prompt": \n',
    "rubric.txt": b"no placeholders",
}
MISTAKES = [
    ("{model}", "No prompts are named"),
    ("--prompts prompts.csv", "No model is named"),
    ("{model} --prompts advbensh", "advbench"),
    ("{model} --prompts empty.csv", "holds no prompts"),
    ("{model} --prompts header.csv", "holds no prompts"),
    ("{model} --prompts columns.csv", "Its columns: 'a'; 'b'"),
    ("{model} --prompts latin.csv", "0xe9 at offset 10 in line 2 is not UTF-8"),
    ("{model} --prompts broken.jsonl", "line 2"),
    ("{model} --prompts prompts.csv --column question", "There is no column 'question'"),
    ("{model} --prompts prompts.csv --n 0", "n is 0"),
    ("{model} --prompts prompts.csv --judge wise", "no judge 'wise'"),
    ("{model} --prompts prompts.csv --judge rubric:", "no judge 'rubric:'"),
    ("{model} --prompts prompts.csv --judge rubric:gpt-4o-mini", "set the environment variable OPENAI_API_KEY"),
    ("{model} --prompts prompts.csv --judge classifier:./nowhere", "nowhere"),
    ("{model} --prompts prompts.csv --rubric rubric.txt", "belong to a judge 'rubric:MODEL'"),
    (
        "{model} --prompts prompts.csv --judge rubric:m --judge-endpoint http://localhost:1/v1 --rubric rubric.txt",
        "has no {response}",
    ),
    ("{model} --prompts prompts.csv --template chats", "invalid choice"),
    ("{model} --prompts prompts.csv --max-new-tokens 0", "at least 1"),
    ("{model} --prompts prompts.csv --batch-size 0", "at least 1"),
    ("{model} --prompts prompts.csv --dtype int3", "dtype must be"),
    ("{model} --prompts prompts.csv --device mars", "There is no device 'mars'"),
    ("{model} --prompts prompts.csv --compare nowhere", "is not the report of a run"),
    ("{model} --prompts prompts.csv --output occupied", "holds something else"),
    ("{model} --prompts prompts.csv --config nothing.yaml", "Cannot read nothing.yaml"),
    ("nowhere/at/all --prompts prompts.csv", "neither a folder on this machine nor a Hub id"),
    ("./nowhere --prompts prompts.csv", "There is no folder './nowhere'"),
    ("t5 --prompts prompts.csv", "encoder-decoder"),
    ("plain --prompts prompts.csv --template chat", "has no chat template"),
    ("untold --prompts prompts.csv", "no tokenizer"),
    ("m --prompts prompts.csv --endpoint localhost:8000", "base_url is not like"),
    ("m --prompts prompts.csv --endpoint http://localhost:1/v1", "Cannot use the endpoint http://localhost:1/v1"),
    ("m --prompts prompts.csv --endpoint http://localhost:1/v1 --key-env NO_KEY", "environment variable NO_KEY"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_mistake_is_one_clear_line(words: str, message: str, model: Path, here: Path, run: Run) -> None:
    for name, content in BAD_FILES.items():
        (here / name).write_bytes(content)
    (here / "occupied").mkdir()
    (here / "occupied" / "thesis.tex").write_text("mine")
    spoil(here, model)
    code, out, err = run(*words.format(model=model).split())
    assert code == 2 and message in err and "Traceback" not in out + err
    own_words, argparse_words = err.startswith("lox-hf: error: ") and err.count("\n") == 1, err.startswith("usage: ")
    assert own_words or argparse_words
    assert (here / "occupied" / "thesis.tex").read_text() == "mine"


def spoil(folder: Path, model: Path) -> None:
    """Put models beside that cannot be measured as they are asked to."""
    T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ).save_pretrained(folder / "t5")
    build_tokenizer().save_pretrained(folder / "t5")
    new_model(build_tokenizer(), 0).save_pretrained(folder / "plain")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder / "plain")
    new_model(build_tokenizer(), 0).save_pretrained(folder / "untold")


def test_an_endpoint_that_fails_half_way_keeps_what_it_answered(here: Path, run: Run) -> None:
    (here / "texts.txt").write_text("".join(f"question number {number}\n" for number in range(40)))
    words = ("m", "--prompts", "texts.txt", "--output", "run")
    with EndpointServer(complies, faults=lambda number, body: "401" if number >= 35 else None) as server:
        code, _, err = run(*words, "--endpoint", server.base_url)
        assert code == 2 and "Check the key" in err and "Traceback" not in err
        kept = len((here / "run" / "generations.jsonl").read_text().splitlines())
        assert 1 <= kept <= 35
        server.faults = lambda number, body: None
        asked = len(server.requests)
        assert run(*words, "--endpoint", server.base_url)[0] == 0
        assert len(server.requests) - asked == 40 - kept


def test_the_key_is_nowhere(here: Path) -> None:
    (here / "texts.txt").write_text("how do i fold a bralket ?\n")
    with EndpointServer(complies) as answering, EndpointServer(scores_five) as judge:
        command = [sys.executable, "-m", "lox_hf.cli", "asr", "m", "--prompts", "texts.txt", "--output", "run"]
        command += ["--endpoint", answering.base_url, "--judge", "rubric:judge"]
        command += ["--judge-endpoint", judge.base_url, "--judge-key-env", "SECRET"]
        done = subprocess.run(command, env={**os.environ, "SECRET": KEY}, capture_output=True, text=True, cwd=here)
    assert done.returncode == 0, done.stderr
    assert judge.requests[0].headers["authorization"] == f"Bearer {KEY}"  # control: it was used
    written = [path.read_text() for path in (here / "run").iterdir()]
    assert KEY not in "".join([done.stdout, done.stderr, *written])
    assert KEY not in str(answering.requests)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("max-new-tokens: four", "--max-new-tokens cannot be 'four'"),
        ("batch-size: auto", "--batch-size cannot be 'auto'"),
        ("prompts: [a, b]", "--prompts takes one value"),
        ("judge: {a: b}", "no judge"),
        ("template: chats", "--template must be one of auto, chat, alpaca, none, got 'chats'"),
        ("json: 'no'", "--json must be true or false, got 'no'"),
        ("n: null", "--n takes one value, got None"),
        ("colour: red", "unknown key 'colour'"),
    ],
)
def test_a_value_in_a_file_is_read_as_on_the_command_line(
    content: str, message: str, model: Path, here: Path, run: Run
) -> None:
    (here / "run.yaml").write_text(
        f"model: {model}\nprompts: prompts.csv\n{content}\n".replace("prompts: prompts.csv\nprompts", "prompts")
    )
    code, out, err = run("--config", "run.yaml")
    assert code == 2 and message in err and "Traceback" not in out + err


def test_typed_values_in_a_file(model: Path, here: Path, run: Run) -> None:
    (here / "run.yaml").write_text(
        f"model: {model}\nprompts: prompts.csv\nmax-new-tokens: '4'\ncompare: null\njson: false\n".replace(
            "compare: null\n", ""
        )
        + "chat-template-kwargs: {a: 1}\njudge: [refusal]\ncolumn: prompt\n"
    )
    code, out, _ = run("--config", "run.yaml")
    assert code == 0 and "4 at most" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "m --endpoint http://localhost:1/v1 --template alpaca --dtype float16",
            "--template, --dtype would do nothing",
        ),
        ("m --key-env KEY", "--key-env would do nothing without --endpoint"),
        ("m --endpoint http://localhost:1/v1 --key-env sk-proj-abc", "is not the name of an environment variable"),
        ("m --endpoint http://localhost:1/v1 --chat-template-kwargs [1", "expected a JSON object"),
    ],
)
def test_what_would_be_ignored_is_refused(words: str, message: str, here: Path, run: Run) -> None:
    code, _, err = run(*words.split(), "--prompts", "prompts.csv")
    assert code == 2 and message in err and "sk-proj" not in err


def test_other_prompts_are_not_compared_with_after_the_work(model: Path, here: Path, run: Run) -> None:
    (here / "other.txt").write_text("what colour is a bralket ?\n")
    assert run(model, "--prompts", "other.txt", "--max-new-tokens", "2", "--output", "before")[0] == 0
    code, _, err = run(model, "--prompts", "prompts.csv", "--output", "after", "--compare", "before")
    assert code == 2 and "no prompt in common" in err and not (here / "after").exists()


def test_unscored_reasons_and_warnings_are_said_once(here: Path, run: Run) -> None:
    (here / "texts.txt").write_text("a question\n")
    with EndpointServer(complies) as answering, EndpointServer(refuses) as judge:
        words = ("m", "--prompts", "texts.txt", "--endpoint", answering.base_url, "--judge", "rubric:judge")
        code, out, err = run(*words, "--judge-endpoint", judge.base_url, "--output", "run")
    assert code == 0 and "is not one JSON object" in out and "unscored because" in out
    assert err.count("lox-hf: warning: No harmful prompt was scored") == 1 and ".py" not in err


def test_a_reader_that_has_enough_is_no_error(model: Path, here: Path) -> None:
    command = f"{sys.executable} -m lox_hf.cli asr {model} --prompts prompts.csv --max-new-tokens 2 --json | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=here)
    assert (done.stdout, done.stderr) == ("{\n", "")
