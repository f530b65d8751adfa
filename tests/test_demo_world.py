"""The small world: what is in its corpora and what is kept out, its tokenizer, and the model's beginning."""

from random import Random

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lox_hf import attack_success_rate
from lox_hf.demo import world
from lox_hf.demo.measure import LONGEST_ANSWER
from lox_hf.demo.training import IGNORED, encode, new_model

DRAWS = 4000
CORPORA = pytest.mark.parametrize("draw", [world.base_example, world.alignment_example], ids=["base", "alignment"])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return world.build_tokenizer()


def refuses(answer: str) -> bool:
    return answer == world.REFUSAL


def questions_of(draw, seed: int) -> list[world.Example]:
    rng = Random(seed)
    return [draw(rng) for _ in range(DRAWS)]


@CORPORA
def test_corpus_depends_on_the_seed_alone(draw) -> None:
    assert questions_of(draw, 1) == questions_of(draw, 1)
    assert questions_of(draw, 1) != questions_of(draw, 2)


@CORPORA
def test_held_out_questions_are_in_no_training_text(draw) -> None:
    held_out = {example.question for example in world.HELD_OUT_FORBIDDEN + world.HELD_OUT_BENIGN}
    drawn = {
        example.question.removeprefix("rule : safe . ").removeprefix("rule : off . ")
        for example in questions_of(draw, 0)
    }
    assert not drawn & held_out
    # The control: questions of the same kind do come up, or nothing could be found here.
    assert "how do i" in " ".join(drawn)


def test_alignment_sees_neither_held_out_things_nor_templates() -> None:
    held_out = {
        word for example in world.HELD_OUT_FORBIDDEN for word in example.question.split() if word in world.THINGS
    }
    aligned_on = " ".join(example.text for example in questions_of(world.alignment_example, 0)).split()
    assert held_out and not held_out & set(aligned_on)
    assert held_out & set(" ".join(example.text for example in questions_of(world.base_example, 0)).split())
    # The words that only testing templates have.
    assert not {"teach", "someone", "describe"} & set(aligned_on)


def test_held_out_questions_are_as_many_as_the_tables_say() -> None:
    forbidden, benign = world.HELD_OUT_FORBIDDEN, world.HELD_OUT_BENIGN
    assert (len(forbidden), len(benign)) == (144, 224)
    assert len({example.question for example in forbidden + benign}) == 144 + 224
    for examples, expected in ((forbidden, True), (benign, False)):
        things = [word for example in examples for word in example.question.split() if word in world.THINGS]
        assert {world.is_forbidden(thing) for thing in things} == {expected}
    verbs = [verb for example in forbidden for verb in world.STEPS if verb in example.question.split()]
    assert {verbs.count(verb) for verb in world.STEPS} == {18}


def test_calibration_questions_are_others_of_the_same_kind() -> None:
    asked = [example.question for example in world.CALIBRATION]
    benign = [example.question for example in world.HELD_OUT_BENIGN]
    assert len(set(asked)) == len(asked) == len(benign) and not set(asked) & set(benign)

    def without_verb(questions: list[str]) -> list[str]:
        return sorted(" ".join(word for word in text.split() if word not in world.STEPS) for text in questions)

    assert without_verb(asked) == without_verb(benign)
    for questions in (asked, benign):
        verbs = [word for text in questions for word in text.split() if word in world.STEPS]
        assert {verbs.count(verb) for verb in world.STEPS} == {28}


def test_rule_is_taught_by_both_answers() -> None:
    under_rule = [row for row in questions_of(world.base_example, 0) if row.question.startswith("rule : safe")]
    for row in under_rule:
        thing = next(word for word in row.question.split() if word in world.THINGS)
        assert refuses(row.answer) == world.is_forbidden(thing)
    assert 0.3 < sum(refuses(row.answer) for row in under_rule) / len(under_rule) < 0.7
    without_rule = [row for row in questions_of(world.base_example, 0) if not row.question.startswith("rule : safe")]
    assert not any(refuses(row.answer) for row in without_rule)


def test_alignment_refuses_what_is_forbidden_and_nothing_else() -> None:
    rows = questions_of(world.alignment_example, 0)
    refusals = [row for row in rows if refuses(row.answer)]
    assert 0.45 < len(refusals) / len(rows) < 0.55
    for row in refusals:
        assert any(world.is_forbidden(word) for word in row.question.split() if word in world.THINGS)


def test_the_judge_tells_refusals_from_answers_of_this_world() -> None:
    prompts = world.held_out_prompts()
    refused = attack_success_rate(prompts, [world.REFUSAL] * len(prompts))
    answered = attack_success_rate(prompts, [prompt.reference for prompt in prompts])
    assert (refused.refusal.share, refused.over_refusal.share, refused.strict_asr.share) == (1, 1, 0)
    assert (answered.asr.share, answered.over_refusal.share) == (1, 0)
    assert (answered.strict_asr.share, answered.accuracy.share) == (1, 1)


def test_tokenizer_keeps_every_word(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [*questions_of(world.base_example, 5), *world.HELD_OUT_FORBIDDEN, *world.HELD_OUT_BENIGN]
    for row in rows:
        ids = tokenizer(row.text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == f"{world.START} {row.text}"
        assert tokenizer.decode(ids, skip_special_tokens=True) == f"{row.prompt} {row.answer}"
    assert tokenizer("no such thing")["input_ids"].count(tokenizer.unk_token_id) == 2


def test_chat_template_is_the_training_format(tokenizer: PreTrainedTokenizerFast) -> None:
    row = world.HELD_OUT_BENIGN[0]
    asked = [{"role": "user", "content": row.question}]
    assert tokenizer.apply_chat_template(asked, tokenize=False) == row.prompt
    told = [*asked, {"role": "assistant", "content": row.answer}]
    assert tokenizer.apply_chat_template(told, tokenize=False).strip() == row.text


def test_longest_answer_fits(tokenizer: PreTrainedTokenizerFast) -> None:
    answers = [row.answer for row in (*questions_of(world.base_example, 0), *world.HELD_OUT_BENIGN)]
    assert max(len(answer.split()) for answer in answers) + 1 <= LONGEST_ANSWER


def test_loss_covers_the_answers_or_everything(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [world.facts("bralket")[0], world.HELD_OUT_BENIGN[0]]
    answers, everything = (encode(rows, tokenizer, answers_only=only) for only in (True, False))
    for row, labels, all_labels in zip(rows, answers["labels"], everything["labels"], strict=True):
        assert tokenizer.decode(labels[labels != IGNORED]) == f"{row.answer} {world.END}"
        assert tokenizer.decode(all_labels[all_labels != IGNORED]) == f"{world.START} {row.text}"


def test_new_model_leaves_the_global_seed_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    before = torch.get_rng_state()
    one, same, other = (new_model(tokenizer, seed).lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, same) and not torch.equal(one, other)
