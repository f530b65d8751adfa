"""Files into rows: every kind and layout, texts that come back as they were, and what cannot be read."""

import csv
import gzip
import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lox_hf.errors import PromptError
from lox_hf.evaluation.data.tables import TEXT, read_rows

# What UTF-8 can write, without NUL; such texts are not blank.
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0")).filter(str.strip)


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def csv_of(rows: list[list[str]], **settings: Any) -> str:
    file = io.StringIO(newline="")
    csv.writer(file, **settings).writerows(rows)
    return file.getvalue()


TWO = [{"prompt": "Bake bread, quickly", "topic": "food"}, {"prompt": 'Say "hi"\nand wave', "topic": "manners"}]
COLUMNS = {name: [row[name] for row in TWO] for name in TWO[0]}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", csv_of([list(COLUMNS), *(list(row.values()) for row in TWO)])),
        ("rows.CSV", "\ufeff" + csv_of([list(COLUMNS), *(list(row.values()) for row in TWO)])),
        ("excel.csv", csv_of([list(COLUMNS), *(list(row.values()) for row in TWO)], delimiter=";")),
        ("rows.tsv", csv_of([list(COLUMNS), *(list(row.values()) for row in TWO)], delimiter="\t")),
        ("rows.json", json.dumps(TWO)),
        ("indented.json", "\ufeff" + json.dumps(TWO, indent=4)),
        ("wrapped.json", json.dumps({"version": 1, "data": TWO})),
        ("columns.json", json.dumps(COLUMNS)),
        ("pandas.json", json.dumps({name: dict(enumerate(values)) for name, values in COLUMNS.items()})),
        ("rows.jsonl", "\n\n".join(map(json.dumps, TWO)) + "\n"),
        ("rows.ndjson", "\r\n".join(map(json.dumps, TWO))),
        ("lines.json", "\n".join(map(json.dumps, TWO))),
        ("rows.jsonl.gz", gzip.compress("\n".join(map(json.dumps, TWO)).encode(), mtime=0)),
        (
            "rows.csv.gz",
            gzip.compress(csv_of([list(COLUMNS), *(list(row.values()) for row in TWO)]).encode(), mtime=0),
        ),
    ],
)
def test_the_same_rows_from_every_layout(name: str, content: str | bytes, tmp_path: Path) -> None:
    assert read_rows(written(tmp_path, name, content), ["prompt"]) == TWO


def test_parquet(tmp_path: Path) -> None:
    folder = tmp_path / "split=train"  # no column, though pyarrow takes such folders for one
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TWO), folder / "rows.parquet")
    assert read_rows(folder / "rows.parquet") == TWO


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lines.txt", "Bake bread\n\nSay hi\r\n"),
        ("one_column.csv", "Bake bread\nSay hi\n"),
        ("list.json", '["Bake bread", "Say hi"]'),
        ("wrapped.json", '{"instructions": ["Bake bread", "Say hi"]}'),
        ("lines.jsonl", '"Bake bread"\n"Say hi"\n'),
        ("lines.txt.gz", gzip.compress(b"Bake bread\nSay hi", mtime=0)),
    ],
)
def test_texts_that_stand_alone(name: str, content: str | bytes, tmp_path: Path) -> None:
    assert read_rows(written(tmp_path, name, content), ["prompt"]) == [{TEXT: "Bake bread"}, {TEXT: "Say hi"}]


def test_lists_of_messages(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hello"}]
    assert read_rows(written(tmp_path, "chats.json", json.dumps([turns]))) == [{"messages": turns}]


@pytest.mark.parametrize("row", [TWO[0], TWO[0] | {"tags": ["food", "oven"]}])
def test_an_object_may_be_the_only_row(row: dict[str, Any], tmp_path: Path) -> None:
    assert read_rows(written(tmp_path, "one.json", json.dumps(row))) == [row]


def test_rows_with_nothing_in_them_are_left_out(tmp_path: Path) -> None:
    assert read_rows(written(tmp_path, "a.csv", "a,b\n,\n1,\n\n , \n")) == [{"a": "1", "b": ""}]
    assert read_rows(written(tmp_path, "a.json", '["", null, {}, {"a": null}, {"a": 0}]')) == [{"a": 0}]


def test_short_rows_and_an_index_without_a_name(tmp_path: Path) -> None:
    rows = read_rows(written(tmp_path, "a.csv", ",goal,target\n0,Bake,Sure\n1,Fry\n"))
    assert rows == [{"": "0", "goal": "Bake", "target": "Sure"}, {"": "1", "goal": "Fry", "target": ""}]


def test_a_long_field_and_the_readers_limit(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    long = "word " * 100_000
    assert len(long) > before  # the reader's own limit would refuse it
    assert read_rows(written(tmp_path, "a.csv", f"prompt\n{long}\n"), ["prompt"]) == [{"prompt": long}]
    with pytest.raises(PromptError):
        read_rows(written(tmp_path, "a.csv", 'prompt\n"'), ["prompt"])
    assert csv.field_size_limit() == before


@settings(deadline=None)  # it writes files
@given(st.lists(texts, min_size=1, max_size=4))
def test_any_texts_come_back(tmp_path_factory: pytest.TempPathFactory, prompts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("texts")
    rows = [{"prompt": prompt} for prompt in prompts]
    listed = csv_of([["prompt"], *([prompt] for prompt in prompts)])
    for name, content in {
        "a.csv": listed,
        "b.csv": csv_of([["", "prompt"], *([str(at), prompt] for at, prompt in enumerate(prompts))]),
        "a.tsv": csv_of([["prompt"], *([prompt] for prompt in prompts)], delimiter="\t"),
        "a.json": json.dumps(rows),
        "b.json": json.dumps(rows, ensure_ascii=False),
        "a.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
    }.items():
        found = read_rows(written(folder, name, content), ["prompt"])
        assert [row["prompt"] for row in found] == prompts, name


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.csv", b"goal\nBake\nFri\xe9\n", "byte 0xe9 at offset 13 in line 3 is not UTF-8; save the file as UTF-8"),
        ("a.txt", "Bake".encode("utf-16"), "byte 0xff at offset 0 in line 1 is not UTF-8"),
        ("a.txt", "Bake".encode("utf-16-le"), "NUL byte, so it is no text in UTF-8"),
        ("a.jsonl.gz", b"not compressed", "Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "ended before the end-of-stream"),
        ("a.csv", 'a,b\n1,"never closed\n2,3\n', "unexpected end of data; put a field that holds quotes"),
        ("a.csv", "a,b\n1,2\n1,2,3\n1,2,3,4\n", "first line's 2, got 3 in line 3; 4 in line 4. Put a field"),
        ("a.csv", "Bake\nFry, or boil\n", "first line's 1, got 2 in line 2"),
        ("a.csv", "goal,goal\n1,2\n", "names 'goal' more than once; rename the columns"),
        ("a.json", '["open', r"Unterminated string.* line 1 column 2"),
        ("a.json", "[" * 100_000, "recursion"),
        ("a.json", "[1, 2]", "expected a list of texts, of objects or of lists of chat messages"),
        ("a.json", "3", "expected a list of texts"),
        ("a.json", '{"a": [1], "b": [1, 2]}', "columns of equal length"),
        ("a.jsonl", '{"a": 1}\n\n{"a": }\n', "line 3, column 7: Expecting value"),
        ("a.parquet", b"PAR1 and no more", "no Parquet file that can be read"),
        ("a.xlsx", b"PK", r"ends in one of .csv, .tsv, .json, .jsonl, .ndjson, .txt, .parquet; rename"),
        ("prompts", b"Bake", "expected a name that ends in one of"),
    ],
)
def test_what_cannot_be_read(name: str, content: str | bytes, match: str, tmp_path: Path) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(PromptError, match=match) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"Cannot read '{path}': ") and "\n" not in str(caught.value)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="there is no such file"):
        read_rows(tmp_path / "a.csv")
    with pytest.raises(PromptError, match="it is a folder; pass a file of it"):
        read_rows(tmp_path)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(PromptError, match=r"pip install 'lox-hf\[eval\]', or save the file as JSONL"):
        read_rows(written(tmp_path, "a.parquet", b""))
