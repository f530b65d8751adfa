"""The README's way from a checkpoint to the Hub: every command as it stands, on a pair that trains in a second."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from fake_hub import FakeHub
from robustness.tiny_pair import save_pair, write_rows

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
TOKEN = "hf_ReadmePathSecret"


@pytest.fixture(scope="module")
def section() -> str:
    readme = (ROOT / "README.md").read_text()
    return readme.partition("## Publish it\n")[2].partition("\n## ")[0]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """What `make demo` leaves, made by a smaller world."""
    demo = tmp_path / "lox-demo"
    save_pair(demo / "seed-0")
    write_rows(demo)
    (demo / "prompts.jsonl").rename(demo / "seed-0" / "questions.jsonl")
    (demo / "attack-rows").mkdir()
    (demo / "attack.jsonl").rename(demo / "attack-rows" / "pairs-100.jsonl")
    card = f"---\nbase_model: {json.dumps(str(demo / 'seed-0' / 'base'))}\n---\n"
    (demo / "seed-0" / "aligned" / "README.md").write_text(card)
    return tmp_path


def blocks(section: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def commands_of(section: str) -> list[str]:
    """Commands behind "$", with the lines that go on."""
    (console,) = blocks(section, "console")
    return [line.removeprefix("$ ") for line in console.replace("\\\n", " ").splitlines() if line.startswith("$ ")]


def test_every_command_does_what_it_says(section: str, here: Path) -> None:
    commands, (code,) = commands_of(section), blocks(section, "python")
    assert [command.split()[1] for command in commands] == ["harden", "asr", "asr", "stress", "push", "push", "verify"]
    with FakeHub(TOKEN) as hub:
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(here / "cache")}
        switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        paths = os.pathsep.join([str(ROOT), str(TESTS)])
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("readme_client.py"))],
            input=json.dumps([commands, code]),
            env={**ours, **settings, **switches, "PYTHONPATH": paths},
            cwd=here,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        results, loaded = json.loads(done.stdout.splitlines()[-1])
        files = hub.repos["org/hardened"].at("main")[1]
        commits = len(hub.repos["org/hardened"].commits)
    assert results == [0] * len(commands), done.stderr
    assert loaded == "LlamaForCausalLM" and hub.repos["org/hardened"].private and commits == 2  # made, then pushed
    card = ModelCard(files["README.md"].decode())
    report = json.loads((here / "after" / "report.json").read_text())
    assert f"of {report['asr']['n']}" in card.text and card.data.license == "mit"
    assert {"evaluation/stress.json", "lox_report.json", "model.safetensors"} <= files.keys()
    assert TOKEN not in done.stderr + done.stdout and not any(TOKEN.encode() in data for data in files.values())
