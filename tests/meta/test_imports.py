"""What the first import and `--help` cost: measured in a fresh process, where nothing is loaded yet."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lox_hf

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "peft", "trl", "evaluate", "datasets", "matplotlib", "openai"}
HELP_CPU_S = 1.0
CALL_MAIN = """
import sys
from lox_hf.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""
SAVE_MODULES = """
import json, sys
json.dump(sorted({name.partition(".")[0] for name in sys.modules}), open(sys.argv[-1], "w"))
"""


def run_python(code: str, *args: str) -> float:
    """Run `code` in a new interpreter and return the CPU seconds that it took, user and system."""
    child = subprocess.Popen([sys.executable, "-c", code, *args], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, f"python -c {code!r} exited with {child.returncode}"
    return usage.ru_utime + usage.ru_stime


def heavy_modules_after(code: str, tmp_path: Path, *args: str) -> set[str]:
    """Run `code` in a new interpreter and return which heavy packages it left loaded."""
    listing = tmp_path / "modules.json"
    run_python(code + SAVE_MODULES, *args, str(listing))
    return HEAVY & set(json.loads(listing.read_text()))


def test_import_loads_nothing_heavy(tmp_path: Path) -> None:
    assert heavy_modules_after("import lox_hf", tmp_path) == set()


def test_import_check_notices_a_heavy_module(tmp_path: Path) -> None:
    # The control: the same probe sees what a public name brings in once it is touched.
    assert "torch" in heavy_modules_after("import lox_hf; lox_hf.apply_lox", tmp_path)


COMMANDS = ("--help", "harden --help", "asr --help", "utility --help", "stress --help", "demo --help", "--version")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_quick_and_light(command: str, tmp_path: Path) -> None:
    # The listing's path is the last argument of the child: main must not see it.
    code = CALL_MAIN.replace("main()", "main(sys.argv[1:-1])")
    assert heavy_modules_after(code, tmp_path, *command.split()) == set()
    # The least of three: what is over it is the machine's, not the command's.
    assert min(run_python(CALL_MAIN, *command.split()) for _ in range(3)) < HELP_CPU_S


@pytest.mark.parametrize("name", lox_hf.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(lox_hf, name) is not None
    assert name in dir(lox_hf)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        lox_hf.no_such_name  # noqa: B018
