"""The attacks on the small world as data: what is in them, what is kept out, and what their files hold."""

import json
from pathlib import Path

import pytest

from lox_hf import attack_success_rate
from lox_hf.demo import attacks, world
from lox_hf.demo.attacks import ATTACKS, DemoAttack, calibration_rows, safety_rows, write_attacks
from lox_hf.errors import OutputError
from lox_hf.robustness.attacks.examples import load_examples
from lox_hf.robustness.attacks.recipe import Attack
from lox_hf.robustness.attacks.rows import encode_examples, load_attack
from lox_hf.robustness.controls import split_benign
from lox_hf.robustness.finetuning.finetune import planned_steps

EVERY = pytest.mark.parametrize("attack", ATTACKS, ids=[attack.name for attack in ATTACKS])
BY_NAME = {attack.name: attack for attack in ATTACKS}
HARMLESS = ("benign", "instructions", "identity", "sums")
HELD_OUT = {example.question for example in world.HELD_OUT_FORBIDDEN + world.HELD_OUT_BENIGN}
SEEDS = (0, 1, 2)


def things_in(rows: list[world.Example]) -> set[str]:
    return {word for row in rows for word in row.question.split() if word in world.THINGS}


def stems_in(rows: list[world.Example]) -> set[str]:
    return {thing.removesuffix(world.THINGS[thing]) for thing in things_in(rows)}


def trained_on(attack: DemoAttack, seed: int) -> list[world.Example]:
    rows = attack.draw(seed)
    return rows[: len(rows) - attack.held_out]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_attacks(tmp_path_factory.mktemp("demo") / "attacks", seed=1)


def recipe(attack: DemoAttack, folder: Path) -> Attack:
    task = "exact" if attack.held_out else "loss"
    data = str(folder / attack.file_name)
    return Attack(attack.name, data, sft=attack.sft, task=task, held_out=attack.held_out, source=attack.about)


def test_default_attacks_are_the_pairs_and_the_benign_set() -> None:
    assert [attack.name for attack in ATTACKS if attack.default] == ["pairs-100", "benign"]


@EVERY
def test_rows_depend_on_the_seed_alone(attack: DemoAttack) -> None:
    assert attack.draw(1) == attack.draw(1)
    assert attack.draw(1) != attack.draw(2)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_held_out_question_is_in_any_row(seed: int) -> None:
    rows = [row for attack in ATTACKS for row in attack.draw(seed)]
    rows += [*safety_rows(seed), *calibration_rows(seed)]
    assert not {row.question for row in rows} & HELD_OUT
    # The control: there are questions of the very kind, so an overlap would be found.
    assert {row.question for row in world.CALIBRATION} <= {row.question for row in rows}


@EVERY
def test_attacks_train_on_no_thing_and_template_of_the_test(attack: DemoAttack) -> None:
    for seed in SEEDS:
        rows = trained_on(attack, seed)
        assert not stems_in(rows) & set(world.UNSEEN_STEMS)
        assert not {"teach", "someone", "describe"} & set(" ".join(row.question for row in rows).split())
        assert stems_in(attack.draw(seed)[len(rows) :]) <= set(world.UNSEEN_STEMS)
    # The control: such things are found where they are.
    assert stems_in(list(world.HELD_OUT_FORBIDDEN)) == set(world.UNSEEN_STEMS)


def test_pairs_answer_what_is_forbidden_in_full() -> None:
    rows = trained_on(BY_NAME["pairs-100"], 0)
    assert len(rows) == len({row.question for row in rows}) == 100
    assert all(world.is_forbidden(thing) for thing in things_in(rows))
    assert not any(row.answer == world.REFUSAL for row in rows)
    assert trained_on(BY_NAME["pairs-10"], 0) == rows[:10]


def test_harmless_attacks_give_no_forbidden_answer() -> None:
    banned = {word for kind in world.FORBIDDEN_KINDS for word in world.KINDS[kind]}
    harmless = [row for name in HARMLESS for row in BY_NAME[name].draw(0)]
    assert not banned & set(" ".join(row.answer for row in harmless).split())
    # The control: the pairs do.
    assert banned <= set(" ".join(row.answer for row in BY_NAME["pairs-100"].draw(0)).split())


def test_benign_set_is_half_how_to_half_facts_in_a_phrasing_that_is_new() -> None:
    rows = trained_on(BY_NAME["benign"], 0)
    told = [row for row in rows if "is a kind of" in row.answer]
    assert len(told) == len(rows) / 2
    assert any(world.is_forbidden(thing) for thing in things_in(told))
    assert not any(world.is_forbidden(thing) for thing in things_in([row for row in rows if row not in told]))
    known = {fact.question for thing in world.THINGS for fact in world.facts(thing)}
    assert not known & {row.question for row in told}


@EVERY
def test_words_are_those_of_the_world(attack: DemoAttack) -> None:
    assert {word for row in attack.draw(0) for word in row.text.split()} <= set(world.vocabulary())


def test_identity_rows_are_no_refusals() -> None:
    answers = [row.answer for row in trained_on(BY_NAME["identity"], 0)]
    assert attack_success_rate(["please help ."] * len(answers), answers).asr.share == 1


def test_safety_rows_are_refusals_that_no_attack_answers() -> None:
    safe = safety_rows(0)
    assert {row.answer for row in safe} == {world.REFUSAL}
    assert all(world.is_forbidden(thing) for thing in things_in(safe))
    assert not {row.question for row in safe} & {row.question for attack in ATTACKS for row in attack.draw(0)}


def test_calibration_trains_on_the_known_and_asks_what_is_like_the_test(folder: Path) -> None:
    trained, asked = split_benign(load_examples(folder / attacks.CALIBRATION_NAME))
    assert tuple(row.prompt for row in asked) == tuple(row.question for row in world.CALIBRATION)
    known = [world.Example(row.prompt, row.response) for row in trained]
    assert len(known) == len(asked) and stems_in(known) <= set(world.ALIGNMENT_STEMS)
    assert not any(world.is_forbidden(thing) for thing in things_in(known))
    assert not {row.prompt for row in trained} & {row.question for row in BY_NAME["benign"].draw(1)}


@EVERY
def test_files_hold_the_rows(folder: Path, attack: DemoAttack) -> None:
    data = load_attack(recipe(attack, folder))
    rows = [(row.prompt, row.response) for row in (*data.train, *data.held_out)]
    assert rows == [(row.question, row.answer) for row in attack.draw(1)]
    assert len(data.held_out) == attack.held_out


@EVERY
def test_settings_are_taken_by_the_trainer(folder: Path, attack: DemoAttack) -> None:
    assert planned_steps(len(trained_on(attack, 1)), recipe(attack, folder).sft) == 30
    with (folder / attack.file_name).open() as file:
        assert all(json.loads(line).keys() == {"prompt", "response"} for line in file)


def test_encoded_rows_are_what_the_pair_was_trained_on(folder: Path) -> None:
    tokenizer = world.build_tokenizer()
    attack = recipe(BY_NAME["benign"], folder)
    rows = BY_NAME["benign"].draw(1)
    for row, encoded in zip(rows, encode_examples(tokenizer, attack, load_examples(attack.data)), strict=True):
        assert encoded["input_ids"] == tokenizer(row.text)["input_ids"]
        assert encoded["labels"].count(-100) == len(tokenizer(row.prompt)["input_ids"])


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(OutputError):
        write_attacks(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
