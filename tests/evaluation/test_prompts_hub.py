"""Prompt sets by name, each in its repository's layout, from a stand-in for the Hub; and what goes wrong."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fake_hub import FakeHub, Repo
from lox_hf.evaluation.data.sets import PROMPT_SETS

TOKEN = "hf_TheSecretOfThisTest"
ROOT = Path(__file__).resolve().parents[2]
CLIENT = Path(__file__).parent / "prompts_client.py"
JBB = b"Index,Goal,Target,Behavior,Category,Source\n0,Bake bread,Sure,Baking,Food,Original\n"
XSTEST = (
    b"id,prompt,type,label,focus,note\n1,Kill a process?,homonyms,safe,kill,\n2,Bake?,contrast_homonyms,unsafe,,\n"
)


def parquet(*rows: dict[str, str]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
    return file.getvalue()


# The files of each repository, as the Hub lists them; the prompts are ours.
REPOSITORIES = {
    "walledai/AdvBench": {
        "README.md": b"# AdvBench",
        "data/train-00000-of-00002.parquet": parquet({"prompt": "Bake bread", "target": "Sure, here is bread"}),
        "data/train-00001-of-00002.parquet": parquet({"prompt": "Fry an egg", "target": "Sure, here is an egg"}),
    },
    "JailbreakBench/JBB-Behaviors": {
        "data/harmful-behaviors.csv": JBB,
        "data/benign-behaviors.csv": JBB.replace(b"Bake", b"Eat"),
        "data/judge-comparison.csv": b"Index,prompt,response\n0,Bake,Sure\n",
    },
    "walledai/HarmBench": {
        "contextual/train-00000-of-00001.parquet": parquet({"prompt": "Fry", "context": "Egg", "category": "food"}),
        "copyright/train-00000-of-00001.parquet": parquet({"prompt": "Sing", "tags": "lyrics"}),
        "standard/train-00000-of-00001.parquet": parquet({"prompt": "Bake bread", "category": "food"}),
    },
    "walledai/StrongREJECT": {
        "data/train-00000-of-00001.parquet": parquet({"prompt": "Bake bread", "category": "Food", "source": "ours"}),
    },
    "Paul/XSTest": {"README.md": b"# XSTest", "xstest_prompts.csv": XSTEST},
}


def prompt(text: str, category: str = "", harmful: bool = True) -> dict[str, Any]:
    return {"text": text, "harmful": harmful, "category": category, "reference": ""}


PROMPTS = {
    "adv-bench": [prompt("Bake bread"), prompt("Fry an egg")],
    "JailbreakBench": [prompt("Bake bread", "Food")],
    "harmbench": [prompt("Bake bread", "food")],
    "strong_reject": [prompt("Bake bread", "Food")],
    "XSTEST": [prompt("Kill a process?", "homonyms", harmful=False), prompt("Bake?", "contrast_homonyms")],
}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    """A Hub with the repository of every set."""
    with FakeHub(TOKEN) as hub:
        for name, files in REPOSITORIES.items():
            hub.repos[f"datasets/{name}"] = Repo()
            hub.repos[f"datasets/{name}"].commit(files)
        yield hub


def load(url: str, folder: Path, *calls: dict[str, Any], **environment: str) -> list[Any]:
    """Load prompts in a process of its own that knows no Hub but this one; the token is seen nowhere."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    theirs = {"HF_ENDPOINT": url, "HF_TOKEN": TOKEN, "HF_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
    switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, str(CLIENT), *map(json.dumps, calls)],
        cwd=folder,
        env=ours | theirs | switches | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_set_by_its_name_and_again_without_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    calls = [{"name_or_path": name} for name in PROMPTS]
    assert load(hub.url, tmp_path, *calls) == list(PROMPTS.values())
    assert {known.repository for known in PROMPT_SETS} == set(REPOSITORIES)
    fetched = {path for _, path, _ in hub.requests if "/resolve/" in path}
    assert len(fetched) == 6 and not any(re.search("benign|contextual|README", path) for path in fetched)
    before = len(hub.requests)
    assert load(hub.url, tmp_path, *calls, HF_HUB_OFFLINE="1") == list(PROMPTS.values())
    assert len(hub.requests) == before


def test_a_revision_and_the_first_prompts(hub: FakeHub, tmp_path: Path) -> None:
    old = hub.head("datasets/Paul/XSTest")
    hub.repos["datasets/Paul/XSTest"].commit({"xstest_prompts.csv": XSTEST.replace(b"Bake", b"Fry")})
    now, then = load(
        hub.url, tmp_path, {"name_or_path": "xstest"}, {"name_or_path": "xstest", "revision": old, "n": 1}
    )
    assert [prompt["text"] for prompt in now] == ["Kill a process?", "Fry?"]
    assert [prompt["text"] for prompt in then] == ["Kill a process?"]


def test_what_the_hub_refuses(hub: FakeHub, tmp_path: Path) -> None:
    hub.repos["datasets/walledai/AdvBench"].gated = True
    hub.repos["datasets/walledai/StrongREJECT"].private = True
    del hub.repos["datasets/walledai/HarmBench"]
    hub.repos["datasets/JailbreakBench/JBB-Behaviors"] = Repo()
    hub.repos["datasets/JailbreakBench/JBB-Behaviors"].commit({"README.md": b"moved"})
    expected = {
        "advbench": "AdvBench: 'walledai/AdvBench' is gated: ask for access on its Hub page.*hf auth login.*own works",
        "harmbench": "'walledai/HarmBench' is neither a folder on this machine nor a dataset on the Hub;.*own works",
        "strongreject": "'walledai/StrongREJECT' is neither .* for a private one run `hf auth login`. A file",
        "xstest": "'Paul/XSTest' has no revision 'v9'.* A file of your own works as well: pass its path.",
        "jailbreakbench": r"'JailbreakBench/JBB-Behaviors' holds no file data/harmful-behaviors\*.csv.*path of a file",
    }
    settings = {"strongreject": {"token": False}, "xstest": {"revision": "v9"}}
    calls = [{"name_or_path": name, **settings.get(name, {})} for name in expected]
    for (name, match), found in zip(expected.items(), load(hub.url, tmp_path, *calls), strict=True):
        assert found.startswith("PromptError: Cannot load the prompt set ") and "\n" not in found, name
        assert re.search(match, found), found


def test_out_of_reach_and_offline(tmp_path: Path) -> None:
    with FakeHub(TOKEN) as closed:
        url = closed.url  # refuses connections once the server is closed
    call = {"name_or_path": "xstest"}
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        (found,) = load(url, tmp_path, call, **environment)
        assert found.startswith("PromptError: Cannot load the prompt set XSTest: 'Paul/XSTest' is not")
        assert "the Hub cannot be reached" in found and "A file of your own works as well" in found
