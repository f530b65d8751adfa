"""What tests of commands share: a working directory of their own, and a way to run a command in this process."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lox_hf.cli.main import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a copy of the module's `template`."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command; gives the exit code, and what stands on standard output and error."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as end:  # argparse's own mistakes
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run
