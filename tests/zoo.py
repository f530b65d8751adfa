"""Tiny pairs of aligned and base checkpoints, one kind for each way a file can name and shape its weights.

Every number comes from NumPy's seeded integers through exact arithmetic (uniform draws, signs, sums in a fixed order),
so a pair is the same bit for bit on every machine and the recorded figures of the reference can be compared with it.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.core_model_loading import revert_weight_conversion

SIGNAL = (0.24, 0.20, 0.10, 0.09, 0.08, 0.07)
"""Singular values of the alignment signal, in units of the weight's own largest: gaps after the 2nd and the 6th."""

NOISE_SHARE = 0.004
"""Standard deviation of what the alignment adds outside the signal, in units of the weight's own."""

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"

_TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Both sides over 64, so that the iterative decomposition runs and not only the exact one.
_WIDE: dict[str, Any] = {**_TINY, "vocab_size": 192, "hidden_size": 96, "intermediate_size": 144}
_HEAD_DIM: dict[str, Any] = {"head_dim": 8}
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_WIDE, "tie_word_embeddings": False}),
    "llama_tied": ("llama", {**_WIDE, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {**_TINY, "tie_word_embeddings": False}),
    "qwen3": ("qwen3", {**_TINY, **_HEAD_DIM, "tie_word_embeddings": True}),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": 128,
            "n_positions": 64,
            "n_embd": 72,
            "n_layer": 2,
            "n_head": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    "gemma2": ("gemma2", {**_TINY, **_HEAD_DIM, "sliding_window": 16}),
    "gemma3": ("gemma3_text", {**_TINY, **_HEAD_DIM, "sliding_window": 16}),
    # One matrix an expert in the file, fused into 3-D tensors when loaded.
    "mixtral": ("mixtral", {**_TINY, **_HEAD_DIM, **_EXPERTS, "tie_word_embeddings": False}),
    # 3-D experts in the file under the names of the loaded model, and their biases as 2-D tensors.
    "gpt_oss": (
        "gpt_oss",
        {
            **_TINY,
            **_HEAD_DIM,
            **_EXPERTS,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    # 3-D experts in the file, under other names than in the loaded model.
    "granitemoe": ("granitemoe", {**_TINY, **_EXPERTS, "tie_word_embeddings": False}),
}

KINDS = tuple(_CONFIGS)
TIED_KINDS = ("llama_tied", "qwen3", "gpt2", "gemma2", "gemma3")
MOE_KINDS = ("mixtral", "gpt_oss", "granitemoe")
FUSED_FILE_KINDS = ("gpt_oss", "granitemoe")


@dataclass(frozen=True)
class Pair:
    """Where a saved pair lies, and what it was made from."""

    kind: str
    aligned_dir: Path
    base_dir: Path
    dtype: torch.dtype
    seed: int

    def aligned(self) -> dict[str, torch.Tensor]:
        """Read the aligned checkpoint's tensors, in checkpoint names."""
        return read_checkpoint(self.aligned_dir)

    def base(self) -> dict[str, torch.Tensor]:
        """Read the base checkpoint's tensors, in checkpoint names."""
        return read_checkpoint(self.base_dir)


def save_pair(
    kind: str,
    directory: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "20KB",
    base_max_shard_size: str | None = None,
    seed: int = 0,
) -> Pair:
    """Save the pair `kind` as `directory/aligned` and `directory/base`, with a tokenizer and the usual side files.

    The base is cut into shards of `base_max_shard_size`, by default those of the aligned model.
    """
    config = make_config(kind)
    model_class = type(make_model(kind))
    base, aligned = make_tensors(kind, dtype=dtype, seed=seed)
    pair = Pair(kind, Path(directory) / "aligned", Path(directory) / "base", dtype, seed)
    sides = (
        (pair.aligned_dir, aligned, max_shard_size),
        (pair.base_dir, base, base_max_shard_size or max_shard_size),
    )
    for folder, tensors, shard_size in sides:
        model = model_class.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
        model.save_pretrained(folder, max_shard_size=shard_size)
        make_tokenizer(int(config.vocab_size)).save_pretrained(folder)
    return pair


def make_config(kind: str) -> Any:
    """Make the model's config, always a fresh one."""
    model_type, settings = _CONFIGS[kind]
    return AutoConfig.for_model(model_type, **settings)


def make_model(kind: str, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Make an untrained model of this kind, without touching the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(make_config(kind), dtype=dtype)


def make_tensors(
    kind: str, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Make the tensors of base and aligned, in checkpoint names and in the dtype each has in the file."""
    model = make_model(kind, dtype=dtype)
    tied = set(model.all_tied_weights_keys)
    live = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    base, aligned = {}, {}
    for name, like in sorted(revert_weight_conversion(model, live).items()):
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        before, after = (_vector if like.ndim < 2 else _matrices)(rng, tuple(like.shape))
        base[name] = torch.from_numpy(before).to(like.dtype)
        # What is learnt starts from the stored base, as in a real alignment run.
        aligned[name] = torch.from_numpy(base[name].double().numpy() + after).to(like.dtype)
    return base, aligned


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Make a word-level tokenizer of dummy words, with a chat template."""
    words = ["<pad>", "<s>", "</s>", "<unk>"] + [f"w{index}" for index in range(4, vocab_size)]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def read_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """Read all the tensors of a folder's safetensors files."""
    files = sorted(Path(folder).glob("*.safetensors"))
    assert files, f"no safetensors file in {folder}"
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def count_shards(folder: Path) -> int:
    """Count a folder's safetensors files."""
    return len(list(Path(folder).glob("*.safetensors")))


def fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    """Hash names, dtypes, shapes and bytes, however the tensors are cut into files."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Tell whether two checkpoints hold the same names, dtypes, shapes and bytes."""
    return fingerprint(left) == fingerprint(right)


def _vector(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Draw a 1-D weight near one, and a small change of it."""
    return 1.0 + _uniform(rng, shape, 0.1), _uniform(rng, shape, 0.05)


def _matrices(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Draw a stack of matrices over the leading axes, and for each a low-rank signal with noise."""
    *stack, rows, columns = shape
    std = 0.05
    base = _uniform(rng, shape, std)
    change = _uniform(rng, shape, std * NOISE_SHARE).reshape(-1, rows, columns)
    top = std * (np.sqrt(rows) + np.sqrt(columns))
    for matrix in change:
        left, right = _orthogonal_signs(rng, rows), _orthogonal_signs(rng, columns)
        for index in range(min(len(SIGNAL), len(left), len(right))):
            matrix += SIGNAL[index] * top / np.sqrt(rows * columns) * np.outer(left[index], right[index])
    return base, change.reshape(*stack, rows, columns)


def _uniform(rng: np.random.Generator, shape: tuple[int, ...], std: float) -> np.ndarray:
    """Draw with mean zero and standard deviation `std`."""
    return (rng.random(shape) - 0.5) * (np.sqrt(12.0) * std)


def _orthogonal_signs(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw up to six orthogonal rows of signs: Walsh functions, with their entries shuffled and flipped.

    Signs need no QR, whose last bits differ from machine to machine.
    """
    period = 8 if size % 8 == 0 else 4
    assert size % period == 0, "sizes of the zoo are multiples of four"
    count = min(len(SIGNAL), period - 1)
    columns = range(period)
    walsh = np.array([[(-1.0) ** (row & column).bit_count() for column in columns] for row in range(1, count + 1)])
    rows = np.tile(walsh, size // period)[:, rng.permutation(size)]
    return rows * rng.choice([-1.0, 1.0], size)
