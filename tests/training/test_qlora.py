"""LoRA over a bitsandbytes base: read as the numbers the codes stand for, and corrected in an adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TrainerCallback

from lox_hf import UnsupportedModelError
from lox_hf.training.backends import open_weights
from lox_hf.training.backends.quantised import QuantisedMatrix, quantised_matrices
from robustness.trainable import make_model
from training.adapted import axes, changes_of, logits
from training.callback_runs import make_trainer

SCHEMES: dict[str, dict[str, Any]] = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32},
    "nested": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32},
    "8bit": {"load_in_8bit": True},
}
LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose sides are the multiples of 64 that bitsandbytes' CPU kernels need."""
    path = tmp_path_factory.mktemp("wide")
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


def quantised(folder: Path, scheme: str = "4bit") -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**SCHEMES[scheme]))


def codes(model: Any) -> dict[str, torch.Tensor]:
    """What bitsandbytes holds, by the names the model has without adapters."""
    named = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter
        for name, parameter in model.named_parameters()
    }
    return {name: p.detach().clone() for name, p in named.items() if not p.is_floating_point()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantised_matrix_reads_as_its_numbers_with_the_adapter(folder: Path, scheme: str) -> None:
    plain = quantised(folder, scheme)
    base = dequantize_module_weight(plain.model.layers[0].self_attn.q_proj).float()
    model = get_peft_model(quantised(folder, scheme), LORA)
    before = codes(model)
    assert before
    weights = open_weights(model)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    expected = base + layer.get_delta_weight("default")
    assert torch.allclose(weights.get(NAME), expected, atol=1e-5)
    along = axes(weights.matrices[NAME].shape)
    within = along.U.double().T @ expected.double() @ along.Vh.double().T
    assert torch.allclose(weights.matrices[NAME].coordinates(along), within, atol=1e-5)
    assert (within - along.U.double().T @ base.double() @ along.Vh.double().T).abs().max() > 0.01  # control
    full = make_model(hidden_size=64, intermediate_size=128)
    assert weights.matrices.keys() == open_weights(full).matrices.keys()
    assert 1e-4 < (base - full.state_dict()[NAME]).norm() / base.norm() < 0.2  # control: it is quantised
    weights.add(changes_of(weights, "proj"))
    moved = weights.matrices[NAME].coordinates(along) - within
    left, right = changes_of(weights, "proj")[NAME]
    assert torch.allclose(moved, (along.U.T @ left @ right @ along.Vh.T).double(), atol=1e-5)
    assert same(codes(model), before)


def test_a_4_bit_weight_that_the_cpu_has_rearranged_is_no_longer_read(folder: Path) -> None:
    model = get_peft_model(quantised(folder), LORA)
    weights = open_weights(model)
    along = axes(weights.matrices[NAME].shape)
    first = weights.matrices[NAME].coordinates(along)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    logits(model)  # in eval mode, without gradients
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU has no AVX512-BF16, so bitsandbytes rearranges nothing")
    assert torch.equal(weights.matrices[NAME].coordinates(along), first)  # it was read before
    with pytest.raises(UnsupportedModelError, match="rearranged"):
        weights.matrices[NAME].coordinates(axes(weights.matrices[NAME].shape, seed=1))


def test_other_schemes_are_refused_by_name(folder: Path) -> None:
    model = get_peft_model(make_model(), LORA)
    open_weights(model)  # control
    model.config.quantization_config = QuantoConfig(weights="int8")
    with pytest.raises(UnsupportedModelError, match="QuantoConfig"):
        open_weights(model)
    plain = make_model()
    assert quantised_matrices(plain, dict(plain.named_parameters())) == {}
    layer = quantised(folder).model.layers[0].self_attn.q_proj
    matrix = QuantisedMatrix(layer, "q_proj")
    with pytest.raises(UnsupportedModelError, match="q_proj"):
        matrix.add(torch.zeros(64, 1), torch.zeros(1, 64))


def test_qlora_trains_on_under_a_correction(folder: Path, tmp_path: Path) -> None:
    class Correct(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 2:
                weights = open_weights(model)
                weights.add(changes_of(weights, "proj"))
                self.kept = {name: t.clone() for name, t in model.state_dict().items() if ".lox." in name}

    callback = Correct()
    model = quantised(folder)
    before = codes(model)
    settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4, "with_peft_config": LORA}
    trainer = make_trainer(tmp_path, "sft", model=model, callbacks=[callback], **settings)
    trainer.train()
    state = trainer.model.state_dict()
    assert callback.kept
    assert all(torch.equal(state[name], tensor) for name, tensor in callback.kept.items())
    assert same(codes(trainer.model), before)
    loaded = PeftModel.from_pretrained(quantised(folder), str(tmp_path / "checkpoint-4"))
    loaded.load_adapter(str(tmp_path / "checkpoint-4" / "lox"), adapter_name="lox")
    loaded.base_model.set_adapter(["default", "lox"])
    assert torch.allclose(logits(loaded), logits(trainer.model), atol=0.05)
