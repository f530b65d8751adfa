"""The rescaled control: the same function with larger weights, which makes any attack at a fixed rate look weaker."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from lox_hf.errors import ConfigError, UnsupportedModelError
from lox_hf.weights.live import check_plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FACTOR = 4.0
"""The constant with which the control was first seen to delay an attack (by 1.6 steps, on small models)."""
WRITERS = frozenset(
    "o_proj down_proj"  # Llama, Mistral, Qwen, Phi-3; fused experts
    " c_proj"  # GPT-2, StarCoder 2
    " dense dense_4h_to_h"  # GPT-NeoX, Falcon; Phi's attention
    " out_proj fc2 fc_out"  # OPT, GPT-J, CodeGen; Mamba's mixer
    " output_linear w2".split()  # Granite's experts, LFM 2
)
"""Names of the projections that write into the residual stream."""
TOLERANCE = 0.03
"""Largest change of the logits, relative to their spread. A norm layer divides by sqrt(v + eps), v the mean square of
its input: after the constant eps weighs less, which changes its output by at most eps / 2v. That is 1.3 % where v is
smallest, at embeddings as they are initialised (standard deviation 0.02) with eps = 1e-5, and was at most that on 30
architectures. Where the norm layers do not undo the constant, logits change by 8 % and more."""
ROWS, LENGTH = 2, 16
"""Size of the batch of random tokens on which the logits are compared."""


def rescale_residual(model: "PreTrainedModel", factor: float = FACTOR) -> tuple[str, ...]:
    """Multiply all that is written into the residual stream by a constant, in place, and check that nothing changed.

    In a pre-norm model every block reads the stream through a norm layer, which undoes the constant: with embeddings
    and the last projections of attention and MLP multiplied by it, the model gives the same logits. A fine-tuning at
    the same learning rate then moves these weights by a smaller share of themselves. Whatever a defence gains over the
    aligned model must be more than this gains.

    Blocks whose attention and MLP stand side by side (GPT-NeoX, Phi, Falcon) write one sum into the stream and are
    treated alike. So are mixtures of experts: every expert's projection is multiplied; the router reads the normed
    stream and is left alone. Of a model that also sees images, text alone is checked.

    Args:
        model: The model, changed in place.
        factor: The constant, a power of two: no weight is rounded, in any floating dtype.

    Returns:
        Names of the parameters that were multiplied, within the decoder.

    Raises:
        ConfigError: If the constant is no power of two, or one.
        UnsupportedModelError: If the function would change: tied embeddings, norm layers elsewhere than in front of
            attention and MLP, or projections that are not known by name; or if the weights are quantised, offloaded or
            sharded. The model is as it was.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        >>> rescale_residual(LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1)))
        ('embed_tokens.weight', 'layers.0.self_attn.o_proj.weight', 'layers.0.mlp.down_proj.weight')
    """
    if not 0 < factor < math.inf or factor == 1 or math.frexp(factor)[0] != 0.5:
        raise ConfigError(f"The constant is {factor}, expected a power of two other than 1, such as {FACTOR:g}.")
    check_plain(model, model.state_dict())
    if getattr(model.get_output_embeddings(), "weight", None) is _embeddings(model):
        tied = "its embeddings are its output head too (tied), so that the logits would be multiplied as well"
        raise UnsupportedModelError(_refusal(model, tied))
    found = _stream_weights(model)
    before = _logits(model)
    _multiply(found.values(), factor)
    change = _change(before, _logits(model))
    if not change <= TOLERANCE:  # NaN included
        _multiply(found.values(), 1 / factor)
        changed = (
            f"with what its blocks write multiplied by {factor:g}, logits change by {100 * change:.2g} %, expected "
            f"at most {100 * TOLERANCE:g} %. Its norm layers do not undo the constant (those of Gemma 2 and OLMo 2 "
            "stand behind attention and MLP, one of BLOOM's behind the embeddings), or some of its projections have "
            "names that are not known"
        )
        raise UnsupportedModelError(_refusal(model, changed))
    return tuple(found)


def _refusal(model: nn.Module, reason: str) -> str:
    return f"{type(model).__name__} cannot be rescaled: {reason}. Leave the control 'rescaled' out."


def _embeddings(model: "PreTrainedModel") -> Tensor:
    return cast("Tensor", model.get_input_embeddings().weight)


def _stream_weights(model: "PreTrainedModel") -> dict[str, Tensor]:
    """Embeddings of tokens and positions, and projections into the stream with their biases; what is shared once."""
    decoder = model.get_decoder()
    tables = [module for module in decoder.modules() if isinstance(module, nn.Embedding)]
    embeddings = {id(weight) for table in tables for weight in table.parameters()}
    named = dict(decoder.named_parameters())
    writers = set(filter(_is_writer, named))
    if not writers:
        names = ", ".join(sorted(WRITERS))
        missing = f"no projection into the residual stream was found; known names are {names}"
        raise UnsupportedModelError(_refusal(model, missing))
    return {name: weight for name, weight in named.items() if name in writers or id(weight) in embeddings}


def _is_writer(name: str) -> bool:
    """`o_proj.weight` and `o_proj.bias` of a module; `down_proj` and `down_proj_bias` of fused experts."""
    return any(part.removesuffix("_bias") in WRITERS for part in name.split(".")[-2:])


@torch.no_grad()
def _multiply(weights: Iterable[Tensor], factor: float) -> None:
    for weight in weights:
        weight.mul_(factor)


@torch.no_grad()
def _logits(model: "PreTrainedModel") -> Tensor:
    """Logits on random tokens, float32 (tokens, vocabulary), without dropout; the model's mode is kept."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(len(_embeddings(model)), (ROWS, LENGTH), generator=generator).to(model.device)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return model(input_ids=tokens, use_cache=False).logits.flatten(0, 1).float()
    finally:
        for module, training in modes:
            module.training = training


def _change(before: Tensor, after: Tensor) -> float:
    """Median over the tokens: a router near a tie may send a single token to another expert."""
    spread = (before - before.mean(-1, keepdim=True)).norm(dim=-1)
    return ((after - before).norm(dim=-1) / spread).median().item()
