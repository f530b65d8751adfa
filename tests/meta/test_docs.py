"""The documents agree with the tree: links lead somewhere, code compiles, names and tests they speak of exist."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import lox_hf

ROOT = Path(__file__).resolve().parents[2]
PATTERNS = ("*.md", "docs/**/*.md", "examples/**/*.md", "lox_hf/metrics/**/*.md", "model_cards/**/*.md")
DOCUMENTS = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern))
PAGES = sorted((ROOT / "docs").glob("*.md"))
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NAME = re.compile(r"`(lox_hf(?:\.\w+)+)(?:\(\))?`")
PATH = re.compile(r"`((?:lox_hf|tests|docs|examples|benchmarks)/[\w./-]*)(?:::(\w+))?`")


def prose_of(text: str) -> str:
    """Return the Markdown without its code blocks."""
    return FENCE.sub("", text)


def anchors_of(text: str) -> set[str]:
    """Return the anchors of the headings, in GitHub's spelling."""
    headings = re.findall(r"^#+ +(.+?) *$", prose_of(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def broken_links(text: str, folder: Path) -> list[str]:
    """Return the local links of a Markdown text in `folder` that lead nowhere."""
    broken = []
    for link in LINK.findall(prose_of(text)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = folder / file
        if not target.exists() or (file and ROOT not in target.resolve().parents):
            broken.append(link)
        elif anchor and anchor not in anchors_of(target.read_text() if file else text):
            broken.append(link)
    return broken


def missing_names(text: str) -> list[str]:
    """Return the dotted names, paths and tests between backticks that do not exist."""
    missing = [name for name in NAME.findall(text) if not resolves(name)]
    for path, test in PATH.findall(text):
        file = ROOT / path
        definition = re.compile(rf"^\s*(?:def|class) {test}\b", re.MULTILINE)
        if not file.exists() or (test and not definition.search(file.read_text())):
            missing.append(f"{path}::{test}" if test else path)
    return missing


def resolves(dotted: str) -> bool:
    """Say whether a dotted name is a module or can be reached from one."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part, None)
        return found is not None
    return False


def python_of(block: str) -> str:
    """Return the statements of a code block, without the prompts and output of a session."""
    if ">>>" not in block:
        return block
    return "\n".join(line[4:] for line in block.splitlines() if line.startswith((">>> ", "... ")))


def document_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=document_id)
def test_local_links_lead_somewhere(document: Path) -> None:
    assert broken_links(document.read_text(), document.parent) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=document_id)
def test_names_and_paths_exist(document: Path) -> None:
    assert missing_names(document.read_text()) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=document_id)
def test_python_blocks_compile(document: Path) -> None:
    for language, block in FENCE.findall(document.read_text()):
        if language in {"python", "py", "pycon"}:
            ast.parse(python_of(block), filename=document.name)


def test_readme_shows_python() -> None:
    assert any(language == "python" for language, _ in FENCE.findall((ROOT / "README.md").read_text()))


def test_checks_notice_what_is_wrong() -> None:
    text = "# One two\n[a](#one-two) [b](#three) [c](CONTRIBUTING.md) [d](nowhere.md) [e](https://example.org)\n"
    assert broken_links(text, ROOT) == ["#three", "nowhere.md"]
    names = "`lox_hf.LoxConfig` `lox_hf.NoSuch` `lox_hf.no.such` `tests/meta/test_docs.py::test_readme_shows_python` "
    assert missing_names(names + "`tests/meta/test_docs.py::test_none` `docs/none.md`") == [
        "lox_hf.NoSuch",
        "lox_hf.no.such",
        "tests/meta/test_docs.py::test_none",
        "docs/none.md",
    ]


@pytest.mark.parametrize("name", [name for name in lox_hf.__all__ if not name.startswith("__")])
def test_public_name_has_a_docstring_with_an_example(name: str) -> None:
    documentation = inspect.getdoc(getattr(lox_hf, name)) or ""
    assert documentation, f"{name} has no docstring"
    # An exception is raised for the user, not by them: its docstring says when, and needs no example.
    if not (inspect.isclass(public := getattr(lox_hf, name)) and issubclass(public, Exception)):
        assert ">>> " in documentation, f"the docstring of {name} has no example"


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md", *(f"docs/{path.name}" for path in PAGES)])
def test_no_placeholder_is_left(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert not re.findall(r"^[A-Z][A-Z_]{3,}$", text, flags=re.MULTILINE)
    assert re.findall(r"^[A-Z][A-Z_]{3,}$", "a\nBENCH_TABLE\nb", flags=re.MULTILINE)  # control
