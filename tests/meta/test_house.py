"""Rules of the house that no linter checks, read from the source; each beside a control that breaks it."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lox_hf

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "lox_hf").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MOST_LINES = 350
CORE_IMPORTS = {"torch", "lox_hf.core", "lox_hf.errors", "lox_hf.records"}
# The page of the metric's Space: it runs there, where gradio is.
SPACE = ROOT / "lox_hf" / "metrics" / "attack_success_rate" / "app.py"
# Where a package is imported by another name than it is installed by.
IMPORTED_AS = {"pyyaml": "yaml"}


def source_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Yield the modules that a syntax tree imports from outside the standard library."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        yield from (name for name in names if name.partition(".")[0] not in sys.stdlib_module_names)


def breaches(source: str, may_print: bool = False) -> list[str]:
    """Return what a source file does that none of ours may do, with the line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            if {"pickle", "cPickle", "dill", "cloudpickle"} & set(names):
                found.append(f"{node.lineno}: pickle")
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
        if keywords.get("trust_remote_code") is True:
            found.append(f"{node.lineno}: trust_remote_code=True")
        called = ast.unparse(node.func)
        if called == "print" and not may_print:
            found.append(f"{node.lineno}: print")
        if called == "torch.load" and keywords.get("weights_only") is not True:
            found.append(f"{node.lineno}: torch.load without weights_only=True")
    return found


def strangers(source: str, allowed: set[str]) -> list[str]:
    """Return the imports of a source file that are not of an allowed package."""
    imported = imports_of(ast.parse(source))
    return [name for name in imported if not any(name == own or name.startswith(f"{own}.") for own in allowed)]


@pytest.mark.parametrize("source", SOURCES, ids=source_id)
def test_a_file_is_one_idea(source: Path) -> None:
    assert len(source.read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("source", SOURCES, ids=source_id)
def test_nothing_unsafe_and_no_print(source: Path) -> None:
    assert breaches(source.read_text(), may_print=source.is_relative_to(ROOT / "lox_hf" / "cli")) == []


@pytest.mark.parametrize("source", [path for path in SOURCES if path.parent.name == "core"], ids=source_id)
def test_core_imports_torch_only(source: Path) -> None:
    assert strangers(source.read_text(), CORE_IMPORTS) == []


@pytest.mark.parametrize("source", SOURCES, ids=source_id)
def test_every_import_is_declared(source: Path) -> None:
    extras = PROJECT["optional-dependencies"]
    used = (text for name in ("eval", "peft", "trl", "plot", "deepspeed") for text in extras[name])
    declared = [*PROJECT["dependencies"], *used]
    allowed = {"lox_hf"} | {IMPORTED_AS.get(name, name) for name in (Requirement(text).name for text in declared)}
    if source == SPACE:
        allowed.add("gradio")
    assert strangers(source.read_text(), allowed) == []


def test_the_checks_notice_what_is_wrong() -> None:
    wrong = "import pickle\nprint(1)\nload(x, trust_remote_code=True)\ntorch.load(x)\n"
    assert [breach.partition(" ")[2] for breach in breaches(wrong)] == [
        "pickle",
        "print",
        "trust_remote_code=True",
        "torch.load without weights_only=True",
    ]
    assert breaches("print(1)", may_print=True) == []
    assert breaches("load(x, trust_remote_code=trust)\ntorch.load(x, weights_only=True)") == []
    assert strangers("import math\nimport torch.nn\nfrom numpy import array\nimport torchvision", CORE_IMPORTS) == [
        "numpy",
        "torchvision",
    ]


def test_one_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert lox_hf.__version__ == citation["version"]


def test_tested_versions_meet_the_declared_bounds() -> None:
    lines = (line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    tested = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    tested = {canonicalize_name(name): version for name, version in tested.items()}
    declared = [Requirement(text) for group in PROJECT["optional-dependencies"].values() for text in group]
    declared += [Requirement(text) for text in PROJECT["dependencies"]]
    for requirement in declared:
        if requirement.name != PROJECT["name"]:
            version = tested[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement} is tested with {version}"
