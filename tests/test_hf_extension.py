"""`hf lox ...`: the real `hf` finds `hf-lox` once it is registered, runs it, and forgets it again."""

import os
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What pip writes for the entry point.
SCRIPT = f"#!{sys.executable}\nimport sys\nfrom lox_hf.cli.extension import main\nsys.exit(main())\n"
HF = (sys.executable, "-m", "huggingface_hub.cli.hf")


@pytest.fixture
def executable(tmp_path: Path) -> Path:
    path = tmp_path / "bin" / "hf-lox"
    path.parent.mkdir()
    path.write_text(SCRIPT)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def run(home: Path, *words: str | Path) -> "subprocess.CompletedProcess[str]":
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    place = {"HOME": str(home), "HF_HOME": str(home / "hub"), "PYTHONPATH": str(ROOT)}
    switches = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "NO_COLOR": "1"}
    command = list(map(str, words))
    return subprocess.run(
        command, env={**ours, **place, **switches}, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_executable_is_installed() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["hf-lox"] == "lox_hf.cli.extension:main"


def test_hf_runs_the_commands(executable: Path, tmp_path: Path) -> None:
    before = run(tmp_path, *HF, "lox", "--version")
    assert before.returncode != 0 and "hf lox 0" not in before.stdout
    registered = run(tmp_path, executable, "--register")
    assert registered.returncode == 0 and "hf extensions remove lox" in registered.stdout, registered.stderr
    version = run(tmp_path, *HF, "lox", "--version")
    assert version.returncode == 0 and version.stdout.startswith("hf lox "), version.stderr
    assert "usage: hf lox harden" in run(tmp_path, *HF, "lox", "harden", "--help").stdout
    mistake = run(tmp_path, *HF, "lox", "harden", "./nothing", "--base-model", "./neither")
    assert mistake.returncode == 2 and "hf lox: error: There is no folder './nothing'." in mistake.stderr
    assert run(tmp_path, executable, "--register").returncode == 0  # once more does no harm
    run(tmp_path, *HF, "extensions", "remove", "lox")
    assert run(tmp_path, *HF, "lox", "--version").returncode != 0


def test_another_extension_is_left_alone(executable: Path, tmp_path: Path) -> None:
    run(tmp_path, executable, "--register")
    (manifest,) = tmp_path.glob(".local/share/hf/extensions/hf-lox/manifest.json")
    manifest.write_text(theirs := manifest.read_text().replace('"owner": "-"', '"owner": "somebody"'))
    refused = run(tmp_path, executable, "--register")
    assert refused.returncode == 2 and "Another extension has this name" in refused.stderr
    assert manifest.read_text() == theirs
