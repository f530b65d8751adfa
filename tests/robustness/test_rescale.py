"""The rescaled control: its function is the same on many architectures, and refused where it would not be."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lox_hf.errors import ConfigError, UnsupportedModelError
from lox_hf.robustness import rescale
from lox_hf.robustness.finetuning.finetune import fine_tune
from lox_hf.robustness.rescale import FACTOR, rescale_residual
from robustness import trainable

_COMMON: dict[str, Any] = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_UNTIED: dict[str, Any] = {**_COMMON, "tie_word_embeddings": False, "hidden_size": 32}
_LLAMA: dict[str, Any] = {
    **_UNTIED,
    **{"intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
    "max_position_embeddings": 64,
}
_GPT: dict[str, Any] = {**_UNTIED, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
_EXPERTS: dict[str, Any] = {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
_HYBRID: dict[str, Any] = {**_LLAMA, "layer_types": ["conv", "full_attention", "conv"]}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 8},
    "phi3": _LLAMA,
    "starcoder2": _LLAMA,
    "gpt_neox": _LLAMA,
    "phi": _LLAMA,
    "falcon": _UNTIED | {"num_hidden_layers": 3, "num_attention_heads": 4},
    "gptj": {**_GPT, "rotary_dim": 4},
    "gpt2": _GPT,
    "opt": {**_LLAMA, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "mixtral": _EXPERTS,
    "gpt_oss": {**_EXPERTS, "head_dim": 8},
    "granitemoe": _EXPERTS,
    "lfm2": _HYBRID,
    "gemma2": {**_LLAMA, "head_dim": 8, "sliding_window": 16},
    "olmo2": _LLAMA,
    "bloom": _UNTIED | {"n_layer": 3, "n_head": 4},
    "rwkv": _UNTIED | {"num_hidden_layers": 3, "attention_hidden_size": 32, "context_length": 64},
}
REFUSED = ("gemma2", "olmo2", "bloom", "rwkv")
PRE_NORM = tuple(kind for kind in CONFIGS if kind not in REFUSED)
POSITIONS = {"gpt2": "wpe.weight", "opt": "embed_positions.weight"}
BIASES = {
    "gpt_neox": {"layers.0.attention.dense.bias", "layers.0.mlp.dense_4h_to_h.bias"},
    "gpt2": {"h.0.attn.c_proj.bias", "h.0.mlp.c_proj.bias"},
    "gpt_oss": {"layers.0.self_attn.o_proj.bias", "layers.0.mlp.experts.down_proj_bias"},
}


def make_model(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A model whose weights, biases and norms are all random, large enough for every one of them to count."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**CONFIGS[kind], **changes}), dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.15, generator=generator)
            else:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    tokens = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits.float()


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    """Relative to the spread over the vocabulary, over all tokens."""
    return ((left - right).norm() / (left - left.mean(-1, keepdim=True)).norm()).item()


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("kind", PRE_NORM)
def test_the_function_is_the_same_on_other_tokens(kind: str) -> None:
    model = make_model(kind)
    before, weights_before = logits(model), weights(model)
    scaled = rescale_residual(model)
    # eps / 2v with v = 0.15 ** 2 and eps = 1e-5 is 2e-4; it goes through three blocks.
    assert difference(before, logits(model)) < 2e-3
    now = dict(model.get_decoder().named_parameters())
    assert sum(now[name].ndim > 1 for name in scaled) >= 1 + 2 * 3  # embeddings, and two projections a block
    ours = {id(now[name]) for name in scaled}
    for name, weight in model.named_parameters():
        assert torch.equal(weight, weights_before[name] * (FACTOR if id(weight) in ours else 1)), name
    assert id(model.get_input_embeddings().weight) in ours
    assert id(model.get_output_embeddings().weight) not in ours


@pytest.mark.parametrize("kind", PRE_NORM)
def test_every_weight_that_is_scaled_matters(kind: str) -> None:
    """The control: were one of them left out, the function would change; and the check would see it."""
    model = make_model(kind)
    before = logits(model)
    scaled = rescale_residual(model)
    now = dict(model.get_decoder().named_parameters())
    for name in scaled:
        if now[name].ndim > 1:
            with torch.no_grad():
                now[name].div_(FACTOR)
                assert difference(before, logits(model)) > rescale.TOLERANCE, name
                now[name].mul_(FACTOR)


@pytest.mark.parametrize(("kind", "name"), POSITIONS.items(), ids=POSITIONS)
def test_learnt_positions_are_scaled_with_the_tokens(kind: str, name: str) -> None:
    assert any(name in scaled for scaled in rescale_residual(make_model(kind)))


@pytest.mark.parametrize(("kind", "names"), BIASES.items(), ids=BIASES)
def test_biases_are_scaled_with_their_projections(kind: str, names: set[str]) -> None:
    assert names <= set(rescale_residual(make_model(kind)))


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("llama", {"tie_word_embeddings": True}, "tied"),
        ("gpt2", {"tie_word_embeddings": True}, "tied"),
        ("gemma2", {}, "do not undo the constant"),
        ("olmo2", {}, "do not undo the constant"),
        ("bloom", {}, "do not undo the constant"),
        ("rwkv", {}, "no projection into the residual stream was found"),
    ],
    ids=["llama-tied", "gpt2-tied", "gemma2", "olmo2", "bloom", "rwkv"],
)
def test_what_would_change_is_refused_and_left_as_it_was(kind: str, changes: dict[str, Any], reason: str) -> None:
    model = make_model(kind, **changes)
    before = weights(model)
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        rescale_residual(model)
    assert "Leave the control 'rescaled' out" in str(caught.value)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_a_projection_of_unknown_name_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rescale, "WRITERS", rescale.WRITERS - {"down_proj"})
    model = make_model("llama")
    before = weights(model)
    with pytest.raises(UnsupportedModelError, match="names that are not known"):
        rescale_residual(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_is_scaled_without_rounding(dtype: torch.dtype) -> None:
    model = make_model("llama", dtype)
    before = weights(model)
    scaled = rescale_residual(model)
    assert model.get_decoder().get_parameter(scaled[0]).dtype == dtype
    for name in scaled:
        assert torch.equal(model.get_decoder().get_parameter(name).float(), before[f"model.{name}"].float() * FACTOR)


def test_freshly_initialised_weights_are_within_the_tolerance() -> None:
    """The worst case that the tolerance is made for: the smallest embeddings under the largest eps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **_LLAMA, rms_norm_eps=1e-5))
    before = logits(model.eval())
    rescale_residual(model)
    assert 2e-3 < difference(before, logits(model)) < rescale.TOLERANCE


def test_mode_and_random_state_are_left_alone() -> None:
    model = make_model("gpt2", embd_pdrop=0.5).train()
    model.transformer.ln_f.eval()
    state = torch.get_rng_state()
    rescale_residual(model)  # with dropout on, the logits would differ by far more than the tolerance
    assert model.training and model.transformer.h.training and not model.transformer.ln_f.training
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("factor", [0.0, 1.0, -4.0, 3.0, float("inf"), float("nan")])
def test_a_factor_that_would_round_is_refused(factor: float) -> None:
    with pytest.raises(ConfigError, match="power of two"):
        rescale_residual(make_model("llama"), factor)


def test_a_model_that_is_not_loaded_is_refused() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **_LLAMA))
    with pytest.raises(UnsupportedModelError, match="meta device"):
        rescale_residual(model)


def test_the_same_step_changes_a_rescaled_model_less() -> None:
    """What the control is for: nothing but the size of some weights makes a fine-tuning look slower."""
    moved = {}
    for factor in (None, FACTOR):
        model = trainable.make_model()
        if factor:
            rescale_residual(model, factor)
        before = trainable.logits(model)
        sft = trainable.SFT | {"max_steps": 1}
        fine_tune(model, trainable.make_tokenizer(), trainable.make_rows(), sft=sft, seed=0)
        moved[factor] = difference(before, trainable.logits(model))
    assert 0 < moved[FACTOR] < 0.8 * moved[None]
