"""The wheel, built here and used where the checkout is not on the path."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
HARDEN = """
import sys
import lox_hf
base, aligned, output = sys.argv[1:]
config = lox_hf.LoxConfig(base_model_name_or_path=base, r=1, alpha=1.0)
report = lox_hf.harden_checkpoint(aligned, output, config)
assert len(report.tensors) > 0
print(lox_hf.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, ROOT]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True, capture_output=True, cwd=folder)
    (built,) = folder.glob("lox_hf-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    install = ["install", "--no-deps", "--no-index", "--target", target, wheel]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, capture_output=True, cwd=target)
    return target


@pytest.fixture(scope="module")
def rank_one_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny base and an aligned model that differs from it by a matrix of rank one in every matrix."""
    folder = tmp_path_factory.mktemp("pair")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    model.save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                rows, columns = (torch.randn(size, generator=generator) for size in weight.shape)
                weight.add_(torch.outer(rows, columns), alpha=0.01)
    model.save_pretrained(folder / "aligned")
    return folder / "base", folder / "aligned"


def run_installed(installed: Path, *command: str | Path, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    paths = (ROOT / "lox_hf").rglob("*")
    sources = {str(path.relative_to(ROOT)) for path in paths if path.suffix in {".py", ".typed", ".txt", ".md"}}
    assert sources <= names
    assert "lox_hf/py.typed" in names
    metric = {f"lox_hf/metrics/attack_success_rate/{name}" for name in ("README.md", "requirements.txt", "app.py")}
    assert metric | {"lox_hf/evaluation/judges/rubric.txt", "lox_hf/hub/template.md"} <= names
    metadata = wheel.name.replace("-py3-none-any.whl", ".dist-info")
    assert {name.partition("/")[0] for name in names - sources} == {metadata}
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_console_script_tells_the_version_of_the_wheel(wheel: Path, installed: Path, tmp_path: Path) -> None:
    version = wheel.name.split("-")[1]
    assert run_installed(installed, installed / "bin" / "lox-hf", "--version", cwd=tmp_path).split()[-1] == version


def test_installed_package_hardens(installed: Path, rank_one_pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, aligned = rank_one_pair
    output = tmp_path / "hardened"
    said = run_installed(installed, sys.executable, "-c", HARDEN, base, aligned, output, cwd=tmp_path)
    module = Path(said.splitlines()[-1])
    assert module.is_relative_to(installed)
    assert not module.is_relative_to(ROOT)

    before, after, hardened = (load_file(folder / "model.safetensors") for folder in (base, aligned, output))
    assert hardened.keys() == after.keys()
    for name, weight in hardened.items():
        delta = after[name] - before[name]
        # The whole delta has rank one, so r=1 and alpha=1 adds all of it once more; float32 leaves 1e-6 of error.
        torch.testing.assert_close(weight, after[name] + delta, rtol=0, atol=1e-5)
        assert bool(delta.any()) == (weight.ndim == 2)
