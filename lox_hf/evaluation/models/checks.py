"""What is asked of a loaded model and its tokenizer before anything is worked out."""

from collections.abc import Iterable, Sequence
from typing import Any

from lox_hf.errors import ConfigError, UnsupportedModelError
from lox_hf.evaluation.models.batch import learns_prompts


def model_name(model: Any) -> str:
    """Return how reports call a model: by where it was loaded from, or else by its class."""
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


def context_length(model: Any) -> int | None:
    """Return how many tokens a model can read and write.

    Args:
        model: A transformers model, or a PEFT model around one.

    Returns:
        Its positions, less those that learnt prompts take; None where there is no limit.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        >>> context_length(LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1, max_position_embeddings=64)))
        64
    """
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions and learns_prompts(model):
        return positions - model.active_peft_config.num_virtual_tokens
    return positions


def check_model(model: Any, tokenizer: Any) -> None:
    """Refuse a model that does not continue a text, and one without a tokenizer.

    Args:
        model: The model.
        tokenizer: Its tokenizer.

    Raises:
        UnsupportedModelError: If the model is an encoder-decoder, has no head that predicts the next token, or is not
            in this process.
        ConfigError: If there is no tokenizer.
    """
    name, config = type(model).__name__, getattr(model, "config", None)
    if config is None:
        raise UnsupportedModelError(
            f"{name} is not a loaded model, whose numbers are needed: pass one of transformers."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} ({config.model_type}) is an encoder-decoder; only decoder-only models, which continue a prompt, "
            "can be evaluated."
        )
    # Transformers gives the method to those alone that predict the next token: not to BERT's masked head.
    if not callable(getattr(model, "generate", None)):
        raise UnsupportedModelError(f"{name} cannot generate text: load it with AutoModelForCausalLM.")
    if tokenizer is None:
        raise ConfigError(f"{name} needs its tokenizer: pass it as the second argument.")


def check_vocabulary(model: Any, tokenizer: Any, sequences: Iterable[Sequence[int]]) -> None:
    """Refuse token ids that the model has no embedding for.

    Args:
        model: The model.
        tokenizer: What gave the ids.
        sequences: The ids.

    Raises:
        ConfigError: If there are any.
    """
    weight = model.get_input_embeddings().weight
    vocabulary = getattr(weight, "ds_shape", weight.shape)[0]  # DeepSpeed ZeRO-3 leaves it empty between uses
    largest = max(map(max, filter(None, sequences)), default=0)
    if largest >= vocabulary:
        raise ConfigError(
            f"The tokenizer '{tokenizer.name_or_path}' does not belong to '{model_name(model)}': it gives token "
            f"{largest}, and the model has {vocabulary}. Load both from the same place."
        )
