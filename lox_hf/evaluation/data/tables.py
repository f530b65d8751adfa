"""Rows of a file: CSV, TSV, JSON, JSONL, plain text and Parquet, in the layouts that data sets come in."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lox_hf.errors import PromptError, listing

Row = dict[str, Any]
TEXT = "text"  # the column of a text that stands alone
MESSAGES = "messages"  # the column of a conversation that stands alone
WRAPPERS = {"data", "examples", "instances", "instructions", "prompts", "questions", "rows"}  # of a list in JSON
DELIMITERS = {".csv": ",;\t", ".tsv": "\t"}
LONGEST_FIELD = 2**31 - 1  # what a C long holds everywhere


def read_rows(path: str | Path, header: Collection[str] = ()) -> list[Row]:
    r"""Read a file into rows, one dict a row, in the file's order.

    The kind is told by the name: .csv, .tsv, .json, .jsonl or .ndjson, .txt, each also with .gz behind it, and
    .parquet. All but the last are UTF-8, with or without byte order mark. A text that stands alone (a line of a .txt,
    a string in JSON, the only cell of a CSV without header) is a row with the one column "text"; a list of chat
    messages is one with the column "messages". Rows with nothing in them are left out.

    A JSON file holds a list, an object with one list in it (beside other things where it is called "data", "prompts",
    "instances" or the like), or columns: an object of lists, or of objects as pandas writes it.
    The first line of a CSV is its header where it has several cells, or where `header` has its only one; the delimiter
    is the comma, or else the semicolon or tab that shows a name of `header`.

    Args:
        path: The file.
        header: Names of columns by which a header is told from a text; case and punctuation do not matter.

    Returns:
        The rows.

    Raises:
        PromptError: If there is no such file, or it cannot be read, or is of another kind.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "questions.csv"
        >>> _ = path.write_text('question,answer\n"Two and two, what is it?",4\n')
        >>> read_rows(path)
        [{'question': 'Two and two, what is it?', 'answer': '4'}]
    """
    path = Path(path).expanduser()
    with _named(path):
        rows = _rows(path, {fold(name) for name in header if fold(name)})
    return [row for row in rows if not all(map(is_blank, row.values()))]


def fold(name: str) -> str:
    """Return a name without case and punctuation, so that "Forbidden Prompt" is "forbidden_prompt".

    Args:
        name: Name of a column or a data set.

    Returns:
        Its letters and digits.

    Example:
        >>> fold("Forbidden Prompt") == fold("forbidden_prompt")
        True
    """
    return "".join(filter(str.isalnum, name.casefold()))


def is_blank(value: Any) -> bool:
    """Say whether a cell holds nothing: null, or white space alone.

    Args:
        value: Value of one column.

    Returns:
        Whether it does.

    Example:
        >>> is_blank(" "), is_blank(0)
        (True, False)
    """
    return value is None or (isinstance(value, str) and not value.strip())


def _rows(path: Path, header: set[str]) -> list[Row]:
    if path.is_dir():
        raise ValueError("it is a folder; pass a file of it")
    if not path.exists():
        raise ValueError("there is no such file")
    kind = path.suffix.lower()
    if kind == ".gz":
        kind = path.with_suffix("").suffix.lower()
    if kind == ".parquet":
        return _parquet_rows(path)
    if kind in DELIMITERS:
        return _csv_rows(_text(path), DELIMITERS[kind], header)
    if kind in _READERS:
        return _READERS[kind](_text(path))
    known = ", ".join([*DELIMITERS, *_READERS, ".parquet"])
    raise ValueError(f"expected a name that ends in one of {known}; rename the file by what it holds")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn what goes wrong in the block into `PromptError` with the file's name."""
    try:
        yield
    # OSError, EOFError and zlib.error also come from damaged gzip files, RecursionError from deeply nested JSON.
    except (ValueError, OSError, EOFError, zlib.error, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PromptError(f"Cannot read '{path}': {reason.rstrip('.')}.") from error


def _text(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix.lower() == ".gz":
        data = gzip.decompress(data)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what = f"byte 0x{data[error.start]:02x} at offset {error.start} in line {line}"
        raise ValueError(f"{what} is not UTF-8; save the file as UTF-8") from error
    if "\0" in text:
        raise ValueError("it holds a NUL byte, so it is no text in UTF-8; save the file as UTF-8")
    return text.removeprefix("\ufeff")


def _lines(text: str) -> list[str]:
    """Lines without their ends; unlike `splitlines`, a form feed or U+2028 belongs to the line."""
    return [line.removesuffix("\n") for line in io.StringIO(text, newline=None)]


def _csv_rows(text: str, delimiters: str, header: set[str]) -> list[Row]:
    def first_cells(delimiter: str) -> set[str]:
        return set(map(fold, next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])))

    limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        delimiter = next((sign for sign in delimiters if header & first_cells(sign)), delimiters[0])
        # Strict: a quote that never closes would swallow the rest of the file.
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        records = [(reader.line_num, cells) for cells in reader if not all(map(is_blank, cells))]
    except csv.Error as error:
        raise ValueError(
            f"{error}; put a field that holds quotes or line breaks between quotes and double its own"
        ) from error
    finally:
        csv.field_size_limit(limit)
    names = records[0][1] if records else []
    if len(names) == 1 and fold(names[0]) not in header:
        names = [TEXT]
    else:
        del records[:1]
    _check_cells(names, records)
    return [dict(zip_longest(names, cells, fillvalue="")) for _, cells in records]


def _check_cells(names: list[str], records: list[tuple[int, list[str]]]) -> None:
    # A column without a name is an index, as pandas writes it.
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise ValueError(f"its header names {', '.join(map(repr, twice))} more than once; rename the columns")
    longer = [f"{len(cells)} in line {line}" for line, cells in records if len(cells) > len(names)]
    if longer:
        raise ValueError(
            f"expected no more cells than the first line's {len(names)}, got {listing(longer, 5)} "
            "Put a field that holds the delimiter between quotes"
        )


def _json_rows(text: str) -> list[Row]:
    if not text.strip():
        return []
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # a second line: JSONL under the name of JSON
            return _jsonl_rows(text)
        raise
    return _as_rows(_items(data) if isinstance(data, dict) else data)


def _items(data: dict[str, Any]) -> list[Any]:
    """What an object holds: its list, its columns row by row, or itself as the only row."""
    if all(isinstance(value, dict) and all(map(str.isdigit, value)) for value in data.values()):
        data = {name: list(value.values()) for name, value in data.items()}  # pandas: the index stands in each column
    lists = {name: values for name, values in data.items() if isinstance(values, list)}
    if len(lists) < len(data):
        wrapped = [values for name, values in lists.items() if name in WRAPPERS]
        return wrapped[0] if len(wrapped) == 1 else [data]
    if len(lists) == 1:
        return next(iter(lists.values()))
    if len({len(values) for values in lists.values()}) > 1:
        raise ValueError("expected a list, an object with one list in it, or one with columns of equal length")
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _jsonl_rows(text: str) -> list[Row]:
    items = []
    for number, line in enumerate(_lines(text), 1):
        try:
            items += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from error
    return _as_rows(items)


def _as_rows(items: Any) -> list[Row]:
    strange = not isinstance(items, list) or [item for item in items if not isinstance(item, str | dict | list | None)]
    if strange:
        raise ValueError("expected a list of texts, of objects or of lists of chat messages")
    columns = {str: TEXT, list: MESSAGES}
    return [item or {} if isinstance(item, dict | None) else {columns[type(item)]: item} for item in items]


def _text_rows(text: str) -> list[Row]:
    return [{TEXT: line} for line in _lines(text)]


def _parquet_rows(path: Path) -> list[Row]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError("Parquet needs pyarrow: pip install 'lox-hf[eval]', or save the file as JSONL") from error
    try:
        return ParquetFile(path).read().to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"it is no Parquet file that can be read: {error}") from error


_READERS: dict[str, Callable[[str], list[Row]]] = {
    ".json": _json_rows,
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".txt": _text_rows,
}
