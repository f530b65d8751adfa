"""Synthetic pairs of base and aligned Llama checkpoints, written piece by piece in constant memory.

Run as a child process by `harden.py`. README.md of this folder describes the spectrum.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from measure import serve_job

WEIGHT_STD = 0.02
NOISE_STD = 1e-4
SIGNAL_DIRECTIONS = 16
SIGNAL_DECAY = 0.7
# The leading singular value over the noise edge. "signal": the first 6 directions hold 4 to 15 % of a delta's energy,
# R_align = 0.2 to 0.4, the range of the paper's figures. "strong": they hold about 45 %, and plain block Lanczos takes
# 4 steps. "noise" has no directions at all, the worst case of any iterative method.
SIGNAL_OVER_EDGE = {"signal": 5.0, "strong": 25.0, "noise": 0.0}
_PIECE_ELEMENTS = 1 << 21


@dataclass(frozen=True)
class Size:
    """The dimensions of one Llama checkpoint and the size at which its shards are cut."""

    hidden: int
    intermediate: int
    layers: int
    vocab: int
    aligned_shard_bytes: int = 1 << 29
    base_shard_bytes: int = 1 << 30


SIZES = {
    "llama-0.13b": Size(768, 2048, 12, 32000),
    "llama-0.37b": Size(1024, 2816, 24, 32000),
    "llama-1.3b": Size(2048, 5504, 24, 32000),  # Sheared-LLaMA-1.3B
    "llama-3.4b": Size(3200, 8640, 26, 32000),  # OpenLLaMA-3B
    "llama-2-7b": Size(4096, 11008, 32, 32000),
    "llama-0.14b": Size(1024, 2816, 8, 16000),
    "llama-1.27b": Size(4096, 11008, 5, 32000),
    "llama-exact": Size(512, 1376, 2, 2000, 1 << 23, 1 << 24),
    "quick-small": Size(256, 704, 4, 2000, 1 << 22, 1 << 23),
    "quick-large": Size(512, 1376, 3, 4000, 1 << 23, 1 << 24),
    "quick-exact": Size(256, 704, 2, 1000, 1 << 20, 1 << 21),
}


def shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """Return every tensor of an untied Llama checkpoint, by checkpoint name, in file order."""
    hidden, wide = size.hidden, size.intermediate
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size.vocab, hidden)}
    for layer in range(size.layers):
        prefix = f"model.layers.{layer}"
        names |= {f"{prefix}.self_attn.{letter}_proj.weight": (hidden, hidden) for letter in "qkvo"}
        names |= {f"{prefix}.mlp.{part}_proj.weight": (wide, hidden) for part in ("gate", "up")}
        names |= {f"{prefix}.mlp.down_proj.weight": (hidden, wide)}
        names |= {f"{prefix}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    return names | {"model.norm.weight": (hidden,), "lm_head.weight": (size.vocab, hidden)}


def write_pair(size_name: str, output: str, spectrum: str, seed: int) -> dict[str, Any]:
    """Write `base` and `aligned` below the output folder, unless the same pair is there already."""
    size, folder = SIZES[size_name], Path(output)
    recipe = {"size": asdict(size), "spectrum": spectrum, "seed": seed, "signal_over_edge": SIGNAL_OVER_EDGE[spectrum]}
    stamp = folder / "pair.json"
    if not stamp.exists() or json.loads(stamp.read_text()) != recipe:
        stamp.unlink(missing_ok=True)
        with _Checkpoint(folder / "base", size, size.base_shard_bytes) as base:
            with _Checkpoint(folder / "aligned", size, size.aligned_shard_bytes) as aligned:
                for name, shape in shapes(size).items():
                    for base_piece, aligned_piece in pieces(name, shape, spectrum, seed):
                        base.append(name, base_piece)
                        aligned.append(name, aligned_piece)
        stamp.write_text(json.dumps(recipe))
    count = sum(math.prod(shape) for shape in shapes(size).values())
    return {"base": str(folder / "base"), "aligned": str(folder / "aligned"), "parameters": count}


def pieces(
    name: str, shape: tuple[int, ...], spectrum: str, seed: int, device: str = "cpu"
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (base, aligned) of one tensor in bfloat16, a few rows at a time."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    if len(shape) == 1:
        base = torch.ones(shape, dtype=torch.bfloat16, device=device)
        yield base, (base.float() + 0.01 * _normal(shape, generator)).bfloat16()
        return
    rows, columns = shape
    left, right = _signal(rows, columns, spectrum, generator)
    step = max(1, _PIECE_ELEMENTS // columns)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        base = (WEIGHT_STD * _normal((stop - start, columns), generator)).bfloat16()
        noise = NOISE_STD * _normal((stop - start, columns), generator)
        yield base, (base.float() + torch.addmm(noise, left[start:stop], right)).bfloat16()


def _signal(rows: int, columns: int, spectrum: str, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors of the low-rank part; a spectrum of pure noise has none."""
    over_edge = SIGNAL_OVER_EDGE[spectrum]
    count = min(SIGNAL_DIRECTIONS, rows, columns) if over_edge else 0
    left, _ = torch.linalg.qr(_normal((rows, count), generator))
    right, _ = torch.linalg.qr(_normal((columns, count), generator))
    edge = NOISE_STD * (math.sqrt(rows) + math.sqrt(columns))
    values = over_edge * edge * torch.arange(1, count + 1, device=generator.device).pow(-SIGNAL_DECAY)
    return left * values, right.T


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


class _Checkpoint:
    """Append tensors, piece by piece and in order, to the safetensors shards of one folder."""

    def __init__(self, folder: Path, size: Size, shard_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        self._folder = folder
        self._shards = _cut(shapes(size), shard_bytes)
        self._files = {name: file for file, names in self._shards.items() for name in names}
        self._open: dict[str, BinaryIO] = {}
        _write_side_files(folder, size)

    def __enter__(self) -> _Checkpoint:
        for file, tensors in self._shards.items():
            self._open[file] = (self._folder / file).open("wb")
            self._open[file].write(_header(tensors))
        if len(self._shards) > 1:
            total = 2 * sum(math.prod(shape) for tensors in self._shards.values() for shape in tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": self._files}
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        return self

    def append(self, name: str, piece: torch.Tensor) -> None:
        """Write the next rows of the tensor; tensors arrive in the order of `shapes`."""
        self._open[self._files[name]].write(piece.contiguous().view(torch.uint8).numpy().data)

    def __exit__(self, *_: object) -> None:
        for stream in self._open.values():
            stream.close()


def _cut(tensors: dict[str, tuple[int, ...]], shard_bytes: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """Deal the tensors to shards in order, each at most `shard_bytes` unless one tensor alone is larger."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in tensors.items():
        size = 2 * math.prod(shape)
        if groups[-1] and filled + size > shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, start=1)}


def _header(tensors: dict[str, tuple[int, ...]]) -> bytes:
    """Return the safetensors header: its length in 8 bytes, then JSON padded with spaces to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        end = offset + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def config_of(size: Size) -> dict[str, Any]:
    """Return the content of `config.json`."""
    heads = size.hidden // 64
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": size.vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def _write_side_files(folder: Path, size: Size) -> None:
    """Write what `AutoModelForCausalLM` and `AutoTokenizer` need to load the folder."""
    model = {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}
    tokenizer = {"version": "1.0", "added_tokens": [], "model": model}
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    generation = {"max_new_tokens": 60}
    files = {"config": config_of(size), "tokenizer": tokenizer, "tokenizer_config": tokenizer_config}
    for name, content in (files | {"generation_config": generation}).items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    serve_job({"pair": write_pair})
