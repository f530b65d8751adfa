"""Classifiers as judges in runs: batches, memory that runs out, and other files. None of them is trained."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import classifier_zoo as zoo
import pytest
import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from lox_hf.errors import CheckpointError, LoxError
from lox_hf.evaluation.judges import classifier
from lox_hf.evaluation.judges.classifier import ClassifierJudge
from lox_hf.evaluation.judges.presets import PRESETS, Preset, find_preset
from lox_hf.evaluation.models.loading import load_model

KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "labels": (LlamaForSequenceClassification, {"preset": "beaver-dam"}),
    "replies": (LlamaForCausalLM, {"preset": "llama-guard"}),
}
# From the shortest to the longest.
RESPONSES = ["a", "a way", "a way to", "a way to make", "a way to make jam", "a way to make jam is"]
PROMPTS = ["how"] * 6


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(kind: str, tmp_path: Path) -> Path:
    zoo.llama(KINDS[kind][0]).save_pretrained(tmp_path)
    zoo.tokenizer(zoo.GUARD).save_pretrained(tmp_path)
    return tmp_path


def watch(monkeypatch: pytest.MonkeyPatch, see: Callable[[torch.Tensor], None]) -> None:
    """Let every batch of a model that a judge loads from now on be seen before it is worked out."""

    def load(*args: Any, **settings: Any) -> Any:
        model, tokenizer = load_model(*args, **settings)
        model.register_forward_pre_hook(lambda _, __, inputs: see(inputs["input_ids"]), with_kwargs=True)
        return model, tokenizer

    monkeypatch.setattr(classifier, "load_model", load)


def test_a_judge_that_goes_on_composes_the_same_batches(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[list[int]]] = []
    watch(monkeypatch, lambda ids: batches.append(ids.tolist()))
    judge = ClassifierJudge(folder, **KINDS[kind][1], batch_size=2)
    whole = dict(judge.verdicts(PROMPTS, RESPONSES))
    composed = list(batches)
    batches.clear()
    # The longest two, a batch of their own, and half of the next one.
    assert dict(judge.verdicts(PROMPTS, RESPONSES, {5, 4, 2})) == {place: whole[place] for place in range(4)}
    assert 0 < len(batches) < len(composed) and batches == composed[-len(batches) :]
    batches.clear()
    assert list(judge.verdicts(PROMPTS, RESPONSES, range(6))) == [] == batches


def test_batches_are_halved_where_memory_runs_out(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def see(ids: torch.Tensor, most: int = 2) -> None:
        sizes.append(len(ids))
        if len(ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    parameters = KINDS[kind][1]
    free = dict(ClassifierJudge(folder, **parameters).verdicts(PROMPTS, RESPONSES))
    watch(monkeypatch, see)
    judge = ClassifierJudge(folder, **parameters, batch_size=6)
    assert dict(judge.verdicts(PROMPTS, RESPONSES)) == free and max(sizes) == 6
    sizes.clear()
    assert dict(judge.verdicts(PROMPTS, RESPONSES)) == free and max(sizes) == 1  # it stays at what fitted
    watch(monkeypatch, lambda ids: see(ids, most=0))
    with pytest.raises(LoxError, match="memory of cpu does not suffice for one") as found:
        list(ClassifierJudge(folder, **parameters).verdicts(PROMPTS, RESPONSES))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("kind", ["replies"], indirect=True)
def test_weights_are_needed_for_verdicts_only(kind: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    judge = ClassifierJudge(folder, **KINDS[kind][1], dtype=torch.bfloat16)
    settings = judge.settings()
    assert re.fullmatch("[0-9a-f]{64}", settings.pop("weights_sample"))
    assert settings == {
        "model": str(folder),
        "revision": None,
        "dtype": "bfloat16",
        "harmful_pattern": PRESETS["llama-guard"].harmful_pattern,
        "harmless_pattern": PRESETS["llama-guard"].harmless_pattern,
        "max_new_tokens": 32,
    }
    assert list(judge.verdicts([], [])) == []
    with pytest.raises(CheckpointError):
        list(judge.verdicts(PROMPTS, RESPONSES))


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_other_files_in_the_same_folder_are_another_judge(kind: str, folder: Path, file: str) -> None:
    before, again = (ClassifierJudge(folder, **KINDS[kind][1]).settings() for _ in range(2))
    found = (folder / file).stat()
    os.utime(folder / file, ns=(found.st_atime_ns, found.st_mtime_ns + 1000))
    after = ClassifierJudge(folder, **KINDS[kind][1]).settings()
    assert before == again
    assert {name for name in before if before[name] != after[name]} == {"weights_sample"}


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("meta-llama/Llama-Guard-3-8B", "llama-guard"),
        ("mirror/llama-guard-3-8b", "llama-guard"),
        ("/models/HarmBench-Llama-2-13b-cls/", "harmbench"),
        ("~/wildguard", "wildguard"),
        ("beaver-dam-7b", "beaver-dam"),
    ],
)
def test_known_models_are_known_wherever_they_lie(model: str, name: str) -> None:
    assert find_preset(None, model) is PRESETS[name]


@pytest.mark.parametrize("model", ["org/my-wildguard", "wildguard/other", "/"])
def test_other_models_are_not(model: str) -> None:
    assert find_preset(None, model) == Preset()
    assert find_preset("wildguard", model) is PRESETS["wildguard"]
