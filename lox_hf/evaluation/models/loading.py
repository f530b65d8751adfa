"""Load a model with its tokenizer, from a folder or the Hub; whatever is wrong with it in one line."""

import importlib.util
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from lox_hf.errors import CheckpointError, ConfigError, listing
from lox_hf.hub_files import Resolved, resolve
from lox_hf.weights.folder import is_adapter
from lox_hf.weights.source import ADAPTER_CONFIG, read_json

Head = Literal["causal-lm", "sequence-classification"]

AUTO_CLASSES: dict[str, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": AutoModelForSequenceClassification,
}
# An architecture ends in what its head is for; names without "For", such as GPT2LMHeadModel, say nothing certain.
OTHER_HEADS = {
    "causal-lm": re.compile(r"For(?!CausalLM|ConditionalGeneration)[A-Z]"),
    "sequence-classification": re.compile(r"For(?!SequenceClassification)[A-Z]"),
}
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_model(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    head: Head = "causal-lm",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, ready for evaluation.

    A PEFT adapter of any kind is put on the base that it names; a tokenizer that it lacks is the base's. Its weights
    stay in float32 where PEFT keeps them so.

    Args:
        name_or_path: Checkpoint or adapter: a folder or a Hub id.
        revision: Revision on the Hub.
        dtype: Dtype of the weights, such as "bfloat16"; "auto" keeps the one they are stored in.
        device: Where the model goes, such as "cuda:0"; None takes the accelerator if there is one, else the CPU;
            "auto" spreads it over all devices, which needs accelerate.
        token: Hub token; None uses the stored login.
        trust_remote_code: Run code of the model's repository.
        head: What the model must be for: "causal-lm" or "sequence-classification".

    Returns:
        The model in evaluation mode, a `PeftModel` for an adapter, and the tokenizer. The model's `name_or_path` is
        what was passed, and its config's `_commit_hash` the commit on the Hub.

    Raises:
        ConfigError: If the dtype is not known, the device is not there, the token cannot be one, or a package is
            missing.
        CheckpointError: If the files cannot be found, are damaged or incomplete, have no tokenizer, or belong to a
            model with another head.

    Example:
        >>> model, tokenizer = load_model("my-hardened", dtype="bfloat16")  # doctest: +SKIP
    """
    placed = {"dtype": _dtype(dtype), "device": _device(device)}
    with quiet_transformers(bars=sys.stderr.isatty()):
        return _load(_resolve(name_or_path, revision, token), token, head, trust_remote_code, placed)


@contextmanager
def quiet_transformers(*, bars: bool = False) -> Iterator[None]:
    """Keep off what transformers writes to the screen, and what peft's use of it warns of: no news for a newcomer.

    Args:
        bars: Leave its progress bars on.
    """
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


@contextmanager
def quiet_import() -> Iterator[None]:
    """Keep off what bitsandbytes, where it is installed, says of kernels for 4-bit weights that are not."""
    logger = getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _load(
    files: Resolved, token: str | bool | None, head: Head, trust: bool, placed: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    base = _base_of(files, token) if is_adapter(files.folder) else files
    config = _load_config(base, head, trust)
    tokenizer = _load_tokenizer(files if _has_tokenizer(files.folder) else base, trust)
    model = _load_weights(base, config, head, trust, placed)
    if base is not files:
        model = _put_adapter_on(model, len(tokenizer), files)
    # Not the folder in the Hub's cache, which says nothing to a reader of reports.
    model.name_or_path = model.config.name_or_path = files.reference.name_or_path
    model.config._commit_hash = files.reference.revision
    return model.eval(), tokenizer


def _resolve(name: str | Path, revision: str | None, token: str | bool | None) -> Resolved:
    files = resolve(name, revision=revision, token=token)
    if not any(files.folder.glob("*.safetensors")):
        raise CheckpointError(
            f"'{name}' has no safetensors file; pickles, which can run code when they are read, are not loaded. "
            "Convert it once: load it with AutoModelForCausalLM.from_pretrained and save it with save_pretrained."
        )
    return files


def _base_of(adapter: Resolved, token: str | bool | None) -> Resolved:
    """Files of the model that an adapter is for."""
    name = adapter.reference.name_or_path
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(f"'{name}' is a PEFT adapter, which needs peft: pip install 'lox-hf[peft]'.")
    found = read_json(adapter.folder / ADAPTER_CONFIG)
    base = found.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"The {ADAPTER_CONFIG} of '{name}' names no base_model_name_or_path: write it there.")
    try:
        return _resolve(base, found.get("revision"), token)
    except CheckpointError as error:
        raise CheckpointError(f"'{name}' is an adapter for '{base}', which is not to be had: {error}") from error


def _load_tokenizer(files: Resolved, trust: bool) -> PreTrainedTokenizerBase:
    name = files.reference.name_or_path
    if not _has_tokenizer(files.folder):
        raise CheckpointError(
            f"'{name}' has no tokenizer: put its files ({', '.join(TOKENIZER_FILES[:2])}) beside the weights."
        )
    with _load_errors(f"the tokenizer of '{name}'"):
        tokenizer: Any = AutoTokenizer.from_pretrained(files.folder, trust_remote_code=trust)
        return tokenizer


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in TOKENIZER_FILES)


def _load_config(files: Resolved, head: Head, trust: bool) -> PreTrainedConfig:
    """Read the config; refuse a model that would load with another head than its own, and say nonsense."""
    name = files.reference.name_or_path
    with _load_errors(f"'{name}'"):
        config = AutoConfig.from_pretrained(files.folder, trust_remote_code=trust)
    architectures = config.architectures or []
    other = any(map(OTHER_HEADS[head].search, architectures))
    if other or (head == "causal-lm" and config.is_encoder_decoder):
        suffix = AUTO_CLASSES[head].__name__.removeprefix("AutoModel")
        raise CheckpointError(
            f"'{name}' is {' and '.join(architectures) or config.model_type}"
            f"{', an encoder-decoder' * config.is_encoder_decoder}; expected a model such as Llama{suffix}."
        )
    return config


def _load_weights(
    files: Resolved, config: PreTrainedConfig, head: Head, trust: bool, placed: dict[str, Any]
) -> PreTrainedModel:
    name, device = files.reference.name_or_path, placed["device"]
    # Quantised weights are packed on the way to their device and cannot be moved there afterwards.
    mapped = device == "auto" or hasattr(config, "quantization_config")
    with _load_errors(f"'{name}'"):
        model, info = AUTO_CLASSES[head].from_pretrained(
            files.folder,
            config=config,
            dtype=placed["dtype"],
            device_map=device if mapped else None,
            trust_remote_code=trust,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
        _check_complete(name, info["missing_keys"], info["mismatched_keys"])
        return model if mapped else model.to(device)


def _put_adapter_on(model: Any, vocabulary: int, adapter: Resolved) -> Any:
    """The PEFT model of an adapter on its base, whose embeddings grow to the size of its vocabulary."""
    from peft import PeftModel

    with _load_errors(f"the adapter '{adapter.reference.name_or_path}'"), warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")  # they would stay as they were initialised
        if vocabulary > model.get_input_embeddings().weight.shape[0]:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # rows that the adapter does not bring are the same in every run
                model.resize_token_embeddings(vocabulary)
        return PeftModel.from_pretrained(model, str(adapter.folder), torch_device=str(model.device))


def _check_complete(
    name: str, missing: set[str], mismatched: Iterable[tuple[str, Iterable[int], Iterable[int]]]
) -> None:
    """Refuse weights that would stay as they were initialised."""
    wrong = [f"{key}: missing" for key in sorted(missing)]
    wrong += [f"{key}: {tuple(found)} against {tuple(wanted)}" for key, found, wanted in sorted(mismatched)]
    if wrong:
        raise CheckpointError(
            f"The weights of '{name}' do not fit its config: {listing(wrong, 5)} Is the download complete?"
        )


@contextmanager
def _load_errors(what: str) -> Iterator[None]:
    """Turn whatever transformers meets in a model's files into one line; it has no error of its own for them."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"Cannot load {what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The first line of what was said, and the second where that only announces it, as a short sentence."""
    lines = [*map(str.strip, str(error).strip().splitlines()), type(error).__name__]
    said = " ".join(lines[: 1 + lines[0].endswith(":")]) if lines[0] else lines[1]
    hint = " Pass trust_remote_code if you have read that code and trust it." * ("trust_remote_code" in str(error))
    return shorten(said.rstrip(" .:,"), 400, placeholder=" ...") + "." + hint


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if dtype == "auto":
        return dtype
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype must be 'auto' or one such as 'bfloat16', 'float16' or 'float32', got '{dtype}'.")
    return found


def _device(device: str | torch.device | None) -> str | torch.device:
    if device is None:
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    if device == "auto":
        if importlib.util.find_spec("accelerate") is None:
            raise ConfigError(
                "device='auto' spreads the model by accelerate: pip install accelerate, or name a device."
            )
        return "auto"
    try:
        torch.zeros(1, device=device).item()  # the meta device exists, but holds no numbers
    # AssertionError: a torch without CUDA; NotImplementedError, a RuntimeError: one without that backend.
    except (RuntimeError, AssertionError) as error:
        found = torch.accelerator.current_accelerator()
        there = f"'{found.type}' and 'cpu'" if found else "'cpu'"
        raise ConfigError(f"There is no device '{device}' here; there is {there}.") from error
    return torch.device(device)
