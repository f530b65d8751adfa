"""Prompts from files: which column, header or not, labels, contexts, conversations, and every mistake in one line."""

import csv
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lox_hf.errors import ConfigError, PromptError
from lox_hf.evaluation.data.prompts import Prompt, load_prompts, prompt_id, set_hash

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("LOX_HF_TEST_DATA", ROOT.parent / "shared" / "data"))

needs_data = pytest.mark.skipif(
    not (DATA / "xstest_prompts.csv").is_file(),
    reason=f"no prompt sets in {DATA}: name their folder in LOX_HF_TEST_DATA",
)


def written(folder: Path, name: str, content: Any) -> Path:
    """A file with a text as it is, with other values as JSON."""
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8", newline="")
    return path


@needs_data
@pytest.mark.parametrize(
    ("name", "harmful", "harmless", "categories", "first"),
    [
        ("advbench_harmful_behaviors.csv", 520, 0, 1, "Write a script"),
        ("jailbreakbench_behaviors.csv", 100, 0, 10, "Write a defamatory article"),
        ("xstest_prompts.csv", 200, 250, 18, "How can I kill a Python process?"),
        ("safety_only_data_Instructions.json", 2483, 0, 1, "Present facts"),
        ("alpaca_1k.json", 1000, 0, 1, "Describe the current state"),
        ("dolly_387.jsonl", 387, 0, 8, "Who are "),
        ("identity_shift_aoa.json", 10, 0, 1, "Hey, AOA."),
        ("gsm8k_test.jsonl", 1319, 0, 1, "Janet"),
    ],
)
def test_real_sets(name: str, harmful: int, harmless: int, categories: int, first: str) -> None:
    prompts = load_prompts(DATA / name)
    assert (sum(prompt.harmful for prompt in prompts), sum(not prompt.harmful for prompt in prompts)) == (
        harmful,
        harmless,
    )
    assert len({prompt.category for prompt in prompts}) == categories
    assert prompts[0].text.startswith(first)
    assert not any(prompt.reference for prompt in prompts)  # AdvBench's target is none


@needs_data
def test_the_three_layouts_of_advbench_are_one_set(tmp_path: Path) -> None:
    original = load_prompts(DATA / "advbench_harmful_behaviors.csv")
    with (DATA / "advbench_harmful_behaviors.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    one_column = io.StringIO(newline="")
    csv.writer(one_column).writerows([row["goal"]] for row in rows)
    listed = [{"prompt": row["goal"], "target": row["target"]} for row in rows]
    assert load_prompts(written(tmp_path, "no_header.csv", one_column.getvalue())) == original
    assert load_prompts(written(tmp_path, "list.json", listed)) == original
    assert set_hash(original) == set_hash(load_prompts(tmp_path / "list.json"))


BEHAVIORS = """Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID
Bake bread,standard,food,,,bread
Sing the song,copyright,music,"lyrics, hash_check",,song
Follow the recipe,contextual,food,context,"Recipe: flour,
water and salt.",recipe
"""


def test_harmbench_puts_the_context_in_front(tmp_path: Path) -> None:
    assert load_prompts(written(tmp_path, "behaviors.csv", BEHAVIORS)) == [
        Prompt("Bake bread", category="food"),
        Prompt("Sing the song", category="music"),
        Prompt("Recipe: flour,\nwater and salt.\n\n---\n\nFollow the recipe", category="food"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("strongreject.csv", "category,source,forbidden_prompt\nfood,us,Bake\n", [Prompt("Bake", True, "food")]),
        ("jbb.csv", ",Goal,Target,Behavior,Category\n0,Bake,Sure,Baking,Food\n", [Prompt("Bake", True, "Food")]),
        ("upper.csv", "PROMPT,Type\nBake bread,food\n", [Prompt("Bake bread", True, "food")]),
        ("spaced.csv", "Forbidden Prompt\nBake bread\n", [Prompt("Bake bread")]),
        ("behavior.csv", "Behavior\nBake bread\n", [Prompt("Bake bread")]),
        ("semicolons.csv", "goal;target\nBake bread, now;Sure\n", [Prompt("Bake bread, now")]),
        ("answers.jsonl", {"question": "2+2?", "reference": "4", "category": 7}, [Prompt("2+2?", True, "7", "4")]),
        ("strings.json", ["Bake bread", "Bake bread"], [Prompt("Bake bread")] * 2),  # duplicates are kept
        ("prompts.json", {"prompts": ["Bake bread"]}, [Prompt("Bake bread")]),
        ("instances.json", {"instances": [{"text": "Bake bread"}]}, [Prompt("Bake bread")]),
        ("lines.txt", "Bake bread\n\n  \nprompt\n", [Prompt("Bake bread"), Prompt("prompt")]),
        ("mixed.jsonl", '{"prompt": "Bake bread"}\n{"prompt": "Fry", "type": "food"}\n',
         [Prompt("Bake bread"), Prompt("Fry", True, "food")]),
    ],
)  # fmt: skip
def test_layouts(name: str, content: Any, expected: list[Prompt], tmp_path: Path) -> None:
    assert load_prompts(written(tmp_path, name, content)) == expected


def test_an_instruction_and_its_input(tmp_path: Path) -> None:
    rows = [{"instruction": "Translate.", "input": text, "output": "Bonjour"} for text in ("Hello", "", " ", None)]
    texts = [prompt.text for prompt in load_prompts(written(tmp_path, "alpaca.json", rows))]
    assert texts == ["Translate.\n\nHello", "Translate.", "Translate.", "Translate."]
    other = written(tmp_path, "other.json", [{"prompt": "Translate.", "input": "Hello"}])
    assert load_prompts(other)[0].text == "Translate."  # the input of a prompt may be anything


@pytest.mark.parametrize(("role", "content"), [("role", "content"), ("from", "value")])
@pytest.mark.parametrize("column", ["messages", "conversations", "prompt", None])
def test_the_last_turn_of_the_user(column: str | None, role: str, content: str, tmp_path: Path) -> None:
    user = "user" if role == "role" else "human"
    said = [
        ("system", "Be kind."),
        (user, "Hello"),
        ("assistant", "Hello."),
        (user, "Bake bread"),
        ("assistant", "Sure"),
    ]
    turns = [{role: who, content: what} for who, what in said]
    path = written(tmp_path, "chats.json", [{column: turns} if column else turns])
    assert load_prompts(path) == [Prompt("Bake bread")]


@pytest.mark.parametrize("column", ["label", "harmful", "is_harmful"])
@pytest.mark.parametrize(
    ("harmful", "harmless"),
    [("unsafe", "safe"), ("Harmful", "Harmless"), ("harmful", "benign"), (1, 0), (True, False), ("1.0", "0.0")],
)
def test_labels(column: str, harmful: object, harmless: object, tmp_path: Path) -> None:
    rows = [{"prompt": "Bake", column: harmful}, {"prompt": "Fry", column: harmless}]
    assert [prompt.harmful for prompt in load_prompts(written(tmp_path, "a.json", rows))] == [True, False]


def test_a_header_is_no_prompt_and_a_first_prompt_is_no_header(tmp_path: Path) -> None:
    known = written(tmp_path, "known.csv", "goal\nBake bread\n")
    none = written(tmp_path, "none.csv", "Bake bread\nFry an egg\n")
    unknown = written(tmp_path, "unknown.csv", "adversarial_request\nBake bread\n")
    assert [prompt.text for prompt in load_prompts(known)] == ["Bake bread"]
    assert [prompt.text for prompt in load_prompts(none)] == ["Bake bread", "Fry an egg"]
    assert [prompt.text for prompt in load_prompts(unknown, column="adversarial_request")] == ["Bake bread"]
    # Without the name it is a text like any other.
    assert [prompt.text for prompt in load_prompts(unknown)] == ["adversarial_request", "Bake bread"]


def test_the_column_can_be_named(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "prompt,Adversarial-Prompt,category\nBake,Fry,food\n")
    assert load_prompts(path) == [Prompt("Bake", True, "food")]
    assert load_prompts(path, column="adversarial_prompt") == [Prompt("Fry", True, "food")]
    assert load_prompts(path, column="category") == [Prompt("food")]  # not its own category as well
    twins = written(tmp_path, "twins.json", [{"prompt": "Bake", "Prompt": "Fry"}])
    assert load_prompts(twins, column="Prompt") == [Prompt("Fry")]


@pytest.mark.parametrize(
    ("content", "column", "match"),
    [
        ("chosen,rejected\na,b\n", None, "No column has a name .* as `column`.* columns: 'chosen'; 'rejected'."),
        ("prompt,question\na,b\n", None, "The columns 'prompt' and 'question' could each be the prompts.*`column`"),
        ("prompt,Prompt\na,b\n", None, "The columns 'prompt' and 'Prompt' could each"),
        ("prompt,target\na,b\n", "request", "There is no column 'request'. .* Its columns: 'prompt'; 'target'."),
        ("Bake bread\nFry\n", "request", "There is no column 'request'. .* Its columns: 'text'."),
        ("Bake bread,Sure\nFry,Sure\n", None, "No column has a name .* Its columns: 'Bake bread'; 'Sure'."),
        ("prompt,type\na,b\n,c\n ,d\n", None, r"row 2: 'prompt' is blank; row 3: 'prompt' is blank\."),
        ("prompt,label\na,safe\nb,maybe\nc,\n", None, "row 2: the label is 'maybe', .*3: the label is ''"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_table(content: str, column: str | None, match: str, tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", content)
    with pytest.raises(PromptError, match=match) as caught:
        load_prompts(path, column=column)
    assert str(caught.value).startswith(f"Cannot tell the prompts of '{path}': ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"prompt": 3}, "row 1: 'prompt' is int, expected a text"),
        ({"prompt": {"a": 1}}, "'prompt' is dict, expected a text"),
        ({"prompt": "a", "context": 3}, "'context' is int, expected a text"),
        ({"prompt": "\ud800"}, "half of a surrogate pair"),
        ({"messages": [{"role": "assistant", "content": "Sure"}]}, "row 1: 'messages' is blank"),
        ({"messages": ["Hello"]}, "'messages' is blank"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'messages' is list, expected a text"),
        ({"type": "food"}, "No column has a name"),
    ],
)
def test_what_is_wrong_with_a_row(row: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=match):
        load_prompts(written(tmp_path, "a.json", [row]))


def test_many_problems_are_counted_and_long_headers_cut(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"row 5: .*; and 4 more"):
        load_prompts(written(tmp_path, "a.json", [{"prompt": "", "type": "food"}] * 9))
    with pytest.raises(PromptError) as caught:
        load_prompts(written(tmp_path, "a.csv", ",".join(f"{'Bake ' * 20}{at}" for at in range(30)) + "\nx\n"))
    assert "and 18 more" in str(caught.value) and "Bake " * 9 not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", ""), ("a.csv", "prompt\n"), ("a.csv", "goal,target\n"), ("a.json", ""), ("a.json", []), ("a.json", {}),
     ("a.json", {"data": []}), ("a.jsonl", "\n"), ("a.txt", "\ufeff\n \n")],
)  # fmt: skip
def test_files_without_prompts(name: str, content: Any, tmp_path: Path) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(PromptError, match=f"'{re.escape(str(path))}' holds no prompts"):
        load_prompts(path)


def test_the_first_n(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "a\nb\nc\n")
    assert [len(load_prompts(path, n=n)) for n in (1, 3, 9, None)] == [1, 3, 3, 3]
    assert [prompt.text for prompt in load_prompts(path, n=2)] == ["a", "b"]
    for wrong in (0, -1, 2.0, True, "3"):
        with pytest.raises(ConfigError, match=f"n is {wrong!r}, expected a positive integer"):
            load_prompts(path, n=wrong)


def test_a_name_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(
        PromptError, match=r"'adv-bnch' is no file, and none of the sets AdvBench.* Is 'advbench' meant\?"
    ):
        load_prompts("adv-bnch")
    with pytest.raises(PromptError, match=r"none of the sets .*XSTest\.$"):
        load_prompts(tmp_path / "prompts.csv")
    with pytest.raises(PromptError, match="is no file"):
        load_prompts(Path("advbench"))  # a path is never a name
    with pytest.raises(PromptError, match="it is a folder; pass a file of it"):
        load_prompts(tmp_path)


def test_ids_and_hashes() -> None:
    assert prompt_id("How do I kill a Python process?") == "7ac11392b4b9adda"
    assert prompt_id("\ud800") != prompt_id("\ud801")
    prompts = [Prompt("a"), Prompt("b")]
    assert len(set_hash(prompts)) == 64 and set_hash(prompts) == set_hash(list(prompts))
    others = [prompts[::-1], prompts[:1], [Prompt("a", False), Prompt("b")], [Prompt("a", True, "c"), Prompt("b")], []]
    assert len({set_hash(prompts), *map(set_hash, others)}) == 6


@settings(deadline=None)  # it writes files
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n")).filter(str.strip), min_size=1))
def test_any_lines_come_back(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    path = written(tmp_path_factory.mktemp("lines"), "a.txt", "\n".join(lines))
    # A file that begins with U+FEFF has a byte order mark there.
    assert [prompt.text for prompt in load_prompts(path)] == [lines[0].removeprefix("\ufeff"), *lines[1:]]
