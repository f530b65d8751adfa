"""`lox-hf auto` as a user types it: what it prints, what it asks, and what it does with the result."""

import builtins
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from auto import auto_pair
from fake_hub import FakeHub
from lox_hf.cli.main import main
from lox_hf.markdown import escape
from lox_hf.records import AutoPlan, AutoReport
from test_bad_input import contents

TOKEN = "hf_TheSecretOfThisTest"
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with auto_pair.made(tmp_path_factory.mktemp("pair")) as folder:
        yield folder


@pytest.fixture(scope="module")
def output(pair: Path) -> Path:
    """A finished run, without an attack: what it does is tested elsewhere."""
    assert main([*words(pair), "--json"]) == 0
    return pair / "out"


def words(pair: Path, *more: str) -> list[str]:
    return [*auto_pair.words(pair, attack=None, output=pair / "out"), "--no-attack", *more]


def typed(monkeypatch: pytest.MonkeyPatch, lines: Sequence[str]) -> list[str]:
    """Put somebody at the terminal, who types these lines and then Ctrl-D; returns what is asked."""
    asked: list[str] = []
    waiting = iter(lines)

    def read(prompt: str = "") -> str:
        asked.append(prompt)
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", read)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    return asked


def test_a_whole_run_on_the_screen(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(auto_pair.words(pair, output=tmp_path / "out")) == 0
    shown = capsys.readouterr().out
    assert "base " in shown and "(named by README.md;" in shown
    assert "attacked: mean attack success along the attack" in shown
    assert f"Written to {tmp_path / 'out'}: report.md" in " ".join(shown.split())
    assert "What next?" not in shown, "nobody is there"
    assert max(len(line) for line in shown.splitlines() if str(pair.parent) not in line) <= 120


def test_json_is_the_record_alone(pair: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main([*words(pair), "--json"]) == 0
    shown = capsys.readouterr()
    assert AutoReport.from_json(shown.out).to_json() == (output / "report.json").read_text()
    assert main([*words(pair), "--json", "--dry-run"]) == 0
    assert AutoPlan.from_json(capsys.readouterr().out).candidates == 4


def test_a_dry_run_writes_nothing(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*auto_pair.words(pair, output=tmp_path / "out"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "measured  up to 15 models on 17 prompts each, 7 of them under an attack of 6 steps" in shown
    assert not (tmp_path / "out").exists()


def test_stopping_early_is_no_failure(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = auto_pair.words(pair, **{"output": tmp_path / "out", "attack-lr": 1e-7, "readings": 1})
    assert main([*given, "--push", "org/hardened"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Stopped: The attack does not cost the aligned model its safety" in shown
    assert "Push" not in shown


MISTAKES: list[tuple[list[str], str]] = [
    (["--attack", "gsm8k"], "--attack and --no-attack contradict each other"),
    (["--chat"], "--chat needs a terminal to type in"),
    (["--benchmark", "ifeval"], "--benchmark needs lm_eval: pip install 'lm-eval[hf]'"),
    (["--rs", "two"], "--r must be a number, got 'two'"),
    (["--alphas", "much"], "--alphas takes numbers, got 'much'"),
    (["--attack-lr", "fast"], "--attack-lr takes numbers, got 'fast'"),
    (["--limits", "speed=1"], "--limits has no measure 'speed'"),
    (["--sft", "fast"], "--sft takes NAME=VALUE"),
    (["--n", "0"], "n must be a positive whole number, got 0"),
]


@pytest.mark.parametrize(("more", "said"), MISTAKES, ids=[" ".join(more) for more, _ in MISTAKES])
def test_a_mistake_is_one_line(
    more: list[str], said: str, pair: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    assert main([*words(pair), *more]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_nobody_is_asked_without_a_terminal(pair: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("somebody was asked"))
    assert main(words(pair)) == 0


def test_the_menu(
    pair: Path, output: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    question = json.loads((pair / "prompts.jsonl").read_text().splitlines()[0])["prompt"]
    lines = ["9", "3", "", "1", "", "2", question, "", question]
    asked = typed(monkeypatch, lines)
    assert main(words(pair)) == 0
    shown = capsys.readouterr().out
    assert "There is no '9'; type 1, 2, 3 or 4." in shown
    assert (
        f"pip install 'lm-eval[hf]'. Then run\n  lm_eval --model hf --model_args pretrained={output}/hardened" in shown
    )
    assert "Pushed" not in shown, "no name was typed"
    answers = [line for line in shown.splitlines() if line.startswith("model: ")]
    assert len(answers) == 2
    assert answers[0] == answers[1], "the empty line began anew"
    assert "sorry" in answers[0]
    assert asked[-1] == "1-4: ", "Ctrl-D ends the chat, and once more the menu"
    assert shown.count("What next?") == 5


def test_a_chat_remembers(pair: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lox_hf.evaluation.models.local import LocalModel

    heard: list[Any] = []
    replies = LocalModel.replies

    def listen(self: LocalModel, conversations: Any, done: Any = ()) -> Any:
        heard.append([turn["role"] for turn in conversations[0]])
        return replies(self, conversations, done)

    monkeypatch.setattr(LocalModel, "replies", listen)
    typed(monkeypatch, ["what is red ?", "why ?"])
    assert main([*words(pair), "--chat", "--system-prompt", "be kind"]) == 2, "a run with another system prompt"
    assert main([*words(pair), "--chat"]) == 0
    assert heard == [["user"], ["user", "assistant", "user"]]


def test_benchmarks_run_by_the_command_that_is_shown(
    pair: Path, output: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "lm_eval"
    program.write_text('#!/bin/sh\necho "called with $@"\nexit 3\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert main([*words(pair), "--benchmark", "ifeval"]) == 0
    shown = capfd.readouterr()
    command = next(line for line in shown.out.splitlines() if line.startswith("  lm_eval "))
    assert f"called with {command.removeprefix('  lm_eval ')}" in shown.out
    assert f"pretrained={output}/hardened --tasks ifeval" in command
    assert "--apply_chat_template" in command
    assert "lm_eval ended with code 3" in shown.err


def test_it_is_pushed_as_a_private_model(pair: Path, output: Path, tmp_path: Path) -> None:
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    with FakeHub(TOKEN) as hub:
        hub_settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path)}
        switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(TESTS)}
        done = subprocess.run(
            [sys.executable, Path(__file__).with_name("hub_run.py"), *words(pair), "--push", "org/hardened"],
            env={**ours, **hub_settings, **switches},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert f"Pushed: {hub.url}/org/hardened/commit/{hub.head('org/hardened')}" in done.stdout
        repo = hub.repos["org/hardened"]
        files = repo.at("main")[1]
    assert repo.private
    weights = contents(output / "hardened")
    assert {name: data for name, data in files.items() if name in weights} == weights
    report, card = AutoReport.from_json((output / "report.json").read_text()), ModelCard(files["README.md"].decode())
    assert AutoReport.from_json(files["evaluation/auto.json"].decode()) == report
    # What was measured stands on the card, in the words of the report.
    found = report.differences["asr"]
    assert escape(str(found.after)) in card.text and escape(str(found)) in card.text
    assert f"{report.after.score.value('kl'):.3g}" in card.text
    assert "Fine-tuning attacks: not evaluated." in card.text  # it chose without one
