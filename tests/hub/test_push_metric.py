"""The metric as a Space: uploaded by `lox-hf push-metric` to a stand-in for the Hub, and loaded back by evaluate."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from fake_hub import FakeHub, Repo
from lox_hf import load_metric
from lox_hf.errors import ConfigError
from lox_hf.hub.space import FOLDER, METRIC, push_metric

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_TheSecretOfThisTest"
RESPONSES = ["I'm sorry, but I can't help with that.", "Sure! Turn the dial slowly and listen for a click.", ""]
LOAD = f"""
import json, evaluate
metric = evaluate.load("org/{METRIC}")
print(json.dumps([metric.__module__, metric.compute(predictions={RESPONSES})]))
"""


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub(TOKEN) as hub:
        yield hub


def run(hub: FakeHub, home: Path, *words: str, token: str = TOKEN) -> "subprocess.CompletedProcess[str]":
    """Run Python in a process that knows no Hub but this one."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    place = {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}
    switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    command = [sys.executable, *words]
    return subprocess.run(
        command, env={**ours, **place, **switches}, capture_output=True, text=True, timeout=120, check=False
    )


def push(hub: FakeHub, home: Path, *words: str, **settings: str) -> "subprocess.CompletedProcess[str]":
    done = run(hub, home, "-m", "lox_hf.cli", "push-metric", *words, **settings)
    assert TOKEN not in done.stdout + done.stderr
    return done


def test_the_space_is_made_and_evaluate_loads_it(hub: FakeHub, tmp_path: Path) -> None:
    done = push(hub, tmp_path, f"org/{METRIC}", "--public")
    assert done.returncode == 0, done.stderr
    space = hub.repos[f"spaces/org/{METRIC}"]
    assert not space.private and len(space.commits) == 2  # what made the repository, and one commit with all files
    _, stored = space.at("main")
    assert {name: data for name, data in stored.items() if name != ".gitattributes"} == {
        path.name: path.read_bytes() for path in FOLDER.iterdir() if path.is_file()
    }
    assert f"(public) got:\n  README.md  {len(stored['README.md']):>21} bytes" in done.stdout
    assert done.stdout.endswith(f'Load it with evaluate.load("org/{METRIC}").\n')
    loaded = run(hub, tmp_path / "other", "-c", LOAD, token="")
    assert loaded.returncode == 0, loaded.stderr
    module, result = json.loads(loaded.stdout.splitlines()[-1])
    assert f"org--{METRIC}" in module and result == load_metric(METRIC).compute(predictions=RESPONSES)


def test_private_unless_asked_and_then_loaded_with_a_login_only(hub: FakeHub, tmp_path: Path) -> None:
    done = push(hub, tmp_path, f"org/{METRIC}", "--json")
    assert done.returncode == 0, done.stderr
    assert hub.repos[f"spaces/org/{METRIC}"].private and json.loads(done.stdout)["private"] is True
    assert "It is private: that works only with a login" in push(hub, tmp_path, f"org/{METRIC}").stdout
    with_login = run(hub, tmp_path / "with", "-c", LOAD)
    without = run(hub, tmp_path / "without", "-c", LOAD, token="")
    assert without.returncode != 0 and f"org/{METRIC}" in without.stderr
    assert with_login.returncode == 0, with_login.stderr


def test_a_second_push_keeps_who_may_read(hub: FakeHub, tmp_path: Path) -> None:
    hub.repos[f"spaces/org/{METRIC}"] = Repo(private=False)
    hub.repos[f"spaces/org/{METRIC}"].commit({"app.py": b"old"})
    done = push(hub, tmp_path, f"org/{METRIC}")
    assert "(public) got:" in done.stdout, done.stderr
    assert hub.repos[f"spaces/org/{METRIC}"].at("main")[1]["app.py"] == (FOLDER / "app.py").read_bytes()


def test_a_dry_run_asks_nobody(hub: FakeHub, tmp_path: Path) -> None:
    done = push(hub, tmp_path, f"org/{METRIC}", "--dry-run")
    assert done.returncode == 0 and done.stdout.endswith("Nothing was uploaded.\n")
    assert "private if it is new" in done.stdout and not hub.requests


def test_the_package_of_the_space(hub: FakeHub, tmp_path: Path) -> None:
    package = "lox-hf[eval] @ https://example.org/lox_hf.zip"
    push(hub, tmp_path, f"org/{METRIC}", "--package", package)
    stored = hub.repos[f"spaces/org/{METRIC}"].at("main")[1]["requirements.txt"].decode()
    assert stored == (FOLDER / "requirements.txt").read_text().replace("lox-hf[eval]", package)
    assert stored.splitlines()[-1] == package
    with pytest.raises(ConfigError, match="one line of requirements"):
        push_metric(f"org/{METRIC}", package="a\nb", dry_run=True)


@pytest.mark.parametrize("name", ["org/metric", METRIC, f"/{METRIC}", ""])
def test_a_name_that_evaluate_cannot_load(name: str) -> None:
    with pytest.raises(ConfigError, match=f"must be OWNER/{METRIC}"):
        push_metric(name)


def test_what_the_hub_refuses_is_said_in_a_line(hub: FakeHub, tmp_path: Path) -> None:
    done = push(hub, tmp_path, f"org/{METRIC}", token="hf_another")
    assert done.returncode == 2 and not hub.repos and "Traceback" not in done.stderr
    assert re.search(f"lox-hf: error: Cannot upload to 'org/{METRIC}': HTTP 401", done.stderr)
    with pytest.raises(ConfigError, match="holds a space") as error:
        push_metric(f"org/{METRIC}", token=f"{TOKEN}\n")
    assert TOKEN not in str(error.value)


def test_the_space_asks_for_what_it_needs() -> None:
    about = yaml.safe_load((FOLDER / "README.md").read_text().split("---")[1])
    assert about["sdk"] == "gradio" and {"evaluate", "metric"} <= set(about["tags"])
    # The machine of a Space has no accelerator unless one is paid for: torch without several GB of CUDA.
    index, torch, package = (FOLDER / "requirements.txt").read_text().splitlines()
    assert index.endswith("/whl/cpu") and (torch, package) == ("torch", "lox-hf[eval]")
