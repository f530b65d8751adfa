"""`load_model`: what is loaded, and one clear line for whatever is wrong with it."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging

import zoo
from fake_hub import FakeHub, Repo
from lox_hf.errors import CheckpointError, ConfigError, LoxError
from lox_hf.evaluation.models.loading import load_model, quiet_transformers

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
IDS = torch.arange(10)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded bfloat16 checkpoint with its tokenizer."""
    return zoo.save_pair("llama", tmp_path_factory.mktemp("pair")).aligned_dir


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for the checkpoint, without a tokenizer."""
    path = tmp_path_factory.mktemp("adapters") / "adapter"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(folder), settings).save_pretrained(path)
    return path


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def save(model: PreTrainedModel, folder: Path) -> Path:
    """Save an untrained model with a tokenizer."""
    model.save_pretrained(folder)
    zoo.make_tokenizer(64).save_pretrained(folder)
    return folder


def error_of(call: Callable[[], object]) -> str:
    """The one line of a refusal."""
    with pytest.raises(LoxError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return f"{type(caught.value).__name__}: {caught.value}"


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_a_checkpoint_is_loaded_as_stored_and_ready(folder: Path) -> None:
    model, tokenizer = load_model(folder)
    assert (model.dtype, model.training, model.name_or_path) == (torch.bfloat16, False, str(folder))
    assert (model.config.name_or_path, model.config._commit_hash) == (str(folder), None)
    assert tokenizer("w4 w5")["input_ids"] == [4, 5]
    stored = AutoModelForCausalLM.from_pretrained(folder)
    assert logits(model).equal(logits(stored))


@pytest.mark.parametrize("dtype", ["float32", torch.float32])
def test_the_dtype_is_the_one_asked_for(folder: Path, dtype: Any) -> None:
    assert load_model(folder, dtype=dtype)[0].dtype == torch.float32


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "auto", None])
def test_devices(folder: Path, device: Any) -> None:
    expected = "cpu" if device not in (None, "auto") else (torch.accelerator.current_accelerator() or "cpu")
    assert load_model(folder, device=device)[0].device.type == torch.device(expected).type


@pytest.mark.parametrize("dtype", ["int8", "floating", "Tensor", torch.int64])
def test_dtypes_that_no_weights_have(folder: Path, dtype: Any) -> None:
    assert "ConfigError: dtype must be 'auto' or one such as" in error_of(lambda: load_model(folder, dtype=dtype))


@pytest.mark.parametrize("device", ["cuda:99", "meta", "tpu", "mps:7"])
def test_devices_that_are_not_there(folder: Path, device: str) -> None:
    assert f"ConfigError: There is no device '{device}' here" in error_of(lambda: load_model(folder, device=device))


def test_an_adapter_stands_on_its_base(folder: Path, adapter: Path) -> None:
    model, tokenizer = load_model(adapter, dtype="float32")
    assert (model.name_or_path, model.config.name_or_path, model.training) == (str(adapter), str(adapter), False)
    assert len(tokenizer) == 192  # the base's
    base, _ = load_model(folder, dtype="float32")
    before = logits(base)
    # The same products of the same numbers.
    torch.testing.assert_close(logits(model), logits(PeftModel.from_pretrained(base, adapter)), rtol=0, atol=1e-6)
    assert (logits(model) - before).abs().max() > 1e-2


CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}
LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj"], **CAUSAL}


@pytest.mark.parametrize(
    "settings",
    [
        LoraConfig(**LORA, use_dora=True),
        LoraConfig(**LORA, use_rslora=True),
        LoraConfig(**LORA, modules_to_save=["embed_tokens", "lm_head"]),
        LoraConfig(**LORA, trainable_token_indices=[3, 4]),
        IA3Config(target_modules=["k_proj"], feedforward_modules=[], **CAUSAL),
        PromptTuningConfig(num_virtual_tokens=3, **CAUSAL),
        PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL),
    ],
    ids=["dora", "rslora", "whole-modules", "tokens", "ia3", "prompt", "prefix"],
)
@pytest.mark.parametrize("vocabulary", [192, 200])
def test_adapters_of_every_kind(folder: Path, tmp_path: Path, settings: PeftConfig, vocabulary: int) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base.resize_token_embeddings(vocabulary)
        trained = get_peft_model(base, copy.deepcopy(settings)).eval()
        before = logits(trained)
        with torch.no_grad():
            for weight in trained.parameters():
                if weight.requires_grad:
                    weight.add_(torch.randn_like(weight))
    trained.save_pretrained(tmp_path, save_embedding_layers=vocabulary > 192)
    zoo.make_tokenizer(vocabulary).save_pretrained(tmp_path)
    model, tokenizer = load_model(tmp_path)
    assert len(tokenizer) == vocabulary and model.get_input_embeddings().weight.shape[0] == vocabulary
    assert logits(model).equal(logits(trained)) and not logits(trained).equal(before)
    assert {weight.dtype for name, weight in model.named_parameters() if "lora_" in name} <= {torch.float32}


def test_the_adapters_own_tokenizer_wins(adapter: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(adapter, tmp_path / "own"))
    zoo.make_tokenizer(100).save_pretrained(own)
    assert len(load_model(own)[1]) == 100


def test_a_trainers_config_beside_an_adapter_does_not_matter(folder: Path, adapter: Path, tmp_path: Path) -> None:
    both = Path(shutil.copytree(adapter, tmp_path / "both"))
    shutil.copy(folder / "config.json", both)
    assert logits(load_model(both)[0]).equal(logits(load_model(adapter)[0]))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"base_model_name_or_path": "./gone"}, "is an adapter for './gone', which is not to be had: There is no"),
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
        (
            {"r": 8},
            r"size mismatch for .*lora_A.default.weight: .* shape torch.Size\(\[4, 96\]\) from checkpoint, .*8, 96",
        ),
        ({"target_modules": ["q_proj", "v_proj"]}, "Found missing adapter keys .*v_proj.lora_A.default.weight"),
        ({"peft_type": "NONSENSE"}, "Cannot load the adapter"),
    ],
)
def test_adapters_that_do_not_fit(adapter: Path, tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    broken = Path(shutil.copytree(adapter, tmp_path / "broken"))
    path = broken / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert re.search(f"CheckpointError: .*{expected}", error_of(lambda: load_model(broken)))


def test_a_classifier_by_its_own_head_only(folder: Path, tmp_path: Path) -> None:
    config = LlamaConfig(**TINY, num_labels=3, pad_token_id=0)
    classifier = save(LlamaForSequenceClassification(config), tmp_path / "classifier")
    model, _ = load_model(classifier, head="sequence-classification")
    assert logits(model).shape == (1, 3)
    message = error_of(lambda: load_model(classifier))
    assert "is LlamaForSequenceClassification; expected a model such as LlamaForCausalLM." in message
    message = error_of(lambda: load_model(folder, head="sequence-classification"))
    assert "is LlamaForCausalLM; expected a model such as LlamaForSequenceClassification." in message


def test_models_that_do_not_continue_a_text(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
    t5 = save(T5ForConditionalGeneration(T5Config(**sizes)), tmp_path / "t5")
    assert "is T5ForConditionalGeneration, an encoder-decoder; expected" in error_of(lambda: load_model(t5))
    bert = save(BertForMaskedLM(BertConfig(**TINY)), tmp_path / "bert")
    assert "is BertForMaskedLM; expected" in error_of(lambda: load_model(bert))


def test_what_is_no_model() -> None:
    assert "CheckpointError: There is no folder './gone'." in error_of(lambda: load_model("./gone"))
    assert "nor a Hub id such as 'org/model'" in error_of(lambda: load_model("three words here"))


def lose(pattern: str) -> Callable[[Path], None]:
    return lambda folder: [path.unlink() for path in folder.glob(pattern)] and None


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def shorten_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].pop("model.layers.1.mlp.up_proj.weight")
    path.write_text(json.dumps(index))


def widen(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 140}))


REMOTE = '{"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}'


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lose("*token*"), "has no tokenizer: put its files (tokenizer_config.json, tokenizer.json) beside"),
        (write("tokenizer.json", "{"), "Cannot load the tokenizer of"),
        (write("config.json", "{"), "is not a valid JSON file"),
        (write("config.json", '{"model_type": "llama", "hidden_size": "x"}'), "'hidden_size'"),
        (write("config.json", '{"model_type": "nonsense"}'), "`nonsense`"),
        (write("config.json", REMOTE), "Pass trust_remote_code if you have read that code and trust it."),
        (lose("config.json"), "Should have a `model_type` key in its config.json"),
        (lose("model*"), "has no safetensors file"),
        (lose("model-00003*"), "model-00003-of-00015.safetensors"),
        (write("model-00003-of-00015.safetensors", "cut"), "deserializing header"),
        (shorten_index, "do not fit its config: model.layers.1.mlp.up_proj.weight: missing."),
        (widen, "model.layers.0.mlp.down_proj.weight: (96, 144) against (96, 140)"),
    ],
)
def test_damaged_files(
    damaged: Path, damage: Callable[[Path], None], expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(damaged)
    message = error_of(lambda: load_model(damaged))
    assert message.startswith("CheckpointError: ") and expected in message
    assert capfd.readouterr() == ("", "")  # no report of transformers beside the line


def test_transformers_is_as_loud_as_before(folder: Path) -> None:
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quiet_transformers():
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.ERROR, False)
    load_model(folder)
    with pytest.raises(CheckpointError):
        load_model(folder, head="sequence-classification")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_packages_that_are_missing(folder: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'lox-hf[peft]'" in error_of(lambda: load_model(adapter))
    with pytest.raises(ConfigError, match="pip install accelerate"):
        load_model(folder, device="auto")


@pytest.mark.parametrize("token", ["hf_Secret\n", "hf_Secret hf_Secret", "hf_S\u00e9cret", ""])
def test_a_token_that_is_none_is_not_quoted(token: str) -> None:
    message = error_of(lambda: load_model("org/model", token=token))
    assert message.startswith("ConfigError: The Hub token") and "cret" not in message


CLIENT = """
import json, sys
from lox_hf.evaluation.models.loading import load_model
def look(name, **settings):
    try:
        model, tokenizer = load_model(name, **settings)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return [model.name_or_path, model.config._commit_hash, len(tokenizer)]
print(json.dumps([look(name, **settings) for name, settings in json.loads(sys.argv[1])]))
"""


def test_the_hub(folder: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    pickled = {name: data for name, data in files.items() if not name.startswith("model")}
    with FakeHub("hf_TheSecretOfThisTest") as hub:
        hub.repos |= {"org/model": Repo(), "org/pickled": Repo(), "org/gated": Repo(gated=True)}
        commit = hub.repos["org/model"].commit(files)
        hub.repos["org/pickled"].commit(pickled | {"pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes()})
        hub.repos["org/gated"].commit(files)
        asked = [("org/model", {}), ("org/pickled", {}), ("org/gated", {}), ("org/gone", {})]
        asked += [("org/model", {"revision": "v9"}), ("org/gone", {"token": "hf_AnotherSecret"})]
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        hub_only = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        switches = {"DISABLE_SAFETENSORS_CONVERSION": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": hub.token}
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, json.dumps(asked)],
            env={**ours, **hub_only, **switches},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    loaded, from_pickle, gated, gone, revision, wrong_token = json.loads(done.stdout.splitlines()[-1])
    assert loaded == ["org/model", commit, 192]
    assert "CheckpointError: 'org/pickled' has no safetensors file; pickles" in from_pickle
    assert "CheckpointError: 'org/gated' is gated" in gated
    assert "neither a folder on this machine nor a model on the Hub" in gone
    assert "has no revision 'v9'" in revision
    assert "CheckpointError" in wrong_token
    assert "Secret" not in done.stdout + done.stderr
