"""One fine-tuning: to the bit the same as TRL's own, whatever is measured on the way, and no trace of it is left."""

import copy
import gc
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration, set_seed
from transformers.utils.quantization_config import BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

import zoo
from lox_hf.errors import ConfigError, LoxError, PromptError, UnsupportedModelError
from lox_hf.evaluation.models.chat import ask
from lox_hf.evaluation.models.local import LocalModel
from lox_hf.robustness.finetuning.finetune import FineTuned, fine_tune, planned_steps
from robustness.trainable import SFT, logits, make_model, make_of_kind, make_rows, make_tokenizer, weights

LORA = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.3}


def train(model: Any = None, *, rows: Any = None, **options: Any) -> FineTuned:
    sft = SFT | options.pop("sft", {})
    rows = make_rows() if rows is None else rows
    return fine_tune(
        model if model is not None else make_model(), make_tokenizer(), rows, **{"sft": sft, "seed": 0} | options
    )


def plain_trainer(model: Any, folder: Path, **changes: Any) -> SFTTrainer:
    """TRL as one uses it."""
    quiet = {"report_to": "none", "save_strategy": "no", "bf16": False, "use_cpu": True}
    settings = {"output_dir": str(folder), "seed": 0, "dataset_kwargs": {"skip_prepare_dataset": True}}
    return SFTTrainer(
        model,
        args=SFTConfig(**{**SFT, **quiet, **settings, **changes}),
        train_dataset=Dataset.from_list(make_rows()),
        processing_class=make_tokenizer(),
    )


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return zoo.same_bits(left, right)


def generate(_: int, model: Any) -> None:
    """What an evaluation does, and worse: it draws random numbers and leaves the model in another mode."""
    replies = dict(LocalModel(model, make_tokenizer(), max_new_tokens=4).replies([ask("what is 1 plus 2 ?")]))
    assert replies[0].error == ""
    torch.rand(3)
    random.random()
    np.random.rand()
    model.eval()


def test_weights_are_those_of_a_plain_trainer(tmp_path: Path) -> None:
    before, plain = weights(make_model()), make_model()
    plain_trainer(plain, tmp_path).train()
    ours = weights(train().model)
    assert same(ours, weights(plain))
    mixed = make_model()
    plain_trainer(mixed, tmp_path, bf16=True).train()
    assert not same(ours, weights(mixed)), "the control: TRL's own default on a CPU"
    assert not same(ours, before)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_one_seed_gives_the_same_weights_to_the_bit(lora: dict[str, Any] | None) -> None:
    first, again, other = (weights(train(lora=lora, seed=seed).model) for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_measuring_on_the_way_changes_nothing(lora: dict[str, Any] | None, checkpointing: bool) -> None:
    sft = {"gradient_checkpointing": checkpointing}
    alone = weights(train(lora=lora, sft=sft).model)
    measured = weights(train(lora=lora, sft=sft, at_steps=(1, 2, 4), on_step=generate).model)
    assert same(measured, alone)

    def meddle(_: int, model: Any) -> None:
        with torch.no_grad():
            model.get_output_embeddings().weight.add_(1e-3)

    assert not same(weights(train(lora=lora, sft=sft, at_steps=(1,), on_step=meddle).model), alone)


def test_a_figure_on_the_way_is_what_it_is_afterwards() -> None:
    """In mixed precision the trainer's own forward rounds, and a reading would differ from one before or after."""
    found: dict[str, torch.Tensor] = {}

    def look(_: int, model: Any) -> None:
        model.eval()
        found["plain"] = logits(model)
        with torch.autocast("cpu", torch.bfloat16):
            found["mixed"] = logits(model)

    model = train(sft={"bf16": True}, at_steps=(4,), on_step=look).model
    assert torch.equal(found["plain"], logits(model))
    assert not torch.equal(found["mixed"].float(), found["plain"])


def test_adapters_end_in_the_weights() -> None:
    model, found = make_model(), {}

    def look(_: int, adapted: Any) -> None:
        adapted.eval()
        found["adapted"] = logits(adapted)

    before = weights(model)
    tuned = train(model, lora=LORA, sft={"learning_rate": 1e-2}, at_steps=(4,), on_step=look)
    assert tuned.model is model
    assert type(model) is type(make_model())
    torch.testing.assert_close(logits(model), found["adapted"], rtol=0, atol=1e-5)  # float32, summed in another order
    after = weights(model)
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "proj" in name}, "every linear layer, and nothing else"


def trappings(model: Any) -> dict[str, Any]:
    """All that hangs on a model and its configs, but for weights."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules"):
                found[f"{name}.{key}"] = dict(value) if "_hooks" in key and isinstance(value, dict) else value
    found |= {f"config.{key}": value for key, value in copy.deepcopy(vars(model.config)).items()}
    found |= {f"generation.{key}": value for key, value in copy.deepcopy(vars(model.generation_config)).items()}
    return found | {f"{name} is trained": weight.requires_grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["llama_tied", "gpt2", "mixtral"])
def test_no_trace_is_left(kind: str, lora: dict[str, Any] | None, tmp_path: Path) -> None:
    if lora and kind != "llama_tied":
        lora = {"r": 4, "target_modules": ["c_attn"] if kind == "gpt2" else ["q_proj"]}
    model = make_of_kind(kind)
    calls: list[int] = []
    model.get_input_embeddings().weight.requires_grad_(kind != "gpt2")
    hook = model.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    before = trappings(model)
    train(model, lora=lora, sft={"bf16": True, "gradient_checkpointing": True}, at_steps=(2,), on_step=generate)
    assert trappings(model) == before
    assert calls, "a hook of the model's owner stays"
    hook.remove()
    calls.clear()
    expected = logits(model)
    assert not calls
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected, rtol=0, atol=0)
    assert torch.equal(logits(copy.deepcopy(model)), expected), "a method of the trainer would still be of the other"


def test_a_plain_trainer_does_leave_traces(tmp_path: Path) -> None:
    model = make_model()
    before = trappings(model)
    plain_trainer(model, tmp_path, bf16=True, gradient_checkpointing=True).train()
    changed = {name for name, value in trappings(model).items() if name not in before or before[name] != value}
    assert {".forward", "model.gradient_checkpointing", "model.embed_tokens._forward_hooks"} <= changed


def test_a_model_is_trained_twice_as_a_copy_of_it_is() -> None:
    model = train().model
    fresh = make_model()
    fresh.load_state_dict(model.state_dict())
    assert same(weights(train(model, seed=1).model), weights(train(fresh, seed=1).model))


def test_random_states_and_the_tokenizer_are_left_as_they_were() -> None:
    def draws() -> list[float]:
        return [random.random(), float(np.random.rand()), torch.rand(1).item()]

    def seed() -> None:
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)

    tokenizer = make_tokenizer(pad=None)
    seed()
    expected = draws()
    seed()
    fine_tune(make_model(), tokenizer, make_rows(), sft=SFT, seed=0)
    assert draws() == expected
    assert tokenizer.pad_token is None
    assert tokenizer.padding_side == make_tokenizer().padding_side
    seed()
    set_seed(0)  # as the trainer does
    assert draws() != expected


def test_the_optimisers_memory_is_free_at_once() -> None:
    """Not only when Python collects the trainer's cycles: what is measured next needs the room."""

    def numbers() -> int:
        tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
        return sum(tensor.numel() for tensor in tensors)

    model = make_model()
    size, on_the_way = sum(weight.numel() for weight in model.parameters()), []
    gc.collect()
    gc.disable()
    try:
        before = numbers()
        train(model, at_steps=(4,), on_step=lambda *_: on_the_way.append(numbers()))
        assert numbers() - before < 0.1 * size
    finally:
        gc.enable()
    assert on_the_way[0] - before > 1.9 * size, "AdamW holds two numbers for every weight"


SHAPES: dict[str, tuple[int, dict[str, Any]]] = {
    "whole batches": (12, {"num_train_epochs": 2}),
    "rest of a batch": (11, {"num_train_epochs": 2}),
    "rest dropped": (11, {"num_train_epochs": 2, "dataloader_drop_last": True}),
    "accumulated": (12, {"num_train_epochs": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}),
    "rest of an accumulation": (10, {"num_train_epochs": 2, "gradient_accumulation_steps": 2}),
    "both rests": (11, {"num_train_epochs": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
    "one accumulation is more than all": (5, {"num_train_epochs": 2, "gradient_accumulation_steps": 8}),
    "batch is more than all": (3, {"num_train_epochs": 2, "per_device_train_batch_size": 16}),
    "half an epoch": (12, {"num_train_epochs": 0.5}),
    "an epoch and a bit": (10, {"num_train_epochs": 1.2, "per_device_train_batch_size": 3}),
    "steps": (5, {"max_steps": 3}),
    "steps before epochs": (12, {"max_steps": 2, "num_train_epochs": 9}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_planned_as_the_trainer_takes_them(shape: str) -> None:
    count, changes = SHAPES[shape]
    sft = {**SFT, "max_steps": -1} | changes
    assert train(rows=make_rows()[:count], sft=sft).steps == planned_steps(count, sft)


def test_calls_come_after_the_steps_that_were_asked_for() -> None:
    seen: list[int] = []
    tuned = train(at_steps=(1, 3, 4, 9), on_step=lambda step, _: seen.append(step))
    assert (seen, tuned.steps) == ([1, 3, 4], 4)
    assert tuned.train_loss > 0
    assert train(on_step=lambda step, _: seen.append(step)).steps == 4
    assert seen == [1, 3, 4]


def test_true_ends_the_training_there() -> None:
    seen: list[int] = []

    def stop(step: int, _: Any) -> bool:
        seen.append(step)
        return step == 2

    stopped = train(at_steps=range(1, 5), on_step=stop)
    assert (seen, stopped.steps) == ([1, 2], 2)
    assert same(weights(stopped.model), weights(train(sft={"max_steps": 2}).model)), "at a constant learning rate"


def test_the_learning_rate_takes_the_place_of_the_recipes() -> None:
    given = weights(train(learning_rate=2e-3).model)
    assert same(given, weights(train(sft={"learning_rate": 2e-3}).model))
    assert not same(given, weights(train().model))


def test_weights_keep_their_dtype_and_what_is_frozen_stays() -> None:
    model = make_model().to(torch.bfloat16)
    model.model.embed_tokens.weight.requires_grad_(False)
    before = weights(model)
    after = weights(train(model, learning_rate=1e-2).model)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def test_nothing_is_shown_or_left_on_disk(
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    train(sft={"gradient_checkpointing": True})
    train(lora=LORA, sft={"gradient_checkpointing": True})
    assert capfd.readouterr() == ("", "")
    assert [str(warning.message) for warning in recwarn] == []
    assert list(tmp_path.iterdir()) == []
    train(sft={"disable_tqdm": False, "save_strategy": "steps", "save_steps": 4, "output_dir": str(tmp_path / "kept")})
    assert "4/4" in capfd.readouterr().err
    assert (tmp_path / "kept" / "checkpoint-4").is_dir()


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown setting": ({"sft": {"learning_rat": 1}}, r"no 'learning_rat' Did you mean 'learning_rate'\?"),
    "two at once": ({"sft": {"nonsense": 1, "seed": 3}}, "'nonsense'; 'seed' cannot be set"),
    "packing": ({"sft": {"packing": True}}, "'packing' cannot be set: every row is a sequence"),
    "no such schedule": ({"sft": {"lr_scheduler_type": "lineer"}}, "lineer is not a valid SchedulerType"),
    "no such optimiser": ({"sft": {"optim": "adamm"}}, "adamm is not a valid OptimizerNames"),
    "numbers": (
        {"sft": {"per_device_train_batch_size": 0, "num_train_epochs": -1, "max_steps": 0}},
        "per_device_train_batch_size is 0, expected a positive integer; max_steps is 0, expected a positive integer; "
        "num_train_epochs is -1, expected a positive number",
    ),
    "a text for a number": ({"sft": {"max_steps": "four"}}, "'four'"),
    "learning rate": ({"learning_rate": -1e-4}, "learning_rate is -0.0001, expected a positive number"),
    "found by the trainer": ({"sft": {"eval_strategy": "steps", "eval_steps": 2}}, "eval_dataset"),
    "found in the schedule": ({"sft": {"lr_scheduler_type": "cosine_with_min_lr"}}, "min_lr"),
    "unknown setting of LoRA": ({"lora": {"rank": 4}}, "Invalid settings of LoraConfig: .*'rank'"),
    "LoRA on nothing": ({"lora": {"target_modules": ["query"]}}, "query"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_setting_is_one_clear_error(mistake: str) -> None:
    options, message = MISTAKES[mistake]
    model = make_model()
    before = weights(model)
    with pytest.raises(ConfigError, match=message) as caught:
        train(model, **options)
    assert "\n" not in str(caught.value)
    assert same(weights(model), before)


def test_planning_finds_mistakes_before_any_training() -> None:
    with pytest.raises(ConfigError, match="no 'epochs'"):
        planned_steps(10, {"epochs": 3})
    with pytest.raises(ConfigError, match="no batch to train on: 3 rows in batches of 4"):
        planned_steps(3, {"per_device_train_batch_size": 4, "dataloader_drop_last": True})
    with pytest.raises(ConfigError, match="no batch to train on"):
        planned_steps(0, {})


def quantised() -> Any:
    model = make_model()
    model.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    return model


def encoder_decoder() -> Any:
    return T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8))


def on_meta() -> Any:
    with torch.device("meta"):
        return make_model()


UNFIT: dict[str, tuple[Callable[[], Any], str]] = {
    "frozen": (lambda: make_model().requires_grad_(False), "none of its weights requires a gradient"),
    "quantised": (quantised, "it is quantised"),
    "peft": (lambda: get_peft_model(make_model(), LoraConfig()), r"pass what model.merge_and_unload\(\) returns"),
    "meta": (on_meta, "on the meta device"),
    "encoder-decoder": (encoder_decoder, "encoder-decoder"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_an_unfit_model_is_refused(kind: str) -> None:
    make, message = UNFIT[kind]
    with pytest.raises(UnsupportedModelError, match=message):
        train(make())


def test_a_frozen_model_takes_adapters() -> None:
    model = make_model().requires_grad_(False)
    assert not torch.equal(logits(train(model, lora=LORA, learning_rate=1e-2).model), logits(make_model()))
    assert not any(weight.requires_grad for weight in model.parameters())


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(PromptError, match="no rows"):
        train(rows=[])
    long = {"input_ids": [5] * 49, "labels": [5] * 49}
    with pytest.raises(PromptError, match=r"1 of 13 rows are longer .*, 48 tokens; the longest has 49"):
        train(rows=[*make_rows(), long])
    with pytest.raises(ConfigError, match="gives token 70, and the model has 64"):
        train(rows=[{"input_ids": [1, 70], "labels": [1, 70]}])


def test_an_error_in_a_call_is_not_taken_for_a_setting() -> None:
    def fail(_: int, model: Any) -> None:
        raise ValueError("mine")

    model = make_model()
    before = trappings(model)
    with pytest.raises(ValueError, match=r"^mine$"):
        train(model, at_steps=(1,), on_step=fail)
    assert trappings(model) == before


@pytest.mark.parametrize("text", ["CUDA out of memory. Tried to allocate 2 GiB.", "can't allocate memory"])
def test_too_little_memory_says_what_to_lower(text: str) -> None:
    model = make_model()

    def run_out(*_: Any) -> None:
        raise RuntimeError(text)

    model.lm_head.register_forward_pre_hook(run_out)
    model.model.norm.register_forward_pre_hook(run_out)
    with pytest.raises(LoxError, match="batches of 4 rows of up to 17 tokens: lower per_device_train_batch_size"):
        train(model)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'lox-hf\[peft\]'"):
        train(lora=LORA)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ConfigError, match=r"pip install 'lox-hf\[trl\]'"):
        train()
    with pytest.raises(ConfigError, match=r"pip install 'lox-hf\[trl\]'"):
        planned_steps(10, {})
