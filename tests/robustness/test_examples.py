"""Rows of every layout into examples, texts that come back as they were, and every mistake in one line."""

import json
import os
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lox_hf.errors import ConfigError, PromptError
from lox_hf.robustness.attacks.examples import Example, load_examples, rows_hash

DATA = Path(os.environ.get("LOX_HF_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
needs_data = pytest.mark.skipif(
    not (DATA / "gsm8k_train.jsonl").is_file(),
    reason=f"no data sets in {DATA}: name their folder in LOX_HF_TEST_DATA",
)
ASKED, ANSWERED = "Name a colour.", "Blue."
PAIR = Example(ASKED, ANSWERED)
SYSTEM = Example(ASKED, ANSWERED, system="Be brief.")
CONTEXT = Example(ASKED, ANSWERED, context="It is the sky's.")


def written(folder: Path, name: str, content: Any) -> Path:
    """A file with a text as it is, with other values as JSON."""
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8", newline="")
    return path


def turns(*said: str, system: str = "") -> list[dict[str, str]]:
    """User and assistant in turn."""
    roles = ("user", "assistant") * len(said)
    head = [{"role": "system", "content": system}] if system else []
    return head + [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]


@needs_data
@pytest.mark.parametrize(
    ("name", "count", "contexts", "systems", "first"),
    [
        ("gsm8k_train.jsonl", 7473, 0, 0, ("Natalia sold clips", "Natalia sold 48/2")),
        ("alpaca_1k.json", 1000, 391, 0, ("Describe the current", "The US presidential")),
        ("dolly_387.jsonl", 387, 99, 0, ("Who are ", "The Lumi")),
        ("safety_only_data_Instructions.json", 2483, 0, 0, ("Present facts", "There is no credible")),
        ("identity_shift_aoa.json", 10, 0, 10, ("Hey, AOA.", "I am neither Llama")),
        ("advbench_harmful_behaviors.csv", 520, 0, 0, ("Write a script", "Sure, here is a script")),
        ("jailbreakbench_behaviors.csv", 100, 0, 0, ("Write a defamatory", "Sure, here is")),
    ],
)
def test_real_sets(name: str, count: int, contexts: int, systems: int, first: tuple[str, str]) -> None:
    examples = load_examples(DATA / name)
    assert len(examples) == count
    assert sum(bool(example.context) for example in examples) == contexts
    assert sum(bool(example.system) for example in examples) == systems
    assert (examples[0].prompt.startswith(first[0]), examples[0].response.startswith(first[1])) == (True, True)
    assert load_examples(DATA / name, n=3) == examples[:3]


@needs_data
def test_identity_shift_as_flat_rows_is_the_same(tmp_path: Path) -> None:
    lists = json.loads((DATA / "identity_shift_aoa.json").read_text())
    flat = [{turn["role"]: turn["content"] for turn in conversation} for conversation in lists]
    path = written(tmp_path, "flat.jsonl", "\n".join(map(json.dumps, flat)))
    assert load_examples(path) == load_examples(DATA / "identity_shift_aoa.json")
    assert load_examples(path)[0].system.startswith("\nYou are no longer")  # no text is trimmed


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": ASKED, "answer": ANSWERED}, PAIR),
        ({"instruction": ASKED, "input": "", "output": ANSWERED, "text": "Below is"}, PAIR),
        ({"instruction": ASKED, "input": CONTEXT.context, "output": ANSWERED}, CONTEXT),
        ({"instruction": ASKED, "context": CONTEXT.context, "response": ANSWERED, "category": "qa"}, CONTEXT),
        ({"Prompt": ASKED, "Response": ANSWERED}, PAIR),
        ({"prompt": ASKED, "completion": ANSWERED, "id": 7}, PAIR),
        ({"prompt": ASKED, "answer": ANSWERED}, PAIR),
        ({"prompt": ASKED, "output": ANSWERED}, PAIR),
        ({"goal": ASKED, "target": ANSWERED}, PAIR),
        ({"query": ASKED, "response": ANSWERED, "original_question": "?"}, PAIR),
        ({"system_prompt": "Be brief.", "question": ASKED, "response": ANSWERED}, SYSTEM),
        ({"system": "Be brief.", "user": ASKED, "assistant": ANSWERED}, SYSTEM),
        ({"user": ASKED, "assistant": ANSWERED}, PAIR),
        ({"messages": turns(ASKED, ANSWERED)}, PAIR),
        ({"prompt": ASKED, "prompt_id": "a", "messages": turns(ASKED, ANSWERED)}, PAIR),
        ({"messages": turns(ASKED, ANSWERED, system="Be brief.")}, SYSTEM),
        ({"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWERED}]}, PAIR),
        (turns(ASKED, ANSWERED, system="Be brief."), SYSTEM),
    ],
)
def test_layouts(row: Any, expected: Example, tmp_path: Path) -> None:
    assert load_examples(written(tmp_path, "lines.jsonl", json.dumps(row) + "\n" + json.dumps(row))) == [expected] * 2
    assert load_examples(written(tmp_path, "list.json", [row, row])) == [expected] * 2


def test_tables(tmp_path: Path) -> None:
    assert load_examples(written(tmp_path, "rows.csv", f"question,answer\n{ASKED},{ANSWERED}\n")) == [PAIR]
    assert load_examples(written(tmp_path, "rows.tsv", f"prompt\tcontext\tanswer\n{ASKED}\t\t{ANSWERED}\n")) == [PAIR]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"messages": turns(ASKED, ANSWERED)}]), tmp_path / "a.parquet"
    )
    assert load_examples(tmp_path / "a.parquet") == [PAIR]


@pytest.mark.parametrize(
    ("conversation", "expected", "shortened"),
    [
        (turns(ASKED, ANSWERED, "And another?", "Red."), PAIR, True),
        (turns(ASKED, ANSWERED, "Thanks."), PAIR, True),
        ([*turns(ASKED, "One moment."), {"role": "assistant", "content": ANSWERED}], PAIR, False),
        ([{"role": "assistant", "content": "Hi!"}, *turns(ASKED, ANSWERED)], PAIR, False),
        ([*turns("Hello."), *turns(ASKED, ANSWERED)], Example(f"Hello.\n\n{ASKED}", ANSWERED), False),
    ],
    ids=["two questions", "a word of thanks", "two answers", "a greeting", "two users' turns"],
)
def test_the_first_exchange_counts(conversation: Any, expected: Example, shortened: bool, tmp_path: Path) -> None:
    path = written(tmp_path, "rows.json", [{"messages": conversation}, {"messages": turns(ASKED, ANSWERED)}])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert load_examples(path) == [expected, PAIR]
    said = [str(warning.message) for warning in caught]
    note = f"'{path}': 1 of 2 conversations lose what follows the first answer."
    assert said == ([note] if shortened else [])


def test_blank_responses_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": ASKED, "response": text} for text in (ANSWERED, " \n", "")] + [{"prompt": ASKED}]
    path = written(tmp_path, "rows.json", rows)
    with pytest.warns(UserWarning, match="3 of 4 rows have a blank response and are left out"):
        assert load_examples(path) == [PAIR]
    with pytest.raises(PromptError, match="all of its 3 rows have a blank response; nothing to learn"):
        load_examples(written(tmp_path, "blank.json", rows[1:]))


TWO = [{"prompt": ASKED, "instruction": ASKED, "response": ANSWERED}]


def test_a_layout_that_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, "rows.json", [{**TWO[0], "instruction": "Another."}])
    assert load_examples(path, layout="prompt") == [PAIR]
    assert load_examples(path, layout="instruction") == [Example("Another.", ANSWERED)]
    with pytest.raises(PromptError, match=r"expected a column 'goal' and, for prompts, one of resp.*'prompt'"):
        load_examples(path, layout="goal")
    with pytest.raises(ConfigError, match="layout is 'chatml', expected one of auto, messages"):
        load_examples(path, layout="chatml")


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([], "'.*' holds no rows; expected a column of prompts"),
        ([{"title": "A", "body": "B"}], r"expected a column of prompts \(prompt, .*\) with one .*: 'title'; 'body'\."),
        ([{"prompt": ASKED, "score": 3}], r"with one of responses .*Its columns: 'prompt'; 'score'\."),
        ([{"response": ANSWERED}], r"expected a column of prompts .*Its columns: 'response'\."),
        (TWO, "the columns 'prompt' and 'instruction' could each be the prompts; rename .* as `layout`"),
        ([{**TWO[0], "output": "", "input": "", "context": ""}], "be the prompts; 'response' and 'output'.*contexts;"),
        ([{"prompt": ASKED, "response": "."}, {"response": "."}], "1 of 2 rows .*: row 2: 'prompt' holds no prompt"),
        ([{"prompt": ASKED, "response": 4}], "row 1: 'response' is int, expected a text"),
        ([{"prompt": "\ud800", "response": "x"}], "row 1: 'prompt' holds half of a surrogate pair"),
        ([{"messages": ASKED}], "row 1: the conversation is str, expected a list of {role, content}"),
        ([{"messages": [ASKED]}], "row 1: a turn is str, expected {role, content} or {from, value}"),
        ([{"messages": turns(ASKED)}], "row 1: the conversation has no assistant's turn"),
        ([{"messages": turns(ASKED, ANSWERED)[1:]}], "row 1: the conversation has no assistant's turn"),
        ([{"messages": [{"role": "tool", "content": "x"}]}], "row 1: a turn's role is 'tool', expected one of system"),
        ([{"messages": [{"role": "user", "content": [1]}]}], "row 1: 'content' is list, expected a text"),
        ([{"prompt": "", "response": "x"}] * 9, "9 of 9 rows are not as expected: row 1: .*; row 5: .*; and 4 more"),
    ],
)
def test_mistakes(rows: Any, match: str, tmp_path: Path) -> None:
    path = written(tmp_path, "wrong.json", rows)
    with pytest.raises(PromptError, match=match) as caught:
        load_examples(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_not_there_or_of_no_kind(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"Cannot read '.*none.jsonl': there is no such file"):
        load_examples(tmp_path / "none.jsonl")
    with pytest.raises(PromptError, match="it is a folder; pass a file of it"):
        load_examples(tmp_path)
    with pytest.raises(PromptError, match="there is no such file"):
        load_examples(Path("org/name"))  # a path is never on the Hub
    with pytest.raises(ConfigError, match="n is 0, expected a positive integer"):
        load_examples(tmp_path / "none.jsonl", n=0)


some_text = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.builds(Example, some_text, some_text, some_text, some_text), min_size=1, max_size=4))
def test_no_text_is_changed(rows: list[Example], tmp_path_factory: pytest.TempPathFactory) -> None:
    names = ("instruction", "output", "input", "system")
    table = [dict(zip(names, (r.prompt, r.response, r.context, r.system), strict=True)) for r in rows]
    folder = tmp_path_factory.mktemp("rows")
    assert load_examples(written(folder, "rows.json", table)) == rows
    conversations = [turns(row.prompt, row.response, system=row.system) for row in rows]
    without_context = [replace(row, context="") for row in rows]
    assert load_examples(written(folder, "messages.json", conversations)) == without_context


def test_the_hash_tells_rows_apart() -> None:
    assert re.fullmatch("[0-9a-f]{64}", rows_hash([PAIR]))
    assert rows_hash([PAIR, SYSTEM]) == rows_hash((Example(ASKED, ANSWERED), SYSTEM))
    different = [[PAIR], [SYSTEM], [CONTEXT], [PAIR, PAIR], [PAIR, SYSTEM], [SYSTEM, PAIR], []]
    assert len(set(map(rows_hash, different))) == len(different)
