"""Which base is taken: the one that is named, and never one that is guessed."""

import json
from pathlib import Path
from typing import Any

import pytest

from auto.auto_pair import name_base
from lox_hf.auto.base import find_base, likely_bases
from lox_hf.errors import ConfigError
from lox_hf.hub_files import Resolved
from lox_hf.records import ModelReference


def files(folder: Path, name: str = "org/aligned-Instruct") -> Resolved:
    return Resolved(folder, ModelReference(name))


def test_the_users_word_goes_before_the_card(tmp_path: Path) -> None:
    name_base(tmp_path, "org/base")
    assert str(find_base(files(tmp_path), "org/mine")) == "base      org/mine (--base-model)"
    assert str(find_base(files(tmp_path), None)) == "base      org/base (named by README.md; --base-model)"


@pytest.mark.parametrize("relation", ["finetune", None])
def test_fine_tuning_is_a_relation_that_alignment_may_have(tmp_path: Path, relation: str | None) -> None:
    name_base(tmp_path, "org/base", **({"base_model_relation": relation} if relation else {}))
    assert find_base(files(tmp_path), None).value == "org/base"


@pytest.mark.parametrize("relation", ["quantized", "merge", "adapter", "Quantized"])
def test_what_is_no_alignment_is_said(tmp_path: Path, relation: str) -> None:
    name_base(tmp_path, "org/base", base_model_relation=relation)
    with pytest.raises(ConfigError, match=rf"names 'org/base' as its base, but as .*{relation.lower()}.*--base-model"):
        find_base(files(tmp_path), None)
    assert find_base(files(tmp_path), "org/base").value == "org/base", "who names it knows"


def test_several_bases_are_none(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nbase_model: [org/a, org/b]\n---\n")
    with pytest.raises(ConfigError, match="names several bases"):
        find_base(files(tmp_path), None)


def test_an_adapter_needs_none(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    with pytest.raises(ConfigError, match=r"is a PEFT adapter.*`lox-hf harden`"):
        find_base(files(tmp_path), "org/base")


GUESSES: dict[str, list[str]] = {
    "meta-llama/Llama-2-7b-chat-hf": ["meta-llama/Llama-2-7b-hf"],
    "meta-llama/Llama-3.1-8B-Instruct": ["meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Base"],
    "google/gemma-2-2b-it": ["google/gemma-2-2b", "google/gemma-2-2b-Base"],
    "mistralai/Mistral-7B-Instruct-v0.3": ["mistralai/Mistral-7B-v0.3", "mistralai/Mistral-7B-v0.3-Base"],
    "allenai/OLMo-2-1124-7B-DPO": ["allenai/OLMo-2-1124-7B", "allenai/OLMo-2-1124-7B-Base"],
    "Qwen/Qwen3-4B-Instruct-2507": ["Qwen/Qwen3-4B", "Qwen/Qwen3-4B-Base"],
    "Qwen/Qwen3-4B": ["Qwen/Qwen3-4B-Base"],
    "org/titan-italic": ["org/titan-italic-Base"],
}


@pytest.mark.parametrize("name", GUESSES)
def test_likely_ones_are_named_and_not_used(name: str, tmp_path: Path) -> None:
    assert likely_bases(name) == GUESSES[name]
    with pytest.raises(ConfigError) as error:
        find_base(files(tmp_path, name), None)
    assert all(f"'{guess}'" in str(error.value) for guess in GUESSES[name])
    assert "--base-model" in str(error.value)


def test_a_folders_name_says_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        find_base(files(tmp_path, str(tmp_path)), None)
    said: Any = str(error.value)
    assert "the folder or Hub id of the model that it was aligned from" in said
    assert "-Base" not in said
