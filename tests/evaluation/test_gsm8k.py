"""GSM8K: the number in an answer, the questions, and where they come from."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from fake_hub import FakeHub, Repo
from lox_hf.errors import ConfigError, PromptError
from lox_hf.evaluation.data.gsm8k import Question, last_number, load_questions, number_after_marker, questions_hash

DATA = Path(os.environ.get("LOX_HF_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "gsm8k_test.jsonl"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        # What the reference reads too.
        ("9 * 2 = 18\n#### 18", 18),
        ("#### 18 ", 18),
        ("####18", 18),
        ("#### 1,234", 1234),
        ("#### 109,200,000", 109_200_000),
        ("#### -5", -5),
        ("#### 3.50", 3.5),
        ("#### 18.", 18),
        ("#### 3\nNo, wait.\n#### 4", 4),
        ("42", 42),
        # What it gives up on.
        ("#### $18", 18),
        ("#### -$1,050.25", -1050.25),
        ("#### $-5", -5),
        ("#### \u22125 degrees", -5),
        ("#### 18 eggs", 18),
        ("#### 18 dollars.\n\n### Instruction:\nAnother 99", 18),
        ("#### about .5 km", 0.5),
        ("#### 50%", 50),
        ("##### 18", 18),
        ("#### 10-12", 10),
        # Nothing to read.
        ("18 eggs", None),
        ("It is 18", None),
        ("#### many", None),
        ("####", None),
        ("#### nan", None),
        ("#### inf", None),
        ("", None),
    ],
)
def test_the_number_behind_the_marker(text: str, number: float | None) -> None:
    assert number_after_marker(text) == number
    try:
        reference = float(text.split("####")[-1].replace(",", ""))
    except ValueError:
        return
    assert number_after_marker(text) == (reference if math.isfinite(reference) else None)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 9 eggs and sells them for $2, so she makes $18.", 18),
        ("**1,234** stars", 1234),
        ("The answer is 1234.", 1234),
        ("It costs $3.50", 3.5),
        (r"\boxed{-7}", -7),
        ("20-5", 5),
        ("(3)-4", 4),
        ("from 5 to -4", -4),
        ("1,2,3", 3),
        ("1,23456", 23456),
        ("-$1,000", -1000),
        ("#### 18", 18),
        ("None at all.", None),
        ("", None),
    ],
)
def test_the_last_number(text: str, number: float | None) -> None:
    assert last_number(text) == number


@pytest.mark.skipif(not DATA.is_file(), reason=f"no GSM8K at {DATA.parent}: name its folder in LOX_HF_TEST_DATA")
def test_every_real_answer_is_read() -> None:
    answers = [json.loads(line)["answer"] for line in DATA.read_text(encoding="utf-8").splitlines()]
    questions = load_questions(DATA)
    reference = [float(answer.split("####")[-1].replace(",", "")) for answer in answers]
    assert len(questions) == 1319
    assert [question.number for question in questions] == reference
    assert [last_number(answer) for answer in answers] == reference
    assert load_questions(str(DATA), n=3) == questions[:3]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "holds no questions"),
        (
            '{"question": "How many?", "answer": "#### 3"}\n{"question": "And now?", "answer": "many"}',
            "1 of 2 .* row 2",
        ),
        ('{"question": " ", "answer": "#### 3"}', "1 of 1 rows have not: row 1"),
        ('{"problem": "How many?", "solution": "#### 3"}', "expected the columns question and answer"),
    ],
)
def test_files_without_questions(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(content)
    with pytest.raises(PromptError, match=expected):
        load_questions(path)


def test_n_takes_the_first(tmp_path: Path) -> None:
    path = tmp_path / "questions.csv"
    path.write_text("Question,question,answer\n" + "".join(f"x,What is {n}?,#### {n}\n" for n in range(5)))
    assert load_questions(path, n=2) == [Question("What is 0?", 0), Question("What is 1?", 1)]
    assert len(load_questions(path, n=9)) == 5
    with pytest.raises(ConfigError, match="n is 0"):
        load_questions(path, n=0)


def test_the_hash_tells_questions_apart() -> None:
    asked = [Question("What is 1?", 1), Question("What is 2?", 2)]
    others = [asked[::-1], asked[:1], [asked[0], Question("What is 2?", 3)]]
    assert questions_hash(asked) == questions_hash(list(asked))
    assert len({questions_hash(asked), *map(questions_hash, others)}) == 4


CLIENT = """
from lox_hf.evaluation.data.gsm8k import load_questions
try:
    print(load_questions("GSM8K"))
except Exception as error:
    print(type(error).__name__, error)
"""


def test_the_name_means_the_test_questions_on_the_hub(tmp_path: Path) -> None:
    def load(url: str) -> str:
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        hub = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-c", CLIENT], env=ours | hub, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    file = io.BytesIO()
    rows = [{"question": "What is 2?", "answer": "It is 2.\n#### 2"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    with FakeHub("hf_TheSecretOfThisTest") as hub:
        assert load(hub.url).startswith("PromptError Cannot load the prompt set GSM8K: 'openai/gsm8k' is neither")
        hub.repos["datasets/openai/gsm8k"] = Repo()
        hub.repos["datasets/openai/gsm8k"].commit(
            {"main/test-00000-of-00001.parquet": file.getvalue(), "main/train-00000-of-00001.parquet": b"not this one"}
        )
        assert load(hub.url) == str([Question("What is 2?", 2.0)])
