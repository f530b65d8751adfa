"""A 4-bit model on the CPU: the dense edit is refused by the scheme's name, the adapter does what it would have done.

Factors come from the full-precision files. bitsandbytes repacks a CPU weight at the first forward pass, so the effect
is measured on forward passes alone, never by dequantising.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lox_hf import LoxConfig, UnsupportedModelError, apply_lox, get_lox_model

PROMPT = torch.arange(10)[None]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Aligned and base on disk; sides are multiples of the 64 that bitsandbytes' CPU kernels need."""
    folder = tmp_path_factory.mktemp("quantised")
    config = LlamaConfig(
        vocab_size=192, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        model.save_pretrained(folder / "base")
        for parameter in model.parameters():
            if parameter.dim() == 2:
                change = torch.randn(parameter.shape[0], 2) @ torch.randn(2, parameter.shape[1])
                parameter.data += 0.02 * change / change.std() * parameter.std()
        model.save_pretrained(folder / "aligned")
    return folder / "aligned", folder / "base"


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(PROMPT).logits


def test_adapter_on_a_4_bit_model_does_what_the_dense_edit_does(pair: tuple[Path, Path]) -> None:
    aligned, base = pair
    config = LoxConfig(str(base), r=2, alpha=1.25)
    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    before = logits(AutoModelForCausalLM.from_pretrained(aligned, quantization_config=quantisation))
    quantised = AutoModelForCausalLM.from_pretrained(aligned, quantization_config=quantisation)
    with pytest.raises(UnsupportedModelError, match="bitsandbytes"):
        apply_lox(quantised, config)
    with pytest.raises(UnsupportedModelError, match="aligned_model"):
        get_lox_model(quantised, config)
    adapted = get_lox_model(quantised, config, aligned_model=aligned)
    effect = logits(adapted) - before
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before)

    dense = AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.float32)
    start = logits(dense)
    expected = logits(apply_lox(dense, config)) - start
    # The two start from weights that differ by 4-bit rounding, so their effects agree to that and no closer.
    similarity = torch.nn.functional.cosine_similarity(effect.flatten(), expected.flatten(), dim=0)
    assert similarity > 0.95
    assert (effect.norm() / expected.norm()).item() == pytest.approx(1, abs=0.15)
    assert (before - start).norm() > 1e-3 * start.norm()  # control: the model is quantised
