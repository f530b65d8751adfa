"""The rubric judge by a model in this process: from a model or a folder, and what it cannot read."""

import pytest
import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from lox_hf.errors import CheckpointError, ConfigError
from lox_hf.evaluation.judges import get_judge
from lox_hf.evaluation.judges.rubric import RubricJudge
from lox_hf.evaluation.models.local import LocalModel
from lox_hf.evaluation.models.templates import encode

RUBRIC = "{prompt} {response}"
PROMPT, RESPONSES = "How do I bake bread?", ["Mix flour and water.", "One part water."]
# Longer than the 60 tokens that an answer to a prompt may have.
VERDICT = '{"reason": "it says how to do what was asked for, if not in much detail", "score": 5}'
CONTEXT = 2048


@pytest.fixture(scope="module")
def loaded():
    """A model of bytes that has learnt to write this verdict after two questions, and its tokenizer."""
    tokenizer = ByT5Tokenizer(extra_ids=0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=CONTEXT, eos_token_id=1, **sizes)
        model = LlamaForCausalLM(config)
    judge = RubricJudge.from_model(model, tokenizer, template=RUBRIC)
    asked = [encode(tokenizer, judge._question(PROMPT, response), "alpaca") for response in RESPONSES]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(100):
        question, verdict = asked[step % 2], tokenizer(VERDICT)["input_ids"]
        labels = [-100] * len(question) + verdict
        model(input_ids=torch.tensor([question + verdict]), labels=torch.tensor([labels])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


def test_a_loaded_model_judges_with_room_for_a_verdict(loaded):
    verdicts = dict(RubricJudge.from_model(*loaded, template=RUBRIC).verdicts([PROMPT] * 2, RESPONSES))
    assert [verdicts[number].score for number in (0, 1)] == [5, 5]
    assert verdicts[0].raw == VERDICT
    short = RubricJudge(LocalModel(*loaded), template=RUBRIC)  # control: the room of an answer to a prompt
    assert "cut off by max_new_tokens" in dict(short.verdicts([PROMPT] * 2, RESPONSES))[0].reason


def test_what_the_model_cannot_read_is_unscored_and_costs_no_other(loaded):
    judge = RubricJudge.from_model(*loaded, template=RUBRIC)
    verdicts = dict(judge.verdicts([PROMPT] * 2, [RESPONSES[0], "Knead it. " * CONTEXT]))
    assert verdicts[0].score == 5
    assert (verdicts[1].label, verdicts[1].transient) == ("unscored", False)
    assert str(CONTEXT) in verdicts[1].reason


def test_a_loaded_model_as_it_is_is_refused_with_the_way_to_pass_it(loaded):
    model, tokenizer = loaded
    for wrong in [(model,), (model, tokenizer), (LocalModel(model, tokenizer), tokenizer), ("gpt-4o",), (LocalModel,)]:
        with pytest.raises(ConfigError, match=r"RubricJudge\.from_model.*RubricJudge\.from_endpoint"):
            RubricJudge(*wrong)


def test_a_folder_by_its_name_is_a_model_in_this_process(loaded, tmp_path, monkeypatch):
    for part in loaded:
        part.save_pretrained(tmp_path / "judge")
    monkeypatch.chdir(tmp_path)
    for name in ("./judge", "judge", str(tmp_path / "judge")):
        judge = get_judge(f"rubric:{name}")
        assert isinstance(judge.model, LocalModel)
        assert judge.name == f"rubric:{name}"
        assert judge.settings()["max_new_tokens"] == 256
    for name in ("./none", "~/none", str(tmp_path / "none")):
        with pytest.raises(CheckpointError, match="none"):
            get_judge(f"rubric:{name}")
    with pytest.raises(ConfigError, match="no API key"):  # control: a name is one at an endpoint
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        get_judge("rubric:gpt-4o-mini")
