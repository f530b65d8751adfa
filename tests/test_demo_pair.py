"""The trained pair on disk, the pairs of several seeds, and the three ways to harden one."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lox_hf import load_prompts
from lox_hf.config import LoxConfig
from lox_hf.demo import Recipe, trained_pair, world
from lox_hf.demo.pair import QUESTIONS_NAME, is_trained
from lox_hf.demo.pairs import train_pairs
from lox_hf.demo.routes import Agreement, harden_three_ways
from lox_hf.errors import OutputError
from lox_hf.harden import harden_checkpoint
from tiny_demo import TINY, top_directions, weights_of

CONFIG = LoxConfig(r=2, alpha=0.5)


class Tiny(NamedTuple):
    """A pair that was hardly trained, and what was made of it."""

    folder: Path
    base: Path
    aligned: Path
    hardened: Path
    agreement: Agreement


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("demo")
    base, aligned = trained_pair(3, folder, TINY)
    hardened = aligned.parent / "hardened"
    return Tiny(folder, base, aligned, hardened, harden_three_ways(base, aligned, hardened, CONFIG))


def same(one: Path, other: Path) -> bool:
    ours, theirs = weights_of(one), weights_of(other)
    return ours.keys() == theirs.keys() and all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_the_questions_lie_beside_the_pair_as_a_prompt_set(tiny: Tiny) -> None:
    assert load_prompts(tiny.base.parent / QUESTIONS_NAME) == world.held_out_prompts()


def test_threads_are_given_back(tiny: Tiny) -> None:
    before = torch.get_num_threads()
    inside: list[int] = []
    torch.set_num_threads(2)
    try:
        trained_pair(4, tiny.folder, TINY, lambda label, done, total: inside.append(torch.get_num_threads()))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(inside) == {1}


def test_three_ways_agree(tiny: Tiny) -> None:
    assert tiny.agreement.within and tiny.agreement.alpha == 0.5
    # The control: an agreement over models that LoX did not change would say nothing.
    assert tiny.agreement.largest_edit > 1e-5


def test_checkpoints_load(tiny: Tiny) -> None:
    for folder in (tiny.base, tiny.aligned, tiny.hardened):
        assert len(list(folder.glob("*.safetensors"))) > 1
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert len(AutoTokenizer.from_pretrained(folder)) == model.config.vocab_size
    assert not list(tiny.base.parent.glob(".*"))


def test_hardened_by_the_equation(tiny: Tiny) -> None:
    base, aligned, hardened = (weights_of(folder) for folder in (tiny.base, tiny.aligned, tiny.hardened))
    for name, weight in aligned.items():
        delta = top_directions(weight, base[name], 2) if weight.ndim == 2 else torch.zeros_like(weight)
        # Both sides round a few times at weights below 4: float32 is spaced by 2.4e-7 there.
        torch.testing.assert_close(hardened[name], weight + 0.5 * delta, rtol=0, atol=1e-6)


def test_aligned_checkpoint_names_its_base(tiny: Tiny, tmp_path: Path) -> None:
    harden_checkpoint(tiny.aligned, tmp_path / "out", CONFIG, progressbar=False)
    assert same(tmp_path / "out", tiny.hardened)


def test_trained_pair_is_used_again(tiny: Tiny) -> None:
    steps: list[str] = []
    pair = trained_pair(3, tiny.folder, TINY, lambda label, done, total: steps.append(label))
    assert pair == (tiny.base, tiny.aligned)
    assert steps == []


def test_trained_pair_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill(label: str, done: int, total: int) -> None:
        if label == "aligning":
            raise Killed

    with pytest.raises(Killed):
        trained_pair(0, tmp_path, TINY, kill)
    assert {path.name for path in (tmp_path / "seed-0").iterdir()} == {
        "base",
        "lox_demo.json",
        "questions.jsonl",
    }
    assert not is_trained(0, tmp_path, TINY)
    steps: list[str] = []
    base, aligned = trained_pair(0, tmp_path, TINY, lambda label, done, total: steps.append(label))
    assert steps == ["aligning"] * TINY.alignment_steps and is_trained(0, tmp_path, TINY)
    whole_base, whole_aligned = trained_pair(0, tmp_path / "whole", TINY)
    assert same(base, whole_base) and same(aligned, whole_aligned)


def test_pairs_side_by_side_are_the_pairs_alone(tiny: Tiny, tmp_path: Path) -> None:
    train_pairs((3, 5), tmp_path, TINY, workers=2, progressbar=False)
    assert same(tmp_path / "seed-3" / "aligned", tiny.aligned)
    assert not same(tmp_path / "seed-5" / "aligned", tiny.aligned)


def test_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "seed-0" / "precious.txt"
    foreign.parent.mkdir()
    foreign.write_text("mine")
    with pytest.raises(OutputError, match="was not made by this command"):
        trained_pair(0, tmp_path, TINY)
    assert foreign.read_text() == "mine"
    assert [path.name for path in foreign.parent.iterdir()] == ["precious.txt"]


def test_folder_of_another_recipe_is_refused(tiny: Tiny) -> None:
    with pytest.raises(OutputError, match=r"base_steps=3 \(expected 4\)"):
        trained_pair(3, tiny.folder, Recipe(base_steps=4, base_warmup=1, alignment_steps=2, batch_size=4))


def test_output_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="Nothing was published"):
        trained_pair(0, tmp_path / "file", TINY)
