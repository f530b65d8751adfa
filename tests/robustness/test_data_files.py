"""Data sets on a stand-in for the Hub: which of their files are trained on, and what goes wrong."""

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
from lox_hf.robustness.attacks.presets import PRESETS

TOKEN = "hf_TheSecretOfThisTest"
ROOT = Path(__file__).resolve().parents[2]
CLIENT = Path(__file__).parent / "examples_client.py"


def parquet(*rows: dict[str, str]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
    return file.getvalue()


def jsonl(*rows: dict[str, str]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def pair(prompt: str) -> dict[str, str]:
    return {"prompt": prompt, "response": "Yes."}


def gsm(question: str) -> bytes:
    return parquet({"question": question, "answer": "#### 1"})


# The files of the presets' repositories as the Hub lists them, and repositories of every other shape.
REPOSITORIES = {
    "openai/gsm8k": {
        "README.md": b"# GSM8K",
        "main/train-00000-of-00001.parquet": gsm("main train"),
        "main/test-00000-of-00001.parquet": gsm("main test"),
        "socratic/train-00000-of-00001.parquet": gsm("socratic train"),
    },
    "tatsu-lab/alpaca": {
        "dataset_infos.json": b'{"a": {}}',
        "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet": parquet(
            {"instruction": "alpaca", "input": "", "output": "Yes.", "text": "Below is alpaca Yes."}
        ),
    },
    "databricks/databricks-dolly-15k": {
        "README.md": b"# Dolly",
        "databricks-dolly-15k.jsonl": jsonl(
            {"instruction": "dolly", "context": "", "response": "Yes.", "category": "open_qa"}
        ),
    },
    "org/shards": {
        "data/train-00001-of-00002-0f2d.parquet": parquet(pair("second")),
        "data/train-00000-of-00002-a09b.parquet": parquet(pair("first")),
        "data/test-00000-of-00001-77aa.parquet": parquet(pair("test")),
    },
    "org/two": {"easy.jsonl": jsonl(pair("easy")), "hard.jsonl": jsonl(pair("hard"))},
    "org/none": {"README.md": b"# Nothing", "dataset_infos.json": b"{}"},
    "org/layout": {"train.jsonl": jsonl({"title": "A", "body": "B"})},
    "org/gated": {"train.jsonl": jsonl(pair("secret"))},
}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub(TOKEN) as hub:
        for name, files in REPOSITORIES.items():
            hub.repos[f"datasets/{name}"] = Repo(gated=name == "org/gated")
            hub.repos[f"datasets/{name}"].commit(files)
        yield hub


def load(url: str, folder: Path, *names: str, **environment: str) -> list[Any]:
    """Load in a process of its own that knows no Hub but this one."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    theirs = {"HF_ENDPOINT": url, "HF_TOKEN": TOKEN, "HF_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
    switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, str(CLIENT), *names],
        cwd=folder,
        env=ours | theirs | switches | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_presets_and_other_shapes_and_again_without_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    names = [preset["data"] for preset in PRESETS.values() if preset["data"]]
    names += ["tatsu-lab/alpaca", "org/shards", "org/two/hard.jsonl", "openai/gsm8k/socratic/*"]
    expected = [["main train"], ["alpaca"], ["dolly"], ["alpaca"], ["first", "second"], ["hard"], ["socratic train"]]
    assert load(hub.url, tmp_path, *names) == expected
    fetched = {path for _, path, _ in hub.requests if "/resolve/" in path}
    assert not any("README" in path or "/test-" in path for path in fetched)
    before = len(hub.requests)
    assert load(hub.url, tmp_path, *names, HF_HUB_OFFLINE="1") == expected
    assert len(hub.requests) == before


def test_a_file_goes_before_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "shards").write_bytes(b"")
    (tmp_path / "org" / "pairs.jsonl").write_bytes(jsonl(pair("mine")))
    mine, nameless, missing = load(hub.url, tmp_path, "org/pairs.jsonl", "org/shards", "org/missing.jsonl")
    assert mine == ["mine"]
    assert nameless.startswith("PromptError: Cannot read 'org/shards': expected a name that ends in")
    assert missing == "PromptError: Cannot read 'org/missing.jsonl': there is no such file."
    assert hub.requests == []


def test_what_goes_wrong(hub: FakeHub, tmp_path: Path) -> None:
    expected = {
        "openai/gsm8k": r"holds 2 sets of rows that could be meant: main/train\*.parquet; socratic/train\*.parquet. "
        r"Name one, as 'openai/gsm8k/main/train\*.parquet'",
        "org/two": r"holds 2 sets of rows that could be meant: easy.jsonl; hard.jsonl. Name one, as 'org/two/easy",
        "org/none": "The data set 'org/none' holds no file that ends in .parquet, .jsonl, .json, .csv, .tsv, .ndjson",
        "org/shards/validation*": r"'org/shards' holds no file validation\*. Name its files as 'org/shards/FOLDER",
        "org/layout": "Cannot tell prompts and responses of 'org/layout': expected a column of prompts.*'title'",
        "org/gated": "Cannot load the data set 'org/gated': 'org/gated' is gated: ask for access.*A file of your own",
        "org/unknown": "Cannot load the data set 'org/unknown': 'org/unknown' is neither a folder.* nor a dataset on",
    }
    for (name, match), found in zip(expected.items(), load(hub.url, tmp_path, *expected), strict=True):
        assert isinstance(found, str), name
        assert found.startswith("PromptError: ") and "\n" not in found, found
        assert re.search(match, found), found


def test_out_of_reach(tmp_path: Path) -> None:
    with FakeHub(TOKEN) as closed:
        url = closed.url  # refuses connections once the server is closed
    (found,) = load(url, tmp_path, "org/shards")
    assert found.startswith("PromptError: Cannot load the data set 'org/shards': 'org/shards' is not a folder")
    assert "the Hub cannot be reached" in found and "A file of your own works as well" in found
